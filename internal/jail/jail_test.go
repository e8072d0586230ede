package jail

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// programs are what this test can be in a jail, by its second argument.
var programs = map[string]func(args []string){
	"test-open": func(args []string) { // opens each file for reading and writing, and says what came of it
		for _, name := range args {
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				fmt.Println(name, errors.Unwrap(err))
				continue
			}
			_, werr := f.WriteString("overwritten")
			b := make([]byte, 7)
			_, rerr := f.ReadAt(b, 0)
			fmt.Printf("%s %q %v %v\n", name, b, rerr, errors.Unwrap(werr))
		}
	},
	"test-late": func(args []string) { // the same when it is told that it may
		var b [1]byte
		_, _ = unix.Write(3, b[:])
		_, _ = unix.Read(3, b[:])
		_, err := os.OpenFile(args[0], os.O_RDWR, 0)
		fmt.Println("open", errors.Unwrap(err))
		fmt.Println("execve", syscall.Exec("/self", []string{"self", "test-open"}, nil))
	},
	"test-environment": func([]string) {
		fds, _ := filepath.Glob("/proc/self/fd/*")
		open := 0
		for fd := range 1000 {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
				open++
			}
		}
		fmt.Println(len(os.Environ()), open, len(fds))
	},
	"test-supervise": func([]string) { // makes a jail and waits to be killed
		j, err := Prepare(context.Background(), testOptions(nil))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		pair, _ := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		p, err := j.Start(context.Background(), self("idle", Program{Args: []string{idleName}, Descriptors: []*os.File{os.NewFile(uintptr(pair[1]), "")}}))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		if _, err := p.Verify(1); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(p.PID())
		select {}
	},
}

func TestMain(m *testing.M) {
	Init()
	if len(os.Args) > 1 && programs[os.Args[1]] != nil {
		programs[os.Args[1]](os.Args[2:])
		os.Exit(0)
	}
	flag.Parse()
	goleak.VerifyTestMain(m)
}

func testOptions(without layer.Set) Options {
	return Options{ID: "jailtest", Memory: 256 << 20, Without: without}
}

// self is this program as one to run in a jail.
func self(name string, p Program) Program {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		panic(err)
	}
	p.Files = append(p.Files, File{Host: exe, Inside: "/self"})
	needs, err := ProgramFiles(context.Background(), exe) // with the race detector it is not static
	if err != nil {
		panic(err)
	}
	for _, path := range needs {
		p.Files = append(p.Files, File{Host: path, Inside: path})
	}
	if p.Path == "" {
		p.Path = "/self"
	}
	if p.Args == nil {
		p.Args = []string{name}
	}
	if p.Stdout == nil {
		p.Stdout = new(bytes.Buffer)
	}
	if p.Stderr == nil {
		p.Stderr = new(bytes.Buffer)
	}
	return p
}

