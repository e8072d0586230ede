package guest

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// ttyRest bounds what is read from a terminal after its command has ended. The
// kernel holds less; a descendant that goes on writing must not go on for ever.
const ttyRest = 256 << 10

// output copies what a command writes, as it is written, to the host.
type output struct {
	r    *os.File
	tty  bool
	send func(p []byte) error
}

// copy returns when the command's end is closed by all who had it, or, after
// stop, when everything is sent that was written before.
func (o *output) copy() error {
	buf := make([]byte, guestrpc.MaxFrame)
	for {
		n, err := o.r.Read(buf)
		if n > 0 {
			if err := o.send(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == nil:
		case o.tty, errors.Is(err, os.ErrDeadlineExceeded):
			// A terminal that nobody has open gives EIO, and may give it too
			// early: the kernel looks for data first and for others second, and
			// the last one may write and close between the two.
			return o.rest(buf)
		default: // io.EOF
			return nil
		}
	}
}

// stop makes copy finish: the command has ended. A descendant of it may have
// the output open for as long as it likes.
func (o *output) stop() { o.r.SetReadDeadline(time.Unix(1, 0)) }

// rest sends what is there now, which includes all that was there when the
// command ended, and never waits for more.
func (o *output) rest(buf []byte) error {
	raw, err := o.r.SyscallConn()
	if err != nil {
		return err
	}
	left := ttyRest
	if !o.tty {
		var ierr error
		err := raw.Control(func(fd uintptr) { left, ierr = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
		if err = errors.Join(err, ierr); err != nil {
			return err
		}
	}
	for left > 0 {
		n := 0
		if err := raw.Control(func(fd uintptr) { n = readNow(int(fd), buf[:min(left, len(buf))]) }); err != nil {
			return err
		}
		if n <= 0 {
			return nil
		}
		left -= n
		if err := o.send(buf[:n]); err != nil {
			return err
		}
	}
	return nil
}

// readNow reads what is there; a terminal's line discipline passes on what is
// under way before it says that there is nothing.
func readNow(fd int, buf []byte) int {
	for {
		n, err := unix.Read(fd, buf)
		if err != unix.EINTR {
			return n
		}
	}
}
