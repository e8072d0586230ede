package verify

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/verify/testnet"
)

// hostPaths are what is in every jailer's way: who reads one of them is out.
var hostPaths = []string{
	"/etc/passwd", "/etc/shadow", "/etc/hostname", "/root", "/home", "/var", "/usr", "/boot", "/sys/kernel", "/sys/class",
	"/proc/1/status", "/proc/kcore", "/proc/sys/kernel", "/proc/self/root/etc", "/dev/mem", "/dev/vda", "/dev/sda",
	"/run/docker.sock", "/var/run/docker.sock", "/run/containerd", "/run/systemd", "../../../../../../etc/passwd",
}

// jailCase is one attack from the VMM's place.
type jailCase struct {
	layer                  layer.Name // that is to stop it
	name, attack, expected string
	args                   arguments    // of the probe; nil means none
	also                   []layer.Name // other layers that stop it: the control goes without them, too
	alone                  bool         // the attack, too, is made without them: it shows what the layer does alone
	held                   string       // the attack where another mechanism stands in for the layer; "" means the same
	noControl              string       // why it is not made without the layer
	root                   bool         // only where VMMs have users of their own
	user                   bool         // a normal user's user namespace, which cannot be gone without, stops it, too
}

// arguments make a probe's arguments for a cell.
type arguments func(e *env, f CellFacts) []string

func words(w ...string) arguments { return func(*env, CellFacts) []string { return w } }

// Layers that stop the same: each would be enough.
var (
	nearFiles     = []layer.Name{layer.Mounts, layer.Landlock, layer.User, layer.Seccomp}
	nearProcesses = []layer.Name{layer.Processes, layer.Seccomp, layer.User, layer.Capabilities, layer.Mounts, layer.Landlock}
	nearSockets   = []layer.Name{layer.Seccomp, layer.Network, layer.Firewall, layer.Guard, layer.Landlock}
	nearRights    = []layer.Name{layer.Capabilities, layer.Seccomp, layer.User, layer.NoNewPrivs, layer.Landlock}
	nearMounts    = []layer.Name{layer.Capabilities, layer.Seccomp, layer.User, layer.Landlock, layer.Mounts}
)

// tooHarmful is why some attacks are not made without their layer.
const tooHarmful = "it would be made on this host itself"

// jailCases are all attacks from the VMM's place that this user can make.
func jailCases() []jailCase {
	all := slices.Concat(fileCases(), processCases(), socketCases(), privilegeCases(), kernelCases(), limitCases(), aloneCases())
	if jail.OwnUsers() {
		return all
	}
	all = slices.DeleteFunc(all, func(c jailCase) bool { return c.root })
	for i, c := range all {
		// Without its user namespace a normal user's jail can have no others.
		all[i].also = slices.DeleteFunc(slices.Clone(c.also), func(n layer.Name) bool { return n == layer.User })
		if c.layer == layer.User || c.user {
			all[i].noControl = "a normal user has no other namespaces without it"
		}
	}
	return all
}

func fileCases() []jailCase {
	image := func(_ *env, f CellFacts) []string { return []string{f.Image} }
	refused := func(n layer.Name, name, attack, expected string, args arguments) jailCase {
		return jailCase{layer: n, name: name, attack: attack, expected: expected, args: args, also: nearFiles}
	}
	return []jailCase{
		refused(layer.Mounts, "open files of the host", "file.read", "none is there", func(e *env, _ CellFacts) []string {
			return append(slices.Clone(hostPaths), e.host.Home, e.dir, filepath.Join(e.host.Home, "run"))
		}),
		refused(layer.Mounts, "find more in the root than was put there", "file.list", "only the files of the jail", func(_ *env, f CellFacts) []string {
			return append([]string{"/"}, f.Root...)
		}),
		refused(layer.Mounts, "create files", "file.create", "refused", func(e *env, _ CellFacts) []string {
			return []string{"/", "/dev", "/proc", "/tmp", "/run", "/usr", "/etc", "/lib", e.dir}
		}),
		refused(layer.Mounts, "change the image", "file.change", "refused", image),
	}
}

func processCases() []jailCase {
	supervisor := func(*env, CellFacts) []string {
		return []string{strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getppid()), "1"}
	}
	refused := func(name, attack string, args arguments) jailCase {
		return jailCase{layer: layer.Processes, name: name, attack: attack, expected: "refused", args: args, also: nearProcesses}
	}
	return []jailCase{
		refused("see another process", "process.see", words("65536")),
		refused("signal all processes", "process.all", nil),
		refused("open the supervisor", "process.pidfd", supervisor),
		stoppedByUser(refused("trace the supervisor", "process.trace", supervisor)),
		stoppedByUser(refused("read the supervisor's memory", "process.read", supervisor)),
		stoppedByUser(refused("enter the supervisor's namespaces", "process.enter", supervisor)),
	}
}

