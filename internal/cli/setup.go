package cli

import (
	"github.com/spf13/cobra"
)

func (a *app) setupCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "setup",
		Short: "Prepare the guest kernel and the base image",
		Long: `Prepare what a first run needs: the distribution's kernel, fetched by its own
package manager, and the image "base". What is there already stays. Interrupted
at any moment it leaves nothing broken; run it again.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			return h.Setup(cmd.Context(), a.ui.progress)
		},
	}
}
