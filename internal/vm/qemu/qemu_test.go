package qemu_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/image"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/kernel"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/link/vsock"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
	"github.com/ironclaw-run/ironclaw/internal/vm"
	"github.com/ironclaw-run/ironclaw/internal/vm/qemu"
	"github.com/ironclaw-run/ironclaw/internal/vm/vmtest"
)

// spec makes a Spec from the prepared kernel and base image.
func spec(t *testing.T, l vm.Link, a vm.Accel) vm.Spec {
	t.Helper()
	home, err := sandbox.DefaultHome()
	if err != nil {
		t.Fatal(err)
	}
	kernels := kernel.Open(filepath.Join(home, "kernels"))
	k, err := kernels.Current(t.Context())
	if err != nil {
		testenv.Skip(t, err.Error()+": run `bin/ironclaw setup`")
	}
	img, err := image.Open(filepath.Join(home, "images")).Get(t.Context(), "base")
	if err != nil {
		testenv.Skip(t, err.Error()+": run `bin/ironclaw setup`")
	}
	agent, err := kernel.BuiltInAgent()
	if err != nil {
		testenv.Skip(t, err.Error())
	}
	modules := []string{"virtio_mmio", "virtio_blk", "overlay", "virtio_rng", "virtio_console"}
	if l == vm.LinkVsock {
		modules[4] = "vmw_vsock_virtio_transport"
	}
	initrd, err := kernels.Initramfs(t.Context(), k, agent, modules)
	if err != nil {
		t.Fatal(err)
	}
	return vm.Spec{ID: "vmtest", Kernel: k.ELF, Initrd: initrd, Root: img.Path, Accel: a, Link: l}
}

