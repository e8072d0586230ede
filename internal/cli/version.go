package cli

import (
	"crypto/sha256"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/kernel"
)

// Version is set by the linker for releases.
var Version = ""

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the versions of the program and of its guest agent",
		Args:  args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			fmt.Fprintf(a.stdout, "ironclaw %s\n", version())
			builtIn, err := kernel.BuiltInAgent()
			if err != nil {
				return err
			}
			agent, err := builtIn.Program()
			if err != nil {
				return err
			}
			fmt.Fprintf(a.stdout, "guest agent %.12x (%d bytes), protocol %d\n", sha256.Sum256(agent), len(agent), guestrpc.Version)
			fmt.Fprintf(a.stdout, "%s %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return nil
		},
	}
}

func version() string {
	if Version != "" {
		return Version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "development"
}
