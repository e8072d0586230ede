package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ViewArg is the first argument of a process that makes a view.
const ViewArg = "view"

// Words of a view's arguments.
const (
	viewProcesses = "processes"
	viewDevices   = "devices"
)

// viewFD is how a view's process and the agent hear of each other.
const viewFD = 3

// view is what commands see of the machine: a mount namespace, and a pid namespace
// in which neither the agent nor the kernel's threads are.
//
// A process of this program makes it from inside, for only a member of a pid
// namespace can mount its /proc. Then it has nothing more to do: it gives up
// whatever it could do, and stays as the namespace's first process, which adopts
// orphans. The kernel reaps those, as it ignores SIGCHLD; a command can neither
// signal it (no first process hears what it has no handler for), nor trace it or
// read its memory (it is not dumpable).
type view struct {
	mounts, pids int      // descriptors of namespaces; pids is -1 without its own
	pid          int      // of the process
	alive        *os.File // the process ends when this closes
}

// newView makes a view, with a pid namespace and with a /dev of its own or without.
func newView(processes, devices bool) (*view, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "view"), os.NewFile(uintptr(pair[1]), "view")
	args := []string{viewName, ViewArg}
	flags := uintptr(unix.CLONE_NEWNS)
	if processes {
		args, flags = append(args, viewProcesses), flags|unix.CLONE_NEWPID
	}
	if devices {
		args = append(args, viewDevices)
	}
	pid, _, err := syscall.StartProcess("/proc/self/exe", args, &syscall.ProcAttr{
		Dir: "/", Env: []string{"GODEBUG=asyncpreemptoff=1,updatemaxprocs=0"},
		Files: []uintptr{0, 1, 2, theirs.Fd()},
		Sys:   &syscall.SysProcAttr{Cloneflags: flags, Setsid: true},
	})
	theirs.Close()
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("start its process: %w", err)
	}
	v := &view{mounts: -1, pids: -1, pid: pid, alive: ours}
	if err := v.take(processes); err != nil {
		v.Close()
		return nil, err
	}
	if !processes { // the namespace lives by our descriptor
		v.end()
	}
	return v, nil
}

// end ends the view's process.
func (v *view) end() {
	v.alive.Close()
	v.wait()
}

// Close gives up a view that nobody uses yet.
func (v *view) Close() {
	v.end()
	for _, fd := range []int{v.mounts, v.pids} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// take waits until the view is made, and takes its namespaces.
func (v *view) take(processes bool) (err error) {
	said, err := io.ReadAll(io.LimitReader(v.alive, 512))
	if err != nil {
		return err
	}
	if string(said) != viewReady {
		return fmt.Errorf("its process says %q", said)
	}
	ns := fmt.Sprintf("/proc/%d/ns/", v.pid)
	if v.mounts, err = unix.Open(ns+"mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open its mounts: %w", err)
	}
	if processes {
		if v.pids, err = unix.Open(ns+"pid", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open its processes: %w", err)
		}
	}
	return nil
}

// wait waits for the end of the view's process, which is the end of every command
// in its pid namespace.
func (v *view) wait() error {
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(v.pid, &status, 0, nil)
		if err == nil {
			return fmt.Errorf("the first process of the commands ended, status %#x", uint32(status))
		}
		if err != unix.EINTR {
			return err
		}
	}
}

const (
	viewReady = "ready"
	viewName  = "ironclaw-view"
)

// RunView makes a view; it is the body of that process. It returns only if the view
// could not be made, or when the agent has ended.
func RunView(args []string) error {
	has := func(word string) bool {
		for _, a := range args {
			if a == word {
				return true
			}
		}
		return false
	}
	agent := os.NewFile(viewFD, "agent")
	unix.CloseOnExec(viewFD)
	err := writeControl("/proc/self/comm", viewName) // it would be "exe"
	if err == nil {
		err = makeView(has(viewProcesses), has(viewDevices))
	}
	if err == nil {
		err = powerless()
	}
	if err != nil {
		agent.WriteString(err.Error())
		return err
	}
	if _, err := agent.WriteString(viewReady); err != nil {
		return err
	}
	if err := unix.Shutdown(viewFD, unix.SHUT_WR); err != nil {
		return err
	}
	for {
		// Not by the runtime's poller: nothing of this process is to run any more.
		var b [1]byte
		if _, err := unix.Read(viewFD, b[:]); err != unix.EINTR {
			return err
		}
	}
}

