package sandbox

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/pool"
)

// Pool holds sandboxes made ahead, each for one who asks (see package pool).
type Pool = pool.Pool[*Sandbox]

// PoolOptions say what a pool holds.
type PoolOptions struct {
	Sandbox Options // of each; Name must be empty
	Size    int     // sandboxes kept ready, 1 to pool.MaxSize
	CPU     float64 // processors that refilling may take on average; 0 means 1
	// Warm are commands that each sandbox runs, twice, before it is handed out, as
	// the agent's user. nil means one that does nothing.
	Warm [][]string
	// OnError is told why a sandbox was not made or was thrown away; nil for
	// nobody. It is called by several goroutines.
	OnError func(error)
}

// NewPool makes a pool and begins to fill it. A machine that is emulated translates
// code when it is first executed: a command that has run before, or one like it,
// starts in a tenth of the time. So each sandbox has run something.
func (h *Host) NewPool(opts PoolOptions) (*Pool, error) {
	if opts.Sandbox.Name != "" {
		return nil, errors.New("the sandboxes of a pool cannot all have one name")
	}
	warm := opts.Warm
	if warm == nil {
		warm = [][]string{{"true"}}
	}
	return pool.New(pool.Options[*Sandbox]{
		Size: opts.Size, CPU: opts.CPU, OnError: opts.OnError,
		Make: func(ctx context.Context) (*Sandbox, error) { return h.createWarm(ctx, opts.Sandbox, warm) },
	})
}

func (h *Host) createWarm(ctx context.Context, opts Options, warm [][]string) (*Sandbox, error) {
	s, err := h.Create(ctx, opts)
	if err != nil {
		return nil, err
	}
	// Twice: what a command leaves to the next one is code that runs, too.
	for _, args := range slices.Repeat(warm, 2) {
		p, err := s.Start(ctx, Cmd{Args: args})
		if errors.Is(err, guestrpc.ErrNotFound) { // an image without it is as good
			continue
		}
		if err == nil {
			_, err = p.Wait(ctx)
		}
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("warm up with %q: %w", args[0], err)
		}
	}
	return s, nil
}

var _ pool.Member = (*Sandbox)(nil)

// Done is closed when the machine has ended.
func (s *Sandbox) Done() <-chan struct{} { return s.machine.Done() }

// Check reports whether the guest agent answers.
func (s *Sandbox) Check(ctx context.Context) error { return s.Ping(ctx, []byte("alive?")) }
