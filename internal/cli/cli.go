// Package cli is what people type: one file per verb, and ui.go with the rules
// of what they see. It decides nothing about machines; package sandbox does.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
)

// app is one invocation of the program.
type app struct {
	stdin  *os.File
	stdout io.Writer
	ui     *ui
	code   int // exit code of a verb that ended without an error of ours
}

// Main runs the program and returns its exit code. Signals that end a program
// cancel the context of every verb; run takes them over while its command runs.
func Main(args []string, stdin *os.File, stdout, stderr io.Writer) int {
	a := &app{stdin: stdin, stdout: stdout, ui: newUI(stderr)}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)

	// A reader of our output that goes away is the command's business.
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)
	go func() {
		select {
		case s := <-signals:
			cancel(&interruptedError{s.(syscall.Signal)})
		case <-ctx.Done():
		}
	}()

	root := a.root(signals)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	a.ui.progress("")
	if err == nil {
		return a.code
	}
	var interrupted *interruptedError
	if cause := context.Cause(ctx); errors.As(cause, &interrupted) && !errors.As(err, &interrupted) {
		err = cause
	}
	var said *saidError
	if !errors.As(err, &said) {
		a.ui.failure(err)
	}
	return exitCode(err)
}

// saidError has been shown already.
type saidError struct{ error }

func (e *saidError) Unwrap() error { return e.error }

func (a *app) root(signals chan os.Signal) *cobra.Command {
	root := &cobra.Command{
		Use:           "ironclaw",
		Short:         "Run the work of AI agents in disposable micro-VMs",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &usageError{errors.New("unknown command " + quoteArg(args[0])), ""}
			}
			return cmd.Help()
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{err, verbOf(cmd)}
	})
	root.AddCommand(a.runCommand(signals), a.psCommand(), a.inspectCommand(), a.setupCommand(), a.doctorCommand(), a.imageCommand(), a.templateCommand(),
		a.benchCommand(), a.verifyCommand(), a.versionCommand())
	return root
}

// verbOf is a command's path without the program's name.
func verbOf(cmd *cobra.Command) string {
	verb := ""
	for c := cmd; c.HasParent(); c = c.Parent() {
		verb = c.Name() + " " + verb
	}
	return verb
}

// args makes cobra's checks of arguments usage errors.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return &usageError{err, verbOf(cmd)}
		}
		return nil
	}
}

// host opens the user's directory and cleans up after processes that ended
// before they could.
func (a *app) host() (*sandbox.Host, error) {
	home, err := sandbox.DefaultHome()
	if err != nil {
		return nil, err
	}
	h := sandbox.Open(home)
	if limit := os.Getenv(limitEnv); limit != "" {
		n, err := parseSize(limit)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", limitEnv, err)
		}
		h.LimitTemplates(n)
	}
	cleaned, err := h.Reconcile()
	for _, r := range cleaned {
		a.ui.note("removed what was left of sandbox %s, whose process had ended", r.ID)
	}
	return h, err
}
