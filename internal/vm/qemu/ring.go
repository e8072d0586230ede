package qemu

import "sync"

// ring keeps the last bytes written to it. The writer is a hostile guest's
// console, so the bound is fixed and Write never waits or fails.
type ring struct {
	mu  sync.Mutex // guards buf
	buf []byte
	max int
}

func newRing(max int) *ring { return &ring{max: max} }

func (r *ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(p)
	if n > r.max {
		p = p[n-r.max:]
	}
	if over := len(r.buf) + len(p) - r.max; over > 0 {
		r.buf = r.buf[:copy(r.buf, r.buf[over:])]
	}
	r.buf = append(r.buf, p...)
	return n, nil
}

// tail returns at most the last n bytes, whole lines where there are several.
func (r *ring) tail(n int) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.buf
	if len(b) > n {
		b = b[len(b)-n:]
		for i, c := range b {
			if c == '\n' && i+1 < len(b) {
				b = b[i+1:]
				break
			}
		}
	}
	return append([]byte(nil), b...)
}
