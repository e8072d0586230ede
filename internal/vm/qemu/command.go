package qemu

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Descriptors that QEMU inherits, after standard input, output and error.
const (
	fdQMP  = 3
	fdLink = 4 // one end of the serial port's socket, or /dev/vhost-vsock

	fdState = 5 // the machine's state, if it is started from a snapshot
)

// PortName is the virtio-serial port's name, by which the guest finds it.
const PortName = "ironclaw.link"

// portID is the port's name to QEMU, which tells of nameless ones nothing.
const portID = "link"

// sandboxOptions make QEMU filter its own system calls; without the layer seccomp it
// is told not to.
const sandboxOptions = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// command is QEMU's command line. It is the same for the same Spec, but for the
// guest's address: a snapshot depends on that.
func (d *Driver) command(spec *vm.Spec, p paths, guestCID uint32) []string {
	args := []string{
		// acpi=on: distribution kernels find virtio-mmio devices by ACPI only.
		// pit and pic stay: without them the emulated machine does not boot.
		"-M", "microvm,acpi=on,x-option-roms=off,rtc=on,isa-serial=on" + memoryBackend(spec),
		"-bios", firmware,
		"-m", strconv.FormatInt(spec.Memory>>20, 10) + "M",
		"-smp", strconv.Itoa(spec.CPUs),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		// Modern virtio; the default on this bus is the legacy one.
		"-global", "virtio-mmio.force-legacy=false",
		"-sandbox", sandboxOptions,
		// Paused until the filter has been read back.
		"-S",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", fdQMP),
		"-mon", "chardev=qmp,mode=control",
		// The console is a pipe to us; the guest has no input there.
		"-chardev", "stdio,id=console,signal=off",
		"-serial", "chardev:console",
		"-blockdev", "driver=file,node-name=root-file,read-only=on,filename=" + escape(p.root),
		"-blockdev", "driver=raw,node-name=root,read-only=on,file=root-file",
		"-device", "virtio-blk-device,drive=root",
		// From getrandom(2): there are no devices in the jail.
		"-object", "rng-builtin,id=rng",
		"-device", "virtio-rng-device,rng=rng",
	}
	if spec.Saveable || spec.From != nil {
		args = append(args, "-global", "migration.x-events=on") // tell when the state is written or read
	}
	if spec.From == nil {
		args = append(args, "-kernel", p.kernel, "-initrd", p.initrd, "-append", d.cmdline(spec))
	} else {
		// The kernel is in the memory already.
		args = append(args, "-incoming", "defer")
	}
	args = append(args, d.memory(spec)...)
	switch spec.Accel {
	case vm.KVM:
		args = append(args, "-accel", "kvm", "-cpu", "host")
	default:
		thread := "single"
		if spec.CPUs > 1 {
			thread = "multi"
		}
		// The translation buffer's default is an eighth of the host's memory
		// for each machine. max has what x86-64-v3 programs need; without "fast"
		// string instructions, which emulation executes byte by byte, everything
		// that copies memory is nearly twice as fast.
		args = append(args, "-accel", "tcg,tb-size=64,thread="+thread, "-cpu", "max,-erms,-fsrm")
	}
	switch spec.Link {
	case vm.LinkVsock:
		args = append(args, "-device", fmt.Sprintf("vhost-vsock-device,guest-cid=%d,vhostfd=%d", guestCID, fdLink))
	default:
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=link,fd=%d", fdLink),
			"-device", "virtio-serial-device,max_ports=2",
			"-device", "virtserialport,id="+portID+",chardev=link,nr=1,name="+PortName)
	}
	return args
}

// memoryBackend makes the board take its memory from the object of that name.
func memoryBackend(spec *vm.Spec) string {
	if spec.Saveable || spec.From != nil {
		return ",memory-backend=ram"
	}
	return ""
}

// memory is where the machine's memory comes from, if not from nowhere. A
// machine to be saved writes to the file. One that was saved maps it privately:
// what it writes is its own, and what it only reads is shared with all others.
//
// QEMU believes that it opens the file for writing. It gets what the jail gives it
// (jail.Program.Opens): a saved machine's memory is open only for reading.
func (d *Driver) memory(spec *vm.Spec) []string {
	how := ""
	switch {
	case spec.Saveable:
		how = "share=on"
	case spec.From != nil:
		how = "share=off"
	default:
		return nil
	}
	return []string{"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%dM,mem-path=%s,%s", spec.Memory>>20, insideMemory, how)}
}

// cmdline is the guest kernel's command line.
func (d *Driver) cmdline(spec *vm.Spec) string {
	words := []string{
		"console=ttyS0", "quiet", "loglevel=1", // emergencies only: the console is slow, and a panic is one
		"panic=-1", "reboot=t", // with -no-reboot: QEMU ends at once
		"rdinit=/init",
		"random.trust_cpu=on",
		"psi=0", "audit=0", "nowatchdog", "lsm=landlock,yama", // what nobody in the guest has set up, and yet costs every system call something
		"cryptomgr.notests", // the kernel testing its own ciphers takes a quarter of a second under emulation
	}
	if spec.Accel == vm.TCG {
		words = append(words,
			// Without it the kernel calibrates its clock against an emulated timer
			// and on a busy host never finishes. The guest's counter is the host's.
			"tsc_early_khz="+strconv.Itoa(d.facts.tscKHz()),
			// Without it a host that is busy for a moment makes the guest's kernel
			// distrust the counter and fall back to counting timer ticks, which
			// loses time and wakes an idle machine 250 times a second.
			"tsc=reliable",
			// They hold up a processor's speculation, and here is none.
			"mitigations=off",
		)
		// Before QEMU 8 translated code is found by its virtual address: at a new
		// random one, every program's start translates all of it anew, which
		// takes five times as long.
		if !spec.RandomizeAddresses && !d.atLeast(8, 0) {
			words = append(words, "norandmaps")
		}
	}
	switch spec.Link {
	case vm.LinkVsock:
		words = append(words, "ironclaw.link=vsock")
	default:
		words = append(words, "ironclaw.link=serial")
	}
	if spec.Saveable {
		words = append(words, "ironclaw.warm") // see package guest
	}
	return strings.Join(words, " ")
}

// escape protects a path inside one of QEMU's comma-separated options.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }
