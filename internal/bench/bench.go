// Package bench measures what a user of IronClaw waits for. It prints
// distributions, never verdicts, with the host they were measured on and, where
// there is one, a reference from the same run: the two are measured in turn, so
// that noise hits both.
//
// Start at [Bench.Run]; [Names] lists what it can measure.
//
// # When no median is quoted
//
// A median that was measured while something else used the machine is worse than
// none. So a table is judged by what happened while it was measured, and it is
// noisy if
//
//   - a fixed piece of arithmetic, timed before each sample (SHA-256 of a buffer,
//     about 2.5 ms), took more than 1.75 times its least time at the 90th percentile;
//   - or the hypervisor below us took more than 5 % of the CPU time (steal);
//   - or other processes used more than 25 % of the CPUs: what /proc/stat counts as
//     busy, less what this process and its descendants used.
//
// A noisy table prints the least values and how many there are, and no ratios: noise
// makes times longer, so the least is the nearest to the truth (the least rate is
// what was had at the worst). In JSON it says why it is noisy and keeps every value.
//
// The third criterion knows no better than the kernel: threads of the kernel that
// work for our machines (vhost, writing back pages) count as others. In a density
// benchmark the clones that are there already disturb the arithmetic, too; they
// are part of what is measured, but a table that they disturb is noisy all the same.
package bench

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
)

// benchmark is one thing that can be measured.
type benchmark struct {
	name string
	n    int // how often if nobody says
	run  func(*Bench, context.Context) (*Table, error)
}

func benchmarks() []benchmark {
	return []benchmark{
		{"start", 10, (*Bench).start},
		{"exec", 10, (*Bench).exec},
		{"io", 10, (*Bench).throughput},
		{"pool", 10, (*Bench).pool},
		{"density", 50, (*Bench).density},
		{"cycles", 200, (*Bench).cycles},
	}
}

// Names lists the benchmarks.
func Names() []string {
	var names []string
	for _, b := range benchmarks() {
		names = append(names, b.name)
	}
	return names
}

// Usual lists the benchmarks that are short and light enough to be run unasked.
func Usual() []string { return []string{"start", "exec", "io", "pool"} }

// Bench says how to measure.
type Bench struct {
	Host    *sandbox.Host   // required
	Program string          // an ironclaw, for start; required there
	Sandbox sandbox.Options // of every machine; start knows of Accel and Link only
	N       int             // how often; 0 means the benchmark's own default

	together int           // machines at once in start; 0 means 16
	interval time.Duration // for which idle clones are watched; 0 means 10 s
}

// Run measures. The table is not nil where there is something to see, also with an
// error: that what was measured shows a fault (a leak, a machine that does not
// answer).
func (b Bench) Run(ctx context.Context, name string) (*Table, error) {
	all := benchmarks()
	i := slices.IndexFunc(all, func(m benchmark) bool { return m.name == name })
	if i < 0 {
		return nil, fmt.Errorf("unknown benchmark %q", name)
	}
	if b.N < 0 {
		return nil, fmt.Errorf("%d measurements: at least 1 is needed", b.N)
	}
	if b.N == 0 {
		b.N = all[i].n
	}
	if b.together == 0 {
		b.together = 16
	}
	if b.interval == 0 {
		b.interval = 10 * time.Second
	}
	t, err := all[i].run(&b, ctx)
	if err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return t, err
}

// warm makes what a first sandbox finds missing (image, kernel, template), and
// says what machine the others will be.
func (b *Bench) warm(ctx context.Context, t *Table) error {
	s, err := b.Host.Create(ctx, b.Sandbox)
	if err != nil {
		return err
	}
	defer s.Close()
	t.Machine, err = b.describe(ctx, s)
	return err
}

// describe says what machine s is.
func (b *Bench) describe(ctx context.Context, s *sandbox.Sandbox) (Machine, error) {
	info := s.Machine().Info()
	m := Machine{Accel: string(info.Accel), Link: string(info.Link), Cloned: info.Cloned}
	return m, b.complete(ctx, &m)
}

// complete adds what is asked of the machines here, and the version of the VMM.
func (b *Bench) complete(ctx context.Context, m *Machine) error {
	d, err := b.Host.Driver(ctx, b.Sandbox.Driver)
	if err != nil {
		return err
	}
	m.VMM = d.Features().Name + " " + d.Features().Version
	m.CPUs, m.Memory = guestSize(b.Sandbox)
	return nil
}

// create makes a sandbox as warm did. A boot among clones would spoil what is
// measured, and is a fault that sandbox only notes: here it is an error.
func (b *Bench) create(ctx context.Context, t *Table) (*sandbox.Sandbox, error) {
	opts := b.Sandbox
	why := "nothing was said of it"
	opts.Note = func(note string) { why = note }
	s, err := b.Host.Create(ctx, opts)
	if err == nil && s.Machine().Info().Cloned != t.Machine.Cloned {
		s.Close()
		return nil, fmt.Errorf("one machine was cloned and another booted: %s", why)
	}
	return s, err
}

// runOne runs a command to its end and wants success.
func runOne(ctx context.Context, s *sandbox.Sandbox, cmd sandbox.Cmd) error {
	cmd.User = guestrpc.DefaultUser
	p, err := s.Start(ctx, cmd)
	if err != nil {
		return err
	}
	exit, err := p.Wait(ctx)
	if err == nil && (exit.Code != 0 || exit.Signal != 0) {
		err = fmt.Errorf("%v ended with code %d, signal %d", cmd.Args, exit.Code, exit.Signal)
	}
	return err
}

// timeHost measures a command on the host.
func timeHost(ctx context.Context, argv ...string) (float64, error) {
	begun := time.Now()
	err := exec.CommandContext(ctx, argv[0], argv[1:]...).Run()
	if err != nil {
		err = fmt.Errorf("run %s: %w", argv[0], err)
	}
	return ms(time.Since(begun)), err
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// closeAll closes sandboxes, of which there may be hundreds.
func closeAll(all []*sandbox.Sandbox) error {
	var errs []error
	for _, s := range all {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}
