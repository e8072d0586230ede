package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guest/hostile"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
	"github.com/ironclaw-run/ironclaw/internal/verify/testnet"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Bounds of what the link's attacks may cost this process.
const (
	linkDeadline = 8 * time.Second  // given to each call; a clone takes a fraction of it
	linkGrace    = 10 * time.Second // by which a call may be late on a busy host
	lastingTime  = 2 * time.Second  // for which what goes on is let go on
	maxGrown     = 32 << 20         // of memory, bytes
	maxError     = 2 << 10          // of what a guest has us say, bytes
)

// loud scenarios write without end. They are made one at a time, so that what they
// cost can be seen; all others, most of which only wait, are made together.
var loud = []string{
	"mux-garbage", "mux-zeros", "mux-length", "mux-unknown-stream", "mux-open-flood", "mux-open-foreign", "mux-window",
	"mux-credit", "mux-opened-twice", "mux-reset", "mux-close-twice", "mux-empty-data",
	"hello-trailing", "hello-clock", "hello-1g", "exec-1g", "hello-output", "hello-error",
	"exec-credit", "exec-4g", "exec-output", "exec-output-after-exit", "exec-empty-output", "exec-clock", "exec-error", "exec-error-late",
}

// What may come of a scenario. All that are in none of these have to be refused: one
// that was ended by its deadline may not have been reached, and then proves nothing.
var (
	// valid may end as an honest one: what was wrong came too late to matter.
	valid = []string{"hello-trailing", "exec-exit-twice", "exec-output-after-exit"}
	// waiting say nothing, or not the whole of it.
	waiting = []string{
		"mux-hang-up", "mux-header-only", "mux-silent", "mux-slow", "mux-truncated", "mux-empty-data",
		"hello-silent", "hello-truncated", "exec-silent",
	}
	// lasting go on as an honest command would until they are ended.
	lasting = []string{"exec-output", "exec-empty-output"}
	// ending end their machine. In all others that would be a fault of theirs.
	ending = []string{"mux-end"}
)

// expected says in words what may come of a scenario.
func expected(name string) string {
	switch {
	case slices.Contains(valid, name):
		return "ends as an honest one, nothing is left"
	case slices.Contains(waiting, name):
		return "ends by its deadline, nothing is left"
	case slices.Contains(lasting, name):
		return "can be ended, nothing is left"
	}
	return "refused, nothing is left"
}

// scenarioRun runs one scenario over one kind of link.
type scenarioRun func(e *env, ctx context.Context, name string, over vm.Link) linkResult

// runOf is how a scenario is run: by making a machine, or by a command in one.
func runOf(name string) scenarioRun {
	if strings.HasPrefix(name, "exec-") {
		return (*env).execHostile
	}
	return (*env).createHostile
}

func scenarios() []string {
	return slices.Concat(hostile.MuxScenarios(), hostile.HelloScenarios(), hostile.ExecScenarios())
}

func linkAttacks() []Attack {
	var all []Attack
	for _, name := range scenarios() {
		all = append(all, Attack{
			Group: Link, Layer: Protocol, Name: strings.ReplaceAll(name, "-", " "), Expected: expected(name),
			run: func(ctx context.Context, e *env) (Finding, error) { return e.scenario(ctx, name) },
		})
	}
	return append(all, Attack{
		Group: Link, Layer: Protocol, Name: "leak by any of these", Expected: "goroutines, descriptors, processes as before",
		run: func(ctx context.Context, e *env) (Finding, error) { return e.linkLeaks(ctx) }, control: leakControl,
	})
}

// scenario runs a scenario over each kind of link that it is for. It has worked if
// it has over one.
func (e *env) scenario(ctx context.Context, name string) (Finding, error) {
	if err := e.openHostile(ctx); err != nil {
		return Finding{}, err
	}
	var all Finding
	over := e.linksFor(name)
	for i, l := range over {
		run := e.quietly
		if slices.Contains(loud, name) {
			run = e.loudly
		}
		f, err := run(ctx, name, l)
		if err != nil {
			return Finding{}, fmt.Errorf("link %s: %w", l, err)
		}
		if i > 0 {
			all.Observed += "; "
		}
		if len(over) > 1 {
			all.Observed += string(l) + ": "
		}
		all.Observed += f.Observed
		all.Worked = all.Worked || f.Worked
	}
	return all, nil
}

// linksFor are the links over which a scenario is run: those of the mux have only one
// to attack.
func (e *env) linksFor(name string) []vm.Link {
	if strings.HasPrefix(name, "mux-") {
		return []vm.Link{vm.LinkSerial}
	}
	return e.links
}

