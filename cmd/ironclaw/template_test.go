package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// outcome is how a run with -v went.
type outcome struct {
	stdout, stderr string
	code           int
	took           time.Duration
}

func (o outcome) cloned() bool { return strings.Contains(o.stderr, "  (cloned, ") }
func (o outcome) booted() bool { return strings.Contains(o.stderr, "  (booted, ") }

// notes are its lines "note: ".
func (o outcome) notes() string {
	return strings.Join(regexp.MustCompile(`(?m)^note: .*$`).FindAllString(o.stderr, -1), "\n")
}

// phase is how long the phase took.
func (o outcome) phase(t *testing.T, name string) time.Duration {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + name + ` +([0-9.]+) ms$`).FindStringSubmatch(o.stderr)
	if m == nil {
		t.Fatalf("no phase %q in\n%s", name, o.stderr)
	}
	d, err := time.ParseDuration(m[1] + "ms")
	check(t, err)
	return d
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// observe runs a prepared command to its end.
func observe(cmd *exec.Cmd) outcome {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	begun := time.Now()
	err := cmd.Run()
	o := outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode(), time.Since(begun)}
	if cmd.ProcessState == nil {
		o.stderr += err.Error()
	}
	return o
}

// run is `ironclaw run -v` with these arguments.
func (p *place) run(t *testing.T, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	return observe(p.command(ctx, append([]string{"run", "-v"}, args...)...))
}

// fine runs a command with these flags, which must go right, and says how.
func (p *place) fine(t *testing.T, flags ...string) outcome {
	t.Helper()
	o := p.run(t, append(flags, "--", "sh", "-c", "echo fine; cat /etc/machine-id")...)
	if o.code != 0 || !regexp.MustCompile(`^fine\n[0-9a-f]{32}\n$`).MatchString(o.stdout) {
		t.Fatalf("code %d, %q\n%s", o.code, o.stdout, o.stderr)
	}
	if o.cloned() == o.booted() {
		t.Fatalf("neither cloned nor booted:\n%s", o.stderr)
	}
	return o
}

// fineClone is fine of which nothing is to be noted: it was cloned.
func (p *place) fineClone(t *testing.T, flags ...string) outcome {
	t.Helper()
	o := p.fine(t, flags...)
	if !o.cloned() || o.notes() != "" {
		t.Errorf("not simply cloned:\n%s", o.stderr)
	}
	return o
}

// saved is what `template ls --json` says of a template.
type saved struct {
	ID      string            `json:"id"`
	Size    int64             `json:"size"`
	Created time.Time         `json:"created"`
	Used    time.Time         `json:"used"`
	Inputs  map[string]string `json:"inputs"`
	Damaged string            `json:"damaged"`
}

// templates lists the templates. All have to be good.
func (p *place) templates(t *testing.T) []saved {
	t.Helper()
	o := p.ironclaw(t, "template", "ls", "--json")
	var list []saved
	if err := json.Unmarshal([]byte(o.stdout), &list); err != nil || o.code != 0 {
		t.Fatalf("code %d, %v, %q, %s", o.code, err, o.stdout, o.stderr)
	}
	for _, s := range list {
		if s.Damaged != "" || s.Size < 1<<20 || len(s.Inputs) == 0 {
			t.Errorf("listed: %+v", s)
		}
	}
	return list
}

// onlyTemplate is the ID of the one template there is.
func (p *place) onlyTemplate(t *testing.T) string {
	t.Helper()
	list := p.templates(t)
	if len(list) != 1 {
		t.Fatalf("%d templates: %+v", len(list), list)
	}
	return list[0].ID
}

// ironclaw runs the program.
func (p *place) ironclaw(t *testing.T, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	return observe(p.command(ctx, args...))
}

// dirOf is where the template lies.
func (p *place) dirOf(id string) string {
	return filepath.Join(p.home(), "templates", "templates", id)
}

// unfinished lists what is neither a whole template nor the store itself.
func (p *place) unfinished(t *testing.T) []string {
	t.Helper()
	var found []string
	for _, line := range p.remains(t) {
		if strings.Contains(line, p.home()+"/templates/") {
			found = append(found, line)
		}
	}
	return found
}

// wrapQEMU puts a QEMU of our own first in PATH: a script in which `real "$@"` is
// the one there was. The layers of isolation in which there is no shell are off.
func (p *place) wrapQEMU(t *testing.T, script string) {
	t.Helper()
	real, err := exec.LookPath("qemu-system-x86_64")
	check(t, err)
	bin := filepath.Join(p.dir, "bin")
	check(t, os.MkdirAll(bin, 0o755))
	script = fmt.Sprintf("#!/bin/sh\nreal() { exec '%s' \"$@\"; }\n%s\n", real, script)
	check(t, os.WriteFile(filepath.Join(bin, "qemu-system-x86_64"), []byte(script), 0o755))
	p.env = append(p.env, "PATH="+bin+":"+os.Getenv("PATH"))
	p.runFlags = []string{"--without", "user,mounts,landlock"}
}

// makings counts how often a template is begun in the place from now on, until it is
// called.
func (p *place) makings(t *testing.T) (count func() int) {
	t.Helper()
	dir := filepath.Join(p.home(), "templates", "making")
	check(t, os.MkdirAll(dir, 0o700))
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	_, err = unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO)
	check(t, err)
	return func() int {
		b := make([]byte, 64<<10)
		n, err := unix.Read(fd, b)
		if err == unix.EAGAIN {
			return 0
		}
		check(t, err)
		events := 0
		for at := 0; at < n; at += unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[at+12:])) {
			events++
		}
		return events
	}
}

