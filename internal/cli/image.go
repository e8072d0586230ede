package cli

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/ironclaw-run/ironclaw/internal/image"
)

func (a *app) imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Make, list and remove images",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.imageList(), a.imageBuild(), a.imageInspect(), a.imageRemove())
	return cmd
}

func (a *app) imageList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the images",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			images, err := h.Images.List(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				if images == nil {
					images = []*image.Image{}
				}
				writeJSON(a.stdout, images, "  ")
				return nil
			}
			w := tabwriter.NewWriter(a.stdout, 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "NAME\tDIGEST\tSIZE\tCREATED\tPACKAGES")
			for _, img := range images {
				fmt.Fprintf(w, "%s\t%.19s\t%s\t%s\t%d\n", img.Name, img.Digest, units.HumanSize(float64(img.Size)),
					img.Created.Local().Format(time.DateTime), len(img.Packages))
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func (a *app) imageBuild() *cobra.Command {
	return &cobra.Command{
		Use:   "build NAME [PACKAGE...]",
		Short: "Build an image from packages of the distribution",
		Long: `Build an image: a minimal system of the host's own distribution and release with
the packages named, or those of "base" if none are. The image gets the name; one
that had it before keeps running where it runs and is then gone.`,
		Example: "  ironclaw image build base\n  ironclaw image build cc gcc libc6-dev make",
		Args:    args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, argv []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			img, err := h.BuildImage(cmd.Context(), image.BuildOptions{
				Name: argv[0], Packages: argv[1:], Progress: a.ui.progress,
			})
			if err != nil {
				return err
			}
			a.ui.progress("")
			fmt.Fprintln(a.stdout, img.Digest)
			return nil
		},
	}
}

func (a *app) imageInspect() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect NAME|DIGEST",
		Short: "Show what is known of an image, as JSON",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, argv []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			img, err := h.Images.Get(cmd.Context(), argv[0])
			if err != nil {
				return err
			}
			writeJSON(a.stdout, img, "  ")
			return nil
		},
	}
}

func (a *app) imageRemove() *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME|DIGEST...",
		Short: "Remove images that no sandbox uses",
		Args:  args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, argv []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			for _, ref := range argv {
				if err := h.Images.Remove(cmd.Context(), ref); err != nil {
					return err
				}
			}
			return nil
		},
	}
}
