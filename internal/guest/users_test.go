package guest

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

func writeUsers(t testing.TB, passwd, group string) userFiles {
	t.Helper()
	dir := t.TempDir()
	f := userFiles{dir + "/passwd", dir + "/group"}
	for name, text := range map[string]string{f.passwd: passwd, f.group: group} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func TestResolve(t *testing.T) {
	f := writeUsers(t, `root:x:0:0:root:/root:/bin/bash
agent:x:1000:1000::/home/agent:/bin/sh
short:x:5
minus:x:-1:0::/:
huge:x:4294967295:0::/:
relative:x:7:7::home:
1001:x:8:8::/eight:
thousand:x:1001:9::/:
`, `root:x:0:
agent:x:1000:
docker:x:50:other,agent
twice:x:50:agent
own:x:1000:agent
prefix:x:51:agents,xagent
sudo:x:27:agent,agent
broken
`)
	for _, c := range []struct {
		spec     string
		uid, gid uint32
		groups   []uint32
		home     string
	}{
		{"", 1000, 1000, []uint32{50, 27}, "/home/agent"},
		{"agent", 1000, 1000, []uint32{50, 27}, "/home/agent"},
		{"1000", 1000, 1000, []uint32{50, 27}, "/home/agent"},
		{"agent:docker", 1000, 50, nil, "/home/agent"},
		{"agent:77", 1000, 77, nil, "/home/agent"},
		{"0", 0, 0, nil, "/root"},
		{"4000", 4000, 0, nil, "/"},
		{"4000:4001", 4000, 4001, nil, "/"},
		{"relative", 7, 7, nil, "/"},
		{"1001", 8, 8, nil, "/eight"}, // a name comes before a number
	} {
		id, err := f.resolve(c.spec)
		if err != nil {
			t.Errorf("%q: %v", c.spec, err)
			continue
		}
		if id.uid != c.uid || id.gid != c.gid || !slices.Equal(id.groups, c.groups) || id.home != c.home {
			t.Errorf("%q: %+v", c.spec, id)
		}
	}
	for _, spec := range []string{"nobody", "short", "minus", "huge", "-1", "4294967295", "2147483648", "agent:nothing", "agent:-1"} {
		if id, err := f.resolve(spec); !errors.Is(err, guestrpc.ErrNoUser) {
			t.Errorf("%q: %+v, %v", spec, id, err)
		}
	}
}

func TestResolveWithoutFiles(t *testing.T) {
	f := userFiles{"/no/such/passwd", "/no/such/group"}
	if id, err := f.resolve("12:13"); err != nil || id.uid != 12 || id.gid != 13 {
		t.Errorf("%+v, %v", id, err)
	}
}

// An image's passwd may be anything; reading it must end.
func TestHostileFiles(t *testing.T) {
	f := writeUsers(t, strings.Repeat("x:x:1:1::/:\n", maxFile/12+1), "")
	if _, err := f.resolve("x"); !errors.Is(err, guestrpc.ErrNoUser) {
		t.Errorf("a file over the limit: %v", err)
	}
	f.passwd = t.TempDir() + "/fifo"
	if err := unix.Mkfifo(f.passwd, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := f.resolve("x"); err == nil {
		t.Error("a FIFO was taken for a passwd")
	}
}

func TestReplaceFile(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/target", []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir+"/target", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(dir+"/link", "new"); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(dir + "/target"); string(b) != "old" {
		t.Errorf("the link was followed: %q", b)
	}
	if b, _ := os.ReadFile(dir + "/link"); string(b) != "new" {
		t.Errorf("%q", b)
	}
}

func FuzzUsers(f *testing.F) {
	f.Add("agent:x:1000:1000::/home/agent:/bin/sh\n", "a:x:1:agent\n", "agent:a")
	f.Add("::::::\n:::\n", ":::", "0:0")
	f.Fuzz(func(t *testing.T, passwd, group, spec string) {
		user, grp, _ := strings.Cut(spec, ":")
		if id, ok := findUser(passwd, user); ok {
			if id.uid > maxID || id.gid > maxID || !strings.HasPrefix(id.home, "/") || strings.ContainsRune(id.home, 0) {
				t.Errorf("%+v", id)
			}
			if len(memberOf(group, id)) > maxGroups {
				t.Error("too many groups")
			}
		}
		if gid, ok := findGroup(group, grp); ok && gid > maxID {
			t.Errorf("gid %d", gid)
		}
	})
}
