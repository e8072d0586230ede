package guest

import (
	"encoding/json"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// AgentArg is the first argument of the agent's process.
const AgentArg = "agent"

// overlayFD is where the agent finds the overlay's tmpfs.
const overlayFD = 3

// runAgent starts the agent and reaps until it ends, which is always an error.
func (b *boot) runAgent() error {
	pid, err := b.startAgent()
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	unix.Close(b.overlay)
	for {
		var status unix.WaitStatus
		got, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case got == pid && status.Signaled():
			return fmt.Errorf("ended by signal %d", status.Signal())
		case got == pid:
			return fmt.Errorf("ended with status %d", status.ExitStatus())
		}
	}
}

func (b *boot) startAgent() (int, error) {
	args, err := json.Marshal(b.agent)
	if err != nil {
		return 0, err
	}
	// The file behind /proc/self/exe has been deleted; the link still leads to it.
	pid, _, err := syscall.StartProcess("/proc/self/exe", []string{"ironclaw-agent", AgentArg, string(args)}, &syscall.ProcAttr{
		Dir: "/",
		Env: []string{
			"PATH=" + defaultPath,
			// The agent has no long loops; under emulation the runtime takes any
			// step for one and sends signals to interrupt it. And the number of
			// processors does not change.
			"GODEBUG=asyncpreemptoff=1,updatemaxprocs=0",
		},
		Files: []uintptr{0, 1, 2, uintptr(b.overlay)},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	return pid, err
}
