package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "make the golden files anew")

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

func testTable() *Table {
	t := &Table{Name: "start: x", Host: "Linux 6.1, 2 cpus"}
	for _, v := range []float64{1234.5, 99.96, 3} {
		t.add("whole process", "ms", v)
	}
	t.add("  boot", "ms", 0.004)
	t.add("ünïcode", "MiB/s", 10)
	t.row("nothing yet", "ms")
	return t
}

func TestPrint(t *testing.T) {
	var b bytes.Buffer
	if err := testTable().Print(&b); err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/table.golden"
	if *update {
		if err := os.WriteFile(golden, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), b.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// A full disk or a closed pipe is no success.
func TestPrintError(t *testing.T) {
	if err := testTable().Print(brokenWriter{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("error %v", err)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, os.ErrClosed }

// The shape of --json: every value, in the order in which it was measured.
func TestTableJSON(t *testing.T) {
	b, err := json.Marshal(&Table{Name: "n", Host: "h", Rows: []*Row{{Name: "r", Unit: "ms", Values: []float64{2, 1}}}})
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"name":"n","host":"h","rows":[{"name":"r","unit":"ms","values":[2,1]}]}`; string(b) != want {
		t.Errorf("%s", b)
	}
}

const runLine = `{"id":"x","exit_code":0,"oom":false,"timings_ms":{"reserve":1,"image":2,"kernel":3,"driver":4,"vmm":5,"boot":6,` +
	`"start":7,"first output":7.5,"command":8,"close":9},"guest_ms":{"init":10,"modules":11,"root":12,"agent":13,"hello":14},"total_ms":50}`

// The figures are those of the last line: notes and the command's own words may
// come before it.
func TestAddRun(t *testing.T) {
	table := &Table{}
	for _, stderr := range []string{runLine, runLine + "\n\n", "note: x\n{\"timings_ms\":{\"boot\":99}}\n" + runLine + "\n"} {
		if err := table.addRun([]byte(stderr), 60); err != nil {
			t.Fatal(err)
		}
	}
	var got strings.Builder
	for _, r := range table.Rows {
		if len(r.Values) != 3 || r.Values[0] != r.Values[1] || r.Values[0] != r.Values[2] || r.Unit != "ms" {
			t.Errorf("row %+v", r)
		}
		got.WriteString(strings.TrimSpace(r.Name) + " " + number(r.Values[0]) + "\n")
	}
	want := `whole process 60.0
reserve 1.00
image 2.00
kernel 3.00
driver 4.00
vmm 5.00
boot 6.00
guest: init 10.0
guest: modules 11.0
guest: root 12.0
guest: agent 13.0
guest: hello 14.0
start 7.00
command 8.00
close 9.00
`
	if d := cmp.Diff(want, got.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// What was not reported was not measured: it must not become a zero.
func TestAddRunRefuses(t *testing.T) {
	for name, stderr := range map[string]string{
		"nothing":       "",
		"no JSON":       "error: x",
		"cut off":       runLine[:100],
		"null":          "null",
		"no timings":    `{"exit_code":0}`,
		"a phase less":  strings.Replace(runLine, `"vmm":5,`, "", 1),
		"a mark less":   strings.Replace(runLine, `"root":12,`, "", 1),
		"not a number":  strings.Replace(runLine, `"vmm":5`, `"vmm":"5"`, 1),
		"JSON not last": runLine + "\nnote: x",
	} {
		table := &Table{}
		if err := table.addRun([]byte(stderr), 60); err == nil || !strings.Contains(err.Error(), "timings of run") {
			t.Errorf("%s: %v", name, err)
		}
		if len(table.Rows) > 0 {
			t.Errorf("%s: rows were added", name)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0.00", 0.004: "0.00", 9.994: "9.99", 10: "10.0", 99.94: "99.9", 100: "100", 1234.5: "1234"} {
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

func TestMemoryOf(t *testing.T) {
	if mib, err := memoryOf(os.Getpid()); err != nil || mib <= 0 || mib > 1<<20 {
		t.Errorf("this process: %v MiB, %v", mib, err)
	}
	if _, err := memoryOf(0); err == nil {
		t.Error("there is a process 0")
	}
}

func TestHostFacts(t *testing.T) {
	facts := hostFacts()
	for _, want := range []string{"Linux ", " cpus", "load "} {
		if !strings.Contains(facts, want) {
			t.Errorf("%q does not say %q", facts, want)
		}
	}
	if strings.Contains(facts, "\n") {
		t.Errorf("%q is no line", facts)
	}
}
