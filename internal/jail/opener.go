package jail

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/seccomp"
)

// opener answers the program when it opens a file for reading and writing, or
// executes one: the filter of its system calls has both wait for the supervisor's answer
// (seccomp_unotify(2)).
//
// So files that are not in the jail can be given to a program that knows only names: the memory
// of a machine, /dev/kvm. A template's memory is given open for reading only, whatever was asked
// for. QEMU before 8.2 cannot be told to open it so, and one that was broken into could else
// write into all its neighbours' memory.
//
// The answer does not depend on what the program could change meanwhile: a file is given, not
// a permission. The stage's own execve is let through, and others only where a jail without mounts
// of its own has programs; all of it ends with Seal, before anything foreign runs.
type opener struct {
	fd    int // of the listener
	opens map[string]*os.File
	stop  int // an event that ends serve

	single   bool // only one execve is let through: the stage's own
	executed bool // it was; serve only

	done chan struct{} // closed when serve has ended
	once sync.Once
}

// newOpener serves the listener fd. It owns fd.
func newOpener(fd int, opens map[string]*os.File, single bool) *opener {
	o := &opener{fd: fd, single: single, opens: maps.Clone(opens), done: make(chan struct{}), stop: -1}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(fd) // every call that is asked for is refused then
		close(o.done)
		return o
	}
	o.stop = stop
	go o.serve()
	return o
}

// close ends the service: from here on the kernel refuses what would be asked for.
func (o *opener) close() {
	o.once.Do(func() {
		if o.stop < 0 {
			return
		}
		one := [8]byte{1}
		_, _ = unix.Write(o.stop, one[:])
		<-o.done
		unix.Close(o.stop)
	})
}

func (o *opener) serve() {
	defer close(o.done)
	defer unix.Close(o.fd)
	for {
		fds := []unix.PollFd{{Fd: int32(o.fd), Events: unix.POLLIN}, {Fd: int32(o.stop), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return
		}
		if fds[1].Revents != 0 || fds[0].Revents&^unix.POLLIN != 0 {
			return // closed, or nobody is left who could ask
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			continue
		}
		var n seccomp.Notification
		if err := seccomp.Receive(o.fd, &n); err != nil {
			continue // it was killed meanwhile, or the call was interrupted
		}
		o.answer(&n)
	}
}

func (o *opener) answer(n *seccomp.Notification) {
	switch n.Data.Number {
	case unix.SYS_EXECVE:
		if o.executed && o.single {
			_ = seccomp.Refuse(o.fd, n.ID, unix.EACCES) // an error, here and below, says that the caller is gone
			return
		}
		// One that a signal has interrupted meanwhile asks again.
		o.executed = seccomp.Continue(o.fd, n.ID) == nil
	case unix.SYS_OPENAT:
		o.open(n)
	default:
		_ = seccomp.Refuse(o.fd, n.ID, unix.EPERM)
	}
}

// open gives the program the file of that name.
func (o *opener) open(n *seccomp.Notification) {
	name, err := readName(n.PID, n.Data.Args[1])
	f := o.opens[name]
	if err != nil || f == nil {
		_ = seccomp.Refuse(o.fd, n.ID, unix.EACCES)
		return
	}
	if err := seccomp.Give(o.fd, n.ID, int(f.Fd())); err != nil {
		_ = seccomp.Refuse(o.fd, n.ID, unix.EACCES)
	}
}

const maxName = 256 // bytes of a name that is looked up

// readName reads a path from a process's memory.
func readName(pid uint32, addr uint64) (string, error) {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return "", err
	}
	defer mem.Close()
	b := make([]byte, maxName)
	n, err := mem.ReadAt(b, int64(addr)) // fewer, if what follows is not mapped
	end := bytes.IndexByte(b[:max(n, 0)], 0)
	if end < 0 {
		return "", errors.Join(errors.New("no name"), err)
	}
	return string(b[:end]), nil
}
