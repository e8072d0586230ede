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
)

// PortName is the virtio-serial port's name, by which the guest finds it.
const PortName = "ironclaw.link"

// vsockAddr is where the two sides of an AF_VSOCK link meet.
type vsockAddr struct {
	guestCID uint32
	hostPort uint32
}

// command is QEMU's command line. It is the same for the same Spec, but for the
// vsock address: a snapshot depends on that.
func command(spec *vm.Spec, tscKHz int, vs vsockAddr) []string {
	args := []string{
		// acpi=on: distribution kernels find virtio-mmio devices by ACPI only.
		// pit and pic stay: without them the emulated machine does not boot.
		"-M", "microvm,acpi=on,x-option-roms=off,rtc=on,isa-serial=on",
		"-bios", "qboot.rom",
		"-m", strconv.FormatInt(spec.Memory>>20, 10) + "M",
		"-smp", strconv.Itoa(spec.CPUs),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		// Modern virtio; the default on this bus is the legacy one.
		"-global", "virtio-mmio.force-legacy=false",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		// Paused until the filter has been read back.
		"-S",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", fdQMP),
		"-mon", "chardev=qmp,mode=control",
		// The console is a pipe to us; the guest has no input there.
		"-chardev", "stdio,id=console,signal=off",
		"-serial", "chardev:console",
		"-kernel", spec.Kernel,
		"-initrd", spec.Initrd,
		"-append", cmdline(spec, tscKHz, vs),
		"-blockdev", "driver=file,node-name=root-file,read-only=on,filename=" + escape(spec.Root),
		"-blockdev", "driver=raw,node-name=root,read-only=on,file=root-file",
		"-device", "virtio-blk-device,drive=root",
		"-object", "rng-random,id=rng,filename=/dev/urandom",
		"-device", "virtio-rng-device,rng=rng",
	}
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
		args = append(args, "-device", fmt.Sprintf("vhost-vsock-device,guest-cid=%d,vhostfd=%d", vs.guestCID, fdLink))
	default:
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=link,fd=%d", fdLink),
			"-device", "virtio-serial-device,max_ports=2",
			"-device", "virtserialport,chardev=link,nr=1,name="+PortName)
	}
	return args
}

// cmdline is the guest kernel's command line.
func cmdline(spec *vm.Spec, tscKHz int, vs vsockAddr) string {
	words := []string{
		"console=ttyS0", "quiet", "loglevel=1", // emergencies only: the console is slow, and a panic is one
		"panic=-1", "reboot=t", // with -no-reboot: QEMU ends at once
		"rdinit=/init",
		"random.trust_cpu=on",
		"cryptomgr.notests", // the kernel testing its own ciphers takes a quarter of a second under emulation
	}
	if spec.Accel == vm.TCG {
		// Without it the kernel calibrates its clock against an emulated timer
		// and on a busy host never finishes. The guest's counter is the host's.
		words = append(words, "tsc_early_khz="+strconv.Itoa(tscKHz))
	}
	switch spec.Link {
	case vm.LinkVsock:
		words = append(words, fmt.Sprintf("ironclaw.link=vsock:%d", vs.hostPort))
	default:
		words = append(words, "ironclaw.link=serial")
	}
	return strings.Join(words, " ")
}

// escape protects a path inside one of QEMU's comma-separated options.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }
