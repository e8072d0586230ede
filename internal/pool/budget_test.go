package pool

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// drain takes what is ready, without ever waiting for a make, for so long.
func drain(t *testing.T, p *Pool[*fake], how time.Duration) {
	t.Helper()
	for end := time.Now().Add(how); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		for p.Stats().Ready > 0 {
			mustGet(t, p)
		}
	}
}

// Refilling for ten minutes uses what it may use, and no more.
func TestBudgetIsKept(t *testing.T) {
	const minutes = 10 * time.Minute
	for _, c := range []struct {
		cpu    float64
		makers int
	}{{0.1, 1}, {0.5, 1}, {0.5, 4}, {1, 1}, {1, 3}, {2, 4}} {
		k := &maker{takes: 2 * time.Second}
		simulate(t, k, Options[*fake]{Size: 5, Makers: c.makers, CPU: c.cpu}, func(t *testing.T, p *Pool[*fake]) {
			drain(t, p, minutes)
			used := time.Duration(p.Stats().Made) * k.takes
			budget := time.Duration(c.cpu * float64(minutes))
			if used > budget+k.takes || used < budget*95/100 {
				t.Errorf("%v cores, %d makers: used %v of %v", c.cpu, c.makers, used, budget)
			}
		})
	}
}

// Callers who wait do not wait for the budget, and the pool pays for them after.
func TestDebtIsPaidAndBounded(t *testing.T) {
	k := &maker{takes: time.Second}
	simulate(t, k, Options[*fake]{Size: 2, CPU: 0.1}, func(t *testing.T, p *Pool[*fake]) {
		start := time.Now()
		for range 60 {
			mustGet(t, p)
		}
		if d := time.Since(start); d != 60*time.Second {
			t.Errorf("60 machines after %v", d)
		}
		// One second of CPU for each of two machines, at a tenth of a core: what the
		// other 58 cost is forgiven.
		for p.Stats().Making == 0 {
			time.Sleep(300 * time.Millisecond)
		}
		if d := time.Since(start); d < 79*time.Second || d > 80*time.Second {
			t.Errorf("the pool began to refill after %v", d)
		}
	})
}

// A pool that was full for an hour has not saved up for a burst.
func TestNoBurst(t *testing.T) {
	k := &maker{takes: time.Second}
	simulate(t, k, Options[*fake]{Size: 4, Makers: 4, CPU: 0.5}, func(t *testing.T, p *Pool[*fake]) {
		time.Sleep(time.Hour)
		for range 4 {
			mustGet(t, p)
		}
		time.Sleep(time.Hour)
		want := []time.Duration{0, 2 * time.Second, 4 * time.Second, 6 * time.Second}
		var got []time.Duration
		for _, d := range k.starts()[4:] {
			got = append(got, d-time.Hour)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

// The counter that is given is what is charged, whoever ends first, and once.
func TestCost(t *testing.T) {
	var counter atomic.Int64
	k := &maker{takes: 2 * time.Second}
	k.each = func(*fake) error { counter.Add(int64(500 * time.Millisecond)); return nil }
	opts := Options[*fake]{Size: 5, Makers: 2, CPU: 0.25, Cost: func() time.Duration { return time.Duration(counter.Load()) }}
	simulate(t, k, opts, func(t *testing.T, p *Pool[*fake]) {
		drain(t, p, 10*time.Minute)
		used, budget := time.Duration(counter.Load()), 150*time.Second
		if used > budget+time.Second || used < budget*95/100 {
			t.Errorf("used %v of %v", used, budget)
		}
	})
}

func TestSettle(t *testing.T) {
	now := time.Unix(0, 0)
	b := budget{rate: 0.5, size: 2, paid: now}
	step := func(what string, cost time.Duration, ok bool, wait time.Duration, estimate float64) {
		t.Helper()
		a := attempt{reserved: b.reserve(now), began: now, cost: cost}
		now = now.Add(4 * time.Second)
		b.settle(now, a, ok)
		if d := b.wait(now); d != wait || b.estimate != estimate {
			t.Errorf("%s: wait %v, estimate %v", what, d, b.estimate)
		}
		now = now.Add(time.Hour)
	}
	step("the first is paid off while it runs", 4*time.Second, true, 4*time.Second, 4)
	step("as expected", 4*time.Second, true, 4*time.Second, 4)
	step("dearer", 8*time.Second, true, 12*time.Second, 5)
	step("cheaper", time.Second, true, 0, 4)
	step("a failure is charged, and says nothing about the others", 6*time.Second, false, 8*time.Second, 4)
}

func TestMeter(t *testing.T) {
	var total time.Duration
	m := meter{total: func() time.Duration { return total }}
	total = time.Hour // nobody's
	a := m.begin()
	total += time.Second
	b := m.begin()
	total += time.Second
	if d := m.end(a); d != 2*time.Second {
		t.Errorf("the first: %v", d)
	}
	total += time.Second
	if d := m.end(b); d != time.Second {
		t.Errorf("the second: %v", d)
	}
	c := m.begin()
	total = 0
	if d := m.end(c); d != 0 {
		t.Errorf("a counter that went back: %v", d)
	}
}

func TestBackoff(t *testing.T) {
	k := &maker{each: func(f *fake) error {
		if f.id == 11 {
			return nil
		}
		return errors.New("no")
	}}
	simulate(t, k, Options[*fake]{Size: 2}, func(t *testing.T, p *Pool[*fake]) {
		time.Sleep(115 * time.Second)
		var gaps []time.Duration
		starts := k.starts()
		for i := 1; i < len(starts); i++ {
			gaps = append(gaps, starts[i]-starts[i-1])
		}
		want := []time.Duration{1: 2, 2: 4, 3: 8, 4: 16, 5: 32, 6: 64, 7: 128, 8: 256, 9: 300, 10: 300}
		want[0] = 1
		for i := range want {
			want[i] *= 100 * time.Millisecond
		}
		// The twelfth succeeds, so the next comes at once and its backoff is short.
		want = append(want, 0, 100*time.Millisecond, 200*time.Millisecond, 400*time.Millisecond)
		if len(gaps) < len(want) {
			t.Fatalf("%v", gaps)
		}
		if diff := cmp.Diff(want, gaps[:len(want)]); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

// Who waits does not wait for the backoff either.
func TestBackoffIsNotForCallers(t *testing.T) {
	var works atomic.Bool
	k := &maker{}
	k.each = func(*fake) error {
		if !works.Load() {
			return errors.New("no")
		}
		return nil
	}
	simulate(t, k, Options[*fake]{Size: 1}, func(t *testing.T, p *Pool[*fake]) {
		time.Sleep(time.Hour)
		start := time.Now()
		if _, err := p.Get(t.Context()); err == nil {
			t.Error("no error")
		}
		works.Store(true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.Get(ctx); err != nil || time.Since(start) != 0 {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}
