package bench

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestNoisy(t *testing.T) {
	even := []float64{2, 2.1, 2.2, 2, 2, 2, 2, 2, 2, 3}
	for name, c := range map[string]struct {
		c    Conditions
		want string
	}{
		"nothing known":      {Conditions{}, ""},
		"quiet":              {Conditions{even, 0.05, 0.25}, ""},
		"one of many":        {Conditions{append([]float64{9}, append(even, even...)...), 0, 0}, ""},
		"arithmetic":         {Conditions{[]float64{2, 3.6}, 0, 0}, "the same arithmetic took 2.00 to 3.60 ms"},
		"steal":              {Conditions{even, 0.06, 0}, "the hypervisor took 6 % of the CPU time"},
		"others":             {Conditions{even, 0, 0.5}, "other processes used 50 % of the CPUs"},
		"all, joined by ,":   {Conditions{[]float64{2, 4}, 0.1, 0.3}, "the same arithmetic took 2.00 to 4.00 ms, the hypervisor took 10 % of the CPU time, other processes used 30 % of the CPUs"},
		"exactly the bounds": {Conditions{[]float64{2, 3.5}, maxSteal, maxOthers}, ""},
	} {
		if got := c.c.noisy(); got != c.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestParseStat(t *testing.T) {
	st, err := parseStat("cpu  100 10 50 800 20 3 7 10 5 0\ncpu0 1 2 3\n")
	if want := (stat{total: 10 * time.Second, busy: 1700 * time.Millisecond, steal: 100 * time.Millisecond}); err != nil || st != want {
		t.Errorf("%+v, %v", st, err)
	}
	for _, s := range []string{"", "cpu", "cpu 1 2 3 4 5 6 7", "cpu0 1 2 3 4 5 6 7 8", "cpu 1 2 3 x 5 6 7 8"} {
		if st, err := parseStat(s); err == nil {
			t.Errorf("%q: %+v", s, st)
		}
	}
}

func TestShares(t *testing.T) {
	at := func(total, busy, steal, own int) usage {
		return usage{stat{time.Duration(total), time.Duration(busy), time.Duration(steal)}, time.Duration(own)}
	}
	for name, c := range map[string]struct {
		begun, end    usage
		steal, others float64
	}{
		"no time":     {at(5, 5, 5, 5), at(5, 9, 9, 5), 0, 0},
		"idle":        {at(100, 50, 5, 10), at(200, 50, 5, 10), 0, 0},
		"only we":     {at(100, 50, 5, 10), at(200, 90, 5, 50), 0, 0},
		"others":      {at(100, 50, 5, 10), at(200, 90, 5, 20), 0, 0.3},
		"steal":       {at(100, 50, 5, 10), at(200, 60, 15, 20), 0.1, 0},
		"we, rounded": {at(100, 50, 5, 10), at(200, 59, 5, 20), 0, 0},
	} {
		if steal, others := shares(c.begun, c.end); steal != c.steal || others != c.others {
			t.Errorf("%s: %v, %v", name, steal, others)
		}
	}
}

func TestParseProcess(t *testing.T) {
	p, err := parseProcess("42 (a) b (c)) S 7 42 42 0 -1 4194560 1 2 3 4 110 20 30 5 20 0 1 0 999 1 2\n")
	if want := (process{42, 7, 1300 * time.Millisecond, 350 * time.Millisecond}); err != nil || p != want {
		t.Errorf("%+v, %v", p, err)
	}
	for _, s := range []string{"", "42 (x", "42 (x) S 7", "x (x) S 7 42 42 0 -1 4194560 1 2 3 4 110 20 30 5 20", "42 (x) S 7 42 42 0 -1 4194560 1 2 3 4 a 20 30 5 20"} {
		if p, err := parseProcess(s); err == nil {
			t.Errorf("%q: %+v", s, p)
		}
	}
}

// What a child has used is ours while it lives and when it has ended, and not
// twice; until then it is seen.
func TestOwnTime(t *testing.T) {
	before, err := ownTime()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo; read x")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	below, err := descendants()
	if err != nil || len(below) != 1 || below[0].pid != cmd.Process.Pid {
		t.Errorf("%+v, %v", below, err)
	}
	living, _ := ownTime()
	if living-before < 2*tick {
		t.Errorf("the child's work is not seen: %v, %v", before, living)
	}
	stdin.Close()
	_ = cmd.Wait() // 1: there was nothing to read
	ended, _ := ownTime()
	if d := ended - living; d < -3*tick || d > 10*tick {
		t.Errorf("it was %v while it lived, and %v after", living, ended)
	}
	if below, _ := descendants(); len(below) != 0 {
		t.Errorf("%+v", below)
	}
}

func TestWatch(t *testing.T) {
	table := &Table{}
	w, err := newWatch(table)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		w.sample()
	}
	if err := w.finish(); err != nil {
		t.Fatal(err)
	}
	c := table.Conditions
	if len(c.Calibration) != 3 || quantile(c.Calibration, 0) < 0.5 || c.Steal < 0 || c.Others < 0 || c.Others > 1 {
		t.Errorf("%+v", c)
	}
	if table.Noisy != c.noisy() {
		t.Errorf("%q", table.Noisy)
	}
}

func TestMemoryOf(t *testing.T) {
	if mib, err := memoryOf(os.Getpid()); err != nil || mib <= 0 || mib > 1<<20 {
		t.Errorf("this process: %v MiB, %v", mib, err)
	}
	if _, err := memoryOf(0); err == nil {
		t.Error("there is a process 0")
	}
	if free, all, err := available(); err != nil || free <= 0 || free > all {
		t.Errorf("%v of %v MiB, %v", free, all, err)
	}
}

func TestHostFacts(t *testing.T) {
	facts := hostFacts().String()
	for _, want := range []string{"Linux ", " cpu", "GiB", "load "} {
		if !strings.Contains(facts, want) {
			t.Errorf("%q does not say %q", facts, want)
		}
	}
	if strings.Contains(facts, "\n") {
		t.Errorf("%q is no line", facts)
	}
}

// A look names what was opened and made since the last one.
func TestLook(t *testing.T) {
	home := t.TempDir()
	before, err := look(home)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(home, "left"))
	if err != nil {
		t.Fatal(err)
	}
	after, err := look(home)
	if err != nil {
		t.Fatal(err)
	}
	err = new(Table).growth(before, after, 1)
	if err == nil || !strings.Contains(err.Error(), "1 files") || strings.Count(err.Error(), "left)") != 2 {
		t.Errorf("%v", err)
	}
	f.Close()
	os.Remove(f.Name())
	if after, err = look(home); err == nil {
		err = new(Table).growth(before, after, 1)
	}
	if err != nil {
		t.Error(err)
	}
}
