// Package jail confines the process of a VMM: a hole in the VMM must give its
// guest nothing.
//
// [Init] must be the first thing in main. [Prepare] makes an empty jail: a
// re-executed stage of this program in namespaces of its own, in which the
// firewall is up already. [Jail.Start] turns the stage into the VMM: files, limits,
// user, capabilities, Landlock and the filter of system calls, each set by the stage and each
// reason for it to give up. [Process.Verify] reads back from the kernel what the
// process is then confined by, thread by thread; the driver calls it before the
// guest executes its first instruction.
//
// Root runs each VMM as a user of its own from a range that nobody else has
// (package jail/uids). A normal user's VMM lives in a user namespace. Every layer is
// required; which one to go without is said in [Options].
//
// # The stage
//
// A process cannot be confined from outside in all ways, and Go cannot run code
// between fork and exec. So the program starts itself once more, as runc and
// gVisor do, in the new namespaces; that process does the rest to itself and becomes the VMM
// by execve. What it is told comes over a socket that only it has. It ends
// with the supervisor, at every moment (PR_SET_PDEATHSIG, and the socket).
package jail

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/firewall"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/undo"
)

// Options say which jail to make.
type Options struct {
	ID      string    // of the sandbox; it names the firewall's rules and the cgroup. Required
	CPUs    int       // that the program may use; 0 means 1
	Percent int       // of one processor that it may use in all; 0 means CPUs and a half
	Memory  int64     // that the program may use, bytes, its own needs included; required
	Disk    string    // a file on the disk from which reading is bounded; "" for none
	Without layer.Set // layers that a person chose to go without
	Require layer.Set // layers that no other mechanism may stand in for
}

// Jail is an empty jail, to be used once. Safe for concurrent use.
type Jail struct {
	opts    Options
	cmd     *exec.Cmd
	control int // our end of the stage's socket
	uid     *uid
	cgroup  *cgroup
	entered chan error // gets one value when the process is in the cgroup; nil without one
	out     lateWriter
	errOut  lateWriter
	report  layer.Report // of what is decided before the program starts

	ready  chan struct{} // closed when prepared is set
	failed error         // why the stage is of no use

	exited  chan struct{} // closed when the process has been reaped
	exitErr error         // set before exited is closed
	release func()
	close   sync.Once
}

// Prepare starts making a jail and returns when its process exists; what else
// goes wrong is told by Start. ctx bounds the making, not the jail's life. The caller closes
// the jail, or the process that Start makes of it.
func Prepare(ctx context.Context, opts Options) (*Jail, error) {
	if !initialised.Load() {
		return nil, errors.New("make a jail: this program does not begin with jail.Init")
	}
	if opts.ID == "" || opts.Memory <= 0 {
		return nil, errors.New("a jail needs an id and a bound on memory")
	}
	opts.CPUs = max(opts.CPUs, 1)
	j := &Jail{opts: opts, control: -1, ready: make(chan struct{}), exited: make(chan struct{})}
	var stack undo.Stack
	defer stack.Run()
	if err := j.takeUID(&stack); err != nil {
		return nil, err
	}
	// Before the stage: where a cgroup was delegated, no process may be left in it itself.
	if err := j.makeCgroup(); err != nil {
		return nil, &layer.Error{Layer: layer.Cgroup, Err: err}
	}
	stack.Add(j.cgroup.remove)
	if err := j.startStage(&stack); err != nil {
		return nil, fmt.Errorf("make a jail: %w", err)
	}
	j.release = stack.Release()
	go j.prepare(ctx)
	return j, nil
}

func (j *Jail) on(n layer.Name) bool { return !j.opts.Without.Has(n) }

// takeUID reserves the user that root runs the program as.
func (j *Jail) takeUID(stack *undo.Stack) error {
	if !j.on(layer.User) || !ownsUIDs() {
		return nil
	}
	u, err := takeUID()
	if err != nil {
		return &layer.Error{Layer: layer.User, Err: err}
	}
	stack.Add(u.release)
	j.uid = u
	return nil
}

// startStage starts the stage in its namespaces.
func (j *Jail) startStage(stack *undo.Stack) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "jail")
	defer theirs.Close()
	j.control = fds[0]
	stack.Add(func() { unix.Close(fds[0]) })

	args, err := json.Marshal(j.setup())
	if err != nil {
		return err
	}
	j.cmd = exec.Command("/proc/self/exe") //nolint:noctx // its life is the jail's, not the call's
	j.cmd.Args = []string{stageName, string(args)}
	// Without the signals by which Go's runtime interrupts long loops: they would interrupt the
	// calls that the supervisor answers, too.
	j.cmd.Env = []string{"GODEBUG=asyncpreemptoff=1"}
	j.cmd.Dir = "/"
	j.cmd.Stdout, j.cmd.Stderr = &j.out, &j.errOut
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	j.cmd.ExtraFiles = append([]*os.File{theirs}, slices.Repeat([]*os.File{null}, maxGiven)...)
	j.cmd.WaitDelay = waitDelay
	j.cmd.SysProcAttr = j.attributes()
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends, so that
		// thread is kept until the process has ended.
		runtime.LockOSThread()
		err := j.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		j.exitErr = j.cmd.Wait()
		close(j.exited)
	}()
	if err := <-started; err != nil {
		return j.startError(err)
	}
	stack.Add(func() {
		_ = j.cmd.Process.Kill()
		<-j.exited
	})
	return nil
}

