// Package image makes and keeps the read-only disks that guests boot from.
//
// Start with Open for the Store, Store.Build for a new image and Store.Get for
// one that is there.
//
// A disk is an ext4 filesystem in a file named after its own sha256; a name is
// a small record that points at a disk. What the package guarantees:
//
//   - a name always points at a whole disk: both are written beside, synced to
//     the disk and renamed, disk first;
//   - building the same packages of the same release again gives the same bytes;
//   - a disk that a sandbox uses (Store.Use) is never taken away;
//   - when any record cannot be read, no disk is deleted, since that record may
//     be the one that needs it.
package image

import (
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
)

// ErrNotFound says that no image has the name or digest. Store.Get,
// Store.Remove and Store.Use return it.
var ErrNotFound = errors.New("no such image")

// ErrInUse says that a sandbox uses the image. Store.Remove returns it.
var ErrInUse = errors.New("image is in use by a sandbox")

// Image is one image of the store.
type Image struct {
	// Name is what people call it.
	Name string `json:"name"`
	// Digest is "sha256:<hex>" of the disk file.
	Digest string `json:"digest"`
	// Size is the length of the disk file in bytes.
	Size int64 `json:"size"`
	// Created is when it was built.
	Created time.Time `json:"created"`
	// Packages are those installed in it, sorted by name.
	Packages []Package `json:"packages"`
	// Recipe is what it was built from.
	Recipe Recipe `json:"recipe"`
	// Path is the disk file. It is where the store is now, so not recorded.
	Path string `json:"-"`
}

// Package is one installed package of the distribution.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Recipe is what an image was built from.
type Recipe struct {
	// Distribution is the ID of /etc/os-release in the image, "debian".
	Distribution string `json:"distribution"`
	// Suite is the release, "bookworm".
	Suite string `json:"suite"`
	// Packages are those asked for.
	Packages []string `json:"packages"`
	// Epoch is the time of the newest archive it was built from; no file in
	// the image is younger.
	Epoch time.Time `json:"epoch"`
}

// CorruptError says that a file of the store is not what it should be.
type CorruptError struct {
	Path string // the file
	What string // what differs
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("image file %s is damaged: %s", e.Path, e.What)
}

// PrerequisiteError says what this host lacks to build images, and what to do.
// Store.Build returns it.
type PrerequisiteError struct {
	Cause  string
	Remedy string // a command to run, or what to change
}

func (e *PrerequisiteError) Error() string { return e.Cause }

// Hint is what to do about it.
func (e *PrerequisiteError) Hint() string { return e.Remedy }

// UnknownPackageError says that the distribution has no such package.
// Store.Build returns it.
type UnknownPackageError struct {
	Package string
	Suite   string
}

func (e *UnknownPackageError) Error() string {
	return fmt.Sprintf("%s has no package %q", e.Suite, e.Package)
}

var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// ValidName says whether an image may be called so.
func ValidName(name string) bool { return validName.MatchString(name) }

const (
	digestPrefix = "sha256:"
	// minPrefix hex digits of a digest are enough to name an image.
	minPrefix = 8
)

// diskHex is the hex part of a whole digest.
func diskHex(digest string) (string, error) {
	h, ok := strings.CutPrefix(digest, digestPrefix)
	if !ok || len(h) != 64 || !isLowerHex(h) {
		return "", fmt.Errorf("%.80q is not a sha256 digest", digest)
	}
	return h, nil
}

func isLowerHex(s string) bool {
	if strings.ToLower(s) != s {
		return false
	}
	if len(s)%2 == 1 {
		s += "0"
	}
	_, err := hex.DecodeString(s)
	return err == nil
}

// digestRef is the hex digits of a reference by digest: "sha256:" and at least
// eight digits, or at least eight digits alone.
func digestRef(ref string) (string, bool) {
	h := strings.TrimPrefix(ref, digestPrefix)
	return h, len(h) >= minPrefix && len(h) <= 64 && isLowerHex(h)
}
