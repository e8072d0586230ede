package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/template"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// chooseTemplate finds the template from which the machine starts, or makes it:
// a machine of the same kind, booted and saved before anything was said to it.
//
// Without one the machine boots, which only takes longer: whatever is wrong with
// templates (a full disk, a directory of somebody else's) stops no run.
func (b *builder) chooseTemplate(ctx context.Context) error {
	// QEMU gets a saved machine's memory by the filter of its system calls.
	if b.opts.Cold || b.opts.Without.Has(layer.Seccomp) || !slices.Contains(b.driver.Features().Snapshots, vm.Mode{Accel: b.spec.Accel, Link: b.spec.Link}) {
		return nil
	}
	inputs, err := b.templateInputs()
	if err != nil {
		return err
	}
	t, err := b.host.Templates.Get(ctx, inputs)
	if err != nil {
		if !errors.Is(err, template.ErrNotFound) {
			b.opts.Note(fmt.Sprintf("template not used: %v", err))
		}
		b.opts.Progress("preparing a template: a machine that others start from")
		t, err = b.host.Templates.Make(ctx, inputs, b.saveTemplate)
		b.opts.Progress("")
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		b.opts.Note(fmt.Sprintf("no template was made, so the machine boots: %v", err))
		return nil
	}
	b.template = t
	b.stack.Add(func() { _ = t.Close() })
	b.spec.From = &vm.Snapshot{Memory: t.Memory, State: t.State}
	return nil
}

// templateInputs names everything that the machine's memory depends on. What
// hello brings (names, limits of disk and processes) is not in it.
func (b *builder) templateInputs() (template.Inputs, error) {
	inputs, err := b.driver.SnapshotInputs(b.spec)
	if err != nil {
		return nil, err
	}
	inputs["machine"] = fmt.Sprintf("cpus %d, %d MiB, %s, %s", b.spec.CPUs, b.spec.Memory>>20, b.spec.Accel, b.spec.Link)
	inputs["kernel"] = b.s.kernel.Digest
	inputs["initramfs"] = filepath.Base(b.spec.Initrd) // its digest: agent and modules
	inputs["image"] = b.s.image.Digest
	return inputs, nil
}

// saveTemplate boots a machine and saves it in dir.
func (b *builder) saveTemplate(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("the guest did not come up within %v", bootTimeout))
	defer cancel()
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, name := range []string{template.MemoryFile, template.StateFile} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	spec := b.spec
	spec.Saveable = true
	var err error
	if spec.Jail, err = jail.Prepare(ctx, b.jailOptions(b.s.id+"-template")); err != nil {
		return err
	}
	defer spec.Jail.Close()
	m, err := b.driver.Start(ctx, spec)
	if err != nil {
		return err
	}
	defer m.Close()
	return m.Save(ctx, vm.Snapshot{Memory: files[0], State: files[1]})
}

// bringUp starts the machine and waits for its guest. A template that proves to be
// no good, whatever its checksums say, is removed, and the machine boots.
func (b *builder) bringUp(ctx context.Context) error {
	err := b.tryBringUp(ctx)
	if err == nil || b.template == nil || ctx.Err() != nil || !templatesFault(err) || b.host.hostile != "" {
		return err
	}
	b.opts.Note(fmt.Sprintf("template %s is discarded and the machine boots: %v", b.template.ID, err))
	if _, err := b.host.Templates.Remove(ctx, b.template.ID); err != nil {
		b.opts.Note(fmt.Sprintf("remove template %s: %v", b.template.ID, err))
	}
	b.template, b.spec.From = nil, nil
	if err := b.prepareJail(ctx); err != nil { // the first has been used
		return err
	}
	return b.tryBringUp(ctx)
}

// templatesFault reports whether it was the template's fault that a clone did not
// come up. A host that has run out of something, or is slow, is another matter.
func templatesFault(err error) bool {
	var (
		snapshot *vm.SnapshotError
		exit     *vm.ExitError
		guest    *guestrpc.Error
	)
	return errors.As(err, &snapshot) || errors.As(err, &exit) || errors.As(err, &guest) || errors.Is(err, errGuestProtocol)
}

func (b *builder) tryBringUp(ctx context.Context) error {
	if err := b.startMachine(ctx); err != nil {
		return err
	}
	b.phase("vmm")
	if err := b.waitForGuest(ctx); err != nil {
		_ = b.s.machine.Close()
		return err
	}
	if b.s.machine.Info().Cloned {
		b.phase("hello")
	} else {
		b.phase("boot")
	}
	return nil
}
