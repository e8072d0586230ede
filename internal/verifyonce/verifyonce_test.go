package verifyonce

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// bench is two files, a memo, and how often the files were checked.
type bench struct {
	t      *testing.T
	paths  []string
	memo   string
	checks int
	during func() // what happens while they are checked
	err    error
}

func newBench(t *testing.T) *bench {
	dir := t.TempDir()
	b := &bench{t: t, paths: []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}, memo: filepath.Join(dir, "memo"), during: func() {}}
	for _, p := range b.paths {
		check(t, os.WriteFile(p, []byte("content"), 0o600))
	}
	return b
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (b *bench) run(ctx context.Context) error {
	b.t.Helper()
	var files []*os.File
	for _, p := range b.paths {
		f, err := os.Open(p)
		check(b.t, err)
		defer f.Close()
		files = append(files, f)
	}
	return Files(ctx, b.memo, func(context.Context) error {
		b.checks++
		b.during()
		return b.err
	}, files...)
}

// want runs it and says whether the files were to be checked.
func (b *bench) want(checked bool) {
	b.t.Helper()
	before := b.checks
	check(b.t, b.run(b.t.Context()))
	if got := b.checks > before; got != checked {
		b.t.Errorf("checked: %t, want %t", got, checked)
	}
}

func TestOnce(t *testing.T) {
	b := newBench(t)
	b.want(true)
	b.want(false)
	b.want(false)
	b.paths[0], b.paths[1] = b.paths[1], b.paths[0]
	b.want(true) // the one is not the other
}

// Whatever happens to a file or to the memo, the files are checked again.
func TestAgain(t *testing.T) {
	edit := func(b *bench, old, with string) {
		raw, err := os.ReadFile(b.memo)
		check(t, err)
		if !strings.Contains(string(raw), old) {
			t.Fatalf("no %q in %s", old, raw)
		}
		check(t, os.WriteFile(b.memo, []byte(strings.Replace(string(raw), old, with, 1)), 0o644))
	}
	for name, spoil := range map[string]func(b *bench){
		"written":           func(b *bench) { check(t, os.WriteFile(b.paths[1], []byte("CONTENT"), 0o600)) },
		"longer":            func(b *bench) { check(t, os.Truncate(b.paths[0], 100)) },
		"mode":              func(b *bench) { check(t, os.Chmod(b.paths[0], 0o644)) },
		"boot":              func(b *bench) { edit(b, `"boot_id":"`, `"boot_id":"x`) },
		"garbage":           func(b *bench) { check(t, os.WriteFile(b.memo, []byte("\x00{"), 0o644)) },
		"nothing":           func(b *bench) { check(t, os.Truncate(b.memo, 0)) },
		"gone":              func(b *bench) { check(t, os.Remove(b.memo)) },
		"one file only":     func(b *bench) { edit(b, "},{", "}],\"x\":[{") },
		"others may write":  func(b *bench) { check(t, os.Chmod(b.memo, 0o666)) },
		"group may write":   func(b *bench) { check(t, os.Chmod(b.memo, 0o664)) },
		"endless":           func(b *bench) { edit(b, "}]}", "}]}"+strings.Repeat(" ", maxMemo)) },
		"another size":      func(b *bench) { edit(b, `"size":7`, `"size":8`) },
		"replaced, as long": func(b *bench) { replace(t, b.paths[0]) },
		"old times put back": func(b *bench) {
			st, err := os.Stat(b.paths[0])
			check(t, err)
			check(t, os.WriteFile(b.paths[0], []byte("CONTENT"), 0o600))
			check(t, os.Chtimes(b.paths[0], st.ModTime(), st.ModTime()))
		},
		"link": func(b *bench) {
			check(t, os.Rename(b.memo, b.memo+"2"))
			check(t, os.Symlink(b.memo+"2", b.memo))
		},
		"fifo": func(b *bench) {
			check(t, os.Remove(b.memo))
			check(t, unix.Mkfifo(b.memo, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.want(true)
			spoil(b)
			b.want(true)
			b.want(false)
		})
	}
}

func replace(t *testing.T, path string) {
	st, err := os.Stat(path)
	check(t, err)
	check(t, os.WriteFile(path+"2", []byte("CONTENT"), 0o600))
	check(t, os.Chtimes(path+"2", st.ModTime(), st.ModTime()))
	check(t, os.Rename(path+"2", path))
}

// Who has no say about the files writes no memo for them, and the owner of the
// files may.
func TestMemoOfAnother(t *testing.T) {
	testenv.NeedRoot(t)
	b := newBench(t)
	b.want(true)
	check(t, os.Chown(b.memo, 4242, 4242))
	b.want(true)
	for _, p := range b.paths {
		check(t, os.Chown(p, 4242, 4242))
	}
	b.want(true)
	check(t, os.Chown(b.memo, 4242, 4242))
	b.want(false)
}

// A write in the same tick of the clock as the one before must not be missed.
func TestWrittenAtOnce(t *testing.T) {
	b := newBench(t)
	for range 30 {
		check(t, os.WriteFile(b.paths[0], []byte("CONTENT"), 0o600))
		b.want(true)
		check(t, os.WriteFile(b.paths[0], []byte("content"), 0o600))
		b.want(true)
	}
}

func TestChangedMeanwhile(t *testing.T) {
	b := newBench(t)
	b.during = func() { check(t, os.WriteFile(b.paths[1], []byte("CONTENT"), 0o600)) }
	err := b.run(t.Context())
	if changed, ok := errors.AsType[*ChangedError](err); !ok || changed.Path != b.paths[1] {
		t.Errorf("%v", err)
	}
	b.during = func() {}
	b.want(true) // it remembered nothing
}

func TestFailedCheck(t *testing.T) {
	b := newBench(t)
	b.err = errors.New("bad")
	if err := b.run(t.Context()); !errors.Is(err, b.err) {
		t.Errorf("%v", err)
	}
	b.err = nil
	b.want(true)
	// Without a memo, each time.
	b.memo = ""
	b.want(true)
	b.want(true)
	b.memo = filepath.Join(t.TempDir(), "absent", "memo")
	b.want(true)
	b.want(true)
}

// The wait for a young file ends with the context, and no check is made.
func TestCancelled(t *testing.T) {
	b := newBench(t)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	for _, p := range b.paths {
		check(t, os.Chtimes(p, time.Now(), time.Now()))
	}
	if err := b.run(ctx); !errors.Is(err, cause) || b.checks != 0 {
		t.Errorf("%v after %d checks", err, b.checks)
	}
}
