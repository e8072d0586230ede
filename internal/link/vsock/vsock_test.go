package vsock

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"

	mdlayher "github.com/mdlayher/vsock"
	"go.uber.org/goleak"
	"golang.org/x/net/nettest"
	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// needLoopback skips where CID 1 is not this machine talking to itself, and
// where there is another transport: a listener would be open to the outside.
func needLoopback(t *testing.T) {
	t.Helper()
	const remedy = ": sudo modprobe vsock_loopback, on a machine that is no vsock guest itself"
	if cid, err := mdlayher.ContextID(); err != nil {
		testenv.Skip(t, err.Error()+remedy)
	} else if cid != unix.VMADDR_CID_ANY && cid != unix.VMADDR_CID_LOCAL && cid != unix.VMADDR_CID_HOST {
		testenv.Skip(t, "this machine is a vsock guest"+remedy)
	}
	l, err := mdlayher.ListenContextID(unix.VMADDR_CID_LOCAL, unix.VMADDR_PORT_ANY, nil)
	if err != nil {
		testenv.Skip(t, err.Error()+remedy)
	}
	l.Close()
}

func needVhost(t *testing.T) {
	t.Helper()
	testenv.NeedDevice(t, Device, "sudo modprobe vhost_vsock, and write access to the device (group kvm)")
}

func listen(t *testing.T) *mdlayher.Listener {
	t.Helper()
	l, err := mdlayher.ListenContextID(unix.VMADDR_CID_LOCAL, unix.VMADDR_PORT_ANY, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// newLoopback is a Link whose guest has the address cid. On the loopback every
// caller has the address 1.
func newLoopback(t *testing.T, cid uint32) *Link {
	t.Helper()
	device, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	v := &Link{
		cid: cid, device: device, listen: listen(t),
		hello: make(chan net.Conn, 1), called: make(chan struct{}), done: make(chan struct{}), conns: make(map[net.Conn]struct{}),
	}
	v.wg.Go(v.accept)
	t.Cleanup(func() { v.Close() })
	return v
}

// What Dial gives is a net.Conn with all that belongs to one.
func TestConn(t *testing.T) {
	needLoopback(t)
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		v, l := newLoopback(t, unix.VMADDR_CID_LOCAL), listen(t)
		if c1, err = v.Dial(t.Context(), l.Addr().(*mdlayher.Addr).Port); err != nil {
			return nil, nil, nil, err
		}
		c2, err = l.Accept()
		return c1, c2, func() { v.Close(); c2.Close(); l.Close() }, err
	})
}

func call(t *testing.T, v *Link) net.Conn {
	t.Helper()
	c, err := mdlayher.Dial(unix.VMADDR_CID_LOCAL, v.listen.Addr().(*mdlayher.Addr).Port, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// The first call of our guest is the hello stream.
func TestHelloIsTheGuestsCall(t *testing.T) {
	needLoopback(t)
	v := newLoopback(t, unix.VMADDR_CID_LOCAL)
	guest := call(t, v)
	host, err := v.Dial(t.Context(), link.HelloPort)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := host.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := io.ReadFull(guest, b); err != nil || b[0] != 'x' {
		t.Errorf("the guest read %q, %v", b, err)
	}
}

// Whoever calls from another address is hung up on and is never the guest.
func TestStrangerIsNotTheGuest(t *testing.T) {
	needLoopback(t)
	v := newLoopback(t, 4711)
	stranger := call(t, v)
	if _, err := stranger.Read(make([]byte, 1)); err == nil {
		t.Error("a stranger was answered")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	cancel(enough)
	if c, err := v.Dial(ctx, link.HelloPort); err == nil {
		c.Close()
		t.Error("a stranger became the guest")
	} else if !errors.Is(err, enough) {
		t.Errorf("dial: %v", err)
	}
}

func TestRefused(t *testing.T) {
	needLoopback(t)
	v, l := newLoopback(t, unix.VMADDR_CID_LOCAL), listen(t)
	port := l.Addr().(*mdlayher.Addr).Port
	l.Close()
	if _, err := v.Dial(t.Context(), port); !errors.Is(err, link.ErrRefused) {
		t.Errorf("dial of a port on which nobody listens: %v", err)
	}
}

// Close, called often and at once, ends reads and waiting dials.
func TestCloseUnblocks(t *testing.T) {
	needLoopback(t)
	v, l := newLoopback(t, unix.VMADDR_CID_LOCAL), listen(t)
	c, err := v.Dial(t.Context(), l.Addr().(*mdlayher.Addr).Port)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("read from a closed link")
		}
	})
	wg.Go(func() {
		if _, err := v.Dial(context.Background(), link.HelloPort); !errors.Is(err, link.ErrClosed) {
			t.Errorf("dial of a closed link: %v", err)
		}
	})
	for range 3 {
		wg.Go(func() { v.Close() })
	}
	wg.Wait()
	if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Errorf("close of a stream whose link is closed: %v", err)
	}
}

