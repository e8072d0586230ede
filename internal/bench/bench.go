// Package bench measures what a user of IronClaw waits for. It prints
// distributions, never verdicts, with the host they were measured on and beside
// each a reference from the same run.
package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/vm/qemu"
)

// Row is one measured thing.
type Row struct {
	Name   string    `json:"name"`
	Unit   string    `json:"unit"`
	Values []float64 `json:"values"` // as measured, in order
}

// Quantile is the value below which the part q of the values lies.
func (r *Row) Quantile(q float64) float64 {
	if len(r.Values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(r.Values))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// Table is what one benchmark measured.
type Table struct {
	Name string `json:"name"`
	Host string `json:"host"`
	Rows []*Row `json:"rows"`
}

func (t *Table) row(name, unit string) *Row {
	for _, r := range t.Rows {
		if r.Name == name {
			return r
		}
	}
	r := &Row{Name: name, Unit: unit}
	t.Rows = append(t.Rows, r)
	return r
}

func (t *Table) add(name, unit string, v float64) {
	r := t.row(name, unit)
	r.Values = append(r.Values, v)
}

// Print writes the table for people.
func (t *Table) Print(w io.Writer) error {
	fmt.Fprintf(w, "%s (%s)\n", t.Name, t.Host)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "\tmin\tp50\tp90\tn\tunit\t")
	width := 0
	for _, r := range t.Rows {
		width = max(width, utf8.RuneCountInString(r.Name))
	}
	for _, r := range t.Rows {
		// Padded by hand: the figures align to the right, the names to the left.
		fmt.Fprintf(tw, "%-*s\t%s\t%s\t%s\t%d\t%s\t\n", width, r.Name,
			number(r.Quantile(0)), number(r.Quantile(0.5)), number(r.Quantile(0.9)), len(r.Values), r.Unit)
	}
	return tw.Flush()
}

func number(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// hostFacts describes the host in a few words.
func hostFacts() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	facts := "Linux " + unix.ByteSliceToString(u.Release[:])
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				facts += ", " + strings.TrimSpace(v)
				break
			}
		}
	}
	var set unix.CPUSet
	if unix.SchedGetaffinity(0, &set) == nil {
		facts += fmt.Sprintf(", %d cpus", set.Count())
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		load, _, _ := strings.Cut(string(b), " ")
		facts += ", load " + load
	}
	return facts
}

