package pool

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a machine that is there at once.
type fake struct {
	id     int
	done   chan struct{}
	end    func() // the machine ends by itself
	check  func(context.Context) error
	closes atomic.Int32
	err    error // of Close
}

func (f *fake) Done() <-chan struct{} { return f.done }
func (f *fake) Check(ctx context.Context) error {
	if f.check != nil {
		return f.check(ctx)
	}
	return nil
}
func (f *fake) Close() error {
	f.closes.Add(1)
	f.end()
	return f.err
}

// hang is a check that nobody answers.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

// maker makes fakes and remembers them.
type maker struct {
	takes time.Duration
	// each is called for each make, from 0 on, when it has taken its time; nil for
	// one that succeeds.
	each func(f *fake) error

	mu    sync.Mutex
	begun []time.Time
	all   []*fake
}

func (k *maker) make(ctx context.Context) (*fake, error) {
	k.mu.Lock()
	f := &fake{id: len(k.begun), done: make(chan struct{})}
	k.begun = append(k.begun, time.Now())
	k.mu.Unlock()
	f.end = sync.OnceFunc(func() { close(f.done) })
	if k.takes > 0 {
		select {
		case <-time.After(k.takes):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if k.each != nil {
		if err := k.each(f); err != nil {
			return nil, err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.all = append(k.all, f)
	return f, nil
}

// starts are the times makes began, from the first.
func (k *maker) starts() []time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	var d []time.Duration
	for _, t := range k.begun {
		d = append(d, t.Sub(k.begun[0]))
	}
	return d
}

// simulate runs f in a bubble with a clock of its own, closes the pool after it,
// and looks at what is left: nothing that was not handed out may live.
func simulate(t *testing.T, k *maker, opts Options[*fake], f func(t *testing.T, p *Pool[*fake])) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		opts.Make = k.make
		p, err := New(opts)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			p.Close()
			s := p.Stats()
			if s.Ready != 0 || s.Making != 0 || s.Waiting != 0 || s.Made != s.HandedOut+s.Discarded || s.Made != uint64(len(k.all)) {
				t.Errorf("closed, with %d made: %+v", len(k.all), s)
			}
			var closed uint64
			for _, m := range k.all {
				n := m.closes.Load()
				if n > 1 {
					t.Errorf("machine %d was closed %d times", m.id, n)
				}
				closed += uint64(n)
			}
			if closed != s.Discarded {
				t.Errorf("%d closed: %+v", closed, s)
			}
		}()
		synctest.Wait()
		f(t, p)
	})
}

// told is what OnError was told, by goroutines of any number.
type told struct {
	mu   sync.Mutex
	errs []error
}

func (l *told) add(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.errs = append(l.errs, err)
}

func (l *told) list() []error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.errs)
}

// later is a Get in a goroutine.
type later struct {
	m   *fake
	err error
	at  time.Time
}

func get(ctx context.Context, p *Pool[*fake]) <-chan later {
	c := make(chan later, 1)
	go func() {
		m, err := p.Get(ctx)
		c <- later{m, err, time.Now()}
	}()
	synctest.Wait()
	return c
}

func mustGet(t *testing.T, p *Pool[*fake]) *fake {
	t.Helper()
	m, err := p.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// want waits until all has come to rest and compares.
func want(t *testing.T, p *Pool[*fake], s Stats) {
	t.Helper()
	synctest.Wait()
	if diff := cmp.Diff(s, p.Stats()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
