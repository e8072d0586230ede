package template

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// flip changes a byte in the middle of a file and puts its old mtime back.
func flip(t testing.TB, path string) {
	t.Helper()
	st, err := os.Stat(path)
	check(t, err)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	check(t, err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], st.Size()/2)
	check(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], st.Size()/2)
	check(t, err)
	check(t, os.Chtimes(path, st.ModTime(), st.ModTime()))
}

func replaceIn(t testing.TB, path, old, with string) {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	if !bytes.Contains(b, []byte(old)) {
		t.Fatalf("no %q in %s", old, b)
	}
	check(t, os.WriteFile(path, bytes.Replace(b, []byte(old), []byte(with), 1), 0o600))
}

// resign writes a manifest with this change and a checksum that matches.
func resign(t testing.TB, path string, change func(m *manifest)) {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	var m manifest
	check(t, json.Unmarshal(b, &m))
	change(&m)
	b, err = m.format()
	check(t, err)
	check(t, os.WriteFile(path, b, 0o600))
}

// damages is what can happen to a template, and the reason that Get gives.
// deep ones are seen only when the files are read.
var damages = []struct {
	name, want string
	deep       bool
	do         func(t testing.TB, dir string)
}{
	{"memory edited", "memory is damaged: its checksum is", true, func(t testing.TB, dir string) { flip(t, dir+"/memory") }},
	{"state edited", "state is damaged: its checksum is", true, func(t testing.TB, dir string) { flip(t, dir+"/state") }},
	{"hole filled", "its checksum is", true, func(t testing.TB, dir string) {
		f, err := os.OpenFile(dir+"/memory", os.O_RDWR, 0)
		check(t, err)
		defer f.Close()
		_, err = f.WriteAt([]byte{1}, 1<<20-1)
		check(t, err)
	}},
	{"hole made", "its checksum is", true, func(t testing.TB, dir string) {
		f, err := os.OpenFile(dir+"/memory", os.O_RDWR, 0)
		check(t, err)
		defer f.Close()
		check(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 64<<10))
	}},
	{"memory replaced", "its checksum is", true, func(t testing.TB, dir string) {
		check(t, os.WriteFile(dir+"/memory2", make([]byte, 1<<20), 0o600))
		check(t, os.Rename(dir+"/memory2", dir+"/memory"))
	}},
	{"memory and state exchanged", "it has 1000 bytes", false, func(t testing.TB, dir string) {
		check(t, os.Rename(dir+"/memory", dir+"/x"))
		check(t, os.Rename(dir+"/state", dir+"/memory"))
		check(t, os.Rename(dir+"/x", dir+"/state"))
	}},
	{"memory truncated", "it has 1048575 bytes, recorded are 1048576", false, func(t testing.TB, dir string) { check(t, os.Truncate(dir+"/memory", 1<<20-1)) }},
	{"memory extended", "it has 1048577 bytes", false, func(t testing.TB, dir string) { check(t, os.Truncate(dir+"/memory", 1<<20+1)) }},
	{"memory missing", "memory is damaged: missing", false, func(t testing.TB, dir string) { check(t, os.Remove(dir+"/memory")) }},
	{"state missing", "state is damaged: missing", false, func(t testing.TB, dir string) { check(t, os.Remove(dir+"/state")) }},
	{"state a link", "cannot be opened", false, func(t testing.TB, dir string) {
		check(t, os.Rename(dir+"/state", dir+"/x"))
		check(t, os.Symlink("x", dir+"/state"))
	}},
	{"memory a fifo", "not a regular file", false, func(t testing.TB, dir string) {
		check(t, os.Remove(dir+"/memory"))
		check(t, unix.Mkfifo(dir+"/memory", 0o600))
	}},
	{"memory a directory", "not a regular file", false, func(t testing.TB, dir string) {
		check(t, os.Remove(dir+"/memory"))
		check(t, os.Mkdir(dir+"/memory", 0o700))
	}},
	{"memory a socket", "cannot be opened", false, func(t testing.TB, dir string) {
		check(t, os.Remove(dir+"/memory"))
		check(t, unix.Mknod(dir+"/memory", unix.S_IFSOCK|0o600, 0))
	}},
	{"memory writable by all", "others may write it (mode 0666)", false, func(t testing.TB, dir string) { check(t, os.Chmod(dir+"/memory", 0o666)) }},
	{"state writable by the group", "others may write it (mode 0620)", false, func(t testing.TB, dir string) { check(t, os.Chmod(dir+"/state", 0o620)) }},
	{"manifest writable by all", "others may write it", false, func(t testing.TB, dir string) { check(t, os.Chmod(dir+"/manifest.json", 0o606)) }},
	{"directory writable by all", "others may write it", false, func(t testing.TB, dir string) { check(t, os.Chmod(dir, 0o777)) }},
	{"memory with another name", "it has 2 names", false, func(t testing.TB, dir string) { check(t, os.Link(dir+"/memory", dir+"/../../name")) }},
	{"manifest missing", "manifest.json is damaged: missing", false, func(t testing.TB, dir string) { check(t, os.Remove(dir+"/manifest.json")) }},
	{"manifest empty", "not a manifest", false, func(t testing.TB, dir string) { check(t, os.Truncate(dir+"/manifest.json", 0)) }},
	{"manifest torn", "not a manifest", false, func(t testing.TB, dir string) { check(t, os.Truncate(dir+"/manifest.json", 100)) }},
	{"manifest huge", "more than 65536 bytes", false, func(t testing.TB, dir string) { check(t, os.Truncate(dir+"/manifest.json", 1<<40)) }},
	{"manifest followed", "more follows it", false, func(t testing.TB, dir string) { replaceIn(t, dir+"/manifest.json", "\n}\n", "\n}\n{}") }},
	{"manifest with more", "unknown field", false, func(t testing.TB, dir string) { replaceIn(t, dir+"/manifest.json", "{", `{"x":1,`) }},
	{"manifest with a field twice", "not as it was written", false, func(t testing.TB, dir string) { replaceIn(t, dir+"/manifest.json", "{", `{"version": 1,`) }},
	{"date edited", "not as it was written", false, func(t testing.TB, dir string) { replaceIn(t, dir+"/manifest.json", `"created": "20`, `"created": "21`) }},
	{"input edited", "of other inputs", false, func(t testing.TB, dir string) { replaceIn(t, dir+"/manifest.json", "sha256:abc", "sha256:abd") }},
	{"input edited, signed", "of other inputs", false, func(t testing.TB, dir string) {
		resign(t, dir+"/manifest.json", func(m *manifest) { m.Inputs["kernel"] = "x" })
	}},
	{"of other inputs", "of other inputs", false, func(t testing.TB, dir string) {
		resign(t, dir+"/manifest.json", func(m *manifest) { m.Inputs["kernel"] = "x"; m.ID = m.Inputs.ID() })
	}},
	{"checksum edited, signed", "its checksum is", true, func(t testing.TB, dir string) {
		resign(t, dir+"/manifest.json", func(m *manifest) { m.State.Digest = m.Memory.Digest })
	}},
	{"no size", "no size", false, func(t testing.TB, dir string) {
		resign(t, dir+"/manifest.json", func(m *manifest) { m.State.Size = -1 })
	}},
	{"another checksum", "no checksum", false, func(t testing.TB, dir string) {
		resign(t, dir+"/manifest.json", func(m *manifest) { m.State.Digest = "sha256:" + strings.Repeat("0", 64) })
	}},
	{"of a later format", "format 2, this program knows 1", false, func(t testing.TB, dir string) {
		resign(t, dir+"/manifest.json", func(m *manifest) { m.Version = 2 })
	}},
	{"of another user", "made by user", false, func(t testing.TB, dir string) {
		resign(t, dir+"/manifest.json", func(m *manifest) { m.UID++ })
	}},
	{"a file", "not a directory", false, func(t testing.TB, dir string) {
		check(t, os.RemoveAll(dir))
		check(t, os.WriteFile(dir, nil, 0o600))
	}},
	{"a link to itself elsewhere", "cannot be opened", false, func(t testing.TB, dir string) {
		check(t, os.Rename(dir, dir+"x"))
		check(t, os.Symlink(dir+"x", dir))
	}},
	{"empty", "manifest.json is damaged: missing", false, func(t testing.TB, dir string) {
		check(t, os.RemoveAll(dir))
		check(t, os.Mkdir(dir, 0o700))
	}},
}

