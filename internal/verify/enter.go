package verify

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/verify/testnet"
)

// Inside reports whether this process runs in a test network.
func Inside() bool { return testnet.Inside() }

// Enter runs a program, which is to call Run, in a test network: name as argv[0],
// and the streams of this process. A NoNetworkError says that there can be no such
// network here, and that nothing ran.
func Enter(ctx context.Context, program, name string, args ...string) (code int, err error) {
	// The program ends with the thread that starts it, so that is kept.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := testnet.Command(ctx, program, args...)
	cmd.Args[0] = name
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	if err := cmd.Start(); err != nil {
		return 0, &NoNetworkError{err}
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() && ctx.Err() == nil {
		return exit.ExitCode(), nil
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return 0, err
}

// NoNetworkError says why no network namespace can be made.
type NoNetworkError struct{ Err error }

func (e *NoNetworkError) Error() string {
	return fmt.Sprintf("no network namespace can be made for the attacks: %v", e.Err)
}

func (e *NoNetworkError) Unwrap() error { return e.Err }

// Hint is the remedy.
func (e *NoNetworkError) Hint() string {
	if os.Geteuid() == 0 {
		return "this host's kernel, or a container around this program, forbids namespaces to root: run it outside"
	}
	for _, s := range []struct{ path, remedy string }{
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"},
		{"/proc/sys/kernel/unprivileged_userns_clone", "sudo sysctl kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/user/max_user_namespaces", "sudo sysctl user.max_user_namespaces=15000"},
	} {
		b, err := os.ReadFile(s.path)
		if err != nil || len(b) == 0 {
			continue
		}
		if restricts := s.path[len(s.path)-8:] == "d_userns"; restricts == (b[0] == '1') && (restricts || b[0] == '0') {
			return s.remedy + "; or run it as root"
		}
	}
	return "run it as root"
}

// checkProgram refuses a program that could not run in a guest or in a jail, where
// there is no dynamic linker.
func checkProgram(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("this program, which holds the probes: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("this program is linked dynamically and could not attack from inside a guest: build it with `make build`")
		}
	}
	return unix.Access(path, unix.X_OK)
}
