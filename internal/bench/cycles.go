package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
)

// settled is after how many cycles everything that is made once has been made.
const settled = 20

// cycles makes, uses and destroys sandboxes in this process, and looks for what
// they leave behind: files, processes and descriptors may not become more. The
// host's directory should be nobody else's meanwhile.
func (b *Bench) cycles(ctx context.Context) (*Table, error) {
	t := &Table{Name: fmt.Sprintf("cycles: %d times made, used and destroyed", b.N)}
	if err := b.warm(ctx, t); err != nil {
		return nil, err
	}
	w, err := newWatch(t)
	if err != nil {
		return nil, err
	}
	var before remains
	base := min(settled, b.N/2)
	for i := range b.N {
		if i == base {
			if before, err = look(b.Host.Home); err != nil {
				return nil, err
			}
		}
		w.sample()
		if err := b.cycle(ctx, t); err != nil {
			return nil, fmt.Errorf("cycle %d of %d: %w", i+1, b.N, err)
		}
	}
	after, err := look(b.Host.Home)
	if err != nil {
		return nil, err
	}
	if err := w.finish(); err != nil {
		return nil, err
	}
	return t, t.growth(before, after, b.N-base)
}

func (b *Bench) cycle(ctx context.Context, t *Table) error {
	const row = "a cycle"
	begun := time.Now()
	s, err := b.create(ctx, t)
	if err != nil {
		return err
	}
	defer s.Close()
	created := time.Now()
	if err := runOne(ctx, s, sandbox.Cmd{Args: []string{"true"}}); err != nil {
		return err
	}
	ran := time.Now()
	if err := s.Close(); err != nil {
		return err
	}
	closed := time.Now()
	t.add(row, "ms", ms(closed.Sub(begun)))
	t.addTo(row, "create", "ms", ms(created.Sub(begun)))
	t.addTo(row, "run true", "ms", ms(ran.Sub(created)))
	t.addTo(row, "close", "ms", ms(closed.Sub(ran)))
	return nil
}

// remains is what there is between two cycles.
type remains struct {
	files       map[string]bool
	processes   map[int]bool
	descriptors map[string]bool // number and what it is of
	goroutines  int
	memory      float64 // MiB of this process
}

func look(home string) (r remains, err error) {
	r.goroutines = runtime.NumGoroutine()
	runtime.GC() // closes what only a finalizer would
	debug.FreeOSMemory()
	if home, err = filepath.EvalSymlinks(home); err != nil {
		return r, err
	}
	if r.files, err = filesBelow(home); err != nil {
		return r, err
	}
	below, err := descendants()
	if err != nil {
		return r, err
	}
	r.processes = make(map[int]bool)
	for _, p := range below {
		r.processes[p.pid] = true
	}
	if r.descriptors, err = descriptors(); err != nil {
		return r, err
	}
	rss, err := kib("/proc/self/status", "VmRSS")
	r.memory = float64(rss) / 1024
	return r, err
}

// descriptors lists what this process has open, but for the listing's own.
func descriptors() (map[string]bool, error) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	open := make(map[string]bool)
	for _, e := range entries {
		if of, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open[e.Name()+" ("+of+")"] = true
		}
	}
	return open, nil
}

// growth adds what became more over n cycles. Anything but memory and goroutines,
// which come and go, is an error that names some of it.
func (t *Table) growth(before, after remains, n int) error {
	var faults []string
	check := func(what string, was, is int, added []string) {
		t.add("more "+what, "", float64(is-was))
		if is > was {
			faults = append(faults, fmt.Sprintf("%d %s (%s)", is-was, what, some(added)))
		}
	}
	check("files below the home", len(before.files), len(after.files), added(before.files, after.files))
	check("processes", len(before.processes), len(after.processes), added(before.processes, after.processes))
	check("descriptors", len(before.descriptors), len(after.descriptors), added(before.descriptors, after.descriptors))
	t.add("more goroutines", "", float64(after.goroutines-before.goroutines))
	t.add("more memory of this process (RSS)", "MiB", after.memory-before.memory)
	if faults != nil {
		return fmt.Errorf("%d cycles left behind %s", n, strings.Join(faults, ", "))
	}
	return nil
}

func added[K comparable](before, after map[K]bool) (names []string) {
	for k := range after {
		if !before[k] {
			names = append(names, fmt.Sprint(k))
		}
	}
	slices.Sort(names)
	return names
}

// some is the first few of what may be many.
func some(names []string) string {
	const few = 4
	if len(names) > few {
		return strings.Join(names[:few], ", ") + ", ..."
	}
	return strings.Join(names, ", ")
}
