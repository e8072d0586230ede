package seccomp

// Groups of calls that the profiles allow.

var files = []string{
	"access", "chdir", "chmod", "chown", "close", "close_range", "copy_file_range", "creat",
	"dup", "dup2", "dup3", "faccessat", "faccessat2", "fadvise64", "fallocate", "fchdir",
	"fchmod", "fchmodat", "fchmodat2", "fchown", "fchownat", "fcntl", "fdatasync", "flock",
	"fstat", "fstatfs", "fsync", "ftruncate", "futimesat", "getcwd", "getdents", "getdents64",
	"inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch", "lchown", "link",
	"linkat", "lseek", "lstat", "mkdir", "mkdirat", "mknod", "mknodat", "newfstatat", "open",
	"openat", "openat2", "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2",
	"read", "readahead", "readlink", "readlinkat", "readv", "rename", "renameat", "renameat2",
	"rmdir", "sendfile", "splice", "stat", "statfs", "statx", "symlink", "symlinkat", "sync",
	"sync_file_range", "syncfs", "truncate", "umask", "unlink", "unlinkat", "utime",
	"utimensat", "utimes", "write", "writev",
}

var attributes = []string{
	"fgetxattr", "file_getattr", "flistxattr", "fremovexattr", "fsetxattr", "getxattr",
	"getxattrat", "lgetxattr", "listxattr", "listxattrat", "llistxattr", "lremovexattr",
	"lsetxattr", "removexattr", "removexattrat", "setxattr", "setxattrat",
}

var memory = []string{
	"brk", "madvise", "map_shadow_stack", "membarrier", "memfd_create", "mlock", "mlock2",
	"mlockall", "mmap", "mprotect", "mremap", "mseal", "msync", "munlock", "munlockall",
	"munmap", "pkey_alloc", "pkey_free", "pkey_mprotect",
}

var processes = []string{
	"arch_prctl", "execve", "execveat", "exit", "exit_group", "fork", "futex", "futex_requeue",
	"futex_wait", "futex_waitv", "futex_wake", "get_robust_list", "get_thread_area",
	"getcpu", "getpgid", "getpgrp", "getpid", "getppid", "getsid", "gettid",
	"landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "pidfd_open",
	"prctl", "rseq", "rseq_slice_yield",
	"seccomp", // a command may only take more from itself
	"set_robust_list", "set_thread_area", "set_tid_address", "setpgid", "setsid", "vfork",
	"wait4", "waitid",
}

var identities = []string{
	"capget", "capset", "getegid", "geteuid", "getgid", "getgroups", "getresgid",
	"getresuid", "getuid", "setfsgid", "setfsuid", "setgid", "setgroups", "setregid",
	"setresgid", "setresuid", "setreuid", "setuid",
}

var signals = []string{
	"kill", "pause", "pidfd_send_signal", "restart_syscall", "rt_sigaction", "rt_sigpending",
	"rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait",
	"rt_tgsigqueueinfo", "sigaltstack", "signalfd", "signalfd4", "tgkill", "tkill", "uretprobe",
}

var waiting = []string{
	"epoll_create", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2",
	"epoll_wait", "eventfd", "eventfd2", "poll", "ppoll", "pselect6", "select",
}

var timers = []string{
	"alarm", "clock_getres", "clock_gettime", "clock_nanosleep", "getitimer", "gettimeofday",
	"nanosleep", "setitimer", "time", "timer_create", "timer_delete", "timer_getoverrun",
	"timer_gettime", "timer_settime", "timerfd_create", "timerfd_gettime", "timerfd_settime",
	"times",
}

// channels are pipes, and what is done with sockets that a process has: which ones
// it may make is another matter.
var channels = []string{
	"accept", "accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt",
	"listen", "pipe", "pipe2", "recvfrom", "recvmmsg", "recvmsg", "sendmmsg", "sendmsg",
	"sendto", "setsockopt", "shutdown",
}

var scheduling = []string{
	"getpriority", "getrlimit", "getrusage", "ioprio_get", "ioprio_set", "prlimit64",
	"sched_get_priority_max", "sched_get_priority_min", "sched_getaffinity", "sched_getattr",
	"sched_getparam", "sched_getscheduler", "sched_rr_get_interval", "sched_setaffinity",
	"sched_setattr", "sched_setparam", "sched_setscheduler", "sched_yield", "setpriority",
	"setrlimit",
}

var system = []string{"getrandom", "sysinfo", "uname"}

// What follows is in the default profile only.

var fileExtras = []string{
	"adjtimex", "cachestat", "chroot", "clock_adjtime", // as far as capabilities allow
	"fanotify_mark", "file_setattr", "listmount", "name_to_handle_at", "statmount", "tee", "vmsplice",
}

var memoryExtras = []string{"get_mempolicy", "memfd_secret", "mincore", "modify_ldt", "remap_file_pages"}

// tracing is of one's own processes: the kernel asks for the same user and no less
// capabilities.
var tracing = []string{"process_mrelease", "process_vm_readv", "process_vm_writev", "ptrace"}

var sysvIPC = []string{
	"msgctl", "msgget", "msgrcv", "msgsnd", "semctl", "semget", "semop", "semtimedop",
	"shmat", "shmctl", "shmdt", "shmget",
}

var queues = []string{
	"mq_getsetattr", "mq_notify", "mq_open", "mq_timedreceive", "mq_timedsend", "mq_unlink",
}

var asyncIO = []string{
	"io_cancel", "io_destroy", "io_getevents", "io_pgetevents", "io_setup", "io_submit",
}
