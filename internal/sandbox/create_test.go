package sandbox

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/image"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/state"
	"github.com/ironclaw-run/ironclaw/internal/vm"
	"github.com/ironclaw-run/ironclaw/internal/vm/fakevm"
)

// recorder is a driver that keeps what it was asked for and gave.
type recorder struct {
	fakevm.Driver
	before func() // called at the beginning of Start
	err    error  // of Start

	mu       sync.Mutex // guards the rest
	specs    []vm.Spec
	machines []vm.Machine
}

func (r *recorder) Start(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	if r.before != nil {
		r.before()
	}
	if r.err != nil {
		return nil, r.err
	}
	m, err := r.Driver.Start(ctx, spec)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.specs = append(r.specs, spec)
	if err == nil {
		r.machines = append(r.machines, m)
	}
	return m, err
}

// newHost is a host with a kernel and the image "base" whose machines are fakes
// in which guest runs.
func newHost(t *testing.T, guest func(link.Guest)) (*Host, *recorder) {
	t.Helper()
	h := Open(t.TempDir())
	d := &recorder{Driver: fakevm.Driver{Guest: guest}}
	h.driver, h.agent = d, []byte("\x7fELF agent")
	writeImage(t, h)
	writeKernel(t, h)
	return h, d
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// writeImage puts the least that passes for an ext4 disk into the store.
func writeImage(t *testing.T, h *Host) {
	t.Helper()
	disk := make([]byte, 4096)
	binary.LittleEndian.PutUint32(disk[1024+4:], 4)         // blocks, of 1 KiB
	binary.LittleEndian.PutUint16(disk[1024+0x38:], 0xef53) // magic
	sum := fmt.Sprintf("%x", sha256.Sum256(disk))
	record, err := json.Marshal(map[string]any{"version": 1, "name": DefaultImage, "digest": "sha256:" + sum, "size": len(disk)})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(h.Home, "images/disks", sum), disk)
	write(t, filepath.Join(h.Home, "images/names", DefaultImage+".json"), record)
}

func kernelDir(h *Host) string { return filepath.Join(h.Home, "kernels/packages/x") }

// writeKernel installs a kernel into which all modules are built.
func writeKernel(t *testing.T, h *Host) {
	t.Helper()
	var builtin strings.Builder
	for _, m := range modulesFor(vm.LinkSerial) {
		fmt.Fprintf(&builtin, "kernel/%s.ko\n", m)
	}
	write(t, filepath.Join(kernelDir(h), "lib/modules/9.8.7/modules.builtin"), []byte(builtin.String()))
	write(t, filepath.Join(kernelDir(h), "vmlinux"), []byte("vmlinux"))
	write(t, filepath.Join(kernelDir(h), "manifest.json"), []byte(`{"version":1,"release":"9.8.7","source":"test",`+
		`"digest":"d","modules":"lib/modules/9.8.7","files":[{"path":"vmlinux","size":7}]}`))
	if err := os.Symlink("packages/x", filepath.Join(h.Home, "kernels/current")); err != nil {
		t.Fatal(err)
	}
}

func testSpec(t *testing.T) vm.Spec {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, []byte("x"))
	return vm.Spec{ID: "test", Kernel: file, Initrd: file, Root: file}
}

// pingAndExec serves an operation as the agent does.
func pingAndExec(g *guestEnd) {
	h, err := g.ReadHeader()
	if err != nil {
		return
	}
	if h.Op == guestrpc.OpExec {
		g.play("< started {\"pid\":1}\n< stdout hello\n< exit {\"code\":3}")
		return
	}
	for f, err := g.ReadFrame(); err == nil && len(f.Payload) > 0; f, err = g.ReadFrame() {
		g.send("data", string(f.Payload))
	}
}

// wantNothingLeft checks that of all sandboxes nothing remains: no record, no
// machine, no descriptor, no hold on the image.
func wantNothingLeft(t *testing.T, h *Host, d *recorder) {
	t.Helper()
	if records, err := h.state.List(); len(records) > 0 || err != nil {
		t.Errorf("records %+v, %v", records, err)
	}
	for _, m := range d.machines {
		select {
		case <-m.Done():
		default:
			t.Error("a machine is running")
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, h.Home) {
			t.Errorf("%s is open", to)
		}
	}
	if err := h.Images.Remove(t.Context(), DefaultImage); errors.Is(err, image.ErrInUse) {
		t.Error(err)
	}
}

