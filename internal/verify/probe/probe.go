// Package probe holds the attacks themselves: small pieces of a hostile program
// that try one thing each and say what the kernel answered.
//
// It runs where the attacker would: as root in a guest, and in the VMM's place in
// its jail. There it is this same program, started under the name [Name], so that
// an attack is a system call and no shell, tool or library of an image is needed.
// It imports nothing of the host's side, and believes nothing: an attack that was
// neither refused nor seen to work is [Unknown].
//
// An attack does no harm where it works: it writes back what it has read, sends
// signal 0, gives a system call arguments that are refused after the permission
// was. So the same attack can be run without the layer that stops it, to show that
// it would have worked.
package probe

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Name is the first or second word of the command line that starts an attack.
const Name = "ironclaw-probe"

// Outcome is how an attack ended.
type Outcome string

// Outcomes.
const (
	Refused Outcome = "refused" // something said no
	Worked  Outcome = "worked"  // the attacker has what it wanted
	Unknown Outcome = "unknown" // it could not be tried, or did not end
)

// Request asks for one attack.
type Request struct {
	Attack string   `json:"attack"`
	Args   []string `json:"args,omitempty"`
}

// Result is what an attack found: one line of JSON on standard output.
type Result struct {
	Attack  string  `json:"attack"`
	Outcome Outcome `json:"outcome"`
	Detail  string  `json:"detail"` // what the kernel said, or what was seen
}

// attack tries one thing.
type attack func(args []string) (Outcome, string)

// timeout bounds an attack that waits where it should not.
const timeout = 20 * time.Second

// Called finds the requests in a program's command line. It is false if the
// program was started as itself.
func Called(argv []string) (requests string, ok bool) {
	switch {
	case len(argv) == 2 && path.Base(argv[0]) == Name:
		return argv[1], true
	case len(argv) == 3 && argv[1] == Name:
		return argv[2], true
	}
	return "", false
}

// Await, as the first request, makes the program wait until descriptor 3 is closed at its other
// end: until who started it has looked at it.
const Await = "await"

const awaitFD = 3

// Line is the command line's last word for these requests.
func Line(requests ...Request) string {
	b, err := json.Marshal(requests)
	if err != nil {
		panic(err) // strings only
	}
	return string(b)
}

// Names lists all attacks.
func Names() []string {
	var names []string
	for _, set := range []map[string]attack{netAttacks, guestAttacks, fileAttacks, processAttacks, privilegeAttacks, limitAttacks, floodAttacks} {
		for name := range set {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func find(name string) attack {
	for _, set := range []map[string]attack{netAttacks, guestAttacks, fileAttacks, processAttacks, privilegeAttacks, limitAttacks, floodAttacks} {
		if a := set[name]; a != nil {
			return a
		}
	}
	return nil
}

// Main runs the requests one after the other and prints their results. It returns
// the process's exit code: 0 whatever the attacks found.
func Main(requests string, stdout io.Writer) int {
	var list []Request
	if err := json.Unmarshal([]byte(requests), &list); err != nil {
		fmt.Fprintf(stdout, "{\"outcome\":\"unknown\",\"detail\":%q}\n", "requests: "+err.Error())
		return 2
	}
	enc := json.NewEncoder(stdout)
	if len(list) > 0 && list[0].Attack == Await {
		var b [1]byte // until nobody has the other end any more
		_, _ = unix.Read(awaitFD, b[:])
		list = list[1:]
	}
	for _, r := range list {
		if err := enc.Encode(run(r, timeout)); err != nil {
			return 2
		}
	}
	return 0
}

// run runs one attack on a thread of its own, which ends with it: what an attack
// changes of its thread (namespaces, capabilities) the next one does not have.
func run(r Request, limit time.Duration) Result {
	a := find(r.Attack)
	if a == nil {
		return Result{r.Attack, Unknown, "there is no such attack"}
	}
	done := make(chan Result, 1)
	go func() {
		runtime.LockOSThread()
		defer func() {
			if p := recover(); p != nil {
				done <- Result{r.Attack, Unknown, fmt.Sprintf("panic: %v", p)}
			}
		}()
		outcome, detail := a(r.Args)
		done <- Result{r.Attack, outcome, detail}
	}()
	select {
	case res := <-done:
		return res
	case <-time.After(limit):
		return Result{r.Attack, Unknown, fmt.Sprintf("it did not end within %v", limit)}
	}
}

// ParseResults reads what a probe printed. What is no result is an error: the
// output comes from an attacker.
func ParseResults(out []byte, want int) ([]Result, error) {
	var results []Result
	for line := range strings.Lines(string(out)) {
		var r Result
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			return results, fmt.Errorf("read an attack's result: %w", err)
		}
		if !slices.Contains([]Outcome{Refused, Worked, Unknown}, r.Outcome) || len(results) == want {
			return results, fmt.Errorf("read an attack's result: %.80q", line)
		}
		results = append(results, r)
	}
	if len(results) < want {
		return results, fmt.Errorf("an attack ended without a result: %d of %d", len(results), want)
	}
	return results, nil
}

// tried is the outcome of a call that either works or does not.
func tried(what string, err error) (Outcome, string) {
	if err == nil {
		return Worked, what
	}
	return Refused, what + ": " + errnoName(err)
}

// triedBadly is the outcome of a call whose arguments are nonsense: an error that
// is about those tells that the permission was given.
func triedBadly(what string, err error, nonsense ...unix.Errno) (Outcome, string) {
	for _, e := range nonsense {
		if errors.Is(err, e) {
			return Worked, what + ": allowed, and only its arguments were refused (" + errnoName(e) + ")"
		}
	}
	return tried(what, err)
}

// errnoName is the symbol where there is one: people search for it.
func errnoName(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		if name := unix.ErrnoName(errno); name != "" {
			return name
		}
	}
	return err.Error()
}

// several runs a thing for each of the names: it works if it works for one. The
// detail tells the first that worked, or how they were refused.
func several(names []string, try func(name string) error) (Outcome, string) {
	if len(names) == 0 {
		return Unknown, "nothing to try it on"
	}
	var worked []string
	refused := map[string]int{}
	var order []string
	for _, name := range names {
		err := try(name)
		if err == nil {
			worked = append(worked, name)
			continue
		}
		e := errnoName(err)
		if refused[e]++; refused[e] == 1 {
			order = append(order, e)
		}
	}
	if len(worked) > 0 {
		return Worked, strings.Join(worked, ", ")
	}
	var parts []string
	for _, e := range order {
		parts = append(parts, fmt.Sprintf("%d× %s", refused[e], e))
	}
	return Refused, strings.Join(parts, ", ")
}

// sys is a system call whose result is of no interest.
func sys(trap, a, b, c uintptr) error {
	if _, _, errno := unix.Syscall(trap, a, b, c); errno != 0 {
		return errno
	}
	return nil
}
