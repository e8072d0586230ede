// Package vsock is the host's end of an AF_VSOCK link to one guest. It stands
// apart from package link because the guest, which imports that one, shall not
// carry it.
package vsock

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"unsafe"

	mdlayher "github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/link"
)

// Device is the device through which the host's kernel gives a guest its
// AF_VSOCK address.
const Device = "/dev/vhost-vsock"

// vhostVsockSetGuestCID is VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h,
// _IOW(0xAF, 0x60, __u64).
const vhostVsockSetGuestCID = 0x4008af60

// Link is the host's end of the link to one guest.
//
// The guest dials out once, to say that it is there; that connection is what
// Dial gives for link.HelloPort: there the guest dials, not the host. The kernel vouches for the peer's address, so
// no other guest can take its place.
type Link struct {
	cid    uint32
	device *os.File
	listen *mdlayher.Listener
	hello  chan net.Conn // the guest's call
	called chan struct{} // closed when it has come
	done   chan struct{}
	once   sync.Once
	wg     sync.WaitGroup

	mu    sync.Mutex // guards conns
	conns map[net.Conn]struct{}
}

var _ link.Host = (*Link)(nil)

// Listen reserves a guest address of the host's kernel and waits for the
// guest that will have it. It needs access to /dev/vhost-vsock.
func Listen() (*Link, error) {
	device, err := os.OpenFile(Device, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	cid, l, err := reserve(device)
	if err != nil {
		device.Close()
		return nil, fmt.Errorf("reserve a vsock address: %w", err)
	}
	v := &Link{
		cid: cid, device: device, listen: l,
		hello:  make(chan net.Conn, 1),
		called: make(chan struct{}),
		done:   make(chan struct{}),
		conns:  make(map[net.Conn]struct{}),
	}
	v.wg.Go(v.accept)
	return v, nil
}

// reserve takes a random free address, and on the host the port of the same
// number: a guest that has been copied finds it by its new address alone.
func reserve(device *os.File) (uint32, *mdlayher.Listener, error) {
	for range 64 {
		var b [4]byte
		rand.Read(b[:])
		cid := binary.BigEndian.Uint32(b[:])>>1 | 1<<10 // never one of the reserved low ones
		if err := setGuestCID(device, uint64(cid)); errors.Is(err, unix.EADDRINUSE) {
			continue
		} else if err != nil {
			return 0, nil, err
		}
		l, err := mdlayher.ListenContextID(unix.VMADDR_CID_ANY, cid, nil)
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if err != nil {
			return 0, nil, fmt.Errorf("listen: %w", err)
		}
		return cid, l, nil
	}
	return 0, nil, errors.New("no free address found")
}

// setGuestCID reserves an address; the kernel refuses one in use.
func setGuestCID(device *os.File, cid uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), vhostVsockSetGuestCID, uintptr(unsafe.Pointer(&cid)))
	if errno != 0 {
		return errno
	}
	return nil
}

// CID is the guest's address, and the number of the host's port that it dials.
func (v *Link) CID() uint32 { return v.cid }

// Called is closed when the guest has called. Until Dial takes that call,
// nothing has been said to the guest.
func (v *Link) Called() <-chan struct{} { return v.called }

// File is the open /dev/vhost-vsock on which the address is reserved, to be
// given to the VMM. It stays the Link's.
func (v *Link) File() *os.File { return v.device }

// accept waits for the one call that comes from our guest and hangs up on
// everything else: other guests and other users of the host can dial the port.
func (v *Link) accept() {
	defer v.listen.Close()
	for {
		c, err := v.listen.Accept()
		if err != nil {
			return
		}
		if a, ok := c.RemoteAddr().(*mdlayher.Addr); ok && a.ContextID == v.cid {
			v.hello <- c
			close(v.called)
			return
		}
		c.Close()
	}
}

// Dial opens a stream to the guest. On the hello port it waits for the guest's
// call, which comes once.
func (v *Link) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if port == link.HelloPort {
		select {
		case c := <-v.hello:
			return v.own(c)
		case <-v.done:
			return nil, link.ErrClosed
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the guest's call: %w", context.Cause(ctx))
		}
	}
	c, err := mdlayher.DialContext(ctx, v.cid, port, nil)
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("dial port %d: %w", port, link.ErrRefused)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("dial port %d: %w", port, err)
	}
	return v.own(c)
}

func (v *Link) closed() bool {
	select {
	case <-v.done:
		return true
	default:
		return false
	}
}

// own makes c end with the link.
func (v *Link) own(c net.Conn) (net.Conn, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed() {
		c.Close()
		return nil, link.ErrClosed
	}
	v.conns[c] = struct{}{}
	return &ownedConn{Conn: c, v: v}, nil
}

type ownedConn struct {
	net.Conn
	v *Link
}

func (c *ownedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	return n, c.v.why(err)
}

func (c *ownedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	return n, c.v.why(err)
}

// why tells the end of the link and of the peer from other errors of a stream,
// in the words that every link has for them.
func (v *Link) why(err error) error {
	switch {
	case err == nil, err == io.EOF:
		return err
	case v.closed():
		return link.ErrClosed
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("%w: %w", io.ErrUnexpectedEOF, err)
	}
	return err
}

func (c *ownedConn) Close() error {
	c.v.mu.Lock()
	delete(c.v.conns, c.Conn)
	c.v.mu.Unlock()
	return c.Conn.Close()
}

// Close gives the address back and ends every stream.
func (v *Link) Close() error {
	v.once.Do(func() {
		v.mu.Lock()
		close(v.done)
		for c := range v.conns {
			c.Close()
		}
		v.mu.Unlock()
		v.listen.Close()
		v.wg.Wait()
		select {
		case c := <-v.hello:
			c.Close()
		default:
		}
		v.device.Close()
	})
	return nil
}
