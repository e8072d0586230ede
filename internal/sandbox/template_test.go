package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ironclaw-run/ironclaw/internal/vm"
	"github.com/ironclaw-run/ironclaw/internal/vm/fakevm"
)

// saver is a driver whose machines can be saved: to a word. Its machines that are
// started from one are as new.
type saver struct {
	fakevm.Driver
	inputs   map[string]string
	saveErr  error // of Save
	cloneErr error // of a Start from a snapshot

	mu     sync.Mutex // guards starts
	starts []string   // "save", "clone" or "boot"
}

func (d *saver) Features() vm.Features {
	f := d.Driver.Features()
	f.Snapshots = []vm.Mode{{Accel: vm.TCG, Link: vm.LinkSerial}}
	return f
}

func (d *saver) SnapshotInputs(vm.Spec) (map[string]string, error) {
	inputs := map[string]string{"driver": "saver"}
	for k, v := range d.inputs {
		inputs[k] = v
	}
	return inputs, nil
}

func (d *saver) Start(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	how := "boot"
	switch {
	case spec.Saveable:
		how = "save"
	case spec.From != nil:
		how = "clone"
	}
	d.mu.Lock()
	d.starts = append(d.starts, how)
	d.mu.Unlock()
	if how == "clone" && d.cloneErr != nil {
		return nil, d.cloneErr
	}
	spec.Saveable, spec.From = false, nil
	m, err := d.Driver.Start(ctx, spec)
	if err != nil {
		return nil, err
	}
	return &savedMachine{m, d, how == "clone"}, nil
}

type savedMachine struct {
	vm.Machine
	d      *saver
	cloned bool
}

func (m *savedMachine) Info() vm.Info {
	info := m.Machine.Info()
	info.Cloned = m.cloned
	return info
}

func (m *savedMachine) Save(_ context.Context, s vm.Snapshot) error {
	defer m.Close()
	if m.d.saveErr != nil {
		return m.d.saveErr
	}
	_, err := s.Memory.WriteString("memory")
	_, err2 := s.State.WriteString("state")
	return errors.Join(err, err2)
}

// newSaver is newHost with a driver that can save.
func newSaver(t *testing.T) (*Host, *saver) {
	h, _ := newHost(t, nil)
	d := &saver{Driver: fakevm.Driver{Guest: agent(t, pingAndExec)}}
	h.driver = d
	return h, d
}

// create makes and closes a sandbox and returns how machines were started, and
// what was noted.
func (d *saver) create(t *testing.T, h *Host, opts Options) (starts []string, notes string) {
	t.Helper()
	d.starts = nil
	var said []string
	opts.Note = func(what string) { said = append(said, what) }
	s, err := h.Create(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Ping(t.Context(), []byte("x")); err != nil {
		t.Error(err)
	}
	s.Close()
	return d.starts, strings.Join(said, "\n")
}

func wantStarts(t *testing.T, got []string, want ...string) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("machines were started (-want +got):\n%s", d)
	}
}

var wrongState = &vm.SnapshotError{Err: errors.New("wrong state")}

// The first machine of a kind makes a template, all others start from it, and
// one that differs in anything does not.
func TestTemplate(t *testing.T) {
	h, d := newSaver(t)
	starts, notes := d.create(t, h, Options{})
	wantStarts(t, starts, "save", "clone")
	if notes != "" {
		t.Errorf("noted %q", notes)
	}
	starts, _ = d.create(t, h, Options{Name: "other", Pids: 5, Overlay: 1 << 20}) // what hello brings
	wantStarts(t, starts, "clone")
	starts, _ = d.create(t, h, Options{Cold: true})
	wantStarts(t, starts, "boot")
	for name, opts := range map[string]Options{
		"cpus": {CPUs: 2}, "memory": {Memory: 512 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			starts, _ := d.create(t, h, opts)
			wantStarts(t, starts, "save", "clone")
		})
	}
	d.inputs = map[string]string{"qemu": "another"}
	starts, _ = d.create(t, h, Options{})
	wantStarts(t, starts, "save", "clone")
	list, err := h.Templates.List(t.Context())
	if err != nil || len(list) != 4 {
		t.Errorf("%d templates, %v", len(list), err)
	}
	if dir, _ := os.ReadDir(filepath.Join(h.Home, "run")); len(dir) > 1 {
		t.Errorf("left: %v", dir)
	}
}

