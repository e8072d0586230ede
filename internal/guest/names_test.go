package guest

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNameFiles(t *testing.T) {
	for name, c := range map[string]struct{ image, want string }{
		"no hosts":       {"", "127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 box\n"},
		"without an end": {"127.0.0.1 localhost", "127.0.0.1 localhost\n127.0.1.1 box\n"},
		"others":         {"10.0.0.1 x\n", "10.0.0.1 x\n127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 box\n"},
	} {
		t.Run(name, func(t *testing.T) {
			etc := t.TempDir()
			if c.image != "" {
				write(t, etc+"/hosts", c.image)
			}
			// An image's own ids are nobody's.
			write(t, etc+"/machine-id", strings.Repeat("0", 32)+"\n")
			outside := t.TempDir() + "/victim"
			write(t, outside, "untouched")
			if err := os.Symlink(outside, etc+"/hostname"); err != nil {
				t.Fatal(err)
			}
			n, err := makeNameFiles(etc)
			if err != nil {
				t.Fatal(err)
			}
			if got := read(t, etc+"/machine-id"); got != "" {
				t.Errorf("before hello the machine's id is %q", got)
			}
			if err := n.setMachineID(); err != nil {
				t.Fatal(err)
			}
			for _, f := range []*os.File{n.hostname, n.hosts} {
				defer f.Close()
			}
			if err := appendAndClose(n.hosts, "127.0.1.1 box\n"); err != nil {
				t.Fatal(err)
			}
			if got := read(t, etc+"/machine-id"); !regexp.MustCompile(`^[0-9a-f]{32}\n$`).MatchString(got) || strings.Trim(got, "0\n") == "" {
				t.Errorf("machine-id %q", got)
			}
			if got := read(t, etc+"/hosts"); got != c.want {
				t.Errorf("hosts %q, want %q", got, c.want)
			}
			if got := read(t, outside); got != "untouched" {
				t.Errorf("a link of the image was followed: %q", got)
			}
		})
	}
}

// The image may have anything in the place of its names, and be full of nothing.
func TestNameFilesHostile(t *testing.T) {
	etc := t.TempDir()
	if err := unix.Mkfifo(etc+"/hosts", 0o644); err != nil {
		t.Fatal(err)
	}
	n, err := makeNameFiles(etc)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []*os.File{n.machineID, n.hostname, n.hosts} {
		f.Close()
	}
	if err := n.setMachineID(); err == nil {
		t.Error("the id was set twice")
	}
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
