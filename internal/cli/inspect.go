package cli

import (
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/state"
)

func (a *app) psCommand() *cobra.Command {
	var asJSON, quiet bool
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List the sandboxes that are running",
		Long: `List the sandboxes that are running, oldest first, with the layers of isolation that
somebody chose to go without.`,
		Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			list, err := h.List()
			if err != nil {
				return err
			}
			switch {
			case asJSON:
				if list == nil {
					list = []state.Record{}
				}
				writeJSON(a.stdout, list, "  ")
			case quiet:
				for _, r := range list {
					fmt.Fprintln(a.stdout, r.ID)
				}
			default:
				return a.printSandboxes(list)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "only the ids")
	return cmd
}

func (a *app) printSandboxes(list []state.Record) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "ID\tNAME\tIMAGE\tCOMMAND\tCREATED\tPID\tWITHOUT")
	for _, r := range list {
		created := ""
		if !r.Created.IsZero() {
			created = units.HumanDuration(time.Since(r.Created)) + " ago"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\n", r.ID, r.Name, r.Image, shortCommand(r.Command), created, r.Owner.PID, layers(r.Without))
	}
	return w.Flush()
}

// shortCommand shows a command in a column: quoted, for it may hold anything.
func shortCommand(words []string) string {
	return fmt.Sprintf("%.32q", strings.ToValidUTF8(strings.Join(words, " "), "?"))
}

func layers(names []layer.Name) string {
	words := make([]string, len(names))
	for i, n := range names {
		words[i] = string(n)
	}
	return strings.Join(words, ",")
}

const inspectLong = `Show what is known of a running sandbox: by its id, its name, or the beginning of its id.

"layers" says of each layer of isolation around the VMM how it stands, as the kernel told it
before the guest ran: "on"; "held", with what holds the same bound; "absent", if this host's kernel
does not have it; or "off", if somebody chose to go without. "guest" is what the guest says of
itself: which system calls it has refused, and how the commands that run are confined. Believe it as
far as you believe the guest.

With --seccomp only the refused system calls are shown, a line each.`

func (a *app) inspectCommand() *cobra.Command {
	var denials bool
	cmd := &cobra.Command{
		Use:   "inspect SANDBOX",
		Short: "Show what is known of a running sandbox, and how it is isolated",
		Long:  inspectLong,
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, argv []string) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			r, err := h.Find(argv[0])
			if errors.Is(err, state.ErrNotFound) {
				return &noSandboxError{err}
			}
			if err != nil {
				return err
			}
			guest, err := h.Inspect(cmd.Context(), r.ID)
			switch {
			case denials && err != nil:
				return err
			case denials:
				a.printDenials(guest)
				return nil
			}
			described := struct {
				state.Record
				Guest      *sandbox.Inspection `json:"guest,omitempty"`
				GuestError string              `json:"guestError,omitempty"`
			}{Record: r, Guest: guest}
			if err != nil { // it is starting, or ending
				described.GuestError = err.Error()
			}
			writeJSON(a.stdout, described, "  ")
			return nil
		},
	}
	cmd.Flags().BoolVar(&denials, "seccomp", false, "only the system calls that were refused")
	return cmd
}

func (a *app) printDenials(i *sandbox.Inspection) {
	for _, d := range i.Denials {
		fmt.Fprintf(a.stdout, "%s %s\n", d.Last.Local().Format(time.TimeOnly), d)
	}
	if i.Dropped > 0 {
		fmt.Fprintf(a.stdout, "and %d more that the guest did not keep\n", i.Dropped)
	}
}

type noSandboxError struct{ error }

func (e *noSandboxError) Unwrap() error { return e.error }

// Hint is the remedy.
func (*noSandboxError) Hint() string { return "ironclaw ps lists those that run" }
