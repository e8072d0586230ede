package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// fakeProcess is a command that does what it is told, or is deaf.
type fakeProcess struct {
	done    chan struct{}
	exit    sandbox.Exit
	err     error
	signals chan syscall.Signal // those that came to the group
	deaf    chan struct{}       // not nil: Signal blocks until it is closed
	onKill  func()
}

func newProcess() *fakeProcess {
	return &fakeProcess{done: make(chan struct{}), signals: make(chan syscall.Signal, 10)}
}

func (p *fakeProcess) Done() <-chan struct{}                      { return p.done }
func (p *fakeProcess) Wait(context.Context) (sandbox.Exit, error) { return p.exit, p.err }
func (p *fakeProcess) Resize(guestrpc.Resize) error               { return nil }
func (p *fakeProcess) Signal(sig syscall.Signal, group bool) error {
	if p.deaf != nil {
		<-p.deaf
		return errors.New("hung up")
	}
	if group {
		p.signals <- sig
	}
	if sig == syscall.SIGKILL && p.onKill != nil {
		p.onKill()
	}
	return nil
}

type fakeMachine struct {
	vm.Machine
	done chan struct{}
	err  error
}

func (m *fakeMachine) Done() <-chan struct{} { return m.done }
func (m *fakeMachine) Err() error            { return m.err }

func newRunner(f runFlags) (*runner, *bytes.Buffer) {
	var stderr bytes.Buffer
	f.opts.Memory = 256 << 20
	return &runner{app: &app{ui: newUI(&stderr)}, flags: &f, begun: time.Now()}, &stderr
}

func TestExitPassesThrough(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		exit   sandbox.Exit
		err    error
		code   int
		stderr string
	}{
		"success": {sandbox.Exit{}, nil, 0, ""},
		"code":    {sandbox.Exit{Code: 255}, nil, 255, ""},
		"signal":  {sandbox.Exit{Code: 7, Signal: 15}, nil, 143, ""},
		"error":   {sandbox.Exit{Code: 7}, broken, 0, ""},
		"out of memory": {sandbox.Exit{Signal: 9, OOM: true}, nil, 137,
			"error: the command ran out of memory (the machine has 256 MiB)\nhint: give it more with --memory\n"},
	} {
		t.Run(name, func(t *testing.T) {
			r, stderr := newRunner(runFlags{})
			p := newProcess()
			p.exit, p.err = c.exit, c.err
			close(p.done)
			err := r.supervise(t.Context(), p, &fakeMachine{}, nil)
			if !errors.Is(err, c.err) || r.app.code != c.code || r.ended != (c.err == nil) || stderr.String() != c.stderr {
				t.Errorf("%v, code %d, ended %v, stderr %q", err, r.app.code, r.ended, stderr)
			}
		})
	}
}

// A command that took too long is killed as a group; its last output still
// comes, and its exit code does not count.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRunner(runFlags{timeout: time.Minute})
		p := newProcess()
		p.exit.Signal = 9
		p.onKill = func() { close(p.done) }
		err := r.supervise(t.Context(), p, &fakeMachine{}, nil)
		if exitCode(err) != 124 || err.Error() != "the command timed out after 1m0s" || <-p.signals != syscall.SIGKILL {
			t.Errorf("error %v", err)
		}
	})
}

// A guest that has stopped listening must not outlast the timeout.
func TestTimeoutOfDeafGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRunner(runFlags{timeout: time.Minute})
		p := newProcess()
		p.deaf = make(chan struct{})
		defer close(p.deaf)
		if err := r.supervise(t.Context(), p, &fakeMachine{}, nil); exitCode(err) != 124 {
			t.Errorf("error %v", err)
		}
	})
}

// Nor the second Ctrl-C.
func TestSecondInterruptOfDeafGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRunner(runFlags{})
		p := newProcess()
		p.deaf = make(chan struct{})
		defer close(p.deaf)
		signals := make(chan os.Signal, 2)
		signals <- syscall.SIGINT
		signals <- syscall.SIGINT
		if err := r.supervise(t.Context(), p, &fakeMachine{}, signals); exitCode(err) != 130 {
			t.Errorf("error %v", err)
		}
	})
}

// Signals go to the command's group, and are its business.
func TestSignalsPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRunner(runFlags{})
		p := newProcess()
		signals := make(chan os.Signal)
		go func() {
			for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
				signals <- s
				if got := <-p.signals; got != s {
					t.Errorf("%v came as %v", s, got)
				}
			}
			close(p.done)
		}()
		if err := r.supervise(t.Context(), p, &fakeMachine{}, signals); err != nil {
			t.Errorf("error %v", err)
		}
	})
}

// A signal that came while the command was being started is not lost.
func TestSignalCrossesStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRunner(runFlags{})
		p := newProcess()
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(&interruptedError{syscall.SIGTERM})
		go func() {
			if got := <-p.signals; got != syscall.SIGTERM {
				t.Errorf("%v came", got)
			}
			close(p.done)
		}()
		if err := r.supervise(ctx, p, &fakeMachine{}, nil); err != nil {
			t.Errorf("error %v", err)
		}
	})
}

