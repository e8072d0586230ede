package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxQMP bounds one message of QEMU's. A guest that has taken over its QEMU
// speaks here too.
const maxQMP = 1 << 20

// errQMPClosed is returned once QEMU has closed its monitor: it has ended.
var errQMPClosed = errors.New("QEMU closed its monitor")

// qmp speaks the QEMU Machine Protocol (docs/interop/qmp-spec): JSON, a message
// a line. One goroutine reads, for the connection's whole life.
type qmp struct {
	conn  *net.UnixConn
	ready chan struct{} // closed by the greeting
	done  chan struct{} // closed when the reader has ended

	portOpen event // the guest agent has opened the virtio-serial port
	migrated event // the machine's state has been written, or could not be

	mu       sync.Mutex // guards the fields below, and writes
	waiting  []*qmpCall // sent and not yet answered, in that order
	shutdown string     // reason in the last SHUTDOWN event
}

type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *qmpError       `json:"error"`
	Event    string          `json:"event"`
	Data     struct {
		Guest  bool   `json:"guest"`
		Reason string `json:"reason"`
		Status string `json:"status"` // of MIGRATION
		Open   bool   `json:"open"`   // of VSERPORT_CHANGE
	} `json:"data"`
}

// event happens once.
type event struct {
	once sync.Once
	c    chan struct{}
	err  error // set before c is closed
}

func (e *event) happen(err error) {
	e.once.Do(func() {
		e.err = err
		close(e.c)
	})
}

type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

func newQMP(conn *net.UnixConn) *qmp {
	q := &qmp{
		conn:  conn,
		ready: make(chan struct{}),
		done:  make(chan struct{}),
	}
	for _, e := range []*event{&q.portOpen, &q.migrated} {
		e.c = make(chan struct{})
	}
	go q.read()
	return q
}

func (q *qmp) read() {
	defer close(q.done)
	defer q.conn.Close()
	greeted := false
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(nil, maxQMP)
	for lines.Scan() {
		var m qmpMessage
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			return // not QEMU any more
		}
		if m.Greeting != nil && !greeted {
			greeted = true
			close(q.ready)
		}
		q.note(&m)
		q.mu.Lock()
		if (m.Return != nil || m.Error != nil) && len(q.waiting) > 0 {
			q.waiting[0].reply <- m // has room
			q.waiting = q.waiting[1:]
		}
		q.mu.Unlock()
	}
}

// note takes notice of events.
func (q *qmp) note(m *qmpMessage) {
	switch m.Event {
	case "SHUTDOWN":
		q.mu.Lock()
		q.shutdown = m.Data.Reason
		q.mu.Unlock()
	case "VSERPORT_CHANGE":
		if m.Data.Open {
			q.portOpen.happen(nil)
		}
	case "MIGRATION":
		switch m.Data.Status {
		case "failed":
			q.migrated.happen(errors.New("QEMU could not write or read the machine's state"))
		case "completed":
			q.migrated.happen(nil)
		}
	}
}

// wait waits for an event.
func (q *qmp) wait(ctx context.Context, e *event) error {
	select {
	case <-e.c:
		return e.err
	case <-q.done:
		return errQMPClosed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// do executes one command. cancel ends the wait for the answer.
func (q *qmp) do(cancel <-chan struct{}, command string, args any) (json.RawMessage, error) {
	call, err := q.send(command, args, nil)
	if err != nil {
		return nil, err
	}
	return q.answer(cancel, call)
}

// qmpCommand is a command to be sent.
type qmpCommand struct {
	name string
	args any
}

// qmpCall is a command that was sent.
type qmpCall struct {
	command string
	reply   chan qmpMessage
}

// giveFile gives QEMU a descriptor, by which later commands may name it.
func (q *qmp) giveFile(cancel <-chan struct{}, name string, f *os.File) error {
	call, err := q.send("getfd", map[string]string{"fdname": name}, unix.UnixRights(int(f.Fd())))
	if err != nil {
		return err
	}
	_, err = q.answer(cancel, call)
	return err
}

// send sends a command, which QEMU executes and answers after those sent before,
// with control data of the socket if there is any. It is as short as can be: QEMU
// reads its monitor byte by byte, each with several system calls.
func (q *qmp) send(command string, args any, control []byte) (*qmpCall, error) {
	call := &qmpCall{command, make(chan qmpMessage, 1)}
	q.mu.Lock()
	defer q.mu.Unlock()
	msg, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err == nil {
		q.waiting = append(q.waiting, call)
		q.conn.SetWriteDeadline(time.Now().Add(10 * time.Second)) // QEMU reads at once or is stuck
		_, _, err = q.conn.WriteMsgUnix(append(msg, '\n'), control, nil)
	}
	if errors.Is(err, unix.EPIPE) || errors.Is(err, net.ErrClosed) { // it has ended already
		err = errQMPClosed
	}
	if err != nil {
		return nil, fmt.Errorf("QMP %s: %w", command, err)
	}
	return call, nil
}

// answer waits for what QEMU says to a command.
func (q *qmp) answer(cancel <-chan struct{}, call *qmpCall) (json.RawMessage, error) {
	select {
	case m := <-call.reply:
		if m.Error != nil {
			return nil, fmt.Errorf("QMP %s: %w", call.command, m.Error)
		}
		return m.Return, nil
	case <-q.done:
		return nil, fmt.Errorf("QMP %s: %w", call.command, errQMPClosed)
	case <-cancel:
		return nil, fmt.Errorf("QMP %s: cancelled", call.command)
	}
}

// shutdownReason is why the guest stopped, once it has: "guest-reset",
// "guest-panic", "host-signal", ...
func (q *qmp) shutdownReason() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.shutdown
}

func (q *qmp) close() {
	q.conn.Close()
	<-q.done
}
