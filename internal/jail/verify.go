package jail

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/layer"
)

// Verify reads back from the kernel how every layer stands that was not gone
// without, of every thread. A layer that is not seen to be on is an error. filters is the
// number of system call filters that each thread must have at least.
func (p *Process) Verify(filters int) (layer.Report, error) {
	v := &verifier{p: p, pid: p.PID(), filters: filters}
	var err error
	if v.threads, err = readThreads(v.pid); err != nil {
		return nil, fmt.Errorf("verify the jail: %w", err)
	}
	report := slices.Clone(p.jail.report)
	for _, c := range v.checks() {
		if !p.jail.on(c.layer) {
			report = append(report, layer.Status{Layer: c.layer, State: layer.Off})
			continue
		}
		detail, err := c.look()
		if err != nil {
			return nil, &layer.Error{Layer: c.layer, Err: fmt.Errorf("verify it: %w", err)}
		}
		if detail != "" {
			report = append(report, layer.Status{Layer: c.layer, State: layer.On, Detail: detail})
		}
	}
	for _, n := range []layer.Name{layer.Firewall, layer.Guard, layer.Landlock} {
		if !p.jail.on(n) {
			report = append(report, layer.Status{Layer: n, State: layer.Off})
		}
	}
	report.Sort()
	return report, nil
}

// verifier looks at one process.
type verifier struct {
	p       *Process
	pid     int
	filters int
	threads []thread
}

// thread is the /proc/<pid>/task/<tid>/status of one thread.
type thread map[string]string

type check struct {
	layer layer.Name
	look  func() (detail string, err error) // "" if there is nothing to say
}

func (v *verifier) checks() []check {
	return []check{
		{layer.User, v.user},
		{layer.Mounts, v.mounts},
		{layer.Network, v.network},
		{layer.Processes, func() (string, error) { return v.namespaces("pid") }},
		{layer.Namespaces, func() (string, error) { return v.namespaces("ipc", "uts", "cgroup") }},
		{layer.Capabilities, v.capabilities},
		{layer.NoNewPrivs, func() (string, error) { return v.all(map[string]string{"NoNewPrivs": "1"}) }},
		{layer.Seccomp, v.seccomp},
		{layer.Rlimits, v.rlimits},
		{layer.Cgroup, v.cgroup},
	}
}

// readThreads reads the status of every thread of a process.
func readThreads(pid int) ([]thread, error) {
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return nil, err
	}
	var threads []thread
	for _, path := range paths {
		t, err := readStatus(path)
		if os.IsNotExist(err) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return nil, err
		}
		threads = append(threads, t)
	}
	if len(threads) == 0 {
		return nil, fmt.Errorf("process %d has no threads to look at", pid)
	}
	return threads, nil
}

func readStatus(path string) (thread, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t := thread{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if k, v, ok := strings.Cut(lines.Text(), ":"); ok {
			t[k] = strings.Join(strings.Fields(v), " ")
		}
	}
	return t, lines.Err()
}

// all checks fields of every thread's status.
func (v *verifier) all(want map[string]string) (string, error) {
	for _, t := range v.threads {
		for k, value := range want {
			if t[k] != value {
				return "", fmt.Errorf("thread %q has %s %s, not %s", t["Name"], k, t[k], value)
			}
		}
	}
	return fmt.Sprintf("all %d threads", len(v.threads)), nil
}

func (v *verifier) user() (string, error) {
	if u := v.p.jail.uid; u != nil {
		four := strings.TrimSpace(strings.Repeat(strconv.Itoa(u.number)+" ", 4))
		if _, err := v.all(map[string]string{"Uid": four, "Gid": four, "Groups": ""}); err != nil {
			return "", err
		}
		return fmt.Sprintf("user and group %d, no other groups", u.number), nil
	}
	if _, err := v.namespaces("user"); err != nil {
		return "", err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/uid_map", v.pid))
	if err != nil {
		return "", err
	}
	f := strings.Fields(string(b))
	if len(f) != 3 || f[2] != "1" {
		return "", fmt.Errorf("its user namespace maps more than one user: %q", strings.TrimSpace(string(b)))
	}
	return "a user namespace that holds one user", nil
}

// namespaces checks that the process is in others than this one.
func (v *verifier) namespaces(kinds ...string) (string, error) {
	for _, kind := range kinds {
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", v.pid, kind))
		if err != nil {
			return "", err
		}
		ours, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			return "", err
		}
		if theirs == ours {
			return "", fmt.Errorf("it is in our %s namespace", kind)
		}
	}
	return "own " + strings.Join(kinds, ", "), nil
}

