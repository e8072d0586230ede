package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// place is a directory with an IRONCLAW_HOME and a TMPDIR of its own.
type place struct {
	dir string
	env []string

	runFlags []string // of every run
}

func newPlace(t *testing.T) *place {
	t.Helper()
	prepared(t)
	p := &place{dir: t.TempDir(), env: os.Environ()}
	setenv := func(k, v string) { p.env = append(p.env, k+"="+v) }
	if err := useHome(p.dir, setenv); err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(p.dir, "tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	setenv("TMPDIR", tmp)
	return p
}

func (p *place) home() string { return filepath.Join(p.dir, "home") }

// command is the program with these arguments, in this place.
func (p *place) command(ctx context.Context, args ...string) *exec.Cmd {
	if args[0] == "run" {
		args = slices.Concat(args[:1], p.runFlags, args[1:])
	}
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Args[0] = "ironclaw" // see TestMain
	cmd.Env = p.env
	cmd.Dir = p.dir
	return cmd
}

// processes finds those that have to do with the place by their command lines and
// environments.
func (p *place) processes(t *testing.T) map[int]string {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[int]string)
	for _, proc := range procs {
		for _, what := range []string{"environ", "cmdline"} {
			b, err := os.ReadFile(filepath.Join(proc, what)) // it may have ended
			if pid, _ := strconv.Atoi(filepath.Base(proc)); err == nil && bytes.Contains(b, []byte(p.dir)) {
				found[pid] = string(b)
			}
		}
	}
	return found
}

// machines are the VMMs of this host and their parents: a VMM in its jail knows
// nothing of a place.
func machines(t *testing.T) map[int]int {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[int]int)
	for _, proc := range procs {
		line, err := os.ReadFile(filepath.Join(proc, "cmdline"))
		if err != nil || !bytes.Contains(line, []byte("\x00microvm,")) {
			continue
		}
		status, err := os.ReadFile(filepath.Join(proc, "status"))
		_, after, ok := strings.Cut(string(status), "\nPPid:")
		var parent int
		if _, scanErr := fmt.Sscan(after, &parent); err != nil || !ok || scanErr != nil {
			continue // it has ended
		}
		pid, _ := strconv.Atoi(filepath.Base(proc))
		found[pid] = parent
	}
	return found
}

