package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/vm/qemu"
)

// Rows of start.
const (
	rowRun   = "run -- true"
	rowBare  = "run -- true, without the jail but for its filters"
	rowFirst = "run -- echo x: first output after the VMM's start"
	rowCold  = "run --cold -- true"
	rowRunsc = "reference: runsc --network=none do true"
	rowQEMU  = "reference: " + qemu.Program + " --version"
)

// start measures `ironclaw run` as whole processes, and its phases as it reports
// them.
func (b *Bench) start(ctx context.Context) (*Table, error) {
	t := &Table{Name: "start: whole processes"}
	warm, err := b.ironclaw(ctx, "--", "true")
	if err != nil {
		return nil, err
	}
	t.Machine = Machine{Accel: warm.Accel, Link: warm.Link, Cloned: warm.Cloned}
	if err := b.complete(ctx, &t.Machine); err != nil {
		return nil, err
	}
	if !warm.Cloned {
		t.note("there are no templates for such machines: all of them booted")
	}
	gvisor := newRunsc(ctx, t)
	defer gvisor.close()
	w, err := newWatch(t)
	if err != nil {
		return nil, err
	}
	for i := range b.N {
		if err := b.startRound(ctx, w, warm.Cloned, i%((b.N+2)/3) == 0); err != nil {
			return nil, err
		}
		gvisor.measure(ctx, w)
		w.sample()
		v, err := timeHost(ctx, qemu.Program, "--version")
		if err != nil {
			return nil, err
		}
		t.add(rowQEMU, "ms", v)
	}
	each := fmt.Sprintf("%d at once: each", b.together)
	if err := b.atOnce(ctx, w, each); err != nil {
		return nil, err
	}
	if err := w.finish(); err != nil {
		return nil, err
	}
	t.ratio(rowRun+", to without the jail (p50)", t.p(rowRun, 0.5), t.p(rowBare, 0.5))
	t.ratio(rowRun+", to runsc (p50)", t.p(rowRun, 0.5), t.p(rowRunsc, 0.5))
	t.ratio(fmt.Sprintf("%d at once (p90), to %d x one (p50) / %s", b.together, b.together, count(cpus(), "cpu")),
		t.p(each, 0.9), float64(b.together)*t.p(rowRun, 0.5)/float64(cpus()))
	return t, nil
}

// bare are the layers around the VMM that a machine can go without and still start from a
// template.
func bare() string {
	set := layer.Set{}
	for _, n := range layer.All() {
		set[n] = !n.Guest() && n != layer.Seccomp && n != layer.NoNewPrivs
	}
	return set.String()
}

// startRound measures one process of each kind.
func (b *Bench) startRound(ctx context.Context, w *watch, cloned, cold bool) error {
	w.sample()
	run, err := b.ironclaw(ctx, "--", "true")
	if err == nil {
		err = w.table.addPhases(rowRun, run, cloned)
	}
	if err != nil {
		return err
	}
	w.sample()
	run, err = b.ironclaw(ctx, "--without", bare(), "--", "true")
	if err == nil {
		err = w.table.addPhases(rowBare, run, cloned)
	}
	if err != nil {
		return err
	}
	w.sample()
	run, err = b.ironclaw(ctx, "--", "echo", "x")
	if err == nil {
		err = w.table.addMoments(rowFirst, run, cloned)
	}
	if err != nil || !cold {
		return err
	}
	w.sample()
	run, err = b.ironclaw(ctx, "--cold", "--", "true")
	if err == nil {
		err = w.table.addPhases(rowCold, run, false)
	}
	return err
}

