package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guest/hostile"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

func found(f Finding, err error) attackFunc {
	return func(context.Context, *env) (Finding, error) { return f, err }
}

// A row holds only if the attack was made, did not work, and its control did.
func TestStates(t *testing.T) {
	refused, works, broken := found(Finding{"no", false}, nil), found(Finding{"yes", true}, nil), found(Finding{}, errors.New("oh"))
	report := layer.Report{{Layer: layer.GuestSeccomp, State: layer.On}, {Layer: layer.GuestDevices, State: layer.Off}, {Layer: layer.GuestCgroup, State: layer.Held}, {Layer: layer.Landlock, State: layer.Absent}}
	for _, tc := range []struct {
		name         string
		layer        string
		run, control attackFunc
		want         State
		text         string // in the control
	}{
		{"held", Machine, refused, nil, Held, ""},
		{"held, control works", Machine, refused, works, Held, "works: yes"},
		{"held, control does not", Machine, refused, refused, Failed, "does not work either"},
		{"held, control broken", Machine, refused, broken, Failed, "could not be tried"},
		{"held, control impossible", Machine, refused, found(Finding{}, &notHere{"none"}), Held, "not possible here: none"},
		{"worked", Machine, works, nil, Worked, ""},
		{"worked, control does not", Machine, works, refused, Worked, "does not"},
		{"not tried", Machine, broken, works, Failed, ""},
		{"layer on", string(layer.GuestSeccomp), works, nil, Worked, ""},
		{"layer off", string(layer.GuestDevices), works, nil, Off, ""},
		{"layer off, held all the same", string(layer.GuestDevices), refused, nil, Held, ""},
		{"layer held by another", string(layer.GuestCgroup), works, nil, Worked, ""},
		{"layer unknown", string(layer.GuestUser), works, nil, Worked, ""},
		{"layer absent", string(layer.Landlock), works, nil, Absent, ""},
	} {
		e := &env{layers: report, opts: &Options{Sandbox: sandbox.Options{Without: layer.Set{layer.GuestDevices: true}}}}
		row := e.attack(t.Context(), Attack{Guest, tc.layer, tc.name, "", tc.run, tc.control})
		if row.State != tc.want || !strings.Contains(row.Control, tc.text) {
			t.Errorf("%s: %s, control %q; want %s, %q", tc.name, row.State, row.Control, tc.want, tc.text)
		}
	}
}

func TestErr(t *testing.T) {
	rows := func(states ...State) *Report {
		r := &Report{}
		for _, s := range states {
			r.Rows = append(r.Rows, Row{State: s})
		}
		return r
	}
	for _, tc := range []struct {
		r    *Report
		want error
	}{
		{rows(Held, Off, Absent), nil},
		{rows(Held, Worked, Failed), ErrWorked},
		{rows(Held, Failed), ErrFailed},
		{rows(), ErrFailed},
	} {
		if err := tc.r.Err(); !errors.Is(err, tc.want) {
			t.Errorf("%v: %v, want %v", tc.r.Rows, err, tc.want)
		}
	}
}

