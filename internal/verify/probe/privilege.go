package probe

import (
	"errors"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

var privilegeAttacks = map[string]attack{
	"privilege.capset":      capset,
	"privilege.held":        capsHeld,
	"privilege.setuid":      setuid,
	"privilege.unshare":     unshare,
	"privilege.mount":       mountTmpfs,
	"privilege.remount":     remountRoot,
	"privilege.pivot":       pivot,
	"privilege.chroot":      chroot,
	"privilege.mknod":       mknod,
	"privilege.module":      module,
	"privilege.kexec":       kexec,
	"privilege.reboot":      reboot,
	"privilege.bpf":         bpf,
	"privilege.perf":        perf,
	"privilege.keys":        keys,
	"privilege.uring":       uring,
	"privilege.userfault":   userfault,
	"privilege.exec":        execProgram,
	"privilege.personality": personality,
	"privilege.nnp":         noNewPrivsOff,
	"privilege.seccomp":     seccompState,
	"privilege.clock":       clock,
	"privilege.hostname":    hostname,
	"privilege.swap":        swapOff,
	"privilege.handle":      openByHandle,
	"privilege.rlimits":     raiseLimits,
	"privilege.root":        isRoot,
	"privilege.nodename":    nodeName,
}

// capset: takes all capabilities.
func capset([]string) (Outcome, string) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{
		{Effective: 1 << unix.CAP_SYS_ADMIN, Permitted: 1 << unix.CAP_SYS_ADMIN},
	}
	return tried("capset CAP_SYS_ADMIN", unix.Capset(&header, &data[0]))
}

// capsHeld: asks the kernel which capabilities this process has, or may get by
// executing a program.
func capsHeld([]string) (Outcome, string) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil && err != unix.ENOSYS {
		return Unknown, err.Error()
	}
	for _, d := range data {
		if d.Effective|d.Permitted|d.Inheritable != 0 {
			return Worked, "has capabilities " + strconv.FormatUint(uint64(data[1].Permitted)<<32|uint64(data[0].Permitted), 16)
		}
	}
	for c := range uintptr(64) {
		on, _, errno := unix.Syscall(unix.SYS_PRCTL, unix.PR_CAPBSET_READ, c, 0)
		if errno == 0 && on == 1 {
			return Worked, "has none, and capability " + strconv.Itoa(int(c)) + " is in the bounding set"
		}
	}
	return Refused, "has none, and none is in the bounding set"
}

// setuid: becomes root, and some other user.
func setuid([]string) (Outcome, string) {
	// By the system call: the library's changes every thread.
	return several([]string{"setuid 0", "setuid 1", "setgid 0", "setgroups"}, func(name string) error {
		if os.Getuid() == 0 && name == "setuid 0" || os.Getgid() == 0 && name == "setgid 0" {
			return errors.New("it is that already")
		}
		switch name {
		case "setuid 0":
			return sys(unix.SYS_SETUID, 0, 0, 0)
		case "setuid 1":
			return sys(unix.SYS_SETRESUID, 1, 1, 1)
		case "setgid 0":
			return sys(unix.SYS_SETGID, 0, 0, 0)
		}
		var gid uint32
		return sys(unix.SYS_SETGROUPS, 1, uintptr(unsafe.Pointer(&gid)), 0)
	})
}

var namespaces = map[string]int{
	"user": unix.CLONE_NEWUSER, "mnt": unix.CLONE_NEWNS, "net": unix.CLONE_NEWNET, "pid": unix.CLONE_NEWPID,
	"ipc": unix.CLONE_NEWIPC, "uts": unix.CLONE_NEWUTS, "cgroup": unix.CLONE_NEWCGROUP,
}

// unshare NAME...: makes namespaces of its own.
func unshare(args []string) (Outcome, string) {
	return several(args, func(name string) error {
		if name == "user" { // not for a program with threads: a child tries it
			return forked(unix.CLONE_NEWUSER)
		}
		return unix.Unshare(namespaces[name])
	})
}

// forked makes a child with these flags, which ends at once.
func forked(flags uintptr) error {
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, flags|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if pid == 0 {
		for {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
	_, err := unix.Wait4(int(pid), nil, 0, nil)
	return err
}

// mountTmpfs: mounts a file system. Not on the root, which could not be told from
// what is below it when it is taken away again.
func mountTmpfs([]string) (Outcome, string) {
	return several([]string{os.TempDir(), "/dev", "/proc"}, func(dir string) error {
		if err := unix.Mount("probe", dir, "tmpfs", 0, ""); err != nil {
			return err
		}
		return unix.Unmount(dir, unix.MNT_DETACH)
	})
}

func remountRoot([]string) (Outcome, string) {
	return tried("make the root writable", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, ""))
}

func pivot([]string) (Outcome, string) {
	return triedBadly("pivot_root", unix.PivotRoot("/", "/"), unix.EBUSY, unix.EINVAL)
}

func chroot([]string) (Outcome, string) { return tried("chroot", unix.Chroot("/")) }

func mknod([]string) (Outcome, string) {
	return several([]string{"block", "char"}, func(kind string) error {
		mode := uint32(unix.S_IFBLK)
		if kind == "char" {
			mode = unix.S_IFCHR
		}
		name := os.TempDir() + "/.probe-node-" + kind
		if err := unix.Mknod(name, mode|0o600, int(unix.Mkdev(1, 3))); err != nil {
			return err
		}
		return os.Remove(name)
	})
}

func module([]string) (Outcome, string) {
	return triedBadly("load a module", unix.InitModule([]byte("no module at all"), ""), unix.ENOEXEC, unix.EFAULT, unix.EINVAL)
}

func kexec([]string) (Outcome, string) {
	// Flags that do not exist: refused after the permission.
	return triedBadly("kexec_load", sys6(unix.SYS_KEXEC_LOAD, 0, 0, 0, 0xf000), unix.EINVAL, unix.EBUSY)
}

func reboot([]string) (Outcome, string) {
	// Wrong magic numbers: refused after the permission.
	return triedBadly("reboot", sys(unix.SYS_REBOOT, 1, 2, 3), unix.EINVAL)
}

func bpf([]string) (Outcome, string) {
	// BPF_MAP_CREATE of an array of one.
	attr := [16]uint32{0: 2, 1: 4, 2: 8, 3: 1}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, 0, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return tried("bpf", errno)
	}
	unix.Close(int(fd))
	return Worked, "made a BPF map"
}

