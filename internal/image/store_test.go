package image

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// addImage puts a small image called name into the store. Images with the same
// content share a disk.
func addImage(t *testing.T, s *Store, name, content string) *Image {
	t.Helper()
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	f := makeTestDisk(t, disk, content)
	digest, err := hashFile(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	img := &Image{
		Name: name, Digest: digest, Size: st.Size(), Created: time.Unix(1700000000, 0).UTC(),
		Packages: []Package{{"bash", "5.2"}}, Recipe: Recipe{Distribution: "debian", Suite: "bookworm"},
	}
	if err := s.install(t.Context(), img, disk); err != nil {
		t.Fatal(err)
	}
	return img
}

func makeTestDisk(t *testing.T, path, content string) *os.File {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	archive := makeTar(t, entries{{name: "note", body: content}})
	if _, err := convertBytes(t.Context(), archive, nil, f); err != nil {
		t.Fatal(err)
	}
	return f
}

func testStore(t *testing.T) *Store { return Open(filepath.Join(t.TempDir(), "images")) }

func TestGetByNameAndDigest(t *testing.T) {
	s := testStore(t)
	one := addImage(t, s, "one", "1")
	addImage(t, s, "two", "2")
	hex := strings.TrimPrefix(one.Digest, digestPrefix)
	for _, ref := range []string{"one", one.Digest, hex, hex[:8], hex[:9], digestPrefix + hex[:12]} {
		got, err := s.Get(t.Context(), ref)
		if err != nil {
			t.Fatalf("%s: %v", ref, err)
		}
		if got.Name != "one" || got.Digest != one.Digest || got.Path != one.Path || len(got.Packages) != 1 {
			t.Errorf("%s: got %+v", ref, got)
		}
	}
	for _, ref := range []string{"three", "deadbeef00", digestPrefix + strings.Repeat("0", 64)} {
		if _, err := s.Get(t.Context(), ref); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v, want ErrNotFound", ref, err)
		}
	}
	all, err := s.List(t.Context())
	if err != nil || len(all) != 2 || all[0].Name != "one" {
		t.Errorf("list: %v, %v", all, err)
	}
}

// Names become file names and command lines.
func TestHostileRefs(t *testing.T) {
	s := testStore(t)
	addImage(t, s, "one", "1")
	for _, ref := range []string{"", ".", "..", "../one", "a/b", "-x", "One", "one.json", "sha256:", "sha256:abc",
		"sha256:" + strings.Repeat("g", 64), "sha256:" + strings.Repeat("A", 64), strings.Repeat("a", 65), "one\x00", "one\n"} {
		if _, err := s.Get(t.Context(), ref); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("get %q: %v", ref, err)
		}
		if err := s.Remove(t.Context(), ref); err == nil {
			t.Errorf("remove %q: no error", ref)
		}
		if ValidName(ref) {
			t.Errorf("%q is a valid name", ref)
		}
	}
}

func TestNothingYet(t *testing.T) {
	s := testStore(t)
	if all, err := s.List(t.Context()); len(all) > 0 || err != nil {
		t.Errorf("list: %v, %v", all, err)
	}
	if _, err := s.Get(t.Context(), "base"); !errors.Is(err, ErrNotFound) {
		t.Errorf("get: %v", err)
	}
	if err := s.Remove(t.Context(), "base"); !errors.Is(err, ErrNotFound) {
		t.Errorf("remove: %v", err)
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a look at the store has made it: %v", err)
	}
}

