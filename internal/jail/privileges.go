package jail

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// becomeUser changes user and group of this thread, the one that executes the
// program, and leaves all other groups.
func becomeUser(id int) error {
	if err := call(unix.SYS_SETGROUPS, 0, 0, 0); err != nil {
		return fmt.Errorf("leave all groups: %w", err)
	}
	if err := call(unix.SYS_SETRESGID, uintptr(id), uintptr(id), uintptr(id)); err != nil {
		return fmt.Errorf("change group: %w", err)
	}
	// Capabilities are dropped one by one after this, if they are to be dropped.
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	if err := call(unix.SYS_SETRESUID, uintptr(id), uintptr(id), uintptr(id)); err != nil {
		return fmt.Errorf("change user: %w", err)
	}
	return raiseEffective()
}

// raiseEffective makes what is permitted effective again: a change from root to another
// user takes that away.
func raiseEffective() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range data {
		data[i].Effective = data[i].Permitted
	}
	return unix.Capset(&header, &data[0])
}

// Bits of PR_SET_SECUREBITS (linux/securebits.h): being root gives no capability, changing user
// neither, nothing is kept, nothing becomes ambient, and none of that can be undone.
const (
	secureNoRoot       = 1<<0 | 1<<1
	secureNoSetuid     = 1<<2 | 1<<3
	secureKeepCapsLock = 1 << 5
	secureNoAmbient    = 1<<6 | 1<<7
)

// dropCapabilities drops every capability from every set, and for good. A user namespace's
// root would otherwise get all of them back at execve.
func dropCapabilities() error {
	last, err := lastCapability()
	if err != nil {
		return err
	}
	for c := range last + 1 {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear the ambient set: %w", err)
	}
	const bits = secureNoRoot | secureNoSetuid | secureKeepCapsLock | secureNoAmbient
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, bits, 0, 0, 0); err != nil {
		return fmt.Errorf("lock the secure bits: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}

// lastCapability is the highest capability that the kernel knows, found as libcap does: the
// file that says it is not in the jail.
func lastCapability() (int, error) {
	last := -1
	for c := range 64 {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err != nil {
			break
		}
		last = c
	}
	if last < unix.CAP_SYS_ADMIN {
		return 0, fmt.Errorf("find out which capabilities there are: the kernel knows of %d", last+1)
	}
	return last, nil
}

// call is a system call of this thread alone. The functions of package syscall change
// every thread of the process, for which there is no need.
func call(nr, a, b, c uintptr) error {
	if _, _, errno := unix.RawSyscall(nr, a, b, c); errno != 0 {
		return errno
	}
	return nil
}

// userNamespaceForbidden finds which setting of the host keeps a normal user from making a
// user namespace, and gives the command that changes it; "" if none does.
func userNamespaceForbidden() (remedy string) {
	for _, k := range []struct{ file, bad, remedy string }{
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=15000"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for ironclaw with `userns,`"},
	} {
		if b, err := os.ReadFile(k.file); err == nil && strings.TrimSpace(string(b)) == k.bad {
			return k.remedy
		}
	}
	return ""
}

// limitNames are the kernel's own (fs/proc/base.c).
var limitNames = map[int]string{
	unix.RLIMIT_CORE: "core file size", unix.RLIMIT_NOFILE: "open files", unix.RLIMIT_FSIZE: "file size",
	unix.RLIMIT_NPROC: "processes", unix.RLIMIT_DATA: "data size", unix.RLIMIT_STACK: "stack size", unix.RLIMIT_MEMLOCK: "locked memory",
	unix.RLIMIT_MSGQUEUE: "msgqueue size",
}
