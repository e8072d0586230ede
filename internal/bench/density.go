package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
)

// leastFree is the part of the host's memory that density leaves alone.
const leastFree = 0.1

// settle is how long clones are left alone before they count as idle.
const settle = 2 * time.Second

// density keeps N idle machines at once and measures what they take. All of them
// must answer in the end.
func (b *Bench) density(ctx context.Context) (*Table, error) {
	t := &Table{Name: fmt.Sprintf("density: %d idle machines at once", b.N)}
	if err := b.warm(ctx, t); err != nil {
		return nil, err
	}
	w, err := newWatch(t)
	if err != nil {
		return nil, err
	}
	before, _, err := available()
	if err != nil {
		return nil, err
	}
	all, err := b.crowd(ctx, w)
	defer func() { _ = closeAll(all) }()
	if err != nil {
		return nil, err
	}
	if err := b.idle(ctx, t, all); err != nil {
		return nil, err
	}
	after, _, err := available()
	if err != nil {
		return nil, err
	}
	t.add("memory of the host, of each (MemAvailable)", "MiB", (before-after)/float64(len(all)))
	faults := pingAll(ctx, all)
	t.add("machines that do not answer", "", float64(len(faults)))
	if err := w.finish(); err != nil {
		return nil, err
	}
	head, tail := tenths(t.row("", rowEachStart, "ms").Values)
	t.ratio("last tenth of the starts, to the first (means)", tail, head)
	if len(faults) > 0 {
		return t, fmt.Errorf("%d of %d machines do not answer: %w", len(faults), len(all), faults[0])
	}
	return t, nil
}

const rowEachStart = "start of one, beside those before it"

// crowd starts the machines one after the other. Those that it has started are
// the caller's, also after an error.
func (b *Bench) crowd(ctx context.Context, w *watch) (all []*sandbox.Sandbox, err error) {
	var total time.Duration // without the calibration
	for len(all) < b.N {
		free, memory, err := available()
		if err != nil {
			return all, err
		}
		if free < leastFree*memory {
			return all, &crowdedError{len(all), b.N, fmt.Errorf("only %.0f of %.0f MiB of memory are available", free, memory)}
		}
		w.sample()
		begun := time.Now()
		s, err := b.create(ctx, w.table)
		if err != nil {
			return all, &crowdedError{len(all), b.N, err}
		}
		took := time.Since(begun)
		all = append(all, s)
		total += took
		w.table.add(rowEachStart, "ms", ms(took))
	}
	w.table.add("start of all, one after the other", "s", total.Seconds())
	return all, nil
}

// crowdedError says how many machines there were when there could be no more.
type crowdedError struct {
	reached, wanted int
	cause           error
}

func (e *crowdedError) Error() string {
	return fmt.Sprintf("stopped at %d machines of %d: %v", e.reached, e.wanted, e.cause)
}
func (e *crowdedError) Unwrap() error { return e.cause }

// Hint is the remedy.
func (e *crowdedError) Hint() string {
	return fmt.Sprintf("`ironclaw bench density -n %d` asks for no more than there were", max(1, e.reached))
}

// idle measures what machines take that have nothing to do.
func (b *Bench) idle(ctx context.Context, t *Table, all []*sandbox.Sandbox) error {
	if err := sleep(ctx, min(settle, b.interval)); err != nil {
		return err
	}
	begun := time.Now()
	from, err := cpuOf(all)
	if err != nil {
		return err
	}
	if err := sleep(ctx, b.interval); err != nil {
		return err
	}
	to, err := cpuOf(all)
	if err != nil {
		return err
	}
	t.add("CPU of each, idle", "% of one", 100*(to-from).Seconds()/time.Since(begun).Seconds()/float64(len(all)))
	var sum float64
	for _, s := range all {
		pss, err := memoryOf(s.Machine().Info().PID)
		if err != nil {
			return err
		}
		sum += pss
	}
	t.add("memory of each VMM (Pss), mean", "MiB", sum/float64(len(all)))
	return nil
}

func cpuOf(all []*sandbox.Sandbox) (sum time.Duration, err error) {
	for _, s := range all {
		p, err := readProcess(s.Machine().Info().PID)
		if err != nil {
			return 0, err
		}
		sum += p.used
	}
	return sum, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// pingTimeout bounds the answer of one idle machine.
const pingTimeout = 30 * time.Second

// pingAll asks each machine for an answer, and returns why some gave none.
func pingAll(ctx context.Context, all []*sandbox.Sandbox) (faults []error) {
	for _, s := range all {
		ctx, cancel := context.WithTimeoutCause(ctx, pingTimeout, errors.New("no answer within "+pingTimeout.String()))
		if err := s.Ping(ctx, []byte("alive?")); err != nil {
			faults = append(faults, fmt.Errorf("sandbox %s: %w", s.ID(), err))
		}
		cancel()
	}
	return faults
}

// tenths are the means of the first and of the last tenth, at least one value.
func tenths(values []float64) (head, tail float64) {
	n := len(values)
	k := max(1, n/10)
	if n == 0 {
		return 0, 0
	}
	return mean(values[:k]), mean(values[n-k:])
}

func mean(values []float64) float64 {
	var sum float64
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}
