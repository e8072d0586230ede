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
	if err := spec.Validate(d.Features()); err != nil {
		return nil, err
	}
	if err := checkFiles(&spec); err != nil {
		return nil, err
	}
	if err := checkMemory(&spec); err != nil {
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
		info:    vm.Info{Driver: driverName, Accel: spec.Accel, Link: spec.Link},
	}
	qmpConn, qmpFile, err := socketPair("qmp")
	if err != nil {
		return nil, err
	}
	m.qmp = newQMP(qmpConn)
	stack.Add(m.qmp.close)

	linkFile, vs, err := m.openLink(&spec)
	if err != nil {
		qmpFile.Close()
		return nil, err
	}
	stack.Add(func() { m.link.Close() })

	args := command(&spec, d.tscFor(&spec), vs)
	m.info.Command = append([]string{d.program}, args...)
	err = m.startProcess(d.program, args, qmpFile, linkFile)
	// QEMU has its own now. With ours open we would not see that it closes them.
	qmpFile.Close()
	if spec.Link == vm.LinkSerial {
		linkFile.Close() // the vsock device stays the link's
	}
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", d.program, err)
	}
	stack.Add(func() { m.kill(); <-m.exited })

	if err := m.handshake(ctx); err != nil {
		return nil, err
	}
	m.info.Ready = time.Since(m.info.Started)
	stack.Release()
	go m.finish()
	return m, nil
}

func (d *Driver) tscFor(spec *vm.Spec) int {
	if spec.Accel != vm.TCG {
		return 0
	}
	return d.facts.tscKHz()
}

// openLink makes the host's end of the link and the descriptor for QEMU's.
func (m *machine) openLink(spec *vm.Spec) (*os.File, vsockAddr, error) {
	if spec.Link == vm.LinkVsock {
		v, err := vsock.Listen()
		if err != nil {
			return nil, vsockAddr{}, fmt.Errorf("link: %w", err)
		}
		m.link = v
		return v.File(), vsockAddr{v.CID(), v.Port()}, nil
	}
	conn, file, err := socketPair("link")
	if err != nil {
		return nil, vsockAddr{}, err
	}
	m.link = link.NewMux(conn, link.HostSide)
	return file, vsockAddr{}, nil
}

// startProcess starts QEMU so that it ends with this process.
func (m *machine) startProcess(program string, args []string, inherit ...*os.File) error {
	cmd := exec.Command(program, args...) //nolint:noctx // its life is the machine's, not the call's
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.Stdout = m.console
	cmd.Stderr = m.stderr
	cmd.ExtraFiles = inherit // QMP, link: descriptors 3 and 4
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
func (m *machine) handshake(ctx context.Context) error {
	select {
	case <-m.qmp.ready:
	case <-m.qmp.done:
		return m.diedAtStart(ctx)
	case <-m.exited:
		return m.diedAtStart(ctx)
	case <-ctx.Done():
		return fmt.Errorf("start QEMU: %w", context.Cause(ctx))
	}
	if _, err := m.qmp.do(ctx.Done(), "qmp_capabilities", nil); err != nil {
		return m.startError(ctx, err)
	}
	if err := verifySeccomp(m.info.PID); err != nil {
		return err
	}
	if _, err := m.qmp.do(ctx.Done(), "cont", nil); err != nil {
		return m.startError(ctx, err)
	}
	return nil
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
func socketPair(name string) (net.Conn, *os.File, error) {
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
	return conn, theirs, nil
}
