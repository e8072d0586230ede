package cli

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/ironclaw-run/ironclaw/internal/doctor"
)

func (a *app) doctorCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check this host and say what is missing",
		Long: `Check each thing that IronClaw needs: "ok", "limited" (it works, and would be
better with it) or "missing", with the command that mends it. Exit code 0 if
nothing is missing, 1 otherwise.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			checks := doctor.Examine(cmd.Context(), h, a.ui.progress)
			a.ui.progress("")
			if !doctor.Healthy(checks) {
				a.code = 1
			}
			if asJSON {
				writeJSON(a.stdout, struct {
					Healthy bool           `json:"healthy"`
					Checks  []doctor.Check `json:"checks"`
				}{doctor.Healthy(checks), checks}, "  ")
				return cmd.Context().Err()
			}
			w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
			for _, c := range checks {
				fmt.Fprintf(w, "%s\t%s\t%s\n", c.Status, c.Name, c.Detail)
				if c.Remedy != "" {
					fmt.Fprintf(w, "\t\t-> %s\n", c.Remedy)
				}
			}
			if err := w.Flush(); err != nil {
				return err
			}
			return cmd.Context().Err()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}
