package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// runFlags are the flags of run as typed.
type runFlags struct {
	opts    sandbox.Options
	memory  string
	disk    string
	env     []string
	envFile []string
	workdir string
	user    string
	stdin   bool
	tty     bool
	timeout time.Duration
	require []string
	verbose bool
	json    bool
	without []string
}

const runLong = `Run a command in a new micro-VM, which is gone when the command ends.

The machine has its own kernel, a read-only root disk with a writable overlay in
memory, and no network device. The command's output and exit code are passed
through. Exit codes of ironclaw's own: 124 the command timed out, 125 ironclaw
failed, 126 the command cannot be executed, 127 it was not found, 128+n it was
ended by signal n.`

func (a *app) runCommand(signals chan os.Signal) *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run [flags] [--] CMD [ARG...]",
		Short: "Run a command in a new micro-VM",
		Long:  runLong,
		Example: `  ironclaw run -- uname -a
  ironclaw run -i -- python3 -c 'import sys; print(len(sys.stdin.read()))' < README.md
  ironclaw run -it -- bash`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, argv []string) error {
			return a.run(cmd.Context(), &f, argv, signals)
		},
	}
	fl := cmd.Flags()
	fl.SetInterspersed(false)
	fl.StringVar(&f.opts.Image, "image", sandbox.DefaultImage, "image of the root disk: a name or digest")
	fl.IntVar(&f.opts.CPUs, "cpus", 1, "virtual processors")
	fl.StringVarP(&f.memory, "memory", "m", "256M", "memory of the machine")
	fl.StringVar(&f.disk, "disk", "", "size of the writable overlay, part of the memory (default half of it)")
	fl.IntVar(&f.opts.Pids, "pids", sandbox.DefaultPids, "processes and threads at once")
	fl.DurationVar(&f.timeout, "timeout", 0, "end the command after this time (90s, 5m)")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "KEY=VALUE, or KEY to pass on ours")
	fl.StringArrayVar(&f.envFile, "env-file", nil, "file of such lines")
	fl.StringVarP(&f.workdir, "workdir", "w", "", "working directory (default the user's home)")
	fl.StringVarP(&f.user, "user", "u", guestrpc.DefaultUser, "user[:group] in the guest, names or numbers")
	fl.BoolVarP(&f.stdin, "interactive", "i", false, "forward standard input")
	fl.BoolVarP(&f.tty, "tty", "t", false, "give the command a terminal")
	fl.StringVar(&f.opts.Name, "name", "", "name of the sandbox, also its host name")
	fl.StringVar(&f.opts.Driver, "driver", "auto", "auto or qemu")
	fl.StringVar(&f.opts.Accel, "accel", "auto", "auto, kvm or tcg (software emulation)")
	fl.StringVar(&f.opts.Link, "link", "auto", "auto, vsock or serial")
	fl.StringVar(&f.opts.Kernel, "kernel", "", "kernel image to boot: a bzImage or ELF file")
	fl.StringVar(&f.opts.Modules, "modules", "", "directory with the modules of --kernel (default /lib/modules/RELEASE)")
	fl.StringSliceVar(&f.require, "require", nil, "let nothing else stand in for this layer of isolation")
	fl.BoolVar(&f.opts.Cold, "cold", false, "boot the machine: neither use a template nor keep one")
	fl.BoolVar(&f.opts.ASLR, "aslr", false, "randomise addresses in the guest also where emulation makes that slow")
	fl.StringVar(&f.opts.Seccomp, "seccomp", "", "system calls of the command: default, strict, or permissive (refuse nothing, note it)")
	fl.StringSliceVar(&f.without, "without", nil, "go without this layer of isolation, knowingly (see docs/security.md)")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "say what is happening and how long it takes")
	fl.BoolVar(&f.json, "json", false, "result and timings as JSON, the last line of stderr")
	return cmd
}

// complete turns flags into options and a command.
func (f *runFlags) complete(argv []string) (sandbox.Cmd, error) {
	bad := func(flag string, err error) error {
		return &usageError{fmt.Errorf("--%s: %w", flag, err), "run "}
	}
	cmd := sandbox.Cmd{Args: argv, Dir: f.workdir, User: f.user} // what it leaves running ends with the machine
	var err error
	if f.opts.Memory, err = parseSize(f.memory); err != nil {
		return cmd, bad("memory", err)
	}
	if f.disk != "" {
		if f.opts.Overlay, err = parseSize(f.disk); err != nil {
			return cmd, bad("disk", err)
		}
	}
	if f.opts.Pids < 1 {
		return cmd, bad("pids", errors.New("at least 1 process is needed"))
	}
	if f.timeout < 0 {
		return cmd, bad("timeout", fmt.Errorf("%v is negative", f.timeout))
	}
	if f.workdir != "" && !path.IsAbs(f.workdir) {
		return cmd, bad("workdir", fmt.Errorf("%q is not absolute", f.workdir))
	}
	if f.opts.Require, err = layer.ParseSet(f.require); err != nil {
		return cmd, bad("require", err)
	}
	if cmd.Env, err = environment(f.env, f.envFile); err != nil {
		return cmd, &usageError{err, "run "}
	}
	if f.opts.Without, err = layer.ParseSet(f.without); err != nil {
		return cmd, bad("without", err)
	}
	if s := f.opts.Seccomp; s != "" && !slices.Contains(guestrpc.Profiles(), s) {
		return cmd, bad("seccomp", fmt.Errorf("no profile is called %q: there are %s", s, strings.Join(guestrpc.Profiles(), ", ")))
	}
	f.opts.Command = argv
	return cmd, nil
}

