package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"

	"github.com/ironclaw-run/ironclaw/internal/apt"
	"github.com/ironclaw-run/ironclaw/internal/apt/apttest"
)

const day = "Sat, 10 Jan 2026 10:11:12 UTC"

// debian publishes a kernel as Debian does: a package that leads to one with all.
func debian(t *testing.T, ar *apttest.Archive, version string) {
	t.Helper()
	files := prefixed("lib/modules/"+testRelease+"/", testTree(t))
	files["boot/vmlinuz-"+testRelease] = testImage(compressors["lz4"](t, testELF(elfOptions{})))
	files["boot/config-"+testRelease] = []byte("CONFIG_X=y\n")
	files["usr/share/doc/x/copyright"] = []byte("all rights\n")
	meta := ar.AddDeb(t, "linux-image-cloud-amd64", version, "linux-image-"+testRelease+" (= "+version+")", nil)
	image := ar.AddDeb(t, "linux-image-"+testRelease, version, "kmod, linux-base (>= 4) | other", files)
	ar.Publish(t, "bookworm", "Debian", day, meta+image)
}

func prefixed(prefix string, files map[string][]byte) map[string][]byte {
	out := make(map[string][]byte)
	for name, data := range files {
		out[prefix+name] = data
	}
	return out
}

// testInstall returns a store, an archive with nothing in it, and an apt that
// reads it.
func testInstall(t *testing.T) (*Store, *apttest.Archive, *apt.Apt) {
	t.Helper()
	apttest.Need(t)
	ar := apttest.NewArchive(t)
	apttest.UseSources(t, "a.list", "deb [trusted=yes] "+ar.URL+" bookworm main\n")
	dir := filepath.Join(t.TempDir(), "kernels")
	return Open(dir), ar, apt.New(filepath.Join(dir, "apt"))
}

