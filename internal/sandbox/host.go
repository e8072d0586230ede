package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/apt"
	"github.com/ironclaw-run/ironclaw/internal/control"
	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/image"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/kernel"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/state"
	"github.com/ironclaw-run/ironclaw/internal/template"
	"github.com/ironclaw-run/ironclaw/internal/vm"
	"github.com/ironclaw-run/ironclaw/internal/vm/qemu"
)

// Host is where everything of this user's lives on this host. Safe for
// concurrent use, also by several processes.
type Host struct {
	Home      string
	Images    *image.Store
	Kernels   *kernel.Store
	Templates *template.Store

	apt    *apt.Apt
	state  *state.Store
	driver vm.Driver // in place of QEMU, for tests
	agent  []byte    // in place of the agent that was built in, for tests

	hostile string // directory of the initramfs whose agent attacks the host; "" but for Hostile
}

// DefaultHome is $IRONCLAW_HOME, or /var/lib/ironclaw for root, or ironclaw in
// the user's data directory.
func DefaultHome() (string, error) {
	if home := os.Getenv("IRONCLAW_HOME"); home != "" {
		return filepath.Abs(home)
	}
	if os.Geteuid() == 0 {
		return "/var/lib/ironclaw", nil
	}
	if data := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(data) {
		return filepath.Join(data, "ironclaw"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find a place for images: %w", err)
	}
	return filepath.Join(home, ".local", "share", "ironclaw"), nil
}

// Open uses the directory home. Nothing is made in it until it is needed.
func Open(home string) *Host {
	return &Host{
		Home:      home,
		Images:    image.Open(filepath.Join(home, "images")),
		Kernels:   kernel.Open(filepath.Join(home, "kernels")),
		Templates: template.Open(filepath.Join(home, "templates"), 0),
		apt:       apt.New(filepath.Join(home, "apt")),
		state:     state.Open(filepath.Join(home, "run")),
	}
}

// Hostile is this Host, but that the agents of its machines attack it: see package
// guest/hostile. What such machines start from is kept in dir, apart from what
// others do. The caller names accelerator and link, and removes dir.
func (h *Host) Hostile(dir string) *Host {
	hostile := *h
	hostile.hostile = dir
	hostile.Templates = template.Open(filepath.Join(dir, "templates"), 0)
	return &hostile
}

// LimitTemplates sets how many bytes of disk all templates may take together. Not
// to be called while the Host is used.
func (h *Host) LimitTemplates(bytes int64) {
	h.Templates = template.Open(filepath.Join(h.Home, "templates"), bytes)
}

// Reconcile removes what ended processes have left behind.
func (h *Host) Reconcile() ([]state.Record, error) {
	cleaned, err := h.state.Reconcile()
	if len(cleaned) > 0 {
		ids := make([]string, len(cleaned))
		for i, r := range cleaned {
			ids[i] = r.ID
		}
		jail.Sweep(ids)
	}
	return cleaned, err
}

// List returns the records of the sandboxes that exist.
func (h *Host) List() ([]state.Record, error) { return h.state.List() }

// Find returns the record of a sandbox by id, name, or the beginning of an id; the error is
// state.ErrNotFound if there is none.
func (h *Host) Find(ref string) (state.Record, error) { return h.state.Find(ref) }

// Inspect asks the process that runs a sandbox, and through it the guest, what was refused and
// how its commands are confined. The error is control.ErrNobody if it does not answer.
func (h *Host) Inspect(ctx context.Context, id string) (*Inspection, error) {
	i := new(Inspection)
	if err := control.Ask(ctx, h.state.Dir(id), control.Request{Op: opInspect}, i); err != nil {
		return nil, fmt.Errorf("inspect sandbox %s: %w", id, err)
	}
	return i, nil
}

// Setup makes what a first run needs and what is missing: kernel and base image.
func (h *Host) Setup(ctx context.Context, progress func(string)) error {
	if _, err := h.Kernels.Install(ctx, h.apt, progress); err != nil {
		return err
	}
	_, err := h.Image(ctx, DefaultImage, progress)
	return err
}

// Image finds an image. The default one is built if it does not exist.
func (h *Host) Image(ctx context.Context, ref string, progress func(string)) (*image.Image, error) {
	img, err := h.Images.Get(ctx, ref)
	if errors.Is(err, image.ErrNotFound) && ref == DefaultImage {
		img, err = h.BuildImage(ctx, image.BuildOptions{Name: DefaultImage, Progress: progress})
	}
	if err != nil {
		return nil, err
	}
	if err := h.Images.VerifyOnce(ctx, img); err != nil {
		return nil, err
	}
	return img, nil
}

// BuildImage builds an image from the distribution's packages.
func (h *Host) BuildImage(ctx context.Context, opts image.BuildOptions) (*image.Image, error) {
	opts.Apt = h.apt
	return h.Images.Build(ctx, opts)
}

// Kernel finds the kernel: the file named, or the installed one, which is
// installed if it is not.
func (h *Host) Kernel(ctx context.Context, path, modules string, progress func(string)) (*kernel.Kernel, error) {
	if path != "" {
		return h.Kernels.FromFiles(ctx, path, modules)
	}
	k, err := h.Kernels.Current(ctx)
	if errors.Is(err, kernel.ErrNotInstalled) {
		k, err = h.Kernels.Install(ctx, h.apt, progress)
	}
	return k, err
}

// Driver gives a driver by name.
func (h *Host) Driver(ctx context.Context, name string) (vm.Driver, error) {
	switch {
	case name != "" && name != "auto" && name != "qemu":
		return nil, fmt.Errorf("unknown driver %q: there are auto and qemu", name)
	case h.driver != nil:
		return h.driver, nil
	}
	return qemu.New(ctx, qemu.Options{FactsFile: filepath.Join(h.Home, "facts.json")})
}

func (h *Host) initramfs(ctx context.Context, k *kernel.Kernel, l vm.Link) (string, error) {
	agent := kernel.AgentOf(h.agent)
	if h.agent == nil {
		var err error
		if agent, err = kernel.BuiltInAgent(); err != nil {
			return "", err
		}
	}
	if h.hostile != "" {
		return h.Kernels.HostileInitramfs(k, agent, modulesFor(l), h.hostile)
	}
	return h.Kernels.Initramfs(ctx, k, agent, modulesFor(l))
}

// modulesFor names the kernel modules that a machine needs to come up.
func modulesFor(l vm.Link) []string {
	modules := []string{"virtio_mmio", "virtio_blk", "overlay", "virtio_rng"}
	if l == vm.LinkVsock {
		return append(modules, "vmw_vsock_virtio_transport")
	}
	return append(modules, "virtio_console")
}

func chooseLink(f vm.Features, want string) (vm.Link, error) {
	if want == "" || want == "auto" {
		return f.Links[0], nil
	}
	for _, l := range f.Links {
		if string(l) == want {
			return l, nil
		}
	}
	if want == string(vm.LinkVsock) {
		return "", noVsockError{}
	}
	return "", fmt.Errorf("unknown link %q: there are auto, vsock and serial", want)
}

// chooseAccel chooses the accelerator. That /dev/kvm can be opened proves
// nothing: there are hosts on which it can and no kernel ever boots. So the
// machine that is wanted is booted with it once, and the verdict is kept until
// the host reboots.
func (h *Host) chooseAccel(ctx context.Context, d vm.Driver, spec vm.Spec, want string, progress func(string)) (vm.Accel, error) {
	switch want {
	case "tcg":
		return vm.TCG, nil
	case "kvm", "auto", "":
	default:
		return "", fmt.Errorf("unknown accelerator %q: there are auto, kvm and tcg", want)
	}
	v, err := h.proveKVM(ctx, d, spec, progress)
	if err != nil {
		return "", err
	}
	if v.Works {
		return vm.KVM, nil
	}
	if want == "kvm" {
		return "", &NoKVMError{Reason: v.Reason}
	}
	return vm.TCG, nil
}

// NoKVMError says why KVM was asked for and cannot be had.
type NoKVMError struct{ Reason string }

func (e *NoKVMError) Error() string { return "KVM does not work here: " + e.Reason }

// Hint is the remedy.
func (e *NoKVMError) Hint() string {
	if strings.Contains(e.Reason, "permission") {
		return KVMPermissionRemedy() + "; or use --accel auto"
	}
	return "use --accel auto, which emulates where it must"
}

// KVMPermissionRemedy is the command that gives this user access to /dev/kvm: by
// the device's group where it has one for that, as udev gives it.
func KVMPermissionRemedy() string {
	var st unix.Stat_t
	if unix.Stat("/dev/kvm", &st) == nil && st.Gid != 0 && st.Mode&0o060 == 0o060 {
		if g, err := user.LookupGroupId(strconv.Itoa(int(st.Gid))); err == nil {
			return "sudo usermod -aG " + g.Name + " $USER, then log in again"
		}
	}
	return "sudo chown $USER /dev/kvm (until the host reboots)"
}

func (h *Host) proveKVM(ctx context.Context, d vm.Driver, spec vm.Spec, progress func(string)) (qemu.Verdict, error) {
	q, ok := d.(*qemu.Driver)
	if !ok {
		return qemu.Verdict{Reason: "the driver has none"}, nil
	}
	spec.CPUs, spec.Memory, spec.Jail = 1, vm.DefaultMemory, nil
	return q.ProveKVM(ctx, spec, progress, func(ctx context.Context, m vm.Machine) error {
		_, _, err := greet(ctx, m, guestrpc.Hello{Hostname: "probe", Pids: DefaultPids})
		return err
	})
}

// KVM says whether KVM works, and why it is believed so. It boots a machine if
// nobody has yet.
func (h *Host) KVM(ctx context.Context, progress func(string)) (qemu.Verdict, error) {
	b := &builder{host: h, opts: &Options{Progress: progress}, s: &Sandbox{id: newID()}, last: time.Now()}
	defer b.stack.Run()
	if err := b.opts.fill(); err != nil {
		return qemu.Verdict{}, err
	}
	for _, step := range []func(context.Context) error{b.findImage, b.findKernel} {
		if err := step(ctx); err != nil {
			return qemu.Verdict{}, err
		}
	}
	d, err := h.Driver(ctx, "")
	if err != nil {
		return qemu.Verdict{}, err
	}
	b.spec.ID = b.s.id
	b.spec.Link = vm.LinkSerial
	if b.spec.Initrd, err = h.initramfs(ctx, b.s.kernel, b.spec.Link); err != nil {
		return qemu.Verdict{}, err
	}
	return h.proveKVM(ctx, d, b.spec, progress)
}

// isBroken reports whether err is how a stream ends whose guest has gone.
func isBroken(err error) bool {
	for _, end := range []error{link.ErrClosed, io.EOF, io.ErrUnexpectedEOF, syscall.EPIPE, syscall.ECONNRESET} {
		if errors.Is(err, end) {
			return true
		}
	}
	return false
}

// InitramfsSize is the size in bytes of what s booted beside its kernel.
func (h *Host) InitramfsSize(ctx context.Context, s *Sandbox) (int64, error) {
	path, err := h.initramfs(ctx, s.kernel, s.machine.Info().Link)
	if err != nil {
		return 0, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

type noVsockError struct{}

func (noVsockError) Error() string { return "link vsock: no access to /dev/vhost-vsock" }

// Hint is the remedy.
func (noVsockError) Hint() string {
	return "sudo modprobe vhost_vsock, and be root or in group kvm; or use --link auto"
}
