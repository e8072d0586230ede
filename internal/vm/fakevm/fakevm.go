// Package fakevm is a driver without a VMM, for fast tests: a "machine" is a
// goroutine that gets the guest's end of a real link. It passes vm/vmtest like
// the real drivers, so what is tested on it holds for them.
package fakevm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Driver runs Guest in the place of a machine's guest. Guest must return soon
// after its link has closed.
type Driver struct {
	Guest func(g link.Guest)
}

var _ vm.Driver = (*Driver)(nil)

// Features says that everything is emulated.
func (*Driver) Features() vm.Features {
	return vm.Features{Name: "fake", Version: "1", Accels: []vm.Accel{vm.TCG}, Links: []vm.Link{vm.LinkSerial}}
}

// SnapshotInputs: there is nothing to save.
func (*Driver) SnapshotInputs(vm.Spec) (map[string]string, error) { return nil, vm.ErrNoSnapshots }

// Machine is a fake machine.
type Machine struct {
	host  *link.Mux
	guest *link.Mux
	info  vm.Info
	left  chan struct{} // closed when the guest has returned
	done  chan struct{}

	mu  sync.Mutex // guards err, closed
	err error
	end sync.Once
}

var _ vm.Machine = (*Machine)(nil)

// Start checks the Spec as a real driver does and starts the guest.
func (d *Driver) Start(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	if err := spec.Validate(d.Features()); err != nil {
		return nil, err
	}
	for _, path := range []string{spec.Kernel, spec.Initrd, spec.Root} {
		if st, err := os.Stat(path); err != nil {
			return nil, err
		} else if !st.Mode().IsRegular() || st.Size() == 0 {
			return nil, fmt.Errorf("%s is not a file with something in it", path)
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	a, b, err := socketPair()
	if err != nil {
		return nil, err
	}
	m := &Machine{
		host:  link.NewMux(a, link.HostSide),
		guest: link.NewMux(b, link.GuestSide),
		info:  vm.Info{Driver: "fake", Accel: spec.Accel, Link: spec.Link, Started: time.Now()},
		left:  make(chan struct{}),
		done:  make(chan struct{}),
	}
	go func() {
		d.Guest(m.guest)
		close(m.left)
		m.stop(&vm.ExitError{Reason: "the guest shut down"})
	}()
	return m, nil
}

func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	conns := make([]net.Conn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "link")
		var e error
		conns[i], e = net.FileConn(f)
		err = errors.Join(err, e, f.Close())
	}
	return conns[0], conns[1], err
}

// Kill ends the machine as a VMM that dies does.
func (m *Machine) Kill() { m.stop(&vm.ExitError{Reason: "killed"}) }

func (m *Machine) stop(err error) {
	m.end.Do(func() {
		m.mu.Lock()
		m.err = err
		m.mu.Unlock()
		m.guest.Close()
		m.host.Close()
		<-m.left // nothing of the machine remains
		close(m.done)
	})
	<-m.done
}

// Dial opens a stream to the guest.
func (m *Machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	c, err := m.host.Dial(ctx, port)
	if errors.Is(err, link.ErrClosed) {
		<-m.done
		if e := m.Err(); e != nil {
			return nil, e
		}
	}
	return c, err
}

// Save cannot be done.
func (*Machine) Save(context.Context, vm.Snapshot) error { return vm.ErrNoSnapshots }

// Done is closed when the machine has ended.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Err says why.
func (m *Machine) Err() error {
	select {
	case <-m.done:
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.err
	default:
		return nil
	}
}

// Close ends the machine.
func (m *Machine) Close() error {
	m.stop(nil)
	return nil
}

// Info has no process.
func (m *Machine) Info() vm.Info { return m.info }