// parseSize reads 512M, 1g, 1073741824: whole MiB, as machines have.
func parseSize(s string) (int64, error) {
	n, err := units.RAMInBytes(s)
	const mib = 1 << 20
	if err != nil || n <= 0 || n > math.MaxInt64-mib {
		return 0, fmt.Errorf("bad size %q: a number with K, M or G is wanted, such as 512M", s)
	}
	return (n + mib - 1) / mib * mib, nil
}

// run is the verb: a sandbox, one command in it, its exit code.
func (a *app) run(ctx context.Context, f *runFlags, argv []string, signals chan os.Signal) error {
	cmd, err := f.complete(argv)
	if err != nil {
		return err
	}
	r := &runner{app: a, flags: f, begun: time.Now()}
	r.stdout = &firstWrite{w: a.stdout}
	r.stderr = &firstWrite{w: a.ui.w}
	cmd.Stdout, cmd.Stderr = r.stdout, r.stderr
	if f.stdin {
		cmd.Stdin = a.stdin
	}
	err = r.run(ctx, cmd, signals)
	if err != nil {
		err = r.interrupted(ctx, err)
		a.ui.failure(err)
		a.code = exitCode(err)
		err = &saidError{err}
	}
	r.report(err)
	return err
}

// runner is the state of one run.
type runner struct {
	app    *app
	flags  *runFlags
	begun  time.Time
	stdout *firstWrite
	stderr *firstWrite

	sandbox    *sandbox.Sandbox
	created    time.Time // when its guest had answered hello
	started    time.Time // when the command had been started
	exit       sandbox.Exit
	interrupts int  // Ctrl-C so far
	ended      bool // the command ran and exit is its end
	phases     []sandbox.Phase
}

// phase notes a phase that has ended, and says so under -v.
func (r *runner) phase(p sandbox.Phase) {
	r.phases = append(r.phases, p)
	if r.flags.verbose {
		r.app.ui.line("", fmt.Sprintf("%-14s %8.1f ms", p.Name, ms(p.Duration)))
	}
}

// note says under -v what went otherwise than it should and was mended.
func (r *runner) note(what string) {
	if r.flags.verbose {
		r.app.ui.line("note: ", what)
	}
}

func (r *runner) phaseSince(name string, begun time.Time) {
	r.phase(sandbox.Phase{Name: name, Duration: time.Since(begun)})
}

func (r *runner) run(ctx context.Context, cmd sandbox.Cmd, signals chan os.Signal) error {
	if r.flags.tty {
		size, err := r.app.terminalSize()
		if err != nil {
			return err
		}
		cmd.TTY = size
		if kind := os.Getenv("TERM"); kind != "" {
			cmd.Env = append([]string{"TERM=" + kind}, cmd.Env...)
		}
	}
	h, err := r.app.host()
	if err != nil {
		return err
	}
	r.flags.opts.Progress = r.app.ui.progress
	r.flags.opts.OnPhase = r.phase
	r.flags.opts.Note = r.note
	r.sandbox, err = h.Create(ctx, r.flags.opts)
	r.app.ui.progress("")
	if err != nil {
		return err
	}
	r.created = time.Now()
	defer func() {
		t := time.Now()
		r.sandbox.Close()
		r.phaseSince("close", t)
	}()
	return r.command(ctx, cmd, signals)
}

// command runs the command to its end.
func (r *runner) command(ctx context.Context, cmd sandbox.Cmd, signals chan os.Signal) error {
	if r.flags.tty && r.flags.stdin { // without -i nobody would read a Ctrl-C
		restore, err := r.app.rawTerminal()
		if err != nil {
			return err
		}
		defer restore()
	}
	t := time.Now()
	p, err := r.sandbox.Start(ctx, cmd)
	if err != nil {
		return err
	}
	r.phaseSince("start", t)
	r.started = time.Now()
	t = r.started
	err = r.supervise(ctx, p, r.sandbox.Machine(), r.app.takeSignals(signals, r.flags.tty))
	if first := r.firstOutput(); !first.IsZero() {
		r.phase(sandbox.Phase{Name: "first output", Duration: first.Sub(t)})
	}
	r.phaseSince("command", t)
	if r.flags.verbose && r.ended {
		r.denials(ctx)
	}
	return err
}

// denials says under -v which system calls were refused.
func (r *runner) denials(ctx context.Context) {
	const most, patience = 10, 5 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	list, dropped, err := r.sandbox.Denials(ctx)
	if err != nil {
		r.note(err.Error()) // the machine may have ended with its command
		return
	}
	more := dropped
	for i, d := range list {
		if i >= most {
			more += d.Count
			continue
		}
		r.app.ui.line("seccomp: ", d.String())
	}
	if more > 0 {
		r.app.ui.line("seccomp: ", fmt.Sprintf("and %d more", more))
	}
}

