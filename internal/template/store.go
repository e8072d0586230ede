package template

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/filelock"
)

// Store is a directory of templates. Safe for concurrent use, by many processes.
//
//	templates/<id>/    memory, state, manifest.json, used, verified
//	templates/.gone-*  one on its way out
//	making/<id>/       one that is being made
//	locks/<id>         held by its maker, until it is in place; never removed, so
//	                   that all who wait for it wait for the same file
//	lock               held for moments, while templates come and go
//
// Who takes both kinds of locks takes that of the template first, or only tries it.
type Store struct {
	dir   string
	limit int64
	step  func(name string) // a seam for tests: called before each step
}

// Open is the store in dir, whose templates together may take limit bytes on the
// disk (blocks, not lengths); 0 is DefaultLimit. Nothing is made until a template
// is.
func Open(dir string, limit int64) *Store {
	if limit <= 0 {
		limit = DefaultLimit
	}
	return &Store{dir: dir, limit: limit, step: func(string) {}}
}

const gonePrefix = ".gone-"

func (s *Store) templates() string           { return filepath.Join(s.dir, "templates") }
func (s *Store) makings() string             { return filepath.Join(s.dir, "making") }
func (s *Store) locks() string               { return filepath.Join(s.dir, "locks") }
func (s *Store) path(id string) string       { return filepath.Join(s.templates(), id) }
func (s *Store) makingPath(id string) string { return filepath.Join(s.makings(), id) }
func (s *Store) lockPath(id string) string   { return filepath.Join(s.locks(), id) }

// check says whether the store is ours: in a directory that others can write they
// could put one template in the place of another. It returns fs.ErrNotExist or
// *DamagedError.
func (s *Store) check() error {
	// The store itself may be reached through a link.
	dir, err := openTrusted(nil, s.dir+"/.", unix.S_IFDIR)
	if err != nil {
		return err
	}
	defer dir.Close()
	sub, err := openTrusted(dir, "templates", unix.S_IFDIR)
	if err != nil {
		return err
	}
	return sub.Close()
}

// lock holds the store while templates come and go.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("lock templates: %w", context.Cause(ctx))
	}
	unlock, err = filelock.Lock(ctx, filepath.Join(s.dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("lock templates: %w", err)
	}
	return unlock, nil
}

// tryLock takes the lock of the template id if nobody has it. A maker has.
func (s *Store) tryLock(id string) (unlock func(), ok bool) {
	if err := os.MkdirAll(s.locks(), 0o700); err != nil {
		return nil, false
	}
	f, err := os.OpenFile(s.lockPath(id), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, false
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, false
	}
	return func() { f.Close() }, true
}

// Get opens the template of exactly these inputs. The first Get since the host
// booted reads all of it, later ones look at the sizes, times and inodes of its
// files.
//
// It returns ErrNotFound if there is none, and *DamagedError if there was one that
// may not be used. That one is removed if it is ours, so that Make can make it; if
// it could not be, the error also says why. When ctx ends it returns
// context.Cause(ctx).
func (s *Store) Get(ctx context.Context, in Inputs) (*Template, error) {
	t, err := s.get(ctx, in)
	if err != nil {
		return nil, fmt.Errorf("template %s: %w", in.ID(), err)
	}
	return t, nil
}

func (s *Store) get(ctx context.Context, in Inputs) (*Template, error) {
	if err := s.check(); errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotFound
	} else if err != nil {
		return nil, err
	}
	id := in.ID()
	t, err := open(ctx, s.path(id), in)
	if isDamaged(err) {
		s.step("damaged")
		unlock, lockErr := s.lock(ctx)
		if lockErr == nil {
			defer unlock()
		}
		// Again: one that was being removed looked damaged, under the lock none is.
		if t, err = open(ctx, s.path(id), in); isDamaged(err) {
			if lockErr == nil {
				lockErr = s.discard(id)
			}
			return nil, errors.Join(err, lockErr)
		}
	}
	if err != nil {
		return nil, err
	}
	touch(s.path(id))
	t.Used = usedTime(s.path(id), t.Created)
	return t, nil
}

// discard takes the template away: its name at once, so that nobody finds half of
// it, then its files. The caller holds the lock of the store.
func (s *Store) discard(id string) error {
	path := s.path(id)
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if uid := owner(st); uid != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d: not removed", path, uid)
	}
	gone := filepath.Join(s.templates(), gonePrefix+id+"-"+rand.Text())
	if err := os.Rename(path, gone); err != nil {
		return fmt.Errorf("remove template: %w", err)
	}
	return removeTree(gone)
}

func owner(st fs.FileInfo) int {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(sys.Uid)
	}
	return -1
}

// sweep removes what killed makers and removers left and says how many bytes that
// was. The caller holds the lock of the store.
func (s *Store) sweep() (freed int64, err error) {
	var errs []error
	remove := func(path string) {
		size := treeSize(path)
		if err := removeTree(path); err != nil {
			errs = append(errs, err)
			return
		}
		freed += size
	}
	entries, err := readDir(s.templates())
	errs = append(errs, err)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), gonePrefix) {
			remove(filepath.Join(s.templates(), e.Name()))
		}
	}
	entries, err = readDir(s.makings())
	errs = append(errs, err)
	for _, e := range entries {
		if !validID(e.Name()) {
			continue // not ours to know
		}
		if unlock, ok := s.tryLock(e.Name()); ok {
			remove(s.makingPath(e.Name()))
			unlock()
		}
	}
	return freed, errors.Join(errs...)
}

