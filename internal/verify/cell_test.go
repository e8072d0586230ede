package verify

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
)

// program builds this program as it is built for users: static.
func program(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ironclaw")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", path, "./cmd/ironclaw")
	cmd.Dir = testenv.Root(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// testCell is a process in namespaces. An open one sees and may all that it can on
// this host, in a user namespace of its own, where it does no harm; a closed one has
// nothing.
type testCell struct {
	program string
	root    string // "" means open
}

func (c testCell) Facts() CellFacts     { return CellFacts{} }
func (c testCell) Report() layer.Report { return nil }
func (c testCell) Close() error         { return nil }

func (c testCell) Run(ctx context.Context, r probe.Request) ([]byte, error) {
	sys := &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	}
	name, id := c.program, 0
	if c.root != "" {
		sys.Cloneflags |= syscall.CLONE_NEWPID | syscall.CLONE_NEWNET
		sys.Chroot, name, id = c.root, "/ironclaw", 1000
	}
	sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: id, HostID: os.Geteuid(), Size: 1}}
	sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: id, HostID: os.Getegid(), Size: 1}}
	cmd := exec.CommandContext(ctx, name, probe.Name, probe.Line(r))
	cmd.Path, cmd.Err = name, nil // in the other root
	cmd.Env, cmd.Dir, cmd.SysProcAttr = []string{}, "/", sys
	return cmd.Output()
}

// Every probe of the jail that can be tried so without harm works where nothing
// stops it and is refused where something does. A probe that said "refused" in both
// would prove nothing of a jail.
func TestProbesTellOpenFromClosed(t *testing.T) {
	bin := program(t)
	root := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "cp", bin, root+"/ironclaw").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Chmod(root, 0o555); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(root, 0o755) })
	open, closed := testCell{program: bin}, testCell{bin, root}
	if _, err := open.Run(t.Context(), probe.Request{Attack: "privilege.root"}); err != nil {
		testenv.Skip(t, "needs user namespaces: "+err.Error())
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	unix, err := net.Listen("unix", "@ironclaw-cell-test-"+strconv.Itoa(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	self := strconv.Itoa(os.Getpid())
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, []byte("image"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, r := range []probe.Request{
		{Attack: "file.read", Args: hostPaths},
		{Attack: "file.list", Args: []string{"/", "ironclaw"}},
		{Attack: "file.create", Args: []string{"/", filepath.Dir(image)}},
		{Attack: "file.change", Args: []string{image}},
		{Attack: "process.see", Args: []string{"65536"}},
		{Attack: "process.all"},
		{Attack: "process.signal", Args: []string{self}},
		{Attack: "process.pidfd", Args: []string{self}},
		{Attack: "net.tcp", Args: []string{tcp.Addr().String()}},
		{Attack: "net.unix", Args: []string{unix.Addr().String()}},
		{Attack: "privilege.capset"},
		{Attack: "privilege.unshare", Args: []string{"mnt", "uts", "ipc"}},
		{Attack: "privilege.mount"},
		{Attack: "privilege.chroot"},
		{Attack: "privilege.hostname"},
		{Attack: "privilege.exec", Args: []string{"/proc/self/exe"}},
		{Attack: "net.socket", Args: []string{"inet raw", "packet"}},
	} {
		f, err := inCell(t.Context(), open, r)
		if r.Attack == "net.socket" { // not in a network namespace of its own, so it has no right there
			f.Worked = true
		}
		if err != nil || !f.Worked {
			t.Errorf("%s where nothing stops it: %+v, %v", r.Attack, f, err)
		}
		if f, err := inCell(t.Context(), closed, r); err != nil || f.Worked {
			t.Errorf("%s in a closed cell: %+v, %v", r.Attack, f, err)
		}
	}
	if b, err := os.ReadFile(image); err != nil || string(b) != "image" {
		t.Errorf("an attack that works did harm: %q, %v", b, err)
	}
}

// A cell that kills its program for an attack has refused it; one that could not
// start it has not.
func TestInCell(t *testing.T) {
	for _, tc := range []struct {
		script       string
		worked, fail bool
	}{
		{`echo '{"attack":"a","outcome":"refused","detail":"EPERM"}'`, false, false},
		{`echo '{"attack":"a","outcome":"worked","detail":"yes"}'`, true, false},
		{`echo '{"attack":"a","outcome":"unknown","detail":"?"}'`, false, true},
		{`kill -SYS $$`, false, false},
		{`exit 1`, false, true},
		{`echo nonsense`, false, true},
		{``, false, true},
	} {
		f, err := inCell(t.Context(), scriptCell(tc.script), probe.Request{Attack: "a"})
		if f.Worked != tc.worked || (err != nil) != tc.fail {
			t.Errorf("%q: %+v, %v", tc.script, f, err)
		}
	}
}

type scriptCell string

func (s scriptCell) Run(ctx context.Context, _ probe.Request) ([]byte, error) {
	return exec.CommandContext(ctx, "sh", "-c", string(s)).Output()
}
func (scriptCell) Facts() CellFacts     { return CellFacts{} }
func (scriptCell) Report() layer.Report { return nil }
func (scriptCell) Close() error         { return nil }

// A program that is linked dynamically could not attack from a guest.
func TestCheckProgram(t *testing.T) {
	if err := checkProgram(program(t)); err != nil {
		t.Error(err)
	}
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	if err := checkProgram(sh); err == nil || !strings.Contains(err.Error(), "dynamically") {
		t.Errorf("%s: %v", sh, err)
	}
	if err := checkProgram("/proc/version"); err == nil {
		t.Error("a text is no program")
	}
}
