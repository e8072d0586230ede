package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/atomicfile"
)

const (
	verifiedSuffix = ".verified"
	maxVerified    = 4 << 10
)

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

// verified is what VerifyOnce remembers about a disk. Any write to the file
// changes its mtime or ctime, any replacement its inode.
type verified struct {
	Boot   string `json:"boot_id"`
	Size   int64  `json:"size"`
	Mtime  int64  `json:"mtime_ns"`
	Ctime  int64  `json:"ctime_ns"`
	Inode  uint64 `json:"inode"`
	Device uint64 `json:"device"`
}

// VerifyOnce is Verify for the first use since the host booted, and a look at
// the file's size, times and inode afterwards. Where it cannot write down that
// it did, as in a store of somebody else's, it verifies each time.
func (s *Store) VerifyOnce(ctx context.Context, img *Image) error {
	before, err := identify(img.Path)
	if err != nil {
		return fmt.Errorf("verify image %s: %w", img.Name, err)
	}
	memo := img.Path + verifiedSuffix
	var known verified
	if b, err := atomicfile.ReadFile(memo, maxVerified); err == nil &&
		json.Unmarshal(b, &known) == nil && known == before {
		return checkDisk(img)
	}
	if err := s.Verify(ctx, img); err != nil {
		return err
	}
	if after, err := identify(img.Path); err != nil || after != before {
		return &CorruptError{Path: img.Path, What: "it changed while it was read"}
	}
	b, err := json.Marshal(before)
	if err != nil {
		return err
	}
	_ = atomicfile.WriteFile(memo, append(b, '\n'), 0o644) // only costs time the next time
	return nil
}

func identify(path string) (verified, error) {
	boot, err := atomicfile.ReadFile("/proc/sys/kernel/random/boot_id", 128)
	if err != nil {
		return verified{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return verified{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return verified{
		Boot: strings.TrimSpace(string(boot)), Size: st.Size,
		Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano(), Inode: st.Ino, Device: uint64(st.Dev),
	}, nil
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
