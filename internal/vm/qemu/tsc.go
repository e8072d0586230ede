package qemu

import (
	"time"

	"golang.org/x/sys/unix"
)

// rdtsc reads the processor's time stamp counter.
func rdtsc() uint64

// measureTSC measures the counter's frequency in kHz against the raw monotonic
// clock, over 50 ms: good to some 20 parts in a million.
func measureTSC() int {
	t0, c0 := sampleTSC()
	time.Sleep(50 * time.Millisecond)
	t1, c1 := sampleTSC()
	return int((c1 - c0) * 1_000_000 / uint64(t1-t0))
}

// sampleTSC reads clock and counter at the same moment: the closest of several
// tries, as we may be interrupted between the two.
func sampleTSC() (nanos int64, counter uint64) {
	best := uint64(1) << 63
	for range 16 {
		var ts unix.Timespec
		before := rdtsc()
		unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts)
		after := rdtsc()
		if d := after - before; d < best {
			best, nanos, counter = d, ts.Nano(), before+d/2
		}
	}
	return nanos, counter
}
