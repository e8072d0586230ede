package guest

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// jobs is the cgroup of all commands; each has a group of its own below it.
//
//	job      memory.max: what commands may use together, pids.max
//	job/N    memory.oom.group: who exhausts it dies as a whole
//
// What a command writes to the overlay, which is memory, counts too, and goes on
// counting against job when the command has ended.
//
// The limit leaves the kernel and the agent their part, so the machine as a
// whole does not run out and the kernel never has to choose among all processes.
// Should it (memory of the kernel that is charged to nobody), the agent has
// oom_score_adj -1000 and PID 1 is never chosen. A command must not inherit
// that: it could not be killed for its own group's limit. The value is taken
// from the parent when it forks, and with it the floor below which an
// unprivileged process cannot go; setting it after the fork would leave a moment
// in which the child forks on. So the agent lowers its guard for each start
// (see unguarded), for the millisecond that takes.
type jobs struct {
	dir   string
	pids  int // descriptor of pids.max
	score int // descriptor of the agent's own oom_score_adj

	mu    sync.Mutex // guards what follows
	next  int
	left  []string // groups of ended commands that had processes left
	spare *group   // for the next command, nil if there is none

	starting sync.Mutex // held while the agent is unguarded
}

// newJobs makes the group. root is where cgroup2 is mounted.
func newJobs(root string) (*jobs, error) {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	limit, err := commandMemory(string(info))
	if err != nil {
		return nil, err
	}
	j := &jobs{dir: root + "/job"}
	if err := os.Mkdir(j.dir, 0o755); err != nil {
		return nil, err
	}
	for _, c := range [][2]string{
		{"memory.max", strconv.FormatInt(limit, 10)},
		{"cgroup.subtree_control", "+memory"},
	} {
		if err := writeControl(j.dir+"/"+c[0], c[1]); err != nil {
			return nil, err
		}
	}
	if j.pids, err = unix.Open(j.dir+"/pids.max", unix.O_WRONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open pids.max: %w", err)
	}
	if j.score, err = unix.Open("/proc/self/oom_score_adj", unix.O_WRONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open oom_score_adj: %w", err)
	}
	return j, j.setScore(guardedScore)
}

func (j *jobs) setScore(value string) error {
	_, err := unix.Write(j.score, []byte(value))
	return os.NewSyscallError("write oom_score_adj", err)
}

// commandMemory is what commands may have of a machine whose /proc/meminfo is
// this, before any of them runs: what is available, without a reserve for the
// growth of the kernel and the agent.
//
// Not a share of MemTotal: of 256 MiB, 219 are MemTotal and 178 available, and a
// limit between the two is never reached, because the machine as a whole runs
// out first.
func commandMemory(meminfo string) (int64, error) {
	total, err := memField(meminfo, "MemTotal:")
	if err != nil {
		return 0, err
	}
	available, err := memField(meminfo, "MemAvailable:")
	if err != nil {
		return 0, err
	}
	limit := available - max(minReserve, total/20)
	if limit < minReserve {
		return 0, fmt.Errorf("%d MiB of memory are too little", total>>20)
	}
	return limit, nil
}

// minReserve is for machines of which a twentieth is too little.
const minReserve = 16 << 20

func memField(meminfo, key string) (int64, error) {
	for line := range strings.SplitSeq(meminfo, "\n") {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == key {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/meminfo has no %s", key)
}

const (
	guardedScore = "-1000"
	commandScore = "0"
)

// unguarded runs start with the agent as killable as a command is to be born.
func (j *jobs) unguarded(start func() error) error {
	j.starting.Lock()
	defer j.starting.Unlock()
	if err := j.setScore(commandScore); err != nil {
		return err
	}
	err := start()
	return errors.Join(err, j.setScore(guardedScore))
}

// limitPids limits the processes and threads of all commands. 0 means no limit.
func (j *jobs) limitPids(n int) error {
	value := "max"
	if n > 0 {
		value = strconv.Itoa(n)
	}
	_, err := unix.Write(j.pids, []byte(value))
	return err
}

// group is the cgroup of one command.
type group struct {
	jobs *jobs
	dir  string
	fd   int // of dir, for a process to be born in it

	oom bool // a process of it was killed for memory, which it goes on counting
}

// prepare makes a group ahead, for the next command.
func (j *jobs) prepare() error {
	g, err := j.add()
	if err != nil {
		return err
	}
	j.keep(g)
	return nil
}

// add makes a group, and removes those of old commands that are empty by now.
func (j *jobs) add() (*group, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if g := j.spare; g != nil {
		j.spare = nil
		return g, nil
	}
	left := j.left[:0]
	for _, dir := range j.left {
		if unix.Rmdir(dir) != nil {
			left = append(left, dir)
		}
	}
	j.left = left
	j.next++
	dir := j.dir + "/" + strconv.Itoa(j.next)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	if err := writeControl(dir+"/memory.oom.group", "1"); err != nil {
		unix.Rmdir(dir)
		return nil, err
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Rmdir(dir)
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	return &group{jobs: j, dir: dir, fd: fd}, nil
}

// release keeps the group for the next command, if it is as good as new, or
// removes it; making one takes as long as starting a program. If processes are
// left in it, a later add removes it.
func (g *group) release() {
	if populated, ok := g.event("cgroup.events", "populated"); ok && populated == "0" && !g.oom && g.jobs.keep(g) {
		return
	}
	unix.Close(g.fd)
	if unix.Rmdir(g.dir) == nil {
		return
	}
	g.jobs.mu.Lock()
	defer g.jobs.mu.Unlock()
	g.jobs.left = append(g.jobs.left, g.dir)
}

// keep makes g the spare group, if there is none.
func (j *jobs) keep(g *group) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.spare != nil {
		return false
	}
	j.spare = g
	return true
}

// kill ends every process of the group. None can fork its way out.
func (g *group) kill() error { return writeControl(g.dir+"/cgroup.kill", "1") }

// outOfMemory reports whether a process of the group was killed for memory.
func (g *group) outOfMemory() bool {
	n, ok := g.event("memory.events", "oom_kill")
	g.oom = ok && n != "0"
	return g.oom
}

// waitEmpty waits until the group has no living process.
func (g *group) waitEmpty(timeout time.Duration) {
	f, err := os.Open(g.dir + "/cgroup.events")
	if err != nil {
		return
	}
	defer f.Close()
	deadline := time.Now().Add(timeout)
	for {
		var b [256]byte
		// Reading is what arms the next event, so it comes before the wait.
		n, err := unix.Pread(int(f.Fd()), b[:], 0)
		if v, ok := field(string(b[:max(n, 0)]), "populated"); err != nil || ok && v == "0" {
			return
		}
		left := time.Until(deadline)
		if left <= 0 {
			return
		}
		unix.Poll([]unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}, int(left/time.Millisecond)+1)
	}
}

func (g *group) event(file, key string) (string, bool) {
	b, err := os.ReadFile(g.dir + "/" + file)
	if err != nil {
		return "", false
	}
	return field(string(b), key)
}

// field finds the value of a line "key value".
func field(text, key string) (string, bool) {
	for line := range strings.SplitSeq(text, "\n") {
		if k, v, ok := strings.Cut(line, " "); ok && k == key {
			return v, true
		}
	}
	return "", false
}