// The table holds what attackers said, and none of what a terminal obeys.
func TestPrint(t *testing.T) {
	r := &Report{Seconds: 1, Rows: []Row{
		{Guest, Machine, "a", "b", "\x1b[2J\x1b]0;x\x07r\ne\td", "works: x", Held, 1},
		{Link, Protocol, "c", "d", "could not be tried", "does not work either", Failed, 1},
	}}
	var out bytes.Buffer
	if err := r.Print(&out, false); err != nil {
		t.Fatal(err)
	}
	got := out.String()
	if strings.ContainsAny(got, "\x1b\x07") {
		t.Errorf("a terminal would obey %q", got)
	}
	for _, want := range []string{"machine", "held", "failed", "without it", "2 attacks in 1 s: 1 held; 1 could not be tried or proved nothing"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if got := cell(strings.Repeat("ä", 300), false); len([]rune(got)) != maxCell {
		t.Errorf("a cell of %d", len([]rune(got)))
	}
}

// Names of attacks are unique in their groups, each says what is expected, and its
// layer is one or a known word.
func TestList(t *testing.T) {
	seen := make(map[string]bool)
	count := make(map[Group]int)
	for _, a := range List() {
		key := fmt.Sprint(a.Group, "/", a.Name)
		if seen[key] {
			t.Errorf("%s is there twice", key)
		}
		seen[key] = true
		count[a.Group]++
		if a.Expected == "" || a.run == nil {
			t.Errorf("%s expects nothing or does nothing", key)
		}
		if layer.Name(a.Layer).What() == "" && !slices.Contains([]string{Machine, Protocol, Cleanup}, a.Layer) {
			t.Errorf("%s: no layer is called %q", key, a.Layer)
		}
	}
	for _, g := range Groups() {
		if count[g] == 0 {
			t.Errorf("group %s has no attacks", g)
		}
	}
	if n := len(List(Host)); n != count[Host] {
		t.Errorf("List(Host) has %d", n)
	}
}

// All attacks of the jail name probes that there are.
func TestJailProbesExist(t *testing.T) {
	for _, c := range jailCases() {
		if !slices.Contains(probe.Names(), c.attack) {
			t.Errorf("%s: there is no probe %s", c.name, c.attack)
		}
		if c.layer.What() == "" {
			t.Errorf("%s: there is no layer %s", c.name, c.layer)
		}
	}
}

// The lists of scenarios name those that there are: one that was renamed would be
// judged as another kind.
func TestScenarioLists(t *testing.T) {
	all := slices.Concat(hostile.MuxScenarios(), hostile.HelloScenarios(), hostile.ExecScenarios())
	for _, name := range slices.Concat(loud, valid, waiting, lasting, ending) {
		if !slices.Contains(all, name) {
			t.Errorf("there is no scenario %s", name)
		}
	}
}

// What a hostile agent can make of a call is judged by what it has to be.
func TestLinkFinding(t *testing.T) {
	protocol := fmt.Errorf("greet: %w", link.ErrProtocol)
	deadline := fmt.Errorf("greet: %w", context.DeadlineExceeded)
	gaveUp := &vm.ExitError{Reason: "the guest's init gave up: panic"}
	for _, tc := range []struct {
		name   string
		r      linkResult
		worked bool
		ok     bool // it was reached
	}{
		{"mux-garbage", linkResult{err: protocol}, false, true},
		{"mux-garbage", linkResult{err: deadline}, false, false},
		{"mux-garbage", linkResult{}, true, true},
		{"mux-garbage", linkResult{err: protocol, late: true}, true, true},
		{"mux-garbage", linkResult{err: gaveUp}, false, false},
		{"mux-garbage", linkResult{err: &vm.ExitError{Reason: link.ErrProtocol.Error() + ": x"}}, false, true},
		{"mux-end", linkResult{err: gaveUp}, false, true},
		{"mux-silent", linkResult{err: deadline}, false, true},
		{"hello-nonce", linkResult{}, true, true},
		{"hello-error", linkResult{err: errors.New(strings.Repeat("x", 60<<10))}, true, true},
		{"exec-exit-twice", linkResult{}, false, true},
		{"exec-output", linkResult{ended: true}, false, true},
		{"exec-exit-code", linkResult{ended: true}, true, true},
		{"exec-2g", linkResult{setUpErr: errors.New("no machine")}, false, false},
	} {
		f, err := tc.r.finding(tc.name)
		if f.Worked != tc.worked || (err == nil) != tc.ok {
			t.Errorf("%s, %+v: %+v, %v", tc.name, tc.r, f, err)
		}
	}
}

// Memory that this process takes is seen, also when it is given back at once.
func TestWatchMemory(t *testing.T) {
	w, err := watchMemory()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 96<<20)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	b = nil
	_ = b
	if grown, err := w.grown(); err != nil || grown < 64<<20 {
		t.Errorf("grown by %d MiB, %v", grown>>20, err)
	}
}

func TestRemains(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/sandbox-0abc1.json", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	names, err := namesIn(dir, "0abc1", 2)
	if err != nil || len(names) != 1 {
		t.Errorf("%q, %v", names, err)
	}
	if names, err := namesIn(dir+"/nothing", "", 2); err != nil || len(names) != 0 {
		t.Errorf("%q, %v", names, err)
	}
	if !alive(os.Getpid()) || alive(1<<22+1) {
		t.Error("alive")
	}
	if settledPids(t.Context(), nil) != nil {
		t.Error("settled")
	}
	before := usageNow()
	stop := make(chan struct{})
	for range 50 { // goroutines of other tests may be ending
		go func() { <-stop }()
	}
	if !usageNow().exceeds(before) {
		t.Error("a goroutine is not seen")
	}
	close(stop)
	if now := settled(t.Context(), before); now.exceeds(before) {
		t.Errorf("%v, %v", now, before)
	}
}

// What a killed process has left is removed; what is in use, new or not ours to
// follow is not.
func TestRemoveStale(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	used := new(env)
	if err := used.makeDir(); err != nil {
		t.Fatal(err)
	}
	fresh, stale, link := os.TempDir()+"/ironclaw-verify-1", os.TempDir()+"/ironclaw-verify-2", os.TempDir()+"/ironclaw-verify-3"
	target := t.TempDir()
	if err := errors.Join(os.Mkdir(fresh, 0o700), os.Mkdir(stale, 0o700), os.Symlink(target, link)); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	if err := errors.Join(os.Chtimes(stale, old, old), os.Chtimes(used.dir, old, old), os.Chtimes(target, old, old)); err != nil {
		t.Fatal(err)
	}
	next := new(env)
	if err := next.makeDir(); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]bool{used.dir: true, fresh: true, target: true, next.dir: true, stale: false} {
		if _, err := os.Stat(dir); (err == nil) != want {
			t.Errorf("%s: %v, want there %v", dir, err, want)
		}
	}
	used.close()
	next.close()
	if _, err := os.Stat(used.dir); err == nil {
		t.Error("close has left its directory")
	}
}