// Whatever happens to a template is seen, although it was verified before; it is
// not used, it goes, and can be made again.
func TestDamage(t *testing.T) {
	for _, tt := range damages {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := testStore(t)
			for range 2 {
				tpl, err := s.Make(t.Context(), testInputs, fill)
				check(t, err)
				check(t, tpl.Close())
			}
			dir := s.path(testInputs.ID())
			tt.do(t, dir)
			list, err := s.List(t.Context())
			check(t, err)
			if len(list) != 1 || list[0].ID != testInputs.ID() || list[0].Memory != nil {
				t.Fatalf("list: %+v", list)
			}
			if !tt.deep && !strings.Contains(list[0].Damaged, tt.want) || tt.deep && list[0].Damaged != "" {
				t.Errorf("listed as %q", list[0].Damaged)
			}
			tpl, err := s.Get(t.Context(), testInputs)
			if err == nil {
				tpl.Close()
				t.Fatal("got it")
			}
			if !isDamaged(err) || errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v", err)
			}
			if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it is still there: %v", err)
			}
			if _, err := s.Get(t.Context(), testInputs); !errors.Is(err, ErrNotFound) {
				t.Errorf("then: %v", err)
			}
			tpl, err = s.Make(t.Context(), testInputs, fill)
			check(t, err)
			check(t, tpl.Close())
		})
	}
}

