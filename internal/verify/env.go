package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
	"github.com/ironclaw-run/ironclaw/internal/verify/testnet"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// env is what the attacks share. Sandboxes are made when they are needed and used
// by many attacks; one that an attack has broken is replaced.
type env struct {
	opts *Options
	host *sandbox.Host

	dir    string // for what attacks put on the host; removed at the end
	lock   *os.File
	net    *testnet.Net
	noNet  error
	layers layer.Report // of the attacker's sandbox

	attackerBox  *sandbox.Sandbox
	neighbourBox *sandbox.Sandbox
	hostileHost  *sandbox.Host
	cell         Cell
	listeners    []net.Listener // that a jail must not reach
	accel        vm.Accel       // of hostile machines
	links        []vm.Link
	quiet        map[quietKey]linkResult // of scenarios that are waited for together
	linkBefore   usage                   // before the first hostile machine
	imageSum     string                  // of the image, before the first attack
}

// probePath is where the probe is put in a guest.
const probePath = "/var/tmp/" + probe.Name

// newEnv makes what no attack can be made without.
func newEnv(ctx context.Context, opts *Options) (_ *env, err error) {
	if err := checkProgram(opts.Program); err != nil {
		return nil, err
	}
	e := &env{opts: opts, host: opts.Host, noNet: opts.NoNetwork}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if err := e.makeDir(); err != nil {
		return nil, err
	}
	if e.noNet == nil {
		if e.net, err = testnet.Open(); err != nil {
			return nil, err
		}
		if err := e.net.Prove(); err != nil {
			return nil, err
		}
	}
	return e, ctx.Err()
}

const dirPattern = "ironclaw-verify-*"

// makeDir makes the directory for what attacks put on the host. A lock on it tells
// that it is in use; what a killed process has left is removed.
func (e *env) makeDir() (err error) {
	old, _ := filepath.Glob(filepath.Join(os.TempDir(), dirPattern))
	for _, dir := range old {
		removeStale(dir)
	}
	if e.dir, err = os.MkdirTemp("", dirPattern); err != nil {
		return err
	}
	if e.lock, err = os.Open(e.dir); err != nil {
		return err
	}
	return unix.Flock(int(e.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
}

// removeStale removes a directory of ours that nobody holds, once it is too old to be
// one that somebody is about to lock.
func removeStale(dir string) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	defer f.Close()
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil || int(st.Uid) != os.Geteuid() || time.Since(time.Unix(st.Mtim.Unix())) < time.Minute {
		return
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		_ = os.RemoveAll(dir) // housekeeping: the next one tries again
	}
}

func (e *env) close() {
	for _, s := range []*sandbox.Sandbox{e.attackerBox, e.neighbourBox} {
		if s != nil {
			_ = s.Close()
		}
	}
	if e.cell != nil {
		_ = e.cell.Close()
	}
	for _, l := range e.listeners {
		_ = l.Close()
	}
	if e.net != nil {
		_ = e.net.Close()
	}
	if e.dir != "" {
		_ = os.RemoveAll(e.dir)
	}
	if e.lock != nil {
		_ = e.lock.Close()
	}
}

func (e *env) progress(step string) {
	if e.opts.Progress != nil {
		e.opts.Progress(step)
	}
}

// pingTime is how long a machine may take to answer that is not broken, on a host
// that is busy.
const pingTime = 20 * time.Second

// attacker is the sandbox that attacks.
func (e *env) attacker(ctx context.Context) (*sandbox.Sandbox, error) {
	if s := e.attackerBox; s != nil {
		ping, cancel := context.WithTimeout(ctx, pingTime)
		defer cancel()
		if s.Ping(ping, []byte("there?")) == nil {
			return s, nil
		}
		_ = s.Close()
		e.attackerBox = nil
	}
	s, err := e.newSandbox(ctx)
	if err != nil {
		return nil, err
	}
	if e.imageSum == "" {
		if e.imageSum, err = fileSum(ctx, s.Image().Path); err != nil {
			_ = s.Close()
			return nil, err
		}
	}
	e.attackerBox = s
	if e.opts.Layers != nil {
		e.layers = e.opts.Layers(s)
	}
	return s, nil
}

// neighbour is a sandbox that does nothing wrong.
func (e *env) neighbour(ctx context.Context) (*sandbox.Sandbox, error) {
	if e.neighbourBox != nil {
		return e.neighbourBox, nil
	}
	s, err := e.newSandbox(ctx)
	e.neighbourBox = s
	return s, err
}

// newSandbox makes a sandbox that has the probe.
func (e *env) newSandbox(ctx context.Context) (*sandbox.Sandbox, error) {
	s, err := e.host.Create(ctx, e.opts.Sandbox)
	if err != nil {
		return nil, fmt.Errorf("make a sandbox: %w", err)
	}
	f, err := os.Open(e.opts.Program)
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	defer f.Close()
	_, err = e.guestRun(ctx, s, sandbox.Cmd{
		Args: []string{"sh", "-c", "cat >" + probePath + " && chmod 755 " + probePath}, User: "root", Stdin: f,
	})
	if err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("put the probe into a guest: %w", err)
	}
	return s, nil
}