func TestCreate(t *testing.T) {
	h, d := newHost(t, agent(t, pingAndExec))
	var phases []string
	s, err := h.Create(t.Context(), Options{Name: "one", Command: []string{"true"}, OnPhase: func(p Phase) {
		phases = append(phases, p.Name)
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	records, err := h.state.List()
	if err != nil || len(records) != 1 || records[0].ID != s.ID() || records[0].Name != "one" || records[0].Owner.PID != os.Getpid() {
		t.Errorf("records %+v, %v", records, err)
	}
	if err := h.Images.Remove(t.Context(), DefaultImage); !errors.Is(err, image.ErrInUse) {
		t.Errorf("the image of a running sandbox was removed: %v", err)
	}
	wantSpec(t, h, s, d.specs[0])
	if got := strings.Join(phases, " "); got != "reserve jail image kernel driver template vmm boot" || s.Hello().Kernel != "9.8.7" {
		t.Errorf("phases %q, hello %+v", got, s.Hello())
	}
	if err := s.Ping(t.Context(), []byte("hello")); err != nil {
		t.Error(err)
	}
	var stdout bytes.Buffer
	p, err := s.Start(t.Context(), Cmd{Args: []string{"x"}, Stdout: &stdout})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(t.Context()); err != nil || exit.Code != 3 || stdout.String() != "hello" {
		t.Errorf("%+v, %q, %v", exit, &stdout, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wantNothingLeft(t, h, d)
}

func wantSpec(t *testing.T, h *Host, s *Sandbox, spec vm.Spec) {
	t.Helper()
	if spec.ID != s.ID() || spec.Memory != vm.DefaultMemory || spec.Accel != vm.TCG || spec.Link != vm.LinkSerial ||
		spec.Root != s.Image().Path || spec.Kernel != s.Kernel().ELF {
		t.Errorf("spec %+v", spec)
	}
	if st, err := os.Stat(spec.Initrd); err != nil || st.Size() == 0 || !strings.HasPrefix(spec.Initrd, h.Home) {
		t.Errorf("initramfs %s: %v", spec.Initrd, err)
	}
	if n, err := h.InitramfsSize(t.Context(), s); err != nil || n == 0 {
		t.Errorf("its size: %d, %v", n, err)
	}
}

// Close may be called by whoever sees the end first, and returns when it is the
// end.
func TestCloseConcurrently(t *testing.T) {
	h, d := newHost(t, agent(t, pingAndExec))
	s, err := h.Create(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			s.Close()
			select {
			case <-s.Machine().Done():
			default:
				t.Error("Close returned before the end")
			}
			if records, _ := h.state.List(); len(records) > 0 {
				t.Error("Close returned before the record was gone")
			}
		})
	}
	wg.Wait()
	wantNothingLeft(t, h, d)
	if _, err := s.Start(t.Context(), Cmd{Args: []string{"x"}}); !errors.Is(err, link.ErrClosed) {
		t.Errorf("start after Close: %v", err)
	}
}

// At whichever step it fails, nothing remains.
func TestCreateUndo(t *testing.T) {
	mute := func(l link.Guest) { l.Listen(guestrpc.PortHello) }
	for _, c := range []struct {
		name    string
		breakIt func(t *testing.T, h *Host, d *recorder)
		opts    Options
		want    string
	}{
		{"options", nil, Options{Name: "A"}, "bad name"},
		{"reserve", func(t *testing.T, h *Host, _ *recorder) { write(t, filepath.Join(h.Home, "run"), nil) }, Options{}, "not a directory"},
		{"image absent", nil, Options{Image: "nosuch"}, "no such image"},
		{"image damaged", damageImage, Options{}, "damaged"},
		{"kernel absent", nil, Options{Kernel: "/nonexistent"}, "/nonexistent"},
		{"kernel damaged", func(t *testing.T, h *Host, _ *recorder) { write(t, kernelDir(h)+"/vmlinux", nil) }, Options{}, "install it again"},
		{"driver", nil, Options{Driver: "bochs"}, "unknown driver"},
		{"link", nil, Options{Link: "pigeon"}, "unknown link"},
		{"accelerator", nil, Options{Accel: "warp"}, "unknown accelerator"},
		{"KVM", nil, Options{Accel: "kvm"}, "KVM does not work here"},
		{"agent", func(_ *testing.T, h *Host, _ *recorder) { h.agent = []byte("x") }, Options{}, "guest agent"},
		{"modules", func(t *testing.T, h *Host, _ *recorder) {
			write(t, kernelDir(h)+"/lib/modules/9.8.7/modules.builtin", nil)
		}, Options{}, "virtio_mmio"},
		{"vmm", func(_ *testing.T, _ *Host, d *recorder) { d.err = errors.New("no fuel") }, Options{}, "no fuel"},
		{"spec", nil, Options{Memory: 1 << 20}, "memory of 1048576 bytes"},
		{"negative memory", nil, Options{Memory: -1 << 20}, "memory"},
		{"guest shuts down", func(_ *testing.T, _ *Host, d *recorder) { d.Guest = mute }, Options{}, "the guest shut down"},
		{"guest lies", func(t *testing.T, _ *Host, d *recorder) { d.Guest = liar(t) }, Options{}, errGuestProtocol.Error()},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, d := newHost(t, agent(t, pingAndExec))
			if c.breakIt != nil {
				c.breakIt(t, h, d)
			}
			s, err := h.Create(t.Context(), c.opts)
			if err == nil {
				s.Close()
				t.Fatal("created")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %q, want %q", err, c.want)
			}
			if c.name != "reserve" {
				wantNothingLeft(t, h, d)
			}
		})
	}
}

func damageImage(t *testing.T, h *Host, _ *recorder) {
	disks, err := filepath.Glob(filepath.Join(h.Home, "images/disks/*"))
	if err != nil || len(disks) != 1 {
		t.Fatal(disks, err)
	}
	write(t, disks[0], nil)
}

// liar answers hello with another nonce.
func liar(t *testing.T) func(link.Guest) {
	return func(l link.Guest) {
		listener, err := l.Listen(guestrpc.PortHello)
		if err != nil {
			return
		}
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		g := &guestEnd{t, conn, guestrpc.NewStream(conn)}
		g.ReadHeader()
		g.play(`< hello {"version":2,"nonce":"x"}`)
		_, _ = listener.Accept() // stay until the machine is closed
	}
}

// A caller that loses patience, at whichever step, finds nothing left.
func TestCreateCancelled(t *testing.T) {
	cause := errors.New("enough")
	for _, step := range []string{"before", "vmm", "boot"} {
		t.Run(step, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			h, d := newHost(t, func(l link.Guest) {
				listener, err := l.Listen(guestrpc.PortHello)
				if err != nil {
					return
				}
				if conn, err := listener.Accept(); err == nil {
					cancel(cause) // it came up, and now says nothing
					_, _ = io.Copy(io.Discard, conn)
				}
			})
			switch step {
			case "before":
				cancel(cause)
			case "vmm":
				d.before = func() { cancel(cause) }
			}
			if _, err := h.Create(ctx, Options{}); !errors.Is(err, cause) {
				t.Errorf("create: %v", err)
			}
			wantNothingLeft(t, h, d)
		})
	}
}