// A good one that came in place of a damaged one meanwhile is not removed for it.
func TestReplacedMeanwhile(t *testing.T) {
	s := testStore(t)
	in, id := put(t, s, "a")
	flip(t, filepath.Join(s.path(id), MemoryFile))
	s.step = func(step string) {
		if step == "damaged" {
			other := Open(s.dir, 0)
			_, err := other.Remove(t.Context(), id)
			check(t, err)
			put(t, other, "a")
		}
	}
	tpl, err := s.Get(t.Context(), in)
	check(t, err)
	tpl.Close()
}

// Make does not need a Get before it to replace one that is damaged.
func TestMakeReplacesDamaged(t *testing.T) {
	s := testStore(t)
	in, id := put(t, s, "a")
	flip(t, filepath.Join(s.path(id), MemoryFile))
	put(t, s, "a")
	tpl, err := s.Get(t.Context(), in)
	check(t, err)
	tpl.Close()
}

// A memo, whoever wrote it, does not stand for other files; and without one, or
// after a boot, everything is read again.
func TestMemo(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(memo string, raw []byte) []byte
	}{
		{"as it was", func(_ string, raw []byte) []byte { return raw }},
		{"another boot", func(_ string, raw []byte) []byte { return bytes.Replace(raw, []byte(`_id":"`), []byte(`_id":"x`), 1) }},
		{"garbage", func(string, []byte) []byte { return []byte("{}") }},
		{"of no files", func(_ string, raw []byte) []byte {
			return append(raw[:bytes.IndexByte(raw, '[')+1], []byte("]}")...)
		}},
		{"gone", func(string, []byte) []byte { return nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := testStore(t)
			in, id := put(t, s, "a")
			memo := filepath.Join(s.path(id), memoFile)
			raw, err := os.ReadFile(memo)
			check(t, err)
			// The edit is there before the memo: the memo of the old bytes.
			flip(t, filepath.Join(s.path(id), MemoryFile))
			check(t, os.Remove(memo))
			if b := tt.do(memo, raw); b != nil {
				check(t, os.WriteFile(memo, b, 0o600))
			}
			if tpl, err := s.Get(t.Context(), in); !isDamaged(err) {
				t.Errorf("%+v, %v", tpl, err)
			}
		})
	}
}

