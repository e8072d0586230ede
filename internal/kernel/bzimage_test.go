package kernel

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
	"testing"
)

func TestExtract(t *testing.T) {
	want := testELF(elfOptions{})
	for name, compress := range compressors {
		t.Run(name, func(t *testing.T) {
			payload := compress(t, want)
			img, err := parseBzImage(testImage(payload), maxELF)
			if err != nil {
				t.Fatal(err)
			}
			if img.release != testRelease {
				t.Errorf("release %q", img.release)
			}
			var got bytes.Buffer
			if err := img.extract(&got); err != nil || !bytes.Equal(got.Bytes(), want) {
				t.Fatalf("extract: %d bytes, %v", got.Len(), err)
			}
			// Damage anywhere must not go through unnoticed, where the format can tell.
			img, err = parseBzImage(testImage(append(bytes.Clone(payload[:len(payload)/2]), payload[len(payload)-4:]...)), maxELF)
			if err != nil {
				t.Fatal(err)
			}
			if err := img.extract(io.Discard); err == nil {
				t.Error("extract: half of a kernel is enough")
			} else {
				t.Log(err)
			}
		})
	}
}

func TestExtractLies(t *testing.T) {
	data := testELF(elfOptions{})
	for _, size := range []uint32{0, uint32(len(data) - 1), uint32(len(data) + 1)} {
		for name, compress := range compressors {
			if name == "gzip" {
				continue // gzip itself notices
			}
			payload := compress(t, data)
			binary.LittleEndian.PutUint32(payload[len(payload)-4:], size)
			img, err := parseBzImage(testImage(payload), maxELF)
			if err != nil {
				t.Fatal(err)
			}
			if err := img.extract(io.Discard); err == nil {
				t.Errorf("%s: a kernel of %d bytes passes for one of %d", name, len(data), size)
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good := testImage(compressors["gzip"](t, testELF(elfOptions{})))
	le := binary.LittleEndian
	for _, c := range []struct {
		name, want string
		edit       func(b []byte) []byte
	}{
		{"no magic", "not a bzImage", func(b []byte) []byte { b[hdrMagic] = 0; return b }},
		{"header cut", "not a bzImage", func(b []byte) []byte { return b[:hdrMagic+4] }},
		{"payload cut", "truncated", func(b []byte) []byte { return b[:len(b)-2000] }},
		{"only the header", "truncated", func(b []byte) []byte { return b[:hdrEnd] }},
		{"old", "boot protocol 2.7", func(b []byte) []byte { le.PutUint16(b[hdrVersion:], 0x207); return b }},
		{"32 bit", "32-bit", func(b []byte) []byte { le.PutUint16(b[hdrXLoadFlags:], 0); return b }},
		{"offset out of the file", "truncated", func(b []byte) []byte { le.PutUint32(b[hdrPayloadOffset:], 1<<32-1); return b }},
		{"length out of the file", "truncated", func(b []byte) []byte { le.PutUint32(b[hdrPayloadLength:], 1<<32-1); return b }},
		{"no payload", "without a kernel", func(b []byte) []byte { le.PutUint32(b[hdrPayloadLength:], 4); return b }},
	} {
		_, err := parseBzImage(c.edit(bytes.Clone(good)), maxELF)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.name, err, c.want)
		}
	}
	if _, err := parseBzImage(good, 1000); err == nil || !strings.Contains(err.Error(), "more than the 1000 allowed") {
		t.Errorf("limit: %v", err)
	}
	for magic, want := range map[string]string{"\x5d\x00\x00\x00": "lzma", "\x89LZO\x00\r\n\x1a\n": "lzo", "abcd": "unknown (61 62 63 64)"} {
		img, err := parseBzImage(testImage(withSize([]byte(magic), nil)), maxELF)
		if err != nil {
			t.Fatal(err)
		}
		if err := img.extract(io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("payload %q: %v; want %q", magic, err, want)
		}
	}
	odd := bytes.Clone(good)
	le.PutUint16(odd[hdrKernelVersion:], 0xffff)
	if img, err := parseBzImage(odd, maxELF); err != nil || img.release != "" {
		t.Errorf("version string out of the file: %v, %v", img, err)
	}
}

func TestCheckELF(t *testing.T) {
	for want, o := range map[string]elfOptions{
		"":                 {},
		"x86-64 is needed": {machine: 183},
		"nothing to load":  {noLoad: true},
		"CONFIG_PVH":       {noPVH: true},
		"truncated":        {segmentTooLarge: true},
	} {
		data := testELF(o)
		err := checkELF(bytes.NewReader(data), int64(len(data)))
		if want == "" && err == nil {
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v; want %q", o, err, want)
		}
	}
}

func TestELFRelease(t *testing.T) {
	line := "Linux version " + testRelease + " (x)"
	const chunk = 1 << 20
	for _, at := range []int{0, 1, chunk - 20, chunk - 14, chunk - 1, chunk, 2*chunk + 100, 3*chunk - 3} {
		data := append(bytes.Repeat([]byte("Linux version"), at/13+1)[:at], line...)
		got, err := elfRelease(bytes.NewReader(data))
		if err != nil || got != testRelease {
			t.Errorf("at %d: %q, %v", at, got, err)
		}
	}
	for _, bad := range []string{"", "Linux version ", "Linux version 6.1", "Linux version ../x ", "Linux version 6.1/../.. ", "Linux version " + strings.Repeat("6", 200) + " "} {
		if got, err := elfRelease(strings.NewReader(bad)); err == nil {
			t.Errorf("%.40q: release %q", bad, got)
		}
	}
}

// FuzzExtract feeds images of anybody's making to all that reads them.
func FuzzExtract(f *testing.F) {
	for _, compress := range compressors {
		f.Add(testImage(compress(f, testELF(elfOptions{}))))
	}
	f.Add(testELF(elfOptions{}))
	f.Add(testImage(withSize([]byte("\x02\x21\x4c\x18\xff\xff\xff\xff"), nil)))
	f.Fuzz(func(t *testing.T, data []byte) {
		const limit = 1 << 20
		elfRelease(bytes.NewReader(data))
		checkELF(bytes.NewReader(data), int64(len(data)))
		modinfo(data)
		img, err := parseBzImage(data, limit)
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := img.extract(&out); err == nil && int64(out.Len()) != img.size {
			t.Fatalf("%d bytes of %d, and no error", out.Len(), img.size)
		}
		if out.Len() > limit+1 {
			t.Fatalf("%d bytes came out, %d were allowed", out.Len(), limit)
		}
		checkELF(bytes.NewReader(out.Bytes()), int64(out.Len()))
	})
}
