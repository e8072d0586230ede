package link

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// muxConn is one stream of a Mux. All state is guarded by the mux's mutex: it is
// held for moments only, never over a read or write of the transport.
type muxConn struct {
	m    *Mux
	id   uint32
	port uint32

	opened  chan struct{} // closed when the peer has answered open
	refused bool          // set before opened is closed

	// Guarded by m.mu.
	isOpen     bool
	queued     bool // in m.ready
	wantOpen   bool // frames to be sent
	wantOpened bool
	wantClose  bool
	sentClose  bool
	closed     bool   // Close was called
	peerClosed bool   // the peer sent close
	in         []byte // received and not read
	inOff      int    // in[:inOff] has been read
	granted    int    // what the peer may still send
	owed       int    // read by the caller, not yet returned as credit
	out        []byte // written by the caller
	outOff     int    // out[:outOff] has been sent
	credit     int    // what may still be sent
	readable   chan struct{}
	writable   chan struct{}
	readDL     deadline
	writeDL    deadline
	writeMu    sync.Mutex // keeps one Write's bytes together
}

var _ net.Conn = (*muxConn)(nil)

func newMuxConn(m *Mux, id, port uint32) *muxConn {
	return &muxConn{
		m: m, id: id, port: port,
		opened:   make(chan struct{}),
		granted:  Window,
		credit:   Window,
		readable: make(chan struct{}, 1),
		writable: make(chan struct{}, 1),
		readDL:   makeDeadline(),
		writeDL:  makeDeadline(),
	}
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func (c *muxConn) wake() {
	signal(c.readable)
	signal(c.writable)
}

// sendable reports whether the sender has something to do for c. m.mu is held.
func (c *muxConn) sendable() bool {
	return c.wantOpen || c.wantOpened || c.isOpen && (c.owesCredit() || c.mayClose() ||
		c.unsent() > 0 && c.credit > 0 && !c.peerClosed)
}

func (c *muxConn) owesCredit() bool {
	return c.owed >= Window/2 && !c.closed && !c.peerClosed
}

func (c *muxConn) mayClose() bool {
	return c.wantClose && (c.unsent() == 0 || c.peerClosed)
}

// unsent is how much has been written and not yet sent.
func (c *muxConn) unsent() int {
	return len(c.out) - c.outOff
}

// appendFrames adds what c has to send, at most one frame of data. m.mu is held.
func (c *muxConn) appendFrames(b []byte) []byte {
	if c.wantOpen {
		c.wantOpen = false
		b = appendHeader(b, frameOpen, 4, c.id)
		b = binary.BigEndian.AppendUint32(b, c.port)
	}
	if c.wantOpened {
		c.wantOpened = false
		b = appendHeader(b, frameOpened, 0, c.id)
	}
	if !c.isOpen {
		return b
	}
	if c.owesCredit() {
		b = appendHeader(b, frameCredit, 4, c.id)
		b = binary.BigEndian.AppendUint32(b, uint32(c.owed))
		c.granted += c.owed
		c.owed = 0
	}
	if n := min(c.unsent(), c.credit, maxData); n > 0 && !c.peerClosed {
		b = appendHeader(b, frameData, n, c.id)
		b = append(b, c.out[c.outOff:c.outOff+n]...)
		c.outOff += n
		c.credit -= n
		signal(c.writable)
	}
	if c.mayClose() {
		c.wantClose, c.sentClose = false, true
		b = appendHeader(b, frameClose, 0, c.id)
		c.forget()
	}
	return b
}

// forget drops the stream when both sides are done with it. m.mu is held.
func (c *muxConn) forget() {
	if c.sentClose && c.peerClosed {
		delete(c.m.streams, c.id)
	}
}

func (c *muxConn) handleOpened(refused bool) error {
	if c.isOpen || c.wantOpen || c.refused || c.id%2 != uint32(c.m.side)%2 {
		return fmt.Errorf("%w: unexpected answer for stream %d", ErrProtocol, c.id)
	}
	if refused {
		c.refused = true
		delete(c.m.streams, c.id)
	} else {
		c.isOpen = true
		if c.sendable() { // closed by an impatient Dial
			c.m.enqueue(c)
		}
	}
	close(c.opened)
	return nil
}

func (c *muxConn) handleData(p []byte) error {
	if !c.isOpen || c.peerClosed || len(p) > c.granted {
		return fmt.Errorf("%w: %d bytes on stream %d, %d allowed", ErrProtocol, len(p), c.id, c.granted)
	}
	c.granted -= len(p)
	if c.closed {
		return nil // crossed our close
	}
	c.in, c.inOff = appendKeeping(c.in, c.inOff, p)
	signal(c.readable)
	return nil
}

// appendKeeping appends p to what is still wanted of buf, which is buf[off:]. It
// moves that to the front only where there is no room behind it.
func appendKeeping(buf []byte, off int, p []byte) ([]byte, int) {
	if off == len(buf) {
		buf, off = buf[:0], 0
	}
	if len(buf)+len(p) > cap(buf) && off > 0 {
		buf, off = buf[:copy(buf, buf[off:])], 0
	}
	return append(buf, p...), off
}

func (c *muxConn) handleCredit(n uint32) error {
	if n == 0 || int(n) > Window-c.credit {
		return fmt.Errorf("%w: credit of %d on stream %d, which has %d", ErrProtocol, n, c.id, c.credit)
	}
	c.credit += int(n)
	if c.sendable() {
		c.m.enqueue(c)
	}
	return nil
}

func (c *muxConn) handleClose() {
	c.peerClosed = true
	c.out, c.outOff = nil, 0
	c.wake()
	if c.sendable() {
		c.m.enqueue(c)
	}
	c.forget()
}

// Read reads what has arrived. After the peer's Close it gives what is left,
// then io.EOF; after the link's end an error that wraps ErrClosed.
func (c *muxConn) Read(p []byte) (int, error) {
	for {
		if n, err := c.tryRead(p); n > 0 || err != nil || len(p) == 0 {
			return n, err
		}
		select {
		case <-c.readable:
		case <-c.readDL.wait():
		}
	}
}

func (c *muxConn) tryRead(p []byte) (int, error) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	switch {
	case c.closed:
		signal(c.readable) // for another reader
		return 0, c.opError("read", net.ErrClosed)
	case c.readDL.passed():
		return 0, c.opError("read", os.ErrDeadlineExceeded)
	case c.inOff < len(c.in):
		n := copy(p, c.in[c.inOff:])
		c.inOff += n
		c.owed += n
		if c.sendable() {
			c.m.enqueue(c)
		}
		if c.inOff < len(c.in) {
			signal(c.readable) // for another reader
		}
		return n, nil
	case c.peerClosed:
		signal(c.readable)
		return 0, io.EOF
	case c.m.err != nil:
		signal(c.readable)
		return 0, c.opError("read", c.m.err)
	}
	return 0, nil
}

