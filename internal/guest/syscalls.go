package guest

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls that package unix has no function for.

// setFileUser changes what the calling thread may do with files. Only raw
// system calls do: those of package syscall change all threads.
func setFileUser(uid, gid int, groups []int) error {
	gids := make([]uint32, len(groups)+1) // never empty: its address is taken
	for i, g := range groups {
		gids[i] = uint32(g)
	}
	// The user last: giving up 0 gives up the right to change the others; and
	// first when it is taken back.
	if uid == 0 {
		if err := setfsid(unix.SYS_SETFSUID, uid); err != nil {
			return err
		}
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(&gids[0])), 0); e != 0 {
		return e
	}
	if err := setfsid(unix.SYS_SETFSGID, gid); err != nil {
		return err
	}
	return setfsid(unix.SYS_SETFSUID, uid)
}

// setfsid sets an id and reads it back: the call itself never says that it has
// not worked.
func setfsid(call uintptr, id int) error {
	unix.RawSyscall(call, uintptr(id), 0, 0)
	now, _, _ := unix.RawSyscall(call, ^uintptr(0), 0, 0) // not an id: changes nothing
	if int(uint32(now)) != id {
		return errors.New("the thread's user did not change")
	}
	return nil
}

// ioctlBytes calls an ioctl that takes the address of a structure.
func ioctlBytes(fd int, req uint, b []byte) error {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(&b[0])))
	if e != 0 {
		return e
	}
	return nil
}

// openPeer opens the other end of a pseudoterminal.
func openPeer(master int) (int, error) {
	fd, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if e != 0 {
		return -1, e
	}
	return int(fd), nil
}

// setSignal gives a signal its default action, or has it ignored, past the runtime,
// which takes all of them for its own. Of an ignored SIGCHLD the kernel reaps the
// children itself.
func setSignal(s unix.Signal, ignore bool) error {
	var action [4]uintptr // struct kernel_sigaction: SIG_DFL, no flags, no restorer, no mask
	if ignore {
		action[0] = 1 // SIG_IGN
	}
	_, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0)
	if e != 0 {
		return e
	}
	return nil
}
