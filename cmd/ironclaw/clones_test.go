package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

const (
	clones    = 200
	keyEvery  = 8 // of so many clones one makes keys too, which takes longer than all else
	atOnce    = 2
	clockSlip = 50 * time.Millisecond
)

// cloneScript prints a name and a value a line. With $1 it makes keys.
const cloneScript = `
tell() { echo "$1 $2"; }
tell random $(od -An -v -tx1 -w64 -N64 /dev/urandom | tr -d ' ')
tell clock $EPOCHREALTIME
for name in uuid boot_id; do read -r x </proc/sys/kernel/random/$name; tell $name $x; done
read -r x </etc/machine-id; tell machine-id $x
read -r x </proc/sys/kernel/hostname; tell hostname $x
read -r x y </proc/uptime; tell uptime $x
[ "$1" ] || exit 0
openssl ecparam -name prime256v1 -genkey -noout -out /tmp/tls
{ read -r x; read -r x; read -r y; } </tmp/tls; tell tls-key $x$y
ssh-keygen -q -t ed25519 -N '' -f /tmp/ssh
read -r x y z </tmp/ssh.pub; tell ssh-key $y
`

// told is what clones print, by name. But for clock and uptime no two of them may
// have the same value.
var told = map[string]string{
	"random": `^[0-9a-f]{128}$`, "uuid": `^[0-9a-f-]{36}$`, "boot_id": `^[0-9a-f-]{36}$`,
	"machine-id": `^[0-9a-f]{32}$`, "hostname": `^[0-9a-z]{12}$`, "clock": `^\d+\.\d{6}$`, "uptime": `^\d+\.\d\d$`,
	"tls-key": `^MHc[A-Za-z0-9+/]{120,}$`, "ssh-key": `^AAAAC3NzaC1lZDI1NTE5[A-Za-z0-9+/]{40,}$`,
}

// gallery is what all clones have told.
type gallery struct {
	mu     sync.Mutex
	seen   map[string]int       // value -> clone
	count  map[string]int       // name -> values
	uptime map[int]([2]float64) // clone -> uptime, and how long it had existed at most
}

// add notes what clone n has told.
func (g *gallery) add(n int, o outcome, begun, ended time.Time) error {
	if o.code != 0 || !o.cloned() || o.notes() != "" {
		return fmt.Errorf("clone %d: code %d, %q\n%s", n, o.code, o.stdout, o.stderr)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for line := range strings.Lines(o.stdout) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if told[name] == "" || !regexp.MustCompile(told[name]).MatchString(value) {
			errs = append(errs, fmt.Errorf("clone %d says %q", n, line))
			continue
		}
		g.count[name]++
		switch name {
		case "clock":
			if at := parseClock(value); at.Before(begun.Add(-clockSlip)) || at.After(ended.Add(clockSlip)) {
				errs = append(errs, fmt.Errorf("clone %d has the clock %v, between %v and %v", n, at, begun, ended))
			}
		case "uptime":
			up, _ := strconv.ParseFloat(value, 64)
			g.uptime[n] = [2]float64{up, ended.Sub(begun).Seconds()}
		default:
			if other, ok := g.seen[value]; ok {
				errs = append(errs, fmt.Errorf("clones %d and %d share the %s %s", other, n, name, value))
			}
			g.seen[value] = n
		}
	}
	return errors.Join(errs...)
}

// parseClock reads seconds with a fraction.
func parseClock(s string) time.Time {
	seconds, fraction, _ := strings.Cut(strings.TrimSpace(s), ".")
	sec, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return time.Time{}
	}
	nsec, _ := strconv.ParseInt((fraction + "000000000")[:9], 10, 64)
	return time.Unix(sec, nsec)
}

