package qemu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Where a jailed QEMU finds what is not its own.
const (
	insideRoot   = "/root.img"
	insideKernel = "/vmlinux"
	insideInitrd = "/initramfs"
	// insideMemory is the machine's memory, which exists only for the moment in which QEMU
	// opens it (jail.Program.Opens).
	insideMemory = "/memory"
	kvmDevice    = "/dev/kvm"
)

// firmware is what the board starts from (-bios).
const firmware = "qboot.rom"

// paths are the names by which QEMU finds its files.
type paths struct{ root, kernel, initrd string }

// pathsIn gives the names in a jail.
func pathsIn(j *jail.Jail, spec *vm.Spec) paths {
	return paths{
		root:   j.Path(spec.Root, insideRoot),
		kernel: j.Path(spec.Kernel, insideKernel),
		initrd: j.Path(spec.Initrd, insideInitrd),
	}
}

// files are all that exists in the jail of a machine.
func (d *Driver) files(ctx context.Context, j *jail.Jail, spec *vm.Spec) ([]jail.File, error) {
	if !j.Has(layer.Mounts) && !j.Has(layer.Landlock) {
		return nil, nil
	}
	own, err := d.facts.programFiles(ctx, d.program)
	if err != nil {
		return nil, &layer.Error{Layer: layer.Mounts, Err: err}
	}
	var files []jail.File
	for _, path := range own {
		files = append(files, jail.File{Host: path, Inside: path})
	}
	files = append(files, jail.File{Host: spec.Root, Inside: insideRoot})
	if spec.From == nil {
		files = append(files, jail.File{Host: spec.Kernel, Inside: insideKernel}, jail.File{Host: spec.Initrd, Inside: insideInitrd})
	}
	return files, nil
}

// programFiles lists what a QEMU needs to run at all: itself, its libraries, the module of
// its emulation where that is one, the board's firmware. It is remembered as long as the file
// is the same; a library that goes by another name since then is found missing by the jail.
func (f *facts) programFiles(ctx context.Context, program string) ([]string, error) {
	key, err := fingerprint(program)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	files := f.d.Files[key]
	f.mu.Unlock()
	if len(files) > 0 && allExist(files) {
		return files, nil
	}
	if files, err = findProgramFiles(ctx, program); err != nil {
		return nil, err
	}
	f.update(func(d *factsData) { d.Files = map[string][]string{key: files} })
	return files, nil
}

func allExist(files []string) bool {
	return !slices.ContainsFunc(files, func(path string) bool {
		_, err := os.Stat(path)
		return err != nil
	})
}

func findProgramFiles(ctx context.Context, program string) ([]string, error) {
	rom, err := findFirmware(ctx, program)
	if err != nil {
		return nil, err
	}
	var modules []string
	if m := findModule(program); m != "" {
		modules = append(modules, m)
	}
	needs, err := jail.ProgramFiles(ctx, program, modules...)
	return append([]string{program, rom}, needs...), err
}

// findFirmware asks QEMU where it would look for the firmware.
func findFirmware(ctx context.Context, program string) (string, error) {
	cmd := exec.CommandContext(ctx, program, "-L", "help")
	cmd.Env = []string{}
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("find QEMU's firmware: %w", err)
	}
	for dir := range strings.Lines(string(out)) {
		path := filepath.Join(strings.TrimSpace(dir), firmware)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("find QEMU's firmware: there is no %s where it looks", firmware)
}

// findModule finds the module with the emulation of the processor. Distributions may have
// built it in, and then there is none.
func findModule(program string) string {
	real, err := filepath.EvalSymlinks(program)
	if err != nil {
		return ""
	}
	prefix := filepath.Dir(filepath.Dir(real))
	for _, dir := range []string{"lib/x86_64-linux-gnu/qemu", "lib64/qemu", "lib/qemu"} {
		path := filepath.Join(prefix, dir, "accel-tcg-x86_64.so")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}
