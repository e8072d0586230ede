package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

const (
	superblockOffset = 1024
	superblockSize   = 1024
	ext4Magic        = 0xef53
)

// superblock is the part of ext4's that we need.
type superblock struct {
	blockSize      int64
	blocks         int64
	inodes         int64
	inodesPerGroup int64
}

func readSuperblock(r io.ReaderAt) (superblock, error) {
	var b [superblockSize]byte
	if _, err := r.ReadAt(b[:], superblockOffset); err != nil {
		return superblock{}, fmt.Errorf("no superblock: %w", err)
	}
	if binary.LittleEndian.Uint16(b[0x38:]) != ext4Magic {
		return superblock{}, errors.New("not an ext4 filesystem")
	}
	shift := binary.LittleEndian.Uint32(b[0x18:])
	if shift > 6 {
		return superblock{}, fmt.Errorf("ext4 block size 1024<<%d", shift)
	}
	return superblock{
		blockSize:      1024 << shift,
		blocks:         int64(binary.LittleEndian.Uint32(b[0x4:])),
		inodes:         int64(binary.LittleEndian.Uint32(b[0x0:])),
		inodesPerGroup: int64(binary.LittleEndian.Uint32(b[0x28:])),
	}, nil
}

// padInodeBitmaps sets the bits behind the last inode of each group, which
// tar2ext4 leaves at zero and e2fsck wants at one.
func padInodeBitmaps(disk *os.File) error {
	sb, err := readSuperblock(disk)
	if err != nil {
		return err
	}
	bits := sb.blockSize * 8
	if sb.inodesPerGroup <= 0 || sb.inodesPerGroup > bits || sb.inodesPerGroup%8 != 0 {
		return fmt.Errorf("%d inodes in a group", sb.inodesPerGroup)
	}
	pad := make([]byte, (bits-sb.inodesPerGroup)/8)
	for i := range pad {
		pad[i] = 0xff
	}
	// tar2ext4 writes the short form of the descriptors, right after the block
	// of the superblock.
	const descriptorSize, inodeBitmapOffset = 32, 4
	for g := range sb.inodes / sb.inodesPerGroup {
		var b [4]byte
		if _, err := disk.ReadAt(b[:], sb.blockSize+g*descriptorSize+inodeBitmapOffset); err != nil {
			return err
		}
		at := int64(binary.LittleEndian.Uint32(b[:]))*sb.blockSize + sb.inodesPerGroup/8
		if _, err := disk.WriteAt(pad, at); err != nil {
			return err
		}
	}
	return nil
}
