package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// systemModules is where a distribution keeps the modules of its kernels.
const systemModules = "/lib/modules"

// FromFiles returns a kernel of the user's: image is a bzImage or an ELF file,
// modules its directory of modules, or empty for the system's one for that
// release. Of a bzImage the kernel is extracted into the store, once for each
// content; an ELF file is used where it is.
func (s *Store) FromFiles(ctx context.Context, image, modules string) (*Kernel, error) {
	k, err := s.fromImage(ctx, image)
	if err != nil {
		return nil, fmt.Errorf("kernel image %s: %w", image, err)
	}
	k.Source = image
	if k.Modules, err = findModules(modules, k.Release); err != nil {
		return nil, fmt.Errorf("modules of kernel %s (%s): %w", k.Release, image, err)
	}
	return k, nil
}

func (s *Store) fromImage(ctx context.Context, path string) (*Kernel, error) {
	f, size, err := openImage(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	head := make([]byte, min(size, hdrEnd))
	if _, err := f.ReadAt(head, 0); err != nil {
		return nil, err
	}
	switch {
	case len(head) >= 4 && string(head[:4]) == "\x7fELF":
		return fromELF(path, f, size)
	case isBzImage(head):
		return s.fromBzImage(ctx, f)
	case len(head) < hdrEnd:
		return nil, fmt.Errorf("not a Linux kernel: it has only %d bytes", size)
	}
	return nil, errors.New("not a Linux kernel for x86-64: neither a bzImage nor an ELF file")
}

// openImage opens a regular file that can be a kernel.
func openImage(path string) (*os.File, int64, error) {
	info, err := os.Stat(path) // first: opening a pipe would wait
	if err != nil {
		return nil, 0, cause(err)
	}
	switch {
	case info.IsDir():
		return nil, 0, errors.New("it is a directory; the file with the kernel is needed")
	case !info.Mode().IsRegular():
		return nil, 0, errors.New("it is not a regular file")
	case info.Size() == 0:
		return nil, 0, errors.New("it is empty")
	case info.Size() > maxELF:
		return nil, 0, fmt.Errorf("it has %d bytes, more than the %d allowed", info.Size(), maxELF)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, cause(err)
	}
	return f, info.Size(), nil
}

// cause drops the path from an error of package os, where it has been said.
func cause(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// fromELF returns a kernel that needs no extraction.
func fromELF(path string, f *os.File, size int64) (*Kernel, error) {
	if err := checkELF(f, size); err != nil {
		return nil, err
	}
	h := sha256.New()
	release, err := elfRelease(io.TeeReader(io.NewSectionReader(f, 0, size), h))
	if err != nil {
		return nil, err
	}
	h.Reset()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, size)); err != nil {
		return nil, err
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	return &Kernel{Release: release, ELF: path, Digest: hex.EncodeToString(h.Sum(nil))}, nil
}

// fromBzImage returns the kernel in a bzImage, out of the store or put there.
func (s *Store) fromBzImage(ctx context.Context, f *os.File) (*Kernel, error) {
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(filepath.Join(s.dir, "files", hex.EncodeToString(h.Sum(nil))))
	if err != nil {
		return nil, err
	}
	if k, err := readKernel(dir); err == nil {
		touch(dir)
		return k, nil
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if k, err := readKernel(dir); err == nil { // another process was faster
		return k, nil
	}
	tmp, err := s.tempDir("files")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	prune(filepath.Dir(dir))
	m := manifest{Source: f.Name()}
	if m.Digest, err = extractFile(f.Name(), filepath.Join(tmp, elfName)); err != nil {
		return nil, err
	}
	if m.Release, err = fileRelease(filepath.Join(tmp, elfName)); err != nil {
		return nil, err
	}
	if err := writeManifest(tmp, m); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(dir); err != nil { // a damaged one, or nothing
		return nil, err
	}
	if err := publish(tmp, dir); err != nil {
		return nil, err
	}
	return readKernel(dir)
}

func fileRelease(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return elfRelease(f)
}

// extractFile extracts the kernel of the bzImage at from into a new file, and
// returns its digest once it is known to be one that can be booted.
func extractFile(from, to string) (string, error) {
	in, _, err := openImage(from)
	if err != nil {
		return "", err
	}
	defer in.Close()
	data, err := io.ReadAll(io.LimitReader(in, maxImage+1))
	if err != nil {
		return "", err
	}
	if len(data) > maxImage {
		return "", fmt.Errorf("it has more than the %d bytes allowed", maxImage)
	}
	img, err := parseBzImage(data, maxELF)
	if err != nil {
		return "", err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer out.Close()
	if err := out.Chmod(0o644); err != nil { // whatever the umask: the VMM runs as another user
		return "", err
	}
	h := sha256.New()
	if err := img.extract(io.MultiWriter(out, h)); err != nil {
		return "", err
	}
	if err := checkELF(out, img.size); err != nil {
		return "", fmt.Errorf("the kernel in it: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)), out.Close()
}

// findModules returns the directory of a release's modules: the one given, or one
// within it, or the system's.
func findModules(given, release string) (string, error) {
	candidates := []string{filepath.Join(systemModules, release)}
	if given != "" {
		abs, err := filepath.Abs(given)
		if err != nil {
			return "", err
		}
		info, err := os.Stat(abs)
		if err != nil {
			return "", err
		}
		if !info.IsDir() {
			return "", fmt.Errorf("%s is not a directory", given)
		}
		candidates = []string{
			filepath.Join(abs, release),
			filepath.Join(abs, "lib/modules", release),
			filepath.Join(abs, "usr/lib/modules", release),
			abs,
		}
	}
	for _, dir := range candidates {
		for _, mark := range []string{"modules.builtin", "modules.order", "kernel"} {
			if _, err := os.Stat(filepath.Join(dir, mark)); err == nil {
				return dir, nil
			}
		}
	}
	if given == "" {
		return "", fmt.Errorf("%s does not exist or has none: say where they are (of a kernel that has everything built in, "+
			"its modules.builtin in a directory is enough)", candidates[0])
	}
	return "", fmt.Errorf("none in %s: neither a directory %q nor modules.builtin", given, "kernel")
}
