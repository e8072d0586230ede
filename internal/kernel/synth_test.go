package kernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// What is compressed by programs which Go has no library for is committed:
// go test -run TestExtract -update ./internal/kernel makes it anew.
var update = flag.Bool("update", false, "make testdata anew, with xz and bzip2")

const testRelease = "9.8.7-test-amd64"

// elfOptions are what can be wrong with a kernel. The zero value is a good one.
type elfOptions struct {
	machine         uint16 // default: x86-64
	noLoad, noPVH   bool
	release         string // default: testRelease
	segmentTooLarge bool
}

// testELF returns a kernel: one segment to load, one note, and a banner.
func testELF(o elfOptions) []byte {
	const notesAt, codeAt, codeLen = 0x200, 0x400, 20_000
	if o.machine == 0 {
		o.machine = 62
	}
	if o.release == "" {
		o.release = testRelease
	}
	data := make([]byte, codeAt+codeLen)
	le := binary.LittleEndian
	copy(data, "\x7fELF\x02\x01\x01")
	le.PutUint16(data[16:], 2) // ET_EXEC
	le.PutUint16(data[18:], o.machine)
	le.PutUint32(data[20:], 1)
	le.PutUint64(data[24:], 0x1000000)
	le.PutUint64(data[32:], 64) // program headers
	le.PutUint16(data[52:], 64)
	le.PutUint16(data[54:], 56)
	le.PutUint16(data[56:], 2)
	le.PutUint16(data[58:], 64)
	load := uint32(1)
	if o.noLoad {
		load = 0
	}
	size := uint64(codeLen)
	if o.segmentTooLarge {
		size++
	}
	putSegment(data[64:], load, codeAt, size)
	note := uint32(notePhys32Entry)
	if o.noPVH {
		note++
	}
	notes := appendNote(nil, "GNU\x00", 3, []byte("0123456789abcdef0123"))
	notes = appendNote(notes, "Xen\x00", 6, []byte("linux\x00"))
	notes = appendNote(notes, "Xen\x00", note, make([]byte, 8))
	copy(data[notesAt:], notes)
	putSegment(data[64+56:], 4, notesAt, uint64(len(notes)))
	// Calls, for the filter for x86 code to have something to do.
	code := data[codeAt:]
	for i := 0; i+5 <= len(code)/2; i += 5 {
		code[i] = 0xe8
		le.PutUint32(code[i+1:], uint32(0x2000-i))
	}
	copy(code[len(code)*3/4:], "Linux version %s\x00Linux version "+o.release+" (someone@somewhere) #1\n\x00")
	return data
}

func putSegment(p []byte, kind uint32, at, size uint64) {
	le := binary.LittleEndian
	le.PutUint32(p, kind)
	le.PutUint64(p[8:], at)
	le.PutUint64(p[32:], size)
	le.PutUint64(p[40:], size)
}

func appendNote(b []byte, name string, kind uint32, desc []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(len(name)))
	b = le.AppendUint32(b, uint32(len(desc)))
	b = le.AppendUint32(b, kind)
	b = append(b, name...)
	b = append(b, desc...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// testImage wraps a payload, with the size at its end, into a bzImage.
func testImage(payload []byte) []byte {
	const sects, offset = 3, 0x2c5
	le := binary.LittleEndian
	head := make([]byte, (sects+1)*sector+offset)
	head[hdrSetupSects] = sects
	copy(head[hdrMagic:], "HdrS")
	le.PutUint16(head[hdrVersion:], 0x20f)
	le.PutUint16(head[hdrXLoadFlags:], 1)
	le.PutUint16(head[hdrKernelVersion:], 0x300)
	copy(head[0x500:], testRelease+" (someone@somewhere) #1\x00")
	le.PutUint32(head[hdrPayloadOffset:], offset)
	le.PutUint32(head[hdrPayloadLength:], uint32(len(payload)))
	return append(append(head, payload...), make([]byte, 1000)...)
}

// compressors make payloads as the kernel's build does.
var compressors = map[string]func(t testing.TB, data []byte) []byte{
	"gzip": func(t testing.TB, data []byte) []byte { return gzipped(t, data) },
	"zstd": func(t testing.TB, data []byte) []byte { return withSize(zstded(t, data), data) },
	"lz4":  func(t testing.TB, data []byte) []byte { return withSize(lz4Frame(t, data), data) },
	"none": func(_ testing.TB, data []byte) []byte { return withSize(data, data) },
	"xz": func(t testing.TB, data []byte) []byte {
		return withSize(stored(t, "kernel.xz", data, "xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB"), data)
	},
	"bzip2": func(t testing.TB, data []byte) []byte {
		return withSize(stored(t, "kernel.bz2", data, "bzip2", "-9"), data)
	},
}

func withSize(compressed, data []byte) []byte {
	return binary.LittleEndian.AppendUint32(bytes.Clone(compressed), uint32(len(data)))
}

func gzipped(t testing.TB, data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zstded(t testing.TB, data []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(data, nil)
}

// lz4Frame makes two frames, one after the other.
func lz4Frame(t testing.TB, data []byte) []byte {
	var out []byte
	for _, part := range [][]byte{data[:len(data)/3], data[len(data)/3:]} {
		buf := make([]byte, lz4.CompressBlockBound(len(part)))
		n, err := lz4.CompressBlock(part, buf, nil)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, 0x02, 0x21, 0x4c, 0x18)
		out = binary.LittleEndian.AppendUint32(out, uint32(n))
		out = append(out, buf[:n]...)
	}
	return out
}

// stored returns the committed output of a program for data.
func stored(t testing.TB, name string, data []byte, program ...string) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		cmd := exec.CommandContext(t.Context(), program[0], append(program[1:], "-c")...)
		cmd.Stdin = bytes.NewReader(data)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %v", program, err)
		}
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, out, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// testModule returns a module whose .modinfo has the given entries.
func testModule(entries ...string) []byte {
	info := strings.Join(append(entries, ""), "\x00")
	names := "\x00.modinfo\x00.shstrtab\x00"
	le := binary.LittleEndian
	data := make([]byte, 64)
	copy(data, "\x7fELF\x02\x01\x01")
	le.PutUint16(data[16:], 1) // ET_REL
	le.PutUint16(data[18:], 62)
	le.PutUint32(data[20:], 1)
	le.PutUint16(data[52:], 64)
	le.PutUint16(data[58:], 64)
	le.PutUint16(data[60:], 3)
	le.PutUint16(data[62:], 2)
	data = append(append(data, info...), names...)
	le.PutUint64(data[40:], uint64(len(data)))
	sections := make([]byte, 3*64)
	putSection(sections[64:], 1, 1, 64, len(info))
	putSection(sections[128:], 10, 3, 64+len(info), len(names))
	return append(data, sections...)
}

