package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// kvmDeadline bounds the boot that proves KVM. With it a boot takes well under a
// second, or some seconds inside another emulated machine. Where the processor
// shows no virtualisation at all, KVM is one of a kind that boots no ordinary
// kernel, or soon shows that it does.
func kvmDeadline() time.Duration {
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err == nil && !bytes.Contains(cpuinfo, []byte(" vmx")) && !bytes.Contains(cpuinfo, []byte(" svm")) {
		return 4 * time.Second
	}
	return 20 * time.Second
}

// ProveKVM boots the machine of spec with KVM and lets greet talk to its guest.
// The verdict is kept until the host reboots, or kernel or QEMU change. An error
// means that there is no verdict: ctx ended, or a layer of isolation could not be set (a *layer.Error).
func (d *Driver) ProveKVM(ctx context.Context, spec vm.Spec, progress func(string), greet func(context.Context, vm.Machine) error) (Verdict, error) {
	const device = "/dev/kvm"
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		// Not kept: a person mends this while the host runs.
		return Verdict{Reason: openReason(device, err)}, nil
	}
	f.Close()
	key, err := d.kvmKey(spec.Kernel)
	if err != nil {
		return Verdict{}, err
	}
	d.facts.mu.Lock()
	v, known := d.facts.d.KVM[key]
	d.facts.mu.Unlock()
	if known {
		return v, nil
	}
	if progress != nil {
		progress("trying KVM, once")
	}
	spec.Accel = vm.KVM
	v, err = d.tryKVM(ctx, spec, greet)
	if err != nil {
		return Verdict{}, err
	}
	d.facts.update(func(data *factsData) {
		if data.KVM == nil || len(data.KVM) >= maxVerdicts {
			data.KVM = make(map[string]Verdict)
		}
		data.KVM[key] = v
	})
	return v, nil
}

// maxVerdicts bounds the file: one for each kernel and QEMU that was tried.
const maxVerdicts = 16

func (d *Driver) kvmKey(kernel string) (string, error) {
	q, err := fingerprint(d.program)
	if err != nil {
		return "", err
	}
	k, err := fingerprint(kernel)
	return q + "|" + k, err
}

func (d *Driver) tryKVM(ctx context.Context, spec vm.Spec, greet func(context.Context, vm.Machine) error) (Verdict, error) {
	begun := time.Now()
	limit := kvmDeadline()
	tryCtx, cancel := context.WithTimeoutCause(ctx, limit,
		fmt.Errorf("a machine started with KVM did not boot within %v", limit))
	defer cancel()
	m, err := d.Start(tryCtx, spec)
	if err == nil {
		err = greet(tryCtx, m)
		m.Close()
	}
	var lacking *layer.Error
	switch {
	case ctx.Err() != nil:
		return Verdict{}, context.Cause(ctx)
	case errors.As(err, &lacking): // which says nothing of KVM
		return Verdict{}, err
	case tryCtx.Err() != nil:
		return Verdict{Reason: context.Cause(tryCtx).Error()}, nil
	case err != nil:
		line, _, _ := strings.Cut(err.Error(), "\n")
		return Verdict{Reason: line}, nil
	}
	return Verdict{Works: true, Reason: fmt.Sprintf("a machine booted with KVM in %.1f s", time.Since(begun).Seconds())}, nil
}

// openReason says why the device cannot be opened, in words a remedy follows from.
func openReason(device string, err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "there is no " + device
	case errors.Is(err, fs.ErrPermission):
		return "no permission to open " + device
	}
	return err.Error()
}
