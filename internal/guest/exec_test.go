package guest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// session is an exec stream; it keeps the account of the input's window.
type session struct {
	*stream
	mu     sync.Mutex
	window int
	credit chan struct{}
}

func (h *host) exec(req *guestrpc.Exec) *session {
	h.t.Helper()
	return &session{
		stream: h.open(guestrpc.PortAgent, &guestrpc.Header{
			Version: guestrpc.Version, Op: guestrpc.OpExec, Secret: testSecret, Exec: req,
		}),
		window: guestrpc.StdinWindow, credit: make(chan struct{}, 1),
	}
}

func (h *host) sh(script string) *session {
	h.t.Helper()
	return h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", script}})
}

func (s *session) started() int {
	s.t.Helper()
	var started guestrpc.Started
	decode(s.t, s.next(), guestrpc.FrameStarted, &started)
	return started.PID
}

// write sends input within the window. It gives up when done is closed.
func (s *session) write(p []byte, done <-chan struct{}) {
	for len(p) > 0 {
		s.mu.Lock()
		n := min(len(p), s.window, guestrpc.MaxFrame)
		s.window -= n
		s.mu.Unlock()
		if n == 0 {
			select {
			case <-s.credit:
				continue
			case <-done:
				return
			}
		}
		if s.WriteFrame(guestrpc.FrameStdin, p[:n]) != nil {
			return
		}
		p = p[n:]
	}
}

func (s *session) addCredit(f guestrpc.Frame) {
	s.t.Helper()
	var w guestrpc.Window
	decode(s.t, f, guestrpc.FrameWindow, &w)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.window += w.Bytes; w.Bytes < 1 || s.window > guestrpc.StdinWindow {
		s.t.Errorf("credit of %d makes a window of %d", w.Bytes, s.window)
	}
	select {
	case s.credit <- struct{}{}:
	default:
	}
}

type result struct {
	stdout, stderr []byte
	exit           guestrpc.Exit
}

// wait reads until the last frame, which has to be an exit.
func (s *session) wait() (r result) {
	s.t.Helper()
	for {
		switch f := s.next(); f.Type {
		case guestrpc.FrameStarted:
		case guestrpc.FrameStdout:
			r.stdout = append(r.stdout, f.Payload...)
		case guestrpc.FrameStderr:
			r.stderr = append(r.stderr, f.Payload...)
		case guestrpc.FrameWindow:
			s.addCredit(f)
		default:
			decode(s.t, f, guestrpc.FrameExit, &r.exit)
			s.ack()
			return r
		}
	}
}

// alive is false for a zombie too: who reaps orphans, and whether at all, is up to
// the PID 1 of where the tests run.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	state := bytes.TrimSpace(b[bytes.LastIndexByte(b, ')')+1:])
	return len(state) > 0 && state[0] != 'Z'
}

func waitGone(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); alive(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d is alive", pid)
		}
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 / 3)
	}
	return b
}

func TestOutput(t *testing.T) {
	h := startAgent(t)
	r := h.sh("echo out; echo err >&2; exit 7").wait()
	if string(r.stdout) != "out\n" || string(r.stderr) != "err\n" || r.exit.Code != 7 || r.exit.Signal != 0 {
		t.Errorf("%q %q %+v", r.stdout, r.stderr, r.exit)
	}
	file := t.TempDir() + "/f"
	data := pattern(10 << 20)
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	r = h.sh("cat " + file + " & cat " + file + " >&2; wait").wait()
	if sha256.Sum256(r.stdout) != sha256.Sum256(data) || sha256.Sum256(r.stderr) != sha256.Sum256(data) {
		t.Errorf("%d and %d bytes, or others", len(r.stdout), len(r.stderr))
	}
}

// What is in the pipe when the command dies must not be lost.
func TestOutputJustBeforeDeath(t *testing.T) {
	h := startAgent(t)
	for range 50 {
		if r := h.exec(&guestrpc.Exec{Args: []string{"head", "-c", "1000000", "/dev/zero"}}).wait(); len(r.stdout) != 1000000 {
			t.Fatalf("%d bytes", len(r.stdout))
		}
	}
	for range 50 {
		r := h.sh("sleep 1000 & echo $! >&2; head -c 200000 /dev/zero; kill -9 $$").wait()
		kill(t, r.stderr)
		if len(r.stdout) != 200000 || r.exit.Signal != 9 {
			t.Fatalf("%d bytes, %+v", len(r.stdout), r.exit)
		}
	}
}

