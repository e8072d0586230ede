package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/link/vsock"
	"github.com/ironclaw-run/ironclaw/internal/undo"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Start starts a machine: link, process, handshake, proof of the filter, go.
func (d *Driver) Start(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	if err := d.check(&spec); err != nil {
		return nil, err
	}
	var stack undo.Stack
	defer stack.Run()

	m := &machine{
		console: newRing(64 << 10),
		stderr:  newRing(16 << 10),
		closing: make(chan struct{}),
		exited:  make(chan struct{}),
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

	files := []*os.File{qmpFile, linkFile}
	if spec.Saveable {
		if err := m.openSnapshot(); err != nil {
			return nil, err
		}
		stack.Add(m.closeSnapshot)
		files = append(files, m.saved.Memory)
	} else if spec.From != nil {
		// From its beginning: a descriptor's offset is shared by all who have it.
		state, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", spec.From.State.Fd()))
		if err != nil {
			return nil, fmt.Errorf("open the snapshot's state: %w", err)
		}
		defer state.Close()
		files = append(files, spec.From.Memory, state)
	}

	args := d.command(&spec, cid)
	m.info.Command = append([]string{d.program}, args...)
	if err := m.startProcess(d.program, args, files...); err != nil {
		return nil, fmt.Errorf("start %s: %w", d.program, err)
	}
	closeLinkFile()
	qmpFile.Close()
	stack.Add(func() { m.kill(); <-m.exited })

	if err := m.handshake(ctx, spec.From != nil); err != nil {
		return nil, err
	}
	stack.Release()
	go m.finish()
	return m, nil
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

// startProcess starts QEMU so that it ends with this process.
func (m *machine) startProcess(program string, args []string, inherit ...*os.File) error {
	cmd := exec.Command(program, args...) //nolint:noctx // its life is the machine's, not the call's
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.Stdout = m.console
	cmd.Stderr = m.stderr
	cmd.WaitDelay = exitGrace // for the pipes, should somebody else hold them too
	cmd.ExtraFiles = inherit  // QMP, link: descriptors 3 and 4
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true, // the terminal's Ctrl-C is for us, not for QEMU
		Pdeathsig: syscall.SIGKILL,
	}
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends, so that
		// thread is kept until QEMU has ended.
		runtime.LockOSThread()
		m.info.Started = time.Now()
		err := cmd.Start()
		if err == nil {
			m.process = cmd.Process
			m.info.PID = cmd.Process.Pid
		}
		started <- err
		if err != nil {
			return
		}
		m.exitErr = cmd.Wait()
		close(m.exited)
	}()
	return <-started
}

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
	case <-m.exited:
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
	if err := verifySeccomp(m.info.PID); err != nil {
		return err
	}
	if clone { // before that, "cont" has no effect
		if err := m.qmp.wait(ctx, &m.qmp.migrated); err != nil {
			return m.snapshotError(ctx, clone, err)
		}
	}
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
	case <-m.exited:
	case <-ctx.Done():
		return fmt.Errorf("start QEMU: %w", context.Cause(ctx))
	}
	said := strings.TrimSpace(vm.Printable(m.stderr.tail(2048)))
	if said == "" {
		said = describe(m.exitErr)
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
