package qemu

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// verifySeccomp reads back from the kernel that every thread of a process has a
// system call filter and can gain no privileges. QEMU accepts -sandbox and
// applies it; that it did is not taken on trust: the system this one descends
// from never applied its filter and nobody saw.
func verifySeccomp(pid int) error {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		return fmt.Errorf("verify QEMU's seccomp filter: process %d has no threads to look at", pid)
	}
	for _, path := range tasks {
		status, err := readStatus(path)
		if os.IsNotExist(err) {
			continue // the thread has ended
		}
		if err != nil {
			return fmt.Errorf("verify QEMU's seccomp filter: %w", err)
		}
		if status["Seccomp"] != "2" || status["NoNewPrivs"] != "1" {
			return fmt.Errorf("verify QEMU's seccomp filter: thread %q runs without it (Seccomp %s, NoNewPrivs %s)",
				status["Name"], status["Seccomp"], status["NoNewPrivs"])
		}
	}
	return nil
}

// readStatus parses a /proc/<pid>/status file.
func readStatus(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	status := make(map[string]string)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if k, v, ok := strings.Cut(lines.Text(), ":"); ok {
			status[k] = strings.TrimSpace(v)
		}
	}
	return status, lines.Err()
}
