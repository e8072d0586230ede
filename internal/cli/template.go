package cli

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/ironclaw-run/ironclaw/internal/template"
)

// limitEnv sets how much disk all templates may take together.
const limitEnv = "IRONCLAW_TEMPLATE_LIMIT"

const templateLong = `A template is a machine that was booted once, up to where it waits for its first
command, and saved. Every later run of the same kernel, image, memory, number of
processors, QEMU, accelerator and link starts from it in a fraction of the time.
Nothing of any user's is in it: each machine gets its own random numbers, clock,
ids and names before anything runs.

Templates are made by ` + "`ironclaw run`" + ` and used only if everything they depend on is
exactly the same. Those used longest ago are removed when all of them take more
than 4 GiB of disk, or what ` + limitEnv + ` says (such as 1G).`

func (a *app) templateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "template",
		Short: "List and remove the saved machines that runs start from",
		Long:  templateLong,
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.templateList(), a.templateRemove(), a.templatePrune())
	return cmd
}

// templateInfo is what ls says of a template.
type templateInfo struct {
	ID      string            `json:"id"`
	Size    int64             `json:"size"` // on disk, bytes
	Created time.Time         `json:"created"`
	Used    time.Time         `json:"used"`
	Inputs  map[string]string `json:"inputs"`
	Damaged string            `json:"damaged,omitempty"`
}

func (a *app) templateList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the templates, last used first",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			list, err := h.Templates.List(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				infos := []templateInfo{}
				for _, t := range list {
					infos = append(infos, templateInfo{t.ID, t.DiskSize, t.Created, t.Used, t.Inputs, t.Damaged})
				}
				writeJSON(a.stdout, infos, "  ")
				return nil
			}
			w := tabwriter.NewWriter(a.stdout, 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "ID\tMACHINE\tIMAGE\tSIZE\tCREATED\tUSED")
			for _, t := range list {
				fmt.Fprintf(w, "%.12s\t%s\t%.19s\t%s\t%s\t%s\n", t.ID, describeTemplate(t), t.Inputs["image"],
					units.HumanSize(float64(t.DiskSize)), t.Created.Local().Format(time.DateTime), t.Used.Local().Format(time.DateTime))
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, with everything a template depends on")
	return cmd
}

func describeTemplate(t *template.Template) string {
	if t.Damaged != "" {
		return "damaged"
	}
	return t.Inputs["machine"]
}

func (a *app) templateRemove() *cobra.Command {
	return &cobra.Command{
		Use:   "rm ID...",
		Short: "Remove templates; machines that were started from them go on",
		Args:  args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, argv []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			for _, id := range argv {
				if _, err := h.Templates.Remove(cmd.Context(), id); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func (a *app) templatePrune() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove damaged and unfinished templates, and those beyond the limit",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			removed, freed, err := h.Templates.Prune(cmd.Context(), all)
			for _, id := range removed {
				fmt.Fprintln(a.stdout, id)
			}
			if err != nil {
				return err
			}
			a.ui.note("%d templates removed, %s freed", len(removed), units.HumanSize(float64(freed)))
			return nil
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "all templates")
	return cmd
}
