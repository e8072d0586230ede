// Package hostile is a guest agent that attacks the host's side of the link. It
// runs in the agent's place in machines that `ironclaw verify` makes for that.
//
// What it shall do the host says in what it would tell any agent: the host name in
// hello, "hostile-WHAT-...", and with WHAT "exec" the first word of each command.
// A scenario that the host stands is one after which it goes on as before: the call
// has ended with an error, or is ended by its deadline, and no memory, goroutine,
// descriptor or process remains.
//
// [MuxScenarios] break the mux of a serial link, [HelloScenarios] the first
// operation and [ExecScenarios] the start of a command, on either kind of link.
package hostile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
)

// Prefix begins the host name of a machine that is to attack.
const Prefix = "hostile-"

// Exec is the scenario in which hello is as it should be and commands are not.
const Exec = "exec"

// MuxScenarios lists the scenarios that only a serial link has.
func MuxScenarios() []string { return slices.Sorted(maps.Keys(muxScenarios())) }

// HelloScenarios lists those of the first operation.
func HelloScenarios() []string { return slices.Sorted(maps.Keys(helloScenarios())) }

// ExecScenarios lists those of a command.
func ExecScenarios() []string { return slices.Sorted(maps.Keys(execScenarios())) }

// scenario is WHAT of a host name.
func scenario(hostname string) string {
	what, _ := strings.CutPrefix(hostname, Prefix)
	if i := strings.LastIndexByte(what, '-'); i > 0 {
		what = what[:i]
	}
	return what
}

// The mux's frames (see package link, which keeps their numbers to itself).
const (
	frameOpen   = 1
	frameOpened = 2
	frameData   = 3
	frameCredit = 4
	frameClose  = 5
	frameReset  = 6
)

func muxFrame(typ byte, n int, stream uint32, payload []byte) []byte {
	b := []byte{typ, byte(n >> 16), byte(n >> 8), byte(n)}
	return append(binary.BigEndian.AppendUint32(b, stream), payload...)
}

// Serial attacks over a serial port.
func Serial(port io.ReadWriteCloser) error {
	var seen bytes.Buffer // what a real mux would have to see too
	stream, h, err := meet(port, &seen)
	if err != nil {
		return err
	}
	if attack := muxScenarios()[scenario(h.Hostname)]; attack != nil {
		return attack(port, stream)
	}
	// The port from its beginning, without the answer that was given.
	return Vsock(link.NewMux(&replay{ReadWriteCloser: port, in: &seen, skip: len(muxFrame(frameOpened, 0, 0, nil))}, link.GuestSide))
}

// meet answers the host's first open, and reads hello.
func meet(port io.ReadWriter, seen *bytes.Buffer) (stream uint32, hello *guestrpc.Hello, err error) {
	r := io.TeeReader(port, seen)
	var said bytes.Buffer
	for {
		var header [8]byte
		if _, err := io.ReadFull(r, header[:]); err != nil {
			return 0, nil, err
		}
		payload := make([]byte, int(header[1])<<16|int(header[2])<<8|int(header[3]))
		if _, err := io.ReadFull(r, payload); err != nil {
			return 0, nil, err
		}
		switch header[0] {
		case frameOpen:
			stream = binary.BigEndian.Uint32(header[4:])
			if _, err := port.Write(muxFrame(frameOpened, 0, stream, nil)); err != nil {
				return 0, nil, err
			}
		case frameData:
			said.Write(payload)
		}
		b := said.Bytes()
		if len(b) < 4 || len(b) < 4+int(binary.BigEndian.Uint32(b)) {
			continue
		}
		h, err := guestrpc.NewStream(&said).ReadHeader()
		if err != nil || h.Hello == nil {
			return 0, nil, fmt.Errorf("no hello: %v", err)
		}
		return stream, h.Hello, nil
	}
}

// replay is a port some of whose bytes have been read, and an answer to them given.
type replay struct {
	io.ReadWriteCloser
	in   *bytes.Buffer
	skip int // bytes that are not written
}

func (r *replay) Read(b []byte) (int, error) {
	if r.in.Len() > 0 {
		return r.in.Read(b)
	}
	return r.ReadWriteCloser.Read(b)
}

func (r *replay) Write(b []byte) (int, error) {
	skip := min(r.skip, len(b))
	r.skip -= skip
	n, err := r.ReadWriteCloser.Write(b[skip:])
	return n + skip, err
}

// Vsock attacks over a link that has streams already.
func Vsock(l link.Guest) error {
	hello, err := l.Listen(guestrpc.PortHello)
	if err != nil {
		return err
	}
	conn, err := hello.Accept()
	if err != nil {
		return err
	}
	st := guestrpc.NewStream(conn)
	h, err := st.ReadHeader()
	if err != nil || h.Hello == nil {
		return fmt.Errorf("no hello: %v", err)
	}
	what := scenario(h.Hello.Hostname)
	if attack := helloScenarios()[what]; attack != nil {
		attack(peer{conn, st, h.Hello.Nonce})
		return stay()
	}
	if what != Exec {
		return errors.New("no scenario " + what)
	}
	streams, err := l.Listen(guestrpc.PortAgent)
	if err != nil {
		return err
	}
	peer{conn, st, h.Hello.Nonce}.greet()
	for {
		conn, err := streams.Accept()
		if err != nil {
			return err
		}
		go serve(conn)
	}
}

// serve attacks one stream.
func serve(conn net.Conn) {
	defer conn.Close()
	st := guestrpc.NewStream(conn)
	h, err := st.ReadHeader()
	if err != nil || h.Exec == nil || len(h.Exec.Args) == 0 {
		return
	}
	if attack := execScenarios()[h.Exec.Args[0]]; attack != nil {
		attack(peer{conn, st, ""})
	}
}

// stay keeps the machine alive: that it ends would be one more thing that the host
// could notice.
func stay() error {
	time.Sleep(time.Hour)
	return errors.New("nobody ended this machine for an hour")
}

// peer is the host, and the stream it is on.
type peer struct {
	conn  net.Conn
	st    *guestrpc.Stream
	nonce string
}

// greet is a proper answer to hello.
func (p peer) greet() {
	if p.frame(guestrpc.FrameHello, &guestrpc.HelloReply{Version: guestrpc.Version, Nonce: p.nonce, Kernel: "hostile"}) == nil {
		_, _ = p.st.ReadFrame() // the acknowledgement
	}
	p.conn.Close()
}

func (p peer) frame(t guestrpc.Type, m guestrpc.Message) error { return p.st.WriteMessage(t, m) }

// raw writes a frame's prefix, with whatever length, and some bytes.
func (p peer) raw(t guestrpc.Type, length uint32, b []byte) error {
	msg := binary.BigEndian.AppendUint32([]byte{byte(t)}, length)
	_, err := p.conn.Write(append(msg, b...))
	return err
}

// forever does the same until the host has hung up.
func forever(do func() error) {
	for do() == nil {
	}
}

// slowly writes one byte at a time.
func slowly(w io.Writer, b []byte) {
	for i := range b {
		if _, err := w.Write(b[i : i+1]); err != nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
