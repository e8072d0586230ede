package seccomp

import (
	"testing"
	"time"
)

func denial(pid, nr int) Denial {
	return Denial{Time: time.Unix(int64(pid), int64(nr)), Thread: pid, Data: Data{Number: int32(nr)}}
}

// put does what a listener does.
func put(r *Ring, d Denial) {
	if !r.Repeat(&d) {
		r.Add(d)
	}
}

// A full ring drops its oldest and counts every call that went with it; what is
// kept and what was dropped are all there were.
func TestRing(t *testing.T) {
	r := NewRing(4)
	if kept, dropped := r.Read(); len(kept) != 0 || dropped != 0 {
		t.Fatalf("new: %v, %d", kept, dropped)
	}
	total := 0
	for i := range 11 {
		for range 1 + i%3 {
			put(r, denial(i, 100+i))
			total++
		}
		kept, dropped := r.Read()
		sum := dropped
		for j, d := range kept {
			sum += d.Count
			if want := i + 1 - len(kept) + j; d.Thread != want || d.Count != 1+want%3 || d.Last.Before(d.Time) {
				t.Errorf("after %d: place %d is %+v, want pid %d", i, j, d, want)
			}
		}
		if sum != total || len(kept) != min(i+1, 4) {
			t.Errorf("after %d: %d kept, %d calls in all; want %d", i, len(kept), sum, total)
		}
	}
	if _, dropped := r.Read(); dropped != total-4-countOf(r) {
		t.Errorf("%d dropped", dropped)
	}
}

// countOf is how many calls more than entries are kept.
func countOf(r *Ring) int {
	kept, _ := r.Read()
	n := -len(kept)
	for _, d := range kept {
		n += d.Count
	}
	return n
}

// Processes that repeat themselves in turn do not fill the ring; another call, or
// another verdict, is another entry.
func TestRingRepeats(t *testing.T) {
	r := NewRing(100)
	for range 50 {
		for pid := range nearby {
			put(r, denial(pid, 1))
		}
	}
	if kept, dropped := r.Read(); len(kept) != nearby || dropped != 0 || kept[0].Count != 50 {
		t.Errorf("%d kept, %d dropped", len(kept), dropped)
	}
	other := denial(0, 1)
	other.Allowed = true
	put(r, other)
	put(r, denial(0, 2))
	if kept, _ := r.Read(); len(kept) != nearby+2 {
		t.Errorf("%d kept", len(kept))
	}
}

// The ring does not keep what its reader was given.
func TestRingReadIsACopy(t *testing.T) {
	r := NewRing(2)
	put(r, denial(1, 1))
	kept, _ := r.Read()
	kept[0].Thread = 7
	if again, _ := r.Read(); again[0].Thread != 1 {
		t.Error("the reader changed the ring")
	}
}
