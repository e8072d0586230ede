package qemu

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"
)

// maxQMP bounds one message of QEMU's. A guest that has taken over its QEMU
// speaks here too.
const maxQMP = 1 << 20

// errQMPClosed is returned once QEMU has closed its monitor: it has ended.
var errQMPClosed = errors.New("QEMU closed its monitor")

// qmp speaks the QEMU Machine Protocol (docs/interop/qmp-spec): JSON, a message
// a line. One goroutine reads, for the connection's whole life.
type qmp struct {
	conn  net.Conn
	ready chan struct{} // closed by the greeting
	done  chan struct{} // closed when the reader has ended

	mu       sync.Mutex // guards the fields below, and writes
	nextID   int
	replies  map[string]chan qmpMessage
	shutdown string // reason in the last SHUTDOWN event
}

type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	ID       string          `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *qmpError       `json:"error"`
	Event    string          `json:"event"`
	Data     struct {
		Guest  bool   `json:"guest"`
		Reason string `json:"reason"`
	} `json:"data"`
}

type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

func newQMP(conn net.Conn) *qmp {
	q := &qmp{
		conn:    conn,
		ready:   make(chan struct{}),
		done:    make(chan struct{}),
		replies: make(map[string]chan qmpMessage),
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
		q.mu.Lock()
		if m.Event == "SHUTDOWN" {
			q.shutdown = m.Data.Reason
		}
		if ch := q.replies[m.ID]; ch != nil {
			delete(q.replies, m.ID)
			ch <- m // has room
		}
		q.mu.Unlock()
	}
}

// do executes one command. cancel ends the wait for the answer.
func (q *qmp) do(cancel <-chan struct{}, command string, args any) (json.RawMessage, error) {
	ch := make(chan qmpMessage, 1)
	q.mu.Lock()
	q.nextID++
	id := strconv.Itoa(q.nextID)
	msg, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        string `json:"id"`
	}{command, args, id})
	if err == nil {
		q.replies[id] = ch
		q.conn.SetWriteDeadline(time.Now().Add(10 * time.Second)) // QEMU reads at once or is stuck
		_, err = q.conn.Write(append(msg, '\n'))
	}
	q.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case m := <-ch:
		if m.Error != nil {
			return nil, fmt.Errorf("QMP %s: %w", command, m.Error)
		}
		return m.Return, nil
	case <-q.done:
		return nil, fmt.Errorf("QMP %s: %w", command, errQMPClosed)
	case <-cancel:
		return nil, fmt.Errorf("QMP %s: cancelled", command)
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