func TestDamage(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, s *Store, img *Image)
		want   string
	}{
		{"disk missing", func(t *testing.T, s *Store, img *Image) { check(t, os.Remove(img.Path)) }, "is missing"},
		{"disk short", func(t *testing.T, s *Store, img *Image) { check(t, os.Truncate(img.Path, img.Size-4096)) }, "recorded are"},
		{"disk empty", func(t *testing.T, s *Store, img *Image) { check(t, os.Truncate(img.Path, 0)) }, "0 bytes"},
		{"disk zeroed", func(t *testing.T, s *Store, img *Image) { overwrite(t, img.Path, 1024, make([]byte, 1024)) }, "not an ext4"},
		{"block size", func(t *testing.T, s *Store, img *Image) {
			overwrite(t, img.Path, 1024+0x18, []byte{255, 255, 255, 255})
		}, "block size"},
		{"blocks", func(t *testing.T, s *Store, img *Image) { overwrite(t, img.Path, 1024+4, []byte{255, 255, 255, 255}) }, "its ext4"},
		{"record empty", func(t *testing.T, s *Store, img *Image) { putRecord(t, s, "") }, "not a record"},
		{"record garbage", func(t *testing.T, s *Store, img *Image) { putRecord(t, s, "\x00\xff{{{") }, "not a record"},
		{"record of another", func(t *testing.T, s *Store, img *Image) {
			putRecord(t, s, `{"version":1,"name":"two","size":1,"digest":"`+img.Digest+`"}`)
		}, "record of"},
		{"record newer", func(t *testing.T, s *Store, img *Image) { putRecord(t, s, `{"version":7,"name":"one"}`) }, "version 7"},
		{"digest a path", func(t *testing.T, s *Store, img *Image) {
			putRecord(t, s, `{"version":1,"name":"one","size":1,"digest":"sha256:../../../../etc/passwd"}`)
		}, "not a sha256"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := testStore(t)
			img := addImage(t, s, "one", "1")
			addImage(t, s, "other", "2")
			tt.damage(t, s, img)
			_, err := s.Get(t.Context(), "one")
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want a CorruptError with %q", err, tt.want)
			}
			if corrupt.Path != img.Path && corrupt.Path != s.namePath("one") {
				t.Errorf("names %s", corrupt.Path)
			}
			all, err := s.List(t.Context())
			if !errors.As(err, &corrupt) || len(all) != 1 || all[0].Name != "other" {
				t.Errorf("list: %v, %v", all, err)
			}
			if err := s.Remove(t.Context(), "one"); err != nil {
				t.Errorf("remove a damaged image: %v", err)
			}
			if _, err := s.List(t.Context()); err != nil {
				t.Errorf("list after removal: %v", err)
			}
		})
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func overwrite(t *testing.T, path string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	check(t, err)
	_, err = f.WriteAt(b, at)
	check(t, errors.Join(err, f.Close()))
}

func putRecord(t *testing.T, s *Store, content string) {
	t.Helper()
	check(t, os.WriteFile(s.namePath("one"), []byte(content), 0o644))
}

