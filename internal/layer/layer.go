// Package layer names the layers of isolation and says how each of them stands
// for one sandbox.
//
// Every layer is required. To go without one is a person's explicit choice
// ([Set]), and what a host cannot give is never passed over in silence: a
// [Report] says for each layer whether it is on, which other mechanism holds the
// same bound, or why it is not there. A report is made from what the kernel says
// of the process, never from what was asked for.
package layer

import (
	"fmt"
	"slices"
	"strings"
)

// Name is the name of a layer, as people type it.
type Name string

// The layers around the VMM's process, in the order in which they are shown.
const (
	User         Name = "user"         // a user and group of its own (root), or a user namespace
	Mounts       Name = "mounts"       // a mount namespace that holds only what the VMM needs, read-only
	Network      Name = "network"      // an empty network namespace
	Firewall     Name = "firewall"     // default drop in that namespace
	Guard        Name = "guard"        // as root: the host's namespace drops what VMM users send
	Processes    Name = "processes"    // a pid namespace of its own
	Namespaces   Name = "namespaces"   // IPC, UTS and cgroup namespaces of its own
	Capabilities Name = "capabilities" // none, and none to be had
	NoNewPrivs   Name = "no-new-privs" // no program gives it more than it has
	Seccomp      Name = "seccomp"      // filters of system calls on every thread: the VMM's own and ours
	Rlimits      Name = "rlimits"      // no core, no files to write, few descriptors and threads
	Cgroup       Name = "cgroup"       // bounds of memory, processor time, threads and disk
	Landlock     Name = "landlock"     // no file but those of the jail, once more
)

// The layers in the guest, around each command.
const (
	GuestUser         Name = "guest-user"         // commands run as an unprivileged user, unless told otherwise
	GuestSeccomp      Name = "guest-seccomp"      // a profile of system calls
	GuestCapabilities Name = "guest-capabilities" // also root has few
	GuestNoNewPrivs   Name = "guest-no-new-privs" // setuid programs give nothing
	GuestProcesses    Name = "guest-processes"    // the agent cannot be seen or touched, and parts of /proc are hidden
	GuestDevices      Name = "guest-devices"      // a /dev without the link and the disk
	GuestCgroup       Name = "guest-cgroup"       // bounds of memory and processes
)

// all are the layers in the order in which they are shown.
var all = []struct {
	name Name
	what string
}{
	{User, "the VMM runs as a user of its own, or in a user namespace"},
	{Mounts, "the VMM sees only the files that it needs, read-only"},
	{Network, "the VMM's network namespace is empty"},
	{Firewall, "that namespace drops every packet"},
	{Guard, "the host drops what the VMMs' users send"},
	{Processes, "the VMM sees no other process"},
	{Namespaces, "the VMM has IPC, UTS and cgroup namespaces of its own"},
	{Capabilities, "the VMM has no capability"},
	{NoNewPrivs, "no program can give the VMM privileges"},
	{Seccomp, "the VMM's system calls are filtered"},
	{Rlimits, "the VMM writes no files, dumps no core, opens few files"},
	{Cgroup, "the VMM's memory, processor time, threads and disk are bounded"},
	{Landlock, "the VMM can open no file but those it needs"},
	{GuestUser, "commands run as an unprivileged user"},
	{GuestSeccomp, "commands' system calls are filtered"},
	{GuestCapabilities, "commands have few capabilities, root too"},
	{GuestNoNewPrivs, "no program can give a command privileges"},
	{GuestProcesses, "commands do not see the guest agent"},
	{GuestDevices, "commands have no device of the machine"},
	{GuestCgroup, "commands' memory and processes are bounded"},
}

// All returns the layers in the order in which they are shown.
func All() []Name {
	names := make([]Name, len(all))
	for i, l := range all {
		names[i] = l.name
	}
	return names
}

// What says in one line what the layer does; "" for a name that is no layer.
func (n Name) What() string {
	for _, l := range all {
		if l.name == n {
			return l.what
		}
	}
	return ""
}

// Guest reports whether the layer is in the guest.
func (n Name) Guest() bool { return strings.HasPrefix(string(n), "guest-") }

// Set is a set of layers. The zero value is empty.
type Set map[Name]bool

// ParseSet reads names as people type them: each a layer's, or several with
// commas between.
func ParseSet(args []string) (Set, error) {
	set := Set{}
	for _, arg := range args {
		for name := range strings.SplitSeq(arg, ",") {
			n := Name(strings.TrimSpace(name))
			if n.What() == "" {
				return nil, fmt.Errorf("no layer is called %q: there are %s", name, join(All()))
			}
			set[n] = true
		}
	}
	return set, nil
}

// Has reports whether n is in the set. It may be called on nil.
func (s Set) Has(n Name) bool { return s[n] }

// Names returns the set's layers in the order in which they are shown.
func (s Set) Names() []Name {
	return slices.DeleteFunc(All(), func(n Name) bool { return !s[n] })
}

// String lists the names with commas between.
func (s Set) String() string { return join(s.Names()) }

func join(names []Name) string {
	words := make([]string, len(names))
	for i, n := range names {
		words[i] = string(n)
	}
	return strings.Join(words, ", ")
}

// State is how a layer stands.
type State string

// States.
const (
	On     State = "on"     // seen to be on
	Held   State = "held"   // the host cannot give it; Detail names what holds the same bound
	Absent State = "absent" // the host's kernel does not have it, and nothing was lost that another layer does not hold
	Off    State = "off"    // a person chose to go without
)

// Status is how one layer of one sandbox stands.
type Status struct {
	Layer  Name   `json:"layer"`
	State  State  `json:"state"`
	Detail string `json:"detail,omitempty"` // what was seen, what holds it, or why it is not there
}

// Report is how all layers of one sandbox stand, in the order of All.
type Report []Status

// Without lists the layers that a person chose to go without.
func (r Report) Without() []Name {
	var names []Name
	for _, s := range r {
		if s.State == Off {
			names = append(names, s.Layer)
		}
	}
	return names
}

// Sort puts the report in the order of All.
func (r Report) Sort() {
	order := All()
	slices.SortStableFunc(r, func(a, b Status) int {
		return slices.Index(order, a.Layer) - slices.Index(order, b.Layer)
	})
}

// Error says that a layer could not be set, or was not seen to be on. It stops
// the start.
type Error struct {
	Layer  Name
	Err    error
	Remedy string // "" if none is known
}

func (e *Error) Error() string { return fmt.Sprintf("isolation layer %s: %v", e.Layer, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// Hint is the remedy.
func (e *Error) Hint() string {
	without := fmt.Sprintf("go without it, knowingly: --without %s", e.Layer)
	if e.Remedy == "" {
		return without
	}
	return e.Remedy + "; or " + without
}