// Whatever is wrong with templates, the machine comes up, and why it took longer
// is noted.
func TestTemplateFallback(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(t *testing.T, h *Host, d *saver)
		starts []string
		note   string
	}{
		"cannot be saved": {func(_ *testing.T, _ *Host, d *saver) { d.saveErr = errors.New("no space") },
			[]string{"save", "boot"}, "no space"},
		"does not start": {func(_ *testing.T, _ *Host, d *saver) { d.cloneErr = wrongState },
			[]string{"save", "clone", "boot"}, "wrong state"},
		"no directory": {func(t *testing.T, h *Host, _ *saver) { write(t, filepath.Join(h.Home, "templates"), nil) },
			[]string{"boot"}, "not a directory"},
		"damaged": {func(t *testing.T, h *Host, d *saver) {
			d.create(t, h, Options{})
			files, _ := filepath.Glob(filepath.Join(h.Home, "templates/templates/*/memory"))
			if len(files) != 1 {
				t.Fatalf("files %v", files)
			}
			write(t, files[0], []byte("MEMORY"))
		}, []string{"save", "clone"}, "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			h, d := newSaver(t)
			c.damage(t, h, d)
			starts, notes := d.create(t, h, Options{})
			wantStarts(t, starts, c.starts...)
			if !strings.Contains(notes, c.note) {
				t.Errorf("noted %q, want %q", notes, c.note)
			}
		})
	}
}

// A template from which no machine starts is not kept for the next.
func TestTemplateThatDoesNotStart(t *testing.T) {
	h, d := newSaver(t)
	d.cloneErr = wrongState
	d.create(t, h, Options{})
	if list, err := h.Templates.List(t.Context()); len(list) > 0 || err != nil {
		t.Errorf("kept: %d, %v", len(list), err)
	}
	d.cloneErr = nil
	starts, _ := d.create(t, h, Options{})
	wantStarts(t, starts, "save", "clone")
}

// A host that has run out of something for a moment loses no template.
func TestTemplateIsNotBlamed(t *testing.T) {
	h, d := newSaver(t)
	d.create(t, h, Options{})
	d.cloneErr = syscall.EMFILE
	if s, err := h.Create(t.Context(), Options{}); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("%v, %v", s, err)
	}
	if list, err := h.Templates.List(t.Context()); len(list) != 1 || err != nil {
		t.Errorf("kept: %d, %v", len(list), err)
	}
}

// Two that want the same template make it once.
func TestTemplateOnce(t *testing.T) {
	h, d := newSaver(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			s, err := h.Create(t.Context(), Options{})
			if err != nil {
				t.Error(err)
				return
			}
			s.Close()
		})
	}
	wg.Wait()
	saves := slices.DeleteFunc(d.starts, func(how string) bool { return how != "save" })
	if len(saves) != 1 {
		t.Errorf("the template was made %d times", len(saves))
	}
}

// Who waits for a template and loses patience gets an error, no machine.
func TestTemplateCancelled(t *testing.T) {
	h, d := newSaver(t)
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	opts := Options{Progress: func(step string) {
		if strings.Contains(step, "template") {
			cancel(enough)
		}
	}}
	if s, err := h.Create(ctx, opts); !errors.Is(err, enough) {
		t.Errorf("%v, %v", s, err)
	}
	if slices.Contains(d.starts, "boot") {
		t.Errorf("machines were started: %v", d.starts)
	}
}

// A pool hands out sandboxes that have run something already.
func TestPool(t *testing.T) {
	h, _ := newSaver(t)
	if _, err := h.NewPool(PoolOptions{Size: 1, Sandbox: Options{Name: "one"}}); err == nil {
		t.Error("a pool of one name")
	}
	p, err := h.NewPool(PoolOptions{Size: 2, CPU: 100, OnError: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	seen := make(map[string]bool)
	for range 5 {
		s, err := p.Get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if seen[s.ID()] {
			t.Errorf("%s was handed out twice", s.ID())
		}
		seen[s.ID()] = true
		if err := s.Ping(t.Context(), []byte("x")); err != nil {
			t.Error(err)
		}
		s.Close()
	}
	p.Close()
	if records, err := h.state.List(); len(records) > 0 || err != nil {
		t.Errorf("left: %+v, %v", records, err)
	}
}