// remains lists what a run could leave: processes, mounts, sockets and files that
// have to do with the place.
func (p *place) remains(t *testing.T) []string {
	t.Helper()
	var found []string
	for pid, line := range p.processes(t) {
		found = append(found, fmt.Sprintf("process %d: %.200q", pid, line))
	}
	for pid, parent := range machines(t) {
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", parent)); err != nil || !bytes.Contains(name, []byte("ironclaw")) && !bytes.Contains(name, []byte(".test")) {
			found = append(found, fmt.Sprintf("VMM %d, whose parent is %q", pid, name))
		}
	}
	for _, table := range []string{"/proc/self/mountinfo", "/proc/net/unix"} {
		b, err := os.ReadFile(table)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, p.dir) {
				found = append(found, table+": "+line)
			}
		}
	}
	err := filepath.WalkDir(p.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !slices.Contains([]string{"facts.json", ".lock", "run"}, d.Name()) && !p.keeps(path) {
			found = append(found, "file "+path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(found)
	return found
}

// storeFile matches the names in a store of templates that stay: the store's own,
// and those of a template that is whole.
var storeFile = regexp.MustCompile(`^(lock|locks(/[0-9a-f]{32})?|making|templates(/([0-9a-f]{32})(/(memory|state|manifest\.json|used|verified))?)?)?$`)

// keeps says whether a run may leave the file: it is of the store of templates.
func (p *place) keeps(path string) bool {
	store := filepath.Join(p.home(), "templates")
	name, ok := strings.CutPrefix(path, store)
	m := storeFile.FindStringSubmatch(strings.TrimPrefix(name, "/"))
	if !ok || m == nil {
		return false
	}
	if id := m[4]; id != "" {
		for _, part := range []string{"memory", "state", "manifest.json"} {
			if _, err := os.Lstat(filepath.Join(store, "templates", id, part)); err != nil {
				return false // of one that is torn
			}
		}
	}
	return true
}

// sameAs fails if something remains that was not there before.
func (p *place) sameAs(t *testing.T, before []string) {
	t.Helper()
	if d := cmp.Diff(before, p.remains(t)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}

const runLimit = 90 * time.Second // a boot on a loaded host, and more

// Each of these is one error line that names the cause, a hint where there is a
// remedy, the right exit code, and nothing left behind.
func TestBadInput(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(t *testing.T, p *place)
		args    []string
		code    int
		stderr  string // regular expression for the error line's text
		hint    bool
	}{
		{"unknown image", nil, []string{"--image", "nosuch", "true"}, 125, `no such image`, true},
		{"command not found", nil, []string{"nosuch"}, 127, `nosuch`, false},
		{"bad memory", nil, []string{"--memory", "12parsec", "true"}, 125, `bad size "12parsec"`, true},
		{"little memory", nil, []string{"--memory", "64M", "true"}, 125, `64 MiB of memory are too little`, true},
		{"memory the agent cannot live in", nil, []string{"--memory", "80M", "true"}, 125, `too little`, true},
		{"more memory than there is", nil, []string{"--memory", "900G", "true"}, 125, `emory`, false},
		{"bad name", nil, []string{"--name", "A b", "true"}, 125, `bad name "A b"`, false},
		{"bad env", nil, []string{"-e", "=x", "true"}, 125, `KEY=VALUE`, true},
		{"too many cpus", nil, []string{"--cpus", "1000", "true"}, 125, `1000 cpus`, false},
		{"kernel is a directory", mkdir("k"), []string{"--kernel", "k", "true"}, 125, `\bk\b.*directory`, false},
		{"kernel is garbage", write("k", "garbage"), []string{"--kernel", "k", "true"}, 125, `\bk\b`, false},
		{"kernel is cut off", cutKernel, []string{"--kernel", "k", "--modules", "m", "true"}, 125, `\bk\b`, false},
		{"kernel is damaged", damageKernel, []string{"--kernel", "k", "--modules", "m", "true"}, 125, `.`, false},
		{"image is damaged", damageImage, []string{"--image", "broken", "true"}, 125, `damaged`, false},
		{"no QEMU", func(_ *testing.T, p *place) { p.env = append(p.env, "PATH=/nonexistent") }, []string{"true"}, 125, `qemu-system-x86_64 is not installed`, true},
		{"link that is not there", nil, []string{"--link", "pigeon", "true"}, 125, `unknown link "pigeon"`, false},
		{"unknown driver", nil, []string{"--driver", "bochs", "true"}, 125, `unknown driver "bochs"`, false},
		{"unknown accelerator", nil, []string{"--accel", "warp", "true"}, 125, `unknown accelerator "warp"`, false},
		{"home is a file", func(t *testing.T, p *place) {
			write("file", "x")(t, p)
			p.env = append(p.env, "IRONCLAW_HOME="+filepath.Join(p.dir, "file"))
		}, []string{"true"}, 125, `not a directory`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlace(t)
			if tt.prepare != nil {
				tt.prepare(t, p)
			}
			before := p.remains(t)
			p.fails(t, append([]string{"run"}, tt.args...), tt.code, tt.stderr, tt.hint)
			p.sameAs(t, before)
		})
	}
}

// fails runs the program and checks how it fails.
func (p *place) fails(t *testing.T, args []string, code int, pattern string, hint bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	var stderr bytes.Buffer
	cmd := p.command(ctx, args...)
	cmd.Stderr = &stderr
	err := cmd.Run()
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("exit code %d, not %d (%v)", got, code, err)
	}
	errorLines := regexp.MustCompile(`(?m)^error: .*$`).FindAllString(stderr.String(), -1)
	if len(errorLines) != 1 || !regexp.MustCompile(pattern).MatchString(errorLines[0]) {
		t.Errorf("not one error line that matches %q:\n%s", pattern, &stderr)
	}
	if got := strings.Contains(stderr.String(), "\nhint: "); hint && !got {
		t.Errorf("no hint:\n%s", &stderr)
	}
}

