package guest

import (
	"os"
	"sync"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// creditStep is how much credit is gathered before it is returned, unless the
// queue is empty: one frame for many.
const creditStep = 64 << 10

// input carries what the host sends to a command's input. One goroutine puts,
// and never waits for the command; another writes, and may. Between them stands
// a queue that the protocol's window bounds.
type input struct {
	w      *os.File
	tty    bool
	credit func(n int) error // tells the host

	mu      sync.Mutex // guards what follows
	queue   []byte
	pending int  // received, and no credit returned yet
	eof     bool // the host has said so
	stopped bool
	work    chan struct{} // holds a token while the writer has something to do
}

func newInput(w *os.File, tty bool, credit func(int) error) *input {
	return &input{w: w, tty: tty, credit: credit, work: make(chan struct{}, 1)}
}

// put queues what a FrameStdin brought. Empty means end of input.
func (in *input) put(p []byte) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	switch {
	case in.stopped:
		return nil
	case in.eof:
		return guestrpc.Errorf(guestrpc.CodeBadRequest, "input after its end")
	case in.pending+len(p) > guestrpc.StdinWindow:
		return guestrpc.Errorf(guestrpc.CodeBadRequest, "more input than the window of %d bytes", guestrpc.StdinWindow)
	}
	in.pending += len(p)
	in.queue = append(in.queue, p...)
	in.eof = len(p) == 0
	in.wake()
	return nil
}

func (in *input) wake() {
	select {
	case in.work <- struct{}{}:
	default:
	}
}

// stop ends the writer, wherever it waits: the command has ended.
func (in *input) stop() {
	in.mu.Lock()
	in.stopped = true
	in.mu.Unlock()
	in.wake()
	in.w.SetWriteDeadline(time.Unix(1, 0))
}

// write is the writer. It returns after stop, or when all input is written.
func (in *input) write() error {
	var chunk []byte
	broken := false // the command does not read any more
	last := byte('\n')
	for range in.work {
		var eof, stopped bool
		if chunk, eof, stopped = in.take(chunk); stopped {
			return nil
		}
		for rest := chunk; len(rest) > 0; {
			n := min(len(rest), creditStep)
			if !broken {
				// A command that has closed its input, or never reads it, is no
				// error. Credit goes on: the host must not wait for it.
				_, err := in.w.Write(rest[:n])
				broken = err != nil
			}
			last, rest = rest[n-1], rest[n:]
			if err := in.taken(n); err != nil {
				return err
			}
		}
		if eof {
			return in.end(last)
		}
	}
	return nil
}

// take takes the whole queue and leaves buf, empty, in its place.
func (in *input) take(buf []byte) (chunk []byte, eof, stopped bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	chunk, in.queue = in.queue, buf[:0]
	return chunk, in.eof, in.stopped
}

// taken returns credit for n bytes.
func (in *input) taken(n int) error {
	in.mu.Lock()
	if in.stopped {
		in.mu.Unlock()
		return nil
	}
	in.pending -= n // before the host can know
	in.mu.Unlock()
	return in.credit(n)
}

// end ends the command's input. A terminal has no end: the character for it
// only hands over a line that has been begun, so after one it takes two.
func (in *input) end(last byte) error {
	if !in.tty {
		return in.w.Close()
	}
	eof := []byte{endOfInput, endOfInput}
	if last == '\n' || last == '\r' || last == endOfInput {
		eof = eof[:1]
	}
	in.w.Write(eof)
	return nil
}
