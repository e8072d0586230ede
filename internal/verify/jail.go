package verify

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
	"github.com/ironclaw-run/ironclaw/internal/verify/testnet"
)

// Cell is a jail as the VMM has it, with this program in the VMM's place.
type Cell interface {
	// Run starts the program with these arguments in the jail and returns what it
	// wrote to its standard output. An *exec.ExitError tells how it ended. Each
	// call makes a jail of its own.
	Run(ctx context.Context, args ...string) (stdout []byte, err error)
	// Facts are what the jail was made with, for attacks to look beyond.
	Facts() CellFacts
	// Report is how the layers of the jail stand, read from the kernel.
	Report() layer.Report
	// Close removes what the cell has on the host.
	Close() error
}

// CellFacts say what is in a jail.
type CellFacts struct {
	Root   []string // names in its root directory
	Image  string   // path in the jail of a file that stands for the image: read-only
	Exe    string   // path in the jail of this program, if a path leads to it
	Memory int64    // its bound, bytes
	CPU    int64    // its bound, percent of one processor; 0 means none
	Pids   int64    // its bound
	Files  int64    // its bound on descriptors
}

// hostPaths are what is in every jailer's way: who reads one of them is out.
var hostPaths = []string{
	"/etc/passwd", "/etc/shadow", "/etc/hostname", "/root", "/home", "/var", "/usr", "/boot", "/sys/kernel", "/sys/class",
	"/proc/1/status", "/proc/kcore", "/proc/sys/kernel", "/proc/self/root/etc", "/dev/mem", "/dev/vda", "/dev/sda",
	"/run/docker.sock", "/var/run/docker.sock", "/run/containerd", "/run/systemd", "../../../../../../etc/passwd",
}

// jailCase is one attack from the VMM's place. args make the probe's arguments.
type jailCase struct {
	layer                  layer.Name
	name, attack, expected string
	args                   func(e *env) []string
}

func words(w ...string) func(*env) []string { return func(*env) []string { return w } }

func jailCases() []jailCase {
	supervisor := func(*env) []string { return []string{strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getppid()), "1"} }
	image := func(e *env) []string { return []string{e.cell.Facts().Image} }
	plus := func(get func(CellFacts) int64, more int64) func(*env) []string {
		return func(e *env) []string { return []string{strconv.FormatInt(get(e.cell.Facts())+more, 10)} }
	}
	return []jailCase{
		{layer.Mounts, "open files of the host", "file.read", "none is there", func(e *env) []string {
			return append(hostPaths, e.host.Home, e.dir, filepath.Join(e.host.Home, "run"))
		}},
		{layer.Mounts, "find more in the root than was put there", "file.list", "only the files of the jail", func(e *env) []string {
			return append([]string{"/"}, e.cell.Facts().Root...)
		}},
		{layer.Mounts, "create files", "file.create", "refused", words("/", "/dev", "/proc", "/tmp", "/run", "/usr", "/etc", "/lib")},
		{layer.Mounts, "change the image", "file.change", "refused", image},
		{layer.Landlock, "create files where the mounts are writable", "file.create", "refused", words("/", "/tmp", "/dev", "/dev/shm")},
		{layer.Processes, "see another process", "process.see", "none", words("65536")},
		{layer.Processes, "signal all processes", "process.all", "refused", nil},
		{layer.Processes, "trace the supervisor", "process.trace", "refused", supervisor},
		{layer.Processes, "read the supervisor's memory", "process.read", "refused", supervisor},
		{layer.Processes, "open the supervisor", "process.pidfd", "refused", supervisor},
		{layer.Processes, "enter the supervisor's namespaces", "process.enter", "refused", supervisor},
		{layer.Network, "connect to a LAN", "net.tcp", "refused", words(testnet.LAN[0] + ":" + testnet.Port)},
		{layer.Network, "connect to the host's loopback", "net.tcp", "refused", words(testnet.Loopback[0] + ":" + testnet.Port)},
		{layer.Network, "connect to the metadata address", "net.tcp", "refused", words(testnet.Metadata[0] + ":" + testnet.HTTPPort)},
		{layer.Network, "connect to an abstract Unix socket of the host", "net.unix", "refused", words("@" + abstractName())},
		{layer.Mounts, "connect to a Unix socket of the host", "net.unix", "refused", func(e *env) []string {
			return []string{filepath.Join(e.dir, "socket"), "/run/docker.sock", "/run/dbus/system_bus_socket"}
		}},
		{layer.Seccomp, "open sockets", "net.socket", "refused", words("inet", "inet udp", "inet raw", "inet6", "netlink", "packet", "vsock", "alg", "bluetooth", "can", "tipc", "xdp", "key", "rds")},
		{layer.Capabilities, "have or get capabilities", "privilege.held", "none", nil},
		{layer.Capabilities, "take a capability", "privilege.capset", "refused", nil},
		{layer.User, "become another user", "privilege.setuid", "refused", nil},
		{layer.NoNewPrivs, "go without no_new_privs", "privilege.nnp", "refused", nil},
		{layer.Seccomp, "run without a filter of system calls", "privilege.seccomp", "one is on", nil},
		{layer.Seccomp, "make namespaces", "privilege.unshare", "refused", words("user", "mnt", "net", "pid", "ipc", "uts", "cgroup")},
		{layer.Capabilities, "mount a file system", "privilege.mount", "refused", nil},
		{layer.Capabilities, "make the root writable", "privilege.remount", "refused", nil},
		{layer.Capabilities, "change the root", "privilege.chroot", "refused", nil},
		{layer.Capabilities, "pivot the root", "privilege.pivot", "refused", nil},
		{layer.Capabilities, "make device nodes", "privilege.mknod", "refused", nil},
		{layer.Capabilities, "load a kernel module", "privilege.module", "refused", nil},
		{layer.Capabilities, "boot another kernel (kexec)", "privilege.kexec", "refused", nil},
		{layer.Capabilities, "restart the host", "privilege.reboot", "refused", nil},
		{layer.Capabilities, "set the clock", "privilege.clock", "refused", nil},
		{layer.Capabilities, "set the host name", "privilege.hostname", "refused", nil},
		{layer.Capabilities, "turn swap off", "privilege.swap", "refused", nil},
		{layer.Capabilities, "open files by handle", "privilege.handle", "refused", nil},
		{layer.Seccomp, "load BPF", "privilege.bpf", "refused", nil},
		{layer.Seccomp, "use perf events", "privilege.perf", "refused", nil},
		{layer.Seccomp, "use the kernel's keyrings", "privilege.keys", "refused", nil},
		{layer.Seccomp, "set up io_uring", "privilege.uring", "refused", nil},
		{layer.Seccomp, "use userfaultfd", "privilege.userfault", "refused", nil},
		{layer.Seccomp, "ask to be traced", "process.traceme", "refused", nil},
		{layer.Seccomp, "change the personality", "privilege.personality", "refused", nil},
		{layer.Seccomp, "start a program", "privilege.exec", "refused", func(e *env) []string { return []string{"/proc/self/exe", e.cell.Facts().Exe} }},
		{layer.Rlimits, "raise limits", "privilege.rlimits", "refused", nil},
		{layer.Rlimits, "open descriptors without end", "limit.files", "stopped", plus(func(f CellFacts) int64 { return f.Files }, 1)},
		{layer.Rlimits, "write a core file", "limit.core", "none", nil},
		{layer.Rlimits, "write a large file", "limit.filesize", "stopped", words(strconv.Itoa(64<<20), "/", "/tmp", "/dev/shm")},
		{layer.Cgroup, "multiply processes without end", "limit.processes", "stopped", plus(func(f CellFacts) int64 { return f.Pids }, 1)},
		{layer.Cgroup, "use memory without end", "limit.memory", "killed", plus(func(f CellFacts) int64 { return f.Memory }, 64<<20)},
		{layer.Cgroup, "use all processors", "limit.cpu", "its share", func(e *env) []string {
			return []string{"1500", strconv.FormatInt(e.cell.Facts().CPU*5/4, 10)} // a quarter for the bound's period
		}},
	}
}

