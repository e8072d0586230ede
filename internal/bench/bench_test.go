package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/ironclaw-run/ironclaw/internal/golden"
)

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		values        []float64
		min, p50, p90 float64
	}{
		{nil, 0, 0, 0},
		{[]float64{3}, 3, 3, 3},
		{[]float64{2, 1}, 1, 2, 2},
		{[]float64{3, 1, 2}, 1, 2, 3},
		{[]float64{10, 9, 8, 7, 6, 5, 4, 3, 2, 1}, 1, 6, 10},
		{[]float64{5, 5, 5, 1}, 1, 5, 5},
	} {
		r := &Row{Values: c.values}
		if r.Quantile(0) != c.min || r.Quantile(0.5) != c.p50 || r.Quantile(0.9) != c.p90 {
			t.Errorf("%v: %v %v %v", c.values, r.Quantile(0), r.Quantile(0.5), r.Quantile(0.9))
		}
	}
	r := &Row{Values: []float64{2, 3, 1}}
	if max := r.Quantile(1); max != 3 {
		t.Errorf("the largest is %v", max)
	}
	if d := cmp.Diff([]float64{2, 3, 1}, r.Values); d != "" {
		t.Errorf("the values were reordered: %s", d)
	}
}

func testTable(noisy string) *Table {
	t := &Table{
		Name:    "start: x",
		Host:    Host{Kernel: "6.1", CPU: "a CPU", CPUs: 2, Memory: 24105, Load: "0.50"},
		Machine: Machine{VMM: "qemu 7.2", Accel: "tcg", Link: "serial", CPUs: 1, Memory: 256, Cloned: true},
		Noisy:   noisy,
	}
	for _, v := range []float64{1234.5, 99.96, 3} {
		t.add("whole process", "ms", v)
		t.addTo("whole process", "boot", "ms", v/1000)
	}
	t.add("ünïcode", "MiB/s", 10)
	t.add("plain", "", -12)
	t.row("", "nothing yet", "ms")
	t.ratio("whole process, to ünïcode (p50)", t.p("whole process", 0.5), t.p("ünïcode", 0.5))
	t.note("something was missing")
	return t
}

func TestPrint(t *testing.T) {
	for path, noisy := range map[string]string{
		"testdata/table.golden": "",
		"testdata/noisy.golden": "the same arithmetic took 2.50 to 6.10 ms, the hypervisor took 7 % of the CPU time",
	} {
		var b bytes.Buffer
		if err := testTable(noisy).Print(&b); err != nil {
			t.Fatal(err)
		}
		golden.Check(t, path, b.String())
	}
}