// waitDelay bounds the wait for the pipes of a process that has ended, should
// somebody else hold them too.
const waitDelay = 5 * time.Second

// attributes are the namespaces in which the stage begins.
func (j *Jail) attributes() *syscall.SysProcAttr {
	sys := &syscall.SysProcAttr{
		Setpgid:   true, // the terminal's Ctrl-C is for us
		Pdeathsig: syscall.SIGKILL,
	}
	for n, flag := range namespaceFlags {
		if j.on(n) {
			sys.Cloneflags |= flag
		}
	}
	if j.userNamespace() {
		sys.Cloneflags |= syscall.CLONE_NEWUSER
		sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return sys
}

// namespaceFlags are the namespaces of the layers. The cgroup namespace is made
// later: its root is the cgroup in which the process is when it is made.
var namespaceFlags = map[layer.Name]uintptr{
	layer.Mounts:     syscall.CLONE_NEWNS,
	layer.Network:    syscall.CLONE_NEWNET,
	layer.Processes:  syscall.CLONE_NEWPID,
	layer.Namespaces: syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
}

// userNamespace reports whether the process lives in a user namespace of its own:
// where it cannot have a user of its own.
func (j *Jail) userNamespace() bool { return j.on(layer.User) && j.uid == nil }

// startError explains why no process could be made in new namespaces.
func (j *Jail) startError(err error) error {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EACCES) {
		return err
	}
	if !j.on(layer.User) && !ownsUIDs() {
		return fmt.Errorf("a normal user can have no other namespaces without the layer %s: %w", layer.User, err)
	}
	if j.userNamespace() {
		return &layer.Error{Layer: layer.User, Err: fmt.Errorf("make a user namespace: %w", err), Remedy: cmp.Or(userNamespaceForbidden(), "run ironclaw as root")}
	}
	return &layer.Error{Layer: layer.Mounts, Err: fmt.Errorf("make namespaces: %w", err)}
}

// setup is what the stage is told at its start.
func (j *Jail) setup() setup {
	return setup{ID: j.opts.ID, Firewall: j.on(layer.Firewall)}
}

// prepare does what needs the stage and can be done before the program is known.
func (j *Jail) prepare(ctx context.Context) {
	defer close(j.ready)
	j.failed = func() error {
		if err := j.enterCgroup(); err != nil {
			return &layer.Error{Layer: layer.Cgroup, Err: err}
		}
		if err := j.checkGuard(ctx); err != nil {
			return err
		}
		reply, _, err := j.receive(ctx)
		if errors.Is(err, io.EOF) {
			return j.endedEarly()
		}
		if err != nil {
			return err
		}
		j.add(layer.Firewall, reply.Firewall)
		return nil
	}()
}

// checkGuard sees to it that the host drops what the VMMs' users send.
func (j *Jail) checkGuard(ctx context.Context) error {
	switch {
	case !j.on(layer.Guard):
		return nil
	case j.uid == nil:
		j.report = append(j.report, layer.Status{Layer: layer.Guard, State: layer.Held,
			Detail: "the VMM has no user of its own here; it is held by the layers network and firewall"})
		return nil
	}
	guard, err := firewall.EnsureGuard(ctx, firstUID, lastUID, firewall.Options{})
	if err != nil {
		return &layer.Error{Layer: layer.Guard, Err: err, Remedy: remedyOf(err)}
	}
	j.add(layer.Guard, guard.String())
	return nil
}

// add notes that a layer was seen to be on; "" says that there was nothing to see.
func (j *Jail) add(n layer.Name, detail string) {
	if j.on(n) {
		j.report = append(j.report, layer.Status{Layer: n, State: layer.On, Detail: detail})
	}
}

// remedyOf is the hint of an error that knows one.
func remedyOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

// Close ends the process, if there is one, and removes what belongs to the jail.
// Idempotent; it waits until nothing remains.
func (j *Jail) Close() error {
	j.close.Do(func() {
		_ = j.cmd.Process.Kill() // an error says that it has ended
		<-j.exited
		<-j.ready
		if j.entered != nil {
			<-j.entered
		}
		j.release()
	})
	return nil
}

// Path is where the program finds a file of the host: at inside, or where it is
// if the jail has no mounts of its own.
func (j *Jail) Path(host, inside string) string {
	if j.on(layer.Mounts) {
		return inside
	}
	return host
}

// Has reports whether the jail has the layer.
func (j *Jail) Has(n layer.Name) bool { return j.on(n) }

// lateWriter passes on to a writer that is known later. What is written before is
// of the stage, which writes only when its runtime dies; of that the beginning is kept.
type lateWriter struct {
	mu   sync.Mutex // guards what follows
	w    io.Writer
	kept []byte
}

const maxKept = 4 << 10

func (l *lateWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	w := l.w
	if w == nil {
		l.kept = append(l.kept, p[:min(len(p), maxKept-len(l.kept))]...)
	}
	l.mu.Unlock()
	if w == nil {
		return len(p), nil
	}
	return w.Write(p)
}

func (l *lateWriter) set(w io.Writer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.kept) > 0 {
		_, _ = w.Write(l.kept)
		l.kept = nil
	}
	l.w = w
}

func (l *lateWriter) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.kept)
}
