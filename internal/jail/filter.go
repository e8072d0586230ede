package jail

import (
	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/seccomp"
)

// Filter is what a VMM's process may ask of the host's kernel: a list of what is
// allowed. It comes on top of the VMM's own filter, which for QEMU is a list of what is
// refused, and in which sockets, ptrace, bpf and io_uring are not.
//
// All else fails with ENOSYS: programs ask for what is new and do without. What is left to
// the supervisor (Notify) is opening files for writing and executing programs, see [Process.Seal].
func Filter() *seccomp.Profile {
	return &seccomp.Profile{
		Name:    "vmm",
		Default: seccomp.Errno(unix.ENOSYS),
		Foreign: seccomp.KillProcess,
		Rules: append(controls(unix.PR_SET_NAME, unix.PR_GET_NAME, unix.PR_SET_NO_NEW_PRIVS, unix.PR_GET_NO_NEW_PRIVS, unix.PR_SET_TIMERSLACK,
			unix.PR_GET_DUMPABLE, unix.PR_MCE_KILL, unix.PR_SET_SECCOMP, unix.PR_GET_SECCOMP, unix.PR_CAPBSET_READ, unix.PR_GET_SECUREBITS),
			[]seccomp.Rule{
				{Calls: []string{"execve"}, Action: seccomp.Notify},
				{Calls: []string{"openat"}, Action: seccomp.Allow, Conds: readOnly(2)},
				{Calls: []string{"openat"}, Action: seccomp.Notify},
				{Calls: []string{"open"}, Action: seccomp.Allow, Conds: readOnly(1)},
				{Calls: []string{"open", "creat"}, Action: seccomp.Errno(unix.EACCES)},
				allowed("read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2",
					"close", "close_range", "lseek", "fstat", "stat", "lstat", "newfstatat", "statx", "statfs", "fstatfs",
					"access", "faccessat", "faccessat2", "readlink", "readlinkat", "getcwd", "getdents64", "fadvise64",
					"dup", "dup2", "dup3", "fcntl", "flock", "fsync", "fdatasync", "ftruncate", "fallocate", "umask"),
				// Not what asks for network devices: its sockets are of the host's namespace, where they
				// were made, and would tell.
				{Calls: []string{"ioctl"}, Action: seccomp.Allow, Conds: []seccomp.Cond{
					{Arg: 1, Mask: 0xffffff00, Op: seccomp.NotEqual, Value: unix.SIOCGIFNAME &^ 0xff},
				}},
				allowed("poll", "ppoll", "select", "pselect6", "epoll_create", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait",
					"epoll_pwait2", "eventfd", "eventfd2", "signalfd", "signalfd4", "timerfd_create", "timerfd_settime", "timerfd_gettime",
					"pipe", "pipe2"),
				// Of sockets it has what it was given; it can make none that leads anywhere.
				allowed("sendmsg", "recvmsg", "sendto", "recvfrom", "shutdown", "getsockopt", "setsockopt", "getsockname", "getpeername"),
				{Calls: []string{"socketpair"}, Action: seccomp.Allow, Conds: []seccomp.Cond{{Arg: 0, Mask: seccomp.Int, Value: unix.AF_UNIX}}},
				allowed("mmap", "mprotect", "munmap", "mremap", "madvise", "msync", "mincore", "brk", "membarrier", "memfd_create"),
				{Calls: []string{"clone"}, Action: seccomp.Allow, Conds: []seccomp.Cond{{Arg: 0, Mask: newNamespaces, Value: 0}}},
				allowed("futex", "futex_waitv", "set_robust_list", "get_robust_list", "rseq", "set_tid_address", "exit", "exit_group",
					"sched_yield", "sched_getaffinity", "sched_getattr", "sched_getparam", "sched_getscheduler", "getcpu", "gettid", "getpid", "getppid",
					"getpgrp", "getpgid", "getsid", "getuid", "geteuid", "getgid", "getegid", "getresuid", "getresgid", "getgroups", "tgkill", "wait4", "waitid",
					"restart_syscall"),
				allowed("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending", "rt_sigtimedwait", "rt_sigsuspend", "sigaltstack",
					"timer_create", "timer_settime", "timer_gettime", "timer_getoverrun", "timer_delete", "getitimer", "setitimer", "pause"),
				allowed("clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "times", "getrusage",
					"getrandom", "uname", "sysinfo", "getrlimit", "arch_prctl", "seccomp"),
				// Reading limits, of itself.
				{Calls: []string{"prlimit64"}, Action: seccomp.Allow, Conds: []seccomp.Cond{
					{Arg: 0, Mask: seccomp.Int, Value: 0}, {Arg: 2, Mask: seccomp.Long, Value: 0},
				}},
			}...),
	}
}

// newNamespaces are the flags of clone that make namespaces.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

func allowed(calls ...string) seccomp.Rule { return seccomp.Rule{Calls: calls, Action: seccomp.Allow} }

// readOnly are the conditions under which an argument asks to open something that
// exists, for reading.
func readOnly(arg int) []seccomp.Cond {
	return []seccomp.Cond{{Arg: arg, Mask: unix.O_ACCMODE | unix.O_CREAT | unix.O_TRUNC, Value: unix.O_RDONLY}}
}

// controls allows prctl for these options; not PR_SET_PDEATHSIG, by which it ends with us.
func controls(options ...uint64) []seccomp.Rule {
	rules := make([]seccomp.Rule, len(options))
	for i, o := range options {
		rules[i] = seccomp.Rule{Calls: []string{"prctl"}, Action: seccomp.Allow, Conds: []seccomp.Cond{{Arg: 0, Mask: seccomp.Int, Value: o}}}
	}
	return rules
}

// filter puts the filter on this thread, the one that becomes the program, and hands its
// listener to the supervisor.
func (s *stage) filter() error {
	prog, err := Filter().Compile()
	if err != nil {
		return err
	}
	listener, err := seccomp.Install(prog, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
	if err != nil {
		return err
	}
	return s.say(reply{}, listener)
}
