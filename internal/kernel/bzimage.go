package kernel

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"
	"github.com/pierrec/lz4/v4"
)

// A bzImage is a boot sector with a header in it, the rest of the real-mode code,
// and the protected-mode code, which has the compressed kernel in it. What is read
// of the header (Documentation/arch/x86/boot.rst), all little endian:
//
//	0x1f1  1  setup_sects      sectors of real-mode code after the boot sector
//	0x202  4  "HdrS"
//	0x206  2  version          2.8 and later have what follows
//	0x20e  2  kernel_version   place of a string, less 0x200
//	0x236  2  xloadflags       bit 0: has a 64-bit entry point
//	0x248  4  payload_offset   from the start of the protected-mode code
//	0x24c  4  payload_length   with the four bytes at its end: the size of what
//	                           comes out
const (
	hdrSetupSects    = 0x1f1
	hdrMagic         = 0x202
	hdrVersion       = 0x206
	hdrKernelVersion = 0x20e
	hdrXLoadFlags    = 0x236
	hdrPayloadOffset = 0x248
	hdrPayloadLength = 0x24c
	hdrEnd           = 0x268

	sector = 512

	maxImage = 256 << 20 // of a bzImage; Debian's has 8 MB
	maxELF   = 512 << 20 // of a kernel; Debian's has 50 MB

	// maxWindow bounds the memory a stream may ask for. The kernel's own build
	// asks for 128 MiB, of xz and of zstd.
	maxWindow = 128 << 20
)

// bzImage is what matters of a parsed bzImage.
type bzImage struct {
	release string // may be empty
	payload []byte // without the size at its end
	size    int64  // of the ELF in it
}

// isBzImage says whether the start of a file, at least hdrEnd bytes of it, is that
// of a bzImage.
func isBzImage(head []byte) bool {
	return len(head) >= hdrEnd && string(head[hdrMagic:hdrMagic+4]) == "HdrS"
}

func parseBzImage(data []byte, limit int64) (*bzImage, error) {
	if !isBzImage(data) {
		return nil, errors.New("not a bzImage")
	}
	le := binary.LittleEndian
	if v := le.Uint16(data[hdrVersion:]); v < 0x208 {
		return nil, fmt.Errorf("a bzImage of boot protocol %d.%d, which is older than Linux 2.6.26", v>>8, v&0xff)
	}
	if v := le.Uint16(data[hdrVersion:]); v >= 0x20c && le.Uint16(data[hdrXLoadFlags:])&1 == 0 {
		return nil, errors.New("a kernel for 32-bit machines; x86-64 is needed")
	}
	sects := int64(data[hdrSetupSects])
	if sects == 0 {
		sects = 4
	}
	start := (sects+1)*sector + int64(le.Uint32(data[hdrPayloadOffset:]))
	length := int64(le.Uint32(data[hdrPayloadLength:]))
	if length <= 4 {
		return nil, errors.New("a bzImage without a kernel in it")
	}
	if have := int64(len(data)); start+length > have {
		return nil, fmt.Errorf("truncated: it has %d bytes, its header promises at least %d", have, start+length)
	}
	payload := data[start : start+length]
	img := &bzImage{
		release: imageRelease(data, sects),
		payload: payload[:length-4],
		size:    int64(le.Uint32(payload[length-4:])),
	}
	if bytes.HasPrefix(payload, []byte("\x1f\x8b")) {
		img.payload = payload // of gzip the size is a part
	}
	if img.size > limit {
		return nil, fmt.Errorf("the kernel in it has %d bytes, more than the %d allowed", img.size, limit)
	}
	return img, nil
}

// imageRelease returns the release the header tells, or nothing.
func imageRelease(data []byte, sects int64) string {
	at := int64(binary.LittleEndian.Uint16(data[hdrKernelVersion:])) + 0x200
	if at == 0x200 || at >= min((sects+1)*sector, int64(len(data))) {
		return ""
	}
	return leadingRelease(data[at:])
}

