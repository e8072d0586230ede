package filelock

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

func TestLockExcludes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	var wg sync.WaitGroup
	var inside, sum atomic.Int32 // the race detector does not know this lock
	for range 20 {
		wg.Go(func() {
			unlock, err := Lock(t.Context(), path)
			if err != nil {
				t.Error(err)
				return
			}
			defer unlock()
			if n := inside.Add(1); n != 1 {
				t.Errorf("%d inside", n)
			}
			sum.Add(1)
			inside.Add(-1)
		})
	}
	wg.Wait()
	if n := sum.Load(); n != 20 {
		t.Errorf("%d had the lock", n)
	}
}

// Who gives up leaves, and does not keep the lock when it comes.
func TestLockCancelled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := Lock(ctx, path); !errors.Is(err, cause) {
		t.Errorf("gave up with %v", err)
	}
	unlock()
	again, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	again()
}

func TestLockNowhere(t *testing.T) {
	if _, err := Lock(t.Context(), filepath.Join(t.TempDir(), "absent", "lock")); err == nil {
		t.Error("locked a file in a directory that is not there")
	}
}

func TestHolds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !Holds(f, path) {
		t.Error("a file that is there is not")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if Holds(f, path) {
		t.Error("a file that was removed is there")
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if Holds(f, path) {
		t.Error("one file was taken for another")
	}
}
