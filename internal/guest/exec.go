package guest

import (
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// execution is one command and the stream that belongs to it.
//
// Goroutines: this one waits for the process; one reads the host's frames, and
// waits for nothing else, so that a signal always gets through; one writes the
// input; one or two copy the output. All have ended when run returns.
type execution struct {
	conn   net.Conn
	st     *guestrpc.Stream
	req    *guestrpc.Exec
	proc   *process
	stdio  *stdio
	input  *input // nil without input
	copies []*output

	writers sync.WaitGroup // input and output
	reader  sync.WaitGroup

	mu    sync.Mutex // guards what follows
	err   error      // why the command was ended early: the first reason
	ended bool       // the process has ended; frames that cross that are ignored
}

// exec serves an exec stream.
func (a *Agent) exec(conn net.Conn, st *guestrpc.Stream, req *guestrpc.Exec) error {
	if err := req.Validate(); err != nil {
		return err
	}
	select {
	case a.execs <- struct{}{}:
		defer func() { <-a.execs }()
	default:
		return guestrpc.Errorf(guestrpc.CodeInternal, "%d commands run already", maxExecs)
	}
	p, s, err := a.launch(req)
	if err != nil {
		return err
	}
	defer s.Close()
	defer p.release()
	defer a.runs(p)()
	return newExecution(conn, st, req, p, s).run()
}

// launch starts what req asks for. The caller closes our ends of what it is
// connected to, and releases the process.
func (a *Agent) launch(req *guestrpc.Exec) (*process, *stdio, error) {
	id, err := a.users.resolve(req.User)
	if err != nil {
		return nil, nil, err
	}
	s, err := openStdio(req, id)
	if err != nil {
		return nil, nil, err
	}
	p, err := a.spawn(req, id, s)
	s.closeTheirs()
	if err != nil {
		s.Close()
		return nil, nil, err
	}
	return p, s, nil
}

func newExecution(conn net.Conn, st *guestrpc.Stream, req *guestrpc.Exec, p *process, s *stdio) *execution {
	x := &execution{conn: conn, st: st, req: req, proc: p, stdio: s}
	if s.in != nil {
		x.input = newInput(s.in, s.tty, func(n int) error {
			return st.WriteMessage(guestrpc.FrameWindow, &guestrpc.Window{Bytes: n})
		})
	}
	x.addOutput(s.out, guestrpc.FrameStdout)
	if s.err != nil {
		x.addOutput(s.err, guestrpc.FrameStderr)
	}
	return x
}

func (x *execution) addOutput(r *os.File, t guestrpc.Type) {
	x.copies = append(x.copies, &output{r: r, tty: x.stdio.tty, send: func(p []byte) error {
		return x.st.WriteFrame(t, p)
	}})
}

// run follows the process to its end and says how it was.
func (x *execution) run() error {
	x.spawn(&x.reader, x.readFrames)
	if err := x.st.WriteMessage(guestrpc.FrameStarted, &guestrpc.Started{PID: x.proc.pid}); err != nil {
		x.fail(err)
	}
	if x.input != nil {
		x.spawn(&x.writers, x.input.write)
	}
	for _, o := range x.copies {
		x.spawn(&x.writers, o.copy)
	}
	exit, err := x.proc.wait(x.req.KillAll)
	if err != nil {
		x.fail(err)
	}
	x.finish()
	if err := x.failure(); err != nil {
		x.proc.killAll()
		x.proc.gone()
		x.hangUp()
		return err
	}
	if x.req.KillAll {
		x.proc.gone()
	}
	if exit.Signal == int(unix.SIGKILL) { // as the kernel ends who is out of memory
		exit.OOM = x.proc.outOfMemory()
	}
	x.conn.SetReadDeadline(time.Now().Add(ackTimeout))
	err = x.st.WriteMessage(guestrpc.FrameExit, &exit)
	x.reader.Wait() // it ends at the host's answer
	return err
}

// finish ends input and output after the process. The last frames but one are
// sent when it returns.
func (x *execution) finish() {
	x.mu.Lock()
	x.ended = true
	x.mu.Unlock()
	if x.input != nil {
		x.input.stop()
	}
	for _, o := range x.copies {
		o.stop()
	}
	x.writers.Wait()
}

// hangUp ends the reader, so that another may read the host's answer.
func (x *execution) hangUp() {
	x.conn.SetReadDeadline(time.Unix(1, 0))
	x.reader.Wait()
}

// spawn runs f. Its error, or its panic, ends the command.
func (x *execution) spawn(wg *sync.WaitGroup, f func() error) {
	wg.Go(func() {
		if err := guarded(f); err != nil {
			x.fail(err)
		}
	})
}

// fail ends the command before its time: the host has gone, or breaks the
// protocol. Whoever still writes gets a deadline, for the host may have stopped
// reading.
func (x *execution) fail(err error) {
	x.mu.Lock()
	first := x.err == nil
	if first {
		x.err = err
	}
	x.mu.Unlock()
	if first {
		x.conn.SetWriteDeadline(time.Now().Add(ackTimeout))
		x.proc.killAll()
	}
}

func (x *execution) failure() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.err
}

func (x *execution) hasEnded() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.ended
}

// readFrames is the only reader of the stream. It ends when the host has
// acknowledged the end.
func (x *execution) readFrames() error {
	for {
		f, err := x.st.ReadFrame()
		ended := x.hasEnded()
		switch {
		case ended && (err != nil || f.Type == guestrpc.FrameAck):
			return nil
		case ended: // it crossed our last frame
		case err != nil:
			return streamError(err)
		default:
			if err := x.handle(f); err != nil {
				return err
			}
		}
	}
}

func (x *execution) handle(f guestrpc.Frame) error {
	switch f.Type {
	case guestrpc.FrameStdin:
		if x.input == nil {
			return guestrpc.Errorf(guestrpc.CodeBadRequest, "input for a command that was promised none")
		}
		return x.input.put(f.Payload)
	case guestrpc.FrameSignal:
		var s guestrpc.Signal
		if err := f.Decode(&s); err != nil {
			return err
		}
		if s.Number < 1 || s.Number > 64 {
			return guestrpc.Errorf(guestrpc.CodeBadRequest, "no signal %d", s.Number)
		}
		x.proc.signal(s)
		return nil
	case guestrpc.FrameResize:
		var size guestrpc.Resize
		if err := f.Decode(&size); err != nil {
			return err
		}
		if !x.stdio.tty {
			return guestrpc.Errorf(guestrpc.CodeBadRequest, "resize of a command without a terminal")
		}
		return x.stdio.resize(size)
	}
	return guestrpc.Errorf(guestrpc.CodeBadRequest, "frame of type %d in an exec", f.Type)
}
