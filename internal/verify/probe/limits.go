package probe

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var limitAttacks = map[string]attack{
	"limit.processes": limitProcesses,
	"limit.files":     limitFiles,
	"limit.filesize":  limitFileSize,
	"limit.core":      limitCore,
	"limit.memory":    limitMemory,
	"limit.cpu":       limitCPU,
	"limit.processor": limitProcessors,
}

func number(args []string, i int) (int64, error) {
	if i >= len(args) {
		return 0, fmt.Errorf("a number is missing")
	}
	return strconv.ParseInt(args[i], 10, 64)
}

// limitProcesses N: forks until it may not, or N times, which works.
func limitProcesses(args []string) (Outcome, string) {
	n, err := number(args, 0)
	if err != nil {
		return Unknown, err.Error()
	}
	pids, end, err := forkMany(int(n))
	end() // they could not be killed where signals are refused
	for _, pid := range pids {
		_, _ = unix.Wait4(pid, nil, 0, nil)
	}
	return tried(fmt.Sprintf("%d processes", len(pids)), err)
}

// forkMany makes processes that do nothing until end is called. They are forks of
// this one that never return to Go: one of them costs a few pages, so what gives out
// first is the number.
func forkMany(n int) (pids []int, end func(), err error) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], 0); err != nil {
		return nil, func() {}, err
	}
	end = func() {
		unix.Close(pipe[1])
		unix.Close(pipe[0])
	}
	var b [1]byte
	for range n {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			return pids, end, errno
		}
		if pid == 0 { // until nobody has the writing end any more
			unix.RawSyscall(unix.SYS_CLOSE, uintptr(pipe[1]), 0, 0)
			unix.RawSyscall(unix.SYS_READ, uintptr(pipe[0]), uintptr(unsafe.Pointer(&b[0])), 1)
			for {
				unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
			}
		}
		pids = append(pids, int(pid))
	}
	return pids, end, nil
}

// limitFiles N: opens files until it may not, or N of them, which works.
func limitFiles(args []string) (Outcome, string) {
	n, err := number(args, 0)
	if err != nil {
		return Unknown, err.Error()
	}
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for range n {
		fd, err := unix.Dup(1)
		if err != nil {
			return tried(fmt.Sprintf("%d descriptors", len(fds)), err)
		}
		fds = append(fds, fd)
	}
	return Worked, fmt.Sprintf("%d descriptors", len(fds))
}

// limitFileSize BYTES DIR...: writes a file of that size.
func limitFileSize(args []string) (Outcome, string) {
	n, err := number(args, 0)
	if err != nil {
		return Unknown, err.Error()
	}
	return several(args[1:], func(dir string) error {
		f, err := os.OpenFile(filepath.Join(dir, ".probe-size"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		defer os.Remove(f.Name())
		defer f.Close()
		for b, left := make([]byte, 1<<20), n; left > 0; left -= int64(len(b)) {
			if _, err := f.Write(b[:min(left, int64(len(b)))]); err != nil {
				return err
			}
		}
		return nil
	})
}

// limitCore: asks whether a crash would write a core file.
func limitCore([]string) (Outcome, string) {
	var l unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_CORE, nil, &l); err != nil {
		return Unknown, err.Error()
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if l.Max > 0 && (err != nil || dumpable != 0) {
		return Worked, fmt.Sprintf("cores of %d bytes are allowed", l.Max)
	}
	return Refused, "no core is written"
}

// limitMemory BYTES: uses that much memory. Where it is killed for it there is no
// result.
func limitMemory(args []string) (Outcome, string) {
	n, err := number(args, 0)
	if err != nil {
		return Unknown, err.Error()
	}
	const step = 4 << 20
	for done := int64(0); done < n; done += step {
		b, err := unix.Mmap(-1, 0, step, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return tried(fmt.Sprintf("%d MiB", done>>20), err)
		}
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
	}
	return Worked, fmt.Sprintf("%d MiB", n>>20)
}

// limitCPU MILLISECONDS PERCENT: burns all processors for so long; it works if it
// got more than that share of one.
func limitCPU(args []string) (Outcome, string) {
	ms, err := number(args, 0)
	if err != nil {
		return Unknown, err.Error()
	}
	most, err := number(args, 1)
	if err != nil {
		return Unknown, err.Error()
	}
	var before, after unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &before)
	begun := time.Now()
	burn(time.Duration(ms) * time.Millisecond)
	wall := time.Since(begun)
	_ = unix.Getrusage(unix.RUSAGE_SELF, &after)
	used := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	share := int64(used * 100 / wall)
	if share > most {
		return Worked, fmt.Sprintf("%d %% of a processor", share)
	}
	return Refused, fmt.Sprintf("%d %% of a processor", share)
}

// limitProcessors N: asks to run on all processors; it works if it may on more than N.
func limitProcessors(args []string) (Outcome, string) {
	most, err := number(args, 0)
	if err != nil {
		return Unknown, err.Error()
	}
	var all unix.CPUSet
	for i := range len(all) * 64 {
		all.Set(i)
	}
	asked := unix.SchedSetaffinity(0, &all)
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return Unknown, err.Error()
	}
	if n := may.Count(); int64(n) > most {
		return Worked, fmt.Sprintf("%d processors", n)
	}
	return Refused, fmt.Sprintf("%d processors, sched_setaffinity: %s", may.Count(), errnoName(asked))
}
