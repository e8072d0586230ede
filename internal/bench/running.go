package bench

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
)

// exec measures round trips in a machine that runs: a ping of the guest agent,
// and a whole command. The reference is the same command on the host.
func (b *Bench) exec(ctx context.Context) (*Table, error) {
	t := &Table{Name: "exec: in a running machine"}
	s, w, err := b.running(ctx, t)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	payload := make([]byte, 64)
	for range b.N {
		w.sample()
		begun := time.Now()
		if err := s.Ping(ctx, payload); err != nil {
			return nil, err
		}
		t.add("ping of the guest agent", "ms", ms(time.Since(begun)))
		w.sample()
		begun = time.Now()
		if err := runOne(ctx, s, sandbox.Cmd{Args: []string{"true"}}); err != nil {
			return nil, err
		}
		t.add("exec true", "ms", ms(time.Since(begun)))
		w.sample()
		v, err := timeHost(ctx, "true")
		if err != nil {
			return nil, err
		}
		t.add("reference: true on the host", "ms", v)
	}
	pss, err := memoryOf(s.Machine().Info().PID)
	if err != nil {
		return nil, err
	}
	t.add("memory of the VMM at rest (Pss)", "MiB", pss)
	size, err := b.Host.InitramfsSize(ctx, s)
	if err != nil {
		return nil, err
	}
	t.add("size of the initramfs", "MiB", float64(size)/(1<<20))
	return t, w.finish()
}

// running makes a sandbox, of a template that was there before, and begins to
// measure in it.
func (b *Bench) running(ctx context.Context, t *Table) (*sandbox.Sandbox, *watch, error) {
	if err := b.warm(ctx, t); err != nil {
		return nil, nil, err
	}
	s, err := b.create(ctx, t)
	if err != nil {
		return nil, nil, err
	}
	w, err := newWatch(t)
	if err != nil {
		s.Close()
		return nil, nil, err
	}
	return s, w, nil
}

// ioBytes is how much throughput moves each way.
const ioBytes = 256 << 20

// throughput measures 256 MiB of output and of input. The reference is the same
// through a pipe of the host.
func (b *Bench) throughput(ctx context.Context) (*Table, error) {
	t := &Table{Name: "io: 256 MiB through stdout and stdin"}
	s, w, err := b.running(ctx, t)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	script := fmt.Sprintf("head -c %d /dev/zero", ioBytes)
	for range max(1, b.N/3) {
		w.sample()
		var count counter
		begun := time.Now()
		if err := runOne(ctx, s, sandbox.Cmd{Args: []string{"sh", "-c", script}, Stdout: &count}); err != nil {
			return nil, err
		}
		t.add("stdout", "MiB/s", rate(begun, int64(count)))
		w.sample()
		begun = time.Now()
		if err := runOne(ctx, s, sandbox.Cmd{Args: []string{"sh", "-c", "cat >/dev/null"}, Stdin: io.LimitReader(zeros{}, ioBytes)}); err != nil {
			return nil, err
		}
		t.add("stdin", "MiB/s", rate(begun, ioBytes))
		w.sample()
		count = 0
		begun = time.Now()
		cmd := exec.CommandContext(ctx, "sh", "-c", script)
		cmd.Stdout = &count
		if err := cmd.Run(); err != nil {
			return nil, err
		}
		t.add("reference: a pipe on the host", "MiB/s", rate(begun, int64(count)))
	}
	return t, w.finish()
}

// counter counts what is written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func rate(begun time.Time, bytes int64) float64 {
	return float64(bytes) / (1 << 20) / time.Since(begun).Seconds()
}