// Start measures `ironclaw run -- true` as a whole process, n times, and its
// phases as it reports them. The reference is the start of QEMU to print its
// version.
func Start(ctx context.Context, n int, flags []string) (*Table, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	t := &Table{Name: "start: ironclaw run -- true", Host: hostFacts()}
	argv := append(append([]string{"run", "--json"}, flags...), "--", "true")
	for range n {
		var stderr bytes.Buffer
		cmd := exec.CommandContext(ctx, self, argv...)
		cmd.Stderr = &stderr
		begun := time.Now()
		err := cmd.Run()
		wall := ms(time.Since(begun))
		if err != nil {
			return nil, fmt.Errorf("run: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		}
		if err := t.addRun(stderr.Bytes(), wall); err != nil {
			return nil, err
		}
		begun = time.Now()
		if err := exec.CommandContext(ctx, qemu.Program, "--version").Run(); err != nil {
			return nil, fmt.Errorf("run QEMU: %w", err)
		}
		t.add("reference: "+qemu.Program+" --version", "ms", ms(time.Since(begun)))
	}
	return t, nil
}

// addRun adds the figures of one run from the JSON line that it printed last.
func (t *Table) addRun(stderr []byte, wall float64) error {
	lines := bytes.Split(bytes.TrimSpace(stderr), []byte("\n"))
	var res struct {
		Timings map[string]float64 `json:"timings_ms"`
		Guest   map[string]float64 `json:"guest_ms"`
	}
	if err := json.Unmarshal(lines[len(lines)-1], &res); err != nil {
		return fmt.Errorf("read the timings of run: %w", err)
	}
	// Gathered first: what was not reported was not measured, and is no zero.
	run := &Table{}
	run.add("whole process", "ms", wall)
	var missing []string
	add := func(name string, from map[string]float64, key string) {
		v, ok := from[key]
		if !ok {
			missing = append(missing, key)
		}
		run.add(name, "ms", v)
	}
	for _, phase := range []string{"reserve", "image", "kernel", "driver", "vmm", "boot", "start", "command", "close"} {
		add("  "+phase, res.Timings, phase)
		if phase == "boot" {
			for _, mark := range []string{"init", "modules", "root", "agent", "hello"} {
				add("    guest: "+mark, res.Guest, mark)
			}
		}
	}
	if missing != nil {
		return fmt.Errorf("read the timings of run: it reported no %s", strings.Join(missing, ", "))
	}
	for _, r := range run.Rows {
		t.add(r.Name, r.Unit, r.Values[0])
	}
	return nil
}

// Exec measures round trips in a machine that runs: a ping of the guest agent,
// and a whole command. The reference is the same command on the host.
func Exec(ctx context.Context, h *sandbox.Host, opts sandbox.Options, n int) (*Table, error) {
	s, err := h.Create(ctx, opts)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	t := &Table{Name: "exec: in a running machine", Host: hostFacts()}
	payload := make([]byte, 64)
	for range n {
		begun := time.Now()
		if err := s.Ping(ctx, payload); err != nil {
			return nil, err
		}
		t.add("ping of the guest agent", "ms", ms(time.Since(begun)))
		begun = time.Now()
		if err := runOne(ctx, s, sandbox.Cmd{Args: []string{"true"}}); err != nil {
			return nil, err
		}
		t.add("exec true", "ms", ms(time.Since(begun)))
		begun = time.Now()
		if err := exec.CommandContext(ctx, "true").Run(); err != nil {
			return nil, err
		}
		t.add("reference: true on the host", "ms", ms(time.Since(begun)))
	}
	pss, err := memoryOf(s.Machine().Info().PID)
	if err != nil {
		return nil, err
	}
	t.add("memory of the VMM at rest (Pss)", "MiB", pss)
	size, err := h.InitramfsSize(ctx, s)
	if err != nil {
		return nil, err
	}
	t.add("size of the initramfs", "MiB", float64(size)/(1<<20))
	return t, nil
}

// ioBytes is how much Throughput moves each way.
const ioBytes = 256 << 20

// Throughput measures 256 MiB of output and of input. The reference is the same
// through a pipe of the host.
func Throughput(ctx context.Context, h *sandbox.Host, opts sandbox.Options, n int) (*Table, error) {
	s, err := h.Create(ctx, opts)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	t := &Table{Name: "io: 256 MiB through stdout and stdin", Host: hostFacts()}
	script := fmt.Sprintf("head -c %d /dev/zero", ioBytes)
	for range n {
		var count counter
		begun := time.Now()
		if err := runOne(ctx, s, sandbox.Cmd{Args: []string{"sh", "-c", script}, Stdout: &count}); err != nil {
			return nil, err
		}
		t.add("stdout", "MiB/s", rate(begun, int64(count)))
		begun = time.Now()
		if err := runOne(ctx, s, sandbox.Cmd{Args: []string{"sh", "-c", "cat >/dev/null"}, Stdin: io.LimitReader(zeros{}, ioBytes)}); err != nil {
			return nil, err
		}
		t.add("stdin", "MiB/s", rate(begun, ioBytes))
		count = 0
		begun = time.Now()
		cmd := exec.CommandContext(ctx, "sh", "-c", script)
		cmd.Stdout = &count
		if err := cmd.Run(); err != nil {
			return nil, err
		}
		t.add("reference: a pipe on the host", "MiB/s", rate(begun, int64(count)))
	}
	return t, nil
}

func runOne(ctx context.Context, s *sandbox.Sandbox, cmd sandbox.Cmd) error {
	cmd.User = guestrpc.DefaultUser
	p, err := s.Start(ctx, cmd)
	if err != nil {
		return err
	}
	exit, err := p.Wait(ctx)
	if err == nil && (exit.Code != 0 || exit.Signal != 0) {
		err = fmt.Errorf("%v ended with code %d, signal %d", cmd.Args, exit.Code, exit.Signal)
	}
	return err
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

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// memoryOf is a process's proportional share of memory, in MiB.
func memoryOf(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, fmt.Errorf("read memory of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pss:"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("read memory of process %d: no Pss", pid)
}
