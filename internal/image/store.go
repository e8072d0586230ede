package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/atomicfile"
	"github.com/ironclaw-run/ironclaw/internal/filelock"
)

// Store is a directory of images. Many processes may use one at the same time.
//
//	names/<name>.json      a record, see Image
//	disks/<hex>            a disk, by its sha256
//	disks/<hex>.verified   what VerifyOnce remembers
//	builds/<id>/           a build at work; its lock file is held
//	lock                   held while names and disks change
type Store struct {
	dir string
}

// Open is the store in dir. Nothing is created until an image is built.
func Open(dir string) *Store { return &Store{dir: dir} }

func (s *Store) namesDir() string            { return filepath.Join(s.dir, "names") }
func (s *Store) disksDir() string            { return filepath.Join(s.dir, "disks") }
func (s *Store) namePath(name string) string { return filepath.Join(s.namesDir(), name+".json") }
func (s *Store) diskPath(hex string) string  { return filepath.Join(s.disksDir(), hex) }

// Get finds an image by name, by digest, or by the first eight or more hex
// digits of its digest. A name wins over a digest that looks the same. It
// returns ErrNotFound, or a *CorruptError if its record or disk is damaged as
// far as can be seen without reading the whole disk; see Verify.
func (s *Store) Get(ctx context.Context, ref string) (*Image, error) {
	img, err := s.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	if err := checkDisk(img); err != nil {
		return nil, err
	}
	return img, nil
}

// find is Get without a look at the disk.
func (s *Store) find(ctx context.Context, ref string) (*Image, error) {
	hex, isDigest := digestRef(ref)
	if !ValidName(ref) && !isDigest {
		return nil, fmt.Errorf("%.80q is neither the name nor the digest of an image", ref)
	}
	if ValidName(ref) {
		img, err := s.read(ref)
		if !errors.Is(err, ErrNotFound) || !isDigest {
			return img, err
		}
	}
	all, err := s.records(ctx)
	var found *Image
	for _, img := range all {
		if !strings.HasPrefix(img.Digest, digestPrefix+hex) {
			continue
		}
		if found != nil && found.Digest != img.Digest {
			return nil, fmt.Errorf("more than one image has a digest that begins with %s", hex)
		}
		if found == nil {
			found = img
		}
	}
	if found != nil {
		return found, nil
	}
	return nil, errors.Join(fmt.Errorf("image %s: %w", ref, ErrNotFound), err)
}

// List is all images, sorted by name. The error joins one *CorruptError for
// each image that is damaged; the others are returned with it.
func (s *Store) List(ctx context.Context) ([]*Image, error) {
	all, err := s.records(ctx)
	errs := []error{err}
	good := all[:0:0]
	for _, img := range all {
		if err := checkDisk(img); err != nil {
			errs = append(errs, err)
			continue
		}
		good = append(good, img)
	}
	return good, errors.Join(errs...)
}

// records is every record that can be read, and an error for the others.
func (s *Store) records(ctx context.Context) ([]*Image, error) {
	entries, err := os.ReadDir(s.namesDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var all []*Image
	var errs []error
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || !ValidName(name) {
			continue // a temporary file of a writer
		}
		img, err := s.read(name)
		switch {
		case errors.Is(err, ErrNotFound): // removed since
		case err != nil:
			errs = append(errs, err)
		default:
			all = append(all, img)
		}
	}
	return all, errors.Join(errs...)
}

// read is the record of one name.
func (s *Store) read(name string) (*Image, error) {
	path := s.namePath(name)
	b, err := atomicfile.ReadFile(path, maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("image %s: %w", name, ErrNotFound)
	} else if err != nil {
		return nil, fmt.Errorf("read image %s: %w", name, err)
	}
	img, err := parseRecord(b, name)
	if err != nil {
		return nil, &CorruptError{Path: path, What: err.Error()}
	}
	hex, _ := diskHex(img.Digest) // parseRecord has checked it
	img.Path = s.diskPath(hex)
	return img, nil
}

