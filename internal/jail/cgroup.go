package jail

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/layer"
)

// cgroupParent is the directory below which each jail has its cgroups.
const cgroupParent = "ironclaw"

// cgroup is a jail's cgroup: one directory with version 2, one per controller with
// version 1. nil has none.
type cgroup struct {
	version int
	dirs    map[string]string // by controller; with version 2 all the same
	set     []control         // what was written, to be read back
}

// control is a file of a cgroup and what is in it.
type control struct{ path, value string }

// errNoCgroup is why this process cannot make cgroups here.
type errNoCgroup struct{ why string }

func (e *errNoCgroup) Error() string { return e.why }

// threads bounds the program's threads: QEMU has one per processor, a few of its own, and up
// to 64 that read files.
func (j *Jail) threads() int { return j.opts.CPUs + 80 }

// cpuPercent bounds the processor time: by default the machine's processors, and a half for
// the VMM's own work.
func (j *Jail) cpuPercent() int { return cmp.Or(j.opts.Percent, j.opts.CPUs*100+50) }

// Bounds of what a VMM reads from the disk on which its image is, generous: it is a
// neighbour's share that they protect.
const (
	readBytes = 1 << 30 // a second
	readOps   = 100_000 // a second
	writeOps  = 2       // a second, the least there is: nothing is to be written
)

const cpuPeriod = 100_000 // microseconds

// makeCgroup makes the cgroup. Where the host gives none, the bounds are held by other
// mechanisms (see plan), unless the layer is required.
func (j *Jail) makeCgroup() error {
	if !j.on(layer.Cgroup) {
		return nil
	}
	c, err := newCgroup(j.opts.ID)
	if none, ok := errors.AsType[*errNoCgroup](err); ok && !j.opts.Require.Has(layer.Cgroup) {
		j.report = append(j.report, layer.Status{Layer: layer.Cgroup, State: layer.Held, Detail: fmt.Sprintf(
			"%s; memory is held by RLIMIT_DATA (%d MiB), threads by RLIMIT_NPROC (%d), processors by affinity (%d), disk by having nothing to write to",
			none.why, j.data()>>20, j.threads(), j.affinity())})
		return nil
	}
	if err != nil {
		return err
	}
	j.cgroup = c
	return nil
}

// enterCgroup sets the bounds and begins to move the process there. That takes the kernel
// some 15 ms, in which the program may as well start: Verify waits for it, and before that
// nothing foreign runs.
func (j *Jail) enterCgroup() error {
	c := j.cgroup
	if c == nil {
		return nil
	}
	if err := c.limit(j.opts.Memory, j.cpuPercent(), j.threads(), j.opts.Disk); err != nil {
		return err
	}
	j.entered = make(chan error, 1)
	go func() { j.entered <- c.enter(j.cmd.Process.Pid) }()
	return nil
}

// newCgroup makes the directories of a cgroup whose name begins with id: there may be more of
// one id, and leftovers.
func newCgroup(id string) (*cgroup, error) {
	h, err := readHierarchies()
	if err != nil {
		return nil, &errNoCgroup{err.Error()}
	}
	c := &cgroup{dirs: map[string]string{}}
	parents, version, err := h.parents()
	if err != nil {
		return nil, err
	}
	c.version = version
	name := fmt.Sprintf("%s-%08x", id, rand.Uint32())
	for controller, parent := range parents {
		dir := filepath.Join(parent, name)
		switch err := os.Mkdir(dir, 0o755); {
		case errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EROFS):
			c.remove()
			return nil, &errNoCgroup{"no cgroup was delegated to this user"}
		case err != nil && !errors.Is(err, os.ErrExist):
			c.remove()
			return nil, fmt.Errorf("make a cgroup: %w", err)
		}
		c.dirs[controller] = dir
	}
	return c, nil
}