// abstractName is an abstract Unix socket that this process listens on.
func abstractName() string { return "ironclaw-verify-" + strconv.Itoa(os.Getpid()) }

func jailAttacks() []Attack {
	var all []Attack
	for _, c := range jailCases() {
		if c.args == nil {
			c.args = words()
		}
		all = append(all, Attack{
			Group: Jail, Layer: string(c.layer), Name: c.name, Expected: c.expected,
			run: func(ctx context.Context, e *env) (Finding, error) {
				if err := e.openCell(ctx); err != nil {
					return Finding{}, err
				}
				return inCell(ctx, e.cell, probe.Request{Attack: c.attack, Args: c.args(e)})
			},
			control: func(ctx context.Context, e *env) (Finding, error) { return e.withoutLayer(ctx, c) },
		})
	}
	return all
}

var errNoCell = errors.New("this program has no jails")

// openCell makes the cell that all attacks of the group share.
func (e *env) openCell(ctx context.Context) error {
	if e.cell != nil {
		return nil
	}
	if e.opts.Cell == nil {
		return errNoCell
	}
	cell, err := e.opts.Cell(ctx, nil)
	if err != nil {
		return err
	}
	e.cell, e.layers = cell, cell.Report()
	return nil
}

// withoutLayer makes an attack in a jail that has all layers but the one that stops
// it. What another layer stops too does not work then, either, and that is said:
// two layers hold what each would.
func (e *env) withoutLayer(ctx context.Context, c jailCase) (Finding, error) {
	cell, err := e.opts.Cell(ctx, layer.Set{c.layer: true})
	if err != nil {
		return Finding{}, err
	}
	defer cell.Close()
	return inCell(ctx, cell, probe.Request{Attack: c.attack, Args: c.args(e)})
}

// inCell makes an attack in a jail. To be killed for it is one way to be refused.
func inCell(ctx context.Context, cell Cell, r probe.Request) (Finding, error) {
	out, err := cell.Run(ctx, probe.Name, probe.Line(r))
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		ws, ok := exit.Sys().(syscall.WaitStatus)
		if ok && ws.Signaled() && len(out) == 0 {
			return Finding{fmt.Sprintf("killed: %v", ws.Signal()), false}, nil
		}
		return Finding{}, fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	if err != nil {
		return Finding{}, err
	}
	res, err := oneResult(out)
	return Finding{res.Detail, res.Outcome == probe.Worked}, err
}