// A machine that dies ends the run although the command's output is stuck.
func TestMachineDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRunner(runFlags{})
		m := &fakeMachine{done: make(chan struct{}), err: &vm.ExitError{Reason: "killed"}}
		close(m.done)
		if err := r.supervise(t.Context(), newProcess(), m, nil); !errors.Is(err, m.err) {
			t.Errorf("error %v", err)
		}
	})
}

// The shape of --json is an interface: fields may be added and none renamed.
func TestRunJSON(t *testing.T) {
	r, stderr := newRunner(runFlags{json: true})
	r.phases = []sandbox.Phase{{Name: "boot", Duration: 1500 * time.Microsecond}}
	r.exit = sandbox.Exit{Signal: 9, OOM: true, User: time.Millisecond, System: 2 * time.Millisecond}
	r.ended, r.app.code = true, 137
	r.report(nil)
	wantClean(t, stderr.String(), 1)
	var got map[string]any
	if err := json.Unmarshal(stderr.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if total, ok := got["total_ms"].(float64); !ok || total < 0 {
		t.Errorf("total %v", got["total_ms"])
	}
	delete(got, "total_ms")
	want := map[string]any{
		"exit_code": 137.0, "signal": 9.0, "oom": true, "timed_out": false, "cpu_ms": 3.0,
		"timings_ms": map[string]any{"boot": 1.5}, "guest_ms": map[string]any{}, "vmm_ms": map[string]any{}, "cloned": false,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

func TestRunJSONError(t *testing.T) {
	for name, c := range map[string]struct {
		err error
		to  bool
	}{
		"timeout": {&timeoutError{time.Second}, true},
		"other":   {errors.New("x"), false},
	} {
		r, stderr := newRunner(runFlags{json: true})
		r.app.code = exitCode(c.err)
		r.report(c.err)
		var got runResult
		if err := json.Unmarshal(stderr.Bytes(), &got); err != nil || got.TimedOut != c.to || got.Error != c.err.Error() || got.Code != r.app.code {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	// A command's own 124 is no timeout of ours.
	r, stderr := newRunner(runFlags{json: true})
	r.app.code, r.ended, r.exit = 124, true, sandbox.Exit{Code: 124}
	r.report(nil)
	if strings.Contains(stderr.String(), `"timed_out":true`) {
		t.Errorf("%s", stderr)
	}
}

// JSON is read by programs and seen by people: nothing in it moves a terminal,
// and it is one line.
func TestRunJSONIsFiltered(t *testing.T) {
	for name, text := range hostileTexts {
		t.Run(name, func(t *testing.T) {
			r, stderr := newRunner(runFlags{json: true})
			r.report(errors.New(text))
			wantClean(t, stderr.String(), 1)
			if !json.Valid(stderr.Bytes()) {
				t.Errorf("no JSON: %q", stderr)
			}
		})
	}
}

// run runs the program as a person does, without programs to be found.
func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	t.Setenv("IRONCLAW_HOME", t.TempDir())
	t.Setenv("PATH", t.TempDir())
	var out, err bytes.Buffer
	code = Main(args, os.Stdin, &out, &err)
	return code, out.String(), err.String()
}

func TestDoctorJSON(t *testing.T) {
	code, stdout, stderr := run(t, "doctor", "--json")
	var got struct {
		Healthy *bool            `json:"healthy"`
		Checks  []map[string]any `json:"checks"`
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || got.Healthy == nil || *got.Healthy || code != 1 || stderr != "" {
		t.Fatalf("code %d, stderr %q, %v:\n%s", code, stderr, err, stdout)
	}
	for _, c := range got.Checks {
		if !slices.Contains([]any{"ok", "limited", "missing"}, c["status"]) || c["name"] == "" || c["detail"] == nil {
			t.Errorf("check %v", c)
		}
	}
}

// A list of nothing is an empty list for a program.
func TestEmptyImageList(t *testing.T) {
	if code, stdout, stderr := run(t, "image", "ls", "--json"); code != 0 || stdout != "[]\n" || stderr != "" {
		t.Errorf("code %d, %q, %q", code, stdout, stderr)
	}
}

// A mistake is one line, one hint, and 125, whatever was typed.
func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{
		{"\x1b[2J\nhint: x"}, {"run"}, {"run", "--\x1b[2Jx\n"}, {"run", "--memory", "\x1b\n1", "true"}, {"run", "-e", "a b\n\x1b=1", "true"},
		{"bench", "-n", "0"}, {"image", "rm"},
	} {
		code, stdout, stderr := run(t, args...)
		if code != 125 || stdout != "" {
			t.Errorf("%q: code %d, stdout %q", args, code, stdout)
		}
		if !strings.HasPrefix(stderr, "error: ") {
			t.Errorf("%q: %q", args, stderr)
		}
		wantClean(t, stderr, strings.Count(stderr, "\n"))
		if n := strings.Count(stderr, "\n"); n > 2 || n == 2 && !strings.Contains(stderr, "\nhint: see `ironclaw") {
			t.Errorf("%q: %q", args, stderr)
		}
	}
}
