package rules

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/golden"
)

func TestGolden(t *testing.T) {
	for name, r := range map[string]Rules{
		"machine": Machine("m1"), "guard": Guard(200000, 265535), "guard-one": Guard(1000, 1000),
	} {
		if err := r.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		path := filepath.Join("testdata", name+".nft")
		golden.Check(t, path, r.String())
	}
}

// iptables refuses names of 29 characters; ids of each length get one that fits, is
// as long as all others, and is nobody else's.
func TestLinkName(t *testing.T) {
	seen := make(map[string]string)
	for n := 1; n <= 63; n++ {
		for _, id := range []string{strings.Repeat("a", n), strings.Repeat("a", n-1) + "b", "b" + strings.Repeat("-", n-1)} {
			name := LinkName(id)
			if len(name) != MaxLink || !linkName.MatchString(name) {
				t.Errorf("LinkName(%q) = %q", id, name)
			}
			if other, ok := seen[name]; ok && other != id {
				t.Errorf("%q and %q have the same name %s", id, other, name)
			}
			seen[name] = id
			if name == GuardLink {
				t.Errorf("%q has the guard's name", id)
			}
		}
	}
	if LinkName("m1") != "IRONCLAW_"+LinkName("m1")[9:] || LinkName("m1") != Machine("m1").Link {
		t.Error("one id has two names")
	}
	// Not even an id that is none gets into a script.
	if err := Machine("x\nCOMMIT\n").Validate(); err != nil {
		t.Error(err)
	}
}

func TestValidate(t *testing.T) {
	chain := Chain{Name: "output", Hook: Output, Policy: Drop}
	with := func(change func(*Rules)) Rules {
		r := Rules{Table: "t", Link: "IRONCLAW_X", Chains: []Chain{chain}}
		change(&r)
		return r
	}
	if err := with(func(*Rules) {}).Validate(); err != nil {
		t.Fatal(err)
	}
	for what, r := range map[string]Rules{
		"no table":       with(func(r *Rules) { r.Table = "" }),
		"table's name":   with(func(r *Rules) { r.Table = "a b" }),
		"long table":     with(func(r *Rules) { r.Table = strings.Repeat("a", 32) }),
		"no link":        with(func(r *Rules) { r.Link = "IRONCLAW_" }),
		"29 characters":  with(func(r *Rules) { r.Link = "IRONCLAW_" + strings.Repeat("A", 20) }),
		"link's name":    with(func(r *Rules) { r.Link = "IRONCLAW_x" }),
		"somebody's":     with(func(r *Rules) { r.Link = "DOCKER" }),
		"no chain":       with(func(r *Rules) { r.Chains = nil }),
		"chain's name":   with(func(r *Rules) { r.Chains[0].Name = "input" }),
		"hook":           with(func(r *Rules) { r.Chains[0] = Chain{Name: "x", Hook: "x", Policy: Drop} }),
		"two on a hook":  with(func(r *Rules) { r.Chains = append(r.Chains, chain) }),
		"no policy":      with(func(r *Rules) { r.Chains[0].Policy = "" }),
		"no verdict":     with(func(r *Rules) { r.Chains[0].Rules = []Rule{{}} }),
		"root":           Guard(0, 5),
		"wrong way":      Guard(5, 4),
		"nobody":         Guard(5, 1<<32-1),
		"users on input": with(func(r *Rules) { r.Chains = []Chain{{"input", Input, 0, Drop, []Rule{{&Range{1, 2}, Drop}}}} }),
	} {
		if err := r.Validate(); err == nil {
			t.Errorf("%s: valid", what)
		}
	}
}

func TestCompare(t *testing.T) {
	if err := Compare("x", "a\n", "a\n"); err != nil {
		t.Error(err)
	}
	for _, test := range []struct{ want, got, diff string }{
		{"a\nb\nc\n", "a\nc\n", " a\n-b\n c\n"},
		{"a\nc\n", "a\nb\nc\n", " a\n+b\n c\n"},
		{"a\n", "b\n", "-a\n+b\n"},
		{"a\nb\n", "b\na\n", "-a\n b\n+a\n"},
		{"a\n", "", "-a\n+\n"},
	} {
		d, ok := Compare("x", test.want, test.got).(*DifferenceError)
		if !ok || d.Diff != test.diff || d.Missing != (test.got == "") {
			t.Errorf("%q -> %q: %+v, want %q", test.want, test.got, d, test.diff)
		}
	}
	// However much somebody has put there, the error stays short.
	long := Compare("x", "a\n", strings.Repeat("accept\n", 1e6)).(*DifferenceError)
	if n := strings.Count(long.Diff, "\n"); n > 2*maxDiff+2 || !strings.Contains(long.Diff, "999900 lines more") {
		t.Errorf("%d lines, ending in %q", n, long.Diff[len(long.Diff)-50:])
	}
}
