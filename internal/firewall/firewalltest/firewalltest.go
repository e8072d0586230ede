// Package firewalltest is what every backend of the firewall passes: start at
// [Machine] and
// [Guard]. It has the network namespaces that such tests are made in, and packets
// that are really sent there.
//
// Each test that shows packets being dropped shows first that they arrive without
// the rules, and again when only they are removed. All of it happens in namespaces
// that the tests made, between sockets and addresses that they made there.
package firewalltest

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// Tamper is a way to change rules that are set: its name, the commands, one a line,
// that do it in the namespace, and what the error then shows.
type Tamper [3]string

// Config describes a backend to its tests.
type Config struct {
	Backend rules.Backend
	Tool    string // the program that commands below use, and its package
	Package string
	// Open returns the commands that take away what the machine's rules do on one
	// hook, in both families.
	Open func(r rules.Rules, h rules.Hook) string
	// Machine and Guard are ways to change these rules.
	Machine, Guard []Tamper
	// Foreign are commands that set rules of somebody else, and List one that
	// lists them.
	Foreign, List string
}

// id is the machine's. It is as long as ids may be.
const id = "machine-0123456789-0123456789-0123456789-0123456789-0123456789x"

// guarded is the range of users in the tests of the guard.
var guarded = rules.Range{First: 200000, Last: 200099}

// Guard tests the rules for the host's namespace. It needs the host's root, as the
// guard itself does.
func Guard(t *testing.T, c Config) {
	NeedUsers(t)
	testenv.NeedTool(t, c.Tool, c.Package)
	r := rules.Guard(guarded.First, guarded.Last)
	t.Run("SetAndVerify", func(t *testing.T) { setAndVerify(t, c.Backend, r, rules.Guard(7, 7)) })
	t.Run("OneGuard", func(t *testing.T) { oneGuard(t, c.Backend) })
	t.Run("Packets", func(t *testing.T) { guardPackets(t, c.Backend) })
	t.Run("Tampering", func(t *testing.T) { tampering(t, c, r, c.Guard) })
	t.Run("OthersRules", func(t *testing.T) { othersRules(t, c) })
}

// Machine tests the rules for a machine's namespace, and all that needs only root
// of that.
func Machine(t *testing.T, c Config) {
	New(t) // skips here, if at all
	testenv.NeedTool(t, c.Tool, c.Package)
	t.Run("SetAndVerify", func(t *testing.T) { setAndVerify(t, c.Backend, rules.Machine(id)) })
	t.Run("BadRules", func(t *testing.T) { badRules(t, c.Backend) })
	t.Run("Cancelled", func(t *testing.T) { cancelled(t, c.Backend) })
	t.Run("Packets", func(t *testing.T) { machinePackets(t, c) })
	t.Run("Tampering", func(t *testing.T) { tampering(t, c, rules.Machine(id), c.Machine) })
	t.Run("ManyAtOnce", func(t *testing.T) { manyAtOnce(t, c.Backend, 50) })
}

// in calls f in n and ends the test on an error.
func in(t testing.TB, n *Namespace, f func() error) {
	t.Helper()
	if err := n.Do(f); err != nil {
		t.Fatal(err)
	}
}

func set(t testing.TB, b rules.Backend, n *Namespace, r rules.Rules) {
	t.Helper()
	in(t, n, func() error {
		return errors.Join(b.Set(t.Context(), r), b.Verify(t.Context(), r))
	})
}

// verify returns the difference that Verify finds.
func verify(t testing.TB, b rules.Backend, n *Namespace, r rules.Rules) *rules.DifferenceError {
	t.Helper()
	err := n.Do(func() error { return b.Verify(t.Context(), r) })
	diff, ok := errors.AsType[*rules.DifferenceError](err)
	if err != nil && !ok {
		t.Fatalf("verify: %v", err)
	}
	return diff
}

func setAndVerify(t *testing.T, b rules.Backend, all ...rules.Rules) {
	for _, r := range all {
		n := New(t)
		if d := verify(t, b, n, r); d == nil || !r.Exclusive && !d.Missing {
			t.Errorf("rules that are not there: %v\n%s", d, r)
		}
		in(t, n, func() error { return b.Remove(t.Context(), r) }) // nothing
		set(t, b, n, r)
		set(t, b, n, r) // in its own place
		in(t, n, func() error {
			counts, err := b.Counters(t.Context(), r)
			if err == nil && len(counts) != len(r.Chains) {
				err = errors.New("counters are missing")
			}
			for i, c := range counts {
				if c != (rules.Count{Hook: r.Chains[i].Hook}) {
					t.Errorf("fresh counter %+v", c)
				}
			}
			return err
		})
		in(t, n, func() error { return b.Remove(t.Context(), r) })
		if d := verify(t, b, n, r); d == nil {
			t.Errorf("removed, and still there:\n%s", r)
		}
	}
}

// oneGuard: a guard for other users is another guard, and there is only one.
func oneGuard(t *testing.T, b rules.Backend) {
	n := New(t)
	set(t, b, n, rules.Guard(1000, 2000))
	if d := verify(t, b, n, rules.Guard(1000, 2001)); d == nil || !strings.Contains(d.Diff, "1000-2000") || d.Missing {
		t.Errorf("a guard of others: %v", d)
	}
	set(t, b, n, rules.Guard(1000, 2001))
}

