package guest

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// uevents hears of devices that come. The kernel makes a device's node before
// it tells of it, so whoever opens this first, looks second and waits third
// misses nothing and never polls.
type uevents struct{ fd int }

func openUevents() (*uevents, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("open uevent socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind uevent socket: %w", err)
	}
	return &uevents{fd}, nil
}

// wait returns when ready says so. It asks at once and after every event.
func (u *uevents) wait(deadline time.Time, ready func() (bool, error)) error {
	for {
		if ok, err := ready(); ok || err != nil {
			return err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return errors.New("it did not appear")
		}
		poll := []unix.PollFd{{Fd: int32(u.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, int(left/time.Millisecond)+1); err != nil && err != unix.EINTR {
			return fmt.Errorf("wait for uevent: %w", err)
		}
		u.drain()
	}
}

// drain forgets what has arrived. What it says does not matter, only that
// something has changed; an overflow (ENOBUFS) says that too.
func (u *uevents) drain() {
	var buf [4096]byte
	for {
		_, _, err := unix.Recvfrom(u.fd, buf[:], 0)
		if err != nil && err != unix.EINTR && err != unix.ENOBUFS {
			return
		}
	}
}

func (u *uevents) Close() error { return unix.Close(u.fd) }

func exists(name string) (bool, error) {
	_, err := os.Lstat(name)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
