// Package guest is everything that runs in the guest: PID 1 and the agent.
//
// Start at [Boot], the boot order of PID 1, and at [RunAgent], the process that
// speaks package guestrpc with the host.
//
// # Two processes
//
// A PID 1 that waits for all children races with whoever waits for one of them.
// So PID 1 is a reaper and nothing else; its only child of its own is the agent,
// which starts the commands and waits for each. A machine whose agent has ended
// is of no use: PID 1 restarts the machine, which ends the VMM.
//
// # What it guarantees
//
// Nothing runs before hello. Every step of the boot and of hello that does not
// succeed ends the machine. Commands run under a memory limit that leaves the
// agent and the kernel their part, so that a command can exhaust only itself.
//
// # Confinement
//
// Commands are born of a thread that is confined already (see spawner): it has the
// profile of system calls, few capabilities, and the view of the machine in which
// there is no agent, no device and no setting. What a profile does not allow comes
// to the agent, which refuses and notes it (see watcher). If the thread that
// answers, or the first process of the commands' pid namespace, ends, so does the
// machine. A layer that cannot be set, or is not seen to be set, starts nothing.
//
// # What it does not promise
//
// Who breaks the guest's kernel has all of the guest, the agent's secret included.
// Root in the guest owns the files and every command, and can use up what commands
// may have. Commands see each other. That is no boundary: the boundary is the
// virtual machine, and the host believes nothing the guest says.
package guest

import (
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// sinceBoot is the moment on the clock of [guestrpc.Timings].
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// maxFile bounds the files of an image that are read whole.
const maxFile = 1 << 20

var errNotRegular = errors.New("not a regular file")

// readFile reads a small file that an image brought. The image is hostile: the
// name may be a FIFO, whose open would block, or a file without end.
func readFile(name string) (string, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return "", err
	} else if !st.Mode().IsRegular() {
		return "", &os.PathError{Op: "read", Path: name, Err: errNotRegular}
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return "", err
	}
	if len(b) > maxFile {
		return "", &os.PathError{Op: "read", Path: name, Err: unix.EFBIG}
	}
	return string(b), nil
}

// replaceFile puts a new file where name is, whatever that was: a link of the
// image is replaced, not followed.
func replaceFile(name, content string) error {
	tmp := name + ".ironclaw"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(content); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}

// writeControl writes a file of the kernel (cgroup, sysctl) in one write and
// never creates it.
func writeControl(name, value string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// withLine returns text with line added at its end.
func withLine(text, line string) string {
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	return text + line + "\n"
}
