package seccomp

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// onThread runs f on a thread of its own, which ends with it.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends
		f()
	}()
	<-done
}

func noNewPrivs(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Error(err)
	}
}

// testProfile allows all but getpriority.
func testProfile(a Action) *Profile {
	return &Profile{Name: "test", Default: Allow, Foreign: Allow, Rules: []Rule{
		{Calls: []string{"getpriority"}, Action: a, Conds: []Cond{{1, Int, Greater, 3}}},
	}}
}

func getpriority(who int) unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_GETPRIORITY, unix.PRIO_PROCESS, uintptr(who), 0)
	return e
}

// The kernel takes the program and decides by it, for that thread and no other.
func TestInstall(t *testing.T) {
	prog := compile(t, testProfile(Errno(unix.EXDEV)))
	onThread(func() {
		noNewPrivs(t)
		if l, err := Install(prog, 0); err != nil || l != -1 {
			t.Errorf("listener %d, %v", l, err)
			return
		}
		if e := getpriority(4); e != unix.EXDEV {
			t.Errorf("refused call: %v", e)
		}
		if e := getpriority(0); e != 0 {
			t.Errorf("allowed call: %v", e)
		}
		status, err := os.ReadFile("/proc/thread-self/status")
		if err != nil || !strings.Contains(string(status), "\nSeccomp:\t2\n") {
			t.Errorf("%v, %s", err, status)
		}
	})
	if e := getpriority(4); e == unix.EXDEV {
		t.Error("another thread has the filter")
	}
	if _, err := Install(nil, 0); err == nil {
		t.Error("an empty filter was installed")
	}
}

// The kernel takes the guest's profiles.
func TestInstallProfiles(t *testing.T) {
	for _, p := range []*Profile{Default(testKey), Strict(testKey), Permissive()} {
		prog := compile(t, p)
		onThread(func() {
			noNewPrivs(t)
			if _, err := Install(prog, 0); err != nil { // the profile allows what a thread needs to end
				t.Errorf("%s: %v", p.Name, err)
			}
		})
	}
}

// A listener sees the calls, answers them, and hears of callers that are gone.
func TestListener(t *testing.T) {
	prog := compile(t, testProfile(Notify))
	listeners, tids := make(chan int), make(chan int)
	results := make(chan unix.Errno, 2)
	thread := make(chan struct{})
	go func() {
		defer close(thread)
		onThread(func() {
			noNewPrivs(t)
			l, err := Install(prog, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
			if err != nil {
				t.Error(err)
			}
			listeners <- l
			if err != nil {
				return
			}
			tids <- unix.Gettid()
			for range 2 {
				_, _, e := unix.Syscall(unix.SYS_GETPRIORITY, unix.PRIO_PROCESS, 1<<30, 0)
				results <- e
			}
		})
	}()
	l := <-listeners
	if l < 0 {
		return
	}
	defer unix.Close(l)
	tid := <-tids
	if flags, err := unix.FcntlInt(uintptr(l), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
	var n Notification
	receive := func() {
		t.Helper()
		for {
			if err := Receive(l, &n); err == nil {
				break
			} else if !errors.Is(err, unix.EINTR) {
				t.Fatal(err)
			}
		}
		if n.PID != uint32(tid) || n.Data.Number != unix.SYS_GETPRIORITY || n.Data.Args[1] != 1<<30 || !n.Data.Native() || !Valid(l, n.ID) {
			t.Errorf("%+v", n)
		}
	}
	receive()
	if err := Refuse(l, n.ID, unix.EXDEV); err != nil {
		t.Fatal(err)
	}
	if e := <-results; e != unix.EXDEV {
		t.Errorf("refused: %v", e)
	}
	receive()
	if err := Continue(l, n.ID); err != nil {
		t.Fatal(err)
	}
	if e := <-results; e != unix.ESRCH {
		t.Errorf("continued: %v", e)
	}
	select {
	case <-thread:
	case <-time.After(10 * time.Second):
		t.Fatal("the thread does not end")
	}
	if Valid(l, n.ID) || !errors.Is(Refuse(l, n.ID, unix.EPERM), unix.ENOENT) {
		t.Error("an answered call is still there")
	}
}
