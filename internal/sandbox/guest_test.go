package sandbox

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

func TestMain(m *testing.M) {
	jail.Init()
	goleak.VerifyTestMain(m)
}

var frameTypes = map[string]guestrpc.Type{
	"stdin": guestrpc.FrameStdin, "resize": guestrpc.FrameResize, "signal": guestrpc.FrameSignal,
	"ack": guestrpc.FrameAck, "data": guestrpc.FrameData, "hello": guestrpc.FrameHello,
	"started": guestrpc.FrameStarted, "stdout": guestrpc.FrameStdout, "stderr": guestrpc.FrameStderr,
	"window": guestrpc.FrameWindow, "exit": guestrpc.FrameExit, "error": guestrpc.FrameError,
	"unknown": 99,
}

// message is what frames of a type hold, or nil: bytes, or nothing. In tests it is
// written as JSON, which says more than the bytes on the wire.
func message(t guestrpc.Type) guestrpc.Message {
	switch t {
	case guestrpc.FrameResize:
		return new(guestrpc.Resize)
	case guestrpc.FrameSignal:
		return new(guestrpc.Signal)
	case guestrpc.FrameHello:
		return new(guestrpc.HelloReply)
	case guestrpc.FrameStarted:
		return new(guestrpc.Started)
	case guestrpc.FrameWindow:
		return new(guestrpc.Window)
	case guestrpc.FrameExit:
		return new(guestrpc.Exit)
	case guestrpc.FrameError:
		return new(guestrpc.Error)
	}
	return nil
}

func frameText(f guestrpc.Frame) string {
	payload := f.Payload
	if m := message(f.Type); m != nil && f.Decode(m) == nil {
		payload, _ = json.Marshal(m)
	}
	for name, t := range frameTypes {
		if t == f.Type {
			return strings.TrimSpace(name + " " + string(payload))
		}
	}
	return fmt.Sprintf("frame %d", f.Type)
}

// guestEnd is the guest's end of one stream, worked by a test.
type guestEnd struct {
	t    testing.TB
	conn net.Conn
	*guestrpc.Stream
}

// openStream returns both ends of a stream. It works in a synctest bubble.
func openStream(t testing.TB) (net.Conn, *guestEnd) {
	t.Helper()
	host, guest := net.Pipe()
	t.Cleanup(func() { guest.Close() })
	return host, &guestEnd{t, guest, guestrpc.NewStream(guest)}
}

// startProcess starts cmd and answers that it has started.
func startProcess(t testing.TB, cmd *Cmd) (*Process, *guestEnd) {
	t.Helper()
	host, g := openStream(t)
	go func() {
		if _, err := g.ReadHeader(); err != nil {
			t.Errorf("read header: %v", err)
		}
		g.send("started", `{"pid":7}`)
	}()
	p, err := start(t.Context(), host, execHeader(), cmd, as)
	if err != nil {
		t.Fatal(err)
	}
	return p, g
}

func execHeader() *guestrpc.Header {
	return &guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpExec, Exec: &guestrpc.Exec{Args: []string{"x"}}}
}

// as leaves the error of a stream as it is.
func as(err error) error { return err }

// send sends a frame, whose payload is JSON of its message, or else bytes; the host
// may have hung up.
func (g *guestEnd) send(name, payload string) {
	t := frameTypes[name]
	m := message(t)
	if m == nil || !strings.HasPrefix(payload, "{") {
		_ = g.WriteFrame(t, []byte(payload))
		return
	}
	if err := json.Unmarshal([]byte(payload), m); err != nil {
		g.t.Errorf("bad payload %q: %v", payload, err)
	}
	_ = g.WriteMessage(t, m)
}

// want reads the host's next frame.
func (g *guestEnd) want(text string) {
	g.t.Helper()
	f, err := g.ReadFrame()
	if err != nil {
		g.t.Errorf("the host sent no %q: %v", text, err)
	} else if got := frameText(f); got != text {
		g.t.Errorf("the host sent %q, want %q", got, text)
	}
}

// drain reads until the host hangs up.
func (g *guestEnd) drain() { _, _ = io.Copy(io.Discard, g.conn) }

// play does what the lines of a script say, and hangs up when the host has:
//
//	< TYPE PAYLOAD   the guest sends a frame
//	< raw HEX        the guest sends bytes; spaces do not count
//	< close          the guest hangs up
//	> TYPE PAYLOAD   the guest waits for a frame, which has to be this one
func (g *guestEnd) play(script string) {
	defer g.conn.Close()
	for line := range strings.Lines(script) {
		direction, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		name, payload, _ := strings.Cut(rest, " ")
		switch {
		case direction == ">":
			g.want(rest)
		case direction != "<":
		case name == "close":
			return
		case name == "raw":
			b, err := hex.DecodeString(strings.ReplaceAll(payload, " ", ""))
			if err != nil {
				g.t.Error(err)
			}
			_, _ = g.conn.Write(b)
		case frameTypes[name] == 0:
			g.t.Errorf("bad line %q", line)
		default:
			g.send(name, payload)
		}
	}
	g.drain()
}

// stubMachine is a machine of which only the streams are there.
type stubMachine struct {
	dial func(ctx context.Context, port uint32) (net.Conn, error)
	done chan struct{}
	err  error
}

func (m *stubMachine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	return m.dial(ctx, port)
}
func (m *stubMachine) Done() <-chan struct{}                   { return m.done }
func (m *stubMachine) Err() error                              { return m.err }
func (m *stubMachine) Close() error                            { return nil }
func (m *stubMachine) Info() vm.Info                           { return vm.Info{} }
func (m *stubMachine) Save(context.Context, vm.Snapshot) error { return vm.ErrNoSnapshots }

// oneStream is a machine whose first stream guest serves.
func oneStream(t testing.TB, guest func(*guestEnd)) *stubMachine {
	t.Helper()
	host, g := openStream(t)
	return &stubMachine{done: make(chan struct{}), dial: func(context.Context, uint32) (net.Conn, error) {
		go guest(g)
		return host, nil
	}}
}