// badRules: no method does anything with rules that are not valid.
func badRules(t *testing.T, b rules.Backend) {
	n := New(t)
	for _, r := range []rules.Rules{
		{}, rules.Guard(0, 10), rules.Guard(20, 10), rules.Guard(10, 1<<32-1),
		{Table: "x; flush ruleset", Link: rules.GuardLink, Chains: rules.Guard(1, 2).Chains},
		{Table: "ironclaw", Link: "IRONCLAW_\nCOMMIT", Chains: rules.Guard(1, 2).Chains},
	} {
		in(t, n, func() error {
			_, err := b.Counters(t.Context(), r)
			for what, err := range map[string]error{
				"set": b.Set(t.Context(), r), "verify": b.Verify(t.Context(), r), "remove": b.Remove(t.Context(), r), "counters": err,
			} {
				if err == nil {
					t.Errorf("%s takes\n%s", what, r)
				}
			}
			return nil
		})
	}
}

// cancelled: who is called off sets nothing.
func cancelled(t *testing.T, b rules.Backend) {
	n, r := New(t), rules.Machine(id)
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(enough)
	err := n.Do(func() error { return b.Set(ctx, r) })
	if !errors.Is(err, enough) {
		t.Errorf("set: %v", err)
	}
	if err := n.Do(func() error { return b.Verify(ctx, r) }); !errors.Is(err, enough) {
		t.Errorf("verify: %v", err)
	}
	if d := verify(t, b, n, r); d == nil {
		t.Error("set, although it was called off")
	}
}

// machinePackets shows that packets get out of, into and through a namespace
// without the rules, that none do with them, and that each hook stops its own.
func machinePackets(t *testing.T, c Config) {
	l, b, r := newLab(t), c.Backend, rules.Machine(id)
	probes := append(l.probes(), l.loopback()...)
	expect(t, "without the firewall", probes, all)

	set(t, b, l.machine, r)
	expect(t, "with the firewall", probes, none)
	in(t, l.machine, func() error {
		counts, err := b.Counters(t.Context(), r)
		for _, n := range counts {
			if n.Packets == 0 || n.Bytes == 0 {
				t.Errorf("%s counts nothing", n.Hook)
			}
		}
		return err
	})
	if d := verify(t, b, l.machine, r); d != nil {
		t.Errorf("after packets have been counted: %v", d)
	}
	for _, h := range rules.Hooks() {
		l.machine.Run(t, c.Open(r, h))
		if verify(t, b, l.machine, r) == nil {
			t.Errorf("%s is open, and nobody sees it", h)
		}
		var oneWay []probe
		for _, p := range l.probes() {
			if p.oneWay() {
				oneWay = append(oneWay, p)
			}
		}
		expect(t, "without the firewall on "+string(h), oneWay, func(p probe) bool { return p.hook == h })
		set(t, b, l.machine, r)
	}
	expect(t, "with the firewall again", probes, none)
	in(t, l.machine, func() error { return b.Remove(t.Context(), r) })
	expect(t, "after the firewall", probes, all)
}

// tampering: whatever is changed is seen, and Set mends it.
func tampering(t *testing.T, c Config, r rules.Rules, ways []Tamper) {
	for _, w := range ways {
		name, commands, shows := w[0], w[1], w[2]
		t.Run(name, func(t *testing.T) {
			n := New(t)
			set(t, c.Backend, n, r)
			n.Run(t, commands)
			d := verify(t, c.Backend, n, r)
			if d == nil {
				t.Fatal("nobody sees it")
			}
			if !strings.Contains(d.Error(), shows) {
				t.Errorf("%v\ndoes not show %q", d, shows)
			}
			if r.Exclusive && strings.Contains(name, "foreign") {
				return // of others nothing is removed, not even there
			}
			set(t, c.Backend, n, r)
		})
	}
}

// othersRules: the guard and its removal leave all others' rules as they are.
func othersRules(t *testing.T, c Config) {
	n, r := New(t), rules.Guard(guarded.First, guarded.Last)
	n.Run(t, c.Foreign)
	before := n.Run(t, c.List)
	if len(strings.TrimSpace(before)) == 0 {
		t.Fatal("there are no rules of others")
	}
	set(t, c.Backend, n, r)
	with := n.Run(t, c.List)
	rest := with
	for line := range strings.Lines(before) {
		i := strings.Index(rest, line)
		if i < 0 {
			t.Fatalf("%q was lost or moved:\n%s", line, with)
		}
		rest = rest[i+len(line):]
	}
	in(t, n, func() error { return c.Backend.Remove(t.Context(), r) })
	if after := n.Run(t, c.List); after != before {
		t.Errorf("others' rules were\n%s\nand are\n%s", before, after)
	}
}

// manyAtOnce sets the rules of many machines at once, each in its namespace.
func manyAtOnce(t *testing.T, b rules.Backend, n int) {
	spaces := make([]*Namespace, n)
	for i := range spaces {
		spaces[i] = New(t)
	}
	var wg sync.WaitGroup
	for i, space := range spaces {
		r := rules.Machine(id[:i+1])
		wg.Go(func() {
			err := space.Do(func() error { return errors.Join(b.Set(t.Context(), r), b.Verify(t.Context(), r)) })
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
