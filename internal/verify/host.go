package verify

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
)

func hostAttacks() []Attack {
	return []Attack{{
		Group: Host, Layer: Cleanup, Name: "stay alive after the stop", Expected: "nothing of it is left on the host",
		run: stayAlive, control: leftBehind,
	}, {
		Group: Host, Layer: Cleanup, Name: "outlive a supervisor that is killed", Expected: "the VMM is gone, the record is removed",
		run: outlive,
	}}
}

// undead starts a command in a sandbox of its own that ignores every signal,
// multiplies and does not end.
func undead(ctx context.Context, e *env) (*sandbox.Sandbox, error) {
	s, err := e.newSandbox(ctx)
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	p, err := s.Start(ctx, sandbox.Cmd{
		Args: []string{probePath, probe.Name, probe.Line(probe.Request{Attack: "flood.undying"})}, User: "root", Stdout: w,
	})
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	go func() { // its output ends with the machine
		<-p.Done()
		_ = w.Close()
	}()
	up, err := bufio.NewReader(io.LimitReader(r, 4096)).ReadString('\n')
	if err == nil && !strings.HasPrefix(up, "up ") {
		err = fmt.Errorf("it said %q", up)
	}
	if err == nil {
		err = p.Signal(syscall.SIGTERM, true) // it shall show that it ignores that
	}
	if err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("start a command that does not end: %w", err)
	}
	go func() { _, _ = io.Copy(io.Discard, r) }()
	return s, nil
}

// stayAlive compares what is on the host before such a sandbox and after.
func stayAlive(ctx context.Context, e *env) (Finding, error) {
	for _, box := range []func(context.Context) (*sandbox.Sandbox, error){e.attacker, e.neighbour} {
		if _, err := box(ctx); err != nil { // those of others are the same before and after
			return Finding{}, err
		}
	}
	before, err := e.remains("")
	if err != nil {
		return Finding{}, err
	}
	s, err := undead(ctx, e)
	if err != nil {
		return Finding{}, err
	}
	pid, began := s.Machine().Info().PID, time.Now()
	_ = s.Close()
	took := time.Since(began)
	if alive(pid) {
		return Finding{fmt.Sprintf("its VMM, process %d, is alive after Close", pid), true}, nil
	}
	left, err := e.newSince(before, s.ID())
	if err != nil {
		return Finding{}, err
	}
	if len(left) > 0 {
		return Finding{"left behind: " + strings.Join(left, "; "), true}, nil
	}
	return Finding{fmt.Sprintf("gone after %d ms: no process, file, mount or cgroup", took.Milliseconds()), false}, nil
}

// newSince lists what remains of a sandbox that was not there before.
func (e *env) newSince(before []string, id string) ([]string, error) {
	now, err := e.remains(id)
	return slices.DeleteFunc(now, func(s string) bool { return slices.Contains(before, s) }), err
}

// leftBehind shows that a sandbox which is not closed is found.
func leftBehind(ctx context.Context, e *env) (Finding, error) {
	before, err := e.remains("")
	if err != nil {
		return Finding{}, err
	}
	s, err := e.newSandbox(ctx)
	if err != nil {
		return Finding{}, err
	}
	defer s.Close()
	left, err := e.newSince(before, s.ID())
	process, record := false, false
	for _, l := range left {
		process = process || strings.HasPrefix(l, "process ")
		record = record || strings.HasPrefix(l, e.host.Home)
	}
	return Finding{fmt.Sprintf("one that runs is found by %d traces", len(left)), process && record}, err
}

// outlive kills a supervisor as the kernel would that is out of memory.
func outlive(ctx context.Context, e *env) (Finding, error) {
	cmd := exec.CommandContext(ctx, e.opts.Program, "run", "--user", "root", "--", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done")
	cmd.Env = append(os.Environ(), "IRONCLAW_HOME="+e.host.Home)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return Finding{}, err
	}
	if err := cmd.Start(); err != nil {
		return Finding{}, err
	}
	line, _ := bufio.NewReader(io.LimitReader(out, 4096)).ReadString('\n')
	family := descendants(cmd.Process.Pid)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if line != "up\n" || len(family) == 0 {
		return Finding{}, errors.New("the sandbox did not come up")
	}
	left := settledPids(ctx, family)
	if len(left) > 0 {
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return Finding{fmt.Sprintf("%d of %d processes live on", len(left), len(family)), true}, nil
	}
	cleaned, err := e.host.Reconcile()
	if err != nil {
		return Finding{}, err
	}
	if len(cleaned) == 0 {
		return Finding{"the processes are gone, and no record was found to remove", true}, nil
	}
	return Finding{fmt.Sprintf("%d processes gone, %d record removed", len(family), len(cleaned)), false}, nil
}

// settledPids are those that live on.
func settledPids(ctx context.Context, pids []int) []int {
	for end := time.Now().Add(settleTime); ; time.Sleep(50 * time.Millisecond) {
		left := slices.DeleteFunc(slices.Clone(pids), func(pid int) bool { return !alive(pid) })
		if len(left) == 0 || time.Now().After(end) || ctx.Err() != nil {
			return left
		}
	}
}
