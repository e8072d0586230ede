package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

var testEpoch = time.Unix(1700000000, 0)

type testEntry struct {
	name, body, link string
	kind             byte // default: a file, or a directory if the name ends in /
	mode             int64
	uid, gid         int
	major, minor     int64
	mtime            int64
	xattrs           map[string]string
}

type entries []testEntry

func makeTar(t testing.TB, list entries) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range list {
		hdr := &tar.Header{
			Name: e.name, Typeflag: e.kind, Linkname: e.link, Mode: e.mode, Uid: e.uid, Gid: e.gid,
			Devmajor: e.major, Devminor: e.minor, Size: int64(len(e.body)), Format: tar.FormatPAX,
			ModTime: time.Unix(e.mtime, 0),
		}
		if e.kind == 0 {
			hdr.Typeflag = tar.TypeReg
			if strings.HasSuffix(e.name, "/") {
				hdr.Typeflag = tar.TypeDir
			}
		}
		if e.mode == 0 {
			hdr.Mode = 0o644
		}
		for k, v := range e.xattrs {
			if hdr.PAXRecords == nil {
				hdr.PAXRecords = map[string]string{}
			}
			hdr.PAXRecords[xattrRecord+k] = v
		}
		if err := tw.WriteHeader(hdr); err != nil {
			t.Fatalf("%s: %v", e.name, err)
		}
		if _, err := io.WriteString(tw, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func convertBytes(ctx context.Context, archive []byte, edits map[string]file, disk *os.File) (*tree, error) {
	t, err := scan(bytes.NewReader(archive), testEpoch)
	if err != nil {
		return nil, err
	}
	return t, t.convert(ctx, bytes.NewReader(archive), edits, disk)
}

// system is a small tree with one of everything.
func system() entries {
	long := strings.Repeat("long/", 20) + "target"
	return entries{
		{name: "./", mode: 0o755},
		{name: "./bin", kind: tar.TypeSymlink, link: "usr/bin"},
		{name: "./dev/", mode: 0o755},
		{name: "./dev/null", kind: tar.TypeChar, major: 1, minor: 3, mode: 0o666},
		{name: "./etc/", mode: 0o755},
		{name: "./etc/apt/sources.list", body: "deb https://user:secret@example.invalid x main\n"},
		{name: "./etc/apt/apt.conf.d/99mmdebstrap", body: "Acquire::http::Proxy \"http://user:secret@example.invalid\";"},
		{name: "./etc/group", body: "root:x:0:\nshadow:x:42:\n"},
		{name: "./etc/hostname", body: "buildhost\n", mode: 0o755},
		{name: "./etc/long", kind: tar.TypeSymlink, link: long},
		{name: "./etc/passwd", body: "root:x:0:0:root:/root:/bin/bash"},
		{name: "./etc/resolv.conf", kind: tar.TypeSymlink, link: "/run/secret-host"},
		{name: "./etc/skel/", mode: 0o755},
		{name: "./etc/skel/.bashrc", body: "# hello\n"},
		{name: "./usr/bin/", mode: 0o755},
		{name: "./usr/bin/ping", body: "ping", mode: 0o755, xattrs: map[string]string{
			"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
			"security.selinux":    "host_u:host_r:host_t:s0\x00"}},
		{name: "./usr/bin/su", body: strings.Repeat("su", 5000), mode: 0o4755, gid: 7},
		{name: "./usr/bin/su2", kind: tar.TypeLink, link: "./usr/bin/su"},
		{name: "./usr/lib/os-release", body: "NAME=\"Debian\"\nID=debian\n"},
		{name: "./usr/share/große Datei=1", body: strings.Repeat("\x00", 300000) + "end"},
		{name: "./var/lib/dpkg/status", body: "Package: bash\nStatus: install ok installed\nVersion: 5.2-1\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 1\n"},
		{name: "./var/log/dpkg.log", body: "2026-01-01 installed\n", mtime: 1},
		{name: "./var/pipe", kind: tar.TypeFifo},
	}
}

func buildSystem(t *testing.T, path string) (*os.File, *tree) {
	t.Helper()
	archive := makeTar(t, system())
	tr, err := scan(bytes.NewReader(archive), testEpoch)
	check(t, err)
	edits, err := tr.edits()
	check(t, err)
	disk, err := os.Create(path)
	check(t, err)
	t.Cleanup(func() { disk.Close() })
	check(t, tr.convert(t.Context(), bytes.NewReader(archive), edits, disk))
	return disk, tr
}

// debugfs runs one request of debugfs on the disk.
func debugfs(t *testing.T, disk, request string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "debugfs", "-R", request, disk).Output()
	check(t, err)
	return string(out)
}

func TestConvertedFilesystem(t *testing.T) {
	for _, tool := range []string{"debugfs", "e2fsck"} {
		testenv.NeedTool(t, tool, "e2fsprogs")
	}
	path := filepath.Join(t.TempDir(), "disk")
	buildSystem(t, path)
	if out, err := exec.CommandContext(t.Context(), "e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
	for _, tt := range []struct{ request, want string }{
		{"stat /usr/bin/su", "Mode:  04755"},
		{"stat /usr/bin/su", "Group:     7"},
		{"stat /usr/bin/su", "Links: 2"},
		{"stat /usr/bin/ping", "security.capability (20)"},
		{"stat /dev/null", "Device major/minor number: 01:03"},
		{"stat /var/pipe", "FIFO"},
		{"stat /bin", `Fast link dest: "usr/bin"`},
		{"stat /home/agent", "Mode:  0750"},
		{"stat /home/agent", "User:  1000   Group:  1000"},
		{"stat /home/agent/.bashrc", "User:  1000"},
		{"stat /etc/shadow", "Mode:  0640"},
		{"stat /etc/resolv.conf", "regular"},
		{"cat /etc/long", strings.Repeat("long/", 20) + "target"},
		{"cat /etc/hostname", "ironclaw\n"},
		{"cat /etc/hosts", "127.0.0.1\tlocalhost\n"},
		{"cat /etc/passwd", "/bin/bash\nagent:x:1000:1000::/home/agent:/bin/bash\n"},
		{"cat /etc/group", "agent:x:1000:\n"},
		{"cat /etc/shadow", "root:*:19675:"},
		{"cat \"/usr/share/große Datei=1\"", "\x00\x00end"},
	} {
		if got := debugfs(t, path, tt.request); !strings.Contains(got, tt.want) {
			t.Errorf("%s:\n%.2000s\nwant %q", tt.request, got, tt.want)
		}
	}
	if got := debugfs(t, path, "cat /etc/machine-id") + debugfs(t, path, "cat /etc/resolv.conf"); got != "" {
		t.Errorf("machine-id and resolv.conf hold %q", got)
	}
	raw, err := os.ReadFile(path)
	check(t, err)
	for _, secret := range []string{"secret", "host_u", "buildhost", "2026-01-01"} {
		if bytes.Contains(raw, []byte(secret)) {
			t.Errorf("the image holds %q of the host", secret)
		}
	}
}

func TestConvertIsDeterministicAndSparse(t *testing.T) {
	dir := t.TempDir()
	one, tr := buildSystem(t, filepath.Join(dir, "one"))
	two, _ := buildSystem(t, filepath.Join(dir, "two"))
	a, err := hashFile(t.Context(), one)
	check(t, err)
	b, err := hashFile(t.Context(), two)
	check(t, err)
	if a != b {
		t.Errorf("%s and %s", a, b)
	}
	packages, err := installedPackages(tr.kept[statusFile])
	if err != nil || len(packages) != 1 || packages[0] != (Package{"bash", "5.2-1"}) {
		t.Errorf("packages %v, %v", packages, err)
	}
	if id := distribution(tr.kept[osReleaseFile]); id != "debian" {
		t.Errorf("distribution %s", id)
	}
	st, err := one.Stat()
	check(t, err)
	if st.Size()%4096 != 0 || st.Size() < 300000 {
		t.Errorf("size %d", st.Size())
	}
}

func TestHostileArchives(t *testing.T) {
	file := func(name string) entries { return entries{{name: name, body: "x"}} }
	for _, tt := range []struct {
		name string
		list entries
		want string
	}{
		{"up", file("../etc/passwd"), `".."`},
		{"up inside", file("etc/../../passwd"), `".."`},
		{"only up", file(".."), `".."`},
		{"absolute", file("/etc/passwd"), "absolute"},
		{"empty part", file("etc//passwd"), "empty part"},
		{"dot inside", file("etc/./passwd"), "empty part"},
		{"long part", file(strings.Repeat("a", 256)), "256 bytes"},
		{"long name", file(strings.Repeat("a/", 3000) + "b"), "name of"},
		{"twice", append(file("a"), file("a")...), "twice"},
		{"file as directory", append(file("a"), file("a/b")...), "not a directory"},
		{"through a link", entries{{name: "a", kind: tar.TypeSymlink, link: "/"}, {name: "a/etc", body: "x"}}, "not a directory"},
		{"root a link", entries{{name: "./", kind: tar.TypeSymlink, link: "/"}}, "root is not"},
		{"hard link nowhere", entries{{name: "a", kind: tar.TypeLink, link: "b"}}, "not in the image"},
		{"hard link up", entries{{name: "a", kind: tar.TypeLink, link: "../b"}}, `".."`},
		{"hard link to directory", entries{{name: "a/"}, {name: "b", kind: tar.TypeLink, link: "a"}}, "directory"},
		{"hard link to dropped", entries{{name: "var/log/x", body: "x"}, {name: "b", kind: tar.TypeLink, link: "var/log/x"}}, "not in the image"},
		{"contiguous file", entries{{name: "a", kind: tar.TypeCont}}, "type"},
		{"owner", entries{{name: "a", uid: 1 << 40}}, "owner"},
		{"device", entries{{name: "a", kind: tar.TypeBlock, major: 1 << 20}}, "device"},
		{"attributes", entries{{name: "a", xattrs: map[string]string{"user.x": strings.Repeat("x", 3000)}}}, "extended attributes"},
		{"too much skel", skel(maxSkel + 1), "more than"},
		{"large passwd", entries{{name: "etc/passwd", body: strings.Repeat("x", maxKept+1)}}, "larger than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			disk, err := os.Create(filepath.Join(t.TempDir(), "disk"))
			check(t, err)
			defer disk.Close()
			if _, err := convertBytes(t.Context(), makeTar(t, tt.list), nil, disk); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func skel(n int) (list entries) {
	for i := range n {
		list = append(list, testEntry{name: fmt.Sprintf("etc/skel/f%d", i)})
	}
	return list
}

func TestBrokenArchives(t *testing.T) {
	whole := makeTar(t, system())
	for _, tt := range []struct {
		name string
		r    io.Reader
		want string
	}{
		{"empty", strings.NewReader(""), "is empty"},
		{"only zeros", bytes.NewReader(make([]byte, 4096)), "is empty"},
		{"in the middle", bytes.NewReader(whole[:len(whole)/2]), "ends in the middle"},
		{"in a header", bytes.NewReader(whole[:700]), "ends in the middle"},
		{"not a tar", strings.NewReader(strings.Repeat("hello", 1000)), "invalid"},
		{"broken pipe", io.MultiReader(bytes.NewReader(whole[:3000]), brokenReader{}), "broken here"},
	} {
		if _, err := scan(tt.r, testEpoch); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errors.New("broken here") }

func TestConvertCancelled(t *testing.T) {
	archive := makeTar(t, system())
	tr, err := scan(bytes.NewReader(archive), testEpoch)
	check(t, err)
	disk, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	check(t, err)
	defer disk.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := tr.convert(ctx, bytes.NewReader(archive), nil, disk); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// The filesystem side fails (here: it cannot write), and the archive side must
// say why instead of waiting for it.
func TestConvertCannotWrite(t *testing.T) {
	archive := makeTar(t, append(system(), testEntry{name: "zz", body: strings.Repeat("full", 1<<20)}))
	tr, err := scan(bytes.NewReader(archive), testEpoch)
	check(t, err)
	disk, err := os.Open(os.DevNull) // read only
	check(t, err)
	defer disk.Close()
	if err := tr.convert(t.Context(), bytes.NewReader(archive), nil, disk); err == nil || !strings.Contains(err.Error(), "make ext4") {
		t.Errorf("got %v", err)
	}
}

func TestAccountsInTheWay(t *testing.T) {
	for _, passwd := range []string{"agent:x:5:5::/:/bin/sh\n", "other:x:1000:5::/:/bin/sh\n"} {
		tr, err := scan(bytes.NewReader(makeTar(t, entries{{name: "etc/group", body: "root:x:0:\n"}, {name: "etc/passwd", body: passwd}})), testEpoch)
		check(t, err)
		if _, err := tr.edits(); err == nil || !strings.Contains(err.Error(), "already has") {
			t.Errorf("%q: %v", passwd, err)
		}
	}
}

func TestCompiledModules(t *testing.T) {
	pyc := func(flags, a, b uint32) string {
		h := []byte{0xa7, 0x0d, '\r', '\n'}
		for _, n := range []uint32{flags, a, b} {
			h = binary.LittleEndian.AppendUint32(h, n)
		}
		return string(h) + "code"
	}
	epoch := uint32(testEpoch.Unix())
	for _, tt := range []struct {
		name      string
		mtime     int64 // of the source in the archive
		give, get string
	}{
		{"checked hash becomes a time", 5, pyc(3, 0xdead, 0xbeef), pyc(0, 5, 4)},
		{"the time of a source that was clamped", testEpoch.Unix() + 9, pyc(0, epoch+9, 4), pyc(0, epoch, 4)},
		{"a good time stays", 5, pyc(0, 5, 4), pyc(0, 5, 4)},
		{"an unchecked hash stays", 5, pyc(1, 1, 2), pyc(1, 1, 2)},
		{"short", 5, "abc", "abc"},
		{"empty", 5, "", ""},
		{"not a module", 5, strings.Repeat("x", 30), strings.Repeat("x", 30)},
	} {
		tr, err := scan(bytes.NewReader(makeTar(t, entries{{name: "lib/__pycache__/m.cpython-311.pyc", body: tt.give}, {name: "lib/m.py", body: "1234", mtime: tt.mtime}})), testEpoch)
		check(t, err)
		r, err := tr.fixPyc("lib/__pycache__/m.cpython-311.pyc", strings.NewReader(tt.give))
		check(t, err)
		if got, _ := io.ReadAll(r); string(got) != tt.get {
			t.Errorf("%s: %x, want %x", tt.name, got, tt.get)
		}
	}
}

// Debian's sitecustomize, read at each start of Python, is a link.
func TestCompiledModuleOfLink(t *testing.T) {
	tr, err := scan(bytes.NewReader(makeTar(t, entries{
		{name: "etc/m.py", body: "12345", mtime: 7},
		{name: "lib/m.py", kind: tar.TypeSymlink, link: "n.py"},
		{name: "lib/n.py", kind: tar.TypeSymlink, link: "/etc/m.py"},
		{name: "lib/o.py", kind: tar.TypeSymlink, link: "../../../etc/m.py"},
		{name: "lib/loop.py", kind: tar.TypeSymlink, link: "loop.py"},
	})), testEpoch)
	check(t, err)
	for _, name := range []string{"lib/m.py", "lib/o.py"} {
		if e, ok := tr.follow(name); !ok || e.size != 5 || e.mtime != 7 {
			t.Errorf("%s: %+v, %v", name, e, ok)
		}
	}
	for _, name := range []string{"lib/loop.py", "lib/none.py"} {
		if e, ok := tr.follow(name); ok {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func TestSparseFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	check(t, err)
	defer f.Close()
	s := &sparseFile{f: f}
	want := make([]byte, 40000)
	put := func(at int, b []byte) {
		t.Helper()
		_, err := s.Seek(int64(at), io.SeekStart)
		check(t, err)
		n, err := s.Write(b)
		if n != len(b) || err != nil {
			t.Fatal(n, err)
		}
		copy(want[at:], b)
	}
	put(8000, bytes.Repeat([]byte{1}, 10000))
	put(18000, make([]byte, 22000))            // a hole at the end
	put(9000, make([]byte, 5000))              // zeros over what was written
	put(3, append(make([]byte, 5000), 7, 8))   // into the gap in front
	put(20000, bytes.Repeat([]byte{0, 9}, 50)) // into the hole
	check(t, s.finish())
	got, err := os.ReadFile(f.Name())
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Error("the file differs from what was written")
	}
}

func FuzzArchive(f *testing.F) {
	f.Add(makeTar(f, entries{{name: "etc/group", body: "root:x:0:\n"}, {name: "etc/passwd", body: "root:x:0:0:::\n"}, {name: "etc/skel/.a", body: "b"}}))
	f.Add(makeTar(f, entries{{name: "a/"}, {name: "a/b", body: "x", xattrs: map[string]string{"user.a": "b"}}, {name: "c", kind: tar.TypeLink, link: "a/b"}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		disk, err := os.Create(filepath.Join(t.TempDir(), "disk"))
		if err != nil {
			t.Fatal(err)
		}
		defer disk.Close()
		tr, err := scan(bytes.NewReader(b), testEpoch)
		if err != nil {
			return
		}
		edits, err := tr.edits()
		if err != nil {
			edits = nil
		}
		if tr.convert(t.Context(), bytes.NewReader(b), edits, disk) != nil {
			return
		}
		st, err := disk.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if err := checkDisk(&Image{Path: disk.Name(), Size: st.Size()}); err != nil {
			t.Error(err)
		}
	})
}
