package verify

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/verify/testnet"
)

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
	also                   []layer.Name // other layers that stop it: the control goes without them, too
	noControl              string       // why it is not made without the layer
	alone                  bool         // the attack, too, is made without also: it shows what this layer does alone
}

// Layers that stop the same: each would be enough.
var (
	nearSockets   = []layer.Name{layer.Seccomp, layer.Network, layer.Firewall}
	nearFiles     = []layer.Name{layer.Mounts, layer.Landlock, layer.User}
	nearProcesses = []layer.Name{layer.Processes, layer.Seccomp, layer.User, layer.Capabilities, layer.Mounts}
	nearRights    = []layer.Name{layer.Capabilities, layer.Seccomp, layer.User, layer.NoNewPrivs}
	nearMounts    = []layer.Name{layer.Capabilities, layer.Seccomp, layer.User, layer.Landlock, layer.Mounts}
)

// tooHarmful is why some attacks are not made without their layer.
const tooHarmful = "it would be made on this host itself"

func words(w ...string) func(*env) []string { return func(*env) []string { return w } }

// jailCases are all attacks from the VMM's place.
func jailCases() []jailCase {
	return slices.Concat(fileCases(), processCases(), socketCases(), privilegeCases(), limitCases(), aloneCases())
}

func fileCases() []jailCase {
	image := func(e *env) []string { return []string{e.cell.Facts().Image} }
	return []jailCase{
		{layer.Mounts, "open files of the host", "file.read", "none is there", func(e *env) []string {
			return append(hostPaths, e.host.Home, e.dir, filepath.Join(e.host.Home, "run"))
		}, nearFiles, "", false},
		{layer.Mounts, "find more in the root than was put there", "file.list", "only the files of the jail", func(e *env) []string {
			return append([]string{"/"}, e.cell.Facts().Root...)
		}, nearFiles, "", false},
		{layer.Mounts, "create files", "file.create", "refused", words("/", "/dev", "/proc", "/tmp", "/run", "/usr", "/etc", "/lib"), nearFiles, "", false},
		{layer.Mounts, "change the image", "file.change", "refused", image, nearFiles, "", false},
		{layer.Landlock, "create files where the mounts are writable", "file.create", "refused", words("/", "/tmp", "/dev", "/dev/shm"), nearFiles, "", false},
	}
}

func processCases() []jailCase {
	supervisor := func(*env) []string { return []string{strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getppid()), "1"} }
	return []jailCase{
		{layer.Processes, "see another process", "process.see", "none", words("65536"), nearProcesses, "", false},
		{layer.Processes, "signal all processes", "process.all", "refused", nil, nearProcesses, "", false},
		{layer.Processes, "trace the supervisor", "process.trace", "refused", supervisor, nearProcesses, "", false},
		{layer.Processes, "read the supervisor's memory", "process.read", "refused", supervisor, nearProcesses, "", false},
		{layer.Processes, "open the supervisor", "process.pidfd", "refused", supervisor, nearProcesses, "", false},
		{layer.Processes, "enter the supervisor's namespaces", "process.enter", "refused", supervisor, nearProcesses, "", false},
	}
}

func socketCases() []jailCase {
	return []jailCase{
		{layer.Network, "connect to a LAN", "net.tcp", "refused", words(testnet.LAN[0] + ":" + testnet.Port), nearSockets, "", false},
		{layer.Network, "connect to the host's loopback", "net.tcp", "refused", words(testnet.Loopback[0] + ":" + testnet.Port), nearSockets, "", false},
		{layer.Network, "connect to the metadata address", "net.tcp", "refused", words(testnet.Metadata[0] + ":" + testnet.HTTPPort), nearSockets, "", false},
		{layer.Network, "connect to an abstract Unix socket of the host", "net.unix", "refused", words("@" + abstractName()), nearSockets, "", false},
		{layer.Mounts, "connect to a Unix socket of the host", "net.unix", "refused", func(e *env) []string {
			return []string{filepath.Join(e.dir, "socket"), "/run/docker.sock", "/run/dbus/system_bus_socket"}
		}, slices.Concat(nearSockets, nearFiles), "", false},
		{layer.Seccomp, "open sockets", "net.socket", "refused", words("inet", "inet udp", "inet raw", "inet6", "netlink", "packet", "vsock", "alg", "bluetooth", "can", "tipc", "xdp", "key", "rds"), nearSockets, "", false},
	}
}