// atOnce starts processes at the same moment. All of them must succeed.
func (b *Bench) atOnce(ctx context.Context, w *watch, row string) error {
	w.sample()
	walls := make([]float64, b.together)
	errs := make([]error, b.together)
	var wg sync.WaitGroup
	begun := time.Now()
	for i := range b.together {
		wg.Go(func() {
			_, errs[i] = b.ironclaw(ctx, "--", "true")
			walls[i] = ms(time.Since(begun))
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%d at once: %w", b.together, err)
	}
	for _, v := range walls {
		w.table.add(row, "ms", v)
	}
	return nil
}

// report is what of `ironclaw run --json` is read, and how long the process took.
type report struct {
	Accel   string             `json:"accel"`
	Link    string             `json:"link"`
	Error   string             `json:"error"`
	Cloned  bool               `json:"cloned"`
	Timings map[string]float64 `json:"timings_ms"`
	VMM     map[string]float64 `json:"vmm_ms"`
	Guest   map[string]float64 `json:"guest_ms"`

	wall float64
}

// ironclaw runs `ironclaw run --json` with these arguments.
func (b *Bench) ironclaw(ctx context.Context, args ...string) (*report, error) {
	argv := []string{"run", "--json"}
	if b.Sandbox.Accel != "" {
		argv = append(argv, "--accel", b.Sandbox.Accel)
	}
	if b.Sandbox.Link != "" {
		argv = append(argv, "--link", b.Sandbox.Link)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, b.Program, append(argv, args...)...)
	cmd.Env = append(os.Environ(), "IRONCLAW_HOME="+b.Host.Home)
	cmd.Stderr = &stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) } // it cleans up
	cmd.WaitDelay = 10 * time.Second
	begun := time.Now()
	err := cmd.Run()
	wall := ms(time.Since(begun))
	r, parseErr := parseReport(stderr.Bytes())
	switch {
	case err != nil && parseErr == nil && r.Error != "":
		return nil, fmt.Errorf("run: %w: %s", err, r.Error)
	case err != nil:
		return nil, fmt.Errorf("run: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	case parseErr != nil:
		return nil, parseErr
	}
	r.wall = wall
	return r, nil
}

// parseReport reads the JSON that run printed last; notes may come before it.
func parseReport(stderr []byte) (*report, error) {
	lines := bytes.Split(bytes.TrimSpace(stderr), []byte("\n"))
	var r report
	if err := json.Unmarshal(lines[len(lines)-1], &r); err != nil {
		return nil, fmt.Errorf("read the timings of run: %w", err)
	}
	return &r, nil
}

// Phases of a start, in their order.
var (
	clonePhases = []string{"reserve", "image", "kernel", "driver", "template", "vmm", "hello", "start", "command", "close"}
	bootPhases  = []string{"reserve", "image", "kernel", "driver", "template", "vmm", "boot", "start", "command", "close"}
	bootMarks   = []string{"init", "modules", "root", "agent", "hello"} // in the guest
	moments     = []string{"ready", "running", "hello", "started"}      // since the VMM's start
)

// addPhases adds the whole process and its parts.
func (t *Table) addPhases(row string, r *report, cloned bool) error {
	part := parts{of: row, unit: "ms"}
	part.all = append(part.all, part.row(row, r.wall))
	phases := clonePhases
	if !r.Cloned {
		phases = bootPhases
	}
	for _, phase := range phases {
		part.add(phase, r.Timings, phase)
		if phase != "boot" {
			continue
		}
		for _, mark := range bootMarks {
			part.add("guest: "+mark, r.Guest, mark)
		}
	}
	return t.addParts(&part, r, cloned)
}

// addMoments adds when the first output came, and what came before it.
func (t *Table) addMoments(row string, r *report, cloned bool) error {
	part := parts{of: row, unit: "ms"}
	part.add(row, r.VMM, "first_output")
	for _, moment := range moments {
		part.add(moment, r.VMM, moment)
	}
	return t.addParts(&part, r, cloned)
}

// parts gathers the figures of one run before any is added: what was not reported
// was not measured, and is no zero.
type parts struct {
	of, unit string
	all      []*Row
	missing  []string
}

func (p *parts) row(name string, v float64) *Row {
	r := &Row{Of: p.of, Name: name, Unit: p.unit, Values: []float64{v}}
	if name == p.of {
		r.Of = ""
	}
	return r
}

func (p *parts) add(name string, from map[string]float64, key string) {
	v, ok := from[key]
	if !ok {
		p.missing = append(p.missing, key)
	}
	p.all = append(p.all, p.row(name, v))
}

func (t *Table) addParts(p *parts, r *report, cloned bool) error {
	switch {
	case p.missing != nil:
		return fmt.Errorf("read the timings of run: it reported no %s", strings.Join(p.missing, ", "))
	case r.Cloned && !cloned:
		return fmt.Errorf("%s: the machine was cloned and should have booted", p.of)
	case !r.Cloned && cloned: // the template was discarded; `ironclaw run -v` says why
		return fmt.Errorf("%s: the machine booted and should have been cloned", p.of)
	}
	for _, r := range p.all {
		t.addTo(r.Of, r.Name, r.Unit, r.Values[0])
	}
	return nil
}

// runsc is gVisor, for comparison: a sandbox without a machine. It may be absent.
type runsc struct {
	table *Table
	root  string // where it keeps its state, "" if it is not there
}

const runscTimeout = 60 * time.Second

// newRunsc tries it once. If that fails the table says so, and has no row of it.
func newRunsc(ctx context.Context, t *Table) *runsc {
	r := &runsc{table: t}
	if _, err := exec.LookPath("runsc"); err != nil {
		t.note("no comparison with runsc (gVisor): it is not installed")
		return r
	}
	root, err := os.MkdirTemp("", "ironclaw-bench-")
	if err != nil {
		t.note("no comparison with runsc (gVisor): %v", err)
		return r
	}
	r.root = root
	if _, err := r.run(ctx); err != nil {
		r.giveUp(err)
	}
	return r
}

func (r *runsc) run(ctx context.Context) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, runscTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "runsc", "--root="+r.root, "--network=none", "do", "true")
	cmd.WaitDelay = time.Second // what it started may hold its output open
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	begun := time.Now()
	err := cmd.Run()
	wall := ms(time.Since(begun))
	if line, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n"); err != nil && line != "" {
		err = fmt.Errorf("%w: %.200q", err, line)
	}
	return wall, err
}

func (r *runsc) measure(ctx context.Context, w *watch) {
	if r.root == "" {
		return
	}
	w.sample()
	v, err := r.run(ctx)
	if err != nil {
		r.giveUp(err)
		return
	}
	r.table.add(rowRunsc, "ms", v)
}

func (r *runsc) giveUp(err error) {
	r.table.drop(rowRunsc)
	r.table.note("no comparison with runsc (gVisor): %v", err)
	r.close()
}

func (r *runsc) close() {
	if r.root != "" {
		_ = os.RemoveAll(r.root)
		r.root = ""
	}
}
