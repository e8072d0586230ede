package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/atomicfile"
	"github.com/ironclaw-run/ironclaw/internal/filelock"
	"github.com/ironclaw-run/ironclaw/internal/undo"
	"github.com/ironclaw-run/ironclaw/internal/verifyonce"
)

// Make is the template of these inputs, made by fill if there is none yet. fill
// gets an empty directory, private to the user, and leaves in it the regular files
// "memory" and "state", which are not empty, and nothing else.
//
// Of many that want the same template at once, in this process or others, one
// makes it; the others wait for it until their ctx ends, which they return as
// context.Cause(ctx). The templates used longest ago are then removed while all
// take more than the limit, except this one and those being made.
//
// It returns the error of fill, of the file system, or a *DamagedError if
// something of another user's is in the way; where the store cannot be written it
// does so before it calls fill. After an error, a panic of fill or the end of the
// process no part of the template is ever found.
func (s *Store) Make(ctx context.Context, in Inputs, fill func(ctx context.Context, dir string) error) (*Template, error) {
	t, err := s.makeOnce(ctx, in, fill)
	if err != nil {
		return nil, fmt.Errorf("make template %s: %w", in.ID(), err)
	}
	return t, nil
}

func (s *Store) makeOnce(ctx context.Context, in Inputs, fill func(ctx context.Context, dir string) error) (*Template, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := checkInputs(in); err != nil {
		return nil, err
	}
	for _, dir := range []string{s.dir, s.templates(), s.makings(), s.locks()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	id := in.ID()
	unlock, err := filelock.Lock(ctx, s.lockPath(id))
	if err != nil {
		return nil, err
	}
	defer unlock()
	t, err := s.get(ctx, in)
	if err == nil {
		return t, nil
	}
	if !errors.Is(err, ErrNotFound) && !isDamaged(err) {
		return nil, err
	}
	if _, there := os.Lstat(s.path(id)); there == nil {
		return nil, err // damaged, and could not be removed
	}
	dir, err := s.begin(ctx, id)
	if err != nil {
		return nil, err
	}
	var stack undo.Stack
	defer stack.Run()
	stack.Add(func() { _ = removeTree(dir) }) // else a sweep does
	s.step("fill")
	if err := fill(ctx, dir); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := s.seal(ctx, in, dir); err != nil {
		return nil, err
	}
	return s.install(ctx, in, dir)
}

// begin makes room for a new template: it removes what killed makers left, of
// this template too, and makes its directory.
func (s *Store) begin(ctx context.Context, id string) (dir string, err error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	_, _ = s.sweep() // one that cannot be removed does not hold up this
	dir = s.makingPath(id)
	if err := removeTree(dir); err != nil {
		return "", err
	}
	return dir, os.Mkdir(dir, 0o700)
}

// seal makes a template of what fill left in path: checks it, writes it to the
// disk, then its manifest.
func (s *Store) seal(ctx context.Context, in Inputs, path string) error {
	s.step("seal")
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if name := e.Name(); name != MemoryFile && name != StateFile {
			return fmt.Errorf("%q was left beside memory and state", name)
		}
	}
	dir, err := openTrusted(nil, path, unix.S_IFDIR)
	if err != nil {
		return err
	}
	defer dir.Close()
	m := newManifest(in)
	var files []*os.File
	for _, name := range []string{MemoryFile, StateFile} {
		// QEMU opens memory for writing, though it maps it private: not 0400.
		// fill may have had a loose umask; nobody else was in the directory.
		if st, err := os.Lstat(filepath.Join(path, name)); err == nil && st.Mode().IsRegular() {
			if err := os.Chmod(filepath.Join(path, name), 0o600); err != nil {
				return err
			}
		}
		f, err := openFile(dir, name, -1)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := f.Sync(); err != nil {
			return err
		}
		files = append(files, f)
	}
	if err := os.WriteFile(filepath.Join(path, usedFile), nil, 0o600); err != nil {
		return err
	}
	return verifyonce.Files(ctx, "", func(ctx context.Context) error {
		for i, c := range []*content{&m.Memory, &m.State} {
			if err := c.measure(ctx, files[i]); err != nil {
				return err
			}
		}
		return s.sign(ctx, m, dir, files)
	}, files...)
}

// sign writes the manifest, and a memo that the files were seen to match: they
// have just been read for it, and who calls makes sure that they did not change
// since.
func (s *Store) sign(ctx context.Context, m *manifest, dir *os.File, files []*os.File) error {
	b, err := m.format()
	if err != nil {
		return err
	}
	s.step("manifest")
	if err := atomicfile.WriteFile(filepath.Join(dir.Name(), manifestFile), b, 0o600); err != nil {
		return err
	}
	f, err := openFile(dir, manifestFile, int64(len(b)))
	if err != nil {
		return err
	}
	defer f.Close()
	seen := func(context.Context) error { return nil }
	return verifyonce.Files(ctx, filepath.Join(dir.Name(), memoFile), seen, f, files[0], files[1])
}

// measure notes size and checksum of f.
func (c *content) measure(ctx context.Context, f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() == 0 {
		return fmt.Errorf("%s is empty", f.Name())
	}
	c.Size = st.Size()
	c.Digest, err = digest(ctx, f, c.Size)
	return err
}

// install puts the sealed directory in its place and opens it.
func (s *Store) install(ctx context.Context, in Inputs, dir string) (*Template, error) {
	path := s.path(in.ID())
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s.step("rename")
	if err := os.Rename(dir, path); err != nil {
		return nil, err
	}
	if err := atomicfile.SyncDir(s.templates()); err != nil {
		return nil, err
	}
	s.step("evict")
	over := func(_ *Template, over bool) bool { return over }
	_, _, _ = s.evict(ctx, over) // what could not be removed now, is by the next
	return open(ctx, path, in)   // before anybody can remove it
}
