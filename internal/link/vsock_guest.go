//go:build linux

package link

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// GuestVsock is the guest's end over AF_VSOCK. It dials for the port hello, on
// which the host opens the first stream: there a listener's Accept connects to
// the port of the host that hostPort names, and so tells that the guest is
// ready. Nobody has to try again and again. All other ports are listened on.
//
// Accept returns when the host has said something. A call that ends before that
// is one of a machine that was saved: in the machine that was started from it,
// where the address is another, Accept calls again.
//
// It uses the sockets directly: the guest's program has to be small.
func GuestVsock(hello uint32, hostPort func() (uint32, error)) Guest {
	return &vsockGuest{hello: hello, hostPort: hostPort, open: make(map[interface{ Close() error }]struct{})}
}

type vsockGuest struct {
	hello    uint32
	hostPort func() (uint32, error)

	mu     sync.Mutex
	closed bool
	open   map[interface{ Close() error }]struct{} // listeners and streams
}

func (g *vsockGuest) Listen(port uint32) (net.Listener, error) {
	if port == g.hello {
		l := &vsockDialer{g: g, once: make(chan struct{}, 1), closed: make(chan struct{})}
		l.once <- struct{}{}
		return l, g.add(l)
	}
	f, err := vsockSocket()
	if err != nil {
		return nil, err
	}
	l := &vsockListener{g: g, port: port, f: f}
	err = control(f, func(fd int) error {
		if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
			return fmt.Errorf("bind vsock port %d: %w", port, err)
		}
		return os.NewSyscallError("listen", unix.Listen(fd, acceptQueue))
	})
	if err != nil {
		f.Close()
		return nil, err
	}
	return l, g.add(l)
}

// Close ends every stream and listener.
func (g *vsockGuest) Close() error {
	g.mu.Lock()
	g.closed = true
	open := g.open
	g.open = nil
	g.mu.Unlock()
	for c := range open {
		c.Close()
	}
	return nil
}

// add makes Close reach c. If it is too late, c is closed.
func (g *vsockGuest) add(c interface{ Close() error }) error {
	g.mu.Lock()
	if !g.closed {
		g.open[c] = struct{}{}
		g.mu.Unlock()
		return nil
	}
	g.mu.Unlock()
	c.Close()
	return ErrClosed
}

func (g *vsockGuest) forget(c interface{ Close() error }) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.open, c)
}

func (g *vsockGuest) conn(f *os.File, port uint32) (*vsockConn, error) {
	c := &vsockConn{File: f, g: g, port: port}
	return c, g.add(c)
}

// vsockDialer is the listener of the hello port.
type vsockDialer struct {
	g      *vsockGuest
	once   chan struct{} // holds the only token
	closed chan struct{}
	shut   sync.Once
}

func (l *vsockDialer) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
	}
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	case <-l.once:
	}
	for {
		c, err := l.g.call()
		if err != nil {
			return nil, err
		}
		spoken, err := c.hasSpoken()
		if spoken {
			return c, nil
		}
		c.Close()
		if err != nil {
			return nil, err
		}
	}
}

// call connects to the host.
func (g *vsockGuest) call() (*vsockConn, error) {
	port, err := g.hostPort()
	if err != nil {
		return nil, fmt.Errorf("find the port of the host: %w", err)
	}
	f, err := vsockSocket()
	if err != nil {
		return nil, err
	}
	if err := connectVsock(f, port); err != nil {
		f.Close()
		return nil, fmt.Errorf("connect to vsock port %d of the host: %w", port, err)
	}
	return g.conn(f, g.hello)
}

// hasSpoken waits for the first byte, which it leaves there. It returns false
// when the connection was reset before.
func (c *vsockConn) hasSpoken() (bool, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return false, err
	}
	var n int
	var perr error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, _, perr = unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK)
			if perr != unix.EINTR {
				return perr != unix.EAGAIN
			}
		}
	})
	switch {
	case err != nil:
		return false, net.ErrClosed
	case n > 0:
		return true, nil
	case perr == unix.ECONNRESET, perr == unix.ENOTCONN: // virtio_vsock_reset_sock sets both
		return false, nil
	case perr != nil:
		return false, os.NewSyscallError("recv", perr)
	}
	return false, io.EOF // the host hung up
}

func (l *vsockDialer) Close() error {
	l.shut.Do(func() { close(l.closed) })
	l.g.forget(l)
	return nil
}

func (l *vsockDialer) Addr() net.Addr { return Addr{GuestSide.String(), l.g.hello} }

// vsockListener accepts what the host opens.
type vsockListener struct {
	g    *vsockGuest
	port uint32
	f    *os.File
}

func (l *vsockListener) Accept() (net.Conn, error) {
	raw, err := l.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var aerr error
	err = raw.Read(func(s uintptr) bool {
		for {
			fd, _, aerr = unix.Accept4(int(s), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if aerr != unix.EINTR && aerr != unix.ECONNABORTED {
				return aerr != unix.EAGAIN
			}
		}
	})
	switch {
	case err != nil: // a listener has no deadline: it is closed
		return nil, net.ErrClosed
	case aerr != nil:
		return nil, os.NewSyscallError("accept", aerr)
	}
	return l.g.conn(os.NewFile(uintptr(fd), "vsock"), l.port)
}

func (l *vsockListener) Close() error {
	l.g.forget(l)
	return l.f.Close()
}

func (l *vsockListener) Addr() net.Addr { return Addr{GuestSide.String(), l.port} }

// vsockConn is a socket; *os.File gives it deadlines and the poller.
type vsockConn struct {
	*os.File
	g    *vsockGuest
	port uint32
}

var _ net.Conn = (*vsockConn)(nil)

func (c *vsockConn) LocalAddr() net.Addr  { return Addr{GuestSide.String(), c.port} }
func (c *vsockConn) RemoteAddr() net.Addr { return Addr{HostSide.String(), c.port} }

func (c *vsockConn) Close() error {
	c.g.forget(c)
	if err := c.File.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

func vsockSocket() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open vsock socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}

// connectVsock connects f to a port of the host. The kernel bounds the wait
// (two seconds for a host that does not answer).
func connectVsock(f *os.File, port uint32) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	started := false
	var cerr error
	err = raw.Write(func(fd uintptr) bool {
		if !started {
			started = true
			cerr = unix.Connect(int(fd), &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port})
			return cerr != unix.EINPROGRESS
		}
		var code int
		if code, cerr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); cerr != nil {
			return true
		}
		if code != 0 {
			cerr = unix.Errno(code)
			return true
		}
		// Woken without an error: connected if there is a peer.
		_, cerr = unix.Getpeername(int(fd))
		return cerr != unix.ENOTCONN
	})
	if err != nil {
		return net.ErrClosed
	}
	return cerr
}

func control(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var derr error
	if err := raw.Control(func(fd uintptr) { derr = do(int(fd)) }); err != nil {
		return err
	}
	return derr
}
