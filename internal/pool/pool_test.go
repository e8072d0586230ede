package pool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestBadOptions(t *testing.T) {
	k := &maker{}
	good := Options[*fake]{Make: k.make, Size: 1}
	for name, spoil := range map[string]func(*Options[*fake]){
		"no make":      func(o *Options[*fake]) { o.Make = nil },
		"no size":      func(o *Options[*fake]) { o.Size = 0 },
		"big":          func(o *Options[*fake]) { o.Size = MaxSize + 1 },
		"makers":       func(o *Options[*fake]) { o.Makers = -1 },
		"CPU":          func(o *Options[*fake]) { o.CPU = -1 },
		"CPU NaN":      func(o *Options[*fake]) { o.CPU = math.NaN() },
		"CPU infinite": func(o *Options[*fake]) { o.CPU = math.Inf(1) },
		"timeout":      func(o *Options[*fake]) { o.CheckTimeout = -1 },
		"age":          func(o *Options[*fake]) { o.MaxAge = -1 },
	} {
		opts := good
		spoil(&opts)
		if _, err := New(opts); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestFillsAndHandsOut(t *testing.T) {
	k := &maker{takes: time.Second}
	simulate(t, k, Options[*fake]{Size: 3}, func(t *testing.T, p *Pool[*fake]) {
		want(t, p, Stats{Making: 1})
		time.Sleep(3 * time.Second)
		want(t, p, Stats{Ready: 3, Made: 3})
		start := time.Now()
		if m := mustGet(t, p); m.id != 0 || m.closes.Load() != 0 {
			t.Errorf("got %+v: the oldest is first", m)
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("a ready machine took %v", d)
		}
		want(t, p, Stats{Ready: 2, Making: 1, Made: 3, HandedOut: 1})
		time.Sleep(time.Hour)
		want(t, p, Stats{Ready: 3, Made: 4, HandedOut: 1})
	})
}

// Real goroutines, real time: what comes out is never the same twice.
func TestNeverTwice(t *testing.T) {
	var failed atomic.Int32
	k := &maker{each: func(f *fake) error {
		switch f.id % 7 {
		case 3: // fails its check
			f.check = func(context.Context) error { return errors.New("no answer") }
		case 5: // ends by itself, some time
			go f.end()
		}
		return nil
	}}
	p, err := New(Options[*fake]{Make: k.make, Size: 4, Makers: 3, OnError: func(error) { failed.Add(1) }})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	seen := make(map[*fake]int)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for j := range 25 {
				ctx, cancel := context.WithCancel(t.Context())
				if (i+j)%5 == 0 {
					go cancel() // some give up, at any moment
				}
				m, err := p.Get(ctx)
				cancel()
				if err != nil {
					continue
				}
				mu.Lock()
				seen[m]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	s := p.Stats()
	if s.HandedOut != uint64(len(seen)) || s.Made != s.HandedOut+s.Discarded || s.Ready+s.Making+s.Waiting != 0 {
		t.Errorf("%d got: %+v", len(seen), s)
	}
	for _, m := range k.all {
		if int(m.closes.Load())+seen[m] != 1 {
			t.Errorf("machine %d: got %d times, closed %d times", m.id, seen[m], m.closes.Load())
		}
	}
	if failed.Load() == 0 || len(seen) < 400 {
		t.Errorf("%d got, %d failures: that tests nothing", len(seen), failed.Load())
	}
}

func TestDeadIsReplaced(t *testing.T) {
	var log told
	k := &maker{}
	opts := Options[*fake]{Size: 2, OnError: log.add}
	simulate(t, k, opts, func(t *testing.T, p *Pool[*fake]) {
		time.Sleep(time.Hour)
		k.all[0].end()
		synctest.Wait() // no time passes
		if k.all[0].closes.Load() != 1 {
			t.Error("not closed at once")
		}
		want(t, p, Stats{Ready: 2, Made: 3, Discarded: 1})
		if errs := log.list(); len(errs) != 1 || !errors.Is(errs[0], errEnded) {
			t.Errorf("told %v", errs)
		}
		k.all[2].end() // young: put off, so that it does not spin
		want(t, p, Stats{Ready: 1, Made: 3, Discarded: 2})
		time.Sleep(minBackoff)
		want(t, p, Stats{Ready: 2, Made: 4, Discarded: 2})
		if m := mustGet(t, p); m.id != 1 {
			t.Errorf("got %d", m.id)
		}
	})
}

// Machines that end as soon as they are made are not made as fast as can be.
func TestStillbornDoNotSpin(t *testing.T) {
	k := &maker{each: func(f *fake) error { f.end(); return nil }}
	simulate(t, k, Options[*fake]{Size: 2}, func(t *testing.T, p *Pool[*fake]) {
		time.Sleep(10 * time.Second)
		if n := len(k.starts()); n > 202 {
			t.Errorf("%d made in 10 s", n)
		}
		// One made for a caller does not answer him: he is told.
		if _, err := p.Get(t.Context()); !errors.Is(err, errEnded) {
			t.Errorf("Get: %v", err)
		}
	})
}

func TestFailingCheckIsDiscarded(t *testing.T) {
	bad := errors.New("bad")
	var log told
	k := &maker{each: func(f *fake) error {
		if f.id < 2 {
			f.check = func(context.Context) error { return bad }
		}
		return nil
	}}
	opts := Options[*fake]{Size: 3, OnError: log.add}
	simulate(t, k, opts, func(t *testing.T, p *Pool[*fake]) {
		if m := mustGet(t, p); m.id != 2 {
			t.Errorf("got %d", m.id)
		}
		want(t, p, Stats{Made: 3, HandedOut: 1, Discarded: 2})
		time.Sleep(minBackoff) // they were young
		want(t, p, Stats{Ready: 3, Made: 6, HandedOut: 1, Discarded: 2})
		if errs := log.list(); len(errs) != 2 || !errors.Is(errs[0], bad) {
			t.Errorf("told %v", errs)
		}
	})
}

func TestHangingCheckIsBounded(t *testing.T) {
	k := &maker{each: func(f *fake) error {
		if f.id == 0 {
			f.check = hang
		}
		return nil
	}}
	simulate(t, k, Options[*fake]{Size: 2, CheckTimeout: 3 * time.Second}, func(t *testing.T, p *Pool[*fake]) {
		start := time.Now()
		m := mustGet(t, p)
		if d := time.Since(start); m.id != 1 || d != 3*time.Second {
			t.Errorf("got %d after %v", m.id, d)
		}
		synctest.Wait()
		if k.all[0].closes.Load() != 1 {
			t.Error("not closed")
		}
	})
}

// A machine that ends while it is checked is not waited for.
func TestEndsDuringCheck(t *testing.T) {
	k := &maker{each: func(f *fake) error {
		if f.id == 0 {
			f.check = hang
		}
		return nil
	}}
	simulate(t, k, Options[*fake]{Size: 2}, func(t *testing.T, p *Pool[*fake]) {
		start := time.Now()
		c := get(t.Context(), p)
		k.all[0].end()
		if r := <-c; r.err != nil || r.m.id != 1 || time.Since(start) != 0 {
			t.Errorf("%+v after %v", r, time.Since(start))
		}
	})
}

func TestWaitersAreServedInOrder(t *testing.T) {
	k := &maker{takes: time.Second}
	simulate(t, k, Options[*fake]{Size: 1, CPU: 0.001}, func(t *testing.T, p *Pool[*fake]) {
		start := time.Now()
		var all []<-chan later
		for range 5 {
			all = append(all, get(t.Context(), p))
		}
		want(t, p, Stats{Making: 1, Waiting: 5})
		for i, c := range all {
			r := <-c
			if r.err != nil || r.m.id != i || r.at.Sub(start) != time.Duration(i+1)*time.Second {
				t.Errorf("caller %d: %+v after %v: nobody waits for a budget", i, r, r.at.Sub(start))
			}
		}
	})
}

func TestMakersBound(t *testing.T) {
	k := &maker{takes: time.Second}
	simulate(t, k, Options[*fake]{Size: 1, Makers: 3}, func(t *testing.T, p *Pool[*fake]) {
		for range 5 {
			defer func(c <-chan later) { <-c }(get(t.Context(), p))
		}
		want(t, p, Stats{Making: 3, Waiting: 5})
		time.Sleep(time.Second)
		want(t, p, Stats{Making: 2, Waiting: 2, Made: 3, HandedOut: 3})
	})
}

// What was made for a caller who gives up is the next one's, or the pool's.
func TestCancelLosesNothing(t *testing.T) {
	k := &maker{takes: time.Second, each: func(f *fake) error {
		f.check = func(context.Context) error { time.Sleep(time.Second); return nil }
		return nil
	}}
	gone := errors.New("gone")
	simulate(t, k, Options[*fake]{Size: 1}, func(t *testing.T, p *Pool[*fake]) {
		ctx, cancel := context.WithCancelCause(t.Context())
		a, b := get(ctx, p), get(t.Context(), p)
		time.Sleep(1500 * time.Millisecond) // the first machine is being checked
		want(t, p, Stats{Ready: 1, Making: 1, Waiting: 2, Made: 1})
		cancel(gone)
		if r := <-a; !errors.Is(r.err, gone) {
			t.Errorf("%+v", r)
		}
		if r := <-b; r.err != nil || r.m.id != 0 {
			t.Errorf("%+v", r)
		}
		time.Sleep(time.Second)
		want(t, p, Stats{Ready: 1, Made: 2, HandedOut: 1})

		ctx, cancel = context.WithCancelCause(t.Context())
		a = get(ctx, p)
		cancel(gone)
		<-a
		want(t, p, Stats{Ready: 1, Made: 2, HandedOut: 1})
		time.Sleep(2 * time.Second)
		if m := mustGet(t, p); m.id != 1 {
			t.Errorf("got %d", m.id)
		}
		if _, err := p.Get(ctx); !errors.Is(err, gone) {
			t.Errorf("with a context that has ended: %v", err)
		}
	})
}

// Callers without patience do not keep a machine that hangs in the pool.
func TestImpatientCallers(t *testing.T) {
	k := &maker{each: func(f *fake) error {
		if f.id == 0 {
			f.check = hang
		}
		return nil
	}}
	simulate(t, k, Options[*fake]{Size: 1}, func(t *testing.T, p *Pool[*fake]) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.Get(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Get: %v", err)
		}
		time.Sleep(time.Second + minBackoff)
		want(t, p, Stats{Ready: 1, Made: 2, Discarded: 1})
	})
}

// What nobody took in the end goes back to where it was: the oldest is first.
func TestCancelKeepsTheOrder(t *testing.T) {
	k := &maker{each: func(f *fake) error {
		f.check = func(context.Context) error { time.Sleep(time.Second); return nil }
		return nil
	}}
	simulate(t, k, Options[*fake]{Size: 3}, func(t *testing.T, p *Pool[*fake]) {
		ctx, cancel := context.WithCancel(t.Context())
		c := get(ctx, p)
		cancel()
		<-c
		time.Sleep(2 * time.Second)
		if m := mustGet(t, p); m.id != 0 {
			t.Errorf("got %d", m.id)
		}
	})
}

// Many who give up at once leave no more machines than there is room for.
func TestSurplusIsClosed(t *testing.T) {
	k := &maker{each: func(f *fake) error {
		f.check = func(context.Context) error { time.Sleep(time.Second); return nil }
		return nil
	}}
	simulate(t, k, Options[*fake]{Size: 2, Makers: 2}, func(t *testing.T, p *Pool[*fake]) {
		ctx, cancel := context.WithCancel(t.Context())
		var all []<-chan later
		for range 10 {
			all = append(all, get(ctx, p))
		}
		cancel()
		for _, c := range all {
			<-c
		}
		time.Sleep(time.Second)
		want(t, p, Stats{Ready: 4, Made: 10, Discarded: 6})
	})
}

func TestMakeErrorReachesTheWaiter(t *testing.T) {
	k := &maker{takes: time.Second}
	k.each = func(f *fake) error {
		if f.id < 3 {
			return fmt.Errorf("make %d", f.id)
		}
		return nil
	}
	var log told
	opts := Options[*fake]{Size: 1, OnError: log.add}
	simulate(t, k, opts, func(t *testing.T, p *Pool[*fake]) {
		start := time.Now()
		// The first make had begun when they came and does not count.
		a, b, c := get(t.Context(), p), get(t.Context(), p), get(t.Context(), p)
		if r := <-a; r.err == nil || r.err.Error() != "make a machine: make 1" || r.at.Sub(start) != 2*time.Second {
			t.Errorf("%+v", r)
		}
		if r := <-b; r.err == nil || r.err.Error() != "make a machine: make 2" || r.at.Sub(start) != 3*time.Second {
			t.Errorf("%+v", r)
		}
		if r := <-c; r.err != nil || r.m.id != 3 || r.at.Sub(start) != 4*time.Second {
			t.Errorf("%+v", r)
		}
		want(t, p, Stats{Making: 1, Made: 1, HandedOut: 1, Failed: 3})
		var errs []string
		for _, err := range log.list() {
			errs = append(errs, err.Error())
		}
		slices.Sort(errs)
		if !slices.Equal(errs, []string{"make a machine: make 0", "make a machine: make 1", "make a machine: make 2"}) {
			t.Errorf("told %v", errs)
		}
	})
}

// A make that fails is nobody's failure as long as another is under way for all.
func TestFailureWithAnotherUnderWay(t *testing.T) {
	k := &maker{takes: time.Second, each: func(f *fake) error {
		if f.id == 1 {
			return errors.New("no")
		}
		return nil
	}}
	simulate(t, k, Options[*fake]{Size: 1, Makers: 2}, func(t *testing.T, p *Pool[*fake]) {
		start := time.Now()
		time.Sleep(100 * time.Millisecond)
		ctx, cancel := context.WithCancel(t.Context())
		a, b, c := get(t.Context(), p), get(t.Context(), p), get(ctx, p)
		if r := <-a; r.err != nil || r.m.id != 0 {
			t.Errorf("%+v", r)
		}
		want(t, p, Stats{Making: 2, Waiting: 2, Made: 1, HandedOut: 1})
		cancel()
		<-c
		if r := <-b; r.err != nil || r.m.id != 2 || r.at.Sub(start) != 2*time.Second {
			t.Errorf("%+v", r)
		}
	})
}

// A caller's machine does not share the CPU with refilling. The first make of all
// runs alone, too: nobody knows yet what it costs.
func TestCallersComeFirst(t *testing.T) {
	k := &maker{takes: time.Second}
	simulate(t, k, Options[*fake]{Size: 3, Makers: 3, CPU: 100}, func(t *testing.T, p *Pool[*fake]) {
		time.Sleep(time.Second / 2)
		want(t, p, Stats{Making: 1})
		time.Sleep(time.Hour)
		for range 3 {
			mustGet(t, p)
		}
		c := get(t.Context(), p)
		time.Sleep(time.Second / 2) // the budget would do for all three
		want(t, p, Stats{Making: 1, Waiting: 1, Made: 3, HandedOut: 3})
		<-c
		time.Sleep(time.Second / 2)
		want(t, p, Stats{Making: 3, Made: 4, HandedOut: 4})
	})
}

func TestMaxAge(t *testing.T) {
	k := &maker{takes: time.Second}
	simulate(t, k, Options[*fake]{Size: 2, MaxAge: time.Minute}, func(t *testing.T, p *Pool[*fake]) {
		start := time.Now() // of the first make, too
		time.Sleep(61*time.Second - 1)
		want(t, p, Stats{Ready: 2, Made: 2})
		time.Sleep(time.Nanosecond)
		want(t, p, Stats{Ready: 1, Making: 1, Made: 2, Discarded: 1})
		time.Sleep(3 * time.Second)
		want(t, p, Stats{Ready: 2, Made: 4, Discarded: 2})
		time.Sleep(10 * time.Minute)
		m := mustGet(t, p)
		if d := time.Since(start) - k.starts()[m.id]; d > 62*time.Second {
			t.Error("too old")
		}
	})
}
