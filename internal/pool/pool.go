// Package pool keeps machines made ahead, so that a process which stays (a
// server) has one at hand when it is asked for.
//
//	p, err := pool.New(pool.Options[*machine]{Make: makeMachine, Size: 4, CPU: 0.5})
//	if err != nil { return err }
//	defer p.Close()
//	...
//	m, err := p.Get(ctx) // answered its check a moment ago
//	if err != nil { return err }
//	defer m.Close() // it is the caller's: the pool has forgotten it
//
// What it promises:
//
//   - A member is handed out once, and only after it has passed a check made for
//     a caller who was waiting. Callers are served in the order they came.
//   - A member that ends while it waits is closed and replaced; the pool hears of
//     it from Done and does not poll.
//   - Who waits does not wait for the budget, only for the machine. Refilling with
//     nobody waiting uses [Options.CPU] cores on average, and backs off when making
//     fails.
//   - Every member that was made and not handed out is closed once.
//
// The pool knows nothing of sandboxes: a [Member] is all it needs.
package pool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"
)

// MaxSize bounds [Options.Size] and [Options.Makers]: each member is a machine
// with its memory.
const MaxSize = 1024

// DefaultCheckTimeout bounds a check if [Options.CheckTimeout] does not.
const DefaultCheckTimeout = 2 * time.Second

// ErrClosed is what [Pool.Get] returns once the pool is closed.
var ErrClosed = errors.New("the pool is closed")

// Member is a machine as the pool sees it. Its methods are called by several
// goroutines at once.
type Member interface {
	// Done is closed when the machine has ended. It is the same channel each time,
	// and is got without waiting.
	Done() <-chan struct{}
	// Check says whether the machine is alive and answers. It returns soon after
	// ctx has ended or the machine has: nothing else bounds it.
	Check(ctx context.Context) error
	// Close ends the machine and releases what it holds. It is idempotent and
	// bounds itself.
	Close() error
}

// Options say what pool to keep. The zero value of a field means its default.
type Options[M Member] struct {
	// Make makes a member that is ready for use. Required; called by up to Makers
	// goroutines at once. It returns soon after ctx has ended, which is when the
	// pool is closed and not when a caller has given up; it bounds itself otherwise.
	// A panic in it is the process's end, as anywhere.
	Make func(ctx context.Context) (M, error)
	// Size is how many members to keep ready, 1 to MaxSize. More are ready for a
	// while if callers gave up on what was made for them: at most Size+Makers.
	Size int
	// Makers is how many are made at once at most, whoever wants them; 0 means 1.
	Makers int
	// CPU is how many cores refilling may use on average while nobody waits; 0
	// means 1. Each make is charged what it cost, also when it failed, and the next
	// begins when that is paid off. What was made for a caller who waited is charged
	// too, but never holds the refilling up for longer than Size makes' worth.
	CPU float64
	// Cost returns the CPU time that making has used since any fixed moment: in this
	// process and its children, in VMMs. The difference between two calls is charged,
	// so what else the counter counts is charged to making as well. Called when a
	// make begins and ends, by one goroutine at a time. Nil charges the time that
	// each make took, which is what a machine of one CPU can use of it at most.
	Cost func() time.Duration
	// CheckTimeout bounds a check; a member that has not answered by then is
	// discarded. 0 means DefaultCheckTimeout.
	CheckTimeout time.Duration
	// MaxAge is when a member that nobody wanted is closed and replaced; 0 means
	// never. As members are made one after the other, they age so too.
	MaxAge time.Duration
	// OnError is told each make that failed, each member that was discarded because
	// it ended or failed its check, and each that could not be closed; nil for nobody.
	// It is not told what Close makes fail. Called by several goroutines at once; it
	// may not call Close, which waits for it.
	OnError func(error)
}

func (o *Options[M]) fill() error {
	switch {
	case o.Make == nil:
		return errors.New("a pool needs a way to make machines")
	case o.Size < 1 || o.Size > MaxSize:
		return fmt.Errorf("a pool of %d machines: 1 to %d are possible", o.Size, MaxSize)
	case o.Makers < 0 || o.Makers > MaxSize:
		return fmt.Errorf("%d machines made at once: 1 to %d are possible", o.Makers, MaxSize)
	case o.CPU < 0 || math.IsNaN(o.CPU) || math.IsInf(o.CPU, 0):
		return fmt.Errorf("a budget of %v cores: it must be positive", o.CPU)
	case o.CheckTimeout < 0:
		return fmt.Errorf("a check of at most %v: it must be positive", o.CheckTimeout)
	case o.MaxAge < 0:
		return fmt.Errorf("a greatest age of %v: it must be positive", o.MaxAge)
	}
	if o.Makers == 0 {
		o.Makers = 1
	}
	if o.CPU == 0 {
		o.CPU = 1
	}
	if o.CheckTimeout == 0 {
		o.CheckTimeout = DefaultCheckTimeout
	}
	if o.OnError == nil {
		o.OnError = func(error) {}
	}
	return nil
}

