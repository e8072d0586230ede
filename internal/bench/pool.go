package bench

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
)

const (
	poolSize    = 4
	fillTimeout = 5 * time.Minute // four boots on a host that is busy
)

// pool measures how soon a process that keeps sandboxes ready has the first
// output of a command, with all of them ready and nothing else going on: from a
// pool whose sandboxes have run that command before, and from one where they have
// run another. The reference is the same command on the host.
func (b *Bench) pool(ctx context.Context) (*Table, error) {
	t := &Table{Name: fmt.Sprintf("pool: of %d, each used once; Get to the first output of echo x", poolSize)}
	if err := b.warm(ctx, t); err != nil {
		return nil, err
	}
	w, err := newWatch(t)
	if err != nil {
		return nil, err
	}
	for _, warm := range []string{"echo", "true"} {
		if err := b.poolRounds(ctx, t, w, warm); err != nil {
			return nil, err
		}
	}
	return t, w.finish()
}

// poolRounds uses N sandboxes of a pool which have all run the command warm.
func (b *Bench) poolRounds(ctx context.Context, t *Table, w *watch, warm string) (err error) {
	failed := make(chan error, 1) // the first
	opts := sandbox.PoolOptions{Sandbox: b.Sandbox, Size: poolSize, Warm: [][]string{{warm}}, OnError: func(err error) {
		select {
		case failed <- err:
		default:
		}
	}}
	p, err := b.Host.NewPool(opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	for range b.N {
		if err := filled(ctx, p, failed); err != nil {
			return err
		}
		w.sample()
		if err := poolRound(ctx, t, p, "warmed up with "+warm); err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, "echo", "x")
		var first first
		cmd.Stdout = &first
		begun := time.Now()
		if err := cmd.Run(); err != nil {
			return err
		}
		t.add("reference: on the host", "ms", ms(first.at.Sub(begun)))
	}
	return nil
}

func poolRound(ctx context.Context, t *Table, p *sandbox.Pool, row string) error {
	begun := time.Now()
	s, err := p.Get(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	got := time.Since(begun)
	var first first
	proc, err := s.Start(ctx, sandbox.Cmd{Args: []string{"echo", "x"}, User: guestrpc.DefaultUser, Stdout: &first})
	if err != nil {
		return err
	}
	started := time.Since(begun)
	exit, err := proc.Wait(ctx)
	switch {
	case err != nil:
		return err
	case exit.Code != 0 || first.at.IsZero():
		return fmt.Errorf("echo ended with code %d, signal %d", exit.Code, exit.Signal)
	}
	t.add(row, "ms", ms(first.at.Sub(begun)))
	t.addTo(row, "Get", "ms", ms(got))
	t.addTo(row, "started", "ms", ms(started))
	return nil
}

// filled waits until the pool is full and rests. It tells nobody when that is, so
// it is asked; nothing is measured meanwhile.
func filled(ctx context.Context, p *sandbox.Pool, failed <-chan error) error {
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	late := time.NewTimer(fillTimeout)
	defer late.Stop()
	for {
		st := p.Stats()
		if st.Ready >= poolSize && st.Making == 0 {
			return nil
		}
		select {
		case <-again.C:
		case err := <-failed:
			return fmt.Errorf("fill the pool: %w", err)
		case <-late.C:
			return fmt.Errorf("fill the pool: %d of %d are ready after %v", st.Ready, poolSize, fillTimeout)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// first notes when something is first written to it.
type first struct{ at time.Time }

func (f *first) Write(p []byte) (int, error) {
	if f.at.IsZero() {
		f.at = time.Now()
	}
	return len(p), nil
}
