// Package rules holds the firewall's rules as data: what is to be set, in a text
// form that people, golden files and errors share, and the contract of those who
// set it ([Backend]). It touches no kernel.
//
// There are two rulesets. [Machine] is for the network namespace of one machine's
// VMM and drops everything. [Guard] is for the host's own namespace and drops
// what a range of users sends, and nothing else.
package rules

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"math"
	"regexp"
	"strings"
)

// Hook is where in a packet's way a chain stands.
type Hook string

// Hooks.
const (
	Input   Hook = "input"   // arriving for a socket of this namespace
	Forward Hook = "forward" // passing through it
	Output  Hook = "output"  // sent by a socket of it
)

// Hooks returns all hooks.
func Hooks() []Hook { return []Hook{Input, Forward, Output} }

// Verdict is what becomes of a packet.
type Verdict string

// Verdicts. Drop is final, whatever other tables say; Accept is only this
// table's word.
const (
	Accept Verdict = "accept"
	Drop   Verdict = "drop"
)

// Range is a range of user ids, both ends included, as the user namespace that
// owns the network namespace numbers them.
type Range struct{ First, Last uint32 }

func (r Range) String() string { return fmt.Sprintf("%d-%d", r.First, r.Last) }

// Rule counts the packets that it matches and gives its verdict.
type Rule struct {
	UIDs    *Range // who made the socket that sends; nil: every packet
	Verdict Verdict
}

func (r Rule) String() string {
	if r.UIDs == nil {
		return "counter " + string(r.Verdict)
	}
	return "meta skuid " + r.UIDs.String() + " counter " + string(r.Verdict)
}

// Chain is a base chain of type filter: it hangs on a hook by itself, so there is
// no link that could be forgotten.
type Chain struct {
	Name     string
	Hook     Hook
	Priority int32   // lower ones see the packet first; 0 is that of filters
	Policy   Verdict // for packets that no rule decides
	Rules    []Rule
}

// Rules is all that one table holds, for IPv4 and IPv6.
type Rules struct {
	// Table is the name of the nftables table, of family inet.
	Table string
	// Link is the name of the iptables chain that the hooks' chains are linked to.
	Link string
	// Exclusive says that the network namespace is ours alone: there may be no
	// other table in it.
	Exclusive bool
	Chains    []Chain
}

// Names in the kernel.
const (
	MachineTable = "ironclaw"
	GuardTable   = "ironclaw_guard"
	GuardLink    = "IRONCLAW_GUARD"

	linkPrefix = "IRONCLAW_"
	// MaxLink is the longest name that iptables takes for a chain.
	MaxLink = 28
)

// Machine returns the rules of the namespace that the VMM of the machine id lives
// in: nothing comes in, goes out or passes through. id may be any string.
//
// The rule in each chain does what the policy does, too, and counts. Two reasons
// for a packet to be dropped, in the same table, are one more thing that has to
// be undone.
func Machine(id string) Rules {
	r := Rules{Table: MachineTable, Link: LinkName(id), Exclusive: true}
	for _, h := range Hooks() {
		r.Chains = append(r.Chains, Chain{Name: string(h), Hook: h, Policy: Drop, Rules: []Rule{{Verdict: Drop}}})
	}
	return r
}

// Guard returns the rules for the host's own namespace: what the users first to
// last send is dropped. The policy is accept and there is no other rule, so that
// no other traffic can be touched.
func Guard(first, last uint32) Rules {
	return Rules{Table: GuardTable, Link: GuardLink, Chains: []Chain{{
		Name: string(Output), Hook: Output, Policy: Accept,
		Rules: []Rule{{UIDs: &Range{first, last}, Verdict: Drop}},
	}}}
}

// LinkName is the name of a machine's iptables chain. iptables refuses names of
// more than 28 characters, and ids have up to 63: so a hash, of 95 bits, always
// as long as there is room for.
func LinkName(id string) string {
	sum := sha256.Sum256([]byte(id))
	return linkPrefix + base32.StdEncoding.EncodeToString(sum[:])[:MaxLink-len(linkPrefix)]
}