// linkResult is what came of one scenario.
type linkResult struct {
	err      error // that the host's call ended with; nil if it succeeded
	ended    bool  // by its deadline, or by us
	late     bool  // it did not end in time
	took     time.Duration
	setUpErr error // the scenario was not reached
}

// finding judges. An error says that the scenario may not have been reached.
func (r linkResult) finding(name string) (Finding, error) {
	var exit *vm.ExitError
	took := fmt.Sprintf("%d ms", r.took.Milliseconds())
	switch {
	case r.setUpErr != nil:
		return Finding{}, r.setUpErr
	case r.late:
		return Finding{took + ": it did not end", true}, nil
	case r.err == nil && r.ended:
		return Finding{took + ": it went on until we ended it", !slices.Contains(lasting, name)}, nil
	case r.err == nil:
		return Finding{took + ": it ended as an honest one", !slices.Contains(valid, name)}, nil
	case len(r.err.Error()) > maxError:
		return Finding{fmt.Sprintf("an error of %d bytes: %.80q", len(r.err.Error()), r.err), true}, nil
	case errors.As(r.err, &exit) && !errors.Is(r.err, link.ErrProtocol) && !protocolEnd(exit) && !slices.Contains(ending, name):
		return Finding{}, fmt.Errorf("the hostile agent ended by itself: %w", r.err)
	case errors.Is(r.err, context.DeadlineExceeded) && !slices.Contains(waiting, name):
		return Finding{}, fmt.Errorf("it was not refused, or not reached, within %v", linkDeadline)
	}
	return Finding{took + ": " + r.err.Error(), false}, nil
}

// protocolEnd reports whether it was the link for which a machine was ended.
func protocolEnd(e *vm.ExitError) bool { return strings.HasPrefix(e.Reason, link.ErrProtocol.Error()) }

// openHostile makes this host one with machines that attack it, and the templates
// that those start from.
func (e *env) openHostile(ctx context.Context) error {
	if e.hostileHost != nil {
		return nil
	}
	s, err := e.neighbour(ctx) // which shows what works here
	if err != nil {
		return err
	}
	info := s.Machine().Info()
	e.accel, e.links = info.Accel, slices.Compact([]vm.Link{info.Link, vm.LinkSerial})
	dir := filepath.Join(e.dir, "hostile")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	h := e.host.Hostile(dir)
	for _, l := range e.links {
		s, err := h.Create(ctx, e.hostileOptions(hostile.Exec, l))
		if err != nil {
			return fmt.Errorf("make a machine with a hostile agent: %w", err)
		}
		_ = s.Close()
	}
	e.hostileHost, e.linkBefore = h, usageNow()
	return nil
}

// hostileOptions are those of a machine whose agent knows what to do by its name.
func (e *env) hostileOptions(scenario string, l vm.Link) sandbox.Options {
	opts := e.opts.Sandbox
	opts.Accel, opts.Link, opts.Name = string(e.accel), string(l), hostileName(scenario)
	return opts
}

var hostileCount atomic.Int64

// hostileName is a name by which the machine's agent knows what to do, and which no
// other machine has.
func hostileName(scenario string) string {
	return fmt.Sprintf("%s%s-%dx%d", hostile.Prefix, scenario, os.Getpid(), hostileCount.Add(1))
}

// createHostile makes a machine whose agent attacks before the first command.
func (e *env) createHostile(ctx context.Context, name string, over vm.Link) linkResult {
	reached := false
	opts := e.hostileOptions(name, over)
	opts.OnPhase = func(p sandbox.Phase) { reached = reached || p.Name == "vmm" }
	call, cancel := context.WithTimeout(ctx, linkDeadline)
	defer cancel()
	begun := time.Now()
	s, err := e.hostileHost.Create(call, opts)
	r := linkResult{err: err, took: time.Since(begun)}
	r.late = r.took > linkDeadline+linkGrace
	if s != nil {
		_ = s.Close()
	}
	if !reached {
		r.setUpErr = fmt.Errorf("the machine was not started: %w", err)
	}
	return r
}

