package bench

import "time"

// Hasten makes b small enough for a test.
func (b *Bench) Hasten() { b.together, b.interval = 3, 200*time.Millisecond }