func TestInstall(t *testing.T) {
	s, ar, a := testInstall(t)
	if _, err := s.Current(t.Context()); !errors.Is(err, ErrNotInstalled) {
		t.Fatalf("Current of nothing: %v", err)
	}
	if _, err := os.Stat(s.dir); err == nil {
		t.Error("asking made the directory")
	}
	debian(t, ar, "9.8.7-1")
	// What an interrupted installation left.
	left := filepath.Join(s.dir, "packages", tmpPrefix+"left", "lib")
	if err := os.MkdirAll(left, 0o755); err != nil {
		t.Fatal(err)
	}
	var steps []string
	k, err := s.Install(t.Context(), a, func(step string) { steps = append(steps, step) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%q", steps)
	if k.Release != testRelease || k.Source != "linux-image-"+testRelease+" 9.8.7-1" || len(k.Digest) != 64 {
		t.Errorf("installed %+v", k)
	}
	if got, err := os.ReadFile(k.ELF); err != nil || !bytes.Equal(got, testELF(elfOptions{})) {
		t.Errorf("the kernel is not the one packed: %v", err)
	}
	if _, err := os.Stat(filepath.Dir(left)); err == nil {
		t.Error("leftovers are still there")
	}
	for name, there := range map[string]bool{
		k.Modules + "/kernel/drivers/virtio/virtio.ko": true,
		k.Modules + "/modules.builtin":                 true,
		k.Modules + "/modules.order":                   false,
		filepath.Dir(k.ELF) + "/vmlinuz":               false,
		filepath.Dir(k.ELF) + "/boot":                  false,
	} {
		if _, err := os.Stat(name); (err == nil) != there {
			t.Errorf("%s: %v", name, err)
		}
	}
	again, err := s.Install(t.Context(), a, nil)
	if err != nil || *again != *k {
		t.Errorf("second Install: %+v, %v", again, err)
	}
	if n := ar.Served(apttest.DebPath("linux-image-"+testRelease, "9.8.7-1")); n != 1 {
		t.Errorf("downloaded %d times", n)
	}
	if now, err := s.Current(t.Context()); err != nil || *now != *k {
		t.Errorf("Current: %+v, %v", now, err)
	}
}

func TestInstallUpgradesAndRepairs(t *testing.T) {
	s, ar, a := testInstall(t)
	var first *Kernel
	for i := 1; i <= 3; i++ {
		debian(t, ar, fmt.Sprintf("9.8.7-%d", i))
		k, err := s.Install(t.Context(), a, nil)
		if err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			first = k
		}
		all, _ := os.ReadDir(filepath.Join(s.dir, "packages"))
		if len(all) != min(i, 2) {
			t.Errorf("version %d: %d kernels are kept", i, len(all))
		}
	}
	if _, err := os.Stat(first.ELF); err == nil {
		t.Error("the oldest kernel is still there")
	}
	k, err := s.Current(t.Context())
	if err != nil || !strings.HasSuffix(k.Source, " 9.8.7-3") {
		t.Fatalf("Current: %+v, %v", k, err)
	}
	for name, damage := range map[string]func() error{
		"cut":  func() error { return os.Truncate(k.ELF, 100) },
		"gone": func() error { return os.Remove(filepath.Join(k.Modules, "modules.builtin")) },
		"manifest": func() error {
			return os.WriteFile(filepath.Join(filepath.Dir(k.ELF), manifestName), []byte("{"), 0o644)
		},
		"all of it": func() error { return os.RemoveAll(filepath.Dir(k.ELF)) },
		"another form": func() error {
			return os.WriteFile(filepath.Join(filepath.Dir(k.ELF), manifestName), []byte("{}"), 0o644)
		},
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if k, err := s.Current(t.Context()); (err == nil) != (name == "gone") || errors.Is(err, ErrNotInstalled) {
			t.Errorf("%s: Current: %+v, %v", name, k, err) // a module is missed when it is needed
		}
		if again, err := s.Install(t.Context(), a, nil); err != nil || *again != *k {
			t.Errorf("%s: Install: %+v, %v", name, again, err)
		}
	}
}

// TestInstallUbuntu has the kernel in one package and its modules in another.
func TestInstallUbuntu(t *testing.T) {
	s, ar, a := testInstall(t)
	modules := prefixed("usr/lib/modules/"+testRelease+"/", testTree(t))
	image := map[string][]byte{"boot/vmlinuz-" + testRelease: testImage(compressors["zstd"](t, testELF(elfOptions{})))}
	ar.Publish(t, "bookworm", "Ubuntu", day,
		ar.AddDeb(t, "linux-image-virtual", "9.8.7.5", "linux-image-"+testRelease, nil)+
			ar.AddDeb(t, "linux-image-"+testRelease, "9.8.7-5.5", "kmod, linux-base, linux-modules-"+testRelease, image)+
			ar.AddDeb(t, "linux-modules-"+testRelease, "9.8.7-5.5", "", modules))
	k, err := s.Install(t.Context(), a, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Initramfs(t.Context(), k, AgentOf([]byte("\x7fELF agent")), []string{"virtio_mmio", "overlay"}); err != nil {
		t.Error(err)
	}
}

func TestInstallAtOnce(t *testing.T) {
	s, ar, a := testInstall(t)
	debian(t, ar, "9.8.7-1")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := Open(s.dir).Install(t.Context(), a, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := ar.Served(apttest.DebPath("linux-image-"+testRelease, "9.8.7-1")); n != 1 {
		t.Errorf("downloaded %d times", n)
	}
}

func TestInstallInterrupted(t *testing.T) {
	s, ar, a := testInstall(t)
	debian(t, ar, "9.8.7-1")
	for stop := 1; ; stop++ {
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		_, err := s.Install(ctx, a, func(string) {
			if n++; n == stop {
				cancel()
			}
		})
		cancel()
		if err == nil {
			break // there was no such step
		}
		if !errors.Is(err, context.Canceled) {
			t.Errorf("step %d: %v", stop, err)
		}
		if _, err := s.Current(t.Context()); !errors.Is(err, ErrNotInstalled) {
			t.Errorf("step %d: Current: %v", stop, err)
		}
		if left, _ := os.ReadDir(filepath.Join(s.dir, "packages")); len(left) != 0 {
			t.Errorf("step %d: left %v", stop, left)
		}
	}
	if _, err := s.Current(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestInstallRefuses(t *testing.T) {
	good := testImage(compressors["gzip"](t, testELF(elfOptions{})))
	tree := prefixed("lib/modules/"+testRelease+"/", testTree(t))
	for want, files := range map[string]map[string][]byte{
		"no kernel in it":  tree,
		"no modules in it": {"boot/vmlinuz-" + testRelease: good},
		"not a bzImage":    {"boot/vmlinuz-" + testRelease: []byte("x")},
		"CONFIG_PVH":       {"boot/vmlinuz-" + testRelease: testImage(compressors["gzip"](t, testELF(elfOptions{noPVH: true})))},
		"the rest of":      {"boot/vmlinuz-1.2.3": good, "lib/modules/4.5.6/modules.builtin": nil},
	} {
		s, ar, a := testInstall(t)
		ar.Publish(t, "bookworm", "Debian", day,
			ar.AddDeb(t, "linux-image-cloud-amd64", "1", "linux-image-9", nil)+ar.AddDeb(t, "linux-image-9", "1", "", files))
		if _, err := s.Install(t.Context(), a, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Install: %v; want %q", err, want)
		}
		if _, err := s.Current(t.Context()); !errors.Is(err, ErrNotInstalled) {
			t.Errorf("Current: %v", err)
		}
	}
	s, ar, a := testInstall(t)
	ar.Publish(t, "bookworm", "Debian", day, ar.AddDeb(t, "hello", "1", "", nil))
	if _, err := s.Install(t.Context(), a, nil); !errors.Is(err, apt.ErrNoPackage) {
		t.Errorf("Install without a kernel: %v", err)
	}
}

// userFiles makes a directory with kernel images, good and bad, and one with the
// modules of the good ones.
func userFiles(t *testing.T) (dir, modules string) {
	t.Helper()
	dir = t.TempDir()
	modules = filepath.Join(dir, "root/lib/modules", testRelease)
	writeTree(t, modules, testTree(t))
	good := testELF(elfOptions{})
	writeTree(t, dir, map[string][]byte{
		"bzImage": testImage(compressors["xz"](t, good)), "vmlinux": good,
		"empty": nil, "garbage": bytes.Repeat([]byte("garbage "), 1000), "short": []byte("x"),
		"cut": testImage(compressors["xz"](t, good))[:3000], "nopvh": testELF(elfOptions{noPVH: true}),
		"elfcut": good[:len(good)/2], "secret": good,
		"nomodules/x": nil,
	})
	if err := os.Chmod(filepath.Join(dir, "secret"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/null", filepath.Join(dir, "device")); err != nil {
		t.Fatal(err)
	}
	return dir, modules
}

func TestFromFiles(t *testing.T) {
	dir, modules := userFiles(t)
	good := testELF(elfOptions{})
	s := Open(filepath.Join(dir, "store"))
	var digests []string
	for _, image := range []string{"bzImage", "vmlinux", "bzImage"} {
		for _, given := range []string{modules, filepath.Dir(modules), filepath.Join(dir, "root")} {
			k, err := s.FromFiles(t.Context(), filepath.Join(dir, image), given)
			if err != nil {
				t.Fatal(err)
			}
			digests = append(digests, k.Digest)
			if k.Release != testRelease || k.Modules != modules || k.Source != filepath.Join(dir, image) || k.Digest != digests[0] {
				t.Errorf("%s, %s: %+v", image, given, k)
			}
			if got, err := os.ReadFile(k.ELF); err != nil || !bytes.Equal(got, good) {
				t.Errorf("%s: not the kernel that is in it: %v", image, err)
			}
		}
	}
	if all, _ := os.ReadDir(filepath.Join(s.dir, "files")); len(all) != 1 {
		t.Errorf("the store has %v", all)
	}
	for _, c := range []struct{ image, modules, want string }{
		{"nosuch", modules, "no such file"},
		{".", modules, "directory"},
		{"empty", modules, "empty"},
		{"garbage", modules, "neither a bzImage nor an ELF"},
		{"short", modules, "only 1 bytes"},
		{"cut", modules, "truncated"},
		{"elfcut", modules, "truncated"},
		{"nopvh", modules, "CONFIG_PVH"},
		{"device", modules, "not a regular file"},
		{"secret", modules, "permission denied"},
		{"vmlinux", "", "/lib/modules/" + testRelease},
		{"vmlinux", filepath.Join(dir, "nomodules"), "none in"},
		{"vmlinux", filepath.Join(dir, "nosuch"), "no such file"},
		{"vmlinux", filepath.Join(dir, "garbage"), "not a directory"},
	} {
		if c.image == "secret" && os.Geteuid() == 0 {
			continue // root reads it
		}
		_, err := s.FromFiles(t.Context(), filepath.Join(dir, c.image), c.modules)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), filepath.Join(dir, c.image)) {
			t.Errorf("%s: %v; want %q", c.image, err, c.want)
		}
	}
}

func TestPrune(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string][]byte{"old": nil, "new": nil, tmpPrefix + "old": nil, tmpPrefix + "new": nil})
	for name, age := range map[string]time.Duration{"old": unused + time.Hour, tmpPrefix + "old": 2 * time.Hour} {
		then := time.Now().Add(-age)
		if err := os.Chtimes(filepath.Join(dir, name), then, then); err != nil {
			t.Fatal(err)
		}
	}
	prune(dir)
	left, _ := filepath.Glob(filepath.Join(dir, "*new"))
	if all, _ := os.ReadDir(dir); len(all) != 2 || len(left) == 0 {
		t.Errorf("left %v", all)
	}
}

// TestDistribution installs the distribution's own kernel.
func TestDistribution(t *testing.T) {
	testenv.NeedNet(t)
	s := Open(filepath.Join(t.TempDir(), "kernels"))
	a := apt.New(filepath.Join(t.TempDir(), "apt"))
	start := time.Now()
	k, err := s.Install(t.Context(), a, func(step string) { t.Log(time.Since(start).Round(time.Millisecond), step) })
	if err != nil {
		t.Fatal(err)
	}
	t.Log(time.Since(start).Round(time.Millisecond), *k)
	start = time.Now()
	if _, err := s.Current(t.Context()); err != nil {
		t.Error(err)
	}
	t.Log("Current takes", time.Since(start))
	start = time.Now()
	path, err := s.Initramfs(t.Context(), k, AgentOf([]byte("\x7fELF agent")), []string{"virtio_mmio", "virtio_console", "virtio_blk", "virtio_rng", "vmw_vsock_virtio_transport", "overlay", "squashfs", "erofs", "ext4"})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("Initramfs takes", time.Since(start), path)
}
