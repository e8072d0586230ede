package guest

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/seccomp"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// born starts a command by the guest's own fork, outside of any cgroup, and returns
// what it writes and how it ends. prepare is run on the thread that it is born of,
// which is gone afterwards.
func born(t *testing.T, prepare func(), filter *unix.SockFprog, args ...string) (string, unix.WaitStatus, error) {
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
	c, err := newChild(id, "/tmp", args[0], args, []string{"A=b", "PATH=" + defaultPath}, []int{int(null.Fd()), fd, fd}, false, filter)
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
			pid, err = c.start()
		}
	})
	<-done
	w.Close()
	if errors.Is(err, unix.ENOSYS) {
		testenv.Skip(t, "needs clone3, which container engines refuse: run the tests on a host")
	}
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

func TestFork(t *testing.T) {
	out, status, err := born(t, func() {}, nil, "/bin/sh", "-c",
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
	out, _, err = born(t, func() {}, nil, "/bin/grep", "^Sig", "/proc/self/status")
	if err != nil || !strings.Contains(out, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n") {
		t.Errorf("%v, %s", err, out)
	}
}

// What fails before the program, or is no program, is told, and leaves no child.
func TestForkFails(t *testing.T) {
	if _, _, err := born(t, func() {}, nil, "/nowhere/to/be/found"); !errors.Is(err, unix.ENOENT) || strings.Contains(err.Error(), ":") {
		t.Errorf("no program: %v", err)
	}
	broken := &unix.SockFprog{Len: 1, Filter: &unix.SockFilter{Code: 0xffff}}
	noNewPrivs := func() { unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }
	if _, _, err := born(t, noNewPrivs, broken, "/bin/true"); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "filter system calls") {
		t.Errorf("a filter that the kernel does not take: %v", err)
	}
	if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child is left: %v", err)
	}
}

// A thread that has a profile can give birth, its children have the profile and not
// clone3, and the other threads have none of it.
func TestForkUnderProfiles(t *testing.T) {
	own, err := seccomp.Command().Compile()
	if err != nil {
		t.Fatal(err)
	}
	filter := &unix.SockFprog{Len: uint16(len(own)), Filter: &own[0]}
	for _, p := range []*seccomp.Profile{seccomp.Default(), seccomp.Strict()} {
		q := *p
		q.Default = seccomp.Errno(unix.EXDEV) // nobody listens here
		prog, err := q.Compile()
		if err != nil {
			t.Fatal(err)
		}
		out, _, err := born(t, func() {
			err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
			if _, ierr := seccomp.Install(prog, 0); err != nil || ierr != nil {
				t.Error(err, ierr)
			}
		}, filter, "/bin/sh", "-c", `grep -E "^(Seccomp|NoNew)" /proc/$$/status; hostname x 2>&1; unshare -U true 2>&1 | grep -o "cross-device"; python3 -c '
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
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, th := range threads {
		text, err := os.ReadFile("/proc/self/task/" + th.Name() + "/status")
		if err == nil && statusField(string(text), "Seccomp_filters") != statusField(string(status), "Seccomp_filters") {
			t.Errorf("thread %s has %s filters", th.Name(), statusField(string(text), "Seccomp_filters"))
		}
	}
}
