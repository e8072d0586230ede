package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testSecret = bytes.Repeat([]byte{7}, secretSize)

// host is the other side of an agent that runs in the test's own process, on
// the machine of the test: as its user, without cgroups.
type host struct {
	t      testing.TB
	mux    *link.Mux
	served chan error // what Serve has returned
	setUps int
}

// newHost starts an agent to which nobody has said hello.
func newHost(t testing.TB) *host {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, mux: link.NewMux(ours, link.HostSide), served: make(chan error, 1)}
	a := testAgent(t, func(*guestrpc.Hello, func() (time.Time, error)) error { h.setUps++; return nil })
	go func() { h.served <- a.Serve(link.NewMux(theirs, link.GuestSide)) }()
	t.Cleanup(func() {
		h.mux.Close()
		select {
		case <-h.served:
		case <-time.After(20 * time.Second):
			t.Error("the agent did not end with its link")
		}
	})
	return h
}

func testAgent(t testing.TB, setUp setUpFunc) *Agent {
	t.Helper()
	dir := t.TempDir()
	uid, gid := strconv.Itoa(os.Getuid()), strconv.Itoa(os.Getgid())
	passwd := "broken\nagent:x:" + uid + ":" + gid + "::" + dir + ":/bin/sh\n"
	for name, text := range map[string]string{"passwd": passwd, "group": "agents:x:4711:agent\n"} {
		if err := os.WriteFile(dir+"/"+name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	a := newAgent(setUp, nil)
	a.users = userFiles{dir + "/passwd", dir + "/group"}
	return a
}

// startAgent starts an agent and says hello.
func startAgent(t testing.TB) *host {
	t.Helper()
	h := newHost(t)
	st := h.open(guestrpc.PortHello, helloHeader())
	var reply guestrpc.HelloReply
	decode(t, st.next(), guestrpc.FrameHello, &reply)
	if reply.Nonce != "nonce" || reply.Version != guestrpc.Version || reply.Kernel == "" {
		t.Fatalf("reply %+v", reply)
	}
	st.ack()
	return h
}

func helloHeader() *guestrpc.Header {
	return &guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpHello, Hello: &guestrpc.Hello{
		Secret: testSecret, Entropy: make([]byte, 32), Hostname: "test", Nonce: "nonce",
	}}
}

// stream is one operation as the host sees it.
type stream struct {
	t    testing.TB
	conn net.Conn
	*guestrpc.Stream
}

func (h *host) dial(port uint32) net.Conn {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 10*time.Second)
	defer cancel()
	for {
		conn, err := h.mux.Dial(ctx, port)
		if errors.Is(err, link.ErrRefused) && ctx.Err() == nil && port == guestrpc.PortHello {
			time.Sleep(time.Millisecond) // the agent does not listen yet
			continue
		}
		if err != nil {
			h.t.Fatal(err)
		}
		h.t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(60 * time.Second))
		return conn
	}
}

func (h *host) open(port uint32, header *guestrpc.Header) *stream {
	h.t.Helper()
	conn := h.dial(port)
	s := &stream{h.t, conn, guestrpc.NewStream(conn)}
	if err := s.WriteHeader(header); err != nil {
		h.t.Fatal(err)
	}
	return s
}

func (s *stream) next() guestrpc.Frame {
	s.t.Helper()
	f, err := s.ReadFrame()
	if err != nil {
		s.t.Fatalf("read frame: %v", err)
	}
	return f
}

func (s *stream) ack() {
	s.t.Helper()
	if err := s.WriteFrame(guestrpc.FrameAck, nil); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.ReadFrame(); !errors.Is(err, io.EOF) && !errors.Is(err, link.ErrClosed) {
		s.t.Fatalf("after the acknowledgement: %v", err)
	}
}

func decode(t testing.TB, f guestrpc.Frame, want guestrpc.Type, m guestrpc.Message) {
	t.Helper()
	if f.Type != want {
		t.Fatalf("frame of type %d (%s), want %d", f.Type, f.Payload, want)
	}
	if err := f.Decode(m); err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, s *stream, want error) {
	t.Helper()
	e := new(guestrpc.Error)
	decode(t, s.next(), guestrpc.FrameError, e)
	if !errors.Is(e, want) {
		t.Fatalf("error %q (%s), want %v", e.Message, e.Code, want)
	}
	s.ack()
}

