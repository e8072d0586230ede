package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/ironclaw-run/ironclaw/internal/verifyonce"
)

const verifiedSuffix = ".verified"

// Verify reads the whole disk and compares it with its digest. A difference is
// a *CorruptError.
func (s *Store) Verify(ctx context.Context, img *Image) error {
	if err := checkDisk(img); err != nil {
		return err
	}
	f, err := os.Open(img.Path)
	if err != nil {
		return fmt.Errorf("verify image %s: %w", img.Name, err)
	}
	defer f.Close()
	return verifyFile(ctx, img, f)
}

func verifyFile(ctx context.Context, img *Image, f *os.File) error {
	sum, err := hashFile(ctx, f)
	if err != nil {
		return fmt.Errorf("verify image %s: %w", img.Name, err)
	}
	if sum != img.Digest {
		return &CorruptError{Path: img.Path, What: fmt.Sprintf("its digest is %s, recorded is %s", sum, img.Digest)}
	}
	return nil
}

// hashFile is the digest of f from its beginning.
func hashFile(ctx context.Context, f *os.File) (string, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	h := sha256.New()
	if _, err := io.Copy(h, readerWithContext{ctx, f}); err != nil {
		return "", err
	}
	return digestPrefix + hex.EncodeToString(h.Sum(nil)), nil
}

// readerWithContext ends a long copy when ctx ends.
type readerWithContext struct {
	ctx context.Context
	r   io.Reader
}

func (r readerWithContext) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// VerifyOnce is Verify for the first use since the host booted, and a look at
// the file's size, times and inode afterwards. Where it cannot write down that
// it did, as in a store of somebody else's, it verifies each time.
func (s *Store) VerifyOnce(ctx context.Context, img *Image) error {
	if err := checkDisk(img); err != nil {
		return err
	}
	f, err := os.Open(img.Path)
	if err != nil {
		return fmt.Errorf("verify image %s: %w", img.Name, err)
	}
	defer f.Close()
	err = verifyonce.Files(ctx, img.Path+verifiedSuffix, func(ctx context.Context) error {
		return verifyFile(ctx, img, f)
	}, f)
	if _, ok := errors.AsType[*verifyonce.ChangedError](err); ok {
		return &CorruptError{Path: img.Path, What: "it changed while it was read"}
	}
	return err
}

// checkDisk looks at the size and the superblock of the disk.
func checkDisk(img *Image) error {
	f, err := os.Open(img.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return &CorruptError{Path: img.Path, What: "the disk of image " + img.Name + " is missing"}
	} else if err != nil {
		return fmt.Errorf("open disk of image %s: %w", img.Name, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("open disk of image %s: %w", img.Name, err)
	}
	if !st.Mode().IsRegular() {
		return &CorruptError{Path: img.Path, What: "not a regular file"}
	}
	if st.Size() != img.Size {
		return &CorruptError{Path: img.Path, What: fmt.Sprintf("it has %d bytes, recorded are %d", st.Size(), img.Size)}
	}
	sb, err := readSuperblock(f)
	if err != nil {
		return &CorruptError{Path: img.Path, What: err.Error()}
	}
	if size := sb.blocks * sb.blockSize; size != img.Size {
		return &CorruptError{Path: img.Path, What: fmt.Sprintf("its ext4 filesystem has %d bytes, the file %d", size, img.Size)}
	}
	return nil
}
