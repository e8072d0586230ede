// Command ironclaw runs the work of AI agents in disposable micro-VMs.
package main

import (
	"os"

	"github.com/ironclaw-run/ironclaw/internal/cli"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
)

func main() {
	// In a guest or a jail that `ironclaw verify` attacks from, this program is
	// the attacker.
	if requests, ok := probe.Called(os.Args); ok {
		os.Exit(probe.Main(requests, os.Stdout))
	}
	jail.Init() // this may be the process that becomes a VMM
	os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