func prepare(t *testing.T, without layer.Set) *Jail {
	t.Helper()
	j, err := Prepare(t.Context(), testOptions(without))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

// run runs a program in a jail of its own and returns what it said.
func run(t *testing.T, p Program) string {
	t.Helper()
	proc, err := prepare(t, nil).Start(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	<-proc.Exited()
	proc.Close()
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if err := proc.Err(); err != nil {
		t.Fatalf("%v\n%s", err, p.Stderr)
	}
	return fmt.Sprint(p.Stdout)
}

// needJail skips where this user cannot have a jail at all.
func needJail(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if remedy := userNamespaceForbidden(); remedy != "" {
			testenv.Skip(t, "needs user namespaces: "+remedy)
		}
	}
}

// Every layer is on, or the report says what is in its place.
func TestCheck(t *testing.T) {
	needJail(t)
	report, errs := Check(t.Context(), nil)
	if len(errs) != 0 {
		t.Fatal(errs)
	}
	var names []layer.Name
	for _, s := range report {
		names = append(names, s.Layer)
		if s.State == layer.Off || s.Detail == "" {
			t.Errorf("%+v", s)
		}
	}
	want := slices.DeleteFunc(layer.All(), layer.Name.Guest)
	if !slices.Equal(names, want) {
		t.Errorf("the report has %v, not %v", names, want)
	}
}

// leftovers are the cgroups of these tests' jails.
func leftovers(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"/sys/fs/cgroup/ironclaw/jailtest*", "/sys/fs/cgroup/*/ironclaw/jailtest*", "/sys/fs/cgroup/*/*/*/ironclaw/jailtest*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return all
}

// A check that cannot fail is no check: each layer that is not there is seen not to be.
func TestVerifyMissesNothing(t *testing.T) {
	needJail(t)
	for _, n := range slices.DeleteFunc(layer.All(), layer.Name.Guest) {
		// These are read back, and tried, by the stage itself.
		if n == layer.Firewall || n == layer.Guard || n == layer.Landlock {
			continue
		}
		t.Run(string(n), func(t *testing.T) {
			without := layer.Set{n: true}
			switch n {
			case layer.User:
				if os.Geteuid() != 0 {
					testenv.Skip(t, "needs root: a normal user has no other namespaces without this one")
				}
			case layer.Mounts:
				without[layer.User] = os.Geteuid() == 0 // the directories of tests are not for all
			case layer.Network:
				without[layer.Firewall] = true // it would be the host's
			case layer.NoNewPrivs:
				without[layer.Seccomp], without[layer.Landlock] = true, true // they need it
			}
			j := prepare(t, without)
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			ours, theirs := os.NewFile(uintptr(pair[0]), ""), os.NewFile(uintptr(pair[1]), "")
			defer ours.Close()
			defer theirs.Close()
			program := self("idle", Program{Args: []string{idleName}, Descriptors: []*os.File{theirs}})
			program.Path = j.Path(program.Files[0].Host, "/self")
			p, err := j.Start(t.Context(), program)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if _, err := ours.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if _, err := p.Verify(0); err != nil {
				t.Fatalf("as it was asked for: %v", err)
			}
			delete(j.opts.Without, n)
			_, err = p.Verify(1)
			missing, ok := errors.AsType[*layer.Error](err)
			if !ok || missing.Layer != n {
				t.Errorf("the layer is not there, and Verify says %v", err)
			}
		})
	}
}

// The program gets the files that it may open, as they are given: what is open for reading cannot
// be written to, and nothing else can be opened for writing.
func TestOpens(t *testing.T) {
	needJail(t)
	path := filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(path, []byte("pristine"), 0o600); err != nil {
		t.Fatal(err)
	}
	readOnly, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	writable := os.NewFile(uintptr(fd), "writable")
	defer writable.Close()
	p := self("test-open", Program{
		Opens:    map[string]*os.File{"/memory": readOnly, "/dev/kvm": writable},
		FileSize: 100,
	})
	p.Args = []string{"test-open", "/memory", "/memory", "/dev/kvm", "/self", "/new", path}
	want := `/memory "pristin" <nil> bad file descriptor
/memory "pristin" <nil> bad file descriptor
/dev/kvm "overwri" <nil> <nil>
/self permission denied
/new permission denied
` + path + ` permission denied
`
	if got := run(t, p); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "pristine" {
		t.Errorf("%q, %v", b, err)
	}
}

// A start that fails when the filter is on already leaves none of our descriptors open.
func TestFailedStartLeavesNothing(t *testing.T) {
	needJail(t)
	open := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	fail := func() {
		p := self("test-environment", Program{})
		p.Path = "/nothing"
		j := prepare(t, nil)
		if _, err := j.Start(t.Context(), p); err == nil {
			t.Fatal("started")
		}
		j.Close()
	}
	fail() // the runtime opens some of its own
	before := open()
	for range 5 {
		fail()
	}
	if after := open(); after >= before+5 {
		t.Errorf("%d descriptors were open, and are %d after 5 starts", before, after)
	}
}

// A device is one also in a jail, to be written to, where no filter gives it.
func TestDevice(t *testing.T) {
	needJail(t)
	p := self("test-open", Program{Files: []File{{Host: "/dev/zero", Inside: "/dev/zero", Device: true}}})
	p.Args = []string{"test-open", "/dev/zero"}
	proc, err := prepare(t, layer.Set{layer.Seccomp: true}).Start(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	<-proc.Exited()
	proc.Close()
	if got, want := fmt.Sprint(p.Stdout), `/dev/zero "\x00\x00\x00\x00\x00\x00\x00" <nil> <nil>`+"\n"; got != want {
		t.Errorf("%q, not %q: %v %s", got, want, proc.Err(), p.Stderr)
	}
}

// After Seal nothing more is opened for writing, and no program executed.
func TestSeal(t *testing.T) {
	needJail(t)
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "file")
	defer file.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), ""), os.NewFile(uintptr(pair[1]), "")
	defer ours.Close()
	defer theirs.Close()
	p := self("", Program{Args: []string{"test-late", "/memory"}, Opens: map[string]*os.File{"/memory": file}, Descriptors: []*os.File{theirs}})
	proc, err := prepare(t, nil).Start(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ours.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	proc.Seal()
	proc.Seal()
	ours.Write([]byte{1})
	<-proc.Exited()
	proc.Close()
	// The kernel's answer to a call that nobody is left to decide about (seccomp_unotify(2)).
	if got, want := fmt.Sprint(p.Stdout), fmt.Sprintf("open %v\nexecve %[1]v\n", unix.ENOSYS); got != want {
		t.Errorf("%q, not %q: %v %s", got, want, proc.Err(), p.Stderr)
	}
}

