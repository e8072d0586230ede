package probe

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

var processAttacks = map[string]attack{
	"process.see":     processSee,
	"process.all":     processAll,
	"process.trace":   processTrace,
	"process.traceme": processTraceme,
	"process.read":    processRead,
	"process.pidfd":   processPidfd,
	"process.signal":  processSignal,
	"process.enter":   processEnter,
}

// maxSeen is how many processes are worth naming.
const maxSeen = 8

// processSee MAX: asks for each number up to MAX whether there is a process that
// is not this one. It needs no /proc.
func processSee(args []string) (Outcome, string) {
	top, self := 32768, unix.Getpid()
	if len(args) == 1 {
		if n, err := strconv.Atoi(args[0]); err == nil {
			top = n
		}
	}
	var seen []string
	for pid := 1; pid <= top && len(seen) < maxSeen; pid++ {
		err := unix.Kill(pid, 0)
		if err != nil && err != unix.EPERM {
			continue // EPERM tells that it is there
		}
		if pid == self || unix.Tgkill(self, pid, 0) == nil {
			continue // a thread of ours
		}
		seen = append(seen, strconv.Itoa(pid))
	}
	if len(seen) > 0 {
		return Worked, "there are processes " + strings.Join(seen, ", ")
	}
	return Refused, fmt.Sprintf("of %d numbers none is a process but this one", top)
}

// processAll: asks whether a signal to all would reach anybody.
func processAll([]string) (Outcome, string) { return tried("signal all processes", unix.Kill(-1, 0)) }

func onPids(args []string, try func(pid int) error) (Outcome, string) {
	return several(args, func(arg string) error {
		pid, err := strconv.Atoi(arg)
		if err != nil {
			return err
		}
		return try(pid)
	})
}

// processTrace PID...: becomes the tracer.
func processTrace(args []string) (Outcome, string) { return onPids(args, trace) }

// processSignal PID...: asks whether a signal could be sent.
func processSignal(args []string) (Outcome, string) {
	return onPids(args, func(pid int) error { return unix.Kill(pid, 0) })
}

// processTraceme: asks to be traced by the parent.
func processTraceme([]string) (Outcome, string) {
	return tried("PTRACE_TRACEME", sys(unix.SYS_PTRACE, 0, 0, 0))
}

// processPidfd PID...: opens a process.
func processPidfd(args []string) (Outcome, string) {
	return onPids(args, func(pid int) error {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	})
}

// processRead PID...: reads another's memory. The address is nonsense: the
// permission is looked at first.
func processRead(args []string) (Outcome, string) {
	if len(args) == 0 {
		return Unknown, "no process"
	}
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return Unknown, err.Error()
	}
	b := make([]byte, 8)
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	remote := []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&b[0])) & 0xfff, Len: len(b)}}
	_, err = unix.ProcessVMReadv(pid, local, remote, 0)
	return triedBadly("read memory of process "+args[0], err, unix.EFAULT)
}

// processEnter PID...: enters another's namespaces.
func processEnter(args []string) (Outcome, string) {
	return onPids(args, func(pid int) error {
		f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
		if err == nil {
			defer f.Close()
			return unix.Setns(int(f.Fd()), 0)
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Setns(fd, unix.CLONE_NEWNET)
	})
}
