package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
)

// needVsockLoopback skips where the host's CID is somebody else: on a machine
// with any vsock transport but the loopback, a test would reach out of it.
func needVsockLoopback(t *testing.T) {
	t.Helper()
	const remedy = "load vsock_loopback on a machine without another vsock transport"
	dev, err := os.Open("/dev/vsock")
	if err != nil {
		testenv.Skip(t, err.Error()+": "+remedy)
	}
	defer dev.Close()
	cid, err := unix.IoctlGetUint32(int(dev.Fd()), unix.IOCTL_VM_SOCKETS_GET_LOCAL_CID)
	if err != nil || cid != unix.VMADDR_CID_ANY && cid != unix.VMADDR_CID_LOCAL {
		testenv.Skip(t, fmt.Sprintf("the local CID is %d (%v): %s", cid, err, remedy))
	}
	fd := vsockSocket(t)
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_LOCAL, Port: unix.VMADDR_PORT_ANY}); err != nil {
		testenv.Skip(t, fmt.Sprintf("bind to the loopback: %v: %s", err, remedy))
	}
}

func vsockSocket(t *testing.T) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		testenv.Skip(t, fmt.Sprintf("open vsock socket: %v: a kernel with AF_VSOCK", err))
	}
	return fd
}

// The agent over AF_VSOCK: it dials out for hello, is dialled afterwards.
func TestAgentOverVsock(t *testing.T) {
	needVsockLoopback(t)
	lfd := vsockSocket(t)
	defer unix.Close(lfd)
	if err := unix.Bind(lfd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: unix.VMADDR_PORT_ANY}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(lfd, 1); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(lfd)
	if err != nil {
		t.Fatal(err)
	}
	l := link.GuestVsock(guestrpc.PortHello, func() (uint32, error) { return sa.(*unix.SockaddrVM).Port, nil })
	a := testAgent(t, func(*guestrpc.Hello, func() (time.Time, error)) error { return nil })
	served := make(chan error, 1)
	go func() { served <- a.Serve(l) }()

	fd, _, err := unix.Accept(lfd)
	if err != nil {
		t.Fatal(err)
	}
	s := fileStream(t, fd)
	if err := s.WriteHeader(helloHeader()); err != nil {
		t.Fatal(err)
	}
	var reply guestrpc.HelloReply
	decode(t, s.next(), guestrpc.FrameHello, &reply)
	s.ack()

	dial := func() *session {
		fd := vsockSocket(t)
		if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_LOCAL, Port: guestrpc.PortAgent}); err != nil {
			t.Fatal(err)
		}
		s := &session{stream: fileStream(t, fd), window: guestrpc.StdinWindow, credit: make(chan struct{}, 1)}
		if err := s.WriteHeader(&guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpExec, Secret: testSecret,
			Exec: &guestrpc.Exec{Args: []string{"sh", "-c", "head -c 3000000 /dev/zero; echo err >&2; exit 4"}}}); err != nil {
			t.Fatal(err)
		}
		return s
	}
	for range 3 {
		if r := dial().wait(); len(r.stdout) != 3000000 || string(r.stderr) != "err\n" || r.exit.Code != 4 {
			t.Errorf("%d bytes, %q, %+v", len(r.stdout), r.stderr, r.exit)
		}
	}
	l.Close()
	if err := <-served; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
}

func fileStream(t *testing.T, fd int) *stream {
	t.Helper()
	f := os.NewFile(uintptr(fd), "vsock")
	t.Cleanup(func() { f.Close() })
	return &stream{t, fileConn{f}, guestrpc.NewStream(f)}
}

type fileConn struct{ *os.File }

func (fileConn) LocalAddr() net.Addr  { return nil }
func (fileConn) RemoteAddr() net.Addr { return nil }

// Nobody listens: the agent must hear of it, not wait.
func TestVsockHostMissing(t *testing.T) {
	needVsockLoopback(t)
	l := link.GuestVsock(guestrpc.PortHello, func() (uint32, error) { return 0xfffe, nil })
	defer l.Close()
	start := time.Now()
	err := testAgent(t, nil).Serve(l)
	if err == nil || errors.Is(err, io.EOF) || time.Since(start) > 10*time.Second {
		t.Errorf("Serve: %v after %v", err, time.Since(start))
	}
}
