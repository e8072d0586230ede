// Package doctor looks at the host and tells, for each thing that IronClaw
// needs, whether it is there, and the command that mends it.
//
// It changes nothing, but makes the directory if it can, and there is the one
// boot that proves KVM. What is learned of QEMU and KVM is kept (see package
// qemu).
package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/image"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/kernel"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/link/vsock"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/vm"
	"github.com/ironclaw-run/ironclaw/internal/vm/qemu"
)

// Status is how a check came out.
type Status string

// Statuses.
const (
	OK      Status = "ok"
	Missing Status = "missing" // needed: nothing runs without it
	Limited Status = "limited" // works, and would be better with it
)

// Check is one thing that was looked at.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"` // a command, where one mends it
}

// Healthy reports whether nothing needed is missing.
func Healthy(checks []Check) bool {
	for _, c := range checks {
		if c.Status == Missing {
			return false
		}
	}
	return true
}

// Examine runs every check, in the order in which a person should mend them.
func Examine(ctx context.Context, h *sandbox.Host, progress func(string)) []Check {
	checks := []Check{agent(), vmm(ctx, h)}
	checks = append(checks, builders(ctx)...)
	checks = append(checks, home(h), memory())
	kernelCheck, haveKernel := installedKernel(ctx, h)
	imageCheck, haveImage := baseImage(ctx, h)
	checks = append(checks, kernelCheck, imageCheck)
	ready := haveKernel && haveImage && Healthy(checks)
	checks = append(checks, accelerator(ctx, h, ready, progress), transport())
	return append(checks, isolation(ctx)...)
}

// isolation makes a jail and tells of each layer around the VMM how it stands here.
func isolation(ctx context.Context) []Check {
	report, errs := jail.Check(ctx, nil)
	var checks []Check
	for _, err := range errs {
		c := Check{Name: "isolation", Status: Missing, Detail: err.Error()}
		if lacking, ok := errors.AsType[*layer.Error](err); ok {
			c.Name, c.Detail, c.Remedy = layerName(lacking.Layer), lacking.Err.Error(), lacking.Remedy
		}
		checks = append(checks, c)
	}
	for _, s := range report {
		c := Check{Name: layerName(s.Layer), Status: OK, Detail: s.Detail}
		switch s.State {
		case layer.Off: // it is missing, and has been told of
			continue
		case layer.Held, layer.Absent:
			c.Status, c.Remedy = Limited, remedies[s.Layer]
		}
		checks = append(checks, c)
	}
	return checks
}

func layerName(n layer.Name) string { return "layer " + string(n) }

// remedies give the layers that something else stands in for.
var remedies = map[layer.Name]string{
	layer.Cgroup:   "run it in a cgroup of its own: systemd-run --user --scope -p Delegate=yes ironclaw ...",
	layer.Landlock: "a kernel with Landlock in its list of security modules (lsm=landlock,...)",
	layer.Guard:    "run ironclaw as root, which gives each VMM a user of its own",
}

func agent() Check {
	c := Check{Name: "guest agent", Status: OK}
	var program []byte
	a, err := kernel.BuiltInAgent()
	if err == nil {
		program, err = a.Program()
	}
	if err != nil {
		return Check{c.Name, Missing, err.Error(), "make build"}
	}
	c.Detail = fmt.Sprintf("built in, %d bytes", len(program))
	return c
}

func vmm(ctx context.Context, h *sandbox.Host) Check {
	c := Check{Name: "QEMU", Status: OK}
	d, err := h.Driver(ctx, "")
	if err != nil {
		c.Status, c.Detail = Missing, err.Error()
		var absent *qemu.NotInstalledError
		if errors.As(err, &absent) {
			c.Remedy = absent.Hint()
		}
		return c
	}
	c.Detail = d.Features().Version
	if q, ok := d.(*qemu.Driver); ok {
		c.Detail += " (" + q.Path() + ")"
	}
	return c
}

