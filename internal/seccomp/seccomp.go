// Package seccomp compiles filters of system calls from data, installs them, and
// keeps what they refuse. It is linked into the guest agent and into programs of
// the host, and knows neither.
//
// A [Profile] is data: a default action and rules. [Profile.Compile] makes of it
// the classic BPF that the kernel runs; [Install] puts that on the calling
// thread. [Default] and [Strict] are the profiles of commands in the guest.
//
// # What a compiled filter guarantees
//
// Calls of another architecture than x86-64, and of the x32 ABI, which have the
// numbers of other calls, are decided by [Profile.Foreign] alone, before any rule
// is looked at. For all others the first rule that names the call and whose
// conditions all hold decides, and [Profile.Default] if there is none. A filter
// never reads memory of the process, so there is nothing that another thread could
// change between the check and the call: what is behind a pointer cannot be
// checked.
//
// Numbers are found by binary search: the kernel runs a filter once for each number
// when it is installed, to remember the calls that are always allowed, and for the
// others at each call.
package seccomp

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Action is what happens to a call, as the kernel has it (SECCOMP_RET_*).
type Action uint32

// Actions. See also [Errno].
const (
	KillProcess Action = unix.SECCOMP_RET_KILL_PROCESS
	Trap        Action = unix.SECCOMP_RET_TRAP
	Notify      Action = unix.SECCOMP_RET_USER_NOTIF // whoever holds the listener decides
	Log         Action = unix.SECCOMP_RET_LOG
	Allow       Action = unix.SECCOMP_RET_ALLOW
)

func (a Action) String() string {
	switch a {
	case Allow:
		return "allow"
	case Notify:
		return "notify"
	case KillProcess:
		return "kill"
	}
	return fmt.Sprintf("%#x", uint32(a))
}

// Errno is the action that makes the call fail with e.
func Errno(e unix.Errno) Action {
	return Action(unix.SECCOMP_RET_ERRNO | uint32(e)&unix.SECCOMP_RET_DATA)
}

// Op compares an argument with a value, both unsigned.
type Op uint8

// Comparisons.
const (
	Equal Op = iota
	NotEqual
	Less
	LessEqual
	Greater
	GreaterEqual
)

// Int is the mask of an argument that is an int in C. The kernel looks at the
// lower half of such an argument only; a filter that looks at all of it can be
// passed by with bits in the upper half.
const Int = 1<<32 - 1

// Long is the mask of an argument of which the kernel takes every bit.
const Long = 1<<64 - 1

// Cond is a condition: that argument Arg (0 to 5), masked, compares so with Value.
type Cond struct {
	Arg   int
	Mask  uint64 // Int, Long, or the bits that matter; 0 is a mistake
	Op    Op
	Value uint64 // within Mask
}

// Rule decides some calls. The conditions must all hold; without any it always
// applies.
type Rule struct {
	Calls  []string // names as in the kernel's table, e.g. "newfstatat"
	Action Action
	Conds  []Cond
}

// Profile says what happens to each call.
type Profile struct {
	Name    string
	Default Action // of calls that no rule decides; it must be set
	Foreign Action // of calls by another ABI than x86-64's own; 0 means KillProcess
	Rules   []Rule // the first that applies decides
}

// Name is the name of the call of this number on x86-64, "" if there is none or it
// is newer than our table.
func Name(nr int) string {
	if nr < 0 || nr >= len(names) {
		return ""
	}
	return names[nr]
}

// String lists what happens to each call, for people and golden files.
func (p *Profile) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "otherwise: %s\nother ABIs: %s\n", p.Default, p.Foreign)
	for _, name := range names {
		for _, r := range p.Rules {
			if name == "" || !slices.Contains(r.Calls, name) {
				continue
			}
			fmt.Fprintf(&b, "%s: %s", name, r.Action)
			for i, c := range r.Conds {
				fmt.Fprintf(&b, "%s arg%d&%#x %s %#x", []string{" if", " and"}[min(i, 1)], c.Arg, c.Mask,
					[]string{"==", "!=", "<", "<=", ">", ">="}[c.Op], c.Value)
			}
			b.WriteString("\n")
		}
	}
	return b.String()
}
