package probe

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

var guestAttacks = map[string]attack{
	"disk.write":   diskWrite,
	"disk.read":    diskRead,
	"disk.mount":   diskMount,
	"disk.node":    diskNode,
	"link.open":    linkOpen,
	"agent.fds":    agentFDs,
	"agent.trace":  agentTrace,
	"agent.memory": agentMemory,
	"agent.signal": agentSignal,
	"kernel.mem":   kernelMemory,
	"kernel.ports": kernelPorts,
}

// diskWrite PATH...: makes a block device writable if it can be, and writes to it
// what it has read from it.
func diskWrite(args []string) (Outcome, string) { return several(args, overwrite) }

func overwrite(name string) error {
	r, err := os.Open(name)
	if err != nil {
		return err
	}
	defer r.Close()
	off := 0
	// Root may ask the kernel to forget that a device is read-only. What the
	// device itself says is then all that counts.
	_ = sys(unix.SYS_IOCTL, r.Fd(), unix.BLKROSET, uintptr(unsafe.Pointer(&off)))
	b := make([]byte, 4096)
	n, err := r.ReadAt(b, 0)
	if err != nil && n == 0 {
		return err
	}
	w, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := w.WriteAt(b[:n], 0); err != nil {
		return err
	}
	return w.Sync() // the page cache takes everything; the device is asked here
}

// diskRead PATH...: reads a block device.
func diskRead(args []string) (Outcome, string) {
	return several(args, func(name string) error {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.ReadAt(make([]byte, 4096), 0)
		return err
	})
}

// diskMount PATH...: mounts a disk for writing and writes to it.
func diskMount(args []string) (Outcome, string) {
	return several(args, func(name string) error {
		dir, err := os.MkdirTemp("", "mount")
		if err != nil {
			return err
		}
		defer os.Remove(dir)
		// Below the overlay it is mounted already, read-only: a second mount has to
		// be like the first, which a remount then changes for both.
		if err := unix.Mount(name, dir, "ext4", unix.MS_RDONLY, ""); err != nil {
			return err
		}
		defer unix.Unmount(dir, unix.MNT_DETACH)
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT, ""); err != nil {
			return err
		}
		f, err := os.CreateTemp(dir, "attack")
		if err != nil {
			return err
		}
		defer os.Remove(f.Name())
		return f.Close()
	})
}

// diskNode MAJOR:MINOR...: makes a node of a block device and writes through it.
func diskNode(args []string) (Outcome, string) {
	if len(args) == 0 {
		names, _ := filepath.Glob("/sys/block/*/dev")
		for _, name := range names {
			if b, err := os.ReadFile(name); err == nil {
				args = append(args, strings.TrimSpace(string(b)))
			}
		}
	}
	return several(args, func(dev string) error {
		major, minor, _ := strings.Cut(dev, ":")
		ma, err1 := strconv.ParseUint(major, 10, 32)
		mi, err2 := strconv.ParseUint(minor, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		// In /dev: elsewhere the mount may forbid the use of devices.
		name := filepath.Join("/dev", "node-"+major+"-"+minor)
		if err := unix.Mknod(name, unix.S_IFBLK|0o600, int(unix.Mkdev(uint32(ma), uint32(mi)))); err != nil {
			return err
		}
		defer os.Remove(name)
		return overwrite(name)
	})
}

// linkOpen: finds the devices of the link and opens one.
func linkOpen([]string) (Outcome, string) {
	var names []string
	for _, pattern := range []string{"/dev/vport*", "/dev/virtio-ports/*", "/dev/hvc*"} {
		found, _ := filepath.Glob(pattern)
		names = append(names, found...)
	}
	if len(names) == 0 {
		return Refused, "no device of the link is in /dev"
	}
	return several(names, func(name string) error {
		f, err := os.OpenFile(name, os.O_RDWR|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		return f.Close()
	})
}

// agents finds the guest agent, and PID 1 above it.
func agents() []int {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var pids []int
	for _, dir := range dirs {
		comm, _ := os.ReadFile(dir + "/comm")
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if name := strings.TrimSpace(string(comm)); name == "ironclaw-agent" || name == "init" {
			pids = append(pids, pid)
		}
	}
	return pids
}

func onAgents(try func(pid int) error) (Outcome, string) {
	var names []string
	for _, pid := range agents() {
		names = append(names, strconv.Itoa(pid))
	}
	if len(names) == 0 {
		return Refused, "the agent is not to be seen"
	}
	return several(names, func(name string) error {
		pid, _ := strconv.Atoi(name)
		return try(pid)
	})
}

// agentFDs: takes a descriptor of the agent's.
func agentFDs([]string) (Outcome, string) {
	return onAgents(func(pid int) error {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		err = errors.New("no descriptor to take")
		for n := range 64 {
			var got int
			if got, err = unix.PidfdGetfd(fd, n, 0); err == nil {
				return unix.Close(got)
			}
		}
		return err
	})
}

// agentTrace: becomes the tracer of the agent.
func agentTrace([]string) (Outcome, string) { return onAgents(trace) }

// trace attaches without stopping who is traced, and lets go.
func trace(pid int) error {
	if err := unix.PtraceSeize(pid); err != nil {
		return err
	}
	// Only who is stopped can be let go. This thread ends soon, which does it too.
	_ = unix.PtraceInterrupt(pid)
	_, _ = unix.Wait4(pid, nil, unix.WALL, nil)
	return unix.PtraceDetach(pid)
}

// agentMemory: opens the agent's memory.
func agentMemory([]string) (Outcome, string) {
	return onAgents(func(pid int) error {
		f, err := os.OpenFile("/proc/"+strconv.Itoa(pid)+"/mem", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return f.Close()
	})
}

// agentSignal: asks whether the agent could be sent a signal.
func agentSignal([]string) (Outcome, string) {
	return onAgents(func(pid int) error { return unix.Kill(pid, 0) })
}

// kernelMemory: reads the devices that are the machine's memory.
func kernelMemory([]string) (Outcome, string) {
	return several([]string{"/dev/mem", "/dev/kmem", "/dev/port", "/proc/kcore"}, func(name string) error {
		f, err := os.OpenFile(name, os.O_RDONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.Read(make([]byte, 4)) // another file may be in its place
		return err
	})
}