func putSection(p []byte, name, kind uint32, at, size int) {
	le := binary.LittleEndian
	le.PutUint32(p, name)
	le.PutUint32(p[4:], kind)
	le.PutUint64(p[24:], uint64(at))
	le.PutUint64(p[32:], uint64(size))
}

// module returns a module of the test's kernel.
func goodModule(name, depends string) []byte {
	return testModule("license=GPL", "depends="+depends, "name="+name, "vermagic="+testRelease+" SMP preempt mod_unload ")
}

// testTree writes a directory of modules as a package has it, with something of
// everything: compressed ones, a built-in one, names with a dash.
func testTree(t testing.TB) map[string][]byte {
	xzModule := goodModule("overlay", "")
	return map[string][]byte{
		"modules.builtin":                                   []byte("kernel/fs/ext4/ext4.ko\nkernel/lib/crc32.ko\n"),
		"modules.builtin.modinfo":                           []byte("ext4.license=GPL\x00"),
		"modules.order":                                     []byte("kernel/drivers/virtio/virtio.ko\n"),
		"kernel/drivers/virtio/virtio_ring.ko":              goodModule("virtio_ring", ""),
		"kernel/drivers/virtio/virtio.ko":                   goodModule("virtio", "virtio_ring"),
		"kernel/drivers/virtio/virtio_mmio.ko.zst":          zstded(t, goodModule("virtio_mmio", "virtio,virtio_ring")),
		"kernel/drivers/char/hw_random/virtio-rng.ko.gz":    gzipped(t, goodModule("virtio_rng", "virtio-ring,virtio")),
		"kernel/fs/overlayfs/overlay.ko.xz":                 stored(t, "overlay.ko.xz", xzModule, "xz", "--check=crc32", "--lzma2=dict=2MiB"),
		"kernel/lib/libcrc32c.ko":                           testModule("softdep=pre: crc32c crc32 nosuch post: virtio_mmio", "depends=", "name=libcrc32c", "vermagic="+testRelease+" SMP"),
		"kernel/crypto/crc32c_generic.ko":                   goodModule("crc32c_generic", ""),
		"kernel/broken/loop_a.ko":                           goodModule("loop_a", "loop_b"),
		"kernel/broken/loop_b.ko":                           goodModule("loop_b", "loop_a"),
		"kernel/broken/orphan.ko":                           goodModule("orphan", "missing_one"),
		"kernel/broken/misnamed.ko":                         goodModule("other", ""),
		"kernel/broken/foreign.ko":                          testModule("name=foreign", "vermagic=1.2.3 SMP"),
		"kernel/broken/garbage.ko":                          []byte("garbage"),
		"kernel/broken/garbage_zst.ko.zst":                  []byte("garbage"),
		"kernel/broken/silent.ko":                           testELF(elfOptions{})[:0x200],
		"kernel/drivers/net/replaced.ko":                    []byte("the one in updates/ is used"),
		"updates/dkms/replaced.ko":                          goodModule("replaced", "virtio"),
		fmt.Sprintf("kernel/%s.ko", strings.Repeat("d", 8)): goodModule("dddddddd", "ext4,crc32"),
	}
}

// writeTree writes files below dir.
func writeTree(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
