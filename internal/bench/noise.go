package bench

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Conditions are what the machine did beside us while a table was measured.
type Conditions struct {
	Calibration []float64 `json:"calibration_ms"` // the same arithmetic, before each sample
	Steal       float64   `json:"steal"`          // part of the CPU time that the hypervisor took
	Others      float64   `json:"others"`         // part of it that other processes used
}

// Bounds of what is not noisy; see the package comment.
const (
	maxSpread = 1.75 // p90 of the calibration to its least. A sibling hyperthread that works costs 1.55
	maxSteal  = 0.05 // of the CPU time
	maxOthers = 0.25
)

// noisy says why nothing but the least values may be quoted; "" if they all may.
func (c *Conditions) noisy() string {
	var why []string
	if fast, slow := quantile(c.Calibration, 0), quantile(c.Calibration, 0.9); slow > maxSpread*fast {
		why = append(why, fmt.Sprintf("the same arithmetic took %s to %s ms", number(fast), number(slow)))
	}
	if c.Steal > maxSteal {
		why = append(why, fmt.Sprintf("the hypervisor took %.0f %% of the CPU time", 100*c.Steal))
	}
	if c.Others > maxOthers {
		why = append(why, fmt.Sprintf("other processes used %.0f %% of the CPUs", 100*c.Others))
	}
	return strings.Join(why, ", ")
}

// watch sees what else happens while a table is measured.
type watch struct {
	table  *Table
	rounds int // of the arithmetic
	begun  usage
}

// usage is CPU time until a moment.
type usage struct {
	cpus stat
	own  time.Duration
}

// newWatch begins the table's measuring; finish ends it.
func newWatch(t *Table) (*watch, error) {
	t.Host = hostFacts()
	w := &watch{table: t, rounds: 1}
	// As many rounds as take long enough for the clock and for a disturbance.
	for w.least() < 2500*time.Microsecond {
		w.rounds += 1 + w.rounds/8
	}
	var err error
	w.begun, err = readUsage()
	return w, err
}

// least is the least of a few tries.
func (w *watch) least() time.Duration {
	least := w.arithmetic()
	for range 2 {
		least = min(least, w.arithmetic())
	}
	return least
}

var buffer [64 << 10]byte

func (w *watch) arithmetic() time.Duration {
	begun := time.Now()
	for range w.rounds {
		sha256.Sum256(buffer[:])
	}
	return time.Since(begun)
}

// sample comes before each thing that is measured.
func (w *watch) sample() {
	c := &w.table.Conditions
	c.Calibration = append(c.Calibration, ms(w.arithmetic()))
}

// finish judges the table. Machines whose CPU time is ours may still run.
func (w *watch) finish() error {
	end, err := readUsage()
	if err != nil {
		return err
	}
	c := &w.table.Conditions
	c.Steal, c.Others = shares(w.begun, end)
	w.table.Noisy = c.noisy()
	return nil
}

// shares are the parts of the CPU time between two moments that the hypervisor
// took and that other processes used.
func shares(begun, end usage) (steal, others float64) {
	total := float64(end.cpus.total - begun.cpus.total)
	if total <= 0 { // less than a tick
		return 0, 0
	}
	busy := float64(end.cpus.busy-begun.cpus.busy) - float64(end.own-begun.own)
	return float64(end.cpus.steal-begun.cpus.steal) / total, max(0, busy/total)
}

func readUsage() (usage, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return usage{}, err
	}
	cpus, err := parseStat(string(b))
	if err != nil {
		return usage{}, err
	}
	own, err := ownTime()
	return usage{cpus, own}, err
}

// stat is the CPU time of all processors since they were started.
type stat struct{ total, busy, steal time.Duration }

// parseStat reads the first line of /proc/stat: user, nice, system, idle, iowait,
// irq, softirq, steal. What follows is part of user and nice.
func parseStat(s string) (stat, error) {
	line, _, _ := strings.Cut(s, "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return stat{}, errors.New("read /proc/stat: it does not begin with the sum of all cpus")
	}
	var st stat
	for i, f := range fields[1:9] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return stat{}, fmt.Errorf("read /proc/stat: %w", err)
		}
		d := time.Duration(n) * tick
		st.total += d
		switch i {
		case 3, 4:
		case 7:
			st.steal += d
		default:
			st.busy += d
		}
	}
	return st, nil
}