// The second Get does not read the files: that is the purpose of the memo. After
// a boot of the host it does, and then not again.
func TestVerifiedOnce(t *testing.T) {
	s := testStore(t)
	in, id := put(t, s, "a")
	memo := filepath.Join(s.path(id), memoFile)
	first, err := os.Stat(memo)
	check(t, err)
	get := func() {
		t.Helper()
		tpl, err := s.Get(t.Context(), in)
		check(t, err)
		check(t, tpl.Close())
	}
	get()
	second, err := os.Stat(memo)
	if err != nil || !os.SameFile(first, second) {
		t.Errorf("it was verified again: %v", err)
	}
	replaceIn(t, memo, `"boot_id":"`, `"boot_id":"x`)
	get()
	b, err := os.ReadFile(memo)
	if err != nil || bytes.Contains(b, []byte(`"boot_id":"x`)) {
		t.Errorf("not verified after a boot: %v", err)
	}
}

// Others' files are not used, even by root, nor removed.
func TestForeign(t *testing.T) {
	testenv.NeedRoot(t)
	for _, name := range []string{MemoryFile, StateFile, manifestFile} {
		s := testStore(t)
		in, id := put(t, s, "a")
		check(t, os.Chown(filepath.Join(s.path(id), name), 4242, 4242))
		if _, err := s.Get(t.Context(), in); !isDamaged(err) || !strings.Contains(err.Error(), "belongs to user 4242") {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := testStore(t)
	in, id := put(t, s, "a")
	check(t, os.Chown(s.path(id), 4242, 4242))
	if _, err := s.Get(t.Context(), in); !isDamaged(err) || !strings.Contains(err.Error(), "not removed") {
		t.Errorf("%v", err)
	}
	if _, err := s.Make(t.Context(), in, mustNotFill); !isDamaged(err) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(s.path(id)); err != nil {
		t.Error(err)
	}
}

// A store that others can write is not used at all, and not touched.
func TestLooseStore(t *testing.T) {
	for _, sub := range []string{"", "templates"} {
		s := testStore(t)
		in, id := put(t, s, "a")
		check(t, os.Chmod(filepath.Join(s.dir, sub), 0o777))
		_, getErr := s.Get(t.Context(), in)
		_, makeErr := s.Make(t.Context(), in, mustNotFill)
		_, listErr := s.List(t.Context())
		_, removeErr := s.Remove(t.Context(), id)
		_, _, pruneErr := s.Prune(t.Context(), true)
		for _, err := range []error{getErr, makeErr, listErr, removeErr, pruneErr} {
			if !isDamaged(err) || !strings.Contains(err.Error(), "others may write it") {
				t.Errorf("%v", err)
			}
		}
		if _, err := os.Stat(filepath.Join(s.path(id), MemoryFile)); err != nil {
			t.Error(err)
		}
	}
	// The way to it may be a link; the directory in it may not.
	s := testStore(t)
	in, _ := put(t, s, "a")
	link := filepath.Join(t.TempDir(), "link")
	check(t, os.Symlink(s.dir, link))
	tpl, err := Open(link, 0).Get(t.Context(), in)
	check(t, err)
	tpl.Close()
	check(t, os.Rename(s.templates(), s.dir+"/x"))
	check(t, os.Symlink("x", s.templates()))
	if _, err := s.Get(t.Context(), in); !isDamaged(err) {
		t.Errorf("%v", err)
	}
}

// The checksum depends on the bytes and the length, and not on what is a hole.
func TestDigest(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, size int, sparse bool, parts map[int]string) *os.File {
		f, err := os.Create(filepath.Join(dir, name))
		check(t, err)
		t.Cleanup(func() { f.Close() })
		if !sparse {
			_, err = f.Write(make([]byte, size))
			check(t, err)
		}
		check(t, f.Truncate(int64(size)))
		for off, s := range parts {
			_, err = f.WriteAt([]byte(s), int64(off))
			check(t, err)
		}
		return f
	}
	sum := func(f *os.File) string {
		st, err := f.Stat()
		check(t, err)
		d, err := digest(t.Context(), f, st.Size())
		check(t, err)
		return d
	}
	rng := rand.New(rand.NewPCG(3, 4))
	seen := make(map[string]string)
	for i := range 20 {
		size := 1 + rng.IntN(4<<20)
		parts := map[int]string{}
		for range rng.IntN(5) {
			part := strings.Repeat("x", 1+rng.IntN(200<<10))
			if off := rng.IntN(size); off+len(part) <= size {
				parts[off] = part
			}
		}
		holes, full := sum(write(fmt.Sprint(i, "holes"), size, true, parts)), sum(write(fmt.Sprint(i, "full"), size, false, parts))
		if holes != full || !validDigest(full) {
			t.Errorf("%s with holes, %s without", holes, full)
		}
		seen[full] = "random"
	}
	for name, f := range map[string]*os.File{
		"one":        write("one", 128<<10, true, map[int]string{10: "x"}),
		"elsewhere":  write("elsewhere", 128<<10, true, map[int]string{11: "x"}),
		"next block": write("next", 128<<10, true, map[int]string{10 + 64<<10: "x"}),
		"longer":     write("longer", 128<<10+1, true, map[int]string{10: "x"}),
		"zeros":      write("zeros", 100<<10, true, nil),
		"more zeros": write("more", 100<<10+1, true, nil),
		"none":       write("none", 0, true, nil),
	} {
		d := sum(f)
		if other, ok := seen[d]; ok {
			t.Errorf("%s and %s have one checksum", name, other)
		}
		seen[d] = name
	}
	if _, err := digest(t.Context(), write("short", 70<<10, false, map[int]string{0: "x"}), 200<<10); err == nil {
		t.Error("did not miss the end of the file")
	}
}

func FuzzManifest(f *testing.F) {
	m := newManifest(testInputs)
	m.Created = time.Unix(1700000000, 0).UTC()
	m.Memory = content{Size: 1 << 30, Digest: digestPrefix + strings.Repeat("a", 64)}
	m.State = content{Size: 1, Digest: digestPrefix + strings.Repeat("b", 64)}
	good, err := m.format()
	check(f, err)
	f.Add(good)
	f.Add([]byte("{}"))
	f.Add(append(good[:len(good):len(good)], ' '))
	f.Add(bytes.Replace(good, []byte("sum"), []byte("Sum"), 1))
	id := testInputs.ID()
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseManifest(b, id)
		if err != nil {
			return
		}
		again, err := m.format()
		if err != nil || !bytes.Equal(again, b) || m.ID != id || m.Inputs.ID() != id || m.Memory.Size <= 0 || m.State.Size <= 0 {
			t.Errorf("accepted %q", b)
		}
	})
}

// Memory of 1 GiB of which 80 MiB were touched.
func BenchmarkDigest(b *testing.B) {
	f, err := os.Create(filepath.Join(b.TempDir(), "f"))
	check(b, err)
	defer f.Close()
	check(b, f.Truncate(1<<30))
	for i := range 80 {
		_, err := f.WriteAt(bytes.Repeat([]byte{1}, 1<<20), int64(i)*12<<20)
		check(b, err)
	}
	b.SetBytes(80 << 20)
	for b.Loop() {
		_, err := digest(b.Context(), f, 1<<30)
		check(b, err)
	}
}
