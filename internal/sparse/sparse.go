// Package sparse copies files that are mostly zeros, such as the memory of a
// machine, and finds the parts of a file that are not holes. Start with
// [Copy].
package sparse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	block = 4 << 10 // the unit in which file systems leave holes
	chunk = 1 << 20 // bytes read at once
)

var zeros [block]byte

// Copy makes dst a copy of the first size bytes of src, with holes where
// src has 4 KiB of zeros, and says how many bytes it wrote. What dst held before
// is gone. Holes of src are not read if it is an *os.File whose file system tells
// where they are; where dst's file system knows no holes, its truncation makes
// zeros.
//
// It returns io.ErrUnexpectedEOF if src is shorter than size, context.Cause(ctx)
// if ctx ends, and otherwise what reading or writing returned; dst then holds a
// part. It writes nothing to the disk that the kernel does not (no fsync). The
// offsets of both descriptors do not count, and that of src may move.
func Copy(ctx context.Context, dst *os.File, src io.ReaderAt, size int64) (written int64, err error) {
	file, _ := src.(*os.File)
	if file != nil {
		// The end of a file looks like a hole.
		st, err := file.Stat()
		if err != nil {
			return 0, err
		}
		if st.Mode().IsRegular() && st.Size() < size {
			return 0, fmt.Errorf("%s has %d bytes of %d: %w", file.Name(), st.Size(), size, io.ErrUnexpectedEOF)
		}
	}
	if err := dst.Truncate(0); err != nil {
		return 0, err
	}
	buf := make([]byte, chunk)
	for off := int64(0); off < size; {
		start, end := off, size
		if file != nil {
			if start, end, err = NextData(file, off, size); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return written, err
			}
		}
		start -= start % block
		for off = start; off < end; {
			if ctx.Err() != nil {
				return written, context.Cause(ctx)
			}
			b := buf[:min(chunk, end-off)]
			if err := ReadFull(src, b, off); err != nil {
				return written, err
			}
			n, err := writeBlocks(dst, b, off)
			written += n
			if err != nil {
				return written, err
			}
			off += int64(len(b))
		}
	}
	return written, dst.Truncate(size)
}

// writeBlocks writes the blocks of b that are not zero, neighbours at once.
func writeBlocks(dst *os.File, b []byte, off int64) (written int64, err error) {
	for start := 0; start < len(b); {
		end := start
		for end < len(b) && !IsZero(b[end:min(end+block, len(b))]) {
			end = min(end+block, len(b))
		}
		if end == start {
			start += block
			continue
		}
		n, err := dst.WriteAt(b[start:end], off+int64(start))
		written += int64(n)
		if err != nil {
			return written, err
		}
		start = end
	}
	return written, nil
}

// NextData is the first part of f at or after off that is not a hole, cut at
// size: [start, end). It returns io.EOF if there is none. Where the file system
// does not tell, all is data. It moves the offset of the descriptor, but does not
// depend on it.
func NextData(f *os.File, off, size int64) (start, end int64, err error) {
	if off >= size {
		return 0, 0, io.EOF
	}
	start, err = seek(f, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, 0, io.EOF
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return off, size, nil
	case err != nil:
		return 0, 0, err
	case start >= size:
		return 0, 0, io.EOF
	}
	end, err = seek(f, start, unix.SEEK_HOLE)
	switch {
	case errors.Is(err, unix.ENXIO): // cut short since
		return start, size, nil
	case err != nil:
		return 0, 0, err
	}
	// A hole made meanwhile may be at start: go on, whatever is there.
	return start, min(max(end, start+1), size), nil
}

func seek(f *os.File, off int64, whence int) (int64, error) {
	pos, err := unix.Seek(int(f.Fd()), off, whence)
	if err != nil {
		return 0, &os.PathError{Op: "seek", Path: f.Name(), Err: err}
	}
	return pos, nil
}

// ReadFull reads len(b) bytes at off. It returns io.ErrUnexpectedEOF if r ends
// before.
func ReadFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// IsZero says whether all of b is zero.
func IsZero(b []byte) bool {
	for len(b) > block {
		if !bytes.Equal(b[:block], zeros[:]) {
			return false
		}
		b = b[block:]
	}
	return bytes.Equal(b, zeros[:len(b)])
}
