package image

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"path"
	"strings"
)

// Python keeps compiled modules in __pycache__/<module>.<tag>.pyc. Sixteen
// bytes in front say for which source: magic, flags, then its mtime and size,
// or a hash of it (PEP 552).
//
// Under SOURCE_DATE_EPOCH Python writes the checked hash, so every import in
// the guest would read and hash the source; and where mtimes are clamped, a
// recorded mtime is no longer the file's, so every import would compile anew.
// Both would cost each start of a program in each sandbox. So the header is
// written again here, for the source as it is in the image.
const pycHeader = 16

const (
	pycHashed  = 1 << 0
	pycChecked = 1 << 1
)

// fixPyc is the body of a compiled module with a header that fits the tree.
func (t *tree) fixPyc(name string, body io.Reader) (io.Reader, error) {
	head := make([]byte, pycHeader)
	n, err := io.ReadFull(body, head)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return bytes.NewReader(head[:n]), nil
	}
	if err != nil {
		return nil, err
	}
	source, ok := t.follow(pycSource(name))
	flags := binary.LittleEndian.Uint32(head[4:])
	if ok && source.kind == tar.TypeReg && string(head[2:4]) == "\r\n" {
		mtime := uint32(t.clamp(source.mtime))
		switch {
		case flags == pycHashed|pycChecked:
			binary.LittleEndian.PutUint32(head[4:], 0)
			binary.LittleEndian.PutUint32(head[8:], mtime)
			binary.LittleEndian.PutUint32(head[12:], uint32(source.size))
		case flags == 0 && int64(binary.LittleEndian.Uint32(head[8:])) > t.epoch.Unix():
			binary.LittleEndian.PutUint32(head[8:], mtime)
		}
	}
	return io.MultiReader(bytes.NewReader(head), body), nil
}

// clamp is a time of the archive as it is in the image.
func (t *tree) clamp(unix int64) int64 { return max(0, min(unix, t.epoch.Unix())) }

// pycSource is the source of a compiled module.
func pycSource(name string) string {
	dir, base := path.Split(name)
	module, _, _ := strings.Cut(base, ".")
	return path.Join(path.Dir(path.Clean(dir)), module+".py")
}

func isPyc(name string) bool {
	return strings.HasSuffix(name, ".pyc") && path.Base(path.Dir(name)) == "__pycache__"
}
