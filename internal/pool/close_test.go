package pool

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestCloseDuringMakeAndGet(t *testing.T) {
	k := &maker{takes: time.Minute}
	opts := Options[*fake]{Size: 2, OnError: func(err error) { t.Errorf("told %v", err) }}
	simulate(t, k, opts, func(t *testing.T, p *Pool[*fake]) {
		a, b := get(t.Context(), p), get(t.Context(), p)
		start := time.Now()
		if err := p.Close(); err != nil || time.Since(start) != 0 {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		for _, c := range []<-chan later{a, b} {
			if r := <-c; !errors.Is(r.err, ErrClosed) {
				t.Errorf("%+v", r)
			}
		}
		if _, err := p.Get(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("Get: %v", err)
		}
		want(t, p, Stats{})
	})
}

// A make that does not listen is waited for, and what it made is closed.
func TestCloseWaitsForMake(t *testing.T) {
	k := &maker{each: func(*fake) error { time.Sleep(5 * time.Second); return nil }}
	simulate(t, k, Options[*fake]{Size: 1}, func(t *testing.T, p *Pool[*fake]) {
		start := time.Now()
		p.Close()
		if d := time.Since(start); d != 5*time.Second {
			t.Errorf("closed after %v", d)
		}
		want(t, p, Stats{Made: 1, Discarded: 1})
	})
}

func TestCloseDuringCheck(t *testing.T) {
	k := &maker{each: func(f *fake) error { f.check = hang; return nil }}
	opts := Options[*fake]{Size: 2, OnError: func(err error) { t.Errorf("told %v", err) }}
	simulate(t, k, opts, func(t *testing.T, p *Pool[*fake]) {
		c := get(t.Context(), p)
		start := time.Now()
		p.Close()
		if r := <-c; !errors.Is(r.err, ErrClosed) || time.Since(start) != 0 {
			t.Errorf("%+v", r)
		}
		want(t, p, Stats{Made: 2, Discarded: 2})
	})
}

// Every call waits for all, and returns the same.
func TestCloseTogether(t *testing.T) {
	bad := errors.New("bad")
	k := &maker{each: func(f *fake) error { f.err = bad; return nil }}
	simulate(t, k, Options[*fake]{Size: 3}, func(t *testing.T, p *Pool[*fake]) {
		kept := mustGet(t, p)
		synctest.Wait()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if err := p.Close(); !errors.Is(err, bad) {
					t.Errorf("Close: %v", err)
				}
				if s := p.Stats(); s.Discarded != 3 {
					t.Errorf("%+v", s)
				}
			})
		}
		wg.Wait()
		if err := p.Close(); !errors.Is(err, bad) {
			t.Errorf("again: %v", err)
		}
		if kept.closes.Load() != 0 {
			t.Error("a machine that was handed out was closed")
		}
	})
}

// An error of closing is told to who hears of errors while the pool is open.
func TestCloseErrorOfAMember(t *testing.T) {
	bad := errors.New("bad")
	var log told
	k := &maker{each: func(f *fake) error {
		if f.id == 0 {
			f.err = bad
		}
		return nil
	}}
	opts := Options[*fake]{Size: 1, MaxAge: time.Hour, OnError: log.add}
	simulate(t, k, opts, func(t *testing.T, p *Pool[*fake]) {
		time.Sleep(time.Hour)
		synctest.Wait()
		if errs := log.list(); len(errs) != 1 || !errors.Is(errs[0], bad) {
			t.Errorf("told %v", errs)
		}
		if err := p.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

// Real goroutines, real time: closed at any moment, nothing lives that nobody has.
func TestCloseAnyTime(t *testing.T) {
	for i := range 50 {
		k := &maker{takes: 50 * time.Microsecond}
		p, err := New(Options[*fake]{Make: k.make, Size: 3, Makers: 2})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var mu sync.Mutex
		got := make(map[*fake]bool)
		for range 8 {
			wg.Go(func() {
				for {
					m, err := p.Get(context.Background())
					if err != nil {
						if !errors.Is(err, ErrClosed) && !errors.Is(err, context.Canceled) {
							t.Errorf("Get: %v", err)
						}
						return
					}
					mu.Lock()
					got[m] = true
					mu.Unlock()
				}
			})
		}
		time.Sleep(time.Duration(i) * 20 * time.Microsecond)
		for range 3 {
			wg.Go(func() { p.Close() })
		}
		wg.Wait()
		for _, m := range k.all {
			if n := m.closes.Load(); got[m] && n != 0 || !got[m] && n != 1 {
				t.Errorf("machine %d: handed out %v, closed %d times", m.id, got[m], n)
			}
		}
	}
}
