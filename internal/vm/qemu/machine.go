package qemu

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// machine is one QEMU process. done is closed when it has ended and all that belonged
// to it has been cleaned up.
type machine struct {
	info    vm.Info
	process *jail.Process
	qmp     *qmp
	link    link.Host
	console *ring
	stderr  *ring
	saved   vm.Snapshot // files in memory that take the machine's; only if it is saveable

	closeOnce sync.Once
	closing   chan struct{} // closed by Close, before it kills
	done      chan struct{}
	err       error // set before done is closed
}

var _ vm.Machine = (*machine)(nil)

func (m *machine) Info() vm.Info { return m.info }

func (m *machine) Done() <-chan struct{} { return m.done }

func (m *machine) Err() error {
	select {
	case <-m.done:
		return m.err
	default:
		return nil
	}
}

// finish waits for the process's end, cleans up and says why it ended.
func (m *machine) finish() {
	broken := m.watch()
	_ = m.process.Close()
	m.qmp.close()
	m.link.Close()
	m.closeSnapshot()
	select {
	case <-m.closing:
	default:
		m.err = &vm.ExitError{
			Reason:  cmp.Or(broken, m.reason()),
			Console: m.lastWords(),
			Stderr:  vm.Printable(m.stderr.tail(2048)),
		}
	}
	close(m.done)
}

// watch waits for the process's end. A machine whose link is gone is of no use
// and is killed; watch then says what was wrong with the link.
func (m *machine) watch() (broken string) {
	mux, ok := m.link.(*link.Mux)
	if !ok {
		<-m.process.Exited()
		return ""
	}
	select {
	case <-m.process.Exited():
		return ""
	case <-mux.Done():
	}
	if errors.Is(mux.Err(), link.ErrProtocol) {
		broken = mux.Err().Error()
	} else {
		// QEMU has closed the port, most likely because it is ending.
		select {
		case <-m.process.Exited():
			return ""
		case <-time.After(exitGrace):
			broken = "QEMU closed the link"
		}
	}
	m.kill()
	<-m.process.Exited()
	return broken
}

// exitGrace bounds how long QEMU may take from closing its descriptors to its
// end before it is helped along.
const exitGrace = 5 * time.Second

// panicMark is how Linux begins to say that it panics.
const panicMark = "Kernel panic - not syncing:"

// initMark is how the guest's PID 1 begins to say that it gives up.
const initMark = "ironclaw-init: "

// lastWords is what the console printed last, from a panic on if there was one.
func (m *machine) lastWords() string {
	all := m.console.tail(64 << 10)
	if i := bytes.Index(all, []byte(panicMark)); i >= 0 {
		return vm.Printable(all[i:min(len(all), i+2048)])
	}
	return vm.Printable(m.console.tail(2048))
}

// reason says in words why the process ended. A VMM's exit code tells nothing
// about its guest: after a panic it is 0.
func (m *machine) reason() string {
	if _, after, ok := bytes.Cut(m.console.tail(64<<10), []byte(panicMark)); ok {
		return strings.TrimRight("the guest's kernel panicked: "+firstLine(after), ": ")
	}
	if _, after, ok := bytes.Cut(m.console.tail(64<<10), []byte(initMark)); ok {
		return "the guest's init gave up: " + firstLine(after)
	}
	switch {
	case m.qmp.shutdownReason() == "guest-reset", m.qmp.shutdownReason() == "guest-shutdown":
		return "the guest shut down"
	case m.qmp.shutdownReason() != "":
		return "QEMU stopped the guest: " + m.qmp.shutdownReason()
	}
	return describe(m.process.Err())
}

// firstLine is what can be shown of a console's line, which a guest may make as
// long as it likes.
func firstLine(b []byte) string {
	const most = 200
	line, _, _ := bytes.Cut(b[:min(len(b), most)], []byte("\n"))
	return strings.TrimSpace(vm.Printable(line))
}

// describe turns the error of Cmd.Wait into a sentence.
func describe(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return fmt.Sprintf("QEMU was ended by signal %d (%s)", ws.Signal(), ws.Signal())
		}
		return fmt.Sprintf("QEMU exited with status %d", exit.ExitCode())
	}
	if err != nil {
		return "QEMU ended: " + err.Error()
	}
	return "QEMU exited"
}

func (m *machine) kill() { m.process.Kill() }

// Close kills QEMU: nothing in a machine is worth a goodbye.
func (m *machine) Close() error {
	m.closeOnce.Do(func() {
		close(m.closing)
		m.kill()
	})
	<-m.done
	return nil
}

// Dial opens a stream to the guest.
func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() { // an AF_VSOCK link does not see QEMU's end by itself
		select {
		case <-m.process.Exited():
			cancel()
		case <-stop:
		}
	}()
	c, err := m.link.Dial(ctx, port)
	if err == nil {
		return c, nil
	}
	ended := errors.Is(err, link.ErrClosed) || errors.Is(err, link.ErrProtocol)
	select {
	case <-m.process.Exited():
		ended = true
	default:
	}
	if !ended {
		return nil, err
	}
	<-m.done
	if m.err != nil {
		return nil, m.err
	}
	return nil, link.ErrClosed
}
