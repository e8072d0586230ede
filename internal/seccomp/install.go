package seccomp

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Install puts a filter on the calling thread, which must be locked to its
// goroutine, and which must have no_new_privs or CAP_SYS_ADMIN. It cannot be
// undone; what the thread starts inherits it.
//
// flags are SECCOMP_FILTER_FLAG_*. With NEW_LISTENER the result is the descriptor
// of the listener, close-on-exec, and -1 otherwise. TSYNC puts the filter on all
// threads; that one of them has another filter already is an error, and none has
// the new one then.
func Install(prog []unix.SockFilter, flags uint) (listener int, err error) {
	if len(prog) == 0 {
		return -1, errors.New("seccomp: an empty filter")
	}
	if flags&unix.SECCOMP_FILTER_FLAG_TSYNC != 0 {
		// Otherwise the number of the thread that cannot follow would be the result.
		flags |= unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	r, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(flags), uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(prog)
	if e != 0 {
		return -1, fmt.Errorf("install the seccomp filter: %w", e)
	}
	if flags&unix.SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 {
		return -1, nil
	}
	return int(r), nil
}