// Pool keeps members ready. Safe for concurrent use.
type Pool[M Member] struct {
	opts   Options[M]
	ctx    context.Context // of makes and checks; ends with the pool
	cancel context.CancelFunc
	wake   chan struct{}  // of one place: something has changed, see run
	tasks  sync.WaitGroup // every goroutine of the pool; grows only with mu held
	meter  meter

	mu        sync.Mutex
	closed    bool
	closeErr  error
	seq       uint64       // orders callers and makes
	waiters   []*waiter[M] // callers without an answer, first come first
	ready     []*entry[M]  // members nobody looks at, oldest first
	checking  int          // members being checked
	making    int          // makes under way
	budget    budget
	failures  int       // makes that failed since one did not
	retryAt   time.Time // no refilling before, as makes fail
	lostUntil time.Time // no refilling before, as a young member was lost; a make does not undo that
	stats     Stats     // the counters only
}

// entry is a member that the pool owns.
type entry[M Member] struct {
	member M
	seq    uint64 // of its make
	born   time.Time
	left   chan struct{}      // closed when the pool no longer has it
	stop   context.CancelFunc // ends its check; nil if there is none
}

// waiter is a caller of Get.
type waiter[M Member] struct {
	seq    uint64
	done   chan struct{} // closed when member or err is set
	member M
	err    error
}

// New makes a pool, which starts to fill. It fails if an option is missing or
// out of range. The caller closes it.
func New[M Member](opts Options[M]) (*Pool[M], error) {
	if err := opts.fill(); err != nil {
		return nil, err
	}
	p := &Pool[M]{
		opts:   opts,
		wake:   make(chan struct{}, 1),
		meter:  meter{total: opts.Cost},
		budget: budget{rate: opts.CPU, size: float64(opts.Size), paid: time.Now()},
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.kick()
	p.tasks.Go(p.run)
	return p, nil
}

// Get hands out a member that has just passed its check and belongs to the caller
// from then on. If none is ready it waits for one to be made, for which there is
// no budget and no backoff; callers are served in the order they came.
//
// It fails with the context's cause when ctx ends first: the make goes on, and the
// member is somebody else's. It fails with Make's error, wrapped, if a make begun
// after Get was called has failed, or its member has failed the first check, and
// nothing else is under way for the caller. It fails with ErrClosed once the pool
// is closed.
func (p *Pool[M]) Get(ctx context.Context) (M, error) {
	var none M
	if ctx.Err() != nil {
		return none, context.Cause(ctx)
	}
	w, err := p.join()
	if err != nil {
		return none, err
	}
	select {
	case <-w.done:
	case <-ctx.Done():
		if p.leave(w) {
			return none, context.Cause(ctx)
		}
		// Answered in the same instant. What it was given is nobody else's by now.
	}
	return w.member, w.err
}

func (p *Pool[M]) join() (*waiter[M], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	p.seq++
	w := &waiter[M]{seq: p.seq, done: make(chan struct{})}
	p.waiters = append(p.waiters, w)
	p.kick()
	return w, nil
}

// leave takes a caller out of the queue, and reports whether it was there.
func (p *Pool[M]) leave(w *waiter[M]) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.waiters, w)
	if i < 0 {
		return false
	}
	p.waiters = slices.Delete(p.waiters, i, i+1)
	p.kick()
	return true
}

// Stats are what a pool has and has done. Made is always the sum of Ready,
// HandedOut and Discarded.
type Stats struct {
	Ready   int // members in the pool, those being checked for a caller among them
	Making  int // makes under way
	Waiting int // callers of Get without an answer

	Made      uint64 // makes that succeeded
	HandedOut uint64 // members given to callers
	Discarded uint64 // members closed: ended, failed a check, too old or too many, pool closed
	Failed    uint64 // makes that failed, but for those that Close ended
}

// Stats returns the state of this moment. It does not wait.
func (p *Pool[M]) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Ready, s.Making, s.Waiting = len(p.ready)+p.checking, p.making, len(p.waiters)
	return s
}

// Close ends the makes and checks under way, answers every caller with ErrClosed,
// closes the members that were not handed out and waits for all of it: afterwards
// no goroutine of the pool is left. It returns what closing members then gave,
// joined. Idempotent and safe for concurrent use; every call waits and returns the
// same. It is as quick as Make, Check and a member's Close are when they are told to
// stop.
func (p *Pool[M]) Close() error {
	p.shut()
	p.tasks.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closeErr
}

func (p *Pool[M]) shut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	p.cancel()
	for len(p.waiters) > 0 {
		p.answer(nil, ErrClosed)
	}
	for _, e := range p.ready {
		p.discard(e, nil)
	}
	p.ready = nil
}
