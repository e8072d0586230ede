package verify

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
)

// Cell is a jail as the VMM has it, with this program in the VMM's place.
type Cell interface {
	// Run makes the attack in the jail and returns what the attacker wrote to its
	// standard output. An *exec.ExitError tells how it ended. Each call makes a jail
	// of its own.
	Run(ctx context.Context, r probe.Request) (stdout []byte, err error)
	// Facts are what the jail was made with, for attacks to look beyond.
	Facts() CellFacts
	// Report is how the layers of the jail stand, read from the kernel.
	Report() layer.Report
	// Close removes what the cell has on the host.
	Close() error
}

// CellFacts say what is in a jail.
type CellFacts struct {
	Root   []string // names in its root directory
	Image  string   // path in the jail of a file that stands for the image: read-only
	Exe    string   // path in the jail of this program, if a path leads to it
	Memory int64    // its bound, bytes
	CPU    int64    // its bound, percent of one processor; 0 means none
	Pids   int64    // its bound
	Files  int64    // its bound on descriptors
}

// abstractName is an abstract Unix socket that this process listens on.
func abstractName() string { return "ironclaw-verify-" + strconv.Itoa(os.Getpid()) }

func jailAttacks() []Attack {
	var all []Attack
	for _, c := range jailCases() {
		all = append(all, Attack{
			Group: Jail, Layer: string(c.layer), Name: c.name, Expected: c.expected,
			run: func(ctx context.Context, e *env) (Finding, error) {
				if err := e.openCell(ctx); err != nil {
					return Finding{}, err
				}
				if c.alone {
					return e.inCellWithout(ctx, c, c.also...)
				}
				return inCell(ctx, e.cell, c.request(e, e.cell))
			},
			control: func(ctx context.Context, e *env) (Finding, error) { return e.withoutLayer(ctx, c) },
		})
	}
	return all
}

// openCell makes the cell that all attacks of the group share.
func (e *env) openCell(ctx context.Context) error {
	if e.cell != nil {
		return nil
	}
	cell, err := newJailCell(ctx, e.opts.Program, e.dir, maps.Clone(e.opts.Sandbox.Without))
	if err != nil {
		return err
	}
	e.cell, e.layers = cell, cell.Report()
	return e.listenUnix()
}

// listenUnix puts Unix sockets where a jail that leaks would reach them: one with a
// name in the file system, one with a name in the network namespace.
func (e *env) listenUnix() error {
	for _, name := range []string{filepath.Join(e.dir, "socket"), "@" + abstractName()} {
		l, err := net.Listen("unix", name)
		if err != nil {
			return err
		}
		e.listeners = append(e.listeners, l)
	}
	return nil
}

// withoutLayer makes an attack in a jail that has all layers but those that stop it.
func (e *env) withoutLayer(ctx context.Context, c jailCase) (Finding, error) {
	if c.noControl != "" {
		return Finding{}, &notHere{c.noControl}
	}
	return e.inCellWithout(ctx, c, append([]layer.Name{c.layer}, c.also...)...)
}

func (e *env) inCellWithout(ctx context.Context, c jailCase, layers ...layer.Name) (Finding, error) {
	without := layer.Set{}
	for _, n := range layers {
		without[n] = true
	}
	cell, err := newJailCell(ctx, e.opts.Program, e.dir, without)
	if err != nil {
		return Finding{}, err
	}
	defer cell.Close()
	return inCell(ctx, cell, c.request(e, cell))
}

// request is the attack on a cell.
func (c *jailCase) request(e *env, cell Cell) probe.Request {
	r := probe.Request{Attack: c.attack}
	if c.held != "" && heldOtherwise(e.cell.Report(), c.layer) {
		r.Attack = c.held
	}
	if c.args != nil {
		r.Args = c.args(e, cell.Facts())
	}
	return r
}

// heldOtherwise reports whether another mechanism stands in for a layer.
func heldOtherwise(r layer.Report, n layer.Name) bool {
	return slices.ContainsFunc(r, func(s layer.Status) bool { return s.Layer == n && s.State == layer.Held })
}

// inCell makes an attack in a jail. To be killed for it is one way to be refused.
func inCell(ctx context.Context, cell Cell, r probe.Request) (Finding, error) {
	out, err := cell.Run(ctx, r)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		ws, ok := exit.Sys().(syscall.WaitStatus)
		if ok && ws.Signaled() && len(out) == 0 {
			return Finding{fmt.Sprintf("killed: %v", ws.Signal()), false}, nil
		}
		return Finding{}, fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	if err != nil {
		return Finding{}, err
	}
	res, err := oneResult(out)
	return Finding{res.Detail, res.Outcome == probe.Worked}, err
}