func driver(t *testing.T, program string) *qemu.Driver {
	t.Helper()
	d, err := qemu.New(t.Context(), qemu.Options{Program: program, FactsFile: filepath.Join(t.TempDir(), "facts.json")})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func suite(t *testing.T, l vm.Link, a vm.Accel) {
	vmtest.Run(t, vmtest.Config{
		Driver: driver(t, ""),
		Spec:   func(t *testing.T) vm.Spec { return spec(t, l, a) },
		Kill: func(t *testing.T, m vm.Machine) {
			if err := syscall.Kill(m.Info().PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		},
	})
}

func TestDriverSerialTCG(t *testing.T) {
	testenv.NeedVM(t)
	suite(t, vm.LinkSerial, vm.TCG)
}

func TestDriverVsockTCG(t *testing.T) {
	testenv.NeedVM(t)
	testenv.NeedDevice(t, vsock.Device, "sudo modprobe vhost_vsock, and be root or in group kvm")
	suite(t, vm.LinkVsock, vm.TCG)
}

// kvm skips unless KVM is proved to work.
func kvm(t *testing.T) {
	t.Helper()
	testenv.NeedVM(t)
	testenv.NeedDevice(t, "/dev/kvm", "a host with virtualisation, and be root or in group kvm")
	v, err := driver(t, "").ProveKVM(t.Context(), spec(t, vm.LinkSerial, vm.KVM), nil, comesUp)
	if err != nil {
		t.Fatal(err)
	}
	if !v.Works {
		testenv.Skip(t, "needs a KVM that runs machines: "+v.Reason)
	}
}

// comesUp waits until the guest agent takes a stream.
func comesUp(ctx context.Context, m vm.Machine) error {
	conn, err := m.Dial(ctx, guestrpc.PortHello)
	if err != nil {
		return err
	}
	return conn.Close()
}

func TestDriverSerialKVM(t *testing.T) {
	kvm(t)
	suite(t, vm.LinkSerial, vm.KVM)
}

func TestDriverVsockKVM(t *testing.T) {
	kvm(t)
	testenv.NeedDevice(t, vsock.Device, "sudo modprobe vhost_vsock, and be root or in group kvm")
	suite(t, vm.LinkVsock, vm.KVM)
}

// The verdict about KVM comes from a boot and is remembered. A KVM with which no
// guest comes up is refused although /dev/kvm opens and QEMU starts.
func TestProveKVM(t *testing.T) {
	testenv.NeedVM(t)
	testenv.NeedDevice(t, "/dev/kvm", "a host with virtualisation, and be root or in group kvm")
	facts := filepath.Join(t.TempDir(), "facts.json")
	asked := 0
	for range 2 {
		d, err := qemu.New(t.Context(), qemu.Options{FactsFile: facts})
		if err != nil {
			t.Fatal(err)
		}
		v, err := d.ProveKVM(t.Context(), spec(t, vm.LinkSerial, vm.KVM), func(string) { asked++ },
			func(context.Context, vm.Machine) error { return errors.New("no guest came up") })
		if err != nil {
			t.Fatal(err)
		}
		if v.Works || v.Reason == "" {
			t.Errorf("verdict %+v", v)
		}
	}
	if asked != 1 {
		t.Errorf("KVM was tried %d times", asked)
	}
}

// script is the Spec of a machine whose QEMU is a script: that needs a shell, signals of its own
// to itself, and more.
func script(t *testing.T, without ...layer.Name) vm.Spec {
	t.Helper()
	spec := spec(t, vm.LinkSerial, vm.TCG)
	opts := qemu.JailOptions(&spec)
	opts.Without = layer.Set{layer.User: true, layer.Mounts: true, layer.Landlock: true}
	for _, n := range without {
		opts.Without[n] = true
	}
	var err error
	if spec.Jail, err = jail.Prepare(t.Context(), opts); err != nil {
		t.Fatal(err)
	}
	return spec
}

// wrapper makes a program that starts the real QEMU through a script.
func wrapper(t *testing.T, script string) string {
	t.Helper()
	real, err := exec.LookPath(qemu.Program)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(path, []byte("#!/bin/bash\nQEMU="+real+"\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// The fault of the system before this one: a filter that was asked for and never
// applied. Here QEMU runs, without its filter, and is not let go on.
func TestNoFilterNoStart(t *testing.T) {
	testenv.NeedVM(t)
	d := driver(t, wrapper(t, `
args=()
while [ $# -gt 0 ]; do
	if [ "$1" = -sandbox ]; then shift 2; else args+=("$1"); shift; fi
done
exec $QEMU "${args[@]}"
`))
	m, err := d.Start(t.Context(), script(t))
	if err == nil {
		m.Close()
		t.Fatal("a machine runs whose VMM has no filter")
	}
	if !strings.Contains(err.Error(), "seccomp") {
		t.Errorf("error %q does not name the layer", err)
	}
}

// What QEMU says when it gives up is in the error.
func TestQEMUGivesUp(t *testing.T) {
	testenv.NeedVM(t)
	for name, tt := range map[string]struct{ script, want string }{
		"complains": {`case "$1" in --version) exec $QEMU --version;; esac; echo "no such luck" >&2; exit 1`, "no such luck"},
		"silent":    {`case "$1" in --version) exec $QEMU --version;; esac; exit 3`, "status 3"},
		"killed":    {`case "$1" in --version) exec $QEMU --version;; esac; kill -9 $$`, "signal 9"},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := driver(t, wrapper(t, tt.script)).Start(t.Context(), script(t, layer.Processes, layer.Seccomp))
			if err == nil {
				m.Close()
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q does not say %q", err, tt.want)
			}
		})
	}
}

// A QEMU that never answers ends with the context.
func TestQEMUHangs(t *testing.T) {
	testenv.NeedVM(t)
	d := driver(t, wrapper(t, `case "$1" in --version) exec $QEMU --version;; esac; exec sleep 1000`))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if m, err := d.Start(ctx, script(t)); err == nil {
		m.Close()
		t.Fatal("started")
	} else if !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestNoQEMU(t *testing.T) {
	var absent *qemu.NotInstalledError
	if _, err := qemu.New(t.Context(), qemu.Options{Program: "/no/such/qemu"}); !errors.As(err, &absent) || absent.Hint() == "" {
		t.Error(err)
	}
	if _, err := qemu.New(t.Context(), qemu.Options{Program: "/bin/true"}); err == nil {
		t.Error("took /bin/true for QEMU")
	}
}
