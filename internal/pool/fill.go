package pool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
)

// Backoff of refilling: after a failed make, doubled with each further one, until
// one succeeds. A member that is lost within maxBackoff of its birth puts refilling
// off by minBackoff, so that machines which end as soon as they run are not made
// as fast as they can be.
const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 30 * time.Second
)

// never is a wait for an event and not for a time.
const never = time.Duration(math.MaxInt64)

var errEnded = errors.New("the machine has ended")

// kick lets run look at the pool again.
func (p *Pool[M]) kick() {
	select {
	case p.wake <- struct{}{}:
	default: // it will anyway
	}
}

// run is where all that the pool begins is begun. Events change the state and kick
// it; the timer is for what time alone changes: debt, backoff and age.
func (p *Pool[M]) run() {
	timer := time.NewTimer(never)
	defer timer.Stop()
	for {
		timer.Stop()
		if d := p.step(); d != never {
			timer.Reset(d)
		}
		select {
		case <-p.ctx.Done():
			return
		case <-p.wake:
		case <-timer.C:
		}
	}
}

// step begins what is to be begun now, and returns how long that will not change
// without an event.
func (p *Pool[M]) step() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return never
	}
	now := time.Now()
	aged := p.retire(now)
	for len(p.ready) > 0 && p.checking < len(p.waiters) {
		p.startCheck()
	}
	for p.making < p.opts.Makers && p.making+p.checking < len(p.waiters) {
		p.startMake(p.budget.overdraw(now))
	}
	return min(aged, p.refill(now))
}

// retire discards what is too old, and returns when the next one will be.
func (p *Pool[M]) retire(now time.Time) time.Duration {
	next := never
	if p.opts.MaxAge == 0 {
		return next
	}
	p.ready = slices.DeleteFunc(p.ready, func(e *entry[M]) bool {
		left := p.opts.MaxAge - now.Sub(e.born)
		if left <= 0 {
			p.discard(e, nil)
			return true
		}
		next = min(next, left)
		return false
	})
	return next
}

// refill begins makes for nobody in particular, as backoff and budget allow, and
// returns when they will allow the next.
//
// While callers wait for makes it begins none: it would take the CPU from theirs,
// and a caller is told of a failure only if nothing else is under way for him,
// which has to come to an end.
func (p *Pool[M]) refill(now time.Time) time.Duration {
	for p.checking >= len(p.waiters) && p.making < p.opts.Makers &&
		p.making+p.checking+len(p.ready) < p.opts.Size {
		if p.making > 0 && !p.budget.known() {
			return never // the first one tells what the next ones will cost
		}
		if d := max(p.retryAt.Sub(now), p.lostUntil.Sub(now), p.budget.wait(now)); d > 0 {
			return d
		}
		p.startMake(p.budget.reserve(now))
	}
	return never
}

// attempt is a make.
type attempt struct {
	seq      uint64
	reserved float64 // of the budget
	began    time.Time
	cost     time.Duration // known when it has ended
}

func (p *Pool[M]) startMake(reserved float64) {
	p.making++
	p.seq++
	a := attempt{seq: p.seq, reserved: reserved}
	p.tasks.Go(func() { p.make(a) })
}

func (p *Pool[M]) make(a attempt) {
	a.began = p.meter.begin()
	m, err := p.opts.Make(p.ctx)
	a.cost = p.meter.end(a.began)
	if err == nil {
		p.made(a, m)
		return
	}
	err = fmt.Errorf("make a machine: %w", err)
	if p.failed(a, err) {
		p.opts.OnError(err)
	}
}

func (p *Pool[M]) made(a attempt, m M) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.making--
	p.budget.settle(now, a, true)
	p.stats.Made++
	p.failures, p.retryAt = 0, time.Time{}
	e := &entry[M]{member: m, seq: a.seq, born: now, left: make(chan struct{})}
	p.tasks.Go(func() { p.watch(e) })
	p.ready = append(p.ready, e)
	p.settleIn(e)
}

// failed takes a make's failure, and reports whether it is one: a closed pool
// makes them fail.
func (p *Pool[M]) failed(a attempt, err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.making--
	p.budget.settle(now, a, false)
	if p.closed {
		return false
	}
	p.stats.Failed++
	p.retryAt = now.Add(min(minBackoff<<min(p.failures, 16), maxBackoff))
	p.failures++
	p.miss(a.seq, err)
	p.kick()
	return true
}

