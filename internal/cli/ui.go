package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/image"
	"github.com/ironclaw-run/ironclaw/internal/state"
	"github.com/ironclaw-run/ironclaw/internal/template"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// The rules of what people see. Everything the program says of itself goes to
// stderr; stdout is the command's, or the answer that was asked for.
//
//   - Success is silent.
//   - A failure is one line "error: <cause>", with "console: " lines of the
//     guest where they tell more, then a line "hint: <remedy>" where there is one.
//   - Something worth knowing that is no failure is one line "note: ".
//   - Long work shows itself on a terminal and is silent elsewhere.
//   - Nothing from a guest reaches the terminal in our name unfiltered.
//
// Exit codes: those of the command; 124 it timed out; 125 we failed; 126 it
// cannot be executed; 127 it was not found; 128+n it, or we, were ended by
// signal n. Other verbs: 0, or 125.
const (
	exitTimeout     = 124
	exitFailure     = 125
	exitNotRunnable = 126
	exitNotFound    = 127
	exitSignal      = 128
)

// ui writes to stderr.
type ui struct {
	w   io.Writer
	tty bool

	mu       sync.Mutex // guards the rest, and whole lines
	raw      bool       // the terminal does not turn "\n" into a new line
	step     string     // of the progress line that is shown
	begun    time.Time
	stopTick chan struct{}
	ticking  sync.WaitGroup
}

func newUI(w io.Writer) *ui {
	f, ok := w.(*os.File)
	kind := os.Getenv("TERM")
	return &ui{w: w, tty: ok && term.IsTerminal(int(f.Fd())) && kind != "" && kind != "dumb"}
}

// progress shows what is being done, with the seconds it has taken so far. An
// empty step ends the display.
func (u *ui) progress(step string) {
	if !u.tty {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.endStep()
	if step == "" {
		return
	}
	u.step, u.begun = step, time.Now()
	u.draw()
	stop := make(chan struct{})
	u.stopTick = stop
	u.ticking.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				u.mu.Lock()
				if u.stopTick == stop {
					u.draw()
				}
				u.mu.Unlock()
			}
		}
	})
}

func (u *ui) draw() {
	line := "* " + u.step
	if s := int(time.Since(u.begun).Seconds()); s > 0 {
		line += fmt.Sprintf(" (%d s)", s)
	}
	fmt.Fprintf(u.w, "\r\x1b[K%s", line)
}

// endStep takes the progress line away. u.mu is held.
func (u *ui) endStep() {
	if u.stopTick != nil {
		close(u.stopTick)
		u.stopTick = nil
		fmt.Fprint(u.w, "\r\x1b[K")
	}
}

// line writes one line of our own.
func (u *ui) line(prefix, text string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.endStep()
	text = strings.ReplaceAll(strings.TrimSpace(vm.Printable([]byte(text))), "\n", "; ")
	end := "\n"
	if u.raw {
		end = "\r\n"
	}
	fmt.Fprintf(u.w, "%s%s%s", prefix, text, end)
}

// setRaw says that our terminal is in raw mode, or no longer is.
func (u *ui) setRaw(raw bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.raw = raw && u.tty
}

func (u *ui) note(format string, args ...any) { u.line("note: ", fmt.Sprintf(format, args...)) }

// failure says what went wrong and how to mend it.
func (u *ui) failure(err error) {
	u.progress("")
	u.line("error: ", err.Error())
	var exit *vm.ExitError
	if errors.As(err, &exit) {
		for _, l := range consoleLines(exit.Console, 8) {
			u.line("console: ", l)
		}
		if exit.Stderr != "" {
			u.line("qemu: ", exit.Stderr)
		}
	}
	if h := hint(err); h != "" {
		u.line("hint: ", h)
	}
}

// consoleLines picks n lines of a console's end: the first ones of a panic, which
// tell most, otherwise the last.
func consoleLines(s string, n int) []string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	switch {
	case len(lines) == 1 && lines[0] == "":
		return nil
	case strings.HasPrefix(lines[0], "Kernel panic"):
		return lines[:min(n, len(lines))]
	}
	return lines[max(0, len(lines)-n):]
}

// interruptedError is the end that a signal to us asked for.
type interruptedError struct{ sig syscall.Signal }

func (e *interruptedError) Error() string { return "interrupted by signal: " + e.sig.String() }

// timeoutError is the end of a command that took too long.
type timeoutError struct{ after time.Duration }

func (e *timeoutError) Error() string { return fmt.Sprintf("the command timed out after %v", e.after) }

// usageError is a mistake on the command line.
type usageError struct {
	err  error
	verb string
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// exitCode is the one place where errors become exit codes.
func exitCode(err error) int {
	var interrupted *interruptedError
	var timeout *timeoutError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &interrupted):
		return exitSignal + int(interrupted.sig)
	case errors.As(err, &timeout):
		return exitTimeout
	case errors.Is(err, guestrpc.ErrNotFound):
		return exitNotFound
	case errors.Is(err, guestrpc.ErrNotRunnable):
		return exitNotRunnable
	}
	return exitFailure
}

// hint is the one place where errors get their remedies.
func hint(err error) string {
	var (
		usage    *usageError
		remedied interface{ Hint() string }
		exit     *vm.ExitError
	)
	switch {
	case errors.As(err, &usage):
		return "see `" + strings.Join(append(strings.Fields("ironclaw "+usage.verb), "--help"), " ") + "`"
	case errors.As(err, &remedied) && remedied.Hint() != "":
		return remedied.Hint()
	case errors.Is(err, image.ErrNotFound):
		return "`ironclaw image ls` shows what there is, `ironclaw image build NAME` makes one"
	case errors.Is(err, template.ErrNotFound):
		return "`ironclaw template ls` shows what there is"
	case errors.Is(err, image.ErrInUse):
		return "wait until the sandboxes that use it have ended"
	case errors.Is(err, state.ErrNameInUse):
		return "choose another --name"
	case errors.Is(err, guestrpc.ErrNoUser):
		return "the image's /etc/passwd and /etc/group tell which users and groups there are; a number always works"
	case errors.Is(err, syscall.ENOSPC):
		return "make room, or set IRONCLAW_HOME to a directory on another disk"
	case errors.As(err, &exit) && strings.Contains(exit.Console, "memory"):
		return "give the machine more memory with --memory"
	case errors.As(err, &exit):
		return "run it again; `ironclaw doctor` checks this host"
	case errors.Is(err, fs.ErrPermission):
		return "`ironclaw doctor` tells what this user lacks"
	case errors.Is(err, context.DeadlineExceeded):
		return "the host may be overloaded; `ironclaw doctor` checks it"
	}
	return ""
}
