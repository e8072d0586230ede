package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// started runs a script in the program and returns when it has printed "up".
func started(t *testing.T, p *place, script string) (*exec.Cmd, *bufio.Reader, *bytes.Buffer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), runLimit)
	t.Cleanup(cancel)
	cmd := p.command(ctx, "run", "sh", "-c", script)
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); line != "up\n" {
		t.Fatalf("%q, %v, %s", line, err, stderr)
	}
	return cmd, r, stderr
}

// Signals sent to ironclaw reach the command, which may catch them.
func TestSignalsReachTheCommand(t *testing.T) {
	p := newPlace(t)
	before := p.remains(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2} {
		name := strings.TrimPrefix(signalName(sig), "SIG")
		cmd, out, stderr := started(t, p, "trap 'echo caught "+name+"; exit 42' "+name+"; echo up; while :; do sleep 0.1; done")
		cmd.Process.Signal(sig)
		rest, _ := io.ReadAll(out)
		cmd.Wait()
		if string(rest) != "caught "+name+"\n" || cmd.ProcessState.ExitCode() != 42 {
			t.Errorf("%s: %q, code %d, %s", name, rest, cmd.ProcessState.ExitCode(), stderr)
		}
	}
	p.sameAs(t, before)
}

func signalName(sig syscall.Signal) string {
	return map[syscall.Signal]string{
		syscall.SIGTERM: "SIGTERM", syscall.SIGINT: "SIGINT", syscall.SIGHUP: "SIGHUP",
		syscall.SIGQUIT: "SIGQUIT", syscall.SIGUSR1: "SIGUSR1", syscall.SIGUSR2: "SIGUSR2",
	}[sig]
}

// A second Ctrl-C ends the machine although the command ignores it.
func TestSecondInterrupt(t *testing.T) {
	p := newPlace(t)
	before := p.remains(t)
	cmd, out, stderr := started(t, p, "trap 'echo no' INT; echo up; while :; do sleep 0.1; done")
	cmd.Process.Signal(os.Interrupt)
	if line, err := out.ReadString('\n'); line != "no\n" {
		t.Fatalf("%q, %v", line, err)
	}
	cmd.Process.Signal(os.Interrupt)
	io.Copy(io.Discard, out)
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.Contains(stderr.String(), "error: interrupted") {
		t.Errorf("code %d, %s", code, stderr)
	}
	p.sameAs(t, before)
}

// A VMM that is killed ends the run at once, with 125.
func TestVMMKilled(t *testing.T) {
	p := newPlace(t)
	before := p.remains(t)
	cmd, _, stderr := started(t, p, "echo up; sleep 1000")
	killed := 0
	for pid, parent := range machines(t) {
		if parent == cmd.Process.Pid {
			killed++
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	if killed != 1 {
		t.Fatalf("%d VMMs", killed)
	}
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 125 || !strings.Contains(stderr.String(), "error: the machine ended: QEMU was ended by signal 9") {
		t.Errorf("code %d, %s", code, stderr)
	}
	p.sameAs(t, before)
}

// terminal runs the program on a terminal of its own.
type terminal struct {
	*os.File
	cmd  *exec.Cmd
	seen bytes.Buffer
}

func onTerminal(t *testing.T, p *place, size *pty.Winsize, args ...string) *terminal {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), runLimit)
	t.Cleanup(cancel)
	cmd := p.command(ctx, args...)
	cmd.Env = append(cmd.Env, "TERM=xterm-256color")
	f, err := pty.StartWithSize(cmd, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &terminal{File: f, cmd: cmd}
}

// expect reads until text has come.
func (term *terminal) expect(t *testing.T, text string) {
	t.Helper()
	term.SetReadDeadline(time.Now().Add(runLimit))
	buf := make([]byte, 4096)
	for !strings.Contains(term.seen.String(), text) {
		n, err := term.Read(buf)
		term.seen.Write(buf[:n])
		if err != nil {
			t.Fatalf("no %q in %q: %v", text, &term.seen, err)
		}
	}
	_, rest, _ := strings.Cut(term.seen.String(), text)
	term.seen.Reset()
	term.seen.WriteString(rest)
}

func (term *terminal) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(term, text); err != nil {
		t.Fatal(err)
	}
}

// With -it the command has a terminal: its size, changes of it, its kind, keys as
// they are typed, Ctrl-C and Ctrl-D. Afterwards ours is as it was.
func TestTerminal(t *testing.T) {
	p := newPlace(t)
	before := p.remains(t)
	term := onTerminal(t, p, &pty.Winsize{Rows: 31, Cols: 97}, "run", "-v", "-it", "--", "sh")
	term.expect(t, "$ ")
	term.send(t, "stty size; tty; echo $TERM\n")
	term.expect(t, "\r\n31 97\r\n/dev/pts/0\r\nxterm-256color\r\n")
	if err := pty.Setsize(term.File, &pty.Winsize{Rows: 50, Cols: 120}); err != nil {
		t.Fatal(err)
	}
	term.send(t, "while [ \"$(stty size)\" != '50 120' ]; do sleep 0.1; done; echo res''ized\n")
	term.expect(t, "resized\r\n")
	term.send(t, "sleep 1000; echo sl''ept\n")
	term.expect(t, "sl''ept")
	time.Sleep(300 * time.Millisecond) // for sleep to be in the foreground; later is as good
	term.send(t, "\x03")
	term.expect(t, "^C")
	term.send(t, "echo in''terrupted\n")
	term.expect(t, "interrupted\r\n")
	term.send(t, "exit 5\n")
	term.expect(t, "  (cloned, ")
	term.cmd.Wait()
	if code := term.cmd.ProcessState.ExitCode(); code != 5 {
		t.Errorf("exit code %d: %q", code, &term.seen)
	}
	p.sameAs(t, before)
}

// With -t alone the keys are still ours: Ctrl-C ends the command.
func TestTerminalWithoutInput(t *testing.T) {
	p := newPlace(t)
	term := onTerminal(t, p, nil, "run", "-t", "--", "sh", "-c", "echo $TERM; exec sleep 1000")
	term.expect(t, "xterm-256color") // both terminals make line ends
	term.send(t, "\x03")
	term.cmd.Wait()
	if code := term.cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit code %d: %q", code, &term.seen)
	}
}

// First-time work shows itself on a terminal.
func TestProgressOnTerminal(t *testing.T) {
	testenv.NeedNet(t)
	p := newPlace(t)
	os.Remove(p.home() + "/kernels")
	term := onTerminal(t, p, nil, "setup")
	term.expect(t, "* ")
	term.cmd.Wait()
	if !term.cmd.ProcessState.Success() {
		t.Errorf("%v: %q", term.cmd.ProcessState, &term.seen)
	}
}
