package image

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"
	"time"
)

// The archive comes from mmdebstrap, that is from the maintainer scripts of
// every package in it, so it is read as a stranger's: each name, type and
// number is checked, and everything that grows has a limit.
const (
	maxEntries   = 2_000_000
	maxPath      = 4095
	maxComponent = 255
	maxDisk      = 16 << 30
	// maxXattrs of one file, names and values, so that they fit the one block
	// that ext4 has for them.
	maxXattrs = 2 << 10
	// maxStatus bounds dpkg's status file, maxKept any other file that we edit.
	maxStatus = 32 << 20
	maxKept   = 1 << 20
	// maxSkel bounds the number of files for the home directory.
	maxSkel = 64
)

const xattrRecord = "SCHILY.xattr."

// entry is what a tree knows of one name of the archive.
type entry struct {
	kind     byte // tar type
	size     int64
	mtime    int64
	link     string // where a symbolic link goes
	implicit bool   // a directory that something lies in, without an entry of its own so far
}

// tree is what an archive holds, without the contents.
type tree struct {
	entries map[string]entry
	kept    map[string][]byte // the files that edits or the record are made from
	epoch   time.Time
}

// scan reads a whole archive and says what is in it, or what is wrong with it.
func scan(r io.Reader, epoch time.Time) (*tree, error) {
	t := &tree{entries: map[string]entry{}, kept: map[string][]byte{}, epoch: epoch}
	skel := 0
	err := walk(r, func(hdr *tar.Header, body io.Reader) error {
		if dropped(hdr) {
			return nil
		}
		if err := t.add(hdr); err != nil {
			return err
		}
		limit := keepLimit(hdr.Name)
		if hdr.Typeflag != tar.TypeReg || limit == 0 {
			return nil
		}
		if isSkel(hdr.Name) {
			if skel++; skel > maxSkel {
				return fmt.Errorf("more than %d files", maxSkel)
			}
		}
		if hdr.Size > limit {
			return fmt.Errorf("larger than %d bytes", limit)
		}
		b, err := io.ReadAll(body)
		t.kept[hdr.Name] = b
		return err
	})
	return t, err
}

// add takes one entry in, after its parents.
func (t *tree) add(hdr *tar.Header) error {
	name := hdr.Name
	if old, ok := t.entries[name]; ok && !(old.implicit && hdr.Typeflag == tar.TypeDir) {
		return errors.New("it is in the archive twice")
	}
	for dir := path.Dir(name); name != "." && dir != "."; dir = path.Dir(dir) {
		parent, ok := t.entries[dir]
		if !ok {
			t.entries[dir] = entry{kind: tar.TypeDir, implicit: true}
			continue
		}
		if parent.kind != tar.TypeDir {
			return fmt.Errorf("%s is not a directory", dir)
		}
		break
	}
	if hdr.Typeflag == tar.TypeLink {
		target, ok := t.entries[hdr.Linkname]
		if !ok {
			return fmt.Errorf("hard link to %q, which is not in the image before it", hdr.Linkname)
		}
		if target.kind == tar.TypeDir {
			return fmt.Errorf("hard link to the directory %q", hdr.Linkname)
		}
	}
	e := entry{kind: hdr.Typeflag, size: hdr.Size, mtime: hdr.ModTime.Unix()}
	if e.kind == tar.TypeSymlink {
		e.link = hdr.Linkname
	}
	t.entries[name] = e
	return nil
}

// follow is the entry that name stands for after symbolic links; links among
// its parents are not followed.
func (t *tree) follow(name string) (entry, bool) {
	for range 8 {
		e, ok := t.entries[name]
		if !ok || e.kind != tar.TypeSymlink {
			return e, ok
		}
		if path.IsAbs(e.link) {
			name = path.Clean(e.link)
		} else {
			name = path.Join("/", path.Dir(name), e.link)
		}
		name = name[1:]
	}
	return entry{}, false
}

