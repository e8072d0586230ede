package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
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
		if err := a.setUp(h.Hello); err != nil {
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
	err := st.WriteJSON(guestrpc.FrameHello, guestrpc.HelloReply{
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
	case m.Now.Unix() <= 0:
		return bad("no time")
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

// machine is the state of the guest that hello sets.
type machine struct {
	overlay int // descriptor of the overlay's tmpfs
	jobs    *jobs
}

func (m *machine) setUp(h *guestrpc.Hello) error {
	for _, s := range []step{
		{"set the clock", func() error { return setClock(h.Now) }},
		{"add entropy", func() error { return addEntropy(h.Entropy) }},
		{"set the host name", func() error { return setHostname(h.Hostname) }},
		{"set the size of the overlay", func() error { return m.resizeOverlay(h.Overlay) }},
		{"limit processes", func() error { return m.jobs.limitPids(h.Pids) }},
	} {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	return nil
}

func setClock(now time.Time) error {
	ts, err := unix.TimeToTimespec(now)
	if err != nil {
		return err
	}
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// addEntropy feeds the kernel's generator and makes it use that at once: clones
// of one snapshot would otherwise draw the same numbers.
func addEntropy(entropy []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info: bits of credit, bytes, the bytes.
	pool := binary.NativeEndian.AppendUint32(nil, uint32(len(entropy)*8))
	pool = binary.NativeEndian.AppendUint32(pool, uint32(len(entropy)))
	pool = append(pool, entropy...)
	if err := ioctlBytes(int(f.Fd()), unix.RNDADDENTROPY, pool); err != nil {
		return err
	}
	return unix.IoctlSetInt(int(f.Fd()), unix.RNDRESEEDCRNG, 0)
}

func setHostname(name string) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	if err := os.Mkdir("/etc", 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := replaceFile("/etc/hostname", name+"\n"); err != nil {
		return err
	}
	hosts, err := readFile("/etc/hosts")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return replaceFile("/etc/hosts", hostsFile(hosts, name))
}

func hostsFile(old, name string) string {
	if !strings.Contains(old, "localhost") {
		old = withLine(old, "127.0.0.1 localhost")
		old = withLine(old, "::1 localhost ip6-localhost")
	}
	return withLine(old, "127.0.1.1 "+name)
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