// Two links have two addresses, none of the reserved ones, and give them back.
func TestListen(t *testing.T) {
	needVhost(t)
	a, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if a.CID() == b.CID() || a.CID() < 1<<10 || b.CID() < 1<<10 {
		t.Errorf("addresses %d and %d", a.CID(), b.CID())
	}
	a.Close()
	if _, err := a.Dial(t.Context(), link.HelloPort); !errors.Is(err, link.ErrClosed) {
		t.Errorf("dial after Close: %v", err)
	}
}

// What is no vhost device is said to be so, and not asked again and again.
func TestReserveOnAnotherDevice(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if cid, _, err := reserve(null); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("reserved %d, %v", cid, err)
	}
}

func TestListenWithoutDevice(t *testing.T) {
	if _, err := os.Stat(Device); err == nil {
		testenv.Skip(t, Device+" is there: sudo modprobe -r vhost_vsock")
	}
	if _, err := Listen(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Listen: %v", err)
	}
}

// waiting is a Link without sockets: only its own bookkeeping.
func waiting(t *testing.T) *Link {
	t.Helper()
	return &Link{hello: make(chan net.Conn, 1), called: make(chan struct{}), done: make(chan struct{}), conns: make(map[net.Conn]struct{})}
}

// The wait for a guest that never calls ends with its context, and says why.
func TestHelloCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	dialed := make(chan error)
	go func() {
		_, err := waiting(t).Dial(ctx, link.HelloPort)
		dialed <- err
	}()
	cancel(enough)
	if err := <-dialed; !errors.Is(err, enough) {
		t.Errorf("dial: %v", err)
	}
}

// A stream that is closed is forgotten; one that comes too late is closed.
func TestOwn(t *testing.T) {
	v := waiting(t)
	ours, theirs := net.Pipe()
	defer theirs.Close()
	c, err := v.own(ours)
	if err != nil || len(v.conns) != 1 {
		t.Fatalf("own: %v, %d streams", err, len(v.conns))
	}
	if err := c.Close(); err != nil || len(v.conns) != 0 {
		t.Errorf("close: %v, %d streams are left", err, len(v.conns))
	}
	close(v.done)
	late, other := net.Pipe()
	if _, err := v.own(late); !errors.Is(err, link.ErrClosed) {
		t.Errorf("own after Close: %v", err)
	}
	if _, err := other.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the late stream is open: %v", err)
	}
}

// failing is a socket that has just ended.
type failing struct {
	net.Conn
	err error
}

func (f failing) Read([]byte) (int, error)  { return 0, f.err }
func (f failing) Write([]byte) (int, error) { return 0, f.err }

// The end of a stream has the same words on every link: callers tell by them
// whether a machine has ended.
func TestStreamErrors(t *testing.T) {
	reset := &net.OpError{Op: "read", Err: unix.ECONNRESET}
	for name, tt := range map[string]struct {
		err    error
		closed bool
		want   error
	}{
		"end":                  {io.EOF, false, io.EOF},
		"reset":                {reset, false, io.ErrUnexpectedEOF},
		"pipe":                 {unix.EPIPE, false, io.ErrUnexpectedEOF},
		"deadline":             {os.ErrDeadlineExceeded, false, os.ErrDeadlineExceeded},
		"closed by its owner":  {net.ErrClosed, false, net.ErrClosed},
		"closed with the link": {net.ErrClosed, true, link.ErrClosed},
		"reset with the link":  {reset, true, link.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			v := waiting(t)
			c, err := v.own(failing{err: tt.err})
			if err != nil {
				t.Fatal(err)
			}
			if tt.closed {
				close(v.done)
			}
			if _, err := c.Read(nil); !errors.Is(err, tt.want) {
				t.Errorf("read: %v", err)
			}
			if _, err := c.Write(nil); !errors.Is(err, tt.want) {
				t.Errorf("write: %v", err)
			}
		})
	}
}
