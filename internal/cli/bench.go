package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ironclaw-run/ironclaw/internal/bench"
)

const benchLong = `Measure on this host:

  start    whole processes: ` + "`ironclaw run -- true`" + `, phase by phase; the first output
           after the VMM's start; cold boots (a third as many); 16 at once; beside
           them runsc (gVisor), if root has it
  exec     round trips in a running machine, its memory at rest
  io       256 MiB through stdout and stdin, a third as often
  pool     from asking a pool of 4 to the first output
  density  idle machines at once: their starts, memory and CPU
  cycles   made, used and destroyed in one process, and what that leaves behind;
           best with an IRONCLAW_HOME that nobody else uses

Unless some are named: start, exec, io and pool. Things to compare are measured in
turn, after one of each that does not count.

A table prints no medians, only the least values, if the machine was busy with
something else: if fixed arithmetic, timed before each sample, took more than 1.75
times its least time at the 90th percentile; if the hypervisor took more than 5 %
of the CPU time; or if processes that are not ours used more than 25 % of the CPUs.
--json has every value all the same, and why the table is noisy.`

func (a *app) benchCommand() *cobra.Command {
	var (
		b      bench.Bench
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:       "bench [" + strings.Join(bench.Names(), "|") + "]...",
		Short:     "Measure starts, round trips, throughput and density on this host",
		Long:      benchLong,
		Args:      args(cobra.OnlyValidArgs),
		ValidArgs: bench.Names(),
		RunE: func(cmd *cobra.Command, which []string) error {
			if cmd.Flags().Changed("runs") && b.N < 1 {
				return &usageError{fmt.Errorf("-n %d: at least 1 is needed", b.N), "bench "}
			}
			if len(which) == 0 {
				which = bench.Usual()
			}
			return a.bench(cmd.Context(), b, which, asJSON)
		},
	}
	fl := cmd.Flags()
	fl.IntVarP(&b.N, "runs", "n", 0, "how often each thing is measured (default 10; density: machines at once, 50; cycles: 200)")
	fl.StringVar(&b.Sandbox.Accel, "accel", "auto", "auto, kvm or tcg")
	fl.StringVar(&b.Sandbox.Link, "link", "auto", "auto, vsock or serial")
	fl.BoolVar(&asJSON, "json", false, "as JSON, with every value")
	return cmd
}

// bench measures and prints. What was measured is shown also if it tells of a
// fault.
func (a *app) bench(ctx context.Context, b bench.Bench, which []string, asJSON bool) error {
	var err error
	if b.Host, err = a.host(); err != nil {
		return err
	}
	if b.Program, err = os.Executable(); err != nil {
		return err
	}
	tables := []*bench.Table{}
	for _, name := range which {
		var t *bench.Table
		a.ui.progress("measuring " + name)
		t, err = b.Run(ctx, name)
		a.ui.progress("")
		if t != nil {
			tables = append(tables, t)
			if !asJSON {
				err = errors.Join(err, t.Print(a.stdout))
			}
		}
		if err != nil {
			err = fmt.Errorf("bench %s: %w", name, err)
			break
		}
	}
	if asJSON && len(tables) > 0 {
		writeJSON(a.stdout, tables, "  ")
	}
	return err
}
