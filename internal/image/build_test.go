package image

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"

	"golang.org/x/sys/unix"
)

// fixedApt is a package manager whose answers are known.
type fixedApt struct{ err error }

func (a fixedApt) Update(context.Context) error { return a.err }

func (a fixedApt) Sources(context.Context) ([]string, error) {
	return []string{"deb [signed-by=/k.gpg] https://user:pw@example.invalid/d bookworm-updates main",
		"deb [signed-by=/k.gpg] https://user:pw@example.invalid/d bookworm main"}, nil
}

func (a fixedApt) ReleaseTime(context.Context) (time.Time, error) { return testEpoch, nil }

// scriptedBootstrap puts a mmdebstrap on the PATH that runs the shell script:
// what mmdebstrap does to us when it fails, hangs or lies. The real one is run
// by TestBuildBase. $ARCHIVE is the archive of a small system.
func scriptedBootstrap(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	check(t, os.Chmod(dir, 0o755))
	archive := filepath.Join(dir, "archive")
	check(t, os.WriteFile(archive, makeTar(t, system()), 0o644))
	text := "#!/bin/sh\nARCHIVE=" + archive + "\nif [ \"$1\" = --unshare-helper ]; then shift; exec \"$@\"; fi\n" + script
	check(t, os.WriteFile(filepath.Join(dir, "mmdebstrap"), []byte(text), 0o755))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	var lacking *PrerequisiteError
	if _, err := prerequisites(t.Context()); errors.As(err, &lacking) {
		testenv.Skip(t, lacking.Cause+": "+lacking.Remedy)
	}
}

func TestBuild(t *testing.T) {
	args := filepath.Join(t.TempDir(), "args")
	scriptedBootstrap(t, `
		printf '%s\n' "$@" "TMPDIR=$TMPDIR" "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH" "SECRET=$SECRET" >`+args+`
		cat >`+args+`.stdin
		echo "I: downloading packages with apt..." >&2
		mkdir "$TMPDIR/mmdebstrap.left"
		cat $ARCHIVE`)
	t.Setenv("SECRET", "token")
	s := testStore(t)
	var steps []string
	img, err := s.Build(t.Context(), BuildOptions{Name: "base", Packages: []string{"git", "curl", "git"}, Apt: fixedApt{},
		Progress: func(step string) { steps = append(steps, step) }})
	check(t, err)
	check(t, s.Verify(t.Context(), img))
	got, err := s.Get(t.Context(), "base")
	check(t, err)
	if got.Recipe.Suite != "bookworm" || got.Recipe.Distribution != "debian" || strings.Join(got.Recipe.Packages, " ") != "curl git" {
		t.Errorf("recipe %+v", got.Recipe)
	}
	if st, err := os.Stat(got.Path); err != nil || st.Mode().Perm() != 0o444 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	said, err := os.ReadFile(args)
	check(t, err)
	for _, want := range []string{"--include=curl,git\n", "\nbookworm\n-\n-\n", "SOURCE_DATE_EPOCH=1700000000\n", "SECRET=\n"} {
		if !strings.Contains(string(said), want) {
			t.Errorf("mmdebstrap got\n%s\nwant %q", said, want)
		}
	}
	if strings.Contains(string(said), "user:pw") {
		t.Errorf("the command line shows the password of the mirror:\n%s", said)
	}
	if stdin, _ := os.ReadFile(args + ".stdin"); strings.Count(string(stdin), "deb ") != 2 {
		t.Errorf("sources:\n%s", stdin)
	}
	if !strings.Contains(strings.Join(steps, "|"), "downloading packages|making the disk") {
		t.Errorf("steps %q", steps)
	}
	nothingLeft(t, s)
}

// nothingLeft fails when a build has left something behind.
func nothingLeft(t *testing.T, s *Store) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(s.dir, "builds", "*"))
	check(t, err)
	outside, err := filepath.Glob(filepath.Join(outsideDir(), outsidePrefix+"*"))
	check(t, err)
	for _, path := range outside {
		if owned(path) {
			left = append(left, path)
		}
	}
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBuildFails(t *testing.T) {
	for _, tt := range []struct{ name, script, want string }{
		{"says why", "echo 'I: starting' >&2; echo 'E: the mirror is on fire' >&2; exit 3", "the mirror is on fire"},
		{"says nothing", "exit 3", "exit status 3"},
		{"says too much", "yes error | head -c 9000000 >&2; echo last words >&2; exit 1", "last words"},
		{"unknown package", "echo 'E: Unable to locate package nosuch' >&2; exit 1", `bookworm has no package "nosuch"`},
		{"virtual package", "echo \"E: Package 'mail' has no installation candidate\" >&2; exit 1", `no package "mail"`},
		{"no archive", "exit 0", "is empty"},
		{"half an archive", "head -c 5000 $ARCHIVE", "in the middle"},
		{"disk full", "echo 'tar: No space left on device' >&2; exit 1", "is full"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			scriptedBootstrap(t, tt.script)
			s := testStore(t)
			addImage(t, s, "base", "old")
			_, err := s.Build(t.Context(), BuildOptions{Name: "base", Apt: fixedApt{}})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "build image base: ") {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
			if len(err.Error()) > 5000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			if _, err := s.Get(t.Context(), "base"); err != nil {
				t.Errorf("the image from before: %v", err)
			}
			nothingLeft(t, s)
		})
	}
}