func perf([]string) (Outcome, string) {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_CPU_CLOCK}
	attr.Size = uint32(unsafe.Sizeof(attr))
	fd, err := unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err == nil {
		unix.Close(fd)
	}
	return tried("perf_event_open", err)
}

func keys([]string) (Outcome, string) {
	_, err := unix.AddKey("user", "ironclaw-probe", []byte("x"), unix.KEY_SPEC_THREAD_KEYRING)
	return tried("add a key", err)
}

func uring([]string) (Outcome, string) {
	var params [120]byte
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return tried("io_uring_setup", errno)
	}
	unix.Close(int(fd))
	return Worked, "made a ring"
}

// userModeOnly is UFFD_USER_MODE_ONLY, with which nobody needs a capability.
const userModeOnly = 1

func userfault([]string) (Outcome, string) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|userModeOnly, 0, 0)
	if errno != 0 {
		return tried("userfaultfd", errno)
	}
	unix.Close(int(fd))
	return Worked, "userfaultfd"
}

// execProgram PATH...: starts a program.
func execProgram(args []string) (Outcome, string) {
	return several(args, func(name string) error {
		p, err := os.StartProcess(name, []string{name, Name, "[]"}, &os.ProcAttr{Env: []string{}})
		if err != nil {
			return err
		}
		_, err = p.Wait()
		return err
	})
}

func personality([]string) (Outcome, string) {
	const addrNoRandomize = 0x0040000
	return tried("turn address randomisation off", sys(unix.SYS_PERSONALITY, addrNoRandomize, 0, 0))
}

// noNewPrivsOff: takes no_new_privs back, or finds that it was never set.
func noNewPrivsOff([]string) (Outcome, string) {
	on, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil {
		return Unknown, err.Error()
	}
	if on != 1 {
		return Worked, "no_new_privs is not set"
	}
	return tried("take no_new_privs back", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0))
}

// seccompState: asks whether a filter of system calls is on.
func seccompState([]string) (Outcome, string) {
	mode, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0)
	if err != nil {
		return Refused, "PR_GET_SECCOMP: " + errnoName(err)
	}
	if mode == 0 {
		return Worked, "no filter of system calls is on"
	}
	return Refused, "seccomp mode " + strconv.Itoa(mode)
}

// clock: sets the clock to what it shows.
func clock([]string) (Outcome, string) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return Unknown, err.Error()
	}
	return tried("set the clock", unix.ClockSettime(unix.CLOCK_REALTIME, &ts))
}

func hostname([]string) (Outcome, string) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Unknown, err.Error()
	}
	return tried("set the host name", unix.Sethostname([]byte(unix.ByteSliceToString(u.Nodename[:]))))
}

func swapOff([]string) (Outcome, string) {
	name, _ := unix.BytePtrFromString("/nonexistent")
	return triedBadly("swapoff", sys(unix.SYS_SWAPOFF, uintptr(unsafe.Pointer(name)), 0, 0), unix.ENOENT, unix.EINVAL)
}

// openByHandle: opens a file by its number, past every directory (the way out of
// containers known as shocker).
func openByHandle([]string) (Outcome, string) {
	h := unix.NewFileHandle(1, []byte{2, 0, 0, 0, 0, 0, 0, 0})
	fd, err := unix.OpenByHandleAt(unix.AT_FDCWD, h, unix.O_RDONLY|unix.O_CLOEXEC)
	if err == nil {
		unix.Close(fd)
	}
	return triedBadly("open_by_handle_at", err, unix.ESTALE, unix.EINVAL)
}

// raiseLimits: raises the limits of resources.
func raiseLimits([]string) (Outcome, string) {
	limits := map[string]int{"files": unix.RLIMIT_NOFILE, "processes": unix.RLIMIT_NPROC, "file size": unix.RLIMIT_FSIZE, "core": unix.RLIMIT_CORE}
	return several([]string{"files", "processes", "file size", "core"}, func(name string) error {
		var l unix.Rlimit
		if err := unix.Prlimit(0, limits[name], nil, &l); err != nil {
			return err
		}
		if l.Max == unix.RLIM_INFINITY {
			return nil // there is none
		}
		l.Max++
		return unix.Prlimit(0, limits[name], &l, nil)
	})
}

func sys6(trap, a, b, c, d uintptr) error {
	if _, _, errno := unix.Syscall6(trap, a, b, c, d, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// isRoot: looks whether it is root.
func isRoot([]string) (Outcome, string) {
	detail := "user " + strconv.Itoa(unix.Geteuid())
	if unix.Geteuid() == 0 {
		return Worked, detail
	}
	return Refused, detail
}

// nodeName NAME: looks whether it learns the host's name, which is not NAME.
func nodeName(args []string) (Outcome, string) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Unknown, err.Error()
	}
	name := unix.ByteSliceToString(u.Nodename[:])
	if len(args) == 1 && name == args[0] {
		return Refused, "it is called " + name
	}
	return Worked, "the host is called " + name
}