// builders checks what setup and image build need. Once kernel and image are
// there, machines run without it.
func builders(ctx context.Context) []Check {
	var checks []Check
	for _, t := range []struct{ name, program string }{{"apt", "apt-get"}, {"dpkg", "dpkg-deb"}} {
		c := Check{Name: t.name, Status: OK}
		path, err := exec.LookPath(t.program)
		c.Detail = path
		if err != nil {
			c.Status, c.Detail = Limited, "not installed: no kernel or image can be prepared"
		}
		checks = append(checks, c)
	}
	c := Check{Name: "image build", Status: OK, Detail: "with mmdebstrap"}
	if err := image.CanBuild(ctx); err != nil {
		c.Status, c.Detail = Limited, err.Error()
		var lacking *image.PrerequisiteError
		if errors.As(err, &lacking) {
			c.Remedy = lacking.Remedy
		}
	}
	return append(checks, c)
}

// freeNeeded is what kernel, image and the making of both take.
const freeNeeded = 2 << 30

func home(h *sandbox.Host) Check {
	c := Check{Name: "directory", Status: OK, Detail: h.Home}
	if err := os.MkdirAll(h.Home, 0o700); err != nil {
		return Check{c.Name, Missing, err.Error(), "set IRONCLAW_HOME to a directory that you can write"}
	}
	if err := unix.Access(h.Home, unix.W_OK); err != nil {
		return Check{c.Name, Missing, h.Home + ": " + err.Error(), "set IRONCLAW_HOME to a directory that you can write"}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(h.Home, &st); err == nil {
		free := int64(st.Bavail) * st.Bsize
		c.Detail += fmt.Sprintf(", %d MiB free", free>>20)
		if free < freeNeeded {
			c.Status, c.Remedy = Limited, "make room, or set IRONCLAW_HOME to a directory on another disk"
		}
	}
	return c
}

func memory() Check {
	c := Check{Name: "memory", Status: OK}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return Check{c.Name, Limited, err.Error(), ""}
	}
	total := int64(si.Totalram) * int64(si.Unit)
	c.Detail = fmt.Sprintf("%d MiB", total>>20)
	if total < 2*vm.DefaultMemory {
		c.Status, c.Remedy = Limited, "use machines smaller than the default of 256M (--memory)"
	}
	return c
}

func installedKernel(ctx context.Context, h *sandbox.Host) (Check, bool) {
	k, err := h.Kernels.Current(ctx)
	if err != nil {
		return Check{"kernel", notYet(err, kernel.ErrNotInstalled), err.Error(), "ironclaw setup"}, false
	}
	return Check{"kernel", OK, k.Release + " from " + k.Source, ""}, true
}

func baseImage(ctx context.Context, h *sandbox.Host) (Check, bool) {
	img, err := h.Images.Get(ctx, sandbox.DefaultImage)
	if err != nil {
		c := Check{"image base", notYet(err, image.ErrNotFound), err.Error(), "ironclaw setup"}
		if c.Status == Missing { // setup leaves alone what is there
			c.Remedy = "ironclaw image build " + sandbox.DefaultImage
		}
		return c, false
	}
	return Check{"image base", OK, fmt.Sprintf("%.19s, %d MiB, %d packages", img.Digest, img.Size>>20, len(img.Packages)), ""}, true
}

// notYet tells what the first run makes by itself from what is broken.
func notYet(err, absent error) Status {
	if errors.Is(err, absent) {
		return Limited
	}
	return Missing
}

func accelerator(ctx context.Context, h *sandbox.Host, ready bool, progress func(string)) Check {
	c := Check{Name: "accelerator", Status: Limited}
	if !ready {
		c.Detail = "not known yet: KVM is proved by booting a machine, for which something above is missing"
		return c
	}
	v, err := h.KVM(ctx, progress)
	switch {
	case err != nil:
		c.Detail = "not known: " + err.Error()
	case v.Works:
		c.Status, c.Detail = OK, "kvm: "+v.Reason
	default:
		c.Detail = "tcg (software emulation): " + v.Reason
		if strings.Contains(v.Reason, "permission") {
			c.Remedy = sandbox.KVMPermissionRemedy()
		}
	}
	return c
}

func transport() Check {
	c := Check{Name: "link", Status: OK}
	if unix.Access(vsock.Device, unix.R_OK|unix.W_OK) == nil {
		c.Detail = "vsock, through " + vsock.Device
	} else {
		c.Detail = "virtio-serial: " + vsock.Device + " cannot be used"
	}
	return c
}