func privilegeCases() []jailCase {
	return []jailCase{
		{layer.Capabilities, "have or get capabilities", "privilege.held", "none", nil, nearRights, "", false},
		{layer.Capabilities, "take a capability", "privilege.capset", "refused", nil, nearRights, "", false},
		{layer.User, "become another user", "privilege.setuid", "refused", nil, nearRights, "", false},
		{layer.NoNewPrivs, "go without no_new_privs", "privilege.nnp", "refused", nil, nil, "", false},
		{layer.Seccomp, "run without a filter of system calls", "privilege.seccomp", "one is on", nil, nil, "", false},
		{layer.Seccomp, "make namespaces", "privilege.unshare", "refused", words("user", "mnt", "net", "pid", "ipc", "uts", "cgroup"), nearRights, "", false},
		{layer.Capabilities, "mount a file system", "privilege.mount", "refused", nil, nearMounts, "", false},
		{layer.Capabilities, "make the root writable", "privilege.remount", "refused", nil, nearMounts, "", false},
		{layer.Capabilities, "change the root", "privilege.chroot", "refused", nil, nearMounts, "", false},
		{layer.Capabilities, "pivot the root", "privilege.pivot", "refused", nil, nearMounts, "", false},
		{layer.Capabilities, "make device nodes", "privilege.mknod", "refused", nil, nearMounts, "", false},
		{layer.Capabilities, "load a kernel module", "privilege.module", "refused", nil, nil, tooHarmful, false},
		{layer.Capabilities, "boot another kernel (kexec)", "privilege.kexec", "refused", nil, nil, tooHarmful, false},
		{layer.Capabilities, "restart the host", "privilege.reboot", "refused", nil, nil, tooHarmful, false},
		{layer.Capabilities, "set the clock", "privilege.clock", "refused", nil, nil, tooHarmful, false},
		{layer.Capabilities, "set the host name", "privilege.hostname", "refused", nil, nil, tooHarmful, false},
		{layer.Capabilities, "turn swap off", "privilege.swap", "refused", nil, nil, tooHarmful, false},
		{layer.Capabilities, "open files by handle", "privilege.handle", "refused", nil, nearRights, "", false},
		{layer.Seccomp, "load BPF", "privilege.bpf", "refused", nil, nearRights, "", false},
		{layer.Seccomp, "use perf events", "privilege.perf", "refused", nil, nearRights, "", false},
		{layer.Seccomp, "use the kernel's keyrings", "privilege.keys", "refused", nil, nearRights, "", false},
		{layer.Seccomp, "set up io_uring", "privilege.uring", "refused", nil, nil, "", false},
		{layer.Seccomp, "use userfaultfd", "privilege.userfault", "refused", nil, nil, "", false},
		{layer.Seccomp, "ask to be traced", "process.traceme", "refused", nil, nil, "", false},
		{layer.Seccomp, "change the personality", "privilege.personality", "refused", nil, nil, "", false},
		{layer.Seccomp, "start a program", "privilege.exec", "refused", func(e *env) []string { return []string{"/proc/self/exe", e.cell.Facts().Exe} }, nil, "", false},
	}
}

func limitCases() []jailCase {
	plus := func(get func(CellFacts) int64, more int64) func(*env) []string {
		return func(e *env) []string { return []string{strconv.FormatInt(get(e.cell.Facts())+more, 10)} }
	}
	return []jailCase{
		{layer.Rlimits, "raise limits", "privilege.rlimits", "refused", nil, nil, "", false},
		{layer.Rlimits, "open descriptors without end", "limit.files", "stopped", plus(func(f CellFacts) int64 { return f.Files }, 1), nil, "", false},
		{layer.Rlimits, "write a core file", "limit.core", "none", nil, nil, "", false},
		{layer.Rlimits, "write a large file", "limit.filesize", "stopped", words(strconv.Itoa(64<<20), "/", "/tmp", "/dev/shm"), nil, "", false},
		{layer.Cgroup, "multiply processes without end", "limit.processes", "stopped", plus(func(f CellFacts) int64 { return f.Pids }, 1), nil, "", false},
		{layer.Cgroup, "use memory without end", "limit.memory", "killed", plus(func(f CellFacts) int64 { return f.Memory }, 64<<20), nil, "", false},
		{layer.Cgroup, "use all processors", "limit.cpu", "its share", func(e *env) []string {
			return []string{"1500", strconv.FormatInt(e.cell.Facts().CPU*5/4, 10)} // a quarter for the bound's period
		}, nil, "", false},
	}
}

// aloneCases show for each layer what it stops when nothing else does, and that without it, and
// only it, the same attack works.
func aloneCases() []jailCase {
	one := func(n layer.Name, name, attack string, args func(*env) []string, also ...layer.Name) jailCase {
		return jailCase{n, name + ", and no other layer stops it", attack, "stopped", args, also, "", true}
	}
	return []jailCase{
		one(layer.User, "be root", "privilege.root", nil),
		one(layer.Mounts, "open files of the host", "file.read", words("/etc/passwd"), layer.Landlock),
		one(layer.Landlock, "open files of the host", "file.read", words("/etc/passwd"), layer.Mounts),
	}
}
