package guest

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// pipeSize is asked for, so that a command and the link are not in each other's
// step. The default is 64 KiB.
const pipeSize = 256 << 10

// stdio is what a command is connected to: pipes, or a terminal.
type stdio struct {
	in     *os.File // our end of its input; nil without input
	out    *os.File // our end of its output
	err    *os.File // nil with a terminal
	tty    bool
	theirs []int      // its 0, 1 and 2; closed once it runs
	ours   []*os.File // everything to close
}

func openStdio(req *guestrpc.Exec, id *identity) (s *stdio, err error) {
	s = &stdio{tty: req.TTY != nil}
	if s.tty {
		err = s.openTTY(*req.TTY, id, req.Stdin)
	} else {
		err = s.openPipes(req.Stdin)
	}
	if err != nil {
		s.closeTheirs()
		s.Close()
		return nil, guestrpc.Errorf(guestrpc.CodeInternal, "connect the command: %v", err)
	}
	return s, nil
}

func (s *stdio) openPipes(stdin bool) error {
	if stdin {
		r, w, err := pipe()
		if err != nil {
			return err
		}
		s.theirs = append(s.theirs, r)
		if s.in, err = s.own(w); err != nil {
			return err
		}
	} else {
		null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", os.DevNull, err)
		}
		s.theirs = append(s.theirs, null)
	}
	for _, end := range []**os.File{&s.out, &s.err} {
		r, w, err := pipe()
		if err != nil {
			return err
		}
		s.theirs = append(s.theirs, w)
		if *end, err = s.own(r); err != nil {
			return err
		}
	}
	return nil
}

// own takes an end of ours into the poller, so that Close and deadlines unblock
// it. The command's ends stay blocking: few programs expect otherwise.
func (s *stdio) own(fd int) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "stdio")
	s.ours = append(s.ours, f)
	return f, nil
}

func pipe() (r, w int, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return 0, 0, fmt.Errorf("pipe: %w", err)
	}
	unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	return fds[0], fds[1], nil
}

func (s *stdio) closeTheirs() {
	for i, fd := range s.theirs {
		if i == 0 || fd != s.theirs[i-1] { // a terminal is there three times
			unix.Close(fd)
		}
	}
	s.theirs = nil
}

// Close closes our ends, which unblocks who reads or writes them.
func (s *stdio) Close() error {
	var errs []error
	for _, f := range s.ours {
		if err := f.Close(); !errors.Is(err, os.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