// mounts checks that nothing is mounted but what was asked for, all of it read-only.
func (v *verifier) mounts() (string, error) {
	if _, err := v.namespaces("mnt"); err != nil {
		return "", err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", v.pid))
	if err != nil {
		return "", err
	}
	devices := map[string]bool{}
	want := []string{"/"}
	for _, f := range v.p.program.Files {
		want = append(want, filepath.Clean(f.Inside))
		devices[filepath.Clean(f.Inside)] = f.Device
	}
	var have []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 6 {
			return "", fmt.Errorf("a mount that cannot be read: %q", line)
		}
		have = append(have, unescapeMount(f[4]))
		options := strings.Split(f[5], ",")
		for _, o := range []string{"ro", "nosuid", "nodev"} {
			if !slices.Contains(options, o) && !(o == "nodev" && devices[f[4]]) {
				return "", fmt.Errorf("%s is mounted %s, without %s", f[4], f[5], o)
			}
		}
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		return "", fmt.Errorf("mounted are %q, not %q", have, want)
	}
	return fmt.Sprintf("%d files, read-only", len(want)-1), nil
}

// unescapeMount undoes what /proc does to blanks and backslashes (proc(5)).
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// network checks that there is no device but an idle loopback. Not by /sys, which may show
// another namespace's.
func (v *verifier) network() (string, error) {
	if _, err := v.namespaces("net"); err != nil {
		return "", err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", v.pid))
	if err != nil {
		return "", err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(lines) != 3 || !strings.HasPrefix(strings.TrimSpace(lines[2]), "lo:") {
		return "", fmt.Errorf("it has %d network devices", len(lines)-2)
	}
	for _, n := range strings.Fields(lines[2])[1:] {
		if n != "0" {
			return "", errors.New("packets have passed its loopback")
		}
	}
	return "no device but an unused loopback", nil
}

func (v *verifier) capabilities() (string, error) {
	const none = "0000000000000000"
	return v.all(map[string]string{"CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none})
}

// seccomp checks that every thread has its filters: our own and those that the
// program was told to set.
func (v *verifier) seccomp() (string, error) {
	fewest := 0
	for i, t := range v.threads {
		if t["Seccomp"] != "2" {
			return "", fmt.Errorf("thread %q runs without a filter (Seccomp %s)", t["Name"], t["Seccomp"])
		}
		n, err := strconv.Atoi(t["Seccomp_filters"])
		if err != nil {
			return "", fmt.Errorf("thread %q: %q filters", t["Name"], t["Seccomp_filters"])
		}
		if i == 0 || n < fewest {
			fewest = n
		}
	}
	if fewest < v.filters {
		return "", fmt.Errorf("a thread has %d filters, not %d", fewest, v.filters)
	}
	return fmt.Sprintf("%d filters on each of %d threads", fewest, len(v.threads)), nil
}

// rlimits compares /proc/<pid>/limits with what was set. prlimit(2) would ask for
// capabilities.
func (v *verifier) rlimits() (string, error) { return v.limits(v.p.jail.limits(v.p.program)) }

func (v *verifier) limits(limits []limit) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", v.pid))
	if err != nil {
		return "", err
	}
	var words []string
	for _, l := range limits {
		name, want := limitNames[l.Resource], strconv.FormatUint(l.Value, 10)
		soft, hard, err := findLimit(string(b), name)
		if err != nil {
			return "", err
		}
		if soft != want || hard != want {
			return "", fmt.Errorf("the limit of %s is %s (%s), not %s", name, soft, hard, want)
		}
		words = append(words, name+" "+want)
	}
	return strings.Join(words, ", "), nil
}

// findLimit finds "Max <name>" in /proc/<pid>/limits, whose first column has 25 characters
// (fs/proc/base.c).
func findLimit(text, name string) (soft, hard string, err error) {
	const column = 25
	for line := range strings.Lines(text) {
		if len(line) <= column || strings.TrimSpace(line[:column]) != "Max "+name {
			continue
		}
		if f := strings.Fields(line[column:]); len(f) >= 2 {
			return f[0], f[1], nil
		}
	}
	return "", "", fmt.Errorf("the kernel shows no limit of %s", name)
}

// cgroup checks the bounds, or what holds them in a cgroup's place.
func (v *verifier) cgroup() (string, error) {
	if c := v.p.jail.cgroup; c != nil {
		err := <-v.p.jail.entered
		v.p.jail.entered <- err // for Close
		if err != nil {
			return "", err
		}
		return c.verify(v.pid)
	}
	if _, err := v.limits([]limit{v.p.jail.memoryLimit()}); err != nil {
		return "", err
	}
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(v.pid, &set); err != nil {
		return "", err
	}
	var own unix.CPUSet
	if err := unix.SchedGetaffinity(0, &own); err != nil {
		return "", err
	}
	if n := set.Count(); n > min(v.p.jail.affinity(), own.Count()) {
		return "", fmt.Errorf("it may use %d processors, not %d", n, v.p.jail.affinity())
	}
	return "", nil
}