// maxOutput bounds what is kept of a guest's output.
const maxOutput = 1 << 20

// guestRun runs a command that is to end, and with 0.
func (e *env) guestRun(ctx context.Context, s *sandbox.Sandbox, cmd sandbox.Cmd) ([]byte, error) {
	out := &limitedBuffer{left: maxOutput}
	stderr := &limitedBuffer{left: 4096}
	cmd.Stdout, cmd.Stderr, cmd.KillAll = out, stderr, true
	p, err := s.Start(ctx, cmd)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	exit, err := p.Wait(ctx)
	if err != nil {
		return out.Bytes(), err
	}
	if exit.Code != 0 || exit.Signal != 0 {
		return out.Bytes(), &guestExit{exit, stderr.String()}
	}
	return out.Bytes(), nil
}

// guestExit is a command that has not ended with 0.
type guestExit struct {
	sandbox.Exit
	stderr string
}

func (e *guestExit) Error() string {
	switch {
	case e.OOM:
		return "killed, out of memory"
	case e.Signal != 0:
		return fmt.Sprintf("killed by signal %d", e.Signal)
	}
	return fmt.Sprintf("exit code %d: %.200s", e.Code, printable(e.stderr))
}

type limitedBuffer struct {
	bytes.Buffer
	left int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	n := min(len(p), b.left)
	b.left -= n
	b.Buffer.Write(p[:n])
	return len(p), nil
}

var _ io.Writer = (*limitedBuffer)(nil)

// guestProbe makes an attack inside the attacker's machine, as root.
func (e *env) guestProbe(ctx context.Context, r probe.Request) (probe.Result, error) {
	s, err := e.attacker(ctx)
	if err != nil {
		return probe.Result{}, err
	}
	return e.probeIn(ctx, s, "root", r)
}

func (e *env) probeIn(ctx context.Context, s *sandbox.Sandbox, user string, r probe.Request) (probe.Result, error) {
	out, err := e.guestRun(ctx, s, sandbox.Cmd{Args: []string{probePath, probe.Name, probe.Line(r)}, User: user})
	var exit *guestExit
	if errors.As(err, &exit) && exit.Signal != 0 && len(out) == 0 {
		// The kernel has answered a system call with the end of who made it.
		return probe.Result{Attack: r.Attack, Outcome: probe.Refused, Detail: exit.Error()}, nil
	}
	if err != nil {
		return probe.Result{}, err
	}
	return oneResult(out)
}

// oneResult reads a probe's only result. One that does not know what came of its
// attack has not tried it.
func oneResult(out []byte) (probe.Result, error) {
	results, err := probe.ParseResults(out, 1)
	if err != nil {
		return probe.Result{}, err
	}
	if results[0].Outcome == probe.Unknown {
		return results[0], errors.New(results[0].Detail)
	}
	return results[0], nil
}

// childProbe makes an attack in a process of this host that nothing holds but the
// test network. Only for attacks that go over it, and for files in e.dir.
func (e *env) childProbe(ctx context.Context, r probe.Request) (probe.Result, error) {
	if e.net == nil && strings.HasPrefix(r.Attack, "net.") {
		return probe.Result{}, e.noNet
	}
	out, err := testnet.Child(ctx, e.opts.Program, probe.Name, probe.Line(r)).Output()
	if err != nil {
		return probe.Result{}, err
	}
	return oneResult(out)
}

// file makes a file of the host's for attacks to try.
func (e *env) file(name, content string) (string, error) {
	path := filepath.Join(e.dir, name)
	return path, os.WriteFile(path, []byte(content), 0o600)
}
