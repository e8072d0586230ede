package guest

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/seccomp"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// born starts a command by the guest's own fork, outside of any cgroup, and returns
// what it writes and how it ends. prepare is run on the thread that it is born of,
// which is gone afterwards.
func born(t *testing.T, prepare func(), args ...string) (string, unix.WaitStatus, error) {
	t.Helper()
	out, status, err := bornOrNot(t, prepare, args...)
	if errors.Is(err, unix.ENOSYS) {
		testenv.Skip(t, "needs clone3, which container engines refuse: run the tests on a host")
	}
	return out, status, err
}

func bornOrNot(t *testing.T, prepare func(), args ...string) (string, unix.WaitStatus, error) {
	t.Helper()
	if os.Geteuid() != 0 {
		testenv.Skip(t, "sets a user and groups: run the tests with sudo")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fd := int(w.Fd())
	id := &identity{uid: 12345, gid: 54321, groups: []uint32{7, 9}}
	c, err := newChild(id, "/tmp", args[0], args, []string{"A=b", "PATH=" + defaultPath}, []int{int(null.Fd()), fd, fd}, false)
	if err != nil {
		t.Fatal(err)
	}
	c.cgroup = -1
	var pid int
	done := make(chan struct{})
	onThread(func() {
		defer close(done)
		prepare()
		if err = blockSignals(); err == nil {
			pid, err = c.start(forkKey)
		}
	})
	<-done
	w.Close()
	if err != nil {
		return "", 0, err
	}
	out, _ := io.ReadAll(r)
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, 0, nil); err != nil {
		t.Error(err)
	}
	return string(out), status, nil
}

var forkKey = seccomp.Key{1 << 40, 7}

// filtered puts a filter on the thread.
func filtered(t *testing.T, p *seccomp.Profile) {
	prog, err := p.Compile()
	if err == nil {
		err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	if err == nil {
		_, err = seccomp.Install(prog, 0)
	}
	if err != nil {
		t.Error(err)
	}
}

func TestFork(t *testing.T) {
	out, status, err := born(t, func() {}, "/bin/sh", "-c",
		`id -u; id -g; id -G; pwd; echo $A; ulimit -n; ps -o sid= -p $$ | tr -d " " | grep -qx $$ && echo leads; exit 7`)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"12345\n54321\n54321 7 9\n/tmp\nb\n1024\nleads\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
	if !status.Exited() || status.ExitStatus() != 7 {
		t.Errorf("status %#x", uint32(status))
	}
	// Not by a shell, which blocks signals itself now and then.
	out, _, err = born(t, func() {}, "/bin/grep", "^Sig", "/proc/self/status")
	own, readErr := os.ReadFile("/proc/self/status") // what is ignored is inherited, from whoever runs the tests
	if readErr != nil {
		t.Fatal(readErr)
	}
	_, ignored, _ := strings.Cut(string(own), "SigIgn:\t")
	ignored, _, _ = strings.Cut(ignored, "\n")
	if err != nil || !strings.Contains(out, "SigBlk:\t0000000000000000\nSigIgn:\t"+ignored+"\n") {
		t.Errorf("%v, %s", err, out)
	}
}

// What fails before the program, or is no program, is told, and leaves no child.
func TestForkFails(t *testing.T) {
	if _, _, err := born(t, func() {}, "/nowhere/to/be/found"); !errors.Is(err, unix.ENOENT) || strings.Contains(err.Error(), ":") {
		t.Errorf("no program: %v", err)
	}
	noChdir := &seccomp.Profile{Name: "test", Default: seccomp.Allow, Rules: []seccomp.Rule{
		{Calls: []string{"chdir"}, Action: seccomp.Errno(unix.EXDEV)},
	}}
	if _, _, err := born(t, func() { filtered(t, noChdir) }, "/bin/true"); !errors.Is(err, unix.EXDEV) || !strings.Contains(err.Error(), "enter /tmp") {
		t.Errorf("a call before the program: %v", err)
	}
	if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child is left: %v", err)
	}
}

// A thread that has a profile can give birth, its children have the profile and not
// clone3, and the other threads have none of it.
func TestForkUnderProfiles(t *testing.T) {
	for _, p := range []*seccomp.Profile{seccomp.Default(forkKey), seccomp.Strict(forkKey)} {
		q := *p
		q.Default = seccomp.Errno(unix.EXDEV) // nobody listens here
		out, _, err := born(t, func() { filtered(t, &q) }, "/bin/sh", "-c", `grep -E "^(Seccomp|NoNew)" /proc/$$/status; hostname x 2>&1; unshare -U true 2>&1 | grep -o "cross-device"; python3 -c '
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print("clone3", libc.syscall(435, 0, 0), ctypes.get_errno())'`)
		if err != nil {
			t.Fatalf("%s: %v", p.Name, err)
		}
		if !strings.Contains(out, "Seccomp:\t2\n") || !strings.Contains(out, "clone3 -1 38\n") || !strings.Contains(out, "cross-device") {
			t.Errorf("%s: %s", p.Name, out)
		}
	}
	// Without the key not even the agent has clone3.
	wrong := seccomp.Strict(seccomp.Key{forkKey[0], forkKey[1] + 1})
	wrong.Default = seccomp.Errno(unix.EXDEV)
	if _, _, err := bornOrNot(t, func() { filtered(t, wrong) }, "/bin/true"); !errors.Is(err, unix.ENOSYS) {
		t.Errorf("with another key: %v", err)
	}
	// The threads of births are on their way out.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		filtered := filteredThreads(t)
		if len(filtered) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("filtered threads: %v", filtered)
		}
	}
}

// filteredThreads are those of our threads that have more filters than we.
func filteredThreads(t *testing.T) (more []string) {
	t.Helper()
	threads, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil || len(threads) < 2 {
		t.Fatal(threads, err)
	}
	own, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range threads {
		status, err := os.ReadFile(name)
		if err == nil && statusField(string(status), "Seccomp_filters") != statusField(string(own), "Seccomp_filters") {
			more = append(more, name)
		}
	}
	return more
}