// kill ends a descendant that a command has left, and which said its pid.
func kill(t *testing.T, pid []byte) {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(string(pid)))
	if err != nil || n <= 1 {
		t.Fatalf("pid %q", pid)
	}
	if err := unix.Kill(n, unix.SIGKILL); err != nil {
		t.Errorf("the child was ended unasked: %v", err)
	}
}

func TestBackgroundChildHoldsOutput(t *testing.T) {
	h := startAgent(t)
	start := time.Now()
	r := h.sh("sleep 1000 & echo $!").wait()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	kill(t, r.stdout)
}

func TestKillAll(t *testing.T) {
	h := startAgent(t)
	r := h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", "sleep 1000 & echo $!"}, KillAll: true}).wait()
	pid, err := strconv.Atoi(strings.TrimSpace(string(r.stdout)))
	if err != nil {
		t.Fatal(err)
	}
	waitGone(t, pid)
}

func TestInput(t *testing.T) {
	h := startAgent(t)
	data := pattern(10 << 20)
	s := h.exec(&guestrpc.Exec{Args: []string{"cat"}, Stdin: true})
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		s.write(data, done)
		s.WriteFrame(guestrpc.FrameStdin, nil)
	})
	r := s.wait()
	close(done)
	wg.Wait()
	if !bytes.Equal(r.stdout, data) || r.exit.Code != 0 {
		t.Errorf("%d bytes, %+v", len(r.stdout), r.exit)
	}
}

func TestNoInput(t *testing.T) {
	h := startAgent(t)
	if r := h.exec(&guestrpc.Exec{Args: []string{"cat"}}).wait(); len(r.stdout) != 0 || r.exit.Code != 0 {
		t.Errorf("%q %+v", r.stdout, r.exit)
	}
	s := h.exec(&guestrpc.Exec{Args: []string{"sleep", "1000"}})
	pid := s.started()
	s.WriteFrame(guestrpc.FrameStdin, []byte("x"))
	wantError(t, s.stream, guestrpc.ErrBadRequest)
	waitGone(t, pid)
}

// Nobody may wait for a command that does not take its input.
func TestInputIgnored(t *testing.T) {
	h := startAgent(t)
	for _, script := range []string{
		"true",
		"exec <&-; sleep 0.3",              // closed while it runs: credit must go on
		"head -c 10 >/dev/null; sleep 0.1", // read a little
	} {
		t.Run(script, func(t *testing.T) {
			s := h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", script}, Stdin: true})
			done := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() { s.write(make([]byte, 50<<20), done) })
			r := s.wait()
			close(done)
			wg.Wait()
			if r.exit.Code != 0 {
				t.Errorf("%+v", r.exit)
			}
		})
	}
}

func TestInputNeverClosed(t *testing.T) {
	h := startAgent(t)
	s := h.exec(&guestrpc.Exec{Args: []string{"head", "-n", "1"}, Stdin: true})
	s.write([]byte("line\n"), nil)
	if r := s.wait(); string(r.stdout) != "line\n" {
		t.Errorf("%q", r.stdout)
	}
}

func TestCreditComesBack(t *testing.T) {
	h := startAgent(t)
	s := h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", "exec <&-; exec sleep 1000"}, Stdin: true})
	s.started()
	const total = 3 << 20 // three windows
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { s.write(make([]byte, total), done) })
	for returned := 0; returned < total; {
		var w guestrpc.Window
		f := s.next()
		s.addCredit(f)
		f.Decode(&w)
		returned += w.Bytes
	}
	wg.Wait()
	s.WriteMessage(guestrpc.FrameSignal, &guestrpc.Signal{Number: 15})
	if r := s.wait(); r.exit.Signal != 15 {
		t.Errorf("%+v", r.exit)
	}
}

func TestWindowExceeded(t *testing.T) {
	h := startAgent(t)
	s := h.exec(&guestrpc.Exec{Args: []string{"sleep", "1000"}, Stdin: true})
	pid := s.started()
	// The pipe takes some of the window, and that only.
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 2*guestrpc.StdinWindow/guestrpc.MaxFrame + 8 {
			if s.WriteFrame(guestrpc.FrameStdin, make([]byte, guestrpc.MaxFrame)) != nil {
				return
			}
		}
	})
	for {
		f := s.next()
		if f.Type == guestrpc.FrameWindow {
			continue
		}
		e := new(guestrpc.Error)
		decode(t, f, guestrpc.FrameError, e)
		if !errors.Is(e, guestrpc.ErrBadRequest) {
			t.Errorf("%v", e)
		}
		break
	}
	wg.Wait()
	s.conn.Close()
	waitGone(t, pid)
}

