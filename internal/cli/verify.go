package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/verify"
)

const verifyLong = `Make sandboxes and attack them, to see on this host that what holds them holds:

  guest  from inside a machine, as root: the network, the disk, other sandboxes, and
         all of its resources at once, while a neighbour and the host stay usable
  link   a hostile agent, which breaks the protocol in every way, on both kinds of link
  jail   a program in the VMM's place
  host   what outlives a sandbox

Wherever that does no harm each attack is also made without what stops it, and has to
work then: -v shows what came of that. Nothing is sent to a real network: attacks run
in a network namespace of their own, with servers made for them.

Exit code 0 if every attack was held, 1 if one worked, 125 if one could not be tried.`

type verifyFlags struct {
	groups  []string
	json    bool
	verbose bool
	list    bool
	without []string
}

func (a *app) verifyCommand() *cobra.Command {
	var f verifyFlags
	var opts verify.Options
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Attack sandboxes on this host, and see that they hold",
		Long:  verifyLong,
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if opts.Groups, err = verifyGroups(f.groups); err != nil {
				return &usageError{err, "verify "}
			}
			if opts.Sandbox.Without, err = layer.ParseSet(f.without); err != nil {
				return &usageError{fmt.Errorf("--without: %w", err), "verify "}
			}
			if f.list {
				return a.listAttacks(opts)
			}
			return a.verify(cmd.Context(), f, opts)
		},
	}
	fl := cmd.Flags()
	fl.StringSliceVar(&f.groups, "group", nil, "guest, link, jail or host (default: all)")
	fl.StringVar(&opts.Only, "only", "", "only attacks that have this text in their names")
	fl.BoolVar(&f.json, "json", false, "as JSON")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "show each attack without what stops it, too, and whole texts")
	fl.BoolVar(&f.list, "list", false, "list the attacks and make none")
	fl.StringSliceVar(&f.without, "without", nil, "attack sandboxes that go without this layer of isolation")
	fl.StringVar(&opts.Sandbox.Accel, "accel", "auto", "auto, kvm or tcg")
	fl.StringVar(&opts.Sandbox.Link, "link", "auto", "auto, vsock or serial")
	return cmd
}

func verifyGroups(names []string) ([]verify.Group, error) {
	var groups []verify.Group
	for _, g := range verify.Groups() {
		for _, name := range names {
			if name == string(g) {
				groups = append(groups, g)
				break
			}
		}
	}
	for _, name := range names {
		if len(verify.List(verify.Group(name))) == 0 {
			return nil, fmt.Errorf("no group is called %q: there are guest, link, jail and host", name)
		}
	}
	return groups, nil
}

func (a *app) listAttacks(opts verify.Options) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	for _, at := range opts.Attacks() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", at.Group, at.Layer, at.Name, at.Expected)
	}
	return w.Flush()
}

// prefetch has what machines need installed, if it is not.
func (a *app) prefetch(ctx context.Context, h *sandbox.Host) error {
	defer a.ui.progress("")
	if _, err := h.Kernel(ctx, "", "", a.ui.progress); err != nil {
		return err
	}
	_, err := h.Image(ctx, sandbox.DefaultImage, a.ui.progress)
	return err
}

// verify runs itself once more in a network made for it, or makes the attacks.
func (a *app) verify(ctx context.Context, f verifyFlags, opts verify.Options) error {
	var err error
	if opts.Host, err = a.host(); err != nil {
		return err
	}
	if opts.Program, err = os.Executable(); err != nil {
		return err
	}
	opts.Progress = a.ui.progress
	opts.Layers = func(s *sandbox.Sandbox) layer.Report { return s.Machine().Info().Layers }
	if !verify.Inside() {
		// Fetched here: inside there is no network.
		if err := a.prefetch(ctx, opts.Host); err != nil {
			return err
		}
		code, err := verify.Enter(ctx, opts.Program, os.Args[0], os.Args[1:]...)
		var none *verify.NoNetworkError
		if !errors.As(err, &none) {
			a.code = code
			if err != nil && ctx.Err() != nil {
				return &saidError{err} // by the one inside
			}
			return err
		}
		opts.NoNetwork = none
	}
	report, err := verify.Run(ctx, opts)
	a.ui.progress("")
	if report != nil {
		if f.json {
			writeJSON(a.stdout, report, "  ")
		} else {
			err = errors.Join(err, report.Print(a.stdout, f.verbose))
		}
	}
	if err != nil {
		return err
	}
	err = report.Err()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, verify.ErrWorked):
		a.code = 1
		a.ui.line("error: ", err.Error())
		return nil
	case opts.NoNetwork != nil:
		return opts.NoNetwork // which tells the remedy
	}
	return err
}
