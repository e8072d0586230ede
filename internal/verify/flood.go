package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
)

// floodTime is how long a flood lasts at least, in milliseconds: longer than
// measuring takes on an idle host.
const floodTime = "2500"

// Bounds of what a flood may cost the host. They are the floods' sizes divided by
// many: a leak shows at once.
const (
	maxSupervisor = 64 << 20  // growth of this process, bytes
	maxVMM        = 256 << 20 // what a VMM takes beyond its guest's memory, bytes
)

func floodAttacks() []Attack {
	flood := func(l, name, attack string, args ...string) Attack {
		return Attack{
			Group: Guest, Layer: l, Name: name, Expected: "a neighbour and the host stay usable",
			run: func(ctx context.Context, e *env) (Finding, error) {
				return e.flood(ctx, probe.Request{Attack: attack, Args: append([]string{floodTime}, args...)})
			},
		}
	}
	const tooMuch = "1099511627776" // 1 TiB
	all := []Attack{
		flood(Machine, "fill the disk", "flood.disk", tooMuch, "/var/tmp"),
		flood(Machine, "fill the memory by files", "flood.disk", tooMuch, "/dev/shm"),
		flood(Machine, "fill the memory", "flood.memory"),
		flood(string(layer.GuestCgroup), "multiply processes without end", "flood.processes", "100000"),
		flood(Machine, "keep all processors busy", "flood.cpu"),
		flood(Machine, "flood the console", "flood.console"),
		flood(Protocol, "flood the link, read slowly by the host", "flood.link"),
	}
	all[2].run = func(ctx context.Context, e *env) (Finding, error) {
		return e.flood(ctx, probe.Request{Attack: "flood.memory", Args: []string{tooMuch}})
	}
	all[4].control = frozenNeighbour
	return all
}

// flood measures neighbour and host before and during an attack.
func (e *env) flood(ctx context.Context, r probe.Request) (Finding, error) {
	attacker, err := e.attacker(ctx)
	if err != nil {
		return Finding{}, err
	}
	neighbour, err := e.neighbour(ctx)
	if err != nil {
		return Finding{}, err
	}
	before, err := e.measure(ctx, neighbour)
	if err != nil {
		return Finding{}, fmt.Errorf("measure before the attack: %w", err)
	}
	mem, err := watchMemory()
	if err != nil {
		return Finding{}, err
	}
	p, out, err := e.startFlood(ctx, attacker, r)
	if err != nil {
		return Finding{}, err
	}
	defer p.Close()
	during, err := e.measure(ctx, neighbour)
	if err != nil {
		if ctx.Err() != nil {
			return Finding{}, context.Cause(ctx)
		}
		return Finding{"unusable: " + err.Error(), true}, nil
	}
	end := endFlood(ctx, p)
	grown, err := mem.grown()
	if err != nil {
		return Finding{}, err
	}
	f := Finding{Observed: fmt.Sprintf("%s; %s; %s", during.against(before), mib("supervisor grew by", grown), floodSaid(out, end))}
	if grown > maxSupervisor {
		f.Worked = true
	}
	if vmm, ok := residentOf(attacker.Machine().Info().PID); ok && vmm > e.memory()+maxVMM {
		f.Worked, f.Observed = true, fmt.Sprintf("the VMM uses %d MiB; %s", vmm>>20, f.Observed)
	}
	return f, nil
}

// slowWriter reads a flood as a slow terminal would.
type slowWriter struct{ w io.Writer }

func (s slowWriter) Write(b []byte) (int, error) {
	time.Sleep(5 * time.Millisecond)
	return s.w.Write(b)
}

func (e *env) startFlood(ctx context.Context, s *sandbox.Sandbox, r probe.Request) (*sandbox.Process, *limitedBuffer, error) {
	out := &limitedBuffer{left: 64 << 10}
	p, err := s.Start(ctx, sandbox.Cmd{
		Args: []string{probePath, probe.Name, probe.Line(r)}, User: "root", KillAll: true,
		Stdout: slowWriter{out}, Stderr: slowWriter{io.Discard},
	})
	return p, out, err
}

// endFlood waits for a flood that ends by itself, and ends one that does not.
func endFlood(ctx context.Context, p *sandbox.Process) string {
	wait, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	exit, err := p.Wait(wait)
	switch {
	case wait.Err() != nil:
		_ = p.Signal(unix.SIGKILL, true)
		return "ended by the host"
	case err != nil:
		return "it ended the machine: " + err.Error()
	}
	if err := (&guestExit{exit, ""}); exit.Signal != 0 || exit.OOM {
		return err.Error()
	}
	return ""
}

// floodSaid is what the probe said of itself: to be shown, not to be judged by.
func floodSaid(out *limitedBuffer, end string) string {
	if end != "" {
		return "attacker: " + end
	}
	res, err := oneResult(out.Bytes())
	if err != nil {
		return "attacker: it wrote to its output"
	}
	return "attacker: " + res.Detail
}

// memory is what a guest has, in bytes.
func (e *env) memory() int64 {
	if m := e.opts.Sandbox.Memory; m != 0 {
		return m
	}
	return defaultMemory
}

// frozenNeighbour shows that measuring notices a neighbour that is not usable: its
// VMM is stopped meanwhile.
func frozenNeighbour(ctx context.Context, e *env) (Finding, error) {
	s, err := e.neighbour(ctx)
	if err != nil {
		return Finding{}, err
	}
	pid := s.Machine().Info().PID
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return Finding{}, err
	}
	defer func() { _ = unix.Kill(pid, unix.SIGCONT) }()
	short, cancel := context.WithTimeoutCause(ctx, time.Second, errors.New("no answer within a second"))
	defer cancel()
	_, err = e.measure(short, s)
	if err == nil {
		return Finding{"a neighbour that was stopped counts as usable", false}, nil
	}
	return Finding{"a neighbour that is stopped is seen: " + err.Error(), true}, nil
}

func mib(what string, n int64) string {
	return what + " " + strconv.FormatInt(max(n, 0)>>20, 10) + " MiB"
}
