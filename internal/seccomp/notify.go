package seccomp

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Data is a call as a filter sees it (struct seccomp_data).
type Data struct {
	Number int32
	Arch   uint32 // AUDIT_ARCH_*
	IP     uint64
	Args   [6]uint64
}

// Native reports whether the number is one of [Name]'s table: whether the call was
// made by the ABI of x86-64.
func (d *Data) Native() bool { return d.Arch == unix.AUDIT_ARCH_X86_64 && uint32(d.Number) < x32 }

// Notification is a call that waits for an answer (struct seccomp_notif).
type Notification struct {
	ID    uint64
	PID   uint32 // of the thread, in the pid namespace of the reader; 0 if it is not in there
	Flags uint32
	Data  Data
}

// answer is struct seccomp_notif_resp.
type answer struct {
	id    uint64
	value int64
	err   int32
	flags uint32
}

// Receive waits for the next call that the filter of listener leaves to us. The
// error ENOENT means that the caller died meanwhile; EINTR, that a signal came.
func Receive(listener int, n *Notification) error {
	*n = Notification{} // the kernel takes no other
	return ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(n))
}

// Refuse makes the call fail with e. The error ENOENT means that the caller died.
func Refuse(listener int, id uint64, e unix.Errno) error {
	return ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&answer{id: id, err: -int32(e)}))
}

// Continue lets the kernel do the call. That is no control: by then another thread
// may have changed what the call's pointers point to, and on the way the filter
// is not asked again.
func Continue(listener int, id uint64) error {
	return ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&answer{id: id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}))
}

// addFD is struct seccomp_notif_addfd.
type addFD struct {
	id       uint64
	flags    uint32
	source   uint32
	target   uint32
	newFlags uint32
}

// Give makes the call return a new descriptor, close-on-exec, for what fd is open
// for (Linux 5.14). The error ENOENT means that the caller died.
func Give(listener int, id uint64, fd int) error {
	add := addFD{id: id, flags: unix.SECCOMP_ADDFD_FLAG_SEND, source: uint32(fd), newFlags: unix.O_CLOEXEC}
	return ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(&add))
}

// Valid reports whether the call still waits. What was read of its process by its
// pid is that of another one if it does not.
func Valid(listener int, id uint64) bool {
	return ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id)) == nil
}

func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg)); e != 0 {
		return os.NewSyscallError("seccomp ioctl", e)
	}
	return nil
}
