package guest

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// endOfInput is what a person types to end the input of a terminal (VEOF).
const endOfInput = 0x04

// ttyGroup is the group of terminals in every distribution's /etc/group, and
// what devpts is mounted with.
const ttyGroup = 5

func (s *stdio) openTTY(size guestrpc.Resize, id *identity, stdin bool) error {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/ptmx: %w", err)
	}
	if s.out, err = s.own(fd); err != nil {
		return err
	}
	if stdin {
		s.in = s.out
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return fmt.Errorf("unlock terminal: %w", err)
	}
	// Not by its name in /dev/pts, on which something else may be mounted.
	slave, err := openPeer(fd)
	if err != nil {
		return fmt.Errorf("open terminal: %w", err)
	}
	s.theirs = []int{slave, slave, slave}
	if err := unix.Fchown(slave, int(id.uid), ttyGroup); err != nil {
		// A test that is not root owns it already.
		if own := unix.Geteuid(); own == 0 || own != int(id.uid) {
			return fmt.Errorf("give terminal to the user: %w", err)
		}
	}
	return setSize(fd, size)
}

// resize sets the terminal's size; the kernel tells the foreground processes.
func (s *stdio) resize(size guestrpc.Resize) error {
	raw, err := s.out.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = setSize(int(fd), size) }); err != nil {
		return err
	}
	return serr
}

func setSize(fd int, size guestrpc.Resize) error {
	err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
	if err != nil {
		return fmt.Errorf("set terminal size: %w", err)
	}
	return nil
}
