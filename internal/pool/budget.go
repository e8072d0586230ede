package pool

import (
	"math"
	"sync"
	"time"
)

// budget is a token bucket of CPU time. It is full when there is no debt: then one
// make may begin, which takes the bucket's content, the cost of one make, and
// leaves the next to wait until it has been paid at the rate. Nothing is saved
// beyond that, so a pool that was full for a day does not refill in one burst.
//
// A make is reserved when it begins, by what makes have cost so far, and settled
// when it ends. Charged only at the end, as many as there are makers would begin
// at once. Guarded by Pool.mu.
type budget struct {
	rate     float64   // cores
	size     float64   // bound of debt by overdraw, in makes
	estimate float64   // what a make costs, seconds of CPU time; 0 if not known
	debt     float64   // seconds of CPU time, as of paid
	paid     time.Time // until when the debt has been paid off
}

// known reports whether there is an estimate.
func (b *budget) known() bool { return b.estimate > 0 }

func (b *budget) pay(now time.Time) {
	b.debt = max(0, b.debt-b.rate*now.Sub(b.paid).Seconds())
	b.paid = now
}

// wait returns how long the debt takes to pay, an hour at most: ask again then.
func (b *budget) wait(now time.Time) time.Duration {
	b.pay(now)
	seconds := min(b.debt/b.rate, time.Hour.Seconds())
	return time.Duration(math.Ceil(seconds * float64(time.Second)))
}

// reserve charges a make that begins, and returns what it charged.
func (b *budget) reserve(now time.Time) float64 {
	b.pay(now)
	b.debt += b.estimate
	return b.estimate
}

// overdraw is reserve for a make that does not wait until it is paid for. After an
// hour of those the pool would stay empty for an hour more, if its debt had no
// bound; what is beyond it is forgiven.
func (b *budget) overdraw(now time.Time) float64 {
	b.pay(now)
	if bound := b.size * b.estimate; b.debt < bound {
		b.debt = min(b.debt+b.estimate, bound)
	}
	return b.estimate
}

// settle replaces what was reserved by what the make has cost.
func (b *budget) settle(now time.Time, a attempt, ok bool) {
	b.pay(now)
	spent := a.cost.Seconds()
	if b.known() {
		b.debt = max(0, b.debt+spent-a.reserved)
	} else { // nothing was reserved, so nothing was paid while it ran
		b.debt += max(0, spent-b.rate*now.Sub(a.began).Seconds())
	}
	switch {
	case !ok: // says nothing about the others
	case b.known():
		b.estimate += (spent - b.estimate) / 4
	default:
		b.estimate = spent
	}
}

// meter measures what makes cost.
type meter struct {
	total func() time.Duration // a counter of CPU time; nil: take the time that passes

	mu      sync.Mutex
	running int
	last    time.Duration // total when it was last charged
}

func (m *meter) begin() time.Time {
	if m.total != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.running == 0 { // what was used since is nobody's
			m.last = m.total()
		}
		m.running++
	}
	return time.Now()
}

// end returns the cost of a make. If others ran beside it, the counter does not
// say whose is what: who ends first is charged for all, and nobody twice.
func (m *meter) end(began time.Time) time.Duration {
	if m.total == nil {
		return time.Since(began)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.running--
	before := m.last
	m.last = m.total()
	return max(0, m.last-before) // a VMM that ended may have left the sum
}
