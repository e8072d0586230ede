package jail

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// hierarchies are the cgroup file systems of this host and where this process is in them.
type hierarchies struct {
	mounts map[string]string // by controller; "" is version 2
	roots  map[string]string // what of the hierarchy is mounted there
	own    map[string]string // this process's path, by controller
}

// controllers are those that a jail needs. With version 1 disk bounds are blkio's.
var controllers = map[int][]string{1: {"memory", "cpu", "pids", "blkio"}, 2: {"memory", "cpu", "pids", "io"}}

func readHierarchies() (*hierarchies, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	return parseHierarchies(string(mounts), string(own)), nil
}

// parseHierarchies reads /proc/self/mountinfo and /proc/self/cgroup (cgroups(7)).
func parseHierarchies(mountinfo, cgroups string) *hierarchies {
	h := &hierarchies{map[string]string{}, map[string]string{}, map[string]string{}}
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 5 || len(g) < 3 {
			continue
		}
		switch g[0] {
		case "cgroup2":
			h.add("", f[4], f[3])
		case "cgroup":
			for option := range strings.SplitSeq(g[2], ",") {
				h.add(option, f[4], f[3])
			}
		}
	}
	for line := range strings.Lines(cgroups) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		for controller := range strings.SplitSeq(f[1], ",") {
			h.own[controller] = f[2]
		}
	}
	return h
}

// add notes a mount; the first of several counts.
func (h *hierarchies) add(controller, mount, root string) {
	if _, ok := h.mounts[controller]; !ok {
		h.mounts[controller], h.roots[controller] = mount, root
	}
}

// dir is this process's own directory in a hierarchy.
func (h *hierarchies) dir(controller string) (string, error) {
	mount, ok := h.mounts[controller]
	if !ok {
		return "", &errNoCgroup{fmt.Sprintf("no cgroup controller %s is mounted", controller)}
	}
	path := h.own[controller]
	if root := h.roots[controller]; root != "/" { // a container's view
		path = strings.TrimPrefix(path, root)
	}
	return filepath.Join(mount, path), nil
}

// parents are the directories in which jails' cgroups are made, by controller, and the
// version. They exist when it returns.
func (h *hierarchies) parents() (map[string]string, int, error) {
	if h.unified() {
		dir, err := h.unifiedParent()
		if err != nil {
			return nil, 0, err
		}
		parents := map[string]string{}
		for _, c := range controllers[2] {
			parents[c] = dir
		}
		return parents, 2, nil
	}
	parents := map[string]string{}
	for _, c := range controllers[1] {
		own, err := h.dir(c)
		if err != nil {
			return nil, 0, err
		}
		dir := filepath.Join(own, cgroupParent)
		if err := makeDir(dir); err != nil {
			return nil, 0, err
		}
		parents[c] = dir
	}
	return parents, 1, nil
}

// unified reports whether the controllers are version 2's.
func (h *hierarchies) unified() bool {
	mount, ok := h.mounts[""]
	if !ok {
		return false
	}
	b, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers"))
	return err == nil && strings.Contains(" "+string(b), " memory") || len(h.mounts) == 1
}

// unifiedParent is the directory for cgroups of version 2: at the top for root on a whole
// host, otherwise in this process's own cgroup, if that was delegated to it.
func (h *hierarchies) unifiedParent() (string, error) {
	top := h.mounts[""]
	base := top
	_, err := os.Stat(filepath.Join(top, "cgroup.events")) // the root of all has none
	if wholeHost := err != nil; !wholeHost || os.Geteuid() != 0 {
		if base, err = h.dir(""); err != nil {
			return "", err
		}
	}
	if err := unix.Access(base, unix.W_OK); err != nil {
		return "", &errNoCgroup{"no cgroup was delegated to this user"}
	}
	if err := delegate(base); err != nil {
		return "", err
	}
	dir := filepath.Join(base, cgroupParent)
	if err := makeDir(dir); err != nil {
		return "", err
	}
	return dir, enable(dir)
}

// delegate makes base's controllers available below it. A cgroup with processes of its own can give
// none away; if they are only this one, it moves to a cgroup beside the jails'.
func delegate(base string) error {
	err := enable(base)
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	own := filepath.Join(base, "supervisor")
	if err := makeDir(own); err != nil {
		return err
	}
	if err := writeControl(filepath.Join(own, "cgroup.procs"), "0"); err != nil {
		return &errNoCgroup{fmt.Sprintf("move to a cgroup of our own: %v", err)}
	}
	if err := enable(base); err != nil {
		return &errNoCgroup{"the cgroup delegated to this user has other processes in it"}
	}
	return nil
}

// enable lets dir's children have the controllers.
func enable(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return &errNoCgroup{err.Error()}
	}
	var missing []string
	for _, c := range controllers[2] {
		if !strings.Contains(" "+strings.TrimSpace(string(b))+" ", " "+c+" ") {
			missing = append(missing, "+"+c)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	err = writeControl(filepath.Join(dir, "cgroup.subtree_control"), strings.Join(missing, " "))
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return &errNoCgroup{fmt.Sprintf("the cgroup %s has not all of the controllers memory, cpu, pids and io: %v", dir, err)}
	}
	return err
}

func makeDir(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return &errNoCgroup{fmt.Sprintf("make a cgroup: %v", err)}
	}
	return nil
}
