package verify

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
)

// neighbourAttacks look for one sandbox in another. Both are started from the same
// template, so that they share what can be shared.
func neighbourAttacks() []Attack {
	token := rand.Text()
	places := []string{"/tmp/token", "/var/tmp/token", "/dev/shm/token", "/run/token", "/token"}
	patterns := []string{"/tmp/*", "/var/tmp/tok*", "/dev/shm/*", "/run/tok*", "/tok*"}
	plant := func(ctx context.Context, e *env) error {
		res, err := e.guestProbe(ctx, probe.Request{Attack: "file.plant", Args: append([]string{token}, places...)})
		if err == nil && res.Outcome != probe.Worked {
			err = errors.New(res.Detail)
		}
		if err != nil {
			return fmt.Errorf("write files in a sandbox: %w", err)
		}
		return nil
	}
	look := func(in func(*env, context.Context) (*sandbox.Sandbox, error)) attackFunc {
		return func(ctx context.Context, e *env) (Finding, error) {
			if err := plant(ctx, e); err != nil {
				return Finding{}, err
			}
			s, err := in(e, ctx)
			if err != nil {
				return Finding{}, err
			}
			res, err := e.probeIn(ctx, s, "root", probe.Request{Attack: "file.has", Args: append([]string{token}, patterns...)})
			return Finding{res.Detail, res.Outcome == probe.Worked}, err
		}
	}
	return []Attack{{
		Group: Guest, Layer: Machine, Name: "find files of another sandbox", Expected: "not there",
		run: look((*env).neighbour), control: look((*env).attacker),
	}, {
		Group: Guest, Layer: Machine, Name: "connect to a server in another sandbox", Expected: "no address leads there",
		run: connectFrom((*env).attacker), control: connectFrom((*env).neighbour),
	}}
}

// connectFrom has a server in the neighbour, on all addresses that it has, and
// connects to it from one of the two, at all that it could have.
func connectFrom(from func(*env, context.Context) (*sandbox.Sandbox, error)) attackFunc {
	return func(ctx context.Context, e *env) (Finding, error) {
		neighbour, err := e.neighbour(ctx)
		if err != nil {
			return Finding{}, err
		}
		s, err := from(e, ctx)
		if err != nil {
			return Finding{}, err
		}
		const port = "7077"
		r, w := io.Pipe()
		defer r.Close() // what it says later goes nowhere
		p, err := neighbour.Start(ctx, sandbox.Cmd{
			Args:   []string{probePath, probe.Name, probe.Line(probe.Request{Attack: "net.serve", Args: []string{":" + port, "15000"}})},
			Stdout: w, KillAll: true,
		})
		if err != nil {
			return Finding{}, err
		}
		defer p.Close()
		stop := context.AfterFunc(ctx, func() { r.Close() })
		defer stop()
		up := make([]byte, 3)
		if _, err := io.ReadFull(r, up); err != nil || string(up) != "up\n" {
			return Finding{}, fmt.Errorf("start a server in a neighbour: %q, %w", up, err)
		}
		args := []string{"127.0.0.1:" + port, "[::1]:" + port, neighbour.ID() + ":" + port, "10.0.2.15:" + port, "10.213.7.1:" + port}
		res, err := e.probeIn(ctx, s, "root", probe.Request{Attack: "net.tcp", Args: args})
		return Finding{res.Detail, res.Outcome == probe.Worked}, err
	}
}

// imageAttack looks at the image after all that was done to it.
func imageAttack() []Attack {
	return []Attack{{
		Group: Guest, Layer: Machine, Name: "change the image by any of these", Expected: "its checksum is what it was",
		run: func(ctx context.Context, e *env) (Finding, error) {
			s, err := e.attacker(ctx)
			if err != nil {
				return Finding{}, err
			}
			sum, err := fileSum(ctx, s.Image().Path)
			if err != nil {
				return Finding{}, err
			}
			if sum != e.imageSum {
				return Finding{"the image has changed", true}, nil
			}
			return Finding{"SHA-256 " + sum[:12] + "…, as before the first attack", false}, nil
		},
		control: func(ctx context.Context, e *env) (Finding, error) {
			path, err := e.file("image", "before")
			if err != nil {
				return Finding{}, err
			}
			before, err1 := fileSum(ctx, path)
			_, err2 := e.file("image", "after")
			after, err3 := fileSum(ctx, path)
			return Finding{"a change of another file is seen", before != after}, errors.Join(err1, err2, err3)
		},
	}}
}

func fileSum(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	for b := make([]byte, 4<<20); ; {
		n, err := f.Read(b)
		h.Write(b[:n])
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return "", err
		}
	}
}