// Remove takes away the name, or every name of the digest, and the disk when
// no name is left for it. While a sandbox uses a disk that would go, it changes
// nothing and returns ErrInUse. A name with a damaged record can be removed.
func (s *Store) Remove(ctx context.Context, ref string) error {
	if _, err := os.Stat(s.namesDir()); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("image %.80s: %w", ref, ErrNotFound)
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	img, err := s.find(ctx, ref)
	var corrupt *CorruptError
	if ValidName(ref) && errors.As(err, &corrupt) && corrupt.Path == s.namePath(ref) {
		return s.dropNames([]string{ref})
	}
	if err != nil {
		return err
	}
	byName := img.Name == ref
	all, err := s.records(ctx)
	if err != nil {
		// An unreadable record may be the one that needs this disk.
		if byName {
			return s.dropNames([]string{ref})
		}
		return err
	}
	var names []string
	left := 0
	for _, other := range all {
		switch {
		case other.Digest != img.Digest:
		case byName && other.Name != ref:
			left++
		default:
			names = append(names, other.Name)
		}
	}
	if left > 0 {
		return s.dropNames(names)
	}
	free, err := lockDisk(img.Path)
	if err != nil {
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	defer free()
	// Names first: a disk without a name is litter, a name without a disk is
	// damage.
	if err := s.dropNames(names); err != nil {
		return err
	}
	return removeDisk(img.Path)
}

func (s *Store) dropNames(names []string) error {
	for _, name := range names {
		if err := os.Remove(s.namePath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove image %s: %w", name, err)
		}
	}
	return atomicfile.SyncDir(s.namesDir())
}

// Use keeps the disk of img until release is called, whatever happens to its
// names. The lock ends with the process too. It returns ErrNotFound if the disk
// is gone already. Calling release again does nothing.
func (s *Store) Use(img *Image) (release func(), err error) {
	f, err := os.Open(img.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("use image %s: %w", img.Name, ErrNotFound)
	} else if err != nil {
		return nil, fmt.Errorf("use image %s: %w", img.Name, err)
	}
	// Only Remove and sweep hold it exclusively, for as long as it takes to
	// delete a file, so this does not wait for anything else.
	if err := flock(f, unix.LOCK_SH); err != nil {
		f.Close()
		return nil, fmt.Errorf("use image %s: lock: %w", img.Name, err)
	}
	if !filelock.Holds(f, img.Path) {
		f.Close()
		return nil, fmt.Errorf("use image %s: %w", img.Name, ErrNotFound)
	}
	return func() { f.Close() }, nil
}

// install makes img.Name point at the disk in file, which is moved into the
// store, and takes away disks that nothing points at any more.
func (s *Store) install(ctx context.Context, img *Image, file string) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	hex, err := diskHex(img.Digest)
	if err != nil {
		return err
	}
	img.Path = s.diskPath(hex)
	for _, dir := range []string{s.namesDir(), s.disksDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// Sandboxes may be using the same bytes already: leave their file alone,
	// unless it has gone bad.
	if s.Verify(ctx, img) != nil {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := os.Rename(file, img.Path); err != nil {
			return err
		}
		if err := atomicfile.SyncDir(s.disksDir()); err != nil {
			return err
		}
	}
	b, err := formatRecord(img)
	if err != nil {
		return err
	}
	if err := atomicfile.WriteFile(s.namePath(img.Name), b, 0o644); err != nil {
		return err
	}
	return s.sweep(ctx)
}

// sweep takes away disks without a name that nobody uses. The caller holds the
// lock of the store.
func (s *Store) sweep(ctx context.Context) error {
	all, err := s.records(ctx)
	if err != nil {
		return nil // one of the unreadable records may need any disk
	}
	entries, err := os.ReadDir(s.disksDir())
	if err != nil {
		return fmt.Errorf("sweep disks: %w", err)
	}
	for _, e := range entries {
		path := s.diskPath(e.Name())
		hex := strings.TrimSuffix(e.Name(), verifiedSuffix)
		named := slices.ContainsFunc(all, func(i *Image) bool { return i.Digest == digestPrefix+hex })
		if _, err := diskHex(digestPrefix + hex); err != nil || named || hex != e.Name() {
			continue
		}
		free, err := lockDisk(path)
		if err != nil {
			continue // in use: a later sweep gets it
		}
		err = removeDisk(path)
		free()
		if err != nil {
			return err
		}
	}
	return nil
}

func removeDisk(path string) error {
	for _, p := range []string{path + verifiedSuffix, path} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove disk: %w", err)
		}
	}
	return atomicfile.SyncDir(filepath.Dir(path))
}