// Of runs that start at once where there is no template, one makes it and all are
// cloned from it.
func TestTemplateMadeOnce(t *testing.T) {
	p := newPlace(t)
	makings := p.makings(t)
	const n = 4
	outcomes := make([]outcome, n)
	var wg sync.WaitGroup
	for i := range outcomes {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), runLimit)
			defer cancel()
			outcomes[i] = observe(p.command(ctx, "run", "-v", "--accel", "tcg", "--", "cat", "/etc/machine-id"))
		})
	}
	wg.Wait()
	seen := make(map[string]bool)
	for _, o := range outcomes {
		if o.code != 0 || !o.cloned() || o.notes() != "" || len(o.stdout) != 33 || seen[o.stdout] {
			t.Errorf("code %d, %q\n%s", o.code, o.stdout, o.stderr)
		}
		seen[o.stdout] = true
	}
	if n := makings(); n != 1 {
		t.Errorf("%d machines were saved", n)
	}
	id := p.onlyTemplate(t)
	if left := p.unfinished(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	p.fineClone(t, "--accel", "tcg")
	if again := p.onlyTemplate(t); again != id {
		t.Errorf("template %s, then %s", id, again)
	}
}

// A maker that is killed at any moment leaves nothing that lives and nothing that
// is ever used; what it leaves in its directory goes with the next run.
func TestTemplateMakerKilled(t *testing.T) {
	t.Parallel()
	t.Run("any time", func(t *testing.T) {
		t.Parallel()
		p := newPlace(t)
		before := p.remains(t)
		long := p.fineClone(t).phase(t, "template") + 400*time.Millisecond
		step := max(200*time.Millisecond, long/12)
		for n, after := 1, step/2; after < long; n, after = n+1, after+step {
			p.prune(t)
			p.killMaker(t, func() bool { time.Sleep(after); return true })
			if n == 6 || after+step >= long { // the others are followed by one that is killed later
				p.recovers(t)
			}
		}
		p.prune(t)
		p.sameAs(t, before)
	})
	t.Run("near the end", func(t *testing.T) {
		t.Parallel()
		p := newPlace(t)
		before := p.remains(t)
		for _, pattern := range []string{"making/*/state", "making/*/memory", "making/*/manifest.json", "templates/*/verified"} {
			// Once it is there and not empty; the first two are made long before.
			p.killMaker(t, func() bool {
				files, _ := filepath.Glob(filepath.Join(p.home(), "templates", pattern))
				if len(files) == 0 {
					return false
				}
				st, err := os.Stat(files[0])
				return err == nil && st.Size() > 0
			})
			if pattern != "making/*/state" && pattern != "making/*/memory" { // they come later in the next
				p.recovers(t)
				p.prune(t)
			}
		}
		p.sameAs(t, before)
	})
}

// killMaker starts a run, kills it when now says so, and sees that what it has
// started ends.
func (p *place) killMaker(t *testing.T, now func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	cmd := p.command(ctx, "run", "--", "sleep", "1000")
	check(t, cmd.Start())
	for !now() {
		if ctx.Err() != nil {
			t.Fatal("the moment did not come")
		}
		time.Sleep(100 * time.Microsecond) // files, seen from outside: nothing tells
	}
	cmd.Process.Kill()
	cmd.Wait()
	for end := time.Now().Add(10 * time.Second); len(p.processes(t)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still there: %v", p.processes(t))
		}
	}
	p.ironclaw(t, "image", "ls") // which removes the record
	if list := p.templates(t); len(list) > 1 {
		t.Errorf("listed: %+v", list)
	}
}

// recovers sees that the next run goes well, whatever the one before has left.
func (p *place) recovers(t *testing.T) {
	t.Helper()
	there := len(p.templates(t)) == 1
	o := p.fineClone(t)
	if d := o.phase(t, "template"); there && d > time.Second {
		t.Errorf("one was there, and yet it took %v:\n%s", d, o.stderr)
	}
	p.onlyTemplate(t)
	if left := p.unfinished(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// prune removes all templates, and what was left of any.
func (p *place) prune(t *testing.T) {
	t.Helper()
	if o := p.ironclaw(t, "template", "prune", "-a"); o.code != 0 {
		t.Fatal(o.stderr)
	}
	if d := cmp.Diff([]saved{}, p.templates(t)); d != "" {
		t.Error(d)
	}
	if left := p.unfinished(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// When QEMU cannot start from a template, or its guest does not answer, the
// machine boots, and no command runs in the one that failed.
func TestCloneFailsClosed(t *testing.T) {
	testenv.NeedVM(t)
	for _, tt := range []struct{ name, clone string }{
		{"refuses", `echo 'cannot be loaded' >&2; exit 1`},
		// Its port for the link is not the one that the guest knows.
		{"other devices", `set -- $(echo "$@" | sed 's/,nr=1,/,nr=0,/'); real "$@"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlace(t)
			p.wrapQEMU(t, `case "$*" in *-incoming*) `+tt.clone+`;; esac; real "$@"`)
			before := p.remains(t)
			o := p.fine(t, "--accel", "tcg")
			if !o.booted() || !regexp.MustCompile(`note: template [0-9a-f]{32} is discarded and the machine boots: `).MatchString(o.stderr) {
				t.Errorf("%s", o.stderr)
			}
			if strings.Count(o.stdout, "fine") != 1 {
				t.Errorf("%q", o.stdout)
			}
			if list := p.templates(t); len(list) != 0 {
				t.Errorf("it is still there: %+v", list)
			}
			p.sameAs(t, before)
		})
	}
}
