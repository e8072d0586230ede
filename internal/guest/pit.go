package guest

import (
	"os"

	"golang.org/x/sys/unix"
)

// Ports and the command of the interval timer (Intel 8254 data sheet).
const (
	pitChannel0 = 0x40
	pitMode     = 0x43
	pitOneShot  = 0x30 // channel 0, both bytes of the count, mode 0: interrupt on terminal count
)

// stopPIT stops the interval timer. The kernel, which has better ones, leaves it as
// the board's reset did: running, 18 times a second, which wakes the VMM of an idle
// machine twice as often for nothing. Newer kernels do this themselves (Linux 6.13,
// "x86/i8253: Disable PIT timer 0 when not in use"). Where the kernel lets nobody
// near ports, the machine is only less idle.
//
// It must be called on a locked thread: the permission is that thread's.
func stopPIT() error {
	const ports = pitMode - pitChannel0 + 1
	if err := ioperm(pitChannel0, ports, true); err != nil {
		return nil
	}
	outb(pitMode, pitOneShot)
	outb(pitChannel0, 0)
	outb(pitChannel0, 0)
	return ioperm(pitChannel0, ports, false)
}

// outb writes to a port of the processor's.
func outb(port uint16, value byte)

func ioperm(from, count uintptr, on bool) error {
	var flag uintptr
	if on {
		flag = 1
	}
	if _, _, e := unix.RawSyscall(unix.SYS_IOPERM, from, count, flag); e != 0 {
		return os.NewSyscallError("ioperm", e)
	}
	return nil
}
