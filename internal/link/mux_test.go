package link

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair returns two muxes joined by a connection of the kernel's, which buffers
// as a virtio-serial port does (net.Pipe does not).
func pair(t testing.TB) (host, guest *Mux) {
	t.Helper()
	a, b := socketPair(t)
	host, guest = NewMux(a, HostSide), NewMux(b, GuestSide)
	t.Cleanup(func() { host.Close(); guest.Close() })
	return host, guest
}

func socketPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err = net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

// stream opens one stream and returns both of its ends.
func stream(t testing.TB, host, guest *Mux) (net.Conn, net.Conn) {
	t.Helper()
	l, err := guest.Listen(7)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c1, err := host.Dial(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	c2, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c1, c2
}

func TestMuxConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		a, b := net.Pipe()
		host, guest := NewMux(a, HostSide), NewMux(b, GuestSide)
		c1, c2 = stream(t, host, guest)
		return c1, c2, func() { host.Close(); guest.Close() }, nil
	})
}

// Bytes of many streams at once arrive whole and in order, both ways.
func TestMuxManyStreams(t *testing.T) {
	host, guest := pair(t)
	l, err := guest.Listen(9)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 50 {
			c, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			wg.Go(func() {
				io.Copy(c, c)
				c.Close()
			})
		}
	})
	for i := range 50 {
		wg.Go(func() {
			c, err := host.Dial(context.Background(), 9)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			data := make([]byte, 700_000+i)
			rand.NewChaCha8([32]byte{byte(i)}).Read(data)
			want := sha256.Sum256(data)
			wg.Go(func() { c.Write(data) })
			got := sha256.New()
			if _, err := io.CopyN(got, c, int64(len(data))); err != nil {
				t.Errorf("stream %d: %v", i, err)
			}
			if !bytes.Equal(got.Sum(nil), want[:]) {
				t.Errorf("stream %d came back changed", i)
			}
		})
	}
	wg.Wait()
	// The last close of the peer may still be on its way.
	waitFor(t, func() bool { host.mu.Lock(); defer host.mu.Unlock(); return len(host.streams) == 0 })
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("condition not reached")
		}
	}
}

// A stream whose reader has stopped delays no other, and its writer's deadline
// holds.
func TestMuxSlowReader(t *testing.T) {
	host, guest := pair(t)
	slow, _ := stream(t, host, guest)
	slow.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	n, err := slow.Write(make([]byte, 10*Window))
	var ne net.Error
	if !errors.As(err, &ne) || !ne.Timeout() {
		t.Fatalf("write of %d bytes to a stream nobody reads: %v", n, err)
	}
	if n > Window+sendBuffer {
		t.Errorf("%d bytes taken for a stream nobody reads", n)
	}
	a, b := stream(t, host, guest)
	go a.Write([]byte("hello"))
	buf := make([]byte, 5)
	if _, err := io.ReadFull(b, buf); err != nil || string(buf) != "hello" {
		t.Fatalf("%q, %v", buf, err)
	}
}

// What was written before Close arrives.
func TestMuxCloseFlushes(t *testing.T) {
	host, guest := pair(t)
	a, b := stream(t, host, guest)
	data := bytes.Repeat([]byte("0123456789"), 30_000)
	go func() {
		a.Write(data)
		a.Close()
	}()
	got, err := io.ReadAll(b)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(data), err)
	}
	b.Close()
}

func TestMuxRefused(t *testing.T) {
	host, _ := pair(t)
	if _, err := host.Dial(t.Context(), 4711); !errors.Is(err, ErrRefused) {
		t.Fatalf("dial of a port without a listener: %v", err)
	}
}