// A cancelled build ends all that mmdebstrap has started.
func TestBuildCancelled(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	scriptedBootstrap(t, `
		trap 'echo "I: main() received signal TERM: waiting" >&2; exit 1' TERM
		echo 'I: extracting archives...' >&2
		sleep 1000 & echo $! >`+pid+`; wait`)
	s := testStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	start := time.Now()
	_, err := s.Build(ctx, BuildOptions{Name: "base", Apt: fixedApt{}, Progress: func(step string) {
		if step == "unpacking the base system" {
			time.AfterFunc(200*time.Millisecond, cancel)
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if took := time.Since(start); took > stopGrace/2 {
		t.Errorf("it took %v to stop", took)
	}
	b, err := os.ReadFile(pid)
	check(t, err)
	if _, err := os.Stat("/proc/" + strings.TrimSpace(string(b)) + "/exe"); err == nil {
		t.Errorf("process %s still runs", b)
	}
	nothingLeft(t, s)
}

// What a killed build left is removed by the next one; one at work is not.
func TestLeftovers(t *testing.T) {
	scriptedBootstrap(t, "cat $ARCHIVE")
	s := testStore(t)
	killed, err := s.newWorkspace(t.Context(), "root")
	check(t, err)
	check(t, os.MkdirAll(filepath.Join(killed.tmp, "mmdebstrap.x/usr"), 0o755))
	outside := filepath.Join(outsideDir(), outsidePrefix+filepath.Base(killed.dir))
	check(t, os.Mkdir(outside, 0o711))
	check(t, os.WriteFile(filepath.Join(killed.dir, outsideFile), []byte(outside), 0o600))
	killed.lock.Close() // as the kernel does
	atWork, err := s.newWorkspace(t.Context(), "root")
	check(t, err)
	for _, gone := range []string{killed.dir, outside} {
		if _, err := os.Stat(gone); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", gone, err)
		}
	}
	_, err = s.Build(t.Context(), BuildOptions{Name: "base", Apt: fixedApt{}})
	check(t, err)
	if _, err := os.Stat(atWork.tmp); err != nil {
		t.Errorf("a build at work lost its directory: %v", err)
	}
	check(t, atWork.close(t.Context()))
	nothingLeft(t, s)
}

// The file in a workspace says what to delete, so it must not be believed.
func TestLeftoversElsewhere(t *testing.T) {
	s := testStore(t)
	w, err := s.newWorkspace(t.Context(), "root")
	check(t, err)
	precious := t.TempDir()
	check(t, os.WriteFile(filepath.Join(w.dir, outsideFile), []byte(precious), 0o600))
	check(t, w.close(t.Context()))
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("it removed %s", precious)
	}
}

func TestBuildOptions(t *testing.T) {
	for _, tt := range []struct {
		opts BuildOptions
		want string
	}{
		{BuildOptions{Name: "../x", Apt: fixedApt{}}, "not a name"},
		{BuildOptions{Name: "", Apt: fixedApt{}}, "not a name"},
		{BuildOptions{Name: "x"}, "no package manager"},
		{BuildOptions{Name: "x", Apt: fixedApt{errors.New("archive unreachable")}}, "archive unreachable"},
	} {
		if tt.want == "archive unreachable" {
			scriptedBootstrap(t, "cat $ARCHIVE")
		}
		if _, err := testStore(t).Build(t.Context(), tt.opts); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.opts, err, tt.want)
		}
	}
	for _, p := range []string{"", "-y", "--simulate", "curl-", "a,b", "a b", "?essential", "./x.deb", "/x.deb", "cu*", "~n", "a;b", "A", strings.Repeat("a", 999)} {
		if _, err := (BuildOptions{Name: "x", Apt: fixedApt{}, Packages: []string{p}}).complete(); err == nil {
			t.Errorf("package %q is accepted", p)
		}
	}
	for _, p := range []string{"g++", "python3.11", "libc6:i386", "curl=7.88.1-10+deb12u5"} {
		if _, err := (BuildOptions{Name: "x", Apt: fixedApt{}, Packages: []string{p}}).complete(); err != nil {
			t.Errorf("package %q: %v", p, err)
		}
	}
}

func TestMainSuite(t *testing.T) {
	for _, tt := range []struct{ lines, want string }{
		{"deb [a=b c=d] https://x y-security main|deb https://x y main", "y"},
		{"deb https://x/ stable/updates main", "stable/updates"},
		{"deb https://x", ""},
		{"", ""},
		{"deb https://x --mode=root main", ""},
		{"deb https://x y main\ndeb https://z z main", ""},
	} {
		got, err := mainSuite(strings.Split(tt.lines, "|"))
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%q: %q, %v", tt.lines, got, err)
		}
	}
}

func TestDiskFull(t *testing.T) {
	var lacking *PrerequisiteError
	if err := explainFull(&os.PathError{Op: "write", Path: "/x", Err: unix.ENOSPC}, "/x"); !errors.As(err, &lacking) || lacking.Remedy == "" {
		t.Errorf("got %v", err)
	}
	other := errors.New("other")
	if err := explainFull(other, "/x"); err != other {
		t.Errorf("got %v", err)
	}
}
