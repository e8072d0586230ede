package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
)

// Where a jail has the attacker and what stands for the image.
const (
	insideProgram = "/ironclaw"
	insideImage   = "/root.img"
)

// cellMemory bounds an attacker's memory, bytes.
const cellMemory = 192 << 20

// cellPercent bounds its processor time, so low that also on a busy host it would get more.
const cellPercent = 10

// maxSaid bounds what is kept of what an attacker says, bytes.
const maxSaid = 1 << 20

// jailCell is a jail as every VMM has it, with this program in the VMM's place.
type jailCell struct {
	opts   jail.Options
	files  []jail.File
	image  string // on the host
	report layer.Report
}

// newJailCell makes a cell of this program. dir is for what it needs on the host.
func newJailCell(ctx context.Context, program, dir string, without layer.Set) (Cell, error) {
	if without.Has(layer.Guard) && Inside() { // it is there for all jails of a namespace
		if err := jail.RemoveGuard(ctx); err != nil {
			return nil, err
		}
	}
	report, errs := jail.Check(ctx, without)
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	image, err := os.CreateTemp(dir, "image-")
	if err != nil {
		return nil, err
	}
	defer image.Close()
	if _, err := image.WriteString("an image that nobody may change\n"); err != nil {
		return nil, err
	}
	if err := image.Chmod(0o644); err != nil {
		return nil, err
	}
	return &jailCell{
		opts:  jail.Options{ID: "verify", CPUs: 1, Percent: cellPercent, Memory: cellMemory, Disk: dir, Without: without},
		image: image.Name(), report: report,
		files: []jail.File{{Host: program, Inside: insideProgram}, {Host: image.Name(), Inside: insideImage}},
	}, nil
}

func (c *jailCell) Facts() CellFacts {
	b := jail.BoundsOf(c.opts)
	f := CellFacts{
		Root: []string{filepath.Base(insideProgram), filepath.Base(insideImage)}, Image: insideImage, Exe: insideProgram,
		Memory: b.Memory, CPU: int64(b.CPUPercent), Pids: int64(b.Threads), Files: int64(b.Files),
	}
	if c.opts.Without.Has(layer.Mounts) {
		f.Image, f.Exe = c.image, c.files[0].Host
	}
	for _, s := range c.report {
		if s.Layer == layer.Cgroup && s.State == layer.Held { // by other bounds
			f.Memory, f.CPU = b.Data, int64(b.Processors*100)
		}
	}
	return f
}

func (c *jailCell) Report() layer.Report { return c.report }

func (c *jailCell) Close() error { return os.Remove(c.image) }

func (c *jailCell) Run(ctx context.Context, r probe.Request) ([]byte, error) {
	j, err := jail.Prepare(ctx, c.opts)
	if err != nil {
		return nil, err
	}
	defer j.Close()
	var out limited
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs, ours := os.NewFile(uintptr(pair[0]), "theirs"), os.NewFile(uintptr(pair[1]), "ours")
	defer ours.Close()
	p, err := j.Start(ctx, jail.Program{
		// Its own link leads there, whoever may enter the directories above.
		Path: j.Path("/proc/self/exe", insideProgram), Args: []string{probe.Name, probe.Line(probe.Request{Attack: probe.Await}, r)},
		Files: c.files, Descriptors: []*os.File{theirs}, Stdout: &out, Stderr: io.Discard,
	})
	theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("put the attacker in a jail: %w", err)
	}
	defer p.Close()
	if _, err := p.Verify(1); err != nil {
		return nil, err
	}
	p.Seal()
	ours.Close() // go on
	select {
	case <-p.Exited():
		return out.b.Bytes(), p.Err()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// limited keeps the beginning of what is written.
type limited struct{ b bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	l.b.Write(p[:min(len(p), maxSaid-l.b.Len())])
	return len(p), nil
}
