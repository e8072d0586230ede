package guest

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/seccomp"
)

// Every layer that a command may go without changes its confinement, and only that
// layer is said to be missing.
func TestConfinementOf(t *testing.T) {
	usual := confinementOf(&guestrpc.Exec{})
	if usual != (confinement{profile: guestrpc.ProfileDefault}) || usual.without() != nil {
		t.Errorf("%+v", usual)
	}
	for _, l := range guestrpc.Layers() {
		c := confinementOf(&guestrpc.Exec{Profile: guestrpc.ProfileStrict, Without: []string{l}})
		if c == usual || !slices.Equal(c.without(), []string{l}) || (c.profile == "") != (l == guestrpc.LayerSeccomp) {
			t.Errorf("without %s: %+v", l, c)
		}
	}
	all := confinementOf(&guestrpc.Exec{Without: guestrpc.Layers()})
	if !slices.Equal(all.without(), guestrpc.Layers()) {
		t.Errorf("%+v", all)
	}
}

func TestProfilesExist(t *testing.T) {
	for _, name := range guestrpc.Profiles() {
		p, err := profileNamed(name, seccomp.Key{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if p.Name != name {
			t.Errorf("%s is %s", name, p.Name)
		}
	}
	if _, err := profileNamed("", seccomp.Key{}); err == nil {
		t.Error("there is a profile without a name")
	}
}

func TestRefusal(t *testing.T) {
	native := func(nr int32, args ...uint64) *seccomp.Data {
		d := &seccomp.Data{Number: nr, Arch: unix.AUDIT_ARCH_X86_64}
		copy(d.Args[:], args)
		return d
	}
	for _, c := range []struct {
		d    *seccomp.Data
		want unix.Errno
	}{
		{native(unix.SYS_MOUNT), unix.EPERM},
		{native(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_RAW), unix.EPERM},
		{native(unix.SYS_SOCKET, unix.AF_VSOCK|1<<32), unix.EAFNOSUPPORT},
		{native(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_AUDIT), unix.EPROTONOSUPPORT},
		{native(4000), unix.ENOSYS},
		{native(-1), unix.ENOSYS},
		{native(0x40000000 + unix.SYS_MOUNT), unix.ENOSYS},
		{&seccomp.Data{Number: unix.SYS_MOUNT, Arch: unix.AUDIT_ARCH_I386}, unix.ENOSYS},
	} {
		if got := refusal(c.d); got != c.want {
			t.Errorf("%+v: %v, want %v", c.d, got, c.want)
		}
	}
}

// The words are the kernel's, but the name in them is the process's own choice.
func TestParseStatus(t *testing.T) {
	const status = "Name:\tx\\nUid:\t0 0 0 0\nUmask:\t0022\nUid:\t1000\t1001\t1002\t1003\nNStgid:\t412\t17\nNSpid:\t413\t18\n"
	if uid, pid := parseStatus(status); uid != 1001 || pid != 17 {
		t.Errorf("uid %d, pid %d", uid, pid)
	}
	if name := statusField(status, "Name"); name != `x\nUid:	0 0 0 0` {
		t.Errorf("%q", name)
	}
	for _, bad := range []string{"", "Uid:\n", "Uid:\t1 2 3\nNStgid:\n", "Uid:\t-1\t-1\t-1\t-1\nNStgid:\tx\n"} {
		if uid, pid := parseStatus(bad); uid != -1 || pid != 0 {
			t.Errorf("%q: uid %d, pid %d", bad, uid, pid)
		}
	}
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if uid, pid := parseStatus(string(own)); uid != os.Geteuid() || pid != os.Getpid() {
		t.Errorf("we are uid %d, pid %d", uid, pid)
	}
}

func TestBucket(t *testing.T) {
	b := newBucket(4, 2)
	now := time.Unix(1000, 0)
	taken := func(d time.Duration) (n int) {
		now = now.Add(d)
		for range 10 {
			if b.take(now) {
				n++
			}
		}
		return n
	}
	for _, c := range []struct {
		after time.Duration
		want  int
	}{{0, 4}, {0, 0}, {time.Second, 2}, {500 * time.Millisecond, 1}, {time.Hour, 4}, {-time.Minute, 0}, {time.Second, 2}} {
		if got := taken(c.after); got != c.want {
			t.Errorf("%d after %v, want %d", got, c.after, c.want)
		}
	}
}

// An agent that confines nothing, as in these tests, says so; the end is
// acknowledged, as of every stream.
func TestInspectNothing(t *testing.T) {
	h := startAgent(t)
	st := h.open(guestrpc.PortAgent, &guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpInspect, Secret: testSecret})
	var end guestrpc.Inspected
	decode(t, st.next(), guestrpc.FrameInspected, &end)
	if end.Dropped != 0 {
		t.Errorf("%+v", end)
	}
	st.ack()
}

// What is noted arrives whole.
func TestDenialMessage(t *testing.T) {
	d := seccomp.Denial{
		Time: time.Unix(1, 0), Last: time.Unix(2, 0), Count: 3, Thread: 4, PID: 5, UID: 6, Comm: "c", Profile: "p",
		Data:    seccomp.Data{Number: 7, Arch: 8, Args: [6]uint64{1, 2, 3, 4, 5, 6}},
		Allowed: true,
	}
	m := denialMessage(&d)
	if !m.First.Equal(d.Time) || !m.Last.Equal(d.Last) || m.Count != 3 || m.PID != 5 || m.UID != 6 || m.Comm != "c" || m.Profile != "p" ||
		m.Number != 7 || m.Arch != 8 || !slices.Equal(m.Args, d.Data.Args[:]) || !m.Allowed {
		t.Errorf("%+v", m)
	}
}

// Nothing that is hidden or read-only is so by the name of something else.
func TestHiddenPaths(t *testing.T) {
	all := slices.Concat(hidden, readOnly)
	slices.Sort(all)
	for i, name := range all {
		if !strings.HasPrefix(name, "/proc/") && !strings.HasPrefix(name, "/sys/") || strings.HasSuffix(name, "/") {
			t.Errorf("%s", name)
		}
		if i > 0 && all[i-1] == name {
			t.Errorf("%s is there twice", name)
		}
	}
}
