package verify

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
)

// vsockPort is where a listener of the host's waits for a guest that gets through.
// AF_VSOCK is not divided by network namespaces: every guest with an address can
// try every port of the host and every address of another guest.
const vsockPort = 0x1c1a0

func vsockAttacks() []Attack {
	// Only ports that are ours: others may have somebody behind them.
	own := fmt.Sprint(vsockPort)
	agent := fmt.Sprint(guestrpc.PortAgent)
	others := []string{"0:" + own, "2:" + own, "3:" + own, "3:" + agent, "own-1:" + own, "own-1:" + agent, "own+1:" + own, "own+1:" + agent}
	return []Attack{{
		Group: Guest, Layer: Machine, Name: "reach other vsock ports and addresses", Expected: "refused, nobody called",
		run: func(ctx context.Context, e *env) (Finding, error) {
			l, err := listenVsock()
			if err != nil && !errors.Is(err, errNoVsock) {
				return Finding{}, err
			}
			defer l.close()
			res, err := e.guestProbe(ctx, probe.Request{Attack: "net.vsock", Args: others})
			calls := l.calls.Load()
			return Finding{fmt.Sprintf("%s; %d calls", res.Detail, calls), res.Outcome == probe.Worked || calls > 0}, err
		},
		control: func(ctx context.Context, e *env) (Finding, error) {
			l, err := listenVsock()
			if errors.Is(err, errNoVsock) {
				return Finding{}, &notHere{errNoVsock.Error()}
			}
			if err != nil {
				return Finding{}, err
			}
			defer l.close()
			res, err := e.childProbe(ctx, probe.Request{Attack: "net.vsock", Args: []string{fmt.Sprintf("%d:%d", unix.VMADDR_CID_LOCAL, vsockPort)}})
			if err == nil && res.Outcome == probe.Refused {
				// Without the module vsock_loopback a host does not reach itself.
				return Finding{}, &notHere{"this host's AF_VSOCK has no loopback (" + res.Detail + ")"}
			}
			return Finding{res.Detail, res.Outcome == probe.Worked && l.calls.Load() > 0}, err
		},
	}}
}

var errNoVsock = errors.New("this host has no AF_VSOCK")

// vsockListener counts who calls.
type vsockListener struct {
	f     *os.File
	calls atomic.Int64
	done  chan struct{}
}

// listenVsock returns a listener that may be closed also after an error.
func listenVsock() (*vsockListener, error) {
	l := &vsockListener{}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return l, errNoVsock
	}
	if err != nil {
		return l, fmt.Errorf("listen on vsock: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: vsockPort})
	if err == nil {
		err = unix.Listen(fd, 16)
	}
	if err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV) {
			return l, errNoVsock
		}
		return l, fmt.Errorf("listen on vsock: %w", err)
	}
	l.f, l.done = os.NewFile(uintptr(fd), "vsock"), make(chan struct{})
	go l.accept()
	return l, nil
}

// accept ends when the file is closed.
func (l *vsockListener) accept() {
	defer close(l.done)
	raw, err := l.f.SyscallConn()
	if err != nil {
		return
	}
	for err == nil {
		err = raw.Read(func(s uintptr) bool {
			fd, _, err := unix.Accept4(int(s), unix.SOCK_CLOEXEC)
			if err == nil {
				l.calls.Add(1)
				unix.Close(fd)
			}
			return err == nil
		})
	}
}

func (l *vsockListener) close() {
	if l.f == nil {
		return
	}
	_ = l.f.Close()
	<-l.done
}
