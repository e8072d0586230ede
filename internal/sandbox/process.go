package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// Cmd is a command to run in a sandbox. It mirrors os/exec where it can.
type Cmd struct {
	Args    []string         // Args[0] is looked up in the guest's PATH
	Env     []string         // KEY=VALUE, over the guest's defaults
	Dir     string           // absolute; "" means the user's home
	User    string           // "" means guestrpc.DefaultUser
	Stdin   io.Reader        // nil means /dev/null
	Stdout  io.Writer        // nil means discard; with TTY all output comes here
	Stderr  io.Writer        // nil means discard
	TTY     *guestrpc.Resize // not nil: a terminal of this size
	KillAll bool             // when the command ends, end what it left running too
	Seccomp string           // profile of system calls; "" means the sandbox's
}

// Exit is how a command ended.
type Exit = guestrpc.Exit

// Process is a command that runs in a sandbox. Safe for concurrent use.
type Process struct {
	conn   net.Conn
	stream *guestrpc.Stream
	pid    int
	died   func(error) error // turns a broken stream into the machine's end

	window *window
	done   chan struct{} // closed when the stream has ended
	exit   Exit
	err    error // set before done is closed, like exit

	brokenPipe sync.Once
}

// start runs one exec operation on conn, which it owns. The command's own
// trouble (no such program) is a *guestrpc.Error.
func start(ctx context.Context, conn net.Conn, header *guestrpc.Header, cmd *Cmd, died func(error) error) (*Process, error) {
	p := &Process{
		conn:   conn,
		stream: guestrpc.NewStream(conn),
		died:   died,
		window: newWindow(guestrpc.StdinWindow),
		done:   make(chan struct{}),
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	frame, err := p.open(header)
	if !stop() {
		conn.Close()
		return nil, fmt.Errorf("start command: %w", context.Cause(ctx))
	}
	if err == nil && frame.Type == guestrpc.FrameError {
		err = remoteError(frame)
		p.ack()
		conn.Close()
		return nil, err
	}
	if err == nil && frame.Type != guestrpc.FrameStarted {
		err = fmt.Errorf("%w: frame %d in place of started", errGuestProtocol, frame.Type)
	}
	var started guestrpc.Started
	if err == nil {
		err = decode(frame, &started)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("start command: %w", died(err))
	}
	p.pid = started.PID
	go p.receive(orDiscard(cmd.Stdout), orDiscard(cmd.Stderr))
	if cmd.Stdin != nil {
		go p.sendInput(cmd.Stdin)
	}
	return p, nil
}

var errGuestProtocol = errors.New("the guest agent broke the protocol")

func (p *Process) open(header *guestrpc.Header) (guestrpc.Frame, error) {
	if err := p.stream.WriteHeader(header); err != nil {
		return guestrpc.Frame{}, err
	}
	return readFrame(p.stream)
}

func orDiscard(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}

// PID is the command's number inside the guest.
func (p *Process) PID() int { return p.pid }

// Wait waits for the command's end and all its output. ctx bounds the wait
// only. It does not wait for the reader that Cmd.Stdin is.
func (p *Process) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-p.done:
		return p.exit, p.err
	case <-ctx.Done():
		return Exit{}, context.Cause(ctx)
	}
}

// Done is closed when the command has ended and all its output has been written.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal to the command, or with group to all its process group;
// SIGKILL to the group ends every descendant. A command that has ended is no
// error.
func (p *Process) Signal(sig syscall.Signal, group bool) error {
	return p.control(guestrpc.FrameSignal, &guestrpc.Signal{Number: int(sig), Group: group})
}

// Resize changes the size of the command's terminal.
func (p *Process) Resize(size guestrpc.Resize) error {
	return p.control(guestrpc.FrameResize, &size)
}

func (p *Process) control(t guestrpc.Type, m guestrpc.Message) error {
	err := p.stream.WriteMessage(t, m)
	select {
	case <-p.done:
		return nil
	default:
		return err
	}
}

// Close hangs up: the guest ends the command. It does not wait for a writer of
// Cmd that is stuck; Done tells when all has ended. Idempotent.
func (p *Process) Close() error { return p.conn.Close() }

// receive is the stream's only reader, from the first frame after started to
// the last.
func (p *Process) receive(stdout, stderr io.Writer) {
	defer close(p.done)
	defer p.conn.Close()
	defer p.window.close()
	stdout, stderr = p.outlet(stdout), p.outlet(stderr)
	for {
		frame, err := readFrame(p.stream)
		if err != nil {
			p.err = p.died(err)
			return
		}
		switch frame.Type {
		case guestrpc.FrameStdout:
			_, err = stdout.Write(frame.Payload)
		case guestrpc.FrameStderr:
			_, err = stderr.Write(frame.Payload)
		case guestrpc.FrameWindow:
			var w guestrpc.Window
			if err = decode(frame, &w); err == nil {
				err = p.window.grant(w.Bytes)
			}
		case guestrpc.FrameExit:
			if p.err = p.decodeExit(frame); p.err == nil {
				p.ack()
			}
			return
		case guestrpc.FrameError:
			p.err = remoteError(frame)
			p.ack()
			return
		default:
			err = fmt.Errorf("%w: frame %d", errGuestProtocol, frame.Type)
		}
		if err != nil {
			p.err = err
			return
		}
	}
}

