package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/link/vsock"
	"github.com/ironclaw-run/ironclaw/internal/undo"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Start starts a machine: link, jail, process, handshake, proof of the layers, go.
func (d *Driver) Start(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	var borrowed, stack undo.Stack // borrowed is what QEMU keeps and we do not
	defer borrowed.Run()
	defer stack.Run() // first
	if spec.Jail != nil {
		stack.Add(func() { _ = spec.Jail.Close() })
	}
	if err := d.check(&spec); err != nil {
		return nil, err
	}
	if spec.Jail == nil {
		var err error
		if spec.Jail, err = jail.Prepare(ctx, JailOptions(&spec)); err != nil {
			return nil, err
		}
		stack.Add(func() { _ = spec.Jail.Close() })
	}
	m := &machine{
		console: newRing(64 << 10),
		stderr:  newRing(16 << 10),
		closing: make(chan struct{}),
		done:    make(chan struct{}),
		info:    vm.Info{Driver: driverName, Accel: spec.Accel, Link: spec.Link, Cloned: spec.From != nil},
	}
	qmpConn, qmpFile, err := socketPair("qmp")
	if err != nil {
		return nil, err
	}
	defer qmpFile.Close() // QEMU has its own. With ours open we would not see that it closes it
	m.qmp = newQMP(qmpConn)
	stack.Add(m.qmp.close)

	linkFile, cid, err := m.openLink(&spec)
	if err != nil {
		return nil, err
	}
	stack.Add(func() { m.link.Close() })
	closeLinkFile := sync.OnceFunc(func() {
		if spec.Link == vm.LinkSerial { // the vsock device stays the link's
			linkFile.Close()
		}
	})
	defer closeLinkFile()

	if spec.Saveable {
		if err := m.openSnapshot(); err != nil {
			return nil, err
		}
		stack.Add(m.closeSnapshot)
	}
	program, err := d.confined(ctx, m, &spec, cid, &borrowed)
	if err != nil {
		return nil, err
	}
	program.Descriptors = append([]*os.File{qmpFile, linkFile}, program.Descriptors...)
	if m.process, err = spec.Jail.Start(ctx, program); err != nil {
		return nil, fmt.Errorf("start %s: %w", d.program, err)
	}
	m.info.PID, m.info.Started = m.process.PID(), m.process.Begun()
	closeLinkFile()
	qmpFile.Close()
	stack.Add(func() { _ = m.process.Close() })

	if err := m.handshake(ctx, spec.From != nil); err != nil {
		return nil, err
	}
	stack.Release()
	go m.finish()
	return m, nil
}

// JailOptions are those of a jail for the machine, with every layer.
func JailOptions(spec *vm.Spec) jail.Options {
	return jail.Options{ID: spec.ID, CPUs: spec.CPUs, Memory: spec.Memory + vm.Overhead, Disk: spec.Root}
}

// check turns QEMU's less clear complaints into ours.
func (d *Driver) check(spec *vm.Spec) error {
	if err := spec.Validate(d.Features()); err != nil {
		return err
	}
	if err := checkFiles(spec); err != nil {
		return err
	}
	if err := checkHostMemory(spec); err != nil {
		return err
	}
	if spec.From != nil {
		return nil // the kernel is not loaded
	}
	return checkMemory(spec)
}

// openLink makes the host's end of the link and the descriptor for QEMU's, and
// with vsock the guest's address.
func (m *machine) openLink(spec *vm.Spec) (*os.File, uint32, error) {
	if spec.Link == vm.LinkVsock {
		v, err := vsock.Listen()
		if err != nil {
			return nil, 0, fmt.Errorf("link: %w", err)
		}
		m.link = v
		return v.File(), v.CID(), nil
	}
	conn, file, err := socketPair("link")
	if err != nil {
		return nil, 0, err
	}
	m.link = link.NewMux(conn, link.HostSide)
	return file, 0, nil
}