func TestHelloOnce(t *testing.T) {
	h := startAgent(t)
	wantError(t, h.open(guestrpc.PortHello, helloHeader()), guestrpc.ErrDenied)
	if h.setUps != 1 {
		t.Errorf("set up %d times", h.setUps)
	}
}

func TestNothingBeforeHello(t *testing.T) {
	h := newHost(t)
	conn := h.dial(guestrpc.PortHello) // the agent listens by now
	defer conn.Close()
	if _, err := h.mux.Dial(t.Context(), guestrpc.PortAgent); !errors.Is(err, link.ErrRefused) {
		t.Fatalf("dial before hello: %v", err)
	}
}

// A machine whose hello goes wrong must end, not wait for another.
func TestBadHelloEndsTheAgent(t *testing.T) {
	for name, change := range map[string]func(*guestrpc.Header){
		"version":  func(h *guestrpc.Header) { h.Version++ },
		"op":       func(h *guestrpc.Header) { h.Op = guestrpc.OpExec },
		"nothing":  func(h *guestrpc.Header) { h.Hello = nil },
		"secret":   func(h *guestrpc.Header) { h.Hello.Secret = nil },
		"entropy":  func(h *guestrpc.Header) { h.Hello.Entropy = []byte("x") },
		"hostname": func(h *guestrpc.Header) { h.Hello.Hostname = "a b" },
		"limit":    func(h *guestrpc.Header) { h.Hello.Pids = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			header := helloHeader()
			change(header)
			wantError(t, h.open(guestrpc.PortHello, header), guestrpc.ErrBadRequest)
			err := <-h.served
			if !errors.Is(err, guestrpc.ErrBadRequest) {
				t.Errorf("Serve: %v", err)
			}
			h.served <- err
			if h.setUps != 0 {
				t.Error("it was set up")
			}
		})
	}
}

func TestSecret(t *testing.T) {
	h := startAgent(t)
	for _, secret := range [][]byte{nil, {}, testSecret[:31], append([]byte{1}, testSecret[1:]...), append(testSecret[:32:32], 7)} {
		wantError(t, h.open(guestrpc.PortAgent, &guestrpc.Header{
			Version: guestrpc.Version, Op: guestrpc.OpPing, Secret: secret,
		}), guestrpc.ErrDenied)
	}
}

func TestPing(t *testing.T) {
	h := startAgent(t)
	s := h.open(guestrpc.PortAgent, &guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpPing, Secret: testSecret})
	for _, p := range []string{"one", strings.Repeat("x", guestrpc.MaxFrame)} {
		if err := s.WriteFrame(guestrpc.FrameData, []byte(p)); err != nil {
			t.Fatal(err)
		}
		if f := s.next(); f.Type != guestrpc.FrameData || string(f.Payload) != p {
			t.Fatalf("frame of type %d with %d bytes", f.Type, len(f.Payload))
		}
	}
	if err := s.WriteFrame(guestrpc.FrameData, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ReadFrame(); err != io.EOF {
		t.Fatalf("after the end: %v", err)
	}
}

func TestUnknownOperation(t *testing.T) {
	h := startAgent(t)
	for _, op := range []guestrpc.Op{"", "reboot", guestrpc.OpHello, guestrpc.OpExec} {
		wantError(t, h.open(guestrpc.PortAgent, &guestrpc.Header{
			Version: guestrpc.Version, Op: op, Secret: testSecret,
		}), guestrpc.ErrBadRequest)
	}
}

func TestGarbageHeader(t *testing.T) {
	h := startAgent(t)
	for name, b := range map[string][]byte{
		"huge":      binary.BigEndian.AppendUint32(nil, 0xffffffff),
		"over":      binary.BigEndian.AppendUint32(nil, guestrpc.MaxHeader+1),
		"empty":     binary.BigEndian.AppendUint32(nil, 0),
		"cut short": append(binary.BigEndian.AppendUint32(nil, 3), "abc"...),
	} {
		t.Run(name, func(t *testing.T) {
			conn := h.dial(guestrpc.PortAgent)
			if _, err := conn.Write(b); err != nil {
				t.Fatal(err)
			}
			wantError(t, &stream{t, conn, guestrpc.NewStream(conn)}, guestrpc.ErrBadRequest)
		})
	}
}

