package template

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// names are the inputs "name" of the templates in the store, last used first.
func names(t *testing.T, s *Store) string {
	t.Helper()
	list, err := s.List(t.Context())
	check(t, err)
	var b []string
	for _, tpl := range list {
		name := tpl.Inputs["name"]
		if tpl.Damaged != "" {
			name = "damaged"
		}
		b = append(b, name)
	}
	return strings.Join(b, " ")
}

// used sets when a template was last used, in hours from now.
func used(t *testing.T, s *Store, id string, hours int) {
	t.Helper()
	at := time.Now().Add(time.Duration(hours) * time.Hour)
	check(t, os.Chtimes(filepath.Join(s.path(id), usedFile), at, at))
}

// each is about what a template of fill takes on the disk: 512 KiB and some blocks.
const each = 550 << 10

func TestEviction(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "s"), 3*each)
	a, aID := put(t, s, "a")
	_, bID := put(t, s, "b")
	_, cID := put(t, s, "c")
	used(t, s, aID, -3)
	used(t, s, bID, -2)
	used(t, s, cID, -1)
	if got := names(t, s); got != "c b a" {
		t.Errorf("have %s", got)
	}
	tpl, err := s.Get(t.Context(), a) // is used now
	check(t, err)
	check(t, tpl.Close())
	if time.Since(tpl.Used) > time.Minute {
		t.Errorf("used %v", tpl.Used)
	}
	used(t, s, aID, 0)
	put(t, s, "d")
	if got := names(t, s); got != "d a c" {
		t.Errorf("have %s", got)
	}
	// The new one stays, even if it alone is too large.
	s.limit = 1
	put(t, s, "e")
	if got := names(t, s); got != "e" {
		t.Errorf("have %s", got)
	}
}

// Holes count nothing: two templates of 1 MiB each fit into 1.2 MB.
func TestLimitCountsBlocks(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "s"), 2*each)
	put(t, s, "a")
	put(t, s, "b")
	if got := names(t, s); len(got) != 3 {
		t.Errorf("have %s", got)
	}
}

// One that its maker is about to return is not evicted.
func TestLockedIsNotEvicted(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "s"), 1)
	_, aID := put(t, s, "a")
	unlock, ok := s.tryLock(aID)
	if !ok {
		t.Fatal("locked")
	}
	put(t, s, "b")
	if removed, _, err := s.Prune(t.Context(), true); err != nil || len(removed) != 1 {
		t.Errorf("%v, %v", removed, err)
	}
	if got := names(t, s); got != "a" {
		t.Errorf("have %s", got)
	}
	unlock()
	put(t, s, "b")
	if got := names(t, s); got != "b" {
		t.Errorf("have %s", got)
	}
}

// Where the clock was set back, only the order of eviction is not right.
func TestClockSetBack(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "s"), 2*each)
	a, aID := put(t, s, "a")
	_, bID := put(t, s, "b")
	used(t, s, aID, 1000000)
	used(t, s, bID, 24)
	far := time.Now().Add(1000 * time.Hour)
	for _, name := range []string{MemoryFile, StateFile, manifestFile, "."} {
		check(t, os.Chtimes(filepath.Join(s.path(aID), name), far, far))
	}
	check(t, os.Remove(filepath.Join(s.path(bID), usedFile)))
	for range 2 {
		tpl, err := s.Get(t.Context(), a)
		check(t, err)
		check(t, tpl.Close())
	}
	used(t, s, aID, 1000000)
	put(t, s, "c")
	if got := names(t, s); got != "a c" {
		t.Errorf("have %s", got)
	}
}

func TestRemove(t *testing.T) {
	s := testStore(t)
	if _, err := s.Remove(t.Context(), "0000"); !errors.Is(err, ErrNotFound) {
		t.Errorf("from nowhere: %v", err)
	}
	_, a := put(t, s, "a")
	_, b := put(t, s, "b")
	for _, bad := range []string{"", "abc", "../x", "ABCD", a + "0", "abc*", "abcd/"} {
		if _, err := s.Remove(t.Context(), bad); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("remove %q: %v", bad, err)
		}
	}
	// A twin of a, damaged as it is, is meant as well.
	twin := a[:6] + strings.Repeat("0", idDigits-6)
	check(t, os.Mkdir(s.path(twin), 0o700))
	if _, err := s.Remove(t.Context(), a[:6]); err == nil || !strings.Contains(err.Error(), a) || !strings.Contains(err.Error(), twin) {
		t.Errorf("%v", err)
	}
	for _, id := range []string{a, twin, b} {
		if got, err := s.Remove(t.Context(), id[:7]); err != nil || got != id {
			t.Errorf("removed %s, %v", got, err)
		}
		if _, err := s.Remove(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("again: %v", err)
		}
	}
	if left := tree(t, s); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

