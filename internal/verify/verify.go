// Package verify attacks sandboxes, to show on this host that what holds them
// holds: from inside a machine as root, by a hostile agent over the link, from the
// VMM's place in its jail, and after the end.
//
// Start with [Run]. An [Attack] tries one thing and says what came of it; a
// [Report] is the table of them. What it guarantees:
//
//   - An attack that could not be tried is [Failed], never a pass.
//   - A check that cannot fail is no check: wherever it can be done without harm
//     the same attack is made without what stops it (the control), and has to work.
//     If it does not, the attack counts as failed, too.
//   - No packet leaves. What could put one on a wire runs in a network namespace
//     made for it (package testnet), with servers in it that were seen to answer;
//     where there can be none, those attacks are failed and not made.
//   - Nothing is believed that a guest says in its own favour: a probe's "refused"
//     counts only together with what the servers, the kernel and the files of the
//     host show.
//   - What an attack has started is gone when Run returns, also after an error.
package verify

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Group is where attacks come from.
type Group string

// Groups, in the order in which they run.
const (
	Guest Group = "guest" // inside a machine, as root
	Link  Group = "link"  // a hostile agent, on the host's end of the link
	Jail  Group = "jail"  // a program in the VMM's place
	Host  Group = "host"  // what outlives a sandbox
)

// Groups lists all groups.
func Groups() []Group { return []Group{Guest, Link, Jail, Host} }

// What attacks are stopped by that cannot be taken away and so is no layer.
const (
	Machine  = "machine"  // the virtual machine: what it does not have cannot be reached
	Protocol = "protocol" // the host's side of the link, which believes nothing
	Cleanup  = "cleanup"  // the end of a sandbox
)

// Attack tries one thing.
type Attack struct {
	Group    Group
	Layer    string // a layer.Name, or what it is stopped by otherwise
	Name     string
	Expected string

	run     attackFunc
	control attackFunc // the same without the layer; nil where that would do harm, or would be another attack
}

// attackFunc makes an attack and judges it. An error says that it could not be
// made.
type attackFunc func(ctx context.Context, e *env) (Finding, error)

// Finding is what came of an attack.
type Finding struct {
	Observed string
	Worked   bool
}

// State is how a row stands.
type State string

// States.
const (
	Held   State = "held"   // the attack did not work
	Worked State = "worked" // it did
	Failed State = "failed" // it could not be tried, or its control did not work
	Off    State = "off"    // it worked, and a person chose to go without the layer
	Absent State = "absent" // it worked, and this host's kernel does not have the layer
)

// Row is one attack and what came of it. Texts hold what attackers said: they are
// to be printed through vm.Printable.
type Row struct {
	Group    Group   `json:"group"`
	Layer    string  `json:"layer"`
	Attack   string  `json:"attack"`
	Expected string  `json:"expected"`
	Observed string  `json:"observed"`
	Control  string  `json:"control,omitempty"` // what the same attack did without the layer
	State    State   `json:"state"`
	Millis   float64 `json:"ms"`
}

// Options say what to attack, and with what.
type Options struct {
	Host    *sandbox.Host   // required
	Sandbox sandbox.Options // of the machines that are attacked
	Program string          // this program, which also holds the probes; required
	Groups  []Group         // nil means all
	Only    string          // only attacks that have this in their names
	// NoNetwork is why there is no test network. Nil means that this process is in
	// one (see Enter).
	NoNetwork error
	// Layers is how the layers of a sandbox stand, read from the kernel. Nil means
	// that nobody knows: an attack that is stopped by a layer only is then absent
	// if it works.
	Layers func(*sandbox.Sandbox) layer.Report
	// OnRow is told each row when it is there, Progress what is being done; nil for
	// nobody.
	OnRow    func(Row)
	Progress func(string)
}

// bound is how long one attack may take with its control. It is far more than any
// takes: it keeps a fault from being a hang.
const bound = 3 * time.Minute

// List gives the attacks of some groups, in the order in which they run; of all, if
// none is named.
func List(groups ...Group) []Attack {
	if len(groups) == 0 {
		groups = Groups()
	}
	var all []Attack
	for _, g := range []struct {
		group   Group
		attacks func() []Attack
	}{{Guest, guestAttacks}, {Link, linkAttacks}, {Jail, jailAttacks}, {Host, hostAttacks}} {
		if slices.Contains(groups, g.group) {
			all = append(all, g.attacks()...)
		}
	}
	return all
}

