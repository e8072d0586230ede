package firewalltest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// inside is set in the environment of a test that has been put into a user
// namespace.
const inside = "IRONCLAW_TEST_USERNS"

// Main runs the tests of a package, and as a normal user in a user namespace of
// their own, where they can make network namespaces. It returns the exit code.
func Main(m *testing.M) int {
	// Where the tools are, which a normal user has not in the path.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	if os.Geteuid() != 0 && os.Getenv(inside) == "" {
		if code, ok := inUserNamespace(); ok {
			return code
		}
	}
	code := m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// inUserNamespace runs this program again as root of a user namespace. ok is false
// if the host does not allow one.
func inUserNamespace() (code int, ok bool) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	runtime.LockOSThread() // the signal above comes when this thread ends
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	exit, ended := errors.AsType[*exec.ExitError](err)
	switch {
	case ended:
		return max(1, exit.ExitCode()), true
	case err != nil:
		return 0, false
	}
	return 0, true
}

// AsUser runs one test of this package again as a normal user of the host. That
// test may not skip.
func AsUser(t *testing.T, name string) {
	t.Helper()
	NeedUsers(t)
	const nobody = 65534
	dir, err := os.MkdirTemp("", "firewalltest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "test")
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	user := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	try := exec.CommandContext(t.Context(), "unshare", "--user", "--net", "true")
	try.SysProcAttr = user
	if out, err := try.CombinedOutput(); err != nil {
		testenv.Skip(t, fmt.Sprintf("a normal user may not make a user namespace here (%s): see user.max_user_namespaces,"+
			" kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns", bytes.TrimSpace(out)))
	}
	cmd := exec.CommandContext(t.Context(), path, "-test.run=^"+name+"$", "-test.v", "-test.count=1")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), testenv.MustRun+"="+name, "HOME="+dir, "TMPDIR="+dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = user
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+name+" ")) {
		t.Fatalf("as a normal user: %v\n%s", err, out)
	}
}

// Namespace is a network namespace that a test has made. It ends with the test.
type Namespace struct {
	file *os.File
}

// New makes a network namespace with nothing but a loopback device that is down.
func New(t testing.TB) *Namespace {
	t.Helper()
	n := &Namespace{}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		n.file = f
		return err
	})
	if errors.Is(err, unix.EPERM) {
		testenv.Skip(t, "may not make network namespaces here: run the tests with sudo, or allow user namespaces")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.file.Close() })
	return n
}

// onThread calls f on a thread of its own, which ends afterwards: what f has done
// to it (its namespaces, its user) is seen by nobody else.
func onThread(f func() error) error {
	var wg sync.WaitGroup
	err := errors.New("the function did not return")
	wg.Go(func() {
		runtime.LockOSThread() // and never unlocked
		err = f()
	})
	wg.Wait()
	return err
}

// Do calls f on a thread in the namespace. f may not end the test: it runs on
// another goroutine.
func (n *Namespace) Do(f func() error) error { return n.As(0, f) }

// As calls f on a thread in the namespace that has the user id uid and, if that is
// not 0, no capabilities.
func (n *Namespace) As(uid uint32, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		if uid != 0 {
			// The raw call: that of package syscall is for all threads.
			id := uintptr(uid)
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); errno != 0 {
				return os.NewSyscallError("setresuid", errno)
			}
		}
		return f()
	})
}

// Try runs programs in the namespace, one a line, and returns what they say.
func (n *Namespace) Try(commands string) (string, error) {
	var all bytes.Buffer
	err := n.Do(func() error {
		for line := range strings.Lines(commands) {
			args := strings.Fields(line)
			if len(args) == 0 {
				continue
			}
			cmd := exec.Command(args[0], args[1:]...)
			cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "XTABLES_LOCKFILE=/proc/self/ns/net"}
			cmd.Stdout, cmd.Stderr = &all, &all
			if err := cmd.Run(); err != nil {
				return fmt.Errorf("%s: %w: %s", strings.TrimSpace(line), err, all.Bytes())
			}
		}
		return nil
	})
	return all.String(), err
}

// Run is Try, and ends the test if a program fails.
func (n *Namespace) Run(t testing.TB, commands string) string {
	t.Helper()
	out, err := n.Try(commands)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// path names the namespace for other programs.
func (n *Namespace) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// NeedUsers skips unless tests can take any user id: they run as the host's root.
func NeedUsers(t testing.TB) {
	t.Helper()
	testenv.NeedRoot(t)
	if os.Getenv(inside) != "" {
		testenv.Skip(t, "needs the host's root, for other user ids: run the tests with sudo")
	}
}