func TestInputAfterItsEnd(t *testing.T) {
	h := startAgent(t)
	s := h.exec(&guestrpc.Exec{Args: []string{"sleep", "1000"}, Stdin: true})
	s.started()
	s.WriteFrame(guestrpc.FrameStdin, nil)
	s.WriteFrame(guestrpc.FrameStdin, []byte("x"))
	wantError(t, s.stream, guestrpc.ErrBadRequest)
}

// A signal must get through behind input that nobody reads.
func TestSignalPastJammedInput(t *testing.T) {
	h := startAgent(t)
	for _, group := range []bool{false, true} {
		s := h.exec(&guestrpc.Exec{Args: []string{"sleep", "1000"}, Stdin: true})
		s.started()
		done := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() { s.write(make([]byte, 2<<20), done) })
		time.Sleep(50 * time.Millisecond) // let it jam
		s.WriteMessage(guestrpc.FrameSignal, &guestrpc.Signal{Number: 15, Group: group})
		r := s.wait()
		close(done)
		wg.Wait()
		if r.exit.Signal != 15 {
			t.Errorf("%+v", r.exit)
		}
	}
}

func TestSignals(t *testing.T) {
	h := startAgent(t)
	s := h.sh("trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 0.05; done")
	s.started()
	s.next() // ready
	s.WriteMessage(guestrpc.FrameSignal, &guestrpc.Signal{Number: int(unix.SIGUSR1)})
	if r := s.wait(); string(r.stdout) != "caught\n" || r.exit.Code != 3 {
		t.Errorf("%q %+v", r.stdout, r.exit)
	}
	for _, n := range []int{0, -9, 65, 1 << 30} {
		s := h.exec(&guestrpc.Exec{Args: []string{"sleep", "1000"}})
		pid := s.started()
		s.WriteMessage(guestrpc.FrameSignal, &guestrpc.Signal{Number: n})
		wantError(t, s.stream, guestrpc.ErrBadRequest)
		waitGone(t, pid)
	}
}

func TestHostHangsUp(t *testing.T) {
	h := startAgent(t)
	s := h.sh("trap '' HUP TERM INT; sleep 1000 & echo $!; wait")
	pid := s.started()
	child, err := strconv.Atoi(strings.TrimSpace(string(s.next().Payload)))
	if err != nil {
		t.Fatal(err)
	}
	s.conn.Close()
	waitGone(t, pid)
	waitGone(t, child)

	s = h.exec(&guestrpc.Exec{Args: []string{"cat", "/dev/zero"}}) // it jams its output
	pid = s.started()
	time.Sleep(20 * time.Millisecond)
	s.conn.Close()
	waitGone(t, pid)
}

func TestErrors(t *testing.T) {
	h := startAgent(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"plain": "echo", "bad": "\x00\x01", "noint": "#!/no/such/interpreter\n"} {
		mode := os.FileMode(0o755)
		if name == "plain" {
			mode = 0o644
		}
		if err := os.WriteFile(dir+"/"+name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		req  guestrpc.Exec
		want error
	}{
		{"no such program", guestrpc.Exec{Args: []string{"no-such-program"}}, guestrpc.ErrNotFound},
		{"no such path", guestrpc.Exec{Args: []string{"/no/such"}}, guestrpc.ErrNotFound},
		{"not found in its PATH", guestrpc.Exec{Args: []string{"sh"}, Env: []string{"PATH=/nowhere"}}, guestrpc.ErrNotFound},
		{"relative to the directory", guestrpc.Exec{Args: []string{"./nothing"}, Dir: dir}, guestrpc.ErrNotFound},
		{"below a file", guestrpc.Exec{Args: []string{dir + "/plain/x"}}, guestrpc.ErrNotFound},
		{"not executable", guestrpc.Exec{Args: []string{"./plain"}, Dir: dir}, guestrpc.ErrNotRunnable},
		{"not executable in PATH", guestrpc.Exec{Args: []string{"plain"}, Env: []string{"PATH=" + dir}}, guestrpc.ErrNotRunnable},
		{"directory", guestrpc.Exec{Args: []string{"/etc"}}, guestrpc.ErrNotRunnable},
		{"bad format", guestrpc.Exec{Args: []string{dir + "/bad"}}, guestrpc.ErrNotRunnable},
		{"no interpreter", guestrpc.Exec{Args: []string{dir + "/noint"}}, guestrpc.ErrNotRunnable},
		{"too long", guestrpc.Exec{Args: []string{"true", strings.Repeat("x", 200<<10)}}, guestrpc.ErrNotRunnable},
		{"no directory", guestrpc.Exec{Args: []string{"true"}, Dir: "/no/such"}, guestrpc.ErrNoDir},
		{"file for a directory", guestrpc.Exec{Args: []string{"true"}, Dir: dir + "/plain"}, guestrpc.ErrNoDir},
		{"relative directory", guestrpc.Exec{Args: []string{"true"}, Dir: "etc"}, guestrpc.ErrBadRequest},
		{"no user", guestrpc.Exec{Args: []string{"true"}, User: "nobody-here"}, guestrpc.ErrNoUser},
		{"no group", guestrpc.Exec{Args: []string{"true"}, User: "agent:nothing"}, guestrpc.ErrNoUser},
		{"user -1", guestrpc.Exec{Args: []string{"true"}, User: "4294967295"}, guestrpc.ErrNoUser},
		{"empty group", guestrpc.Exec{Args: []string{"true"}, User: "agent:"}, guestrpc.ErrBadRequest},
		{"no arguments", guestrpc.Exec{}, guestrpc.ErrBadRequest},
		{"NUL", guestrpc.Exec{Args: []string{"a\x00b"}}, guestrpc.ErrBadRequest},
		{"environment", guestrpc.Exec{Args: []string{"true"}, Env: []string{"=x"}}, guestrpc.ErrBadRequest},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := h.exec(&c.req)
			s.t = t
			wantError(t, s.stream, c.want)
		})
	}
}

