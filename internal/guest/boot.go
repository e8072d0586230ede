package guest

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// deviceTimeout bounds the wait for a device that the VMM has promised.
const deviceTimeout = 30 * time.Second

// boot is the state of PID 1 on its way to the agent.
type boot struct {
	uevents *uevents
	overlay int       // descriptor of the tmpfs that takes the writes
	agent   agentArgs // what the agent is told
}

// Boot is PID 1. It never returns: the machine ends when the agent does, or
// when a step fails.
func Boot() {
	defer func() {
		if r := recover(); r != nil {
			halt(fmt.Sprintf("panic: %v", r))
		}
	}()
	// no_new_privs belongs to a thread and is inherited; everything below,
	// the start of the agent included, is done by this one.
	runtime.LockOSThread()
	// Not ignored, which the commands would inherit: taken and dropped. The
	// runtime would otherwise end PID 1, and the machine, at a stray SIGTERM.
	signal.Notify(make(chan os.Signal, 1))

	b := &boot{agent: agentArgs{Times: guestrpc.Timings{Init: sinceBoot()}}}
	for _, step := range b.steps() {
		if err := step.do(); err != nil {
			halt(step.what + ": " + err.Error())
		}
	}
	halt("boot ended without an agent")
}

type step struct {
	what string
	do   func() error
}

// steps is the order of the boot.
func (b *boot) steps() []step {
	return []step{
		{"mount /proc, /sys and /dev", mountKernelFiles},
		{"read the kernel's command line", b.readCommandLine},
		{"see whether this machine attacks its host", b.readHostile},
		{"listen for devices", b.openUevents}, // before the modules that make them
		{"load modules", b.loadModules},
		{"wait for the root disk", b.waitRootDisk},
		{"mount the root disk", mountLower},
		{"mount the overlay", b.mountOverlay},
		{"mount the root's file systems", mountRootFiles},
		{"switch root", b.switchRoot},
		{"set up cgroups", mountCgroups},
		{"bring up the loopback", loopbackUp},
		{"check that there is no network", checkNoNetwork},
		{"stop the interval timer", stopPIT},
		{"set limits", setLimits},
		{"run the agent", b.runAgent},
	}
}

func (b *boot) readCommandLine() error {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	for _, word := range strings.Fields(string(line)) {
		if v, ok := strings.CutPrefix(word, "ironclaw.link="); ok {
			b.agent.Link = v
		}
		if word == "ironclaw.warm" {
			b.agent.Warm = true
		}
	}
	if b.agent.Link == "" {
		return fmt.Errorf("it has no ironclaw.link=")
	}
	return checkLink(b.agent.Link)
}

// hostileFile is in the initramfs of a machine that `ironclaw verify` makes to
// attack its own host: a hostile agent then runs in the agent's place. That is no
// way in for anybody: only the host puts files into an initramfs, and every agent
// is taken for hostile by the host anyway.
const hostileFile = "/hostile"

func (b *boot) readHostile() error {
	there, err := exists(hostileFile)
	b.agent.Hostile = there
	return err
}

func (b *boot) openUevents() (err error) {
	b.uevents, err = openUevents()
	return err
}

func (b *boot) loadModules() error {
	err := loadModules("/modules")
	b.agent.Times.Modules = sinceBoot()
	return err
}

func (b *boot) waitRootDisk() error {
	defer b.uevents.Close()
	return b.uevents.wait(time.Now().Add(deviceTimeout), func() (bool, error) {
		return exists(rootDisk)
	})
}

// setLimits gives the agent, and through it every command, what they inherit.
func setLimits() error {
	// As systemd does: old programs, which know select only, are safe; those
	// that need more may raise it.
	files := unix.Rlimit{Cur: commandFiles, Max: 512 << 10}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("open files: %w", err)
	}
	// An image's setuid programs give a command nothing.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}

// halt says why on the console and ends the machine: with -no-reboot, or
// reboot=k under Firecracker, a restart ends the VMM.
func halt(why string) {
	line := "ironclaw-init: " + why + "\n"
	if _, err := os.Stderr.WriteString(line); err == nil {
		// The console is a tty: without this the restart overtakes the text.
		unix.IoctlSetInt(int(os.Stderr.Fd()), unix.TCSBRK, 1)
	} else if kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		kmsg.WriteString("<3>" + line)
	}
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	// Leaving makes the kernel panic, and panic=-1 restarts too.
	fmt.Fprintf(os.Stderr, "ironclaw-init: restart: %v\n", err)
	os.Exit(1)
}
