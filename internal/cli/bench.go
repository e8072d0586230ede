package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ironclaw-run/ironclaw/internal/bench"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
)

// benchmarks in the order in which they run when none is named.
var benchmarks = []string{"start", "exec", "io"}

func (a *app) benchCommand() *cobra.Command {
	var (
		n      int
		accel  string
		link   string
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "bench [start|exec|io]...",
		Short: "Measure starts, round trips and throughput on this host",
		Long: `Measure on this host: start (a whole ` + "`ironclaw run -- true`" + `, phase by phase),
exec (round trips in a running machine, its memory at rest) and io (256 MiB
through stdout and stdin). All of them if none is named.`,
		Args:      args(cobra.OnlyValidArgs),
		ValidArgs: benchmarks,
		RunE: func(cmd *cobra.Command, which []string) error {
			if n < 1 {
				return &usageError{fmt.Errorf("-n %d: at least 1 is needed", n), "bench "}
			}
			if len(which) == 0 {
				which = benchmarks
			}
			h, err := a.host()
			if err != nil {
				return err
			}
			var tables []*bench.Table
			for _, name := range which {
				a.ui.progress("measuring " + name)
				t, err := measure(cmd.Context(), h, name, n, accel, link)
				a.ui.progress("")
				if err != nil {
					return err
				}
				tables = append(tables, t)
				if !asJSON {
					if err := t.Print(a.stdout); err != nil {
						return err
					}
				}
			}
			if asJSON {
				writeJSON(a.stdout, tables, "  ")
			}
			return nil
		},
	}
	cmd.Flags().IntVarP(&n, "runs", "n", 10, "how often each thing is measured (io: a third of it)")
	cmd.Flags().StringVar(&accel, "accel", "auto", "auto, kvm or tcg")
	cmd.Flags().StringVar(&link, "link", "auto", "auto, vsock or serial")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, with every value")
	return cmd
}

func measure(ctx context.Context, h *sandbox.Host, name string, n int, accel, link string) (*bench.Table, error) {
	opts := sandbox.Options{Accel: accel, Link: link}
	switch name {
	case "exec":
		return bench.Exec(ctx, h, opts, n)
	case "io":
		return bench.Throughput(ctx, h, opts, max(1, n/3))
	}
	return bench.Start(ctx, n, []string{"--accel", accel, "--link", link})
}
