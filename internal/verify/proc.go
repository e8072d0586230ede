package verify

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/vm"
)

const defaultMemory = vm.DefaultMemory

// memoryWatch is how much memory this process had when the watch began. The peak
// since then is the kernel's word.
type memoryWatch struct{ before int64 }

func watchMemory() (memoryWatch, error) {
	debug.FreeOSMemory() // what is garbage already does not count
	// Makes the peak (VmHWM) what is used now: proc(5).
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		return memoryWatch{}, fmt.Errorf("watch the supervisor's memory: %w", err)
	}
	n, err := statusKiB("VmRSS")
	return memoryWatch{n}, err
}

// grown is by how many bytes this process has grown at most.
func (m memoryWatch) grown() (int64, error) {
	peak, err := statusKiB("VmHWM")
	return peak - m.before, err
}

func statusKiB(key string) (int64, error) {
	v, err := statusField("/proc/self/status", key)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSuffix(v, " kB"), 10, 64)
	return n << 10, err
}

func statusField(path, key string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && k == key {
			return strings.TrimSpace(v), nil
		}
	}
	return "", fmt.Errorf("%s has no %s", path, key)
}

// residentOf is the memory of another process that nobody else has, in bytes. What
// a clone shares with its template is the page cache's.
func residentOf(pid int) (int64, bool) {
	v, err := statusField(fmt.Sprintf("/proc/%d/status", pid), "RssAnon")
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSuffix(v, " kB"), 10, 64)
	return n << 10, err == nil
}

// alive reports whether a process is there that is not only waited for.
func alive(pid int) bool {
	v, err := statusField(fmt.Sprintf("/proc/%d/status", pid), "State")
	return err == nil && !strings.HasPrefix(v, "Z") && !strings.HasPrefix(v, "X")
}

// descendants are the processes that come from this one.
func descendants(root int) []int {
	children := make(map[int][]int)
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		v, err := statusField(dir+"/status", "PPid")
		if err != nil {
			continue // it has ended
		}
		parent, _ := strconv.Atoi(v)
		pid, _ := strconv.Atoi(filepath.Base(dir))
		children[parent] = append(children[parent], pid)
	}
	var all []int
	for queue := children[root]; len(queue) > 0; queue = queue[1:] {
		all = append(all, queue[0])
		queue = append(queue, children[queue[0]]...)
	}
	return all
}

// descriptors counts the open descriptors of this process.
func descriptors() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}

// remains lists what a sandbox has on this host besides what is kept for the next:
// processes, mounts, cgroups, records and temporary files. Others use this host,
// too, so what has a name counts by the sandbox's id.
func (e *env) remains(id string) ([]string, error) {
	var found []string
	for _, pid := range descendants(os.Getpid()) {
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		found = append(found, fmt.Sprintf("process %d %s", pid, strings.TrimSpace(string(name))))
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if strings.Contains(s.Text(), id) {
			found = append(found, "mount "+s.Text())
		}
	}
	for _, tree := range []struct {
		root  string
		depth int
	}{{e.host.Home, 3}, {os.TempDir(), 2}, {"/dev/shm", 2}, {"/run", 3}} {
		names, err := namesIn(tree.root, id, tree.depth)
		if err != nil {
			return nil, err
		}
		found = append(found, names...)
	}
	groups, err := namesIn("/sys/fs/cgroup", "ironclaw", 8)
	for _, g := range groups {
		// One that is in use is somebody else's; ours is empty by now.
		if b, err := os.ReadFile(filepath.Join(g, "cgroup.procs")); err == nil && len(b) == 0 || strings.Contains(g, id) {
			found = append(found, g)
		}
	}
	return found, err
}

// namesIn lists what is below root and has the pattern in its name.
func namesIn(root, pattern string, depth int) ([]string, error) {
	var names []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil { // gone, or another user's
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
				return fs.SkipDir
			}
			return err
		}
		if path != root && strings.Contains(d.Name(), pattern) {
			names = append(names, path)
		}
		rel, _ := filepath.Rel(root, path)
		if d.IsDir() && rel != "." && strings.Count(rel, "/")+1 >= depth {
			return fs.SkipDir
		}
		return nil
	})
	return names, err
}
