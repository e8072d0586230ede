package cli

import (
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// takeSignals directs the signals that a command may want to the supervisor of
// the command, instead of ending the verb.
func (a *app) takeSignals(all chan os.Signal, tty bool) chan os.Signal {
	mine := make(chan os.Signal, 16)
	signal.Notify(mine, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGCONT)
	if tty {
		signal.Notify(mine, syscall.SIGWINCH)
	}
	signal.Stop(all) // after Notify: no moment without a handler
	return mine
}

// pass gives a signal to the command. The second Ctrl-C is for us: the machine
// ends at once.
func (r *runner) pass(p process, sig syscall.Signal) error {
	switch sig {
	case syscall.SIGWINCH:
		fd := int(r.app.stdin.Fd())
		if cols, rows, err := term.GetSize(fd); err == nil {
			size := guestrpc.Resize{Rows: uint16(rows), Cols: uint16(cols)}
			go func() { _ = p.Resize(size) }() // a guest may not listen; see below
		}
		return nil
	case syscall.SIGINT:
		if r.interrupts++; r.interrupts > 1 {
			return &interruptedError{sig}
		}
	}
	// To the group, as a terminal does, and on the side: a guest that does not
	// listen must not hold up the supervisor. An error means that the machine
	// has ended, which the supervisor learns by itself.
	go func() { _ = p.Signal(sig, true) }()
	return nil
}