// stoppedByUser marks a case that a user namespace stops alone.
func stoppedByUser(c jailCase) jailCase {
	c.user = true
	return c
}

func socketCases() []jailCase {
	refused := func(n layer.Name, name, attack string, args arguments, also ...layer.Name) jailCase {
		return jailCase{layer: n, name: name, attack: attack, expected: "refused", args: args, also: append(also, nearSockets...)}
	}
	return []jailCase{
		refused(layer.Network, "connect to a LAN", "net.tcp", words(testnet.LAN[0]+":"+testnet.Port)),
		refused(layer.Network, "connect to the host's loopback", "net.tcp", words(testnet.Loopback[0]+":"+testnet.Port)),
		refused(layer.Network, "connect to the metadata address", "net.tcp", words(testnet.Metadata[0]+":"+testnet.HTTPPort)),
		refused(layer.Network, "connect to an abstract Unix socket of the host", "net.unix", words("@"+abstractName())),
		refused(layer.Mounts, "connect to a Unix socket of the host", "net.unix", func(e *env, _ CellFacts) []string {
			return []string{filepath.Join(e.dir, "socket"), "/run/docker.sock", "/run/dbus/system_bus_socket"}
		}, nearFiles...),
		{layer: layer.Seccomp, name: "ask a socket of the host for its network devices", attack: "net.given", expected: "refused"},
		refused(layer.Seccomp, "open sockets", "net.socket",
			words("inet", "inet udp", "inet raw", "inet6", "netlink", "packet", "vsock", "alg", "bluetooth", "can", "tipc", "xdp", "key", "rds")),
	}
}

func privilegeCases() []jailCase {
	refused := func(n layer.Name, name, attack string, args arguments, also ...layer.Name) jailCase {
		return jailCase{layer: n, name: name, attack: attack, expected: "refused", args: args, also: also}
	}
	return []jailCase{
		refused(layer.Capabilities, "have or get capabilities", "privilege.held", nil, nearRights...),
		refused(layer.Capabilities, "take a capability", "privilege.capset", nil, nearRights...),
		refused(layer.User, "become another user", "privilege.setuid", nil, nearRights...),
		refused(layer.NoNewPrivs, "go without no_new_privs", "privilege.nnp", nil, layer.Seccomp, layer.Landlock),
		refused(layer.Seccomp, "make namespaces", "privilege.unshare", words("user", "mnt", "net", "pid", "ipc", "uts", "cgroup"), nearRights...),
		stoppedByUser(refused(layer.Capabilities, "mount a file system", "privilege.mount", nil, nearMounts...)),
		stoppedByUser(refused(layer.Capabilities, "make the root writable", "privilege.remount", nil, nearMounts...)),
		refused(layer.Capabilities, "change the root", "privilege.chroot", nil, nearMounts...),
		stoppedByUser(refused(layer.Capabilities, "pivot the root", "privilege.pivot", nil, nearMounts...)),
		stoppedByUser(refused(layer.Capabilities, "make device nodes", "privilege.mknod", nil, nearMounts...)),
		stoppedByUser(refused(layer.Capabilities, "open files by handle", "privilege.handle", nil, nearRights...)),
	}
}

// kernelCases reach for parts of the kernel that a VMM has no business with.
func kernelCases() []jailCase {
	refused := func(n layer.Name, name, attack string, also ...layer.Name) jailCase {
		return jailCase{layer: n, name: name, attack: attack, expected: "refused", also: also}
	}
	harmful := func(name, attack string) jailCase {
		return jailCase{layer: layer.Capabilities, name: name, attack: attack, expected: "refused", noControl: tooHarmful}
	}
	start := refused(layer.Seccomp, "start a program", "privilege.exec")
	start.args = func(_ *env, f CellFacts) []string { return []string{"/proc/self/exe", f.Exe} }
	return []jailCase{
		harmful("load a kernel module", "privilege.module"),
		harmful("boot another kernel (kexec)", "privilege.kexec"),
		harmful("restart the host", "privilege.reboot"),
		harmful("set the clock", "privilege.clock"),
		harmful("set the host name", "privilege.hostname"),
		harmful("turn swap off", "privilege.swap"),
		refused(layer.Seccomp, "run without a filter of system calls", "privilege.seccomp"),
		stoppedByUser(refused(layer.Seccomp, "load BPF", "privilege.bpf", nearRights...)),
		stoppedByUser(refused(layer.Seccomp, "use perf events", "privilege.perf", nearRights...)),
		refused(layer.Seccomp, "use the kernel's keyrings", "privilege.keys", nearRights...),
		refused(layer.Seccomp, "set up io_uring", "privilege.uring", append(nearRights, layer.Rlimits)...),
		refused(layer.Seccomp, "use userfaultfd", "privilege.userfault", nearRights...),
		refused(layer.Seccomp, "ask to be traced", "process.traceme"),
		refused(layer.Seccomp, "change the personality", "privilege.personality"),
		start,
	}
}

