package template

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/sparse"
)

const (
	digestPrefix = "sparse-sha256:"
	digestBlock  = 64 << 10
	digestChunk  = 16 * digestBlock
)

// digest is a checksum of the first size bytes of f that does not depend on
// which zeros are holes and which are on the disk, and does not read holes: memory
// of a GiB of which 60 MB were touched costs 60 MB.
//
// It is the SHA-256 of size, then for each block of 64 KiB (the last may be
// shorter) that is not all zero: its offset, its length, its bytes. Numbers are 8
// bytes, big endian. It returns io.ErrUnexpectedEOF if f has become shorter, and
// context.Cause(ctx) if ctx ends.
func digest(ctx context.Context, f *os.File, size int64) (string, error) {
	h := sha256.New()
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(size)))
	buf := make([]byte, digestChunk)
	for off := int64(0); off < size; {
		start, end, err := sparse.NextData(f, off, size)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return "", err
		}
		// Whole blocks, whatever the unit of the file system's holes. A block is
		// never looked at twice: off is always the end of one.
		start = max(off, start-start%digestBlock)
		end = min(size, (end+digestBlock-1)/digestBlock*digestBlock)
		for off = start; off < end; {
			if ctx.Err() != nil {
				return "", context.Cause(ctx)
			}
			b := buf[:min(digestChunk, end-off)]
			if err := sparse.ReadFull(f, b, off); err != nil {
				return "", err
			}
			for len(b) > 0 {
				n := min(digestBlock, len(b))
				if !sparse.IsZero(b[:n]) {
					var head [16]byte
					binary.BigEndian.PutUint64(head[:8], uint64(off))
					binary.BigEndian.PutUint64(head[8:], uint64(n))
					h.Write(head[:])
					h.Write(b[:n])
				}
				b, off = b[n:], off+int64(n)
			}
		}
	}
	return digestPrefix + hex.EncodeToString(h.Sum(nil)), nil
}

func validDigest(s string) bool {
	h, ok := strings.CutPrefix(s, digestPrefix)
	return ok && len(h) == 2*sha256.Size && isHex(h)
}