func mkdir(name string) func(*testing.T, *place) {
	return func(t *testing.T, p *place) {
		if err := os.Mkdir(filepath.Join(p.dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
}

func write(name, content string) func(*testing.T, *place) {
	return func(t *testing.T, p *place) {
		if err := os.WriteFile(filepath.Join(p.dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// kernelCopy puts the installed kernel, changed, at k and its modules at m.
func kernelCopy(t *testing.T, p *place, change func([]byte) []byte) {
	t.Helper()
	k, err := sandbox.Open(p.home()).Kernels.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(k.ELF)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(p.dir, "k"), change(b), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(k.Modules, filepath.Join(p.dir, "m")); err != nil {
		t.Fatal(err)
	}
}

func cutKernel(t *testing.T, p *place) {
	kernelCopy(t, p, func(b []byte) []byte { return b[:len(b)/3] })
}

// damageKernel makes the kernel's first code invalid: it starts and is lost.
func damageKernel(t *testing.T, p *place) {
	kernelCopy(t, p, func(b []byte) []byte {
		const text = 0x200000 // file offset of the first segment
		for i := text; i < text+(8<<20); i++ {
			if i%64 < 16 {
				b[i] = 0x0f
			}
		}
		return b
	})
}

// damageImage makes a store with one image, a byte of whose disk is wrong.
func damageImage(t *testing.T, p *place) {
	images := filepath.Join(p.home(), "images")
	real, err := filepath.EvalSymlinks(images)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(images); err != nil {
		t.Fatal(err)
	}
	img, err := sandbox.Open(filepath.Dir(real)).Images.Get(t.Context(), sandbox.DefaultImage)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := os.ReadFile(img.Path)
	if err != nil {
		t.Fatal(err)
	}
	disk[len(disk)/2] ^= 1
	record, err := os.ReadFile(filepath.Join(real, "names", "base.json"))
	if err != nil {
		t.Fatal(err)
	}
	record = bytes.Replace(record, []byte(`"base"`), []byte(`"broken"`), 1)
	for path, b := range map[string][]byte{
		filepath.Join(images, "disks", filepath.Base(img.Path)): disk,
		filepath.Join(images, "names", "broken.json"):           record,
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// A full disk is said, and nothing is broken by it.
func TestFullDisk(t *testing.T) {
	testenv.NeedRoot(t)
	p := newPlace(t)
	run := filepath.Join(p.home(), "run")
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", run, "tmpfs", 0, "size=16k"); err != nil {
		testenv.Skip(t, "needs to mount: "+err.Error())
	}
	defer syscall.Unmount(run, 0)
	if err := os.WriteFile(filepath.Join(run, "file"), make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	before := p.remains(t)
	p.fails(t, []string{"run", "true"}, 125, `no space left on device`, true)
	p.sameAs(t, before)
	if err := os.Remove(filepath.Join(run, "file")); err != nil {
		t.Fatal(err)
	}
	if out, err := p.command(t.Context(), "run", "echo", "again").CombinedOutput(); err != nil || string(out) != "again\n" {
		t.Errorf("with room again: %q, %v", out, err)
	}
}

// A name is one sandbox's at a time.
func TestNameInUse(t *testing.T) {
	p := newPlace(t)
	first := p.command(t.Context(), "run", "--name", "taken", "sh", "-c", "echo up; sleep 1000")
	out, err := first.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	out.Read(make([]byte, 3))
	p.fails(t, []string{"run", "--name", "taken", "true"}, 125, `name in use`, true)
	first.Process.Signal(syscall.SIGTERM)
	first.Wait()
}

// Ctrl-C ends a run at any moment, at once, with 130, and leaves nothing.
func TestInterruptAnyMoment(t *testing.T) {
	p := newPlace(t)
	before := p.remains(t)
	for _, after := range []time.Duration{0, 3, 10, 30, 60, 100, 200, 500, 1000, 1500, 2000, 2500, 3500} {
		after *= time.Millisecond
		t.Run(after.String(), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), runLimit)
			defer cancel()
			var stderr bytes.Buffer
			cmd := p.command(ctx, "run", "--accel", "tcg", "sleep", "1000")
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(after) // any moment: there is no event to wait for
			cmd.Process.Signal(os.Interrupt)
			cmd.Wait()
			ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
			early := ws.Signaled() && ws.Signal() == syscall.SIGINT // before main ran
			if code := cmd.ProcessState.ExitCode(); code != 130 && !early {
				t.Errorf("exit code %d: %s", code, &stderr)
			}
			p.sameAs(t, before)
		})
	}
}

// Whatever kills ironclaw, QEMU ends with it, and the next command removes the
// record and says so, once.
func TestKilledAnyMoment(t *testing.T) {
	p := newPlace(t)
	if out, err := p.command(t.Context(), "run", "true").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before := p.remains(t)
	for _, after := range []time.Duration{20, 100, 300, 1000, 2500} {
		after *= time.Millisecond
		cmd := p.command(t.Context(), "run", "--accel", "tcg", "sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after)
		cmd.Process.Kill()
		cmd.Wait()
		for end := time.Now().Add(10 * time.Second); len(p.processes(t)) > 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("after %v: QEMU lives on", after)
			}
		}
		out, err := p.command(t.Context(), "image", "ls").CombinedOutput()
		if err != nil {
			t.Errorf("%v: %s", err, out)
		}
		if after >= 100*time.Millisecond && !strings.Contains(string(out), "note: removed what was left of sandbox") {
			t.Errorf("after %v: %s", after, out)
		}
		if out, _ := p.command(t.Context(), "image", "ls").CombinedOutput(); strings.Contains(string(out), "note:") {
			t.Errorf("said twice: %s", out)
		}
		p.sameAs(t, before)
	}
}
