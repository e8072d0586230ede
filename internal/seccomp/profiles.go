package seccomp

import "golang.org/x/sys/unix"

// The profiles of commands in the guest are lists of what is allowed. All else is
// left to the guest agent (Notify), which refuses and notes it, or, for commands
// that are only watched, notes it and lets it pass.
//
// What is allowed is what ordinary programs need, after the experience of the
// container engines' default profile, and without what it has for containers with
// more rights. Not in it, and so refused: kexec and modules; bpf and
// perf_event_open; mounting in all its forms; namespaces; keys; userfaultfd;
// io_uring; handles of files; ports; clocks; quotas, swap, accounting; the kernel's
// log.
//
// clone3 has flags that a filter cannot see, for they are behind a pointer, and the
// guest agent needs it to start a command in its cgroup. So it is allowed to who
// knows the [Key], and does not exist for others: the C library then uses clone,
// whose flags can be seen.

// Key is what the guest agent passes to clone3 besides its arguments, in the registers
// of a third and a fourth, which the kernel does not look at and a filter does. A
// command learns it neither from the agent, whose memory it cannot read, nor of its
// own filter, nor by trying: it has 128 bits.
type Key [2]uint64

// clone3 is allowed with the key.
func (k Key) clone3() []Rule {
	calls := []string{"clone3"}
	return []Rule{
		{Calls: calls, Action: Allow, Conds: []Cond{{2, Long, Equal, k[0]}, {3, Long, Equal, k[1]}}},
		{Calls: calls, Action: Errno(unix.ENOSYS)},
	}
}

// notForCommands are the flags of clone that make namespaces, and the one that makes a
// child of the caller's parent, which would be the guest agent: it knows nothing of
// such a child and would never reap it.
const notForCommands = unix.CLONE_PARENT | unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// socketType is what of a socket's type is no flag (SOCK_TYPE_MASK).
const socketType = 0xf

// Default is the profile of commands for which nothing else is asked.
func Default(k Key) *Profile { return usual("default", k.clone3()) }

// Permissive is Default for commands whose listener lets everything pass.
func Permissive() *Profile {
	return usual("permissive", []Rule{{Calls: []string{"clone3"}, Action: Allow}})
}

func usual(name string, clone3 []Rule) *Profile {
	return &Profile{
		Name:    name,
		Default: Notify,
		Foreign: Notify,
		Rules: join(
			clone3,
			allow(files, attributes, memory, processes, identities, signals, waiting, timers, channels, scheduling, system),
			allow(fileExtras, memoryExtras, tracing, sysvIPC, queues, asyncIO),
			[]Rule{
				{Calls: []string{"clone"}, Action: Allow, Conds: []Cond{{0, notForCommands, Equal, 0}}},
				{Calls: []string{"unshare"}, Action: Allow, Conds: []Cond{{0, Long, Equal, unix.CLONE_FILES}}},
				{Calls: []string{"unshare"}, Action: Allow, Conds: []Cond{{0, Long, Equal, unix.CLONE_FS}}},
			},
			personalities(0, 0x8, 0x20000, 0x20008, 0xffffffff), // Linux, 32 bits, UNAME26, ask
			keystrokes(),
			localSockets(),
			[]Rule{
				internet(unix.AF_INET, unix.SOCK_STREAM), internet(unix.AF_INET, unix.SOCK_DGRAM),
				internet(unix.AF_INET6, unix.SOCK_STREAM), internet(unix.AF_INET6, unix.SOCK_DGRAM),
				// Programs list their addresses by it. Its other protocols are the
				// kernel's inner workings: audit, netfilter, crypto, devices.
				{Calls: []string{"socket"}, Action: Allow, Conds: []Cond{
					{0, Int, Equal, unix.AF_NETLINK}, {2, Int, Equal, unix.NETLINK_ROUTE},
				}},
			},
		),
	}
}

// Strict is the profile of commands that compute: no network, not even to
// themselves but by Unix sockets, no tracing of other processes, no interprocess
// communication but pipes, files, signals and Unix sockets, and none of the calls
// that few programs need and in which kernels had their faults.
func Strict(k Key) *Profile {
	return &Profile{
		Name:    "strict",
		Default: Notify,
		Foreign: Notify,
		Rules: join(
			k.clone3(),
			allow(files, attributes, memory, processes, identities, signals, waiting, timers, channels, scheduling, system),
			[]Rule{{Calls: []string{"clone"}, Action: Allow, Conds: []Cond{{0, notForCommands, Equal, 0}}}},
			personalities(0xffffffff),
			keystrokes(),
			localSockets(),
		),
	}
}

func allow(groups ...[]string) []Rule {
	return []Rule{{Calls: join(groups...), Action: Allow}}
}

func join[T any](lists ...[]T) []T {
	var all []T
	for _, l := range lists {
		all = append(all, l...)
	}
	return all
}

// personalities allows these values: others switch off protections of the memory.
func personalities(values ...uint64) []Rule {
	rules := make([]Rule, len(values))
	for i, v := range values {
		rules[i] = Rule{Calls: []string{"personality"}, Action: Allow, Conds: []Cond{{0, Int, Equal, v}}}
	}
	return rules
}

// keystrokes allows ioctl but for the two that type into a terminal: what waits at
// the other end would take it for a person's.
func keystrokes() []Rule {
	return []Rule{{Calls: []string{"ioctl"}, Action: Allow, Conds: []Cond{
		{1, Int, NotEqual, unix.TIOCSTI}, {1, Int, NotEqual, tiocLinux},
	}}}
}

const tiocLinux = 0x541c // TIOCLINUX: selection and paste of a console

func localSockets() []Rule {
	return []Rule{
		{Calls: []string{"socket", "socketpair"}, Action: Allow, Conds: []Cond{{0, Int, Equal, unix.AF_UNIX}}},
	}
}

// internet allows sockets of a family and a type: not raw ones.
func internet(family, kind uint64) Rule {
	return Rule{Calls: []string{"socket"}, Action: Allow, Conds: []Cond{{0, Int, Equal, family}, {1, socketType, Equal, kind}}}
}