// A full disk or a closed pipe is no success.
func TestPrintError(t *testing.T) {
	if err := testTable("").Print(brokenWriter{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("error %v", err)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, os.ErrClosed }

// The shape of --json: every value, in the order in which it was measured, also of
// a noisy table, which has no ratios.
func TestTableJSON(t *testing.T) {
	for noisy, want := range map[string]string{
		"":  `"ratios":[{"name":"r to s","value":2}],"conditions":{"calibration_ms":[2.5],"steal":0.1,"others":0.2}}`,
		"x": `"noisy":"x","conditions":{"calibration_ms":[2.5],"steal":0.1,"others":0.2}}`,
	} {
		table := &Table{Name: "n", Noisy: noisy, Conditions: Conditions{[]float64{2.5}, 0.1, 0.2}}
		table.addTo("q", "r", "ms", 2)
		table.addTo("q", "r", "ms", 1)
		table.ratio("r to s", 4, 2)
		b, err := json.Marshal(table)
		if err != nil {
			t.Fatal(err)
		}
		want := `{"name":"n","host":{"kernel":"","cpu":"","cpus":0,"memory_mib":0,"load":""},` +
			`"machine":{"vmm":"","accel":"","link":"","cpus":0,"memory_mib":0,"cloned":false},` +
			`"rows":[{"of":"q","name":"r","unit":"ms","values":[2,1]}],` + want
		if d := cmp.Diff(want, string(b)); d != "" {
			t.Errorf("-want +got:\n%s", d)
		}
	}
}

// A ratio of nothing is none.
func TestRatio(t *testing.T) {
	table := &Table{}
	table.add("a", "ms", 3)
	table.ratio("to what is absent", table.p("a", 0.5), table.p("b", 0.5))
	table.ratio("of what is absent", table.p("b", 0.5), table.p("a", 0.5))
	table.addTo("b", "c", "ms", 1) // a part is no row of its own
	table.ratio("to a part", table.p("a", 0.5), table.p("c", 0.5))
	if len(table.Ratios) != 0 {
		t.Errorf("%+v", table.Ratios)
	}
	table.add("d", "ms", 2)
	table.ratio("a to d", table.p("a", 0.5), table.p("d", 0.5))
	if len(table.Ratios) != 1 || table.Ratios[0].Value != 1.5 {
		t.Errorf("%+v", table.Ratios)
	}
}

func TestTenths(t *testing.T) {
	for _, c := range []struct {
		values     []float64
		head, tail float64
	}{
		{nil, 0, 0},
		{[]float64{2}, 2, 2},
		{[]float64{1, 5, 3}, 1, 3},
		{[]float64{1, 3, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 4, 6}, 2, 5},
	} {
		if head, tail := tenths(c.values); head != c.head || tail != c.tail {
			t.Errorf("%v: %v, %v", c.values, head, tail)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0.00", 0.004: "0.00", 9.994: "9.99", 10: "10.0", 99.94: "99.9", 100: "100", 1234.5: "1234", -3: "-3.00", -250: "-250"} {
		if got := number(v); got != want {
			t.Errorf("%v: %s, want %s", v, got, want)
		}
	}
}

func TestCounterAndZeros(t *testing.T) {
	var c counter
	b := []byte{1, 2, 3}
	if n, err := (zeros{}).Read(b); n != 3 || err != nil || !bytes.Equal(b, make([]byte, 3)) {
		t.Errorf("%d, %v, %v", n, err, b)
	}
	for range 2 {
		c.Write(b)
	}
	if c != 6 {
		t.Errorf("counted %d", c)
	}
}

func TestArguments(t *testing.T) {
	if _, err := (Bench{}).Run(t.Context(), "nothing"); err == nil || !strings.Contains(err.Error(), `"nothing"`) {
		t.Errorf("an unknown benchmark: %v", err)
	}
	if _, err := (Bench{N: -1}).Run(t.Context(), "exec"); err == nil || !strings.Contains(err.Error(), "-1") {
		t.Errorf("a negative number: %v", err)
	}
	for _, name := range Usual() {
		if !strings.Contains(strings.Join(Names(), " "), name) {
			t.Errorf("there is no %s", name)
		}
	}
}

// Any growth is an error that names what grew; memory may grow.
func TestGrowth(t *testing.T) {
	set := func(names ...string) map[string]bool {
		m := make(map[string]bool)
		for _, n := range names {
			m[n] = true
		}
		return m
	}
	before := remains{set("a", "b"), map[int]bool{7: true}, set("3 (pipe)"), 5, 20}
	for name, c := range map[string]struct {
		after remains
		want  []string
	}{
		"nothing":        {before, nil},
		"memory":         {remains{before.files, before.processes, before.descriptors, 9, 99}, nil},
		"less":           {remains{set("a"), nil, nil, 1, 1}, nil},
		"others as many": {remains{set("c", "d"), map[int]bool{8: true}, set("4 (pipe)"), 5, 20}, nil},
		"a file":         {remains{set("a", "b", "run/x"), nil, nil, 5, 20}, []string{"1 files", "(run/x)"}},
		"a process":      {remains{nil, map[int]bool{7: true, 99: true}, nil, 5, 20}, []string{"1 processes", "(99)"}},
		"a descriptor":   {remains{nil, nil, set("3 (pipe)", "9 (socket)"), 5, 20}, []string{"1 descriptors", "9 (socket)"}},
		"all":            {remains{set("1", "2", "3", "4", "5", "6"), map[int]bool{1: true, 2: true}, set("8", "9"), 5, 20}, []string{"4 files", "1, 2, 3, 4, ...", "1 processes", "1 descriptors"}},
	} {
		table := &Table{}
		err := table.growth(before, c.after, 80)
		if (err != nil) != (c.want != nil) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, want := range append(c.want, "80 cycles left behind") {
			if err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, and no word of %q", name, err, want)
			}
		}
		if len(table.Rows) != 5 || table.p("more files below the home", 0) != float64(len(c.after.files)-2) || table.p("more memory of this process (RSS)", 0) != c.after.memory-20 {
			t.Errorf("%s: rows %+v", name, table.Rows)
		}
	}
}

func TestCrowdedError(t *testing.T) {
	cause := errors.New("only 5 of 100 MiB of memory are available")
	err := error(&crowdedError{12, 500, cause})
	if err.Error() != "stopped at 12 machines of 500: "+cause.Error() || !errors.Is(err, cause) {
		t.Errorf("%v", err)
	}
}
