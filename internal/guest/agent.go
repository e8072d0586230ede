package guest

import (
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
)

const (
	headerTimeout = 30 * time.Second // from a stream's start to its whole header
	ackTimeout    = 10 * time.Second // from the last frame to the host's answer
	maxExecs      = 256              // commands at once; each has buffers and a thread
	maxMessage    = 4 << 10          // of an error, in bytes
)

// Agent serves the operations of package guestrpc.
type Agent struct {
	// setUp does what hello asks for. It is called once, before anything runs.
	setUp setUpFunc
	// jobs confines commands. Only tests, which run on a host they must not
	// change, leave it nil.
	jobs *jobs
	// confiner confines them further; nil as jobs is.
	confiner *confiner
	users    userFiles
	times    guestrpc.Timings

	secret []byte // set by hello, before the port of the agent opens
	execs  chan struct{}
	wg     sync.WaitGroup // streams

	mu      sync.Mutex // guards running
	running map[*process]bool
}

// setUpFunc is told what hello asks for, and how to ask for the time.
type setUpFunc func(h *guestrpc.Hello, askTime func() (time.Time, error)) error

func newAgent(setUp setUpFunc, j *jobs) *Agent {
	return &Agent{
		setUp: setUp, jobs: j, users: systemUsers,
		execs: make(chan struct{}, maxExecs), running: make(map[*process]bool),
	}
}

// RunAgent is the agent's process. argv is what that PID 1 gives it. It
// returns when the link has ended.
func RunAgent(argv []string) error {
	args, err := parseAgentArgs(argv)
	if err != nil {
		return err
	}
	unix.CloseOnExec(overlayFD)
	unix.Umask(0o022)
	// Nobody is to read our memory: it holds the secret.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("set not dumpable: %w", err)
	}
	if err := writeControl("/proc/self/comm", "ironclaw-agent"); err != nil { // it would be "exe"
		return err
	}
	if args.Hostile {
		return runHostile(args.Link)
	}
	j, err := newJobs(cgroupRoot)
	if err != nil {
		return fmt.Errorf("set up the commands' cgroup: %w", err)
	}
	// Not at hello: a machine that was saved before it has this behind it.
	if err := ensureDefaultUser(systemUsers); err != nil {
		return fmt.Errorf("make the user %s: %w", guestrpc.DefaultUser, err)
	}
	names, err := makeNameFiles("/etc")
	if err != nil {
		return fmt.Errorf("make the files of the machine's names: %w", err)
	}
	random, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/urandom: %w", err)
	}
	// Processes are waited for; the runtime's handler of the signal is only work.
	if err := setSignal(unix.SIGCHLD, false); err != nil {
		return fmt.Errorf("reset SIGCHLD: %w", err)
	}
	m := &machine{overlay: overlayFD, random: random, jobs: j, names: names}
	a := newAgent(m.setUp, j)
	a.times = args.Times
	if a.confiner, err = newConfiner(); err != nil {
		return err
	}
	// Every command's, if it asks for nothing else: of a machine that is saved, it is
	// in what is saved.
	if _, err := a.confiner.spawner(confinementOf(&guestrpc.Exec{})); err != nil {
		return err
	}
	if args.Warm {
		if err := a.warm(); err != nil {
			return fmt.Errorf("prepare to be saved: %w", err)
		}
	}
	l, err := openLink(args.Link)
	if err != nil {
		return fmt.Errorf("open the link: %w", err)
	}
	served := make(chan error, 1)
	go func() { served <- a.Serve(l) }() // ends with the process at the latest
	select {
	case err := <-served:
		return err
	case err := <-a.confiner.fatal:
		return err
	}
}

// agentArgs is what PID 1 tells the agent, as one JSON argument.
type agentArgs struct {
	Link  string           `json:"link"` // value of ironclaw.link
	Warm  bool             `json:"warm"` // the machine will be saved before hello
	Times guestrpc.Timings `json:"times"`

	Hostile bool `json:"hostile,omitempty"` // see hostileFile
}

func parseAgentArgs(args []string) (a agentArgs, err error) {
	if len(args) != 1 {
		return a, errors.New("the agent is started by PID 1")
	}
	if err := json.Unmarshal([]byte(args[0]), &a); err != nil {
		return a, err
	}
	return a, checkLink(a.Link)
}

// Serve says hello, then serves the host's streams until the link ends. It owns
// l, and returns when every stream has ended.
func (a *Agent) Serve(l link.Guest) error {
	defer a.wg.Wait()
	defer l.Close()
	hello, err := l.Listen(guestrpc.PortHello)
	if err != nil {
		return err
	}
	a.times.Agent = sinceBoot()
	conn, err := hello.Accept()
	if err != nil {
		return fmt.Errorf("wait for hello: %w", err)
	}
	streams, err := a.hello(conn, l)
	if err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	a.wg.Go(func() { a.accept(hello, a.refuse) })
	return a.accept(streams, a.serve)
}

// accept runs serve for every stream until the link ends.
func (a *Agent) accept(l net.Listener, serve func(net.Conn, *guestrpc.Stream) error) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		a.wg.Go(func() { serveStream(conn, serve) })
	}
}

// serveStream runs one stream. What serve returns is told to the host.
func serveStream(conn net.Conn, serve func(net.Conn, *guestrpc.Stream) error) {
	defer conn.Close()
	st := guestrpc.NewStream(conn)
	if err := guarded(func() error { return serve(conn, st) }); err != nil {
		sendError(conn, st, err)
	}
}

// guarded turns a panic into an error: one stream must not end the others, and
// the host has to see that it happened.
func guarded(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			fmt.Fprintf(os.Stderr, "ironclaw-init: agent: panic: %v\n", r)
			err = guestrpc.Errorf(guestrpc.CodeInternal, "the agent panicked: %v", r)
		}
	}()
	return f()
}

// serve serves a stream of the agent's port.
func (a *Agent) serve(conn net.Conn, st *guestrpc.Stream) error {
	h, err := readHeader(conn, st)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(h.Secret, a.secret) != 1 {
		return guestrpc.Errorf(guestrpc.CodeDenied, "wrong secret")
	}
	switch {
	case h.Op == guestrpc.OpPing:
		return ping(st)
	case h.Op == guestrpc.OpExec && h.Exec != nil:
		return a.exec(conn, st, h.Exec)
	case h.Op == guestrpc.OpInspect:
		return a.inspect(conn, st)
	}
	return guestrpc.Errorf(guestrpc.CodeBadRequest, "no operation %q here", h.Op)
}

// refuse answers a second hello.
func (a *Agent) refuse(conn net.Conn, st *guestrpc.Stream) error {
	if _, err := readHeader(conn, st); err != nil {
		return err
	}
	return guestrpc.Errorf(guestrpc.CodeDenied, "hello has been said")
}

func readHeader(conn net.Conn, st *guestrpc.Stream) (*guestrpc.Header, error) {
	conn.SetReadDeadline(time.Now().Add(headerTimeout))
	defer conn.SetReadDeadline(time.Time{})
	return st.ReadHeader()
}

func ping(st *guestrpc.Stream) error {
	for {
		f, err := st.ReadFrame()
		switch {
		case err != nil:
			return err
		case f.Type != guestrpc.FrameData:
			return guestrpc.Errorf(guestrpc.CodeBadRequest, "frame of type %d in a ping", f.Type)
		case len(f.Payload) == 0:
			return nil
		}
		if err := st.WriteFrame(guestrpc.FrameData, f.Payload); err != nil {
			return err
		}
	}
}

// sendError tells the host why the stream ends and waits until it knows. An
// error of the stream itself is not told: there is nobody to hear it.
func sendError(conn net.Conn, st *guestrpc.Stream, err error) {
	e, ok := errors.AsType[*guestrpc.Error](err)
	if !ok {
		return
	}
	// It may quote what the host sent, and has to fit a frame.
	e = &guestrpc.Error{Code: e.Code, Message: e.Message[:min(len(e.Message), maxMessage)]}
	conn.SetDeadline(time.Now().Add(ackTimeout))
	if st.WriteMessage(guestrpc.FrameError, e) == nil {
		awaitAck(st)
	}
}

// awaitAck reads until the host has acknowledged the last frame, has closed, or
// the deadline that the caller has set. What else was under way is of no use.
func awaitAck(st *guestrpc.Stream) {
	for {
		f, err := st.ReadFrame()
		if err != nil || f.Type == guestrpc.FrameAck {
			return
		}
	}
}

// streamError tells an error of the peer's bytes from one of the transport, by
// which the peer has just gone.
func streamError(err error) error {
	if _, ok := errors.AsType[*guestrpc.Error](err); ok || err == nil {
		return err
	}
	return io.EOF
}
