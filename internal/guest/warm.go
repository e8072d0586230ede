package guest

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// warmCommands are run before a machine is saved, so that what nearly every
// command needs is in the page cache of all that are started from it. Those that
// an image does not have are passed over.
var warmCommands = [][]string{
	{"true"},
	{"sh", "-c", ":"},
	{"bash", "-c", ":"},
	{"env"},
	{"python3", "-c", ""},
}

// warmTimeout bounds each of them: an image may have anything in their place.
const warmTimeout = 10 * time.Second

// warm prepares a machine to be saved. Nothing personal is in it yet: no secret,
// no id, no command of a user.
func (a *Agent) warm() error {
	awaitClock("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	for _, args := range warmCommands {
		if err := a.runOnce(args); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
	}
	if err := a.jobs.prepare(); err != nil {
		return err
	}
	debug.FreeOSMemory()
	return zeroFreeMemory()
}

// clockSettles is how long the kernel takes at most to trust the processor's
// counter: it compares it with others for a second after boot.
const clockSettles = 3 * time.Second

// awaitClock waits until the kernel's clock is no more the counter "on trial",
// with which it neither stops the tick of an idle processor nor has timers finer
// than that. All machines started from a snapshot would go on with it for a while.
// The kernel tells nobody: the file is read again and again. A clock that does not
// settle is only slower.
func awaitClock(file string) {
	for deadline := time.Now().Add(clockSettles); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		name, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(name)) != "tsc-early" {
			return
		}
	}
}

// runOnce runs a command as a host would have it run, reads none of its output and
// does not mind how it ends.
func (a *Agent) runOnce(args []string) error {
	p, s, err := a.launch(&guestrpc.Exec{Args: args, KillAll: true})
	if errors.Is(err, guestrpc.ErrNotFound) || errors.Is(err, guestrpc.ErrNotRunnable) {
		return nil
	}
	if err != nil {
		return err
	}
	defer s.Close()
	defer p.release()
	defer time.AfterFunc(warmTimeout, p.killAll).Stop()
	_, err = p.wait(true)
	p.gone()
	return err
}

const (
	// zeroAtMost bounds what is zeroed. A boot leaves its traces in less, and the
	// kernel gives out the memory that has been in use before.
	zeroAtMost = 192 << 20
	// zeroMargin is left free, so that nothing is reclaimed for it.
	zeroMargin = 24 << 20
)

// zeroFreeMemory overwrites what the boot has left in memory that is free again:
// zeros are holes in the file that a machine is saved to. The kernel clears the
// pages that it gives us.
func zeroFreeMemory() error {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return err
	}
	free, err := memField(string(info), "MemFree:")
	if err != nil {
		return err
	}
	size := min(free-zeroMargin, zeroAtMost)
	if size <= 0 {
		return nil
	}
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	err = unix.Madvise(b, unix.MADV_POPULATE_WRITE)
	return errors.Join(err, unix.Munmap(b))
}
