// Package qemu runs machines with QEMU's microvm board: no firmware to speak
// of, no PCI, no network device, and by software emulation where there is no
// KVM.
//
// Start with [New]. What passes between QEMU and us goes over descriptors that
// it inherits: no socket, no file and no port exists that another process could
// find, and nothing remains when QEMU has ended, however it ended. QEMU ends
// with the process that started it (PR_SET_PDEATHSIG).
//
// QEMU runs in a jail (package jail) and filters its own system calls besides
// (-sandbox). Start reads back from the kernel that every layer is on, for every thread, before
// the guest executes its first instruction, and gives up if one is not.
package qemu

import (
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/link/vsock"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

const driverName = "qemu"

// Program is QEMU's name, looked up in PATH.
const Program = "qemu-system-x86_64"

// NotInstalledError is returned by New when there is no QEMU.
type NotInstalledError struct{ Program string }

func (e *NotInstalledError) Error() string { return e.Program + " is not installed" }

// Hint is the remedy.
func (e *NotInstalledError) Hint() string {
	return "install it: sudo apt-get install -y qemu-system-x86"
}

// Options configure a Driver. The zero value works.
type Options struct {
	Program   string // path or name of QEMU; "" means Program
	FactsFile string // where facts that hold until the host reboots are remembered; "" means nowhere
}

// Driver starts machines with QEMU.
type Driver struct {
	program string
	facts   *facts
	version string
}

var _ vm.Driver = (*Driver)(nil)

// New finds QEMU and asks for its version.
func New(ctx context.Context, opts Options) (*Driver, error) {
	name := opts.Program
	if name == "" {
		name = Program
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, &NotInstalledError{name}
	}
	d := &Driver{program: path, facts: loadFacts(opts.FactsFile)}
	if d.version, err = d.facts.version(ctx, path); err != nil {
		return nil, err
	}
	return d, nil
}

// Path is the QEMU in use.
func (d *Driver) Path() string { return d.program }

// Features says what this QEMU can do on this host.
func (d *Driver) Features() vm.Features {
	f := vm.Features{
		Name:    driverName,
		Version: d.version,
		Accels:  []vm.Accel{vm.KVM, vm.TCG},
		Links:   []vm.Link{vm.LinkSerial},
	}
	if unix.Access(vsock.Device, unix.R_OK|unix.W_OK) == nil {
		f.Links = []vm.Link{vm.LinkVsock, vm.LinkSerial}
	}
	for _, a := range f.Accels {
		for _, l := range f.Links {
			f.Snapshots = append(f.Snapshots, vm.Mode{Accel: a, Link: l})
		}
	}
	return f
}

// atLeast compares QEMU's version. One that cannot be read is an old one.
func (d *Driver) atLeast(major, minor int) bool {
	var have [2]int
	if _, err := fmt.Sscanf(d.version, "%d.%d", &have[0], &have[1]); err != nil {
		return false
	}
	return have[0] > major || have[0] == major && have[1] >= minor
}

// SnapshotInputs names the QEMU, its command line, and with KVM the processor
// and kernel whose state would be saved.
func (d *Driver) SnapshotInputs(spec vm.Spec) (map[string]string, error) {
	spec.Saveable, spec.From = true, nil
	if err := d.check(&spec); err != nil {
		return nil, err
	}
	program, err := fingerprint(d.program)
	if err != nil {
		return nil, err
	}
	inputs := map[string]string{
		"driver":  driverName,
		"qemu":    d.version + " " + program,
		"command": strings.Join(d.command(&spec, paths{insideRoot, insideKernel, insideInitrd}, 0), "\n"),
	}
	if spec.Accel == vm.KVM {
		if inputs["host"], err = hostCPU(); err != nil {
			return nil, err
		}
	}
	return inputs, nil
}

// hostCPU describes what a machine with KVM shows of the host: its processor
// with features and microcode, and its kernel.
func hostCPU() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	words := []string{"linux " + unix.ByteSliceToString(u.Release[:])}
	for line := range strings.Lines(string(cpuinfo)) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "vendor_id", "cpu family", "model", "stepping", "microcode", "flags":
			words = append(words, strings.TrimSpace(value))
		case "": // of the first processor
			return strings.Join(words, " "), nil
		}
	}
	return strings.Join(words, " "), nil
}

// queryVersion asks QEMU for its version: "7.2.22".
func queryVersion(ctx context.Context, path string) (string, error) {
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Env = []string{}
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", path, err)
	}
	const mark = "QEMU emulator version "
	first, _, _ := strings.Cut(string(out), "\n")
	if v, ok := strings.CutPrefix(first, mark); ok {
		v, _, _ = strings.Cut(v, " ")
		return v, nil
	}
	return "", fmt.Errorf("ask %s for its version: it answered %.80q", path, first)
}

// checkFiles turns QEMU's less clear complaints into ours.
func checkFiles(spec *vm.Spec) error {
	for _, f := range []struct{ what, path string }{
		{"kernel", spec.Kernel}, {"initramfs", spec.Initrd}, {"root disk", spec.Root},
	} {
		file, err := os.Open(f.path)
		if err != nil {
			return fmt.Errorf("%s: %w", f.what, err)
		}
		st, err := file.Stat()
		file.Close()
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", f.what, err)
		case !st.Mode().IsRegular():
			return fmt.Errorf("%s %s is not a regular file", f.what, f.path)
		case st.Size() == 0:
			return fmt.Errorf("%s %s is empty", f.what, f.path)
		}
	}
	return nil
}

// MemoryError is returned by Start for a machine too small for its kernel.
// Booted all the same, it would hang without a word.
type MemoryError struct{ Have, Need int64 } // bytes

func (e *MemoryError) Error() string {
	return fmt.Sprintf("%d MiB of memory are too little for this kernel, which needs %d MiB", e.Have>>20, e.Need>>20)
}

// Hint is the remedy.
func (e *MemoryError) Hint() string {
	return fmt.Sprintf("give the machine more memory: --memory %dM", e.Need>>20)
}

// HostMemoryError is returned by Start for a machine larger than the host. The
// kernel would grant the memory and later, when it is touched, kill somebody.
type HostMemoryError struct{ Want, Have int64 } // bytes

func (e *HostMemoryError) Error() string {
	return fmt.Sprintf("%d MiB of memory are more than this host has: %d MiB", e.Want>>20, e.Have>>20)
}

// Hint is the remedy.
func (e *HostMemoryError) Hint() string { return "give the machine less memory: --memory" }

func checkHostMemory(spec *vm.Spec) error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("look at the host's memory: %w", err)
	}
	have := int64(min((info.Totalram+info.Totalswap)*uint64(info.Unit), 1<<62))
	if spec.Memory > have {
		return &HostMemoryError{spec.Memory, have}
	}
	return nil
}

// memoryReserve is what a kernel needs beside its image and its initramfs before
// it can say that it has too little.
const memoryReserve = 8 << 20

// checkMemory compares the machine's memory with where the kernel's segments end.
func checkMemory(spec *vm.Spec) error {
	f, err := elf.Open(spec.Kernel)
	if err != nil {
		return fmt.Errorf("kernel %s: %w", spec.Kernel, err)
	}
	defer f.Close()
	var end uint64
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD {
			end = max(end, p.Paddr+p.Memsz)
		}
	}
	st, err := os.Stat(spec.Initrd)
	if err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	need := int64(min(end, 1<<40)) + st.Size() + memoryReserve
	if spec.Memory < need {
		const mib = 1 << 20
		return &MemoryError{spec.Memory, (need + mib - 1) / mib * mib}
	}
	return nil
}
