package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
)

const secretSize = 32

// hello serves the first stream of the machine. When it returns without an
// error the secret is set and the listener takes the agent's streams; the host
// dials only after the reply, so it is never refused.
func (a *Agent) hello(conn net.Conn, l link.Guest) (streams net.Listener, err error) {
	defer conn.Close()
	st := guestrpc.NewStream(conn)
	err = guarded(func() error {
		h, err := readHeader(conn, st)
		if err != nil {
			return err
		}
		if err := checkHello(h); err != nil {
			return err
		}
		if err := a.setUp(h.Hello, func() (time.Time, error) { return askTime(st) }); err != nil {
			return guestrpc.Errorf(guestrpc.CodeInternal, "%v", err)
		}
		a.secret = h.Hello.Secret
		if streams, err = l.Listen(guestrpc.PortAgent); err != nil {
			return guestrpc.Errorf(guestrpc.CodeInternal, "listen: %v", err)
		}
		return a.answerHello(conn, st, h.Hello.Nonce)
	})
	if err != nil {
		sendError(conn, st, err)
		return nil, err
	}
	return streams, nil
}

func (a *Agent) answerHello(conn net.Conn, st *guestrpc.Stream, nonce string) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return guestrpc.Errorf(guestrpc.CodeInternal, "uname: %v", err)
	}
	a.times.Hello = sinceBoot()
	conn.SetDeadline(time.Now().Add(ackTimeout))
	err := st.WriteMessage(guestrpc.FrameHello, &guestrpc.HelloReply{
		Version: guestrpc.Version,
		Nonce:   nonce,
		Kernel:  unix.ByteSliceToString(u.Release[:]),
		Timings: a.times,
	})
	if err != nil {
		return err
	}
	awaitAck(st)
	return nil
}

func checkHello(h *guestrpc.Header) error {
	bad := func(what string) error {
		return guestrpc.Errorf(guestrpc.CodeBadRequest, "hello: %s", what)
	}
	switch m := h.Hello; {
	case h.Op != guestrpc.OpHello || m == nil:
		return bad("the first operation is another")
	case len(m.Secret) != secretSize:
		return bad("the secret is not of 32 bytes")
	case len(m.Entropy) < 32 || len(m.Entropy) > 4096:
		return bad("the entropy is not of 32 to 4096 bytes")
	case !validHostname(m.Hostname):
		return bad("bad host name")
	case m.Overlay < 0 || m.Pids < 0:
		return bad("a limit is negative")
	}
	return nil
}

func validHostname(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// machine is the state of the guest that hello sets. Whatever can be is open by
// then: see nameFiles.
type machine struct {
	overlay int // descriptor of the overlay's tmpfs
	random  int // descriptor of /dev/urandom
	jobs    *jobs
	names   *nameFiles
}

// setUp makes the machine one of its own, which others that were started from the
// same snapshot are not. Random numbers come first: the rest is made of them.
func (m *machine) setUp(h *guestrpc.Hello, askTime func() (time.Time, error)) error {
	for _, s := range []step{
		{"add entropy", func() error { return addEntropy(m.random, h.Entropy) }},
		{"set the clock", func() error { return setClock(askTime) }},
		{"set the machine id", m.names.setMachineID},
		{"set the host name", func() error { return m.names.setHostname(h.Hostname) }},
		{"set the size of the overlay", func() error { return m.resizeOverlay(h.Overlay) }},
		{"limit processes", func() error { return m.jobs.limitPids(h.Pids) }},
	} {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	return nil
}

func askTime(st *guestrpc.Stream) (time.Time, error) {
	if err := st.WriteFrame(guestrpc.FrameClock, nil); err != nil {
		return time.Time{}, err
	}
	f, err := st.ReadFrame()
	if err != nil {
		return time.Time{}, err
	}
	var c guestrpc.Clock
	if f.Type != guestrpc.FrameClock {
		return time.Time{}, fmt.Errorf("frame of type %d in place of the time", f.Type)
	}
	if err := f.Decode(&c); err != nil {
		return time.Time{}, err
	}
	if c.Now.Unix() <= 0 {
		return time.Time{}, errors.New("no time")
	}
	return c.Now, nil
}

// clockRoundTrip is how long an answer may take to be believed at once. The
// clock is then wrong by half of it at most.
const clockRoundTrip = 20 * time.Millisecond

// setClock sets the clock to the host's, from the quickest of a few answers: a
// host under load may stop the machine between any two instructions.
func setClock(ask func() (time.Time, error)) error {
	best := time.Duration(math.MaxInt64)
	for range guestrpc.MaxClock {
		asked := time.Now()
		now, err := ask()
		if err != nil {
			return err
		}
		took := time.Since(asked)
		if took >= best {
			continue
		}
		best = took
		ts, err := unix.TimeToTimespec(now.Add(took / 2))
		if err != nil {
			return err
		}
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
			return err
		}
		if took <= clockRoundTrip {
			break
		}
	}
	return nil
}

// addEntropy feeds the kernel's generator, which random is an open device of, and
// makes it use that at once: clones of one snapshot would otherwise draw the same
// numbers.
func addEntropy(random int, entropy []byte) error {
	// struct rand_pool_info: bits of credit, bytes, the bytes.
	pool := binary.NativeEndian.AppendUint32(nil, uint32(len(entropy)*8))
	pool = binary.NativeEndian.AppendUint32(pool, uint32(len(entropy)))
	pool = append(pool, entropy...)
	if err := ioctlBytes(random, unix.RNDADDENTROPY, pool); err != nil {
		return err
	}
	return unix.IoctlSetInt(random, unix.RNDRESEEDCRNG, 0)
}

// resizeOverlay gives the overlay its size. Its mount is detached, so no path
// leads to it: the descriptor does.
func (m *machine) resizeOverlay(size int64) error {
	defer unix.Close(m.overlay)
	if size == 0 {
		return nil
	}
	fs, err := unix.Fspick(m.overlay, "", unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fspick: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "size", strconv.FormatInt(size, 10)); err != nil {
		return fmt.Errorf("fsconfig: %w", err)
	}
	if err := unix.FsconfigReconfigure(fs); err != nil {
		return fmt.Errorf("reconfigure: %w", err)
	}
	return nil
}