// Nothing of the supervisor's is inherited: no environment, no descriptor but what was given.
func TestNothingIsInherited(t *testing.T) {
	needJail(t)
	t.Setenv("SECRET", "x")
	leaky, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0) // not close-on-exec
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leaky)
	if got, want := run(t, self("test-environment", Program{})), "0 3 0\n"; got != want {
		t.Errorf("environment, descriptors, /proc: %q, not %q", got, want)
	}
}

// A supervisor that is killed takes its program with it, and Sweep finds what is left.
func TestSupervisorKilled(t *testing.T) {
	needJail(t)
	before := leftovers(t)
	cmd := exec.Command(os.Args[0], "test-supervise")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	user := "" // of its own
	if OwnUsers() {
		status, err := readStatus(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		user = strings.Fields(status["Uid"])[0]
	}
	cmd.Process.Kill()
	cmd.Wait()
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 10_000); n != 1 {
		t.Fatalf("the program lives on: %v", err)
	}
	Sweep([]string{"jailtest"})
	if user != "" {
		if _, err := os.Stat(filepath.Join(uidDir, user)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("user %s is still taken: %v", user, err)
		}
	}
	if after := leftovers(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}

// What cannot be given stops the start, and the reason names the layer.
func TestFailsClosed(t *testing.T) {
	needJail(t)
	for name, tt := range map[string]struct {
		change func(*Program)
		layer  layer.Name
		want   string
	}{
		"no such file":    {func(p *Program) { p.Files = append(p.Files, File{Host: "/no/such", Inside: "/x"}) }, layer.Mounts, "/no/such"},
		"the same twice":  {func(p *Program) { p.Files = append(p.Files, p.Files[0]) }, layer.Mounts, "/self"},
		"no such program": {func(p *Program) { p.Path = "/nothing" }, "", "/nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			p := self("test-environment", Program{})
			tt.change(&p)
			proc, err := prepare(t, nil).Start(t.Context(), p)
			if err == nil {
				proc.Close()
				t.Fatal("started")
			}
			lacking, _ := errors.AsType[*layer.Error](err)
			if tt.layer != "" && (lacking == nil || lacking.Layer != tt.layer) || !strings.Contains(err.Error(), tt.want) {
				t.Error(err)
			}
		})
	}
	if os.Geteuid() == 0 {
		secret := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		p := self("test-environment", Program{})
		p.Files = append(p.Files, File{Host: secret, Inside: "/x"})
		_, err := prepare(t, nil).Start(t.Context(), p)
		if lacking, ok := errors.AsType[*layer.Error](err); !ok || lacking.Layer != layer.Mounts || !strings.HasPrefix(lacking.Hint(), "chmod o+r ") {
			t.Error(err)
		}
	}
}

// The firewall is never set in a namespace that is in use: that would cut off the host.
func TestFirewallNeedsItsNamespace(t *testing.T) {
	testenv.NeedRoot(t)
	_, err := prepare(t, layer.Set{layer.Network: true, layer.Guard: true}).Start(t.Context(), self("test-environment", Program{}))
	if lacking, ok := errors.AsType[*layer.Error](err); !ok || lacking.Layer != layer.Firewall {
		t.Errorf("%v", err)
	}
}

// A user is one program's as long as that lives, and then nobody's.
func TestOwnUser(t *testing.T) {
	if !OwnUsers() {
		testenv.Skip(t, "needs root: VMMs of normal users have user namespaces")
	}
	a, b := prepare(t, nil), prepare(t, nil)
	if a.uid.number == b.uid.number {
		t.Errorf("both are user %d", a.uid.number)
	}
	name := a.uid.lock.Name()
	sweepUIDs()
	if _, err := os.Stat(name); err != nil {
		t.Errorf("swept while it was in use: %v", err)
	}
	a.Close()
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still taken: %v", err)
	}
}

// A context that ends ends the start.
func TestCancelled(t *testing.T) {
	needJail(t)
	ctx, cancel := context.WithCancel(t.Context())
	j, err := Prepare(ctx, testOptions(nil))
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	cancel()
	if _, err := j.Start(ctx, self("test-environment", Program{})); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// The descriptors that a program is given take no number that the stage's own runtime uses: it
// would die of that, now and then.
func TestManyDescriptors(t *testing.T) {
	needJail(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for range 20 {
		if got, want := run(t, self("test-environment", Program{Descriptors: slices.Repeat([]*os.File{null}, maxGiven)})), "0 11 0\n"; got != want {
			t.Fatalf("environment, descriptors, /proc: %q, not %q", got, want)
		}
	}
	_, err = prepare(t, nil).Start(t.Context(), self("test-environment", Program{Descriptors: slices.Repeat([]*os.File{null}, maxGiven+1)}))
	if err == nil {
		t.Error("one too many")
	}
}