// limit sets the bounds.
func (c *cgroup) limit(memory int64, cpuPercent, threads int, disk string) error {
	quota := cpuPercent * cpuPeriod / 100
	device := wholeDisk(disk)
	var controls []struct{ controller, file, value string }
	add := func(controller, file, value string) {
		controls = append(controls, struct{ controller, file, value string }{controller, file, value})
	}
	if c.version == 2 {
		add("memory", "memory.max", strconv.FormatInt(memory, 10))
		add("memory", "memory.oom.group", "1")
		add("cpu", "cpu.max", fmt.Sprintf("%d %d", quota, cpuPeriod))
		add("pids", "pids.max", strconv.Itoa(threads))
		if _, err := os.Stat(filepath.Join(c.dirs["memory"], "memory.swap.max")); err == nil {
			add("memory", "memory.swap.max", "0")
		}
		if device != "" {
			add("io", "io.max", fmt.Sprintf("%s rbps=%d wbps=max riops=%d wiops=%d", device, readBytes, readOps, writeOps))
		}
	} else {
		add("memory", "memory.limit_in_bytes", strconv.FormatInt(memory, 10))
		add("cpu", "cpu.cfs_period_us", strconv.Itoa(cpuPeriod))
		add("cpu", "cpu.cfs_quota_us", strconv.Itoa(quota))
		add("pids", "pids.max", strconv.Itoa(threads))
		if device != "" {
			add("blkio", "blkio.throttle.read_bps_device", fmt.Sprintf("%s %d", device, readBytes))
			add("blkio", "blkio.throttle.read_iops_device", fmt.Sprintf("%s %d", device, readOps))
			add("blkio", "blkio.throttle.write_iops_device", fmt.Sprintf("%s %d", device, writeOps))
		}
	}
	for _, w := range controls {
		path := filepath.Join(c.dirs[w.controller], w.file)
		if err := writeControl(path, w.value); err != nil {
			return err
		}
		c.set = append(c.set, control{path, w.value})
	}
	return nil
}

// writeControl writes a file of the kernel in one write, and never creates it.
func writeControl(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// enter moves a process into the cgroup.
func (c *cgroup) enter(pid int) error {
	for _, dir := range c.distinct() {
		if err := writeControl(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("enter the cgroup: %w", err)
		}
	}
	return nil
}

func (c *cgroup) distinct() []string {
	var dirs []string
	seen := map[string]bool{}
	for _, dir := range c.dirs {
		if !seen[dir] {
			seen[dir] = true
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// verify reads back every bound, and that the process is in the cgroup.
func (c *cgroup) verify(pid int) (detail string, err error) {
	for _, w := range c.set {
		b, err := os.ReadFile(w.path)
		if err != nil {
			return "", err
		}
		if !slicesContainLine(string(b), w.value) {
			return "", fmt.Errorf("%s is %q, not %q", w.path, strings.TrimSpace(string(b)), w.value)
		}
	}
	for _, dir := range c.distinct() {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			return "", err
		}
		if !slicesContainLine(string(b), strconv.Itoa(pid)) {
			return "", fmt.Errorf("process %d is not in %s", pid, dir)
		}
	}
	var words []string
	for _, w := range c.set {
		words = append(words, filepath.Base(w.path)+" "+w.value)
	}
	return fmt.Sprintf("version %d: %s", c.version, strings.Join(words, ", ")), nil
}

func slicesContainLine(text, line string) bool {
	for l := range strings.Lines(text) {
		if strings.TrimSpace(l) == line {
			return true
		}
	}
	return false
}

// remove removes the cgroup, whose processes have ended. May be called on nil.
func (c *cgroup) remove() {
	if c == nil {
		return
	}
	for _, dir := range c.distinct() {
		removeCgroup(dir)
	}
}

// removeCgroup removes a cgroup without processes. The kernel may hold one for a moment
// after its last process was reaped (CPUs that still switch away from it).
func removeCgroup(dir string) {
	for range 100 {
		err := unix.Rmdir(dir)
		if err != unix.EBUSY && err != unix.EINTR {
			return
		}
		_, _ = unix.Poll(nil, 1)
	}
}

// Sweep removes what jails of sandboxes with these ids have left behind whose supervisors
// were killed. Their processes have ended with them.
func Sweep(ids []string) {
	h, err := readHierarchies()
	if err != nil {
		return
	}
	parents, _, err := h.parents()
	if err != nil {
		return
	}
	for _, parent := range parents {
		for _, id := range ids {
			left, _ := filepath.Glob(filepath.Join(parent, id+"*"))
			for _, dir := range left {
				_ = unix.Rmdir(dir) // one that has processes stays
			}
		}
	}
	sweepUIDs()
}

// wholeDisk is the device, as MAJOR:MINOR, on which a file lies: of the whole disk, for
// that is what can be limited. "" if there is none: a file system in memory, or of several
// devices.
func wholeDisk(path string) string {
	var st unix.Stat_t
	if path == "" || unix.Stat(path, &st) != nil || unix.Major(st.Dev) == 0 {
		return ""
	}
	dev := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	link, err := filepath.EvalSymlinks("/sys/dev/block/" + dev)
	if err != nil {
		return ""
	}
	if _, err := os.Stat(filepath.Join(link, "partition")); err != nil {
		return dev
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(link), "dev"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