// Attacks lists what Run will make.
func (o *Options) Attacks() []Attack {
	return slices.DeleteFunc(List(o.Groups...), func(a Attack) bool { return !strings.Contains(a.Name, o.Only) })
}

// Run makes the attacks one after the other. The error says that none could be
// made; what went wrong with single ones is in the report.
func Run(ctx context.Context, opts Options) (*Report, error) {
	if len(opts.Groups) == 0 {
		opts.Groups = Groups()
	}
	e, err := newEnv(ctx, &opts)
	if err != nil {
		return nil, err
	}
	defer e.close()
	r := &Report{Begun: time.Now()}
	defer func() { r.Seconds = time.Since(r.Begun).Seconds() }()
	for _, a := range opts.Attacks() {
		if err := ctx.Err(); err != nil {
			return r, context.Cause(ctx)
		}
		e.progress(fmt.Sprintf("attacking: %s: %s", a.Group, a.Name))
		row := e.attack(ctx, a)
		r.Rows = append(r.Rows, row)
		if opts.OnRow != nil {
			opts.OnRow(row)
		}
	}
	e.progress("")
	return r, nil
}

// attack makes one attack and its control.
func (e *env) attack(ctx context.Context, a Attack) Row {
	row := Row{Group: a.Group, Layer: a.Layer, Attack: a.Name, Expected: a.Expected, State: Failed}
	begun := time.Now()
	defer func() { row.Millis = float64(time.Since(begun).Microseconds()) / 1000 }()
	ctx, cancel := context.WithTimeoutCause(ctx, bound, fmt.Errorf("it did not end within %v", bound))
	defer cancel()
	f, err := a.run(ctx, e)
	if err != nil {
		row.Observed = "could not be tried: " + err.Error()
		return row
	}
	row.Observed, row.State = f.Observed, e.judge(a, f)
	if a.control == nil {
		return row
	}
	c, err := a.control(ctx, e)
	var impossible *notHere
	switch {
	case errors.As(err, &impossible):
		row.Control = "not possible here: " + impossible.why
	case err != nil:
		row.Control, row.State = "could not be tried: "+err.Error(), worse(row.State)
	case !c.Worked:
		row.Control, row.State = "does not work either: "+c.Observed, worse(row.State)
	default:
		row.Control = "works: " + c.Observed
	}
	return row
}

// notHere is returned by a control that this host has no means for: the row then
// stands on its attack alone, and says so.
type notHere struct{ why string }

func (e *notHere) Error() string { return e.why }

// worse is what a row is whose control has not worked: an attack that was held
// proves nothing then; one that worked did.
func worse(s State) State {
	if s == Held {
		return Failed
	}
	return s
}

// judge says how an attack stands that was made.
func (e *env) judge(a Attack, f Finding) State {
	if !f.Worked {
		return Held
	}
	n := layer.Name(a.Layer)
	if n.What() == "" {
		return Worked // nothing that could be off
	}
	if e.opts.Sandbox.Without.Has(n) {
		return Off
	}
	for _, s := range e.layers {
		if s.Layer == n && s.State == layer.Absent {
			return Absent
		}
	}
	return Worked // it is on, or held by another mechanism
}

// Report is the table of attacks.
type Report struct {
	Begun   time.Time `json:"begun"`
	Seconds float64   `json:"seconds"`
	Rows    []Row     `json:"attacks"`
}

// Count is how many rows are in a state.
func (r *Report) Count(s State) int {
	n := 0
	for _, row := range r.Rows {
		if row.State == s {
			n++
		}
	}
	return n
}

// ErrWorked says that an attack has worked.
var ErrWorked = errors.New("an attack worked")

// ErrFailed says that an attack could not be tried.
var ErrFailed = errors.New("an attack could not be tried")

// Err says whether the report is a pass: nil, or an error that wraps ErrWorked or,
// if none worked, ErrFailed.
func (r *Report) Err() error {
	for _, bad := range []struct {
		state State
		err   error
		what  string
	}{{Worked, ErrWorked, "worked"}, {Failed, ErrFailed, "could not be tried, or proved nothing"}} {
		if n := r.Count(bad.state); n > 0 {
			return fmt.Errorf("%w: %d of %d %s", bad.err, n, len(r.Rows), bad.what)
		}
	}
	if len(r.Rows) == 0 {
		return fmt.Errorf("%w: there were none", ErrFailed)
	}
	return nil
}

func printable(s string) string { return vm.Printable([]byte(s)) }
