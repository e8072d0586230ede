package jail

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/golden"
	"github.com/ironclaw-run/ironclaw/internal/seccomp"
)

const mountsV2 = `24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 24 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
`

const mountsV1 = `30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct
31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 24 0:28 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
33 24 0:29 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio
34 24 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
`

func TestHierarchies(t *testing.T) {
	for name, tt := range map[string]struct {
		mounts, own, controller string
		want                    string // this process's directory
	}{
		"v2":           {mountsV2, "0::/user.slice/user-1000.slice/session-1.scope\n", "", "/sys/fs/cgroup/user.slice/user-1000.slice/session-1.scope"},
		"v1":           {mountsV1, "4:memory:/a b:c\n5:cpu,cpuacct:/\n0::/\n", "memory", "/sys/fs/cgroup/memory/a b:c"},
		"v1, together": {mountsV1, "5:cpu,cpuacct:/x\n", "cpu", "/sys/fs/cgroup/cpu/x"},
		"a container's view": {
			"31 24 0:27 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n", "4:memory:/docker/abc\n", "memory", "/sys/fs/cgroup/memory",
		},
		"nothing mounted": {"", "0::/\n", "memory", ""},
		"garbage":         {" - - \n\x00\n1 2 3 - cgroup\n", "::\nx\n", "memory", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseHierarchies(tt.mounts, tt.own).dir(tt.controller)
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("%q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

func FuzzHierarchies(f *testing.F) {
	f.Add(mountsV2, "0::/x\n")
	f.Add(mountsV1, "4:memory:/a\n")
	f.Fuzz(func(t *testing.T, mounts, own string) {
		h := parseHierarchies(mounts, own)
		for _, c := range []string{"", "memory"} {
			if dir, err := h.dir(c); err == nil && !strings.HasPrefix(dir, filepath.Clean(h.mounts[c])) {
				t.Errorf("%q is not below %q", dir, h.mounts[c])
			}
		}
	})
}

func TestFindLimit(t *testing.T) {
	b, err := os.ReadFile("/proc/self/limits")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range limitNames {
		if soft, hard, err := findLimit(string(b), name); err != nil || soft == "" || hard == "" {
			t.Errorf("%s: %q, %q, %v", name, soft, hard, err)
		}
	}
	if _, _, err := findLimit(string(b), "file"); err == nil {
		t.Error("found a limit by half its name")
	}
}

func TestUnescapeMount(t *testing.T) {
	if got, want := unescapeMount(`/a\040b\134c`), `/a b\c`; got != want {
		t.Errorf("%q, not %q", got, want)
	}
}

// The filter as text: what is in it is a decision.
func TestFilter(t *testing.T) {
	p := Filter()
	if _, err := p.Compile(); err != nil {
		t.Fatal(err)
	}
	got := p.String()
	path := filepath.Join("testdata", "filter.txt")
	golden.Check(t, path, got)
	for _, never := range []string{"socket", "connect", "bind", "listen", "accept", "ptrace", "bpf", "mount", "unshare", "setns",
		"io_uring_setup", "userfaultfd", "perf_event_open", "keyctl", "kill", "setuid", "capset", "init_module", "kexec_load", "clone3", "execveat", "sched_setaffinity"} {
		for _, r := range p.Rules {
			for _, call := range r.Calls {
				if call == never {
					t.Errorf("%s is in the filter: %+v", never, r)
				}
			}
		}
		known := seccomp.Profile{Default: seccomp.Allow, Rules: []seccomp.Rule{{Calls: []string{never}, Action: seccomp.Allow}}}
		if _, err := known.Compile(); err != nil {
			t.Error(err)
		}
	}
}
