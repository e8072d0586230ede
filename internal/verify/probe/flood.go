package probe

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

var floodAttacks = map[string]attack{
	"flood.disk":      floodDisk,
	"flood.memory":    limitMemory,
	"flood.processes": floodProcesses,
	"flood.cpu":       floodCPU,
	"flood.console":   floodConsole,
	"flood.link":      floodLink,
	"flood.undying":   undying,
	"hold":            hold,
}

// duration is the first argument, in milliseconds.
func duration(args []string) time.Duration {
	ms, _ := number(args, 0)
	return time.Duration(ms) * time.Millisecond
}

// floodDisk MILLISECONDS BYTES DIR: writes and rewrites a file until the time has
// come, and at most that much at once, which works.
func floodDisk(args []string) (Outcome, string) {
	most, err := number(args, 1)
	if err != nil || len(args) != 3 {
		return Unknown, "bad arguments"
	}
	f, err := os.CreateTemp(args[2], "fill")
	if err != nil {
		return Unknown, err.Error()
	}
	defer os.Remove(f.Name())
	defer f.Close()
	b := make([]byte, 256<<10)
	b[0] = 1
	var size int64
	full := errors.New("no end was reached")
	for end := time.Now().Add(duration(args)); time.Now().Before(end) || size == 0; {
		n, err := f.Write(b)
		size += int64(n)
		if err != nil {
			full = err
			// At the limit: go on there, where it hurts most.
			_ = f.Truncate(0)
			_, _ = f.Seek(0, 0)
			size = 0
			continue
		}
		if size > most {
			return Worked, fmt.Sprintf("wrote %d MiB", size>>20)
		}
	}
	return Refused, "stopped by " + errnoName(full)
}

// floodProcesses MILLISECONDS N: forks until it may not, and again and again.
func floodProcesses(args []string) (Outcome, string) {
	most, err := number(args, 1)
	if err != nil {
		return Unknown, err.Error()
	}
	var alive []int
	why := errors.New("no end was reached")
	for end := time.Now().Add(duration(args)); time.Now().Before(end); {
		pids, end, err := forkMany(int(most) - len(alive))
		defer end()
		alive = append(alive, pids...)
		if err == nil {
			break
		}
		why = err
	}
	n := len(alive)
	for _, pid := range alive {
		_ = unix.Kill(pid, unix.SIGKILL)
		_, _ = unix.Wait4(pid, nil, 0, nil)
	}
	if n >= int(most) {
		return Worked, fmt.Sprintf("%d processes", n)
	}
	return Refused, fmt.Sprintf("stopped at %d processes by %s", n, errnoName(why))
}

// burn keeps all processors busy.
func burn(d time.Duration) {
	end := time.Now().Add(d)
	var wg sync.WaitGroup
	for range runtime.NumCPU() * 2 {
		wg.Go(func() {
			for time.Now().Before(end) {
				for range 10000 {
					_ = 0
				}
			}
		})
	}
	wg.Wait()
}

// floodCPU MILLISECONDS: keeps all processors busy.
func floodCPU(args []string) (Outcome, string) {
	burn(duration(args))
	return Refused, fmt.Sprintf("%d processors were busy", runtime.NumCPU())
}

// floodConsole MILLISECONDS: writes to whatever ends on the host's side.
func floodConsole(args []string) (Outcome, string) {
	var open []*os.File
	names := ""
	for _, name := range []string{"/dev/console", "/dev/ttyS0", "/dev/kmsg", "/dev/hvc0"} {
		if f, err := os.OpenFile(name, os.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0); err == nil {
			defer f.Close()
			open, names = append(open, f), names+" "+name
		}
	}
	if len(open) == 0 {
		return Refused, "no console can be opened"
	}
	line := make([]byte, 900)
	for i := range line {
		line[i] = "\x1b]0;x\x07AB"[i%8]
	}
	line[len(line)-1] = '\n'
	written := 0
	for end := time.Now().Add(duration(args)); time.Now().Before(end); {
		for _, f := range open {
			_ = f.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
			n, _ := f.Write(line)
			written += n
		}
	}
	return Refused, fmt.Sprintf("wrote %d KiB to%s", written>>10, names)
}

// floodLink MILLISECONDS: writes to standard output and error as fast as it can.
func floodLink(args []string) (Outcome, string) {
	end := time.Now().Add(duration(args))
	b := make([]byte, 64<<10)
	written := 0
	for time.Now().Before(end) {
		for _, f := range []*os.File{os.Stdout, os.Stderr} {
			n, err := f.Write(b)
			if err != nil {
				return Refused, err.Error()
			}
			written += n
		}
	}
	return Refused, fmt.Sprintf("wrote %d MiB", written>>20)
}

// undying: ignores every signal, multiplies and never ends.
func undying([]string) (Outcome, string) {
	signal.Ignore()
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	_, _ = unix.Setsid()
	_ = unix.Mlockall(unix.MCL_CURRENT)
	pids, _, _ := forkMany(64) // they end with it
	if _, err := fmt.Fprintf(os.Stdout, "up %d\n", len(pids)); err != nil {
		return Unknown, err.Error()
	}
	_ = os.WriteFile(filepath.Join(os.TempDir(), "undying"), []byte("here"), 0o600)
	burn(1000 * time.Hour)
	return Worked, "it ended"
}

// hold MILLISECONDS: only exists.
func hold(args []string) (Outcome, string) {
	time.Sleep(duration(args))
	return Refused, "held"
}
