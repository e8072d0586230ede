// Package firewall is the layers "firewall" and "guard": it sets rules that drop
// packets, reads back what the kernel holds, and lets nothing start if that is not
// exactly what was asked for.
//
// [Set] is for the network namespace of one machine's VMM, called in it, before the
// VMM is started. [EnsureGuard] is for the host's own namespace, called by root at
// each start. Both act on the network namespace of the calling thread: who is in
// another one than the rest of the process has locked the thread.
//
// The rules are data (internal/firewall/rules), set by nftables
// (internal/firewall/nft) or, on kernels without it, by iptables
// (internal/firewall/iptables). docs/network-isolation.md tells what for.
package firewall

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/filelock"
	"github.com/ironclaw-run/ironclaw/internal/firewall/iptables"
	"github.com/ironclaw-run/ironclaw/internal/firewall/nft"
	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
)

// Rules is all that one table holds. See package rules.
type Rules = rules.Rules

// Machine returns the rules of the namespace that the VMM of the machine id lives
// in: nothing comes in, goes out or passes through.
func Machine(id string) Rules { return rules.Machine(id) }

// Backends, as people name them.
const (
	Auto     = "auto" // nftables; iptables if the kernel does not have it
	NFT      = "nft"
	IPTables = "iptables"
)

// DefaultLock is the file by which concurrent EnsureGuards of this host wait for
// each other.
const DefaultLock = "/run/ironclaw-guard.lock"

// Options of Set and EnsureGuard. The zero value is ready.
type Options struct {
	Backend string           // Auto (the default), NFT or IPTables
	Tools   iptables.Options // where iptables' programs are
	Lock    string           // of EnsureGuard; default DefaultLock
}

// backends returns those that may be tried, in order.
func (o Options) backends() ([]rules.Backend, error) {
	switch o.Backend {
	case "", Auto:
		return []rules.Backend{nft.Backend{}, iptables.New(o.Tools)}, nil
	case NFT:
		return []rules.Backend{nft.Backend{}}, nil
	case IPTables:
		return []rules.Backend{iptables.New(o.Tools)}, nil
	}
	return nil, fmt.Errorf("no firewall is called %q: there are %s, %s and %s", o.Backend, Auto, NFT, IPTables)
}

// NoBackendError says that neither way to set rules is there.
type NoBackendError struct {
	NFT, IPTables error
}

func (e *NoBackendError) Error() string {
	return fmt.Sprintf("no firewall can be set: %v; %v", e.NFT, e.IPTables)
}

// Unwrap returns both reasons.
func (e *NoBackendError) Unwrap() []error { return []error{e.NFT, e.IPTables} }

// Hint is the remedy.
func (e *NoBackendError) Hint() string {
	const load = "sudo modprobe nf_tables"
	if missing, ok := errors.AsType[*iptables.MissingToolError](e.IPTables); ok {
		return load + "; or " + missing.Hint()
	}
	return load
}

// InUseError says that a namespace which is to be closed has network devices that
// are up: it may be the host's own, which would lose its network.
type InUseError struct{ Devices []string }

func (e *InUseError) Error() string {
	return "this network namespace is in use: it has " + strings.Join(e.Devices, ", ")
}

// Result tells what has been set and seen.
type Result struct {
	Backend string // NFT or IPTables
	Version string // of iptables' programs; "" with nftables, which needs none
	Rules   Rules
}

func (r Result) String() string {
	by := r.Backend
	if r.Version != "" {
		by += " " + r.Version
	}
	return fmt.Sprintf("%s: everything is dropped on %s", by, hooks(r.Rules))
}

func hooks(r Rules) string {
	names := make([]string, len(r.Chains))
	for i, c := range r.Chains {
		names[i] = string(c.Hook)
	}
	return strings.Join(names, ", ")
}

// Set sets r in the network namespace of the calling thread, in the place of what
// is there of it, reads it back and compares. When it returns without an error the
// kernel holds exactly r.
//
// Exclusive rules are refused where a network device other than loopback is up
// (*InUseError). What the kernel holds otherwise is a *rules.DifferenceError; if
// neither backend is to be had the error is a *NoBackendError.
func Set(ctx context.Context, r Rules, o Options) (Result, error) {
	if err := alone(r); err != nil {
		return Result{}, err
	}
	result := Result{Rules: r}
	b, err := first(o, func(b rules.Backend) error {
		err := b.Set(ctx, r)
		if err != nil {
			return err
		}
		if tools, ok := b.(*iptables.Backend); ok {
			if result.Version, err = tools.Version(ctx); err != nil {
				return err
			}
		}
		return b.Verify(ctx, r) // last: what it sees is what holds
	})
	if err != nil {
		return Result{}, err
	}
	result.Backend = b.Name()
	return result, nil
}

