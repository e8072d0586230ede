package guest

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/seccomp"
)

// Commands are not started by package syscall: a command must be born in its cgroup,
// which takes clone3, and must not have clone3 itself, which takes a key that package
// syscall does not pass (see seccomp.Key).
//
// So the child is given a list of system calls, of which the last executes the
// program. It is vfork's child: it shares the agent's memory while the thread that
// made it sleeps, and touches nothing but that list. Nothing is copied, and no page
// table made.

// call is one system call of a child; see forkRun for who reads it.
type call struct {
	number uintptr
	args   [6]uintptr
	errno  uintptr // written by the child
}

// cloneArgs is struct clone_args, as Linux 5.7 has it. What has no name is 0.
type cloneArgs struct {
	flags      uint64
	_          [3]uint64 // where to put the child's numbers
	exitSignal uint64
	_          [5]uint64 // a stack, thread-local storage, and the numbers wanted
	cgroup     uint64
}

// forkRun makes a child that makes n calls one after the other, up to the first that
// fails: its error is noted in it, and the child ends.
func forkRun(clone *cloneArgs, calls *call, n uintptr, key *[2]uint64) (pid, errno uintptr)

// child is a command before its birth. Everything that its calls point to is in
// keep, and so on the heap, which does not move.
type child struct {
	cgroup int // descriptor of the group that it is born in; -1 for its parent's, in tests
	calls  []call
	what   []string // what each call is for
	keep   []any
}

func (c *child) add(what string, number uintptr, args ...uintptr) {
	k := call{number: number}
	copy(k.args[:], args)
	c.calls = append(c.calls, k)
	c.what = append(c.what, what)
}

// pointer keeps what p points to until the child has been born.
func pointer[T any](c *child, p *T) uintptr {
	c.keep = append(c.keep, p)
	return uintptr(unsafe.Pointer(p))
}

// commandFiles is how many files a command may open, unless it raises that: see
// setLimits. Package os has raised it for the agent.
const commandFiles = 1024

// newChild makes the list for a command. fds become its descriptors 0, 1, 2.
func newChild(id *identity, dir, path string, args, env []string, fds []int, tty bool) (*child, error) {
	c := &child{calls: make([]call, 0, 16), what: make([]string, 0, 16), keep: make([]any, 0, 16)}
	argv, err := syscall.SlicePtrFromStrings(args)
	if err != nil {
		return nil, err
	}
	envv, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return nil, err
	}
	dirp, err := syscall.BytePtrFromString(dir)
	if err != nil {
		return nil, err
	}
	pathp, err := syscall.BytePtrFromString(path)
	if err != nil {
		return nil, err
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return nil, fmt.Errorf("read the limit of files: %w", err)
	}
	files.Cur = min(commandFiles, files.Max)
	groups := append(make([]uint32, 0, len(id.groups)+1), id.groups...) // its address is taken, even of none
	c.add("setsid", unix.SYS_SETSID)
	c.add("limit files", unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, pointer(c, &files))
	c.add("setgroups", unix.SYS_SETGROUPS, uintptr(len(groups)), pointer(c, &groups[:1][0]))
	c.add("setgid", unix.SYS_SETGID, uintptr(id.gid))
	c.add("setuid", unix.SYS_SETUID, uintptr(id.uid))
	c.add("enter "+dir, unix.SYS_CHDIR, pointer(c, dirp))
	for i, fd := range fds { // ours are above 2, and close with its program
		c.add("connect", unix.SYS_DUP3, uintptr(fd), uintptr(i), 0)
	}
	if tty {
		c.add("take the terminal", unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
	}
	var none uint64 // the thread that it is born of has all signals blocked
	c.add("unblock signals", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, pointer(c, &none), 0, 8)
	c.add("", unix.SYS_EXECVE, pointer(c, pathp), pointer(c, &argv[0]), pointer(c, &envv[0]))
	return c, nil
}

// start makes the child; key is that of the thread's profile. It must run on a thread that blocks all signals: a handler
// in the child would run in the agent's memory. clone3 sees to it that the child has
// none when it unblocks them.
func (c *child) start(key seccomp.Key) (pid int, err error) {
	args := &cloneArgs{
		flags:      unix.CLONE_VFORK | unix.CLONE_VM | unix.CLONE_CLEAR_SIGHAND,
		exitSignal: uint64(unix.SIGCHLD),
	}
	if c.cgroup >= 0 {
		args.flags, args.cgroup = args.flags|unix.CLONE_INTO_CGROUP, uint64(c.cgroup)
	}
	c.keep = append(c.keep, args, &key)
	syscall.ForkLock.Lock()
	p, errno := forkRun(args, &c.calls[0], uintptr(len(c.calls)), (*[2]uint64)(&key))
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(c)
	if errno != 0 {
		return 0, unix.Errno(errno)
	}
	for i := range c.calls {
		e := unix.Errno(c.calls[i].errno)
		if e == 0 {
			continue
		}
		reap(int(p))
		if c.what[i] != "" {
			return 0, fmt.Errorf("%s: %w", c.what[i], e)
		}
		return 0, e
	}
	return int(p), nil
}

func reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

// blockSignals keeps all signals from the calling thread.
func blockSignals() error {
	all := ^uint64(0)
	if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), 0, 8, 0, 0); e != 0 {
		return e
	}
	return nil
}
