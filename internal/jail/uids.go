package jail

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/filelock"
	"github.com/ironclaw-run/ironclaw/internal/firewall"
)

// The users that root runs VMMs as, one each. The range is in what systemd leaves
// to nobody (systemd's UIDS-GIDS.md: 1879048192 to 2147352575 are unused), above
// all that adduser, subuid and systemd's own services give out.
const (
	firstUID = 0x70000000 // 1879048192
	lastUID  = firstUID + 1<<16 - 1
)

// uidDir has a file for each user in use, locked by whoever uses it. It lives no
// longer than the processes do.
const uidDir = "/run/ironclaw/uids"

// uid is a user that no other process runs as.
type uid struct {
	number int
	lock   *os.File
}

// OwnUsers reports whether VMMs of this process run as users of their own, and not in user
// namespaces.
func OwnUsers() bool { return ownsUIDs() }

// RemoveGuard takes the guard out of this network namespace: to show what it stops, in one that was
// made for that. The next Prepare puts it back.
func RemoveGuard(ctx context.Context) error {
	return firewall.RemoveGuard(ctx, firstUID, lastUID, firewall.Options{})
}

// ownsUIDs reports whether this process can become the users of the range, and make namespaces
// without one of users: it is root, with root's capabilities, and not in a user namespace that
// lacks the range.
func ownsUIDs() bool {
	if os.Geteuid() != 0 || !capable(unix.CAP_SYS_ADMIN, unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETPCAP, unix.CAP_NET_ADMIN) {
		return false
	}
	f, err := os.Open("/proc/self/uid_map")
	if err != nil {
		return false
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var inside, outside, size uint64
		if _, err := fmt.Sscan(lines.Text(), &inside, &outside, &size); err == nil &&
			inside <= firstUID && inside+size > lastUID {
			return true
		}
	}
	return false
}

// capable reports whether this process has all these capabilities: root in a container may
// not.
func capable(capabilities ...int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	for _, c := range capabilities {
		if data[c/32].Effective&(1<<(c%32)) == 0 {
			return false
		}
	}
	return true
}

// takeUID reserves a user. The search begins anywhere, so that one that has just been
// given back is not soon used again.
func takeUID() (*uid, error) {
	if err := os.MkdirAll(uidDir, 0o700); err != nil {
		return nil, fmt.Errorf("reserve a user for the VMM: %w", err)
	}
	const n = lastUID - firstUID + 1
	begin := rand.IntN(n)
	for i := range n {
		number := firstUID + (begin+i)%n
		path := filepath.Join(uidDir, strconv.Itoa(number))
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("reserve a user for the VMM: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && filelock.Holds(f, path) {
			return &uid{number, f}, nil
		}
		f.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("reserve a user for the VMM: %w", err)
		}
	}
	return nil, errors.New("reserve a user for the VMM: all are in use")
}

// release gives the user back. The file goes first, while it is locked.
func (u *uid) release() {
	_ = os.Remove(u.lock.Name())
	u.lock.Close()
}

// sweepUIDs removes the files of users that nobody uses.
func sweepUIDs() {
	entries, err := os.ReadDir(uidDir)
	if err != nil {
		return
	}
	for _, e := range entries {
		path := filepath.Join(uidDir, e.Name())
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.Remove(path)
		}
		f.Close()
	}
}