// alone refuses to close a namespace that is in use. Devices that are down may be
// there: with some modules loaded every new namespace is born with sit0 and others.
func alone(r Rules) error {
	if !r.Exclusive {
		return nil
	}
	all, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list the network devices: %w", err)
	}
	var others []string
	for _, dev := range all {
		if dev.Flags&net.FlagLoopback == 0 && dev.Flags&net.FlagUp != 0 {
			others = append(others, dev.Name)
		}
	}
	if others != nil {
		return &InUseError{others}
	}
	return nil
}

// first calls do for the backends until one of them is in this kernel. Any other
// error of a backend is final: rules that nftables refuses are not tried again in
// another way.
func first(o Options, do func(rules.Backend) error) (rules.Backend, error) {
	backends, err := o.backends()
	if err != nil {
		return nil, err
	}
	var without []error
	for _, b := range backends {
		err := do(b)
		if err == nil {
			return b, nil
		}
		_, missing := errors.AsType[*iptables.MissingToolError](err)
		switch {
		case errors.Is(err, rules.ErrUnsupported), missing && len(without) > 0:
			without = append(without, err)
		default:
			return nil, errors.Join(append(without, err)...)
		}
	}
	if len(without) == 2 {
		return nil, &NoBackendError{NFT: without[0], IPTables: without[1]}
	}
	return nil, without[0]
}

// GuardState is how EnsureGuard found the guard.
type GuardState string

// States.
const (
	Found     GuardState = "found"     // exactly as it should be
	Installed GuardState = "installed" // it was not there
	Repaired  GuardState = "repaired"  // something of that name was there, and was another; see Was
)

// GuardResult tells how the guard stands.
type GuardResult struct {
	Backend string // NFT or IPTables
	State   GuardState
	Was     string // if it was repaired: what was wrong with it, as a diff
	Rules   Rules
}

func (r GuardResult) String() string {
	return fmt.Sprintf("%s: the host drops what users %s send (%s)", r.Backend, r.Rules.Chains[0].Rules[0].UIDs, r.State)
}

// EnsureGuard sees to it that the namespace of the calling thread, the host's own,
// drops what the users first to last send. At nearly all starts it only reads. If
// the guard is absent, or somebody has changed it, it is put there in one
// transaction and read again; an error in that is an error of the start. Nothing of
// anybody else is touched.
//
// It may be called by any number of processes at once. There is one guard, so who
// asks for another range replaces it.
func EnsureGuard(ctx context.Context, firstUID, last uint32, o Options) (GuardResult, error) {
	result := GuardResult{State: Found, Rules: rules.Guard(firstUID, last)}
	b, err := first(o, func(b rules.Backend) error {
		err := b.Verify(ctx, result.Rules)
		if _, different := errors.AsType[*rules.DifferenceError](err); !different {
			return err
		}
		result.State, result.Was, err = install(ctx, b, result.Rules, o)
		return err
	})
	if err != nil {
		return GuardResult{}, err
	}
	result.Backend = b.Name()
	return result, nil
}

// RemoveGuard takes the guard out of the namespace of the calling thread, if it is there: to show
// what it stops, where that does no harm.
func RemoveGuard(ctx context.Context, firstUID, last uint32, o Options) error {
	_, err := first(o, func(b rules.Backend) error { return b.Remove(ctx, rules.Guard(firstUID, last)) })
	return err
}

// install puts the guard in its place, unless somebody has done so meanwhile.
// nftables would not need the lock; iptables looks first and acts then.
func install(ctx context.Context, b rules.Backend, r Rules, o Options) (GuardState, string, error) {
	path := o.Lock
	if path == "" {
		path = DefaultLock
	}
	unlock, err := filelock.Lock(ctx, path)
	if err != nil {
		return "", "", err
	}
	defer unlock()
	err = b.Verify(ctx, r)
	diff, different := errors.AsType[*rules.DifferenceError](err)
	if !different {
		return Found, "", err
	}
	if err := b.Set(ctx, r); err != nil {
		return "", "", err
	}
	if err := b.Verify(ctx, r); err != nil {
		return "", "", err
	}
	if diff.Missing {
		return Installed, "", nil
	}
	return Repaired, diff.Diff, nil
}
