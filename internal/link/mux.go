package link

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
)

// The mux's wire format. A frame is eight bytes of header, then the payload:
//
//	0      type
//	1..3   length of the payload, big endian
//	4..7   stream, big endian
//
// The side that opens a stream chooses its number: odd for the host, even for
// the guest, always rising. Types:
//
//	open    payload: the port, 4 bytes. Answered by opened or reset.
//	opened  the stream exists; data may flow.
//	data    at most maxData bytes, and never more than the credit given.
//	credit  payload: 4 bytes, how many more bytes may be sent.
//	close   the sender neither sends nor takes anything more. The stream is
//	        forgotten when both sides have said so.
//	reset   open is refused.
//
// Why not a library: the ones that exist write a header and its payload in two
// calls (two exits of the virtual machine each), answer a peer's pings with a
// goroutine each without bound, and hold a stream's lock while they wait for
// the rest of a frame, so that a peer which stops in the middle of one outlasts
// every deadline.
const (
	frameOpen = 1 + iota
	frameOpened
	frameData
	frameCredit
	frameClose
	frameReset

	headerSize = 8
	maxData    = 64 << 10

	// Window bounds what a peer may send on one stream before it is read, in
	// bytes.
	Window = 256 << 10

	sendBuffer  = 128 << 10 // written by a caller and not yet by the sender, per stream
	maxStreams  = 1024      // streams alive at once, both directions together
	maxResets   = 256       // refusals not yet sent: a peer that floods opens is cut off
	acceptQueue = 64        // streams accepted by a listener and not yet by its caller
)

// Side says which end of the link a Mux is.
type Side uint8

// Sides.
const (
	HostSide  Side = 1 // opens odd streams
	GuestSide Side = 2 // opens even streams
)

func (s Side) String() string {
	if s == HostSide {
		return "host"
	}
	return "guest"
}

// HelloPort is the port on which the guest waits for the host's first stream.
// The guest's end of every link takes streams to it from the beginning.
const HelloPort = 1

// Mux runs many streams over one. All its methods are safe for concurrent use.
//
// Two goroutines belong to it: one reads the transport and never writes, so two
// sides can never wait for each other; one writes, and sends what all streams
// have ready in one call. Both end before Close returns.
type Mux struct {
	conn io.ReadWriteCloser
	side Side
	done chan struct{}
	wg   sync.WaitGroup

	mu        sync.Mutex // guards everything below, and the fields of each muxConn that say so
	err       error      // why the mux ended; set once, before done is closed
	streams   map[uint32]*muxConn
	listeners map[uint32]*muxListener
	nextID    uint32 // the next stream that this side opens
	peerID    uint32 // the highest stream that the peer opened
	ready     []*muxConn
	resets    []uint32
	work      chan struct{} // holds a token while the sender has something to do
}

// NewMux starts a mux on conn and owns it from then on.
func NewMux(conn io.ReadWriteCloser, side Side) *Mux {
	m := &Mux{
		conn:      conn,
		side:      side,
		done:      make(chan struct{}),
		streams:   make(map[uint32]*muxConn),
		listeners: make(map[uint32]*muxListener),
		nextID:    uint32(side),
		work:      make(chan struct{}, 1),
	}
	if side == GuestSide {
		// The host dials this port before the guest can have called Listen.
		m.listeners[HelloPort] = m.newListener(HelloPort)
		m.listeners[HelloPort].reserved = true
	}
	m.wg.Go(func() { m.fail(m.receive()) })
	m.wg.Go(func() { m.fail(m.send()) })
	return m
}

var (
	_ Host  = (*Mux)(nil)
	_ Guest = (*Mux)(nil)
)

// Done is closed when the mux has ended, for whatever reason.
func (m *Mux) Done() <-chan struct{} { return m.done }

// Err says why the mux ended: nil while it has not, otherwise an error that
// wraps ErrClosed or ErrProtocol.
func (m *Mux) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Close ends the mux and every stream, and waits for its goroutines.
func (m *Mux) Close() error {
	m.fail(ErrClosed)
	m.wg.Wait()
	return nil
}

// fail ends the mux. The first reason stays.
func (m *Mux) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return
	}
	m.err = err
	close(m.done)
	m.conn.Close()
	for _, c := range m.streams {
		c.wake()
	}
	for _, l := range m.listeners {
		l.shut()
	}
}

// Dial opens a stream to a port of the peer.
func (m *Mux) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	m.mu.Lock()
	if m.err != nil {
		defer m.mu.Unlock()
		return nil, m.err
	}
	if len(m.streams) >= maxStreams {
		m.mu.Unlock()
		return nil, fmt.Errorf("dial port %d: %d streams are open already", port, maxStreams)
	}
	c := newMuxConn(m, m.nextID, port)
	m.nextID += 2
	m.streams[c.id] = c
	c.wantOpen = true
	m.enqueue(c)
	m.mu.Unlock()

	select {
	case <-c.opened:
		if c.refused {
			return nil, fmt.Errorf("dial port %d: %w", port, ErrRefused)
		}
		return c, nil
	case <-ctx.Done():
		c.Close()
		return nil, fmt.Errorf("dial port %d: %w", port, context.Cause(ctx))
	case <-m.done:
		return nil, m.Err()
	}
}

// Listen accepts streams to port. A port has one listener at a time.
func (m *Mux) Listen(port uint32) (net.Listener, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	l := m.listeners[port]
	switch {
	case l == nil:
		l = m.newListener(port)
		m.listeners[port] = l
	case l.reserved:
		l.reserved = false
	default:
		return nil, fmt.Errorf("listen on port %d: already in use", port)
	}
	return l, nil
}

