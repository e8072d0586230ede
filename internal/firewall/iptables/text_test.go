package iptables

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/ironclaw-run/ironclaw/internal/firewall/firewalltest"
	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"github.com/ironclaw-run/ironclaw/internal/golden"
)

func TestGolden(t *testing.T) {
	machine, err := setScript(rules.Machine("m1"))
	if err != nil {
		t.Fatal(err)
	}
	old, err := parse([]byte("*filter\n:OUTPUT ACCEPT [0:0]\n[0:0] -A OUTPUT -j ACCEPT\n[1:2] -A OUTPUT -p tcp -j IRONCLAW_GUARD\nCOMMIT\n"))
	if err != nil {
		t.Fatal(err)
	}
	guard, err := Text(rules.Guard(200000, 265535))
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]string{
		"machine.restore":      machine,
		"guard.restore":        guardScript(rules.Guard(200000, 265535), listing{}),
		"guard-repair.restore": guardScript(rules.Guard(200000, 265535), old),
		"guard.save":           guard,
	} {
		path := filepath.Join("testdata", name)
		golden.Check(t, path, got)
	}
}

// What one chain, linked to all hooks at iptables' own priority, cannot do is an
// error and not something similar.
func TestNotExpressible(t *testing.T) {
	priority := rules.Machine("m")
	priority.Chains[1].Priority = -300
	uneven := rules.Machine("m")
	uneven.Chains[1].Rules = nil
	policy := rules.Guard(1, 2)
	policy.Chains[0].Policy = rules.Drop
	for _, r := range []rules.Rules{priority, uneven, policy} {
		if text, err := Text(r); err == nil {
			t.Errorf("made of\n%s:\n%s", r, text)
		}
	}
}

// A comment of somebody's rule is no link of ours, and is not deleted.
func TestCommentsAreNoLinks(t *testing.T) {
	l, err := parse([]byte("*filter\n:OUTPUT ACCEPT [0:0]\n:IRONCLAW_GUARD - [0:0]\n" +
		`[0:0] -A OUTPUT -m comment --comment "see -j IRONCLAW_GUARD \" -j IRONCLAW_GUARD x"` + "\n" +
		`[0:0] -A OUTPUT -m comment --comment "-j ACCEPT" -j IRONCLAW_GUARD` + "\nCOMMIT\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{`-A OUTPUT -m comment --comment "-j ACCEPT" -j IRONCLAW_GUARD`}
	if d := cmp.Diff(want, l.links(rules.GuardLink)); d != "" {
		t.Error(d)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, out := range []string{
		":INPUT DROP [0:0]", "*filter\n:INPUT", "*filter\n-A INPUT -j DROP", "*filter\n[0:0] -D INPUT",
		"*filter\n[x:0] -A INPUT -j DROP", "*filter\n[0] -A INPUT -j DROP", "*filter\niptables: error",
	} {
		if l, err := parse([]byte(out)); !errors.Is(err, errLine) {
			t.Errorf("%q: %v, %v", out, l, err)
		}
	}
}

// FuzzParse: whatever a program says, it is parsed or refused, and only what is
// really the rules is taken for them.
func FuzzParse(f *testing.F) {
	r := rules.Machine("m1")
	script, err := setScript(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(strings.ReplaceAll(script, "-A ", "[0:0] -A ")))
	f.Add([]byte("# x\n*nat\n:OUTPUT DROP [0:0]\n[1:2] -A OUTPUT -m comment --comment \"a \\\" b\" -j X\nCOMMIT\n"))
	want, err := Text(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, out []byte) {
		l, err := parse(out)
		if err != nil {
			return
		}
		for _, r := range []rules.Rules{r, rules.Guard(1, 2)} {
			guardScript(r, l)
			removeScript(r, l)
			_ = l.count(r, make([]rules.Count, len(r.Chains)))
		}
		if l.text(r) == want && strings.Count(string(out), "DROP") < 4 {
			t.Errorf("taken for the rules:\n%s", out)
		}
	})
}

// An error anywhere in a script leaves the table as it was, empty or set.
func TestAtomic(t *testing.T) {
	for _, multi := range []string{"xtables-nft-multi", "xtables-legacy-multi"} {
		b, n, r := New(Options{Dirs: []string{tools(t, multi)}}), firewalltest.New(t), rules.Machine("m")
		script, err := setScript(r)
		if err != nil {
			t.Fatal(err)
		}
		bad := strings.Replace(script, "COMMIT", "-A OUTPUT -j NOWHERE\nCOMMIT", 1)
		attempt := func(want string) {
			t.Helper()
			err := n.Do(func() error {
				if err := b.restore(t.Context(), ipv4, r, bad); err == nil || !strings.Contains(err.Error(), "iptables-restore") {
					t.Errorf("%s: a bad script: %v", multi, err)
				}
				l, err := b.list(t.Context(), ipv4, r)
				if got := l.text(r); got != want {
					t.Errorf("%s: left\n%s\nwant\n%s", multi, got, want)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		const open = "*filter\n:FORWARD ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n"
		if err := n.Do(func() error { return b.restore(t.Context(), ipv4, r, "*filter\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n") }); err != nil {
			t.Fatal(err)
		}
		attempt(open)
		if err := n.Do(func() error { return b.Set(t.Context(), r) }); err != nil {
			t.Fatal(err)
		}
		want, err := Text(r)
		if err != nil {
			t.Fatal(err)
		}
		attempt(want)
	}
}

func BenchmarkSetVerify(b *testing.B) {
	for _, multi := range []string{"xtables-nft-multi", "xtables-legacy-multi"} {
		b.Run(multi, func(b *testing.B) {
			n, backend, r := firewalltest.New(b), New(Options{Dirs: []string{tools(b, multi)}}), rules.Machine("m")
			err := n.Do(func() error {
				for b.Loop() {
					if err := errors.Join(backend.Set(b.Context(), r), backend.Verify(b.Context(), r)); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
		})
	}
}