func limitCases() []jailCase {
	plus := func(get func(CellFacts) int64, more int64) arguments {
		return func(_ *env, f CellFacts) []string { return []string{strconv.FormatInt(get(f)+more, 10)} }
	}
	files := plus(func(f CellFacts) int64 { return f.Files }, 1)
	pids := plus(func(f CellFacts) int64 { return f.Pids }, 1)
	memory := plus(func(f CellFacts) int64 { return f.Memory }, 64<<20)
	return []jailCase{
		{layer: layer.Rlimits, name: "raise limits", attack: "privilege.rlimits", expected: "refused", also: []layer.Name{layer.Seccomp}},
		{layer: layer.Rlimits, name: "open descriptors without end", attack: "limit.files", expected: "stopped", args: files},
		{layer: layer.Rlimits, name: "write a core file", attack: "limit.core", expected: "none", also: []layer.Name{layer.Seccomp, layer.User}},
		{layer: layer.Rlimits, name: "write a large file", attack: "limit.filesize", expected: "stopped", also: nearFiles,
			args: func(e *env, _ CellFacts) []string {
				return []string{strconv.Itoa(64 << 20), "/", "/tmp", "/dev/shm", e.dir}
			}},
		{layer: layer.Cgroup, name: "multiply processes without end", attack: "limit.processes", expected: "stopped", args: pids,
			also: []layer.Name{layer.Rlimits}},
		{layer: layer.Cgroup, name: "use memory without end", attack: "limit.memory", expected: "killed", args: memory},
		{layer: layer.Cgroup, name: "use all processors", attack: "limit.cpu", held: "limit.processor", expected: "its share",
			also: []layer.Name{layer.Seccomp}, args: cpuArguments},
	}
}

// cpuArguments are how long to burn and what may be used of one processor, or, where that is
// bounded by affinity, on how many to run.
func cpuArguments(e *env, f CellFacts) []string {
	if heldOtherwise(e.cell.Report(), layer.Cgroup) {
		return []string{strconv.FormatInt(f.CPU/100, 10)}
	}
	return []string{"1500", strconv.FormatInt(f.CPU*2, 10)} // as much again for the bound's period
}

// aloneCases show for each layer what it stops when nothing else does, and that without it, and
// only it, the same attack works.
func aloneCases() []jailCase {
	one := func(n layer.Name, name, attack string, args arguments, also ...layer.Name) jailCase {
		return jailCase{layer: n, name: name + ", which nothing else stops", attack: attack, expected: "stopped", args: args, also: also, alone: true}
	}
	asRoot := func(c jailCase) jailCase {
		c.root = true
		return c
	}
	var user []layer.Name // has no capabilities, if it is not root
	if jail.OwnUsers() {
		user = []layer.Name{layer.User}
	}
	return []jailCase{
		asRoot(one(layer.User, "be root", "privilege.root", nil)),
		one(layer.Mounts, "open files of the host", "file.read", words("/etc/passwd"), layer.Landlock),
		one(layer.Network, "connect to the host", "net.tcp", words(testnet.Loopback[0]+":"+testnet.Port), layer.Seccomp, layer.Firewall, layer.Guard, layer.Landlock),
		one(layer.Firewall, "send packets over the loopback", "net.self", nil, append(user, layer.Seccomp, layer.Capabilities, layer.Landlock)...),
		asRoot(one(layer.Guard, "connect to a LAN", "net.tcp", words(testnet.LAN[0]+":"+testnet.Port), layer.Seccomp, layer.Network, layer.Firewall, layer.Landlock)),
		one(layer.Processes, "see another process", "process.see", words("65536"), layer.Seccomp),
		one(layer.Namespaces, "learn the host's name", "privilege.nodename", words("jail")),
		one(layer.Capabilities, "have or get capabilities", "privilege.held", nil, append(user, layer.Seccomp)...),
		one(layer.NoNewPrivs, "go without no_new_privs", "privilege.nnp", nil, layer.Seccomp, layer.Landlock),
		one(layer.Seccomp, "open a socket", "net.socket", words("inet")),
		one(layer.Rlimits, "open descriptors without end", "limit.files", words("1000")),
		one(layer.Landlock, "read files of the host", "file.read", words("/etc/passwd"), layer.Mounts),
	}
}