func (p *Process) decodeExit(frame guestrpc.Frame) error {
	if err := decode(frame, &p.exit); err != nil {
		return err
	}
	if e := p.exit; e.Code < 0 || e.Code > 255 || e.Signal < 0 || e.Signal > 127 {
		p.exit = Exit{}
		return fmt.Errorf("%w: exit code %d, signal %d", errGuestProtocol, e.Code, e.Signal)
	}
	return nil
}

// maxMessage is how much of a guest's words is worth showing, in bytes.
const maxMessage = 500

// remoteError is the error that the guest reports.
func remoteError(frame guestrpc.Frame) error {
	e := new(guestrpc.Error)
	if err := decode(frame, e); err != nil {
		return err
	}
	if len(e.Message) > maxMessage {
		e.Message = e.Message[:maxMessage] + "..."
	}
	e.Message = strings.ToValidUTF8(e.Message, "")
	if strings.TrimSpace(e.Message) == "" {
		e.Message = "the guest agent refused and did not say why"
	}
	return e
}

func readFrame(stream *guestrpc.Stream) (guestrpc.Frame, error) {
	frame, err := stream.ReadFrame()
	return frame, blameGuest(err)
}

func decode(frame guestrpc.Frame, m guestrpc.Message) error {
	return blameGuest(frame.Decode(m))
}

// blameGuest keeps what is wrong with the guest's bytes from looking like an
// answer of the guest, which is a *guestrpc.Error too.
func blameGuest(err error) error {
	if e, ok := errors.AsType[*guestrpc.Error](err); ok {
		return fmt.Errorf("%w: %s", errGuestProtocol, e.Message)
	}
	return err
}

// ack tells the guest that its last frame has arrived.
func (p *Process) ack() {
	p.conn.SetWriteDeadline(time.Now().Add(time.Second))
	_ = p.stream.WriteFrame(guestrpc.FrameAck, nil) // the guest may be gone already
}

// sendInput passes the reader on, never more than the guest has asked for.
func (p *Process) sendInput(r io.Reader) {
	buf := make([]byte, guestrpc.MaxFrame)
	for {
		n, err := r.Read(buf)
		for rest := buf[:n]; len(rest) > 0; {
			k := p.window.take(len(rest))
			if k == 0 || p.stream.WriteFrame(guestrpc.FrameStdin, rest[:k]) != nil {
				return // the command has ended
			}
			rest = rest[k:]
		}
		if err != nil {
			_ = p.stream.WriteFrame(guestrpc.FrameStdin, nil) // a read error ends the input too
			return
		}
	}
}

// outlet makes a writer behave as a pipe does: when its reader has gone, the
// command gets SIGPIPE and the rest of its output is dropped.
func (p *Process) outlet(w io.Writer) io.Writer { return &outlet{w: w, p: p} }

type outlet struct {
	w      io.Writer
	p      *Process
	broken bool
}

func (o *outlet) Write(b []byte) (int, error) {
	if o.broken {
		return len(b), nil
	}
	n, err := o.w.Write(b)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe) {
		o.broken = true
		// A guest that takes nothing must not keep its exit from being read.
		o.p.brokenPipe.Do(func() { go o.p.Signal(syscall.SIGPIPE, true) })
		return len(b), nil
	}
	if err != nil {
		return n, fmt.Errorf("write the command's output: %w", err)
	}
	return n, nil
}

// window counts what may be sent. It is a semaphore that a hostile guest cannot
// overfill.
type window struct {
	mu     sync.Mutex // guards free, closed
	cond   *sync.Cond
	max    int
	free   int
	closed bool
}

func newWindow(size int) *window {
	w := &window{max: size, free: size}
	w.cond = sync.NewCond(&w.mu)
	return w
}

// take waits for room and takes up to n of it; 0 means closed.
func (w *window) take(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.free == 0 && !w.closed {
		w.cond.Wait()
	}
	if w.closed {
		return 0
	}
	n = min(n, w.free)
	w.free -= n
	return n
}

func (w *window) grant(n int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n < 1 || n > w.max-w.free {
		return fmt.Errorf("%w: credit of %d bytes", errGuestProtocol, n)
	}
	w.free += n
	w.cond.Broadcast()
	return nil
}

func (w *window) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.cond.Broadcast()
}
