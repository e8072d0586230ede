package jail

import (
	"fmt"
	"math/rand/v2"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/layer"
)

// plan is what the stage is told to become.
func (j *Jail) plan(p *Program) plan {
	plan := plan{
		Path: p.Path, Args: p.Args, Files: p.Files,
		Mounts:   j.on(layer.Mounts),
		CgroupNS: j.on(layer.Namespaces),
		UTS:      j.on(layer.Namespaces),
		NoNew:    j.on(layer.NoNewPrivs),
		Landlock: j.on(layer.Landlock),
		Require:  j.opts.Require.Has(layer.Landlock),
		DropCaps: j.on(layer.Capabilities),
		Seccomp:  j.on(layer.Seccomp),
	}
	if j.uid != nil {
		plan.UID = j.uid.number
	}
	if j.on(layer.Rlimits) {
		plan.Limits = j.limits(p)
	}
	if j.on(layer.Cgroup) && j.cgroup == nil {
		plan.Limits = append(plan.Limits, j.memoryLimit())
		plan.Affinity = j.affinity()
	}
	return plan
}

// Bounds are what a jail bounds.
type Bounds struct {
	Memory     int64 // bytes, by the cgroup
	CPUPercent int   // of one processor, by the cgroup
	Threads    int
	Files      int   // descriptors
	Data       int64 // bytes of memory, where there is no cgroup
	Processors int   // to run on, where there is no cgroup
}

// BoundsOf tells what jails with these options bound.
func BoundsOf(opts Options) Bounds {
	j := &Jail{opts: opts}
	j.opts.CPUs = max(j.opts.CPUs, 1)
	return Bounds{
		Memory: j.opts.Memory, CPUPercent: j.cpuPercent(), Threads: j.threads(), Files: maxDescriptors,
		Data: j.data(), Processors: j.affinity(),
	}
}

const maxDescriptors = 256 // open at once; QEMU has some 30

// limits are the resource limits. In a user namespace threads are counted there only
// (Linux 5.14), and as a user of its own the program is the only one to count.
func (j *Jail) limits(p *Program) []limit {
	return []limit{
		{unix.RLIMIT_CORE, 0},
		{unix.RLIMIT_NOFILE, maxDescriptors},
		{unix.RLIMIT_FSIZE, uint64(p.FileSize)},
		{unix.RLIMIT_NPROC, uint64(j.threads())},
		{unix.RLIMIT_MEMLOCK, 0},
		{unix.RLIMIT_MSGQUEUE, 0},
		{unix.RLIMIT_STACK, stack},
	}
}

// stack is what a thread's stack may take, and, as C libraries have it, what is mapped for
// each: bytes.
const stack = 2 << 20

// dataSlack is memory that is mapped to be written to, and not used: stacks, allocators.
const dataSlack = 256 << 20

// data is the bound on memory where there is no cgroup: on what is mapped to be written to
// (RLIMIT_DATA, since Linux 4.7 all of it but shared files).
func (j *Jail) data() int64 { return j.opts.Memory + dataSlack }

func (j *Jail) memoryLimit() limit { return limit{unix.RLIMIT_DATA, uint64(j.data())} }

// affinity is the number of processors to which the program is bound where there is no
// cgroup.
func (j *Jail) affinity() int { return j.opts.CPUs }

// limit sets the resource limits and the processors that may be used.
func (s *stage) limit() error {
	for _, l := range s.p.Limits {
		value := unix.Rlimit{Cur: l.Value, Max: l.Value}
		if err := unix.Prlimit(0, l.Resource, &value, nil); err != nil {
			return fmt.Errorf("limit %s: %w", limitNames[l.Resource], err)
		}
	}
	if s.p.Affinity == 0 {
		return nil
	}
	return useProcessors(s.p.Affinity)
}

// useProcessors binds this thread to n of the processors that it may use, any of them. The
// filter of system calls keeps the program from undoing that.
func useProcessors(n int) error {
	var may, chosen unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return fmt.Errorf("read which processors may be used: %w", err)
	}
	for _, cpu := range rand.Perm(len(may) * 64) {
		if may.IsSet(cpu) && chosen.Count() < n {
			chosen.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &chosen); err != nil {
		return fmt.Errorf("bind to %d processors: %w", n, err)
	}
	return nil
}
