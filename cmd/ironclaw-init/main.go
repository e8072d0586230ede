// Command ironclaw-init is the only program of IronClaw that runs in a guest.
//
// The kernel starts it as PID 1 from the initramfs. It makes the machine ready
// (the order is in [guest.Boot]), starts itself once more as the agent, and from
// then on only reaps. The agent starts it a third time, for what commands see of
// the machine. It does nothing on any other machine.
package main

import (
	"fmt"
	"os"

	"github.com/ironclaw-run/ironclaw/internal/guest"
)

func main() {
	switch {
	case len(os.Args) > 1 && os.Args[1] == guest.AgentArg:
		err := guest.RunAgent(os.Args[2:])
		fmt.Fprintf(os.Stderr, "ironclaw-init: agent: %v\n", err)
		os.Exit(1)
	case len(os.Args) > 1 && os.Args[1] == guest.ViewArg: // PID 1 too, of its own namespace
		if err := guest.RunView(os.Args[2:]); err != nil {
			fmt.Fprintf(os.Stderr, "ironclaw-init: view: %v\n", err)
			os.Exit(1)
		}
	case os.Getpid() == 1:
		guest.Boot()
	default:
		fmt.Fprintln(os.Stderr, "ironclaw-init: this is PID 1 of an IronClaw guest; it does nothing elsewhere")
		os.Exit(2)
	}
}
