package guest

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/seccomp"
)

// watcher answers the calls that a profile does not allow, and notes them. Each
// caller waits for its answer, so those who call without end are as slow as the
// answers; what it costs to note a call is bounded too.
type watcher struct {
	listener int
	profile  string
	ring     *seccomp.Ring
	details  *bucket
}

// detailsBurst and detailsRate (a second) bound how many callers are looked up in
// /proc. Threads that are born, refused and gone again are without number.
const (
	detailsBurst = 256
	detailsRate  = 64
)

// run answers until the listener fails. It does so only at the end: the spawner has
// the filter as long as the agent lives.
func (w *watcher) run() error {
	var n seccomp.Notification
	for {
		err := seccomp.Receive(w.listener, &n)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINTR): // the caller is gone
			continue
		case err != nil:
			return err
		}
		w.note(&n)
		if err := w.answer(&n); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
}

func (w *watcher) answer(n *seccomp.Notification) error {
	if w.profile == guestrpc.ProfilePermissive {
		return seccomp.Continue(w.listener, n.ID)
	}
	return seccomp.Refuse(w.listener, n.ID, refusal(&n.Data))
}

// refusal is the error of a refused call: one that programs take for the absence of
// what they ask for, where there is such a one.
func refusal(d *seccomp.Data) unix.Errno {
	if !d.Native() || seccomp.Name(int(d.Number)) == "" {
		return unix.ENOSYS // newer than we are
	}
	if d.Number == unix.SYS_SOCKET {
		switch uint32(d.Args[0]) {
		case unix.AF_INET, unix.AF_INET6:
			return unix.EPERM
		case unix.AF_NETLINK:
			return unix.EPROTONOSUPPORT // what libraries of audit and others pass over
		}
		return unix.EAFNOSUPPORT
	}
	return unix.EPERM
}

func (w *watcher) note(n *seccomp.Notification) {
	d := seccomp.Denial{
		Time: time.Now(), Thread: int(n.PID), UID: -1, Profile: w.profile, Data: n.Data,
		Allowed: w.profile == guestrpc.ProfilePermissive,
	}
	if w.ring.Repeat(&d) {
		return
	}
	if w.details.take(d.Time) {
		w.lookUp(&d, n.ID)
	}
	w.ring.Add(d)
}

// lookUp reads who the caller is. It is believed only if the caller still waits
// then: its number could be another's by now.
func (w *watcher) lookUp(d *seccomp.Denial, id uint64) {
	status, err := readFile("/proc/" + strconv.Itoa(d.Thread) + "/status")
	if err != nil || !seccomp.Valid(w.listener, id) {
		return
	}
	d.Comm = statusField(status, "Name")
	d.UID, d.PID = parseStatus(status)
}

// parseStatus reads the user of a /proc/PID/status, and the pid as the process
// itself knows it; -1 and 0 if there is none.
func parseStatus(status string) (uid, pid int) {
	uid = -1
	if ids := strings.Fields(statusField(status, "Uid")); len(ids) == 4 {
		if n, err := strconv.ParseUint(ids[1], 10, 32); err == nil { // the effective one
			uid = int(n)
		}
	}
	if pids := strings.Fields(statusField(status, "NStgid")); len(pids) > 0 {
		if n, err := strconv.Atoi(pids[len(pids)-1]); err == nil {
			pid = n
		}
	}
	return uid, pid
}

// bucket lets through so many at once, and then so many a second. It is one
// goroutine's.
type bucket struct {
	size, rate float64
	left       float64
	last       time.Time
}

func newBucket(size, rate float64) *bucket { return &bucket{size: size, rate: rate, left: size} }

func (b *bucket) take(now time.Time) bool {
	if passed := now.Sub(b.last).Seconds(); passed > 0 && !b.last.IsZero() {
		b.left = min(b.size, b.left+passed*b.rate)
	}
	b.last = now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}

// confined reads what the kernel says of a command.
func confined(p *process) (*guestrpc.Confined, error) {
	status, err := readFile("/proc/" + strconv.Itoa(p.pid) + "/status")
	if err != nil {
		return nil, err
	}
	m := &guestrpc.Confined{PID: p.pid, Profile: p.confinement.profile, Without: p.confinement.without()}
	var nnp int
	for _, f := range []struct {
		key string
		to  *int
	}{{"Seccomp", &m.Seccomp}, {"Seccomp_filters", &m.Filters}, {"NoNewPrivs", &nnp}} {
		if *f.to, err = strconv.Atoi(statusField(status, f.key)); err != nil {
			return nil, fmt.Errorf("%s of process %d: %w", f.key, p.pid, err)
		}
	}
	m.NoNewPrivs = nnp == 1
	for _, f := range []struct {
		key string
		to  *uint64
	}{{"CapEff", &m.CapEff}, {"CapBnd", &m.CapBnd}} {
		if *f.to, err = strconv.ParseUint(statusField(status, f.key), 16, 64); err != nil {
			return nil, fmt.Errorf("%s of process %d: %w", f.key, p.pid, err)
		}
	}
	return m, nil
}