// Dial ends with its context although the guest never answers.
func TestMuxDialCancelled(t *testing.T) {
	a, b := socketPair(t)
	defer b.Close()
	host := NewMux(a, HostSide)
	defer host.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := host.Dial(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

// A machine that dies ends every call, after what had arrived has been read.
func TestMuxPeerDies(t *testing.T) {
	a, b := socketPair(t)
	host, guest := NewMux(a, HostSide), NewMux(b, GuestSide)
	defer host.Close()
	c1, c2 := stream(t, host, guest)
	c2.Write([]byte("last words"))
	buf := make([]byte, 10)
	if _, err := io.ReadFull(c1, buf[:1]); err != nil {
		t.Fatal(err)
	}
	guest.Close()
	if _, err := io.ReadFull(c1, buf[1:]); err != nil || string(buf) != "last words" {
		t.Fatalf("%q, %v", buf, err)
	}
	if _, err := c1.Read(buf); !errors.Is(err, ErrClosed) {
		t.Fatalf("read after the peer died: %v", err)
	}
	if _, err := c1.Write(buf); !errors.Is(err, ErrClosed) {
		t.Fatalf("write after the peer died: %v", err)
	}
	if _, err := host.Dial(t.Context(), 1); !errors.Is(err, ErrClosed) {
		t.Fatalf("dial after the peer died: %v", err)
	}
}

func TestMuxCloseTwice(t *testing.T) {
	host, guest := pair(t)
	c, _ := stream(t, host, guest)
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	}
}

// The rules a hostile guest may break, each of which must end the link.
func TestMuxHostileGuest(t *testing.T) {
	frame := func(typ byte, id uint32, payload ...byte) []byte {
		return append(appendHeader(nil, typ, len(payload), id), payload...)
	}
	u32 := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	opened := frame(frameOpened, 1)
	var flood []byte
	for i := range uint32(100_000) {
		flood = append(flood, frame(frameOpen, 2*i+2, u32(5)...)...)
	}
	over := append([]byte(nil), opened...)
	for range Window/maxData + 1 {
		over = append(over, frame(frameData, 1, make([]byte, maxData)...)...)
	}
	tests := map[string][]byte{
		"unknown type":             frame(99, 1),
		"huge frame":               {frameData, 0xff, 0xff, 0xff, 0, 0, 0, 1},
		"long control frame":       frame(frameCredit, 1, 1, 2, 3, 4, 5),
		"data on no stream":        frame(frameData, 77, 1),
		"data before opened":       frame(frameData, 1, 1),
		"data over the window":     over,
		"credit from nowhere":      append(append([]byte(nil), opened...), frame(frameCredit, 1, u32(1)...)...),
		"credit of nothing":        append(append([]byte(nil), opened...), frame(frameCredit, 1, u32(0)...)...),
		"credit overflow":          append(append([]byte(nil), opened...), frame(frameCredit, 1, u32(1<<31)...)...),
		"short credit":             append(append([]byte(nil), opened...), frame(frameCredit, 1, 1)...),
		"opened twice":             append(append([]byte(nil), opened...), opened...),
		"reset after opened":       append(append([]byte(nil), opened...), frame(frameReset, 1)...),
		"open of the host's id":    frame(frameOpen, 3, u32(5)...),
		"open of an old id":        append(frame(frameOpen, 4, u32(5)...), frame(frameOpen, 4, u32(5)...)...),
		"open without a port":      frame(frameOpen, 2),
		"flood of opens, no reads": flood,
		"data after close":         append(append(append([]byte(nil), opened...), frame(frameClose, 1)...), frame(frameData, 1, 1)...),
	}
	for name, bytes := range tests {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			host := NewMux(a, HostSide)
			defer host.Close()
			defer b.Close()
			dialed := make(chan struct{})
			go func() {
				defer close(dialed)
				if c, err := host.Dial(context.Background(), 1); err == nil {
					io.Copy(io.Discard, io.LimitReader(c, 1))
				}
			}()
			io.ReadFull(b, make([]byte, headerSize+4)) // the host's open
			go b.Write(bytes)
			<-host.Done()
			if err := host.Err(); !errors.Is(err, ErrProtocol) {
				t.Errorf("link ended with %v", err)
			}
			<-dialed
		})
	}
}

// Whatever bytes a guest sends, the host neither panics nor hangs nor keeps
// more than the window.
func FuzzMuxReceive(f *testing.F) {
	f.Add([]byte{frameOpened, 0, 0, 0, 0, 0, 0, 1, frameData, 0, 0, 2, 0, 0, 0, 1, 'h', 'i'})
	f.Add([]byte{frameOpened, 0, 0, 0, 0, 0, 0, 1, frameClose, 0, 0, 0, 0, 0, 0, 1})
	f.Add([]byte{frameOpen, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 9})
	f.Fuzz(func(t *testing.T, data []byte) {
		a, b := net.Pipe()
		host := NewMux(a, HostSide)
		var wg sync.WaitGroup
		wg.Go(func() {
			if c, err := host.Dial(context.Background(), 1); err == nil {
				c.Write([]byte("x"))
				io.Copy(io.Discard, c)
				c.Close()
			}
		})
		wg.Go(func() { io.Copy(io.Discard, b) })
		b.Write(data)
		host.mu.Lock()
		for _, c := range host.streams {
			if len(c.in) > 2*Window {
				t.Errorf("%d bytes held", len(c.in))
			}
		}
		host.mu.Unlock()
		b.Close()
		host.Close()
		wg.Wait()
	})
}