// The name of a sandbox is its own as long as it exists, and no longer.
func TestNameInUse(t *testing.T) {
	h, d := newHost(t, agent(t, pingAndExec))
	s, err := h.Create(t.Context(), Options{Name: "one"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, name := range []string{"one", s.ID()} {
		if _, err := h.Create(t.Context(), Options{Name: name}); !errors.Is(err, state.ErrNameInUse) {
			t.Errorf("create %q again: %v", name, err)
		}
	}
	if cleaned, err := h.Reconcile(); len(cleaned) > 0 || err != nil {
		t.Errorf("a running sandbox was removed: %v, %v", cleaned, err)
	}
	s.Close()
	if s, err = h.Create(t.Context(), Options{Name: "one"}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	wantNothingLeft(t, h, d)
}

// The machine's name for itself is the sandbox's, or else its id.
func TestHostname(t *testing.T) {
	for _, name := range []string{"one", ""} {
		told := make(chan string, 1)
		h, _ := newHost(t, func(l link.Guest) {
			listener, err := l.Listen(guestrpc.PortHello)
			if err != nil {
				return
			}
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			told <- helloOf(t, &guestEnd{t, conn, guestrpc.NewStream(conn)}).Hostname
		})
		_, err := h.Create(t.Context(), Options{Name: name})
		if _, ok := errors.AsType[*vm.ExitError](err); !ok {
			t.Errorf("a guest that leaves after hello: %v", err)
		}
		if got := <-told; name != "" && got != name || !vm.ValidID(got) {
			t.Errorf("sandbox %q has the host name %q", name, got)
		}
	}
}

// A kernel named by the user is refused before anything long is begun.
func TestKernelBeforeImage(t *testing.T) {
	h, d := newHost(t, agent(t, pingAndExec))
	_, err := h.Create(t.Context(), Options{Kernel: "/nonexistent", Image: "nosuch"})
	if err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("create: %v", err)
	}
	wantNothingLeft(t, h, d)
}

// Two at once share a host and nothing else.
func TestCreateManyAtOnce(t *testing.T) {
	h, d := newHost(t, agent(t, pingAndExec))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			s, err := h.Create(ctx, Options{})
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			if err := s.Ping(ctx, []byte("hello")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	wantNothingLeft(t, h, d)
}
