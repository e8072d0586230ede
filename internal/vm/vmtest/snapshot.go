package vmtest

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// saves reports whether the driver can save the machine that c.Spec describes. A
// driver that cannot has to say so.
func saves(t *testing.T, c Config) bool {
	t.Helper()
	spec := c.Spec(t)
	f := c.Driver.Features()
	if err := spec.Validate(f); err != nil {
		t.Fatal(err)
	}
	_, err := c.Driver.SnapshotInputs(spec)
	if slices.Contains(f.Snapshots, vm.Mode{Accel: spec.Accel, Link: spec.Link}) {
		if err != nil {
			t.Fatal(err)
		}
		return true
	}
	if !errors.Is(err, vm.ErrNoSnapshots) {
		t.Errorf("what a snapshot depends on: %v", err)
	}
	spec.Saveable = true
	if m, err := c.Driver.Start(t.Context(), spec); !errors.Is(err, vm.ErrNoSnapshots) {
		t.Errorf("start of a machine to be saved: %v", err)
		if err == nil {
			m.Close()
		}
	}
	return false
}

// save boots a machine and saves it.
func save(t *testing.T, c Config) vm.Snapshot {
	t.Helper()
	spec := c.Spec(t)
	spec.Saveable = true
	m, err := c.Driver.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	s := files(t)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if err := m.Save(ctx, s); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.Done():
	default:
		t.Error("a saved machine lives on")
	}
	return s
}

func files(t *testing.T) vm.Snapshot {
	t.Helper()
	dir := t.TempDir()
	open := func(name string) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	return vm.Snapshot{Memory: open("memory"), State: open("state")}
}

func sum(t *testing.T, f *os.File) [sha256.Size]byte {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<40)); err != nil {
		t.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// Machines that are started from one snapshot, at the same time and after each
// other, all answer, and none of them changes it.
func testSnapshot(t *testing.T, c Config) {
	if !saves(t, c) {
		return
	}
	s := save(t, c)
	memory, state := sum(t, s.Memory), sum(t, s.State)
	clone := func() (vm.Machine, []byte) {
		spec := c.Spec(t)
		spec.From = &s
		m, err := c.Driver.Start(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m, hello(t, m)
	}
	var wg sync.WaitGroup
	for range 3 {
		m, secret := clone()
		if info := m.Info(); !info.Cloned || info.Running == 0 || info.Running > time.Since(info.Started) {
			t.Errorf("a clone says %+v", info)
		}
		wg.Go(func() {
			if err := ping(dial(t, m, guestrpc.PortAgent), secret, 1<<20); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	m, secret := clone()
	if err := ping(dial(t, m, guestrpc.PortAgent), secret, 1<<10); err != nil {
		t.Error(err)
	}
	if memory != sum(t, s.Memory) || state != sum(t, s.State) {
		t.Error("a clone has changed the snapshot")
	}
}

// A snapshot that is cut short, or of nothing, starts no machine, and says so in
// bounded time.
func testSnapshotDamaged(t *testing.T, c Config) {
	if !saves(t, c) {
		return
	}
	s := save(t, c)
	st, err := s.State.Stat()
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{st.Size() / 2, 100, 0} {
		if err := s.State.Truncate(size); err != nil {
			t.Fatal(err)
		}
		spec := c.Spec(t)
		spec.From = &s
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		m, err := c.Driver.Start(ctx, spec)
		var fault *vm.SnapshotError
		if err == nil {
			m.Close()
			t.Errorf("a machine was started from %d bytes of its state", size)
		} else if !errors.As(err, &fault) {
			t.Errorf("%d bytes of its state: %v", size, err)
		}
		if ctx.Err() != nil {
			t.Errorf("a state of %d bytes is waited for: %v", size, err)
		}
		cancel()
	}
}

// A call that is cancelled returns, and the machine has ended.
func testSaveCancelled(t *testing.T, c Config) {
	if !saves(t, c) {
		return
	}
	spec := c.Spec(t)
	spec.Saveable = true
	m, err := c.Driver.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(enough)
	if err := m.Save(ctx, files(t)); !errors.Is(err, enough) {
		t.Errorf("save: %v", err)
	}
	select {
	case <-m.Done():
	default:
		t.Error("the machine lives on")
	}
}

// A machine that was not started for it is not saved, and goes on.
func testSaveUnprepared(t *testing.T, c Config) {
	m := start(t, c)
	if err := m.Save(t.Context(), files(t)); err == nil {
		t.Error("a machine was saved that was not started for it")
	}
	secret := hello(t, m)
	if err := ping(dial(t, m, guestrpc.PortAgent), secret, 1<<10); err != nil {
		t.Error(err)
	}
}
