// Package control is the socket by which other commands ask the process that runs a
// sandbox about it.
//
// The socket lies in the sandbox's record, a directory that only its user can enter, and the
// other side's user is checked again (SO_PEERCRED). A connection carries one request and one
// answer, each a line of JSON of bounded length, and is then closed. Start with [Serve] and [Ask].
package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Name is the socket's name in its directory.
const Name = "control.sock"

const (
	maxRequest = 4 << 10          // bytes
	maxAnswer  = 4 << 20          // bytes
	slowest    = 10 * time.Second // for one connection
	together   = 16               // connections at once; more wait
)

// Request is what is asked.
type Request struct {
	Op string `json:"op"`
}

// answer is what comes back: Result, or why there is none.
type answer struct {
	Result json.RawMessage `json:"result,omitempty"`
	Error  string          `json:"error,omitempty"`
}

// Handler answers a request with something that becomes JSON. It may be called by several
// goroutines at once.
type Handler func(ctx context.Context, r Request) (any, error)

// Server listens. Close it.
type Server struct {
	listener *net.UnixListener
	handle   Handler
	cancel   context.CancelFunc
	wg       sync.WaitGroup
}

// Serve listens in dir, which must be the caller's alone, until Close.
func Serve(dir string, handle Handler) (*Server, error) {
	l, err := listen(dir)
	if err != nil {
		return nil, fmt.Errorf("listen for questions: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{listener: l, handle: handle, cancel: cancel}
	s.wg.Go(func() { s.accept(ctx) })
	return s, nil
}

// listen makes the socket by a short name: that of a socket has 108 bytes at most, and
// directories may have more.
func listen(dir string) (*net.UnixListener, error) {
	path, done, err := short(dir)
	if err != nil {
		return nil, err
	}
	defer done()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // the short name will be somebody else's; the directory goes as a whole
	return l, nil
}

// short is a path of the socket that is short, until done is called.
func short(dir string) (path string, done func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), Name), func() { d.Close() }, nil
}

func (s *Server) accept(ctx context.Context) {
	slots := make(chan struct{}, together)
	for {
		conn, err := s.listener.AcceptUnix()
		if err != nil {
			return
		}
		slots <- struct{}{} // no one holds one for longer than slowest
		s.wg.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			_ = conn.SetDeadline(time.Now().Add(slowest))
			_ = s.serve(ctx, conn) // who asked has gone
		})
	}
}

func (s *Server) serve(ctx context.Context, conn *net.UnixConn) error {
	if err := sameUser(conn); err != nil {
		return err
	}
	var r Request
	line, err := bufio.NewReaderSize(io.LimitReader(conn, maxRequest), maxRequest).ReadSlice('\n')
	if err != nil {
		return err
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return reply(conn, answer{Error: "a question that cannot be read"})
	}
	result, err := s.handle(ctx, r)
	if err != nil {
		return reply(conn, answer{Error: err.Error()})
	}
	b, err := json.Marshal(result)
	if err != nil || len(b) > maxAnswer/2 {
		return reply(conn, answer{Error: "the answer is too long"})
	}
	return reply(conn, answer{Result: b})
}

func reply(w io.Writer, a answer) error {
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// sameUser refuses whoever is neither this user nor root.
func sameUser(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var peerErr error
	if err := raw.Control(func(fd uintptr) { peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if peerErr != nil {
		return peerErr
	}
	if peer.Uid != 0 && int(peer.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d asks", peer.Uid)
	}
	return nil
}

// Close stops listening and waits for answers under way.
func (s *Server) Close() error {
	err := s.listener.Close()
	s.cancel()
	s.wg.Wait()
	return err
}

// ErrNobody is returned by Ask when nobody listens: the sandbox has ended, or is not there yet.
var ErrNobody = errors.New("its process does not answer")

// Ask asks the server of dir and decodes its answer into result.
func Ask(ctx context.Context, dir string, r Request, result any) error {
	path, done, err := short(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNobody, err)
	}
	defer done()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNobody, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	_ = conn.SetDeadline(time.Now().Add(slowest))
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if _, err := conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("ask %s: %w", filepath.Base(dir), err)
	}
	var a answer
	if err := json.NewDecoder(io.LimitReader(conn, maxAnswer)).Decode(&a); err != nil {
		return fmt.Errorf("ask %s: %w", filepath.Base(dir), err)
	}
	if a.Error != "" {
		return errors.New(a.Error)
	}
	return json.Unmarshal(a.Result, result)
}