func TestPrune(t *testing.T) {
	s := testStore(t)
	if removed, freed, err := s.Prune(t.Context(), true); err != nil || removed != nil || freed != 0 {
		t.Errorf("nowhere: %v, %d, %v", removed, freed, err)
	}
	if _, err := os.Lstat(s.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("pruning made the store: %v", err)
	}
	_, a := put(t, s, "a")
	_, b := put(t, s, "b")
	_, c := put(t, s, "c")
	used(t, s, a, -2)
	used(t, s, c, -1)
	check(t, os.Truncate(filepath.Join(s.path(b), StateFile), 1))
	if got := names(t, s); got != "damaged c a" {
		t.Errorf("have %s", got)
	}
	removed, freed, err := s.Prune(t.Context(), false)
	if err != nil || !slices.Equal(removed, []string{b}) || freed < 512<<10 || freed > each {
		t.Errorf("%v, %d, %v", removed, freed, err)
	}
	s.limit = each
	removed, freed, err = s.Prune(t.Context(), false)
	if err != nil || !slices.Equal(removed, []string{a}) || freed < 512<<10 || freed > each {
		t.Errorf("%v, %d, %v", removed, freed, err)
	}
	// What is not ours to know stays.
	check(t, os.WriteFile(filepath.Join(s.templates(), "note"), nil, 0o600))
	check(t, os.RemoveAll(s.locks()))
	removed, _, err = s.Prune(t.Context(), true)
	if err != nil || !slices.Equal(removed, []string{c}) {
		t.Errorf("%v, %v", removed, err)
	}
	if left := tree(t, s); left != "templates/note\n" {
		t.Errorf("left:\n%s", left)
	}
}

// mount mounts a tmpfs of this many bytes.
func mount(t *testing.T, size int) string {
	t.Helper()
	testenv.NeedRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		testenv.Skip(t, "mounts a tmpfs: "+err.Error())
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v (a descriptor is open)", err)
		}
	})
	return dir
}

// However little room there is, Make says so and leaves nothing; with enough it
// works.
func TestFullDisk(t *testing.T) {
	dir := mount(t, 560<<10)
	filler := filepath.Join(dir, "filler")
	s := Open(filepath.Join(dir, "s"), 0)
	in := Inputs{"name": "a", "long": strings.Repeat("x", 20000)}
	made := false
	for free := 0; free <= 560; free += 4 {
		check(t, os.WriteFile(filler, nil, 0o600))
		check(t, os.WriteFile(filler, make([]byte, (560-free)<<10), 0o600))
		tpl, err := s.Make(t.Context(), in, fill)
		if err == nil {
			made = true
			check(t, tpl.Close())
			check(t, os.Truncate(filler, 0))
			tpl, err = s.Get(t.Context(), in)
			check(t, err)
			check(t, tpl.Close())
			_, err = s.Remove(t.Context(), in.ID())
			check(t, err)
			continue
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%d KiB free: %v", free, err)
		}
		if _, err := s.Get(t.Context(), in); !errors.Is(err, ErrNotFound) {
			t.Errorf("%d KiB free: %v", free, err)
		}
		if _, err := os.Lstat(s.dir); err == nil {
			if left := tree(t, s); left != "" {
				t.Fatalf("%d KiB free, left:\n%s", free, left)
			}
		}
	}
	if !made {
		t.Error("never made")
	}
}

// A store that cannot be written is read; Make says so before the work.
func TestReadOnly(t *testing.T) {
	dir := mount(t, 16<<20)
	s := Open(filepath.Join(dir, "s"), 0)
	a, aID := put(t, s, "a")
	b, bID := put(t, s, "b")
	check(t, os.Remove(filepath.Join(s.path(aID), memoFile))) // verified each time
	flip(t, filepath.Join(s.path(bID), StateFile))
	check(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	for range 2 {
		tpl, err := s.Get(t.Context(), a)
		check(t, err)
		check(t, tpl.Close())
		if _, err := s.Get(t.Context(), b); !isDamaged(err) || !errors.Is(err, unix.EROFS) {
			t.Errorf("%v", err)
		}
	}
	if got := names(t, s); len(got) != 3 {
		t.Errorf("have %s", got)
	}
	if _, err := s.Make(t.Context(), Inputs{"name": "c"}, mustNotFill); !errors.Is(err, unix.EROFS) {
		t.Errorf("make: %v", err)
	}
	if _, err := Open(filepath.Join(dir, "absent"), 0).Make(t.Context(), a, mustNotFill); !errors.Is(err, unix.EROFS) {
		t.Errorf("make anew: %v", err)
	}
	if _, err := s.Remove(t.Context(), aID); !errors.Is(err, unix.EROFS) {
		t.Errorf("remove: %v", err)
	}
	if _, _, err := s.Prune(t.Context(), true); !errors.Is(err, unix.EROFS) {
		t.Errorf("prune: %v", err)
	}
}

func TestCancelledCalls(t *testing.T) {
	s := testStore(t)
	_, id := put(t, s, "a")
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	_, listErr := s.List(ctx)
	_, removeErr := s.Remove(ctx, id)
	_, _, pruneErr := s.Prune(ctx, true)
	for _, err := range []error{listErr, removeErr, pruneErr} {
		if !errors.Is(err, cause) {
			t.Errorf("%v", err)
		}
	}
	if got := names(t, s); got != "a" {
		t.Errorf("have %s", got)
	}
}