// settleIn lets an entry that is in ready stay there, if there is a pool and room.
func (p *Pool[M]) settleIn(e *entry[M]) {
	surplus := len(p.waiters) == 0 && len(p.ready) > p.opts.Size+p.opts.Makers
	if p.closed || surplus {
		p.remove(e)
		p.discard(e, nil)
	}
	p.kick()
}

// watch waits for the end of a member as long as the pool has it.
func (p *Pool[M]) watch(e *entry[M]) {
	select {
	case <-e.left:
		return
	case <-e.member.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.remove(e):
		p.lose(e, errEnded)
	case e.stop != nil:
		e.stop() // whoever checks it sees that it has ended
	}
}

// startCheck checks the oldest ready member, for whoever waits first by then.
//
// A caller's context does not end the check. The verdict is wanted anyway: a
// machine that does not answer would go back to the pool whenever the caller has
// less patience than CheckTimeout.
func (p *Pool[M]) startCheck() {
	e := p.ready[0]
	p.ready = slices.Delete(p.ready, 0, 1)
	p.checking++
	ctx, cancel := context.WithTimeout(p.ctx, p.opts.CheckTimeout)
	e.stop = cancel
	p.tasks.Go(func() {
		defer cancel()
		err := e.member.Check(ctx)
		if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = fmt.Errorf("no answer within %v: %w", p.opts.CheckTimeout, err)
		}
		p.checked(e, err)
	})
}

func (p *Pool[M]) checked(e *entry[M], err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.stop = nil
	p.checking--
	select {
	case <-e.member.Done():
		err = errEnded
	default:
	}
	switch {
	case p.closed:
		p.discard(e, nil)
	case err != nil:
		p.lose(e, err)
		p.miss(e.seq, fmt.Errorf("check a new machine: %w", err))
	case len(p.waiters) > 0:
		p.answer(e, nil)
	default: // the caller has gone
		p.ready = slices.Insert(p.ready, 0, e)
		p.settleIn(e)
	}
	p.kick()
}

// answer gives the first caller a member or an error.
func (p *Pool[M]) answer(e *entry[M], err error) {
	w := p.waiters[0]
	p.waiters = slices.Delete(p.waiters, 0, 1)
	if e != nil {
		close(e.left)
		p.stats.HandedOut++
		w.member = e.member
	}
	w.err = err
	close(w.done)
}

// miss tells the first caller that the make with this number came to nothing, if
// it was begun after he came and nothing else is under way for him.
func (p *Pool[M]) miss(seq uint64, err error) {
	if len(p.waiters) > p.making+p.checking+len(p.ready) && p.waiters[0].seq < seq {
		p.answer(nil, err)
	}
}

// remove takes an entry out of ready, and reports whether it was there.
func (p *Pool[M]) remove(e *entry[M]) bool {
	i := slices.Index(p.ready, e)
	if i < 0 {
		return false
	}
	p.ready = slices.Delete(p.ready, i, i+1)
	return true
}

// lose discards a member with a fault.
func (p *Pool[M]) lose(e *entry[M], err error) {
	now := time.Now()
	if now.Sub(e.born) < maxBackoff {
		p.lostUntil = now.Add(minBackoff)
	}
	p.discard(e, err)
	p.kick()
}

// discard closes a member that is in no list any more. Nobody waits for it but
// Close.
func (p *Pool[M]) discard(e *entry[M], err error) {
	close(e.left)
	p.stats.Discarded++
	p.tasks.Go(func() {
		closeErr := e.member.Close()
		if err != nil {
			p.opts.OnError(fmt.Errorf("ready machine discarded: %w", err))
		}
		if closeErr != nil {
			p.closeFailed(fmt.Errorf("close a ready machine: %w", closeErr))
		}
	})
}

// closeFailed tells an error: to who closes the pool, if there is one.
func (p *Pool[M]) closeFailed(err error) {
	p.mu.Lock()
	closed := p.closed
	if closed {
		p.closeErr = errors.Join(p.closeErr, err)
	}
	p.mu.Unlock()
	if !closed {
		p.opts.OnError(err)
	}
}
