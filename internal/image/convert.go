package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
)

// convert writes the archive that t was scanned from, with the edits, as an
// ext4 filesystem. The filesystem depends on the archive, the edits and the
// epoch alone: tar2ext4 writes neither clock nor random identifiers.
func (t *tree) convert(ctx context.Context, archive io.Reader, edits map[string]file, disk *os.File) error {
	pr, pw := io.Pipe()
	out := &sparseFile{f: disk}
	converted := make(chan error, 1)
	go func() {
		err := tar2ext4.ConvertTarToExt4(pr, out, tar2ext4.MaximumDiskSize(maxDisk))
		pr.CloseWithError(errors.Join(errStopped, err))
		converted <- err
	}()
	buffered := bufio.NewWriterSize(pw, 1<<18)
	w := &treeWriter{tree: t, tw: tar.NewWriter(buffered), edits: maps.Clone(edits)}
	err := w.writeAll(readerWithContext{ctx, archive})
	if err == nil {
		err = buffered.Flush()
	}
	pw.CloseWithError(err)
	made := <-converted
	switch {
	case err != nil && !errors.Is(err, errStopped):
		return err
	case made != nil:
		return fmt.Errorf("make ext4 filesystem: %w", made)
	}
	if err := errors.Join(out.finish(), padInodeBitmaps(disk)); err != nil {
		return fmt.Errorf("make ext4 filesystem: %w", err)
	}
	return nil
}

// errStopped tells the side that writes the archive to look at the error of
// the side that makes the filesystem.
var errStopped = errors.New("the filesystem was given up")

// treeWriter writes the archive anew as tar2ext4 needs it: parents first,
// clean names, known times.
type treeWriter struct {
	tree    *tree
	tw      *tar.Writer
	edits   map[string]file // those that are still to be written
	written map[string]bool // directories
}

func (w *treeWriter) writeAll(archive io.Reader) error {
	w.written = map[string]bool{}
	err := walk(archive, func(hdr *tar.Header, body io.Reader) error {
		if dropped(hdr) {
			return nil
		}
		if f, ok := w.edits[hdr.Name]; ok {
			delete(w.edits, hdr.Name)
			return w.writeFile(hdr.Name, f)
		}
		return w.writeEntry(hdr, body)
	})
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(w.edits)) {
		if err := w.writeFile(name, w.edits[name]); err != nil {
			return fmt.Errorf("add /%s: %w", name, err)
		}
	}
	return w.tw.Close()
}

// writeEntry writes one entry of the archive.
func (w *treeWriter) writeEntry(hdr *tar.Header, body io.Reader) error {
	out := &tar.Header{
		Typeflag: hdr.Typeflag, Name: hdr.Name, Linkname: hdr.Linkname,
		Mode: hdr.Mode & 0o7777, Uid: hdr.Uid, Gid: hdr.Gid,
		Devmajor: hdr.Devmajor, Devminor: hdr.Devminor,
		ModTime: time.Unix(w.tree.clamp(hdr.ModTime.Unix()), 0),
	}
	xattrs, err := imageXattrs(hdr.PAXRecords)
	if err != nil {
		return err
	}
	out.PAXRecords = xattrs
	if hdr.Typeflag != tar.TypeReg {
		return w.write(out, nil)
	}
	out.Size = hdr.Size
	if isPyc(hdr.Name) {
		if body, err = w.tree.fixPyc(hdr.Name, body); err != nil {
			return err
		}
	}
	return w.write(out, body)
}

// imageXattrs are the extended attributes that mean something in a guest.
// Others belong to the host (security.selinux), to a filesystem that lies
// above (trusted.overlay), or have another form on the disk (ACLs).
func imageXattrs(records map[string]string) (map[string]string, error) {
	var kept map[string]string
	total := 0
	for key, value := range records {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok || name != "security.capability" && !strings.HasPrefix(name, "user.") {
			continue
		}
		if len(name) > maxComponent || strings.ContainsAny(name, "=\x00") {
			return nil, fmt.Errorf("extended attribute %.80q has no proper name", name)
		}
		if total += len(name) + len(value) + 20; total > maxXattrs {
			return nil, fmt.Errorf("more than %d bytes of extended attributes", maxXattrs)
		}
		if kept == nil {
			kept = map[string]string{}
		}
		kept[key] = value
	}
	return kept, nil
}

func (w *treeWriter) writeFile(name string, f file) error {
	hdr := &tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: f.mode, Uid: f.uid, Gid: f.gid,
		Size: int64(len(f.data)), ModTime: time.Unix(w.tree.epoch.Unix(), 0),
	}
	if f.dir {
		hdr.Typeflag = tar.TypeDir
	}
	return w.write(hdr, bytes.NewReader(f.data))
}

// write writes an entry after the directories that it lies in.
func (w *treeWriter) write(hdr *tar.Header, body io.Reader) error {
	if hdr.Name != "." {
		if err := w.parent("."); err != nil {
			return err
		}
	}
	for i, c := range hdr.Name {
		if c == '/' {
			if err := w.parent(hdr.Name[:i]); err != nil {
				return err
			}
		}
	}
	if hdr.Typeflag == tar.TypeDir {
		w.written[hdr.Name] = true
		hdr.Name += "/"
	}
	hdr.Format = tar.FormatPAX
	hdr.AccessTime, hdr.ChangeTime = hdr.ModTime, hdr.ModTime
	if err := w.tw.WriteHeader(hdr); err != nil {
		return err
	}
	if hdr.Typeflag != tar.TypeReg {
		return nil
	}
	_, err := io.Copy(w.tw, body)
	return err
}

// parent writes a directory that the archive has no entry for, or a later one
// that replaces this.
func (w *treeWriter) parent(dir string) error {
	if w.written[dir] {
		return nil
	}
	w.written[dir] = true
	t := time.Unix(w.tree.epoch.Unix(), 0)
	return w.tw.WriteHeader(&tar.Header{
		Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, Format: tar.FormatPAX,
		ModTime: t, AccessTime: t, ChangeTime: t,
	})
}

// sparseBlock is the piece of a disk that is left out where it is zero.
const sparseBlock = 4096

// sparseFile leaves holes for zeros in a new, empty file.
type sparseFile struct {
	f    *os.File
	pos  int64
	high int64 // nothing was written from here on
}

var zeros [sparseBlock]byte

func (s *sparseFile) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n := int(min(int64(len(p)-done), sparseBlock-s.pos%sparseBlock))
		piece := p[done : done+n]
		if s.pos < s.high || !bytes.Equal(piece, zeros[:n]) {
			// Write the run of such pieces at once.
			for done+n < len(p) {
				next := p[done+n : min(done+n+sparseBlock, len(p))]
				if s.pos+int64(n) >= s.high && bytes.Equal(next, zeros[:len(next)]) {
					break
				}
				n += len(next)
			}
			if _, err := s.f.WriteAt(p[done:done+n], s.pos); err != nil {
				return done, err
			}
		}
		done += n
		s.pos += int64(n)
		s.high = max(s.high, s.pos)
	}
	return done, nil
}

func (s *sparseFile) Read(p []byte) (int, error) {
	n, err := s.f.ReadAt(p, s.pos)
	s.pos += int64(n)
	return n, err
}

func (s *sparseFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += s.pos
	case io.SeekEnd:
		offset += s.high
	}
	if offset < 0 {
		return 0, os.ErrInvalid
	}
	s.pos = offset
	return offset, nil
}

// finish gives the file its length, which may end in a hole.
func (s *sparseFile) finish() error {
	return s.f.Truncate(s.high)
}