func TestVerify(t *testing.T) {
	s := testStore(t)
	img := addImage(t, s, "one", "1")
	check(t, s.Verify(t.Context(), img))
	check(t, s.VerifyOnce(t.Context(), img))

	// A byte that no superficial look sees, with the old mtime put back.
	st, err := os.Stat(img.Path)
	check(t, err)
	overwrite(t, img.Path, 2*4096+17, []byte{0x55})
	check(t, os.Chtimes(img.Path, st.ModTime(), st.ModTime()))
	if _, err := s.Get(t.Context(), "one"); err != nil {
		t.Errorf("get: %v", err)
	}
	for what, verify := range map[string]func(context.Context, *Image) error{"Verify": s.Verify, "VerifyOnce": s.VerifyOnce} {
		var corrupt *CorruptError
		if err := verify(t.Context(), img); !errors.As(err, &corrupt) || corrupt.Path != img.Path {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// The second VerifyOnce must not read the disk: that is its purpose.
func TestVerifyOnceIsCheap(t *testing.T) {
	s := testStore(t)
	img := addImage(t, s, "one", "1")
	check(t, s.VerifyOnce(t.Context(), img))
	other := *img
	other.Digest = digestPrefix + strings.Repeat("0", 64) // a full read would refuse it
	if err := s.VerifyOnce(t.Context(), &other); err != nil {
		t.Errorf("it read the disk again: %v", err)
	}
	// After a boot of the host it does.
	memo, err := os.ReadFile(img.Path + verifiedSuffix)
	check(t, err)
	check(t, os.WriteFile(img.Path+verifiedSuffix, []byte(strings.Replace(string(memo), `"boot_id":"`, `"boot_id":"x`, 1)), 0o644))
	if err := s.VerifyOnce(t.Context(), &other); err == nil {
		t.Error("it did not read the disk after a boot")
	}
	check(t, os.WriteFile(img.Path+verifiedSuffix, []byte("\x00{"), 0o644))
	check(t, s.VerifyOnce(t.Context(), img))
	// A cancelled read is not a damaged disk.
	check(t, os.Remove(img.Path+verifiedSuffix))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.VerifyOnce(ctx, img); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestRemoveAndUse(t *testing.T) {
	s := testStore(t)
	img := addImage(t, s, "one", "1")
	release, err := s.Use(img)
	check(t, err)
	again, err := s.Use(img)
	check(t, err)
	if err := s.Remove(t.Context(), "one"); !errors.Is(err, ErrInUse) {
		t.Fatalf("remove while in use: %v", err)
	}
	if _, err := s.Get(t.Context(), "one"); err != nil {
		t.Fatalf("a refused removal has changed something: %v", err)
	}
	release()
	release()
	if err := s.Remove(t.Context(), "one"); !errors.Is(err, ErrInUse) {
		t.Fatalf("remove while in use by another: %v", err)
	}
	again()
	check(t, s.Remove(t.Context(), "one"))
	if _, err := os.Stat(img.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the disk is still there: %v", err)
	}
	if _, err := s.Use(img); !errors.Is(err, ErrNotFound) {
		t.Errorf("use after removal: %v", err)
	}
}

func TestSharedDisk(t *testing.T) {
	s := testStore(t)
	one := addImage(t, s, "one", "same")
	two := addImage(t, s, "two", "same")
	if one.Path != two.Path {
		t.Fatalf("%s and %s", one.Path, two.Path)
	}
	release, err := s.Use(one)
	check(t, err)
	check(t, s.Remove(t.Context(), "one")) // its disk stays
	if _, err := s.Get(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	release()
	addImage(t, s, "one", "same")
	check(t, s.Remove(t.Context(), one.Digest)) // both
	if all, err := s.List(t.Context()); len(all) > 0 || err != nil {
		t.Errorf("%v, %v", all, err)
	}
}

// A name that moves on leaves its old disk to who uses it, and no litter.
func TestRenewedName(t *testing.T) {
	s := testStore(t)
	old := addImage(t, s, "one", "1")
	release, err := s.Use(old)
	check(t, err)
	addImage(t, s, "one", "2")
	if _, err := os.Stat(old.Path); err != nil {
		t.Fatalf("the disk in use is gone: %v", err)
	}
	release()
	addImage(t, s, "one", "3")
	disks, err := os.ReadDir(s.disksDir())
	check(t, err)
	if len(disks) != 1 {
		t.Errorf("%d disks are left: %v", len(disks), disks)
	}
}

// An unreadable record may be the one that needs a disk.
func TestSweepFailsClosed(t *testing.T) {
	s := testStore(t)
	old := addImage(t, s, "one", "1")
	addImage(t, s, "two", "2")
	putRecord(t, s, "garbage")
	addImage(t, s, "two", "3")
	if _, err := os.Stat(old.Path); err != nil {
		t.Errorf("a disk was deleted: %v", err)
	}
}

// A disk that went bad is replaced when the same image is built again.
func TestInstallRepairs(t *testing.T) {
	s := testStore(t)
	img := addImage(t, s, "one", "1")
	overwrite(t, img.Path, 2*4096+17, []byte{0x55})
	addImage(t, s, "one", "1")
	check(t, s.Verify(t.Context(), img))
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"name":"one","digest":"sha256:` + strings.Repeat("a", 64) + `","size":4096,"packages":[{}]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		img, err := parseRecord(b, "one")
		if err != nil {
			return
		}
		hex, err := diskHex(img.Digest)
		if err != nil || filepath.Base(hex) != hex || img.Name != "one" {
			t.Errorf("accepted %+v", img)
		}
		if _, err := formatRecord(img); err != nil {
			t.Error(err)
		}
	})
}
