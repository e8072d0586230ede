package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	bootLine = `{"id":"x","accel":"tcg","link":"serial","exit_code":0,"oom":false,"cloned":false,"timings_ms":{"reserve":1,"image":2,"kernel":3,` +
		`"driver":4,"template":4.5,"vmm":5,"boot":6,"start":7,"first output":7.5,"command":8,"close":9},"vmm_ms":{"ready":20,"running":21,"hello":22,` +
		`"started":23,"first_output":24},"guest_ms":{"init":10,"modules":11,"root":12,"agent":13,"hello":14},"total_ms":50}`
	cloneLine = `{"id":"x","accel":"tcg","link":"serial","exit_code":0,"oom":false,"cloned":true,"timings_ms":{"reserve":1,"image":2,"kernel":3,` +
		`"driver":4,"template":4.5,"vmm":5,"hello":6,"start":7,"first output":7.5,"command":8,"close":9},"vmm_ms":{"ready":20,"running":21,"hello":22,` +
		`"started":23,"first_output":24},"guest_ms":{},"total_ms":50}`
)

func addRun(t *Table, stderr string, cloned bool) error {
	r, err := parseReport([]byte(stderr))
	if err != nil {
		return err
	}
	r.wall = 60
	if err := t.addPhases(rowRun, r, cloned); err != nil {
		return err
	}
	return t.addMoments(rowFirst, r, cloned)
}

// The figures are those of the last line: notes and the command's own words may
// come before it.
func TestAddRun(t *testing.T) {
	const first = "first output after the VMM's start"
	for line, want := range map[string]string{
		bootLine: `/run -- true 60.0
run -- true/reserve 1.00
run -- true/image 2.00
run -- true/kernel 3.00
run -- true/driver 4.00
run -- true/template 4.50
run -- true/vmm 5.00
run -- true/boot 6.00
run -- true/guest: init 10.0
run -- true/guest: modules 11.0
run -- true/guest: root 12.0
run -- true/guest: agent 13.0
run -- true/guest: hello 14.0
run -- true/start 7.00
run -- true/command 8.00
run -- true/close 9.00
/run -- echo x: F 24.0
run -- echo x: F/ready 20.0
run -- echo x: F/running 21.0
run -- echo x: F/hello 22.0
run -- echo x: F/started 23.0
`,
		cloneLine: `/run -- true 60.0
run -- true/reserve 1.00
run -- true/image 2.00
run -- true/kernel 3.00
run -- true/driver 4.00
run -- true/template 4.50
run -- true/vmm 5.00
run -- true/hello 6.00
run -- true/start 7.00
run -- true/command 8.00
run -- true/close 9.00
/run -- echo x: F 24.0
run -- echo x: F/ready 20.0
run -- echo x: F/running 21.0
run -- echo x: F/hello 22.0
run -- echo x: F/started 23.0
`,
	} {
		table := &Table{}
		for _, stderr := range []string{line, line + "\n\n", "note: x\n{\"timings_ms\":{\"vmm\":99}}\n" + line + "\n"} {
			if err := addRun(table, stderr, line == cloneLine); err != nil {
				t.Fatal(err)
			}
		}
		var got strings.Builder
		for _, r := range table.Rows {
			if len(r.Values) != 3 || r.Values[0] != r.Values[1] || r.Values[0] != r.Values[2] || r.Unit != "ms" {
				t.Errorf("row %+v", r)
			}
			fmt.Fprintf(&got, "%s/%s %s\n", r.Of, r.Name, number(r.Values[0]))
		}
		if d := cmp.Diff(strings.ReplaceAll(want, ": F", ": "+first), got.String()); d != "" {
			t.Errorf("-want +got:\n%s", d)
		}
	}
}

// What was not reported was not measured: it must not become a zero.
func TestAddRunRefuses(t *testing.T) {
	for name, stderr := range map[string]string{
		"nothing":            "",
		"no JSON":            "error: x",
		"cut off":            bootLine[:100],
		"null":               "null",
		"no timings":         `{"exit_code":0}`,
		"a phase less":       strings.Replace(bootLine, `"vmm":5,`, "", 1),
		"a mark less":        strings.Replace(bootLine, `"root":12,`, "", 1),
		"not a number":       strings.Replace(bootLine, `"vmm":5`, `"vmm":"5"`, 1),
		"JSON not last":      bootLine + "\nnote: x",
		"a clone's boot":     strings.Replace(cloneLine, `"hello":6`, `"boot":6`, 1),
		"a clone that boots": strings.Replace(cloneLine, `"cloned":true`, `"cloned":false`, 1),
	} {
		table := &Table{}
		if err := addRun(table, stderr, strings.Contains(stderr, `"cloned":true`)); err == nil || !strings.Contains(err.Error(), "timings of run") {
			t.Errorf("%s: %v", name, err)
		}
		if len(table.Rows) > 0 {
			t.Errorf("%s: rows were added", name)
		}
	}
	table := &Table{}
	if err := addRun(table, strings.Replace(bootLine, `"first_output":24`, `"x":1`, 1), false); err == nil || !strings.Contains(err.Error(), "first_output") {
		t.Errorf("a moment less: %v", err)
	}
}

// A boot among clones would spoil the median, and a clone among boots.
func TestAddRunOfAnotherKind(t *testing.T) {
	table := &Table{}
	if err := addRun(table, bootLine, true); err == nil || !strings.Contains(err.Error(), "booted and should have been cloned") {
		t.Errorf("%v", err)
	}
	if err := addRun(table, cloneLine, false); err == nil || !strings.Contains(err.Error(), "cloned and should have booted") {
		t.Errorf("%v", err)
	}
	if len(table.Rows) > 0 {
		t.Errorf("%+v", table.Rows)
	}
}

// The benchmark works without runsc, whether it is absent or fails, at once or
// later, and says that the comparison is missing.
func TestRunscIsOptional(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":/usr/bin:/bin")
	t.Setenv("TMPDIR", dir)
	broken := "#!/bin/sh\necho cannot do that >&2; exit 1\n"
	for name, c := range map[string]struct {
		program, later string
		want           string
	}{
		"fails":       {broken, broken, `no comparison with runsc (gVisor): exit status 1: "cannot do that"`},
		"fails later": {"#!/bin/sh\n", broken, "no comparison with runsc (gVisor): exit status 1"},
		"works":       {"#!/bin/sh\n", "#!/bin/sh\n", ""},
	} {
		path := filepath.Join(dir, "runsc")
		write := func(script string) {
			if err := os.WriteFile(path+".new", []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".new", path); err != nil {
				t.Fatal(err)
			}
		}
		write(c.program)
		table := &Table{}
		r := newRunsc(t.Context(), table)
		w := &watch{table: table, rounds: 1}
		r.measure(t.Context(), w)
		write(c.later)
		r.measure(t.Context(), w)
		r.close()
		if got := strings.Join(table.Notes, "\n"); !strings.HasPrefix(got, c.want) || (got == "") != (c.want == "") {
			t.Errorf("%s: notes %q", name, got)
		}
		if len(table.Rows) != 0 != (c.want == "") {
			t.Errorf("%s: rows %+v", name, table.Rows)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "ironclaw-bench-*")); len(left) > 0 {
			t.Errorf("%s: left %q", name, left)
		}
	}
	t.Setenv("PATH", t.TempDir())
	table := &Table{}
	newRunsc(t.Context(), table).close()
	if got := strings.Join(table.Notes, "\n"); got != "no comparison with runsc (gVisor): it is not installed" {
		t.Errorf("%q", got)
	}
}
