// Command ironclaw runs the work of AI agents in disposable micro-VMs.
package main

import (
	"os"

	"github.com/ironclaw-run/ironclaw/internal/cli"
	"github.com/ironclaw-run/ironclaw/internal/jail"
)

func main() {
	jail.Init() // this may be the process that becomes a VMM
	os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