// readDir is os.ReadDir; a directory that is not there is empty.
func readDir(dir string) ([]fs.DirEntry, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return entries, err
}

// List is all templates, the last used first; Memory and State are not open. It
// looks at owners, modes, sizes and manifests, and reads no memory; what it sees
// to be damaged has Damaged set. A store that is not there is empty. It returns
// *DamagedError if the store itself may not be used.
func (s *Store) List(ctx context.Context) ([]*Template, error) {
	if err := s.check(); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	entries, err := readDir(s.templates())
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var all []*Template
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("list templates: %w", context.Cause(ctx))
		}
		id := e.Name()
		if !validID(id) {
			continue
		}
		o, err := look(s.path(id), id)
		switch {
		case errors.Is(err, ErrNotFound): // removed since
		case isDamaged(err):
			t := &Template{ID: id, Damaged: err.Error(), DiskSize: diskSize(s.path(id))}
			if st, err := os.Lstat(s.path(id)); err == nil {
				t.Created, t.Used = st.ModTime(), usedTime(s.path(id), st.ModTime())
			}
			all = append(all, t)
		case err != nil:
			return nil, fmt.Errorf("list templates: %w", err)
		default:
			o.Close()
			o.Memory, o.State = nil, nil
			all = append(all, o.Template)
		}
	}
	slices.SortStableFunc(all, func(a, b *Template) int {
		return cmp.Or(b.Used.Compare(a.Used), strings.Compare(a.ID, b.ID))
	})
	return all, nil
}

// Remove takes away the template whose ID begins with idPrefix, at least 4 hex
// digits, and returns its ID. Machines cloned from it run on. It returns
// ErrNotFound, or an error that names the templates which more than one could be
// meant.
func (s *Store) Remove(ctx context.Context, idPrefix string) (id string, err error) {
	if len(idPrefix) < minPrefix || len(idPrefix) > idDigits || !isHex(idPrefix) {
		return "", fmt.Errorf("%.80q is not the ID of a template: give %d or more of its hex digits", idPrefix, minPrefix)
	}
	if err := s.check(); errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("template %s: %w", idPrefix, ErrNotFound)
	} else if err != nil {
		return "", fmt.Errorf("remove template %s: %w", idPrefix, err)
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	entries, err := readDir(s.templates())
	if err != nil {
		return "", fmt.Errorf("remove template %s: %w", idPrefix, err)
	}
	var meant []string
	for _, e := range entries {
		if validID(e.Name()) && strings.HasPrefix(e.Name(), idPrefix) {
			meant = append(meant, e.Name())
		}
	}
	switch len(meant) {
	case 0:
		return "", fmt.Errorf("template %s: %w", idPrefix, ErrNotFound)
	case 1:
		return meant[0], s.discard(meant[0])
	}
	return "", fmt.Errorf("%s may be any of the templates %s", idPrefix, strings.Join(meant, ", "))
}

// Prune removes what List sees to be damaged, what killed makers left, and the
// templates used longest ago while all take more than the limit; with all, every
// template. It returns the IDs of the templates and the bytes on the disk that are
// free now. What is being made it leaves alone. It goes on after an error, and
// joins them.
func (s *Store) Prune(ctx context.Context, all bool) (removed []string, freed int64, err error) {
	if err := s.check(); errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	} else if err != nil {
		return nil, 0, fmt.Errorf("prune templates: %w", err)
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer unlock()
	freed, sweepErr := s.sweep()
	removed, more, err := s.evict(ctx, func(t *Template, over bool) bool { return all || over || t.Damaged != "" })
	return removed, freed + more, errors.Join(sweepErr, err)
}

// evict removes the templates that out is true for, damaged ones and those used
// longest ago first; over says that the ones left take more than the limit. It
// never removes one whose lock is held, so not the one that its caller makes. The
// caller holds the lock of the store.
func (s *Store) evict(ctx context.Context, out func(t *Template, over bool) bool) (removed []string, freed int64, err error) {
	list, err := s.List(ctx)
	if err != nil {
		return nil, 0, err
	}
	var total int64
	for _, t := range list {
		total += t.DiskSize
	}
	slices.Reverse(list)
	slices.SortStableFunc(list, func(a, b *Template) int {
		return cmp.Compare(min(1, len(b.Damaged)), min(1, len(a.Damaged)))
	})
	var errs []error
	for _, t := range list {
		if !out(t, total > s.limit) {
			continue
		}
		unlock, ok := s.tryLock(t.ID)
		if !ok {
			continue
		}
		err := s.discard(t.ID)
		unlock()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, t.ID)
		freed += t.DiskSize
		total -= t.DiskSize
	}
	return removed, freed, errors.Join(errs...)
}
