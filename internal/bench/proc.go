package bench

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// tick is the unit of CPU times in /proc.
const tick = time.Second / 100

// Host is what was measured on.
type Host struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`       // that this process may use
	Memory int64  `json:"memory_mib"` // of the host
	Load   string `json:"load"`       // over the last minute, at the begin
}

func (h Host) String() string {
	return fmt.Sprintf("Linux %s, %s, %s, %.1f GiB, load %s", h.Kernel, h.CPU, count(h.CPUs, "cpu"), float64(h.Memory)/1024, h.Load)
}

// Machine is what was measured.
type Machine struct {
	VMM    string `json:"vmm"`
	Accel  string `json:"accel"` // in use
	Link   string `json:"link"`
	CPUs   int    `json:"cpus"`
	Memory int64  `json:"memory_mib"`
	Cloned bool   `json:"cloned"` // from a template, not booted
}

func (m Machine) String() string {
	how := "booted"
	if m.Cloned {
		how = "cloned"
	}
	return fmt.Sprintf("%s, %s, link %s, %s, %d MiB, %s", m.VMM, m.Accel, m.Link, count(m.CPUs, "cpu"), m.Memory, how)
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func guestSize(o sandbox.Options) (cpus int, mib int64) {
	if o.Memory == 0 {
		o.Memory = vm.DefaultMemory
	}
	return max(1, o.CPUs), o.Memory >> 20
}

func hostFacts() Host {
	var u unix.Utsname
	_ = unix.Uname(&u)
	h := Host{Kernel: unix.ByteSliceToString(u.Release[:]), CPU: "unknown CPU", CPUs: cpus(), Load: "unknown"}
	if name, err := field("/proc/cpuinfo", "model name"); err == nil {
		h.CPU = name
	}
	if total, err := kib("/proc/meminfo", "MemTotal"); err == nil {
		h.Memory = total >> 10
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		h.Load, _, _ = strings.Cut(string(b), " ")
	}
	return h
}

// cpus is how many processors this process may use.
func cpus() int {
	var set unix.CPUSet
	if unix.SchedGetaffinity(0, &set) != nil {
		return 1
	}
	return set.Count()
}

// field reads what stands behind "name:" in a file of /proc.
func field(path, name string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v), nil
		}
	}
	return "", fmt.Errorf("read %s: no %s", path, name)
}

func kib(path, name string) (int64, error) {
	v, err := field(path, name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSuffix(v, " kB"), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	return n, nil
}

// memoryOf is a process's proportional share of memory, in MiB.
func memoryOf(pid int) (float64, error) {
	n, err := kib(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss")
	return float64(n) / 1024, err
}

// available is the memory that can be had without swapping, and all of it, in MiB.
func available() (free, total float64, err error) {
	a, err := kib("/proc/meminfo", "MemAvailable")
	if err != nil {
		return 0, 0, err
	}
	all, err := kib("/proc/meminfo", "MemTotal")
	return float64(a) / 1024, float64(all) / 1024, err
}

// process is a line of /proc/PID/stat.
type process struct {
	pid, parent int
	used        time.Duration // by itself
	reaped      time.Duration // by the children it has waited for
}

func readProcess(pid int) (process, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, err
	}
	return parseProcess(string(b))
}

func parseProcess(s string) (process, error) {
	bad := errors.New("read /proc/PID/stat: too few fields")
	id, _, ok := strings.Cut(s, " ")
	end := strings.LastIndexByte(s, ')') // the name before it may hold anything
	if !ok || end < 0 {
		return process{}, bad
	}
	fields := strings.Fields(s[end+1:]) // from the third on: state, ppid, ...
	if len(fields) < 15 {
		return process{}, bad
	}
	var n [6]int64
	for i, f := range []string{id, fields[1], fields[11], fields[12], fields[13], fields[14]} {
		var err error
		if n[i], err = strconv.ParseInt(f, 10, 64); err != nil {
			return process{}, fmt.Errorf("read /proc/PID/stat: %w", err)
		}
	}
	return process{pid: int(n[0]), parent: int(n[1]), used: time.Duration(n[2]+n[3]) * tick, reaped: time.Duration(n[4]+n[5]) * tick}, nil
}

// descendants lists the processes below this one, those that have ended and were
// not waited for among them.
func descendants() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := make(map[int][]process)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := readProcess(pid)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended meanwhile
		} else if err != nil {
			return nil, err
		}
		children[p.parent] = append(children[p.parent], p)
	}
	below := children[os.Getpid()]
	for i := 0; i < len(below); i++ {
		below = append(below, children[below[i].pid]...)
	}
	return below, nil
}

// ownTime is the CPU time that this process and its descendants have used.
func ownTime() (time.Duration, error) {
	var sum time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0, err
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	below, err := descendants()
	for _, p := range below {
		sum += p.used + p.reaped
	}
	return sum, err
}

// filesBelow lists the files in a directory, without following links.
func filesBelow(dir string) (map[string]bool, error) {
	files := make(map[string]bool)
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // gone meanwhile
			return nil
		}
		files[path] = true
		return err
	})
	return files, err
}
