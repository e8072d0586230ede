package kernel

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
)

func testKernel(t *testing.T, dir string) *Kernel {
	t.Helper()
	modules := filepath.Join(dir, "lib/modules", testRelease)
	writeTree(t, modules, testTree(t))
	return &Kernel{Release: testRelease, Digest: "d1", Modules: modules}
}

var testAgent = []byte("\x7fELF an agent")

func TestOrder(t *testing.T) {
	k := testKernel(t, t.TempDir())
	tree, err := readModuleTree(k.Modules, k.Release)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ want, order string }{
		{"", ""},
		{"ext4", ""},
		{"virtio_mmio", "virtio_ring virtio virtio_mmio"},
		{"virtio-mmio virtio_rng", "virtio_ring virtio virtio_mmio virtio_rng"},
		{"overlay virtio-rng virtio", "overlay virtio_ring virtio virtio_rng"},
		{"libcrc32c", "crc32c_generic libcrc32c"},
		{"replaced", "virtio_ring virtio replaced"},
		{"dddddddd", "dddddddd"},
	} {
		modules, err := tree.order(strings.Fields(c.want))
		var names []string
		for _, m := range modules {
			names = append(names, m.name)
		}
		if err != nil || strings.Join(names, " ") != c.order {
			t.Errorf("%s: %q, %v; want %q", c.want, names, err, c.order)
		}
	}
	for name, want := range map[string]string{
		"nosuch":      "module nosuch: nosuch: neither in",
		"orphan":      "orphan -> missing_one: neither in",
		"loop_a":      "loop_a -> loop_b -> loop_a",
		"misnamed":    `says it is module "other"`,
		"foreign":     "for kernel 1.2.3, not " + testRelease,
		"garbage":     "not a module",
		"garbage_zst": "garbage_zst.ko.zst",
		"silent":      "no .modinfo",
		"../x":        "neither in",
		"":            "neither in",
	} {
		if _, err := tree.order([]string{name}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", name, err, want)
		}
	}
}

func TestInitramfs(t *testing.T) {
	k := testKernel(t, t.TempDir())
	want := []string{"virtio_mmio", "ext4", "overlay"}
	var archives [][]byte
	var path string
	for range 2 {
		var err error
		if path, err = Open(t.TempDir()).Initramfs(t.Context(), k, AgentOf(testAgent), want); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		archives = append(archives, data)
		time.Sleep(10 * time.Millisecond)
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("the same input made different bytes")
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(archives[0])))
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	inodes := make(map[uint64]bool)
	for _, r := range records {
		list = append(list, fmt.Sprintf("%s %o %d", r.Name, r.Mode, r.FileSize))
		if inodes[r.Ino] || r.MTime != 0 || r.UID != 0 {
			t.Errorf("%+v", r.Info)
		}
		inodes[r.Ino] = true
	}
	mod := func(name, depends string) int { return len(goodModule(name, depends)) }
	wantList := []string{
		"dev 40755 0", "proc 40755 0", "sys 40755 0", "run 40755 0", "tmp 40755 0", "lower 40755 0", "overlay 40755 0",
		"newroot 40755 0", "modules 40755 0", "dev/console 20600 0", fmt.Sprintf("init 100755 %d", len(testAgent)),
		fmt.Sprintf("modules/000-virtio_ring.ko 100644 %d", mod("virtio_ring", "")),
		fmt.Sprintf("modules/001-virtio.ko 100644 %d", mod("virtio", "virtio_ring")),
		fmt.Sprintf("modules/002-virtio_mmio.ko 100644 %d", mod("virtio_mmio", "virtio,virtio_ring")),
		fmt.Sprintf("modules/003-overlay.ko 100644 %d", mod("overlay", "")),
	}
	if !slices.Equal(list, wantList) {
		t.Errorf("archive has\n%s\nwant\n%s", strings.Join(list, "\n"), strings.Join(wantList, "\n"))
	}
	if console := records[9]; console.Rmajor != 5 || console.Rminor != 1 {
		t.Errorf("the console is %d:%d", console.Rmajor, console.Rminor)
	}
}

func TestInitramfsCache(t *testing.T) {
	k := testKernel(t, t.TempDir())
	s := Open(t.TempDir())
	seen := make(map[string]bool)
	make1 := func(what string, fresh bool, k *Kernel, agent []byte, want ...string) {
		t.Helper()
		path, err := s.Initramfs(t.Context(), k, AgentOf(agent), want)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if seen[path] == fresh {
			t.Errorf("%s: made anew: %v, want %v", what, !seen[path], fresh)
		}
		seen[path] = true
	}
	make1("the first", true, k, testAgent, "virtio", "overlay")
	make1("the same", false, k, testAgent, "virtio", "overlay")
	make1("another order", true, k, testAgent, "overlay", "virtio")
	make1("another agent", true, k, append(testAgent, 1), "virtio", "overlay")
	other := *k
	other.Digest = "d2"
	make1("another kernel", true, &other, testAgent, "virtio", "overlay")
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(k.Modules, "kernel/drivers/virtio/virtio.ko"), later, later); err != nil {
		t.Fatal(err)
	}
	make1("a module built anew", true, k, testAgent, "virtio", "overlay")

	for want, err := range map[string]error{
		"not ELF":      second(s.Initramfs(t.Context(), k, AgentOf(nil), nil)),
		"not ELF ":     second(s.Initramfs(t.Context(), k, AgentOf([]byte("#!/bin/sh")), nil)),
		"nosuch":       second(s.Initramfs(t.Context(), k, AgentOf(testAgent), []string{"nosuch"})),
		"no such file": second(s.Initramfs(t.Context(), &Kernel{Release: "x", Modules: "/nosuch"}, AgentOf(testAgent), nil)),
	} {
		if err == nil || !strings.Contains(err.Error(), strings.TrimSpace(want)) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, "initramfs", tmpPrefix+"*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func second(_ string, err error) error { return err }

func TestAgent(t *testing.T) {
	var data []byte
	a, err := BuiltInAgent()
	if err == nil {
		data, err = a.Program()
	}
	_, statErr := os.Stat("agent/ironclaw-init")
	if (err == nil) != (statErr == nil) {
		t.Fatalf("Agent: %d bytes, %v; the file: %v", len(data), err, statErr)
	}
	if err != nil && !strings.Contains(err.Error(), "make build") {
		t.Errorf("Agent: %v", err)
	}
}

// An initramfs that attacks is the usual one with one more file, and is nowhere in
// the store: no other machine can come to boot it.
func TestHostileInitramfs(t *testing.T) {
	dir, out := t.TempDir(), t.TempDir()
	s := Open(dir)
	k := testKernel(t, t.TempDir())
	path, err := s.HostileInitramfs(k, AgentOf(testAgent), []string{"virtio_rng"}, out)
	if err != nil {
		t.Fatal(err)
	}
	usual, err := s.Initramfs(t.Context(), k, AgentOf(testAgent), []string{"virtio_rng"})
	if err != nil {
		t.Fatal(err)
	}
	names := func(path string) []string {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		records, err := cpio.ReadAllRecords(cpio.Newc.Reader(f))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, r := range records {
			names = append(names, r.Name)
		}
		return names
	}
	if got, want := names(path), append(names(usual), "hostile"); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if filepath.Dir(path) != out {
		t.Errorf("it is at %s", path)
	}
}