// extract writes the ELF which is in the image to w.
func (img *bzImage) extract(w io.Writer) error {
	name, open := compression(img.payload)
	if open == nil {
		return fmt.Errorf("the kernel in it is compressed with %s, which is not supported", name)
	}
	r, err := open(img.payload, img.size)
	if err != nil {
		return fmt.Errorf("decompress the kernel (%s): %w", name, err)
	}
	defer r.Close()
	n, err := io.Copy(w, io.LimitReader(r, img.size+1))
	if err != nil {
		return fmt.Errorf("decompress the kernel (%s): %w", name, err)
	}
	if n != img.size {
		return fmt.Errorf("damaged: the kernel in it (%s) does not have the %d bytes promised", name, img.size)
	}
	return nil
}

// opener starts to decompress data, which is to become size bytes.
type opener func(data []byte, size int64) (io.ReadCloser, error)

// compression tells a payload's compression by its first bytes. The opener is
// nil if it is not one we can undo.
func compression(payload []byte) (string, opener) {
	for _, c := range []struct {
		magic string
		name  string
		open  opener
	}{
		{"\x1f\x8b", "gzip", openGzip},
		{"BZh", "bzip2", openBzip2},
		{"\xfd7zXZ\x00", "xz", openXZ},
		{"\x02\x21\x4c\x18", "lz4", openLZ4},
		{"\x28\xb5\x2f\xfd", "zstd", openZstd},
		{"\x7fELF", "nothing", openPlain},
		{"\x5d\x00\x00", "lzma", nil},
		{"\x89LZO", "lzo", nil},
	} {
		if bytes.HasPrefix(payload, []byte(c.magic)) {
			return c.name, c.open
		}
	}
	return fmt.Sprintf("something unknown (% x)", payload[:min(len(payload), 4)]), nil
}

func openGzip(data []byte, _ int64) (io.ReadCloser, error) {
	return gzip.NewReader(bytes.NewReader(data))
}

func openBzip2(data []byte, _ int64) (io.ReadCloser, error) {
	return io.NopCloser(bzip2.NewReader(bytes.NewReader(data))), nil
}

// openXZ uses a library that knows the filter for x86 code, which the kernel's
// build puts before LZMA2 and the more common library lacks.
func openXZ(data []byte, _ int64) (io.ReadCloser, error) {
	r, err := xz.NewReader(bytes.NewReader(data), maxWindow)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(r), nil
}

func openZstd(data []byte, _ int64) (io.ReadCloser, error) {
	r, err := zstd.NewReader(bytes.NewReader(data),
		zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	return r.IOReadCloser(), nil
}

func openPlain(data []byte, _ int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(data)), nil
}

func openLZ4(data []byte, size int64) (io.ReadCloser, error) {
	return io.NopCloser(&lz4Legacy{src: data[4:], left: size}), nil
}

// lz4Legacy reads the "legacy frame" of lz4 that the kernel uses: a magic number,
// then blocks of up to 8 MiB, each after its compressed size in four bytes. There
// is no end mark and there are no checksums. It is read here and not by the
// library, which takes the frame's end from the end of the file.
type lz4Legacy struct {
	src  []byte
	left int64 // bytes that may still come out
	buf  []byte
	out  []byte // the part of buf not yet read
}

const lz4Block = 8 << 20

func (l *lz4Legacy) Read(p []byte) (int, error) {
	for len(l.out) == 0 {
		if len(l.src) == 0 {
			return 0, io.EOF
		}
		if err := l.block(); err != nil {
			return 0, err
		}
	}
	n := copy(p, l.out)
	l.out = l.out[n:]
	return n, nil
}

func (l *lz4Legacy) block() error {
	if len(l.src) < 4 {
		return io.ErrUnexpectedEOF
	}
	size := int64(binary.LittleEndian.Uint32(l.src))
	l.src = l.src[4:]
	if size == 0x184c2102 { // another frame begins
		return nil
	}
	if size > int64(len(l.src)) {
		return io.ErrUnexpectedEOF
	}
	room := min(lz4Block, l.left)
	if room == 0 { // the library's assembly does not survive an empty buffer
		return errors.New("more comes out than was promised")
	}
	if int64(cap(l.buf)) < room {
		l.buf = make([]byte, room)
	}
	n, err := lz4.UncompressBlock(l.src[:size], l.buf[:room])
	if err != nil {
		return err
	}
	l.src, l.out = l.src[size:], l.buf[:n]
	l.left -= int64(n)
	return nil
}