// Write hands p to the sender. It returns when all of p is on its way, the
// deadline passes or either side has closed. The bytes of one Write stay
// together.
func (c *muxConn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	done := 0
	for {
		n, err := c.tryWrite(p[done:])
		if done += n; err != nil || done == len(p) {
			return done, err
		}
		select {
		case <-c.writable:
		case <-c.writeDL.wait():
		}
	}
}

func (c *muxConn) tryWrite(p []byte) (int, error) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	switch {
	case c.closed:
		return 0, c.opError("write", net.ErrClosed)
	case c.writeDL.passed():
		return 0, c.opError("write", os.ErrDeadlineExceeded)
	case c.m.err != nil:
		return 0, c.opError("write", c.m.err)
	case c.peerClosed:
		return 0, c.opError("write", syscall.EPIPE)
	}
	n := min(len(p), sendBuffer-c.unsent())
	c.out, c.outOff = appendKeeping(c.out, c.outOff, p[:n])
	if c.sendable() {
		c.m.enqueue(c)
	}
	return n, nil
}

// Close ends both directions. What was written before is still sent.
func (c *muxConn) Close() error {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed, c.wantClose = true, true
	c.in = nil
	c.inOff = 0
	c.wake()
	if c.sendable() {
		c.m.enqueue(c)
	}
	return nil
}

func (c *muxConn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "ironclaw", Addr: c.RemoteAddr(), Err: err}
}

func (c *muxConn) LocalAddr() net.Addr { return Addr{c.m.side.String(), c.port} }

func (c *muxConn) RemoteAddr() net.Addr {
	return Addr{(HostSide + GuestSide - c.m.side).String(), c.port}
}

func (c *muxConn) SetDeadline(t time.Time) error {
	c.readDL.set(t)
	c.writeDL.set(t)
	return nil
}

func (c *muxConn) SetReadDeadline(t time.Time) error {
	c.readDL.set(t)
	return nil
}

func (c *muxConn) SetWriteDeadline(t time.Time) error {
	c.writeDL.set(t)
	return nil
}

// deadline is net.Pipe's: a channel that closes when the time has come.
type deadline struct {
	mu     *sync.Mutex
	timer  *time.Timer
	cancel chan struct{} // never nil
}

func makeDeadline() deadline {
	return deadline{mu: new(sync.Mutex), cancel: make(chan struct{})}
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.cancel // the timer has fired and is about to close it
	}
	d.timer = nil
	closed := isClosed(d.cancel)
	if t.IsZero() {
		if closed {
			d.cancel = make(chan struct{})
		}
		return
	}
	if wait := time.Until(t); wait > 0 {
		if closed {
			d.cancel = make(chan struct{})
		}
		d.timer = time.AfterFunc(wait, func() { close(d.cancel) })
		return
	}
	if !closed {
		close(d.cancel)
	}
}

func (d *deadline) wait() chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cancel
}

func (d *deadline) passed() bool { return isClosed(d.wait()) }

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