var (
	tableName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,30}$`)
	linkName  = regexp.MustCompile(`^IRONCLAW_[A-Z0-9]{1,19}$`)
)

// Validate says what is wrong with the rules. Backends refuse such rules.
func (r Rules) Validate() error {
	switch {
	case !tableName.MatchString(r.Table):
		return fmt.Errorf("bad name of a table: %q", r.Table)
	case !linkName.MatchString(r.Link):
		return fmt.Errorf("bad name of a chain: %q", r.Link)
	case len(r.Chains) == 0:
		return errors.New("rules without a chain do nothing")
	}
	seen := make(map[Hook]bool)
	for _, c := range r.Chains {
		if err := c.validate(); err != nil {
			return fmt.Errorf("chain %q: %w", c.Name, err)
		}
		if seen[c.Hook] {
			return fmt.Errorf("two chains on %s", c.Hook)
		}
		seen[c.Hook] = true
	}
	return nil
}

func (c Chain) validate() error {
	switch {
	case c.Name != string(c.Hook):
		return fmt.Errorf("not named like its hook %q", c.Hook)
	case c.Hook != Input && c.Hook != Forward && c.Hook != Output:
		return fmt.Errorf("no hook %q", c.Hook)
	case c.Policy != Accept && c.Policy != Drop:
		return fmt.Errorf("no policy %q", c.Policy)
	}
	for _, rule := range c.Rules {
		switch u := rule.UIDs; {
		case rule.Verdict != Accept && rule.Verdict != Drop:
			return fmt.Errorf("no verdict %q", rule.Verdict)
		case u == nil:
		case u.First > u.Last:
			return fmt.Errorf("users %d-%d: the wrong way round", u.First, u.Last)
		case u.First == 0:
			return errors.New("users from 0 on: root is not ours to cut off")
		case u.Last == math.MaxUint32:
			return fmt.Errorf("users up to %d, which is no user", u.Last)
		case c.Hook != Output:
			return fmt.Errorf("users on %s: only what is sent has one", c.Hook)
		}
	}
	return nil
}

// String is the rules as nft writes them.
func (r Rules) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", r.Table)
	for _, c := range r.Chains {
		fmt.Fprintf(&b, "\tchain %s {\n", c.Name)
		fmt.Fprintf(&b, "\t\ttype filter hook %s priority %d; policy %s;\n", c.Hook, c.Priority, c.Policy)
		for _, rule := range c.Rules {
			fmt.Fprintf(&b, "\t\t%s\n", rule)
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}

// Count is how many packets the rules on one hook have matched.
type Count struct {
	Hook           Hook
	Packets, Bytes uint64
}

// Backend sets rules in the network namespace of the calling thread. Its methods
// may be called concurrently; all of them refuse rules that are not valid, and
// none starts anything that outlives the call.
type Backend interface {
	// Name is what people call it.
	Name() string
	// Set puts the rules in the place of what is there of them, whatever that
	// is, and touches nothing else. What nftables or one family of iptables
	// shows is either all of the old or all of the new, at every moment. It does
	// not look whether they are there: Verify does.
	//
	// The error wraps ErrUnsupported if the kernel does not have the backend.
	Set(ctx context.Context, r Rules) error
	// Verify reads back what the kernel holds. The error is a *DifferenceError if
	// that is not exactly r, and wraps ErrUnsupported as Set's does.
	Verify(ctx context.Context, r Rules) error
	// Counters tells how many packets matched since Set, in the order of
	// r.Chains. iptables' counts are those of IPv4 and IPv6 together.
	Counters(ctx context.Context, r Rules) ([]Count, error)
	// Remove takes away what Set has put there. It is no error if that is
	// nothing.
	Remove(ctx context.Context, r Rules) error
}

// ErrUnsupported is in the errors of a backend that this kernel does not have.
var ErrUnsupported = errors.New("not in this kernel")
