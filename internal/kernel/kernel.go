// Package kernel provides what a guest boots: a kernel that a VMM starts
// directly (an ELF file with the PVH entry point), its modules, and an initramfs
// with the guest agent and just the modules wanted.
//
// The kernel is the distribution's own, fetched by [Store.Install] through apt, or
// one of the user's, taken by [Store.FromFiles]. Start with [Open].
//
// A [Store] is a directory. What is in it appears whole or not at all (made
// elsewhere, flushed, renamed), so that neither an interrupted installation nor
// two at once leave anything that looks usable and is not. Files that come from
// elsewhere are parsed with bounds; nothing of them is executed here.
package kernel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/filelock"

	"golang.org/x/sys/unix"
)

// ErrNotInstalled is returned by [Store.Current] if no kernel has been installed.
var ErrNotInstalled = errors.New("no kernel is installed")

// Kernel is a kernel that can be booted.
type Kernel struct {
	Release string // as uname -r says it
	ELF     string // path of the uncompressed kernel
	Modules string // the directory .../lib/modules/<release>
	Digest  string // SHA-256 of the ELF, in hex
	Source  string // the package and its version, or the path the user gave
}

// Store is a directory of kernels:
//
//	lock             held by whoever installs
//	apt/             not ours: the caller may keep apt's private state there
//	current          a link to the package that is in use
//	packages/ID/     an installed kernel: manifest.json, vmlinux, lib/modules/
//	files/DIGEST/    a kernel extracted from the user's image of that digest
//	initramfs/       DIGEST.cpio
//
// Names that begin with ".tmp-" are unfinished.
type Store struct {
	dir string
}

// Open returns the store in dir. Nothing is created before it is needed.
func Open(dir string) *Store { return &Store{dir: dir} }

const (
	tmpPrefix    = ".tmp-"
	manifestName = "manifest.json"
	elfName      = "vmlinux"
)

// Current returns the installed kernel. The error is [ErrNotInstalled] if there
// is none, another if it is there and not as it was installed.
func (s *Store) Current(ctx context.Context) (*Kernel, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dir, err := s.current()
	if err != nil {
		return nil, err
	}
	k, err := readKernel(dir)
	if err != nil {
		return nil, fmt.Errorf("the installed kernel is damaged, install it again: %w", err)
	}
	return k, nil
}

// current returns the directory of the installed kernel.
func (s *Store) current() (string, error) {
	dir, err := filepath.Abs(s.dir)
	if err != nil {
		return "", err
	}
	name, err := os.Readlink(filepath.Join(dir, "current"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", ErrNotInstalled
	}
	if err != nil {
		return "", fmt.Errorf("find the installed kernel: %w", err)
	}
	if !filepath.IsLocal(name) {
		return "", fmt.Errorf("find the installed kernel: %s points out of the store", filepath.Join(dir, "current"))
	}
	return filepath.Join(dir, name), nil
}

// manifest describes a directory with a kernel in it. It is written last.
type manifest struct {
	Version int    `json:"version"`
	Release string `json:"release"`
	Source  string `json:"source"`
	Digest  string `json:"digest"`
	Modules string `json:"modules,omitempty"` // relative to the directory
	Files   []file `json:"files"`
}

type file struct {
	Path string `json:"path"` // relative to the directory
	Size int64  `json:"size"`
}

const (
	manifestVersion = 1
	maxManifest     = 8 << 20
)

// readKernel reads a directory's manifest and verifies that its kernel is there
// and of the size recorded. Its modules, which are hundreds, are looked at when an
// initramfs is made of them.
func readKernel(dir string) (*Kernel, error) {
	return checkKernel(dir, func(name string) bool { return name == elfName })
}

// readWholeKernel is readKernel that looks at all files.
func readWholeKernel(dir string) (*Kernel, error) {
	return checkKernel(dir, func(string) bool { return true })
}

func checkKernel(dir string, check func(name string) bool) (*Kernel, error) {
	f, err := os.Open(filepath.Join(dir, manifestName))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var m manifest
	if err := json.NewDecoder(io.LimitReader(f, maxManifest)).Decode(&m); err != nil {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	if m.Version != manifestVersion || m.Release == "" || m.Digest == "" {
		return nil, fmt.Errorf("read %s: version %d of the manifest is not known", f.Name(), m.Version)
	}
	elf := false
	for _, file := range m.Files {
		if !filepath.IsLocal(file.Path) {
			return nil, fmt.Errorf("read %s: %s is outside of it", f.Name(), file.Path)
		}
		if !check(file.Path) {
			continue
		}
		path := filepath.Join(dir, file.Path)
		info, err := os.Lstat(path)
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() || info.Size() != file.Size {
			return nil, fmt.Errorf("%s has %d bytes, not the %d it was installed with", path, info.Size(), file.Size)
		}
		elf = elf || file.Path == elfName
	}
	if !elf {
		return nil, fmt.Errorf("read %s: it names no kernel", f.Name())
	}
	k := &Kernel{Release: m.Release, ELF: filepath.Join(dir, elfName), Digest: m.Digest, Source: m.Source}
	if m.Modules != "" {
		k.Modules = filepath.Join(dir, m.Modules)
	}
	return k, nil
}

// writeManifest completes m with the files that are in dir, and writes it.
func writeManifest(dir string, m manifest) error {
	m.Version = manifestVersion
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		m.Files = append(m.Files, file{rel, info.Size()})
		return err
	})
	if err != nil {
		return err
	}
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, manifestName), data, 0o644)
}

// lock takes the store's lock, which the returned function gives back.
func (s *Store) lock(ctx context.Context) (func(), error) {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return nil, err
	}
	return filelock.Lock(ctx, filepath.Join(s.dir, "lock"))
}

// tempDir makes an unfinished directory in the store's directory sub.
func (s *Store) tempDir(sub string) (string, error) {
	parent, err := filepath.Abs(filepath.Join(s.dir, sub))
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(parent, tmpPrefix+"*")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// publish gives an unfinished directory its name, once all in it is on the disk.
func publish(tmp, dir string) error {
	// One call for a thousand files: an fsync of each takes many seconds.
	if err := syncPath(tmp, unix.Syncfs); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return syncPath(filepath.Dir(dir), unix.Fsync)
}

func syncPath(path string, sync func(fd int) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := sync(int(f.Fd())); err != nil {
		return fmt.Errorf("flush %s: %w", path, err)
	}
	return nil
}

// unused is how long a cached file is kept that nobody asks for.
const unused = 30 * 24 * time.Hour

// prune removes from a directory of cached things what has long been unused, and
// what was begun and not finished. It is housekeeping: errors do not matter.
func prune(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		age := unused
		if len(e.Name()) > len(tmpPrefix) && e.Name()[:len(tmpPrefix)] == tmpPrefix {
			age = time.Hour // another process may be at it
		}
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > age {
			os.RemoveAll(filepath.Join(dir, e.Name()))
		}
	}
}

// touch marks a cached thing as used.
func touch(path string) {
	now := time.Now()
	os.Chtimes(path, now, now)
}