// execHostile runs a command in a machine whose agent attacks then.
func (e *env) execHostile(ctx context.Context, name string, over vm.Link) linkResult {
	s, err := e.hostileHost.Create(ctx, e.hostileOptions(hostile.Exec, over))
	if err != nil {
		return linkResult{setUpErr: err}
	}
	defer s.Close()
	call, cancel := context.WithTimeout(ctx, linkDeadline)
	defer cancel()
	begun := time.Now()
	p, err := s.Start(call, sandbox.Cmd{Args: []string{name}, Stdin: strings.NewReader("input"), Stdout: io.Discard, Stderr: io.Discard})
	if err != nil {
		return linkResult{err: err, took: time.Since(begun)}
	}
	r := linkResult{}
	// What hangs up is given five seconds to be seen to have died.
	patience := linkDeadline + linkGrace
	if slices.Contains(lasting, name) {
		patience = lastingTime
	}
	wait, cancelWait := context.WithTimeout(ctx, patience)
	defer cancelWait()
	_, r.err = p.Wait(wait)
	if wait.Err() != nil {
		r.err, r.ended = nil, true
	}
	_ = p.Close()
	select {
	case <-p.Done():
	case <-time.After(linkGrace):
		r.late = true
	}
	r.took = time.Since(begun)
	return r
}

// loudly makes one scenario and looks at what it has cost.
func (e *env) loudly(ctx context.Context, name string, over vm.Link) (Finding, error) {
	mem, err := watchMemory()
	if err != nil {
		return Finding{}, err
	}
	r := runOf(name)(e, ctx, name, over)
	grown, err := mem.grown()
	if err != nil {
		return Finding{}, err
	}
	if grown > maxGrown { // whatever else came of it
		return Finding{mib("grew by", grown), true}, nil
	}
	f, err := r.finding(name)
	f.Observed += "; " + mib("grew by", grown)
	return f, err
}

// together is how many of the quiet scenarios are made at once.
const together = 8

// quietly gives the result of a scenario that costs nothing but time. The first
// call makes all of them.
func (e *env) quietly(ctx context.Context, name string, over vm.Link) (Finding, error) {
	if e.quiet == nil {
		e.quiet = e.allQuiet(ctx)
	}
	r, ok := e.quiet[quietKey{name, over}]
	if !ok {
		return Finding{}, errors.New("it was not made")
	}
	return r.finding(name)
}

type quietKey struct {
	name string
	over vm.Link
}

func (e *env) allQuiet(ctx context.Context) map[quietKey]linkResult {
	results := make(map[quietKey]linkResult)
	var mu sync.Mutex // guards results
	var wg sync.WaitGroup
	slots := make(chan struct{}, together)
	for _, name := range scenarios() {
		if slices.Contains(loud, name) {
			continue
		}
		for _, l := range e.linksFor(name) {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				r := runOf(name)(e, ctx, name, l)
				mu.Lock()
				defer mu.Unlock()
				results[quietKey{name, l}] = r
			})
		}
	}
	wg.Wait()
	return results
}

// usage is what this process has.
type usage struct{ goroutines, descriptors, processes int }

func usageNow() usage {
	return usage{runtime.NumGoroutine(), descriptors(), len(descendants(os.Getpid()))}
}

func (u usage) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %d processes", u.goroutines, u.descriptors, u.processes)
}

func (u usage) exceeds(v usage) bool {
	return u.goroutines > v.goroutines || u.descriptors > v.descriptors || u.processes > v.processes
}

// settleTime is how long what has ended may take to be gone.
const settleTime = 10 * time.Second

// settled is what this process has when it has come down to before, or does not.
func settled(ctx context.Context, before usage) usage {
	for end := time.Now().Add(settleTime); ; time.Sleep(50 * time.Millisecond) {
		now := usageNow()
		if !now.exceeds(before) || time.Now().After(end) || ctx.Err() != nil {
			return now
		}
	}
}

// linkLeaks compares what this process has with what it had before the first
// hostile machine.
func (e *env) linkLeaks(ctx context.Context) (Finding, error) {
	if err := e.openHostile(ctx); err != nil {
		return Finding{}, err
	}
	now := settled(ctx, e.linkBefore)
	return Finding{fmt.Sprintf("%v; before: %v", now, e.linkBefore), now.exceeds(e.linkBefore)}, nil
}

// leakControl leaks one of each.
func leakControl(ctx context.Context, e *env) (Finding, error) {
	before := usageNow()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := testnet.Child(ctx, e.opts.Program, probe.Name, probe.Line(probe.Request{Attack: "hold", Args: []string{"60000"}}))
	out, err := cmd.StdoutPipe()
	if err != nil {
		return Finding{}, err
	}
	if err := cmd.Start(); err != nil {
		return Finding{}, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, out)
	}()
	now := usageNow()
	cancel()
	<-ended
	_ = cmd.Wait()
	seen := now.goroutines > before.goroutines && now.descriptors > before.descriptors && now.processes > before.processes
	return Finding{fmt.Sprintf("one more of each is seen: %v; before: %v", now, before), seen}, nil
}