// powerless takes from this process everything that it will not need: all.
func powerless() error {
	if err := dropCapabilities(0); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("dumpable: %w", err)
	}
	for s := unix.Signal(1); s <= 64; s++ {
		if s == unix.SIGKILL || s == unix.SIGSTOP {
			continue
		}
		if err := setSignal(s, s == unix.SIGCHLD); err != nil {
			return fmt.Errorf("signal %d: %w", s, err)
		}
	}
	return nil
}

func makeView(processes, devices bool) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Always, and not only read-only: clone3 moves a process to another cgroup by
	// no more than a descriptor of it, and does not ask how it is mounted.
	if err := unix.Unmount(cgroupRoot, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", cgroupRoot, err)
	}
	if devices {
		if err := ownDevices(); err != nil {
			return fmt.Errorf("make /dev: %w", err)
		}
	}
	if !processes {
		return nil
	}
	if err := unix.Unmount("/proc", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount /proc: %w", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := (mount{"proc", "/proc", "proc", flags, ""}).do(); err != nil {
		return err
	}
	for _, name := range hidden {
		if err := hide(name); err != nil {
			return fmt.Errorf("hide %s: %w", name, err)
		}
	}
	for _, name := range readOnly {
		if err := makeReadOnly(name); err != nil {
			return fmt.Errorf("make %s read-only: %w", name, err)
		}
	}
	return remountReadOnly("/sys")
}

// hidden tell of the machine and of other processes, or act on the kernel. Those
// that a kernel does not have are passed over.
var hidden = []string{
	"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kallsyms", "/proc/kcore", "/proc/key-users",
	"/proc/keys", "/proc/kmsg", "/proc/kpagecgroup", "/proc/kpagecount", "/proc/kpageflags",
	"/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/slabinfo", "/proc/sysrq-trigger",
	"/proc/timer_list", "/proc/timer_stats", "/proc/vmallocinfo", "/sys/devices/virtual/powercap",
	"/sys/firmware", "/sys/kernel/debug", "/sys/kernel/security", "/sys/kernel/tracing",
}

// readOnly are settings of the machine.
var readOnly = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"}

// hide covers a directory with an empty one and a file with the empty device.
func hide(name string) error {
	var st unix.Stat_t
	err := unix.Lstat(name, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return unix.Mount("hidden", name, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=0,mode=0555")
	}
	return unix.Mount(os.DevNull, name, "", unix.MS_BIND, "")
}

func makeReadOnly(name string) error {
	err := unix.Mount(name, name, "", unix.MS_BIND|unix.MS_REC, "")
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	return remountReadOnly(name)
}

func remountReadOnly(name string) error {
	const flags = unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("", name, "", flags, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", name, err)
	}
	return nil
}

// node is a device that every program may have.
type node struct {
	name         string
	major, minor uint32
}

var nodes = []node{
	{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0},
}

// ownDevices replaces /dev: the machine's has the link, the disk and the memory.
// Terminals and shared memory stay those of the machine: a command's terminal was
// made there.
func ownDevices() error {
	kept := []string{"/dev/pts", "/dev/shm"}
	var trees []int
	for _, dir := range kept {
		fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("take %s: %w", dir, err)
		}
		defer unix.Close(fd)
		trees = append(trees, fd)
	}
	if err := unix.Unmount("/dev", unix.MNT_DETACH); err != nil {
		return err
	}
	if err := (mount{"dev", "/dev", "tmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755,size=64k"}).do(); err != nil {
		return err
	}
	for i, dir := range kept {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := unix.MoveMount(trees[i], "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("put %s: %w", dir, err)
		}
	}
	for _, n := range nodes {
		name := "/dev/" + n.name
		if err := unix.Mknod(name, unix.S_IFCHR|0o666, int(unix.Mkdev(n.major, n.minor))); err != nil {
			return fmt.Errorf("make %s: %w", name, err)
		}
		if err := os.Chmod(name, 0o666); err != nil { // whatever the umask
			return err
		}
	}
	if err := os.Symlink("pts/ptmx", "/dev/ptmx"); err != nil {
		return err
	}
	return linkDev("/dev")
}

// statusField finds a line "Key:\tvalue" of /proc/PID/status.
func statusField(status, key string) string {
	for line := range strings.SplitSeq(status, "\n") {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