func TestEnvironment(t *testing.T) {
	h := startAgent(t)
	r := h.exec(&guestrpc.Exec{Args: []string{"/usr/bin/env"}, Env: []string{"A=1", "LANG=xx", "A=2=3"}}).wait()
	got := "\n" + string(r.stdout)
	for _, want := range []string{"A=2=3", "LANG=xx", "USER=agent", "LOGNAME=agent", "SHELL=/bin/sh", "PATH=" + defaultPath} {
		if strings.Count(got, "\n"+want+"\n") != 1 {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	if strings.Contains(got, "\nTERM=") || strings.Count(got, "\nA=") != 1 {
		t.Errorf("environment\n%s", got)
	}
}

func TestProcessIsClean(t *testing.T) {
	h := startAgent(t)
	r := h.sh("umask; sed -n 's/^Sig\\(Blk\\|Ign\\).*000*$/none/p' /proc/self/status; cut -d' ' -f6 /proc/$$/stat; echo $$; ls /proc/$$/fd").wait()
	f := strings.Fields(string(r.stdout))
	if len(f) < 8 || strings.Join(f[:3], " ") != "0022 none none" {
		t.Fatalf("umask and signals: %q", f)
	}
	if f[3] != f[4] {
		t.Errorf("process %s is in session %s", f[4], f[3])
	}
	for _, name := range f[5:] {
		// What the test itself was started with is not the agent's doing.
		fd, _ := strconv.Atoi(name)
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); fd > 2 && (err != nil || flags&unix.FD_CLOEXEC != 0) {
			t.Errorf("descriptor %d is open", fd)
		}
	}
}

// Only root can be somebody else.
func TestOtherUser(t *testing.T) {
	testenv.NeedRoot(t)
	h := startAgent(t)
	secret := t.TempDir()
	if err := os.WriteFile(secret+"/x", []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(secret, 0o700); err != nil {
		t.Fatal(err)
	}
	r := h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", "id -u; id -g; id -G; pwd"}, User: "4242:4343"}).wait()
	if string(r.stdout) != "4242\n4343\n4343\n/\n" {
		t.Errorf("%q %q", r.stdout, r.stderr)
	}
	wantError(t, h.exec(&guestrpc.Exec{Args: []string{"true"}, User: "4242", Dir: secret}).stream, guestrpc.ErrNoDir)
	wantError(t, h.exec(&guestrpc.Exec{Args: []string{secret + "/x"}, User: "4242"}).stream, guestrpc.ErrNotRunnable)
	if r := h.exec(&guestrpc.Exec{Args: []string{"id", "-G"}}).wait(); !strings.Contains(string(r.stdout), "4711") {
		t.Errorf("groups %q", r.stdout)
	}
	if r := h.exec(&guestrpc.Exec{Args: []string{secret + "/x"}}).wait(); r.exit.Code != 0 { // the thread is root again
		t.Errorf("%+v", r.exit)
	}
}

func TestManyAtOnce(t *testing.T) {
	h := startAgent(t)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if r := h.sh("head -c 100000 /dev/zero; echo x >&2").wait(); len(r.stdout) != 100000 || string(r.stderr) != "x\n" {
				t.Errorf("%d bytes, %q", len(r.stdout), r.stderr)
			}
		})
	}
	wg.Wait()
}