// A panic of one stream is told to its host and ends nothing else.
func TestPanic(t *testing.T) {
	ours, theirs := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		serveStream(theirs, func(net.Conn, *guestrpc.Stream) error { panic("boom") })
	})
	s := &stream{t, ours, guestrpc.NewStream(ours)}
	wantError(t, s, guestrpc.ErrInternal)
	ours.Close()
	wg.Wait()
}

func TestLinkEnds(t *testing.T) {
	h := startAgent(t)
	s := h.exec(&guestrpc.Exec{Args: []string{"sleep", "1000"}})
	pid := s.started()
	h.mux.Close()
	err := <-h.served
	if err == nil {
		t.Error("Serve returned nil")
	}
	h.served <- err
	if alive(pid) {
		t.Error("the command outlived its host")
	}
}

// FuzzServe sends bytes of a stranger, and of a host that has the secret and
// loses its mind after the header.
func FuzzServe(f *testing.F) {
	frame := func(typ guestrpc.Type, n uint32, p string) []byte {
		return append(binary.BigEndian.AppendUint32([]byte{byte(typ)}, n), p...)
	}
	f.Add(false, []byte("\x00\x00\x00\x02ab"))
	f.Add(false, []byte("\xff\xff\xff\xff"))
	f.Add(false, []byte("\x00\x00\x00\x16\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x04ping\x00\x00\x00\x00\x00\x00"))
	f.Add(true, frame(guestrpc.FrameStdin, 3, "abc"))
	f.Add(true, append(frame(guestrpc.FrameStdin, 3, "abc"), frame(guestrpc.FrameStdin, 0, "")...))
	f.Add(true, frame(guestrpc.FrameSignal, 9, "\x00\x00\x00\x00\x00\x00\x00\x09\x00"))
	f.Add(true, frame(guestrpc.FrameSignal, 9, "\xff\xff\xff\xff\xff\xff\xff\xf7\x00"))
	f.Add(true, frame(guestrpc.FrameResize, 4, "\x00\x07\x00\x09"))
	f.Add(true, frame(guestrpc.FrameResize, 2, "{}"))
	f.Add(true, frame(guestrpc.FrameStdin, 1<<31, "x"))
	f.Add(true, frame(99, 0, ""))
	f.Fuzz(func(t *testing.T, known bool, data []byte) {
		a := testAgent(t, nil)
		a.secret = testSecret // a stranger's bytes do not have it: they start nothing
		ours, theirs := net.Pipe()
		ours.SetDeadline(time.Now().Add(20 * time.Second))
		var wg sync.WaitGroup
		defer wg.Wait()
		defer ours.Close()
		wg.Go(func() { serveStream(theirs, a.serve) })
		st := guestrpc.NewStream(ours)
		wg.Go(func() {
			if known {
				if st.WriteHeader(&guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpExec, Secret: testSecret,
					Exec: &guestrpc.Exec{Args: []string{"cat"}, Stdin: true, KillAll: true}}) != nil {
					return
				}
			} else if bytes.Contains(data, testSecret) {
				return
			}
			defer ours.Close()
			ours.Write(data)
			if known {
				st.WriteFrame(guestrpc.FrameStdin, nil)
				st.WriteMessage(guestrpc.FrameSignal, &guestrpc.Signal{Number: 9})
				time.Sleep(5 * time.Millisecond) // time for an answer
			}
		})
		for {
			fr, err := st.ReadFrame()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("it hangs")
			}
			if err != nil {
				return
			}
			if fr.Type == guestrpc.FrameError && bytes.Contains(fr.Payload, []byte("panicked")) {
				t.Fatalf("%s", fr.Payload)
			}
			if fr.Type == guestrpc.FrameError || fr.Type == guestrpc.FrameExit {
				return
			}
		}
	})
}
