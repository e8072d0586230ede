// Package apt asks the distribution's own package manager for packages: which
// version there is, what it depends on, the .deb itself. It needs no root and
// changes nothing of the system's: lists, caches and the record of what is
// installed (an empty one, so that an installed package never hides the one in
// the archive) live in a directory of the caller's. What the host's /etc/apt
// says (sources, proxies, keys, pins) stays in force, and every byte is verified
// by apt, as on any other day.
//
// Start with [New], call [Apt.Update] once, then the rest.
//
// An Apt may be used by many goroutines and a directory by many processes: what
// writes to it is serialised by a lock file.
package apt

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// ErrNoPackage is returned (wrapped, with the name) for a package which no
// source of the host has.
var ErrNoPackage = errors.New("no such package")

// Apt is the host's apt with a private state.
type Apt struct {
	dir string
}

// Package is one version of a package.
type Package struct {
	Name    string
	Version string
}

// New returns an Apt whose state is kept in dir. Nothing is created before it is
// needed.
func New(dir string) *Apt { return &Apt{dir: dir} }

// A name that matches is not an option, a pattern, or a file to apt.
var packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]{1,127}$`)

func checkName(name string) error {
	if !packageName.MatchString(name) {
		return fmt.Errorf("package name %q: %w", name, ErrNoPackage)
	}
	return nil
}

// Update fetches the package lists. A source of a third party that cannot be
// fetched is passed over; one of the distribution's own is an error.
func (a *Apt) Update(ctx context.Context) error {
	unlock, err := a.lock(ctx)
	if err != nil {
		return fmt.Errorf("update package lists: %w", err)
	}
	defer unlock()
	options, err := a.onlyPackages(ctx)
	if err != nil {
		return fmt.Errorf("update package lists: %w", err)
	}
	out, errOut, runErr := a.run(ctx, "apt-get", append(options, "-q", "update")...)
	if ctx.Err() != nil {
		return fmt.Errorf("update package lists: %w", context.Cause(ctx))
	}
	own, err := a.targets(ctx)
	switch missing := failedOwn(own, out, errOut); {
	case len(own) == 0 && runErr != nil:
		return fmt.Errorf("update package lists: %w", runErr)
	case err != nil:
		return fmt.Errorf("update package lists: %w", err)
	case len(own) == 0:
		return fmt.Errorf("update package lists: no source of Debian or Ubuntu came%s", tail(errOut))
	case missing != "":
		return fmt.Errorf("update package lists: %s could not be fetched%s", missing, tail(errOut))
	}
	return nil
}

// onlyPackages returns options that turn off every index which is not a list of
// binary packages: descriptions, icons and contents are most of what there is.
func (a *Apt) onlyPackages(ctx context.Context) ([]string, error) {
	out, _, err := a.run(ctx, "apt-config", "dump", "--format", "%f%n", "Acquire::IndexTargets")
	if err != nil {
		return nil, err
	}
	var options []string
	for line := range strings.Lines(out) {
		target, ok := strings.CutSuffix(strings.TrimSpace(line), "::MetaKey")
		if ok && target != "Acquire::IndexTargets::deb::Packages" {
			options = append(options, "-o", target+"::DefaultEnabled=false")
		}
	}
	return options, nil
}

// failedOwn returns which of the distribution's archives ("URI suite") apt said
// it could not fetch. Old lists may still be there then, and apt may have called
// it a success.
func failedOwn(own []target, out, errOut string) string {
	suites := make(map[string]bool)
	for _, t := range own {
		suites[t.archive()] = true
		// Never seen, and so of unknown origin, but of a name no third party has.
		suites[t.codename+"-security"] = true
		suites[t.codename+"-updates"] = true
	}
	for line := range strings.Lines(out) {
		// Err:6 http://host/debian bookworm/main amd64 Packages
		f := strings.Fields(line)
		if len(f) < 3 || !strings.HasPrefix(f[0], "Err:") {
			continue
		}
		suite, _, _ := strings.Cut(f[2], "/")
		archive := strings.TrimSuffix(f[1], "/") + " " + suite
		if suites[archive] || suites[suite] {
			return archive
		}
	}
	for line := range strings.Lines(errOut) {
		// E: Release file for http://host/debian/dists/bookworm/InRelease is expired
		for _, t := range own {
			if strings.HasPrefix(line, "E:") && t.baseURI != "" && strings.Contains(line, t.baseURI) {
				return t.archive()
			}
		}
	}
	return ""
}

// Candidate returns the version of a package that would be installed. The error
// is [ErrNoPackage] if there is none.
func (a *Apt) Candidate(ctx context.Context, name string) (Package, error) {
	if err := checkName(name); err != nil {
		return Package{}, err
	}
	out, _, err := a.run(ctx, "apt-cache", "policy", name)
	if err != nil {
		return Package{}, fmt.Errorf("look up package %s: %w", name, err)
	}
	found := false
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, " ") {
			found = strings.TrimSpace(line) == name+":"
			continue
		}
		version, ok := strings.CutPrefix(strings.TrimSpace(line), "Candidate: ")
		if found && ok && version != "(none)" {
			return Package{Name: name, Version: version}, nil
		}
	}
	return Package{}, fmt.Errorf("package %s: %w", name, ErrNoPackage)
}

// Depends returns the names of the packages the candidate of name depends on,
// in order: of alternatives the first. The error is [ErrNoPackage] if there is no
// candidate.
func (a *Apt) Depends(ctx context.Context, name string) ([]string, error) {
	p, err := a.Candidate(ctx, name)
	if err != nil {
		return nil, err
	}
	out, _, err := a.run(ctx, "apt-cache", "show", name+"="+p.Version)
	if err != nil {
		return nil, fmt.Errorf("look up what %s depends on: %w", name, err)
	}
	stanzas, err := parseStanzas(strings.NewReader(out))
	if err != nil || len(stanzas) == 0 {
		return nil, fmt.Errorf("look up what %s depends on: no record of it (%w)", name, errors.Join(err, ErrNoPackage))
	}
	return firstAlternatives(stanzas[0]["depends"]), nil
}

// firstAlternatives turns "a (= 1) | b, c:any [amd64]" into a, c.
func firstAlternatives(field string) []string {
	var names []string
	for group := range strings.SplitSeq(field, ",") {
		first, _, _ := strings.Cut(group, "|")
		name, _, _ := strings.Cut(strings.TrimSpace(first), " ")
		name, _, _ = strings.Cut(name, "(")
		name, _, _ = strings.Cut(name, ":")
		if name != "" {
			names = append(names, name)
		}
	}
	return names
}

// Download fetches the candidate of name into destDir, which has to exist, and
// returns the path of the .deb. The error is [ErrNoPackage] if there is none.
func (a *Apt) Download(ctx context.Context, name, destDir string) (string, error) {
	p, err := a.Candidate(ctx, name)
	if err != nil {
		return "", err
	}
	unlock, err := a.lock(ctx)
	if err != nil {
		return "", fmt.Errorf("download %s: %w", name, err)
	}
	defer unlock()
	// A directory of its own: apt names the file, and there is exactly one then.
	tmp, err := os.MkdirTemp(destDir, ".download-*")
	if err != nil {
		return "", fmt.Errorf("download %s: %w", name, err)
	}
	defer os.RemoveAll(tmp)
	if _, _, err := a.runIn(ctx, tmp, "apt-get", "-q", "download", name+"="+p.Version); err != nil {
		return "", fmt.Errorf("download %s %s: %w", name, p.Version, err)
	}
	files, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(files) != 1 {
		return "", fmt.Errorf("download %s %s: apt left %d packages instead of one", name, p.Version, len(files))
	}
	deb := filepath.Join(destDir, filepath.Base(files[0]))
	if err := os.Rename(files[0], deb); err != nil {
		return "", fmt.Errorf("download %s: %w", name, err)
	}
	return deb, nil
}

// ReleaseTime returns when the newest of the distribution's archives was made,
// as its signed Release file says: the same packages, the same time.
func (a *Apt) ReleaseTime(ctx context.Context) (time.Time, error) {
	own, err := a.targets(ctx)
	if err != nil {
		return time.Time{}, fmt.Errorf("read the time of the package lists: %w", err)
	}
	var newest time.Time
	for _, t := range own {
		date, err := t.releaseDate()
		if err != nil {
			return time.Time{}, fmt.Errorf("read the time of the package lists: %w", err)
		}
		if date.After(newest) {
			newest = date
		}
	}
	if newest.IsZero() {
		return time.Time{}, errors.New("read the time of the package lists: there are none of Debian or Ubuntu yet")
	}
	return newest, nil
}

// maxRelease bounds a Release file. Debian's is 150 KB.
const maxRelease = 16 << 20

func releaseDate(path string) (time.Time, error) {
	f, err := os.Open(path)
	if err != nil {
		return time.Time{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRelease))
	if err != nil {
		return time.Time{}, err
	}
	s := bufio.NewScanner(bytes.NewReader(data))
	for s.Scan() {
		value, ok := strings.CutPrefix(s.Text(), "Date:")
		if !ok {
			continue
		}
		value = strings.TrimSpace(value)
		for _, layout := range []string{"Mon, _2 Jan 2006 15:04:05 MST", "Mon, _2 Jan 2006 15:04:05 -0700"} {
			if t, err := time.Parse(layout, value); err == nil {
				return t.UTC(), nil
			}
		}
		return time.Time{}, fmt.Errorf("%s: the date %q is not understood", path, value)
	}
	return time.Time{}, fmt.Errorf("%s: no date in it", path)
}