func (m *Mux) newListener(port uint32) *muxListener {
	return &muxListener{m: m, port: port, queue: make(chan *muxConn, acceptQueue), closed: make(chan struct{})}
}

// enqueue tells the sender that c has something to send. m.mu is held.
func (m *Mux) enqueue(c *muxConn) {
	if !c.queued {
		c.queued = true
		m.ready = append(m.ready, c)
	}
	m.kick()
}

func (m *Mux) kick() {
	select {
	case m.work <- struct{}{}:
	default:
	}
}

// send is the only writer of the transport. It gathers what the streams have
// ready, each at most one data frame a turn, and writes it in one call.
func (m *Mux) send() error {
	var batch []byte
	for {
		select {
		case <-m.work:
		case <-m.done:
			return ErrClosed
		}
		for {
			if batch = m.gather(batch[:0]); len(batch) == 0 {
				break
			}
			if _, err := m.conn.Write(batch); err != nil {
				return fmt.Errorf("%w: write: %v", ErrClosed, err)
			}
		}
	}
}

func (m *Mux) gather(batch []byte) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range m.resets {
		batch = appendHeader(batch, frameReset, 0, id)
	}
	m.resets = m.resets[:0]
	for turns := len(m.ready); turns > 0 && len(batch) < maxData; turns-- {
		c := m.ready[0]
		m.ready = append(m.ready[:0], m.ready[1:]...)
		c.queued = false
		batch = c.appendFrames(batch)
		if c.sendable() {
			m.enqueue(c)
		}
	}
	if len(m.ready) > 0 {
		m.kick()
	}
	return batch
}

func appendHeader(b []byte, typ byte, n int, id uint32) []byte {
	b = append(b, typ, byte(n>>16), byte(n>>8), byte(n))
	return binary.BigEndian.AppendUint32(b, id)
}

// receive is the only reader of the transport.
func (m *Mux) receive() error {
	r := bufio.NewReaderSize(m.conn, maxData)
	var header [headerSize]byte
	payload := make([]byte, maxData)
	for {
		if _, err := io.ReadFull(r, header[:]); err != nil {
			return fmt.Errorf("%w: %v", ErrClosed, err)
		}
		typ := header[0]
		n := int(header[1])<<16 | int(header[2])<<8 | int(header[3])
		id := binary.BigEndian.Uint32(header[4:])
		if n > maxData || typ != frameData && n > 4 {
			return fmt.Errorf("%w: frame of type %d with %d bytes", ErrProtocol, typ, n)
		}
		// The whole frame is read before any lock is taken: a peer that stops
		// in the middle of one delays nobody but itself.
		if _, err := io.ReadFull(r, payload[:n]); err != nil {
			return fmt.Errorf("%w: %v", ErrClosed, err)
		}
		if err := m.handle(typ, id, payload[:n]); err != nil {
			return err
		}
	}
}

func (m *Mux) handle(typ byte, id uint32, payload []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.streams[id]
	switch typ {
	case frameOpen:
		return m.handleOpen(id, payload)
	case frameData:
		if c == nil {
			return fmt.Errorf("%w: data for stream %d, which is not open", ErrProtocol, id)
		}
		return c.handleData(payload)
	case frameCredit:
		if len(payload) != 4 {
			return fmt.Errorf("%w: credit of %d bytes", ErrProtocol, len(payload))
		}
		if c != nil {
			return c.handleCredit(binary.BigEndian.Uint32(payload))
		}
	case frameOpened, frameReset:
		if c != nil {
			return c.handleOpened(typ == frameReset)
		}
	case frameClose:
		if c != nil {
			c.handleClose()
		}
	default:
		return fmt.Errorf("%w: frame of type %d", ErrProtocol, typ)
	}
	return nil
}

// handleOpen accepts or refuses a stream that the peer opens. m.mu is held.
func (m *Mux) handleOpen(id uint32, payload []byte) error {
	peer := HostSide + GuestSide - m.side
	if len(payload) != 4 || id%2 != uint32(peer)%2 || id <= m.peerID {
		return fmt.Errorf("%w: open of stream %d", ErrProtocol, id)
	}
	m.peerID = id
	port := binary.BigEndian.Uint32(payload)
	l := m.listeners[port]
	if l == nil || len(m.streams) >= maxStreams || len(l.queue) == cap(l.queue) {
		if len(m.resets) >= maxResets {
			return fmt.Errorf("%w: flood of opens", ErrProtocol)
		}
		m.resets = append(m.resets, id)
		m.kick()
		return nil
	}
	c := newMuxConn(m, id, port)
	c.isOpen, c.wantOpened = true, true
	close(c.opened)
	m.streams[id] = c
	l.queue <- c // has room: only handleOpen adds, under m.mu
	m.enqueue(c)
	return nil
}

type muxListener struct {
	m        *Mux
	port     uint32
	reserved bool // nobody has called Listen yet; guarded by m.mu
	queue    chan *muxConn
	closed   chan struct{}
	once     sync.Once
}

var _ net.Listener = (*muxListener)(nil)

func (l *muxListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		if err := l.m.Err(); err != nil {
			return nil, err
		}
		return nil, net.ErrClosed
	}
}

func (l *muxListener) shut() { l.once.Do(func() { close(l.closed) }) }

// Close ends the listener and the streams that nobody has accepted.
func (l *muxListener) Close() error {
	l.m.mu.Lock()
	if l.m.listeners[l.port] == l {
		delete(l.m.listeners, l.port)
	}
	l.shut()
	l.m.mu.Unlock()
	for {
		select {
		case c := <-l.queue:
			c.Close()
		default:
			return nil
		}
	}
}

func (l *muxListener) Addr() net.Addr { return Addr{l.m.side.String(), l.port} }