// Machines started from one template share nothing that should be theirs alone,
// and their clocks are right.
func TestClonesAreUnique(t *testing.T) {
	testenv.NeedNet(t)
	p := newPlace(t)
	check(t, os.Remove(filepath.Join(p.home(), "images"))) // that of the user's is not for tests to fill
	build := p.command(t.Context(), "image", "build", "keys", "openssl", "openssh-client")
	if o := observe(build); o.code != 0 {
		t.Fatal(o.stderr)
	}
	p.fineClone(t, "--image", "keys")
	before := p.remains(t)
	g := &gallery{seen: make(map[string]int), count: make(map[string]int), uptime: make(map[int][2]float64)}
	next := make(chan int)
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for n := range next {
				keys := ""
				if n%keyEvery == 0 {
					keys = "keys"
				}
				ctx, cancel := context.WithTimeout(t.Context(), runLimit)
				begun := time.Now()
				o := observe(p.command(ctx, "run", "-v", "--image", "keys", "--", "bash", "-c", cloneScript, "bash", keys))
				cancel()
				if err := g.add(n, o, begun, time.Now()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for n := 0; n < clones && !t.Failed(); n++ {
		next <- n
	}
	close(next)
	wg.Wait()
	p.sameAs(t, before)
	for name := range told {
		want := clones
		if strings.HasSuffix(name, "-key") {
			want = (clones + keyEvery - 1) / keyEvery
		}
		if g.count[name] != want {
			t.Errorf("%d values of %s, not %d", g.count[name], name, want)
		}
	}
	g.checkUptimes(t)
}

// checkUptimes sees that each clone went on where the template was saved, however
// long ago that was: its uptime is at most that of any other, which had it when it
// began, and the time for which it has existed.
func (g *gallery) checkUptimes(t *testing.T) {
	t.Helper()
	for n, u := range g.uptime {
		if first := g.uptime[0]; u[0] > first[0]+u[1]+0.1 {
			t.Errorf("clone %d was up for %v s after %v s of its own; the first one for %v s", n, u[0], u[1], first[0])
		}
	}
}

// clock is what a machine says of its clocks.
type clock struct {
	made   time.Time // when the machine thinks its /dev was made
	uptime float64
}

// checkClock asks a machine for the time, which has to be the host's each time, and
// says how the machine started.
func (p *place) checkClock(t *testing.T) (outcome, clock) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	cmd := p.command(ctx, "run", "-v", "-i", "--accel", "tcg", "--", "bash", "-c",
		`while read -r x; do echo $EPOCHREALTIME; done; date +%s.%N; stat -c %Y.0 /dev/full; cat /proc/uptime`)
	stdin, err := cmd.StdinPipe()
	check(t, err)
	stdout, err := cmd.StdoutPipe()
	check(t, err)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	begun := time.Now()
	check(t, cmd.Start())
	lines := bufio.NewReader(stdout)
	answer := func(before time.Time) {
		line, err := lines.ReadString('\n')
		after := time.Now()
		if err != nil {
			cancel()
			cmd.Wait()
			t.Fatalf("%v\n%s", err, &stderr)
		}
		if at := parseClock(line); at.Before(before.Add(-clockSlip)) || at.After(after.Add(clockSlip)) {
			t.Errorf("the guest's clock says %v, between %v and %v", at, before, after)
		}
	}
	for range 10 {
		before := time.Now()
		_, err := io.WriteString(stdin, "?\n")
		check(t, err)
		answer(before)
		time.Sleep(50 * time.Millisecond) // it has to go on being right
	}
	before := time.Now()
	check(t, stdin.Close())
	answer(before)
	rest, err := io.ReadAll(lines)
	check(t, err)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	made, up, _ := strings.Cut(string(rest), "\n")
	c := clock{made: parseClock(made)}
	if _, err := fmt.Sscan(up, &c.uptime); err != nil {
		t.Fatalf("%q", rest)
	}
	return outcome{stderr: stderr.String(), took: time.Since(begun)}, c
}

// A clone's clock is right however old its template is and whatever the clock was
// when it was saved; the clock that counts from the boot goes on from there.
func TestCloneClock(t *testing.T) {
	p := newPlace(t)
	// The host's clock cannot be set; that of the machine's board can.
	p.wrapQEMU(t, `real "$@" -rtc base=2001-02-03T04:05:06`)
	_, first := p.checkClock(t)
	if y := first.made.UTC().Year(); y != 2001 {
		t.Errorf("the machine was booted in %d: this test shows nothing", y)
	}
	id := p.onlyTemplate(t)
	old := time.Now().AddDate(0, 0, -10)
	err := filepath.WalkDir(p.dirOf(id), func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chtimes(path, old, old))
	})
	check(t, err)
	time.Sleep(4 * time.Second) // longer than a clone takes, so that a jump by it is seen
	o, again := p.checkClock(t)
	if !o.cloned() || p.onlyTemplate(t) != id {
		t.Errorf("not cloned from %s:\n%s", id, o.stderr)
	}
	if again.uptime > first.uptime+o.took.Seconds()+0.1 {
		t.Errorf("up for %v s after %v; a clone before it for %v s", again.uptime, o.took, first.uptime)
	}
	if !again.made.Equal(first.made) {
		t.Errorf("made at %v, the clone before it at %v", again.made, first.made)
	}
}