// confined is QEMU with all that it gets, but for the descriptors of QMP and link.
func (d *Driver) confined(ctx context.Context, m *machine, spec *vm.Spec, cid uint32, borrowed *undo.Stack) (jail.Program, error) {
	p := jail.Program{Path: d.program, Stdout: m.console, Stderr: m.stderr, Opens: map[string]*os.File{}}
	var err error
	if p.Files, err = d.files(ctx, spec.Jail, spec); err != nil {
		return p, err
	}
	p.Args = d.command(spec, pathsIn(spec.Jail, spec), cid)
	if !spec.Jail.Has(layer.Seccomp) { // by which it would be given the device
		p.Args[slices.Index(p.Args, sandboxOptions)] = "off"
		if spec.Accel == vm.KVM {
			p.Files = append(p.Files, jail.File{Host: kvmDevice, Inside: kvmDevice, Device: true})
		}
	}
	m.info.Command = append([]string{d.program}, p.Args...)
	switch {
	case spec.Saveable:
		p.Opens[insideMemory] = m.saved.Memory
		p.FileSize = spec.Memory + maxState
	case spec.From != nil:
		memory, err := reopen(spec.From.Memory)
		if err != nil {
			return p, fmt.Errorf("open the snapshot's memory: %w", err)
		}
		borrowed.Add(func() { memory.Close() })
		state, err := reopen(spec.From.State)
		if err != nil {
			return p, fmt.Errorf("open the snapshot's state: %w", err)
		}
		borrowed.Add(func() { state.Close() })
		p.Opens[insideMemory] = memory
		p.Descriptors = []*os.File{state}
	}
	if spec.Accel == vm.KVM {
		kvm, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
		if err != nil {
			return p, err
		}
		borrowed.Add(func() { kvm.Close() })
		p.Opens[kvmDevice] = kvm
	}
	return p, nil
}

// reopen opens a file once more, for reading only and from its beginning: a descriptor's
// offset is shared by all who have it.
func reopen(f *os.File) (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

// filters are those that each thread has at least: the jail's and QEMU's own.
const filters = 2

// handshake waits for QEMU's greeting, proves its filter and lets the guest run.
//
// What QEMU is to do is sent before it can listen: each answer waited for would
// cost a switch of processes.
func (m *machine) handshake(ctx context.Context, clone bool) error {
	commands := []qmpCommand{{"qmp_capabilities", nil}}
	if clone {
		commands = append(commands,
			qmpCommand{"migrate-set-capabilities", snapshotCapabilities},
			qmpCommand{"migrate-incoming", map[string]string{"uri": fmt.Sprintf("fd:%d", fdState)}})
	}
	var sent []*qmpCall
	for _, c := range commands {
		call, err := m.qmp.send(c.name, c.args, nil)
		if err != nil {
			return m.snapshotError(ctx, clone, err)
		}
		sent = append(sent, call)
	}
	select {
	case <-m.qmp.ready:
	case <-m.qmp.done:
		return m.snapshotError(ctx, clone, errQMPClosed)
	case <-m.process.Exited():
		return m.snapshotError(ctx, clone, errQMPClosed)
	case <-ctx.Done():
		return fmt.Errorf("start QEMU: %w", context.Cause(ctx))
	}
	m.info.Ready = time.Since(m.info.Started)
	for _, call := range sent {
		if _, err := m.qmp.answer(ctx.Done(), call); err != nil {
			return m.snapshotError(ctx, clone, err)
		}
	}
	if clone { // before that, "cont" has no effect
		if err := m.qmp.wait(ctx, &m.qmp.migrated); err != nil {
			return m.snapshotError(ctx, clone, err)
		}
	}
	var err error
	if m.info.Layers, err = m.process.Verify(filters); err != nil {
		return err
	}
	m.process.Seal()
	if _, err := m.qmp.do(ctx.Done(), "cont", nil); err != nil {
		return m.startError(ctx, err)
	}
	m.info.Running = time.Since(m.info.Started)
	return nil
}

// snapshotError is startError for a clone until it has read its state: what QEMU
// dies of then is most likely the snapshot.
func (m *machine) snapshotError(ctx context.Context, clone bool, err error) error {
	err = m.startError(ctx, err)
	if !clone || ctx.Err() != nil {
		return err
	}
	return &vm.SnapshotError{Err: err}
}

func (m *machine) startError(ctx context.Context, err error) error {
	if errors.Is(err, errQMPClosed) {
		return m.diedAtStart(ctx)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("start QEMU: %w", context.Cause(ctx))
	}
	return err
}

// diedAtStart tells what QEMU said when it gave up.
func (m *machine) diedAtStart(ctx context.Context) error {
	select {
	case <-m.process.Exited():
	case <-ctx.Done():
		return fmt.Errorf("start QEMU: %w", context.Cause(ctx))
	}
	said := strings.TrimSpace(vm.Printable(m.stderr.tail(2048)))
	if said == "" {
		said = describe(m.process.Err())
	}
	return fmt.Errorf("start QEMU: %s", said)
}

// socketPair gives a connection and the file of its other end, for a child.
func socketPair(name string) (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	conn, err := net.FileConn(ours) // a duplicate
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	return conn.(*net.UnixConn), theirs, nil
}