func (r *runner) firstOutput() time.Time {
	a, b := r.stdout.at(), r.stderr.at()
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// drainGrace bounds the wait for the last output of a command that was ended by
// force: by then somebody may have stopped reading ours.
const drainGrace = 2 * time.Second

var errMachineEnded = errors.New("the machine ended")

// process is what supervise needs of a *sandbox.Process.
type process interface {
	Done() <-chan struct{}
	Wait(ctx context.Context) (sandbox.Exit, error)
	Signal(sig syscall.Signal, group bool) error
	Resize(size guestrpc.Resize) error
}

// supervise waits for the command's end and passes signals on. The command's
// end, the machine's, the timeout and a second Ctrl-C all end it.
//
// ctx ends when a signal came before signals was listened on: the command's start
// and it have crossed, and the command gets it now.
func (r *runner) supervise(ctx context.Context, p process, m vm.Machine, signals <-chan os.Signal) error {
	var timeout, grace <-chan time.Time
	if r.flags.timeout > 0 {
		timer := time.NewTimer(r.flags.timeout)
		defer timer.Stop()
		timeout = timer.C
	}
	died, cancelled := m.Done(), ctx.Done()
	var verdict error // why it is being ended, once it is
	for {
		select {
		case <-p.Done():
			return r.finish(p, verdict)
		case <-grace:
			return cmp.Or(verdict, m.Err(), errMachineEnded)
		case <-died:
			died, grace = nil, time.After(drainGrace)
		case <-timeout:
			verdict = &timeoutError{r.flags.timeout}
			// What does not obey, or does not even listen, is ended with the machine.
			go func() { _ = p.Signal(syscall.SIGKILL, true) }()
			grace = time.After(drainGrace)
		case <-cancelled:
			cancelled = nil
			var early *interruptedError
			if errors.As(context.Cause(ctx), &early) {
				if err := r.pass(p, early.sig); err != nil {
					return err
				}
			}
		case s := <-signals:
			if err := r.pass(p, s.(syscall.Signal)); err != nil {
				return err
			}
		}
	}
}

func (r *runner) finish(p process, verdict error) error {
	exit, err := p.Wait(context.Background()) // it has ended
	switch {
	case verdict != nil:
		return verdict
	case err != nil:
		return err
	}
	r.exit, r.ended = exit, true
	r.app.code = exit.Code
	if exit.Signal != 0 {
		r.app.code = exitSignal + exit.Signal
	}
	if exit.OOM {
		r.app.ui.line("error: ", fmt.Sprintf("the command ran out of memory (the machine has %d MiB)", r.flags.opts.Memory>>20))
		r.app.ui.line("hint: ", "give it more with --memory")
	}
	return nil
}

// report prints what -v and --json ask for.
func (r *runner) report(err error) {
	if r.flags.verbose && r.sandbox != nil {
		m := r.sandbox.Machine().Info()
		how := "booted"
		if m.Cloned {
			how = "cloned"
		}
		r.app.ui.line("", fmt.Sprintf("%-14s %8.1f ms  (%s, %s, %s, link %s, kernel %s)", "total",
			ms(time.Since(r.begun)), how, m.Driver, m.Accel, m.Link, r.sandbox.Kernel().Release))
	}
	if r.flags.json {
		r.reportJSON(err)
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// interrupted names the signal as the cause of an error that followed from it.
func (r *runner) interrupted(ctx context.Context, err error) error {
	var i *interruptedError
	if cause := context.Cause(ctx); errors.As(cause, &i) {
		return i
	}
	return err
}

// terminalSize reads the size of the terminal that -t passes on.
func (a *app) terminalSize() (*guestrpc.Resize, error) {
	fd := int(a.stdin.Fd())
	if !term.IsTerminal(fd) {
		return nil, &usageError{errors.New("-t needs a terminal, and standard input is none"), "run "}
	}
	cols, rows, err := term.GetSize(fd)
	if err != nil {
		return nil, fmt.Errorf("read the terminal's size: %w", err)
	}
	return &guestrpc.Resize{Rows: uint16(rows), Cols: uint16(cols)}, nil
}

// rawTerminal passes every key on as it is typed, until restore.
func (a *app) rawTerminal() (restore func(), err error) {
	fd := int(a.stdin.Fd())
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("set the terminal to raw mode: %w", err)
	}
	a.ui.setRaw(true)
	return func() {
		a.ui.setRaw(false)
		_ = term.Restore(fd, old)
	}, nil
}

// firstWrite notes when something is first written.
type firstWrite struct {
	w     io.Writer
	first atomic.Pointer[time.Time]
}

func (f *firstWrite) Write(p []byte) (int, error) {
	if f.first.Load() == nil {
		now := time.Now()
		f.first.Store(&now)
	}
	return f.w.Write(p)
}

func (f *firstWrite) at() time.Time {
	if t := f.first.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

func quoteArg(s string) string { return fmt.Sprintf("%.60q", strings.ToValidUTF8(s, "?")) }
