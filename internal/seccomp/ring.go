package seccomp

import (
	"sync"
	"time"
)

// Denial is a call that was refused, or by a profile that only logs would have
// been. Repetitions by the same thread are one Denial.
type Denial struct {
	Time    time.Time // of the first
	Last    time.Time // of the last
	Count   int       // how often, 1 at least
	Thread  int       // its number, as the listener's reader has it
	PID     int       // its process's, as the process itself has it; 0 if it was not looked up
	UID     int       // its user; -1 if it was not looked up
	Comm    string    // its name, at its own choice; "" if it was not looked up
	Profile string
	Data    Data // of the first
	Allowed bool // it was logged only
}

// same reports whether d and e are one.
func (d *Denial) same(e *Denial) bool {
	return d.Thread == e.Thread && d.Data.Number == e.Data.Number && d.Data.Arch == e.Data.Arch &&
		d.Profile == e.Profile && d.Allowed == e.Allowed
}

// Ring keeps the last denials, a fixed number of them, and counts those that it
// had to drop. Safe for concurrent use.
type Ring struct {
	mu      sync.Mutex // guards what follows
	entries []Denial   // a ring once it is full
	size    int
	next    int // where the next goes, once full
	last    int // the newest; repetitions are looked for near it
	dropped int
}

// NewRing makes a ring for size denials.
func NewRing(size int) *Ring { return &Ring{size: size} }

// nearby is how many of the newest are compared with a denial: a few processes
// that repeat themselves in turn do not fill the ring.
const nearby = 8

// Repeat counts the denial if it repeats one of the newest, and reports whether it
// does.
func (r *Ring) Repeat(d *Denial) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.entries)
	for i := range min(nearby, n) {
		if e := &r.entries[(r.last-i+n)%n]; e.same(d) {
			e.Count++
			e.Last = d.Time
			return true
		}
	}
	return false
}

// Add keeps a denial. If the ring is full its oldest is dropped.
func (r *Ring) Add(d Denial) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d.Last, d.Count = d.Time, 1
	if len(r.entries) < r.size {
		r.last = len(r.entries)
		r.entries = append(r.entries, d)
		return
	}
	r.dropped += r.entries[r.next].Count
	r.entries[r.next] = d
	r.last = r.next
	r.next = (r.next + 1) % r.size
}

// Read returns what is kept, the oldest first, and how many were dropped.
func (r *Ring) Read() (kept []Denial, dropped int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	kept = append(kept, r.entries[r.next:]...)
	return append(kept, r.entries[:r.next]...), r.dropped
}
