package kernel

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/apt"
)

// metaPackages lead to the distribution's newest kernel for virtual machines, the
// smallest first. Debian has the first, Ubuntu the second.
var metaPackages = []string{
	"linux-image-cloud-amd64",
	"linux-image-virtual",
	"linux-image-amd64",
	"linux-image-generic",
}

// The packages of a kernel: what a package of a name like the first depends on is
// followed, one of a name like the second is unpacked.
var (
	kernelPackage  = regexp.MustCompile(`^linux-(image|modules|binary)-`)
	payloadPackage = regexp.MustCompile(`^linux-(image|modules|binary)-([a-z]+-)?[0-9]`)
)

// maxPackages bounds how many packages a kernel may be made of. There are two.
const maxPackages = 8

// Install fetches the distribution's newest kernel and makes it the current one,
// unless it is that already. It may be repeated, interrupted, and called by many
// at once. Steps are told to progress, which may be nil. Of older kernels the one
// in use until now is kept, for machines that are just being started from it.
func (s *Store) Install(ctx context.Context, a *apt.Apt, progress func(step string)) (*Kernel, error) {
	k, err := s.install(ctx, a, progress)
	if err != nil {
		return nil, fmt.Errorf("install a kernel: %w", err)
	}
	return k, nil
}

func (s *Store) install(ctx context.Context, a *apt.Apt, progress func(step string)) (*Kernel, error) {
	if progress == nil {
		progress = func(string) {}
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	packages, err := filepath.Abs(filepath.Join(s.dir, "packages"))
	if err != nil {
		return nil, err
	}
	removeUnfinished(packages)

	progress("updating the package lists")
	if err := a.Update(ctx); err != nil {
		return nil, err
	}
	set, err := findPackages(ctx, a)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(packages, packagesID(set))
	if k, err := readWholeKernel(dir); err == nil {
		return k, s.setCurrent(dir)
	}
	tmp, err := s.tempDir("packages")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	if err := build(ctx, a, set, tmp, progress); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(dir); err != nil { // a damaged one, or nothing
		return nil, err
	}
	if err := publish(tmp, dir); err != nil {
		return nil, err
	}
	if err := s.setCurrent(dir); err != nil {
		return nil, err
	}
	return readKernel(dir)
}

// removeUnfinished removes what earlier installations left. The lock is held:
// nobody is at it any more.
func removeUnfinished(dir string) {
	left, err := filepath.Glob(filepath.Join(dir, tmpPrefix+"*"))
	if err != nil {
		return
	}
	for _, path := range left {
		os.RemoveAll(path)
	}
}

// findPackages returns the packages which make up the newest kernel.
func findPackages(ctx context.Context, a *apt.Apt) ([]apt.Package, error) {
	for _, meta := range metaPackages {
		_, err := a.Candidate(ctx, meta)
		if errors.Is(err, apt.ErrNoPackage) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return payload(ctx, a, meta)
	}
	return nil, fmt.Errorf("the distribution has none of %s: %w", strings.Join(metaPackages, ", "), apt.ErrNoPackage)
}

// payload follows what a package depends on to those with the kernel in them.
func payload(ctx context.Context, a *apt.Apt, meta string) ([]apt.Package, error) {
	var set []apt.Package
	todo := []string{meta}
	for i := 0; i < len(todo); i++ {
		if len(todo) > maxPackages {
			return nil, fmt.Errorf("package %s: it takes more than %d packages", meta, maxPackages)
		}
		name := todo[i]
		if payloadPackage.MatchString(name) {
			p, err := a.Candidate(ctx, name)
			if err != nil {
				return nil, err
			}
			set = append(set, p)
		}
		depends, err := a.Depends(ctx, name)
		if err != nil {
			return nil, err
		}
		for _, d := range depends {
			if kernelPackage.MatchString(d) && !slices.Contains(todo, d) {
				todo = append(todo, d)
			}
		}
	}
	if len(set) == 0 {
		return nil, fmt.Errorf("package %s: it leads to no kernel", meta)
	}
	return set, nil
}

// packagesID names the directory for a set of packages.
func packagesID(set []apt.Package) string {
	sum := sha256.Sum256(fmt.Append(nil, set))
	return fmt.Sprintf("%s_%s_%x", set[0].Name, strings.ReplaceAll(set[0].Version, "/", "_"), sum[:4])
}

// build makes the directory of a kernel out of its packages.
func build(ctx context.Context, a *apt.Apt, set []apt.Package, dir string, progress func(string)) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	u := &unpacker{root: root}
	for _, p := range set {
		progress("downloading " + p.Name + " " + p.Version)
		deb, err := a.Download(ctx, p.Name, dir)
		if err != nil {
			return err
		}
		progress("unpacking " + p.Name)
		if err := u.deb(ctx, deb); err != nil {
			return fmt.Errorf("package %s: %w", p.Name, err)
		}
		if err := os.Remove(deb); err != nil {
			return err
		}
	}
	if !u.image {
		return fmt.Errorf("package %s: no kernel in it", set[0].Name)
	}
	progress("extracting the kernel")
	digest, err := extractFile(filepath.Join(dir, vmlinuzName), filepath.Join(dir, elfName))
	if err != nil {
		return fmt.Errorf("package %s: %w", set[0].Name, err)
	}
	if err := os.Remove(filepath.Join(dir, vmlinuzName)); err != nil {
		return err
	}
	modules := filepath.Join("lib/modules", u.release)
	if _, err := os.Stat(filepath.Join(dir, modules)); err != nil {
		return fmt.Errorf("package %s: no modules in it", set[0].Name)
	}
	return writeManifest(dir, manifest{
		Release: u.release,
		Source:  set[0].Name + " " + set[0].Version,
		Digest:  digest,
		Modules: modules,
	})
}

// setCurrent makes the kernel in dir the current one, and removes those that are
// neither it nor the one before.
func (s *Store) setCurrent(dir string) error {
	before, err := s.current()
	if err == nil && before == dir {
		return nil
	}
	store := filepath.Dir(filepath.Dir(dir))
	link := filepath.Join(store, tmpPrefix+"current")
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(filepath.Join("packages", filepath.Base(dir)), link); err != nil {
		return err
	}
	if err := os.Rename(link, filepath.Join(store, "current")); err != nil {
		return err
	}
	all, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		return err
	}
	for _, e := range all {
		if path := filepath.Join(filepath.Dir(dir), e.Name()); path != dir && path != before {
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("remove an old kernel: %w", err)
			}
		}
	}
	return nil
}