// walk calls visit for every entry, with a header that has been checked and
// whose names are clean: relative, without "./" and trailing slashes, "." for
// the root.
func walk(r io.Reader, visit func(hdr *tar.Header, body io.Reader) error) error {
	limited := &io.LimitedReader{R: r, N: maxDisk}
	tr := tar.NewReader(bufio.NewReaderSize(limited, 1<<18))
	for n := 0; ; n++ {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) && n > 0 {
			return nil
		}
		if err != nil || n == maxEntries {
			return fmt.Errorf("read archive, entry %d: %w", n+1, archiveError(err, limited.N))
		}
		raw := hdr.Name
		if err := checkHeader(hdr); err != nil {
			return fmt.Errorf("archive entry %.200q: %w", raw, err)
		}
		if err := visit(hdr, tr); err != nil {
			return fmt.Errorf("archive entry %.200q: %w", raw, archiveError(err, limited.N))
		}
	}
}

// archiveError says what an error of the archive's reader means.
func archiveError(err error, left int64) error {
	switch {
	case left <= 0:
		return fmt.Errorf("the archive is larger than %d GB", maxDisk>>30)
	case err == nil:
		return fmt.Errorf("more than %d entries", maxEntries)
	case errors.Is(err, io.EOF):
		return errors.New("the archive is empty")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the archive ends in the middle")
	}
	return err
}

// checkHeader checks all of a header and cleans its names.
func checkHeader(hdr *tar.Header) error {
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	hdr.Name = name
	switch hdr.Typeflag {
	case tar.TypeDir, tar.TypeFifo, tar.TypeChar, tar.TypeBlock:
	case tar.TypeReg:
		if hdr.Size > maxDisk {
			return fmt.Errorf("it says it has %d bytes", hdr.Size)
		}
	case tar.TypeSymlink:
		if n := len(hdr.Linkname); n == 0 || n > maxPath || strings.ContainsRune(hdr.Linkname, 0) {
			return fmt.Errorf("symbolic link to a name of %d bytes", n)
		}
	case tar.TypeLink:
		if hdr.Linkname, err = cleanName(hdr.Linkname); err != nil {
			return fmt.Errorf("hard link to %.200q: %w", hdr.Linkname, err)
		}
	default:
		return fmt.Errorf("type %q is not for a filesystem", hdr.Typeflag)
	}
	if name == "." && hdr.Typeflag != tar.TypeDir {
		return errors.New("the root is not a directory")
	}
	for _, n := range []int64{int64(hdr.Uid), int64(hdr.Gid)} {
		if n < 0 || n > math.MaxInt32 {
			return fmt.Errorf("owner %d", n)
		}
	}
	if hdr.Devmajor < 0 || hdr.Devmajor > 0xfff || hdr.Devminor < 0 || hdr.Devminor > 0xfffff {
		return fmt.Errorf("device %d:%d", hdr.Devmajor, hdr.Devminor)
	}
	return nil
}

// cleanName is the path of an entry relative to the root.
func cleanName(raw string) (string, error) {
	name := strings.TrimSuffix(raw, "/")
	switch {
	case len(raw) > maxPath:
		return "", fmt.Errorf("name of %d bytes", len(raw))
	case name == "." || raw == "./":
		return ".", nil
	case strings.HasPrefix(raw, "/"):
		return "", errors.New("absolute name")
	case strings.ContainsRune(name, 0):
		return "", errors.New("name with a zero byte")
	}
	name = strings.TrimPrefix(name, "./")
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
			return "", fmt.Errorf("name with an empty part")
		case part == "..":
			return "", errors.New(`name with ".."`)
		case len(part) > maxComponent:
			return "", fmt.Errorf("name with a part of %d bytes", len(part))
		}
	}
	return name, nil
}

// keepLimit is how large a file may be whose contents scan keeps, 0 for those
// it does not.
func keepLimit(name string) int64 {
	switch name {
	case statusFile:
		return maxStatus
	case passwdFile, groupFile, shadowFile, gshadowFile, osReleaseFile:
		return maxKept
	}
	if isSkel(name) {
		return maxKept
	}
	return 0
}

func isSkel(name string) bool { return path.Dir(name) == skelDir }
