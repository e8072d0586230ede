package template

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/undo"
	"github.com/ironclaw-run/ironclaw/internal/verifyonce"
)

// Files of a template.
const (
	MemoryFile   = "memory"
	StateFile    = "state"
	manifestFile = "manifest.json"
	usedFile     = "used"     // its mtime is when the template was last used
	memoFile     = "verified" // what verifyonce remembers
)

var allFiles = []string{MemoryFile, StateFile, manifestFile, usedFile, memoFile}

// openTrusted opens name in the directory dir (nil: name is a path) for reading if
// it is of the type wanted, ours alone to write, and reached through no link.
// Everything else is a *DamagedError, except fs.ErrNotExist and errors which say
// nothing about the file.
func openTrusted(dir *os.File, name string, format uint32) (*os.File, error) {
	at, path := unix.AT_FDCWD, filepath.Clean(name)
	if dir != nil {
		at, path = int(dir.Fd()), filepath.Join(dir.Name(), name)
	}
	// A fifo must not stop us.
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EACCES):
		return nil, damaged(path, "it cannot be opened: %v", err)
	case err != nil:
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var stack undo.Stack
	defer stack.Run()
	stack.Add(func() { unix.Close(fd) })
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: path, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != format && format == unix.S_IFDIR:
		return nil, damaged(path, "not a directory")
	case st.Mode&unix.S_IFMT != format:
		return nil, damaged(path, "not a regular file")
	case int(st.Uid) != os.Geteuid():
		return nil, damaged(path, "it belongs to user %d", st.Uid)
	case st.Mode&0o022 != 0:
		return nil, damaged(path, "others may write it (mode %#o)", st.Mode&0o7777)
	case format == unix.S_IFREG && st.Nlink != 1:
		return nil, damaged(path, "it has %d names", st.Nlink)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		return nil, err
	}
	stack.Release()
	return os.NewFile(uintptr(fd), path), nil
}

// openFile is openTrusted for a file that has to be there. size < 0 is any.
func openFile(dir *os.File, name string, size int64) (*os.File, error) {
	f, err := openTrusted(dir, name, unix.S_IFREG)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, damaged(filepath.Join(dir.Name(), name), "missing")
	} else if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && size >= 0 && st.Size() != size {
		err = damaged(f.Name(), "it has %d bytes, recorded are %d", st.Size(), size)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// opened is a template with its manifest.
type opened struct {
	*Template
	manifest *manifest
	file     *os.File // of the manifest
}

func (o *opened) Close() { _ = errors.Join(o.Template.Close(), o.file.Close()) }

// look opens the template at path as far as it can be without reading its memory
// and state. It returns ErrNotFound, *DamagedError, or what the system said.
func look(path, id string) (*opened, error) {
	for tries := 0; ; tries++ {
		dir, err := openTrusted(nil, path, unix.S_IFDIR)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, ErrNotFound
		} else if err != nil {
			return nil, err
		}
		o, err := lookIn(dir, id)
		// What is being removed loses its name first: then look at what has it now.
		if isDamaged(err) && tries < 10 && !named(dir) {
			dir.Close()
			continue
		}
		dir.Close()
		return o, err
	}
}

// named says whether the directory still has the name it was opened by.
func named(dir *os.File) bool {
	is, err := dir.Stat()
	if err != nil {
		return false
	}
	has, err := os.Lstat(dir.Name())
	return err == nil && os.SameFile(is, has)
}

func lookIn(dir *os.File, id string) (*opened, error) {
	path := dir.Name()
	var stack undo.Stack
	defer stack.Run()
	file, err := openFile(dir, manifestFile, -1)
	if err != nil {
		return nil, err
	}
	stack.Add(func() { file.Close() })
	b, err := io.ReadAll(io.LimitReader(file, maxManifest+1))
	if err != nil {
		return nil, damaged(file.Name(), "%v", err)
	}
	m, err := parseManifest(b, id)
	if err != nil {
		return nil, damaged(file.Name(), "%v", err)
	}
	memory, err := openFile(dir, MemoryFile, m.Memory.Size)
	if err != nil {
		return nil, err
	}
	stack.Add(func() { memory.Close() })
	state, err := openFile(dir, StateFile, m.State.Size)
	if err != nil {
		return nil, err
	}
	stack.Release()
	t := &Template{
		ID: id, Inputs: m.Inputs, Created: m.Created, Used: usedTime(path, m.Created),
		Memory: memory, State: state, MemorySize: m.Memory.Size, DiskSize: diskSize(path),
	}
	return &opened{Template: t, manifest: m, file: file}, nil
}

// open is the template at path, verified.
func open(ctx context.Context, path string, in Inputs) (*Template, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	o, err := look(path, in.ID())
	if err != nil {
		return nil, err
	}
	if !maps.Equal(o.Inputs, in) {
		o.Close()
		return nil, damaged(o.file.Name(), "of other inputs")
	}
	err = verifyonce.Files(ctx, filepath.Join(path, memoFile), o.verify, o.file, o.Memory, o.State)
	if changed, ok := errors.AsType[*verifyonce.ChangedError](err); ok {
		err = damaged(changed.Path, "it changed while it was read")
	}
	if err != nil {
		o.Close()
		return nil, err
	}
	o.file.Close()
	return o.Template, nil
}

// verify reads the files and compares them with the manifest.
func (o *opened) verify(ctx context.Context) error {
	for _, c := range []struct {
		f    *os.File
		want content
	}{{o.Memory, o.manifest.Memory}, {o.State, o.manifest.State}} {
		sum, err := digest(ctx, c.f, c.want.Size)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			// Of no use to anybody, whatever the reason: it is made anew.
			return damaged(c.f.Name(), "it cannot be read: %v", err)
		}
		if sum != c.want.Digest {
			return damaged(c.f.Name(), "its checksum is %s, recorded is %s", sum, c.want.Digest)
		}
	}
	return nil
}

// touch notes that the template is used. It may fail: the store may be read-only.
func touch(path string) {
	now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(path, usedFile), now, unix.AT_SYMLINK_NOFOLLOW)
}

// usedTime is the time of the last touch, or created if there is none.
func usedTime(path string, created time.Time) time.Time {
	st, err := os.Lstat(filepath.Join(path, usedFile))
	if err != nil {
		return created
	}
	return st.ModTime()
}

// diskSize is the bytes on the disk of the files of a template.
func diskSize(path string) int64 {
	var size int64
	for _, name := range allFiles {
		size += allocated(filepath.Join(path, name))
	}
	return size
}

func allocated(path string) int64 {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// treeSize is the bytes on the disk of all that is under path.
func treeSize(path string) int64 {
	var size int64
	_ = filepath.WalkDir(path, func(p string, _ fs.DirEntry, err error) error {
		if err == nil {
			size += allocated(p)
		}
		return nil // what cannot be seen is not counted
	})
	return size
}

// removeTree removes what a maker or a template left, whatever the modes.
func removeTree(path string) error {
	if st, err := os.Lstat(path); err == nil && st.IsDir() {
		_ = os.Chmod(path, 0o700)
	}
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("remove template: %w", err)
	}
	return nil
}
