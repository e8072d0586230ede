package verify

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
	"github.com/ironclaw-run/ironclaw/internal/verify/testnet"
)

// usable is how usable a neighbour and the host are: medians of round trips.
//
// The ratio of two of them is shown, and not judged: two processors that are also
// shared with others make any ratio now and then. What is judged is that every
// single round trip succeeded, and within usableBound: a neighbour that was starved,
// out of memory or hung up does not, whatever the host is.
type usable struct {
	neighbour, process, disk, memory time.Duration
}

// usableBound is far above what a round trip takes on a busy host (some hundred
// milliseconds), and far below what anybody would still call working.
const usableBound = 20 * time.Second

// rounds is how often each thing is measured.
const rounds = 3

// against shows u beside what was before.
func (u usable) against(before usable) string {
	ratio := func(a, b time.Duration) string {
		return fmt.Sprintf("%.1f×", float64(a)/float64(max(b, time.Microsecond)))
	}
	return fmt.Sprintf("neighbour %s, host's processes %s, disk %s, memory %s of before",
		ratio(u.neighbour, before.neighbour), ratio(u.process, before.process), ratio(u.disk, before.disk), ratio(u.memory, before.memory))
}

// measure runs something in the neighbour and does something on the host, rounds
// times each.
func (e *env) measure(ctx context.Context, neighbour *sandbox.Sandbox) (usable, error) {
	var u usable
	for _, m := range []struct {
		what string
		to   *time.Duration
		do   func(context.Context) error
	}{
		{"a command in a neighbour", &u.neighbour, func(ctx context.Context) error {
			_, err := e.guestRun(ctx, neighbour, sandbox.Cmd{Args: []string{"true"}})
			return err
		}},
		{"a process of the host", &u.process, func(ctx context.Context) error {
			return testnet.Child(ctx, e.opts.Program, probe.Name, "[]").Run()
		}},
		{"writing to the host's disk", &u.disk, func(context.Context) error { return e.writeFile() }},
		{"using the host's memory", &u.memory, func(ctx context.Context) error {
			return testnet.Child(ctx, e.opts.Program, probe.Name, touchMemory).Run()
		}},
	} {
		var took []time.Duration
		for range rounds {
			begun := time.Now()
			ctx, cancel := context.WithTimeoutCause(ctx, usableBound, fmt.Errorf("not done within %v", usableBound))
			err := m.do(ctx)
			cancel()
			if err != nil {
				return u, fmt.Errorf("%s: %w", m.what, err)
			}
			if d := time.Since(begun); d > usableBound {
				return u, fmt.Errorf("%s: it took %v", m.what, d)
			}
			took = append(took, time.Since(begun))
		}
		slices.Sort(took)
		*m.to = took[len(took)/2]
	}
	return u, nil
}

func (e *env) writeFile() error {
	f, err := os.OpenFile(filepath.Join(e.dir, "write"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 1<<20)); err != nil {
		return err
	}
	return f.Sync()
}

// touchMemory takes memory in a process of its own: this one's is watched.
var touchMemory = probe.Line(probe.Request{Attack: "limit.memory", Args: []string{"33554432"}})
