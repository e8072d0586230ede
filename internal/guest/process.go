package guest

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// emptyTimeout bounds the wait for killed processes to be gone.
const emptyTimeout = 5 * time.Second

// process is one command, from its start to the end of its cgroup.
type process struct {
	pid         int
	group       *group // nil in tests only
	confinement confinement

	mu     sync.Mutex // guards reaped
	reaped bool       // the pid may be somebody else's by now
}

// spawn starts what req asks for, with the command's ends of s.
func (a *Agent) spawn(req *guestrpc.Exec, id *identity, s *stdio) (*process, error) {
	env := environment(id, req)
	dir, path, err := locate(id, req, env)
	if err != nil {
		return nil, err
	}
	if a.confiner == nil {
		return spawnUnconfined(req, id, dir, path, env, s)
	}
	p := &process{confinement: confinementOf(req)}
	from, err := a.confiner.spawner(p.confinement)
	if err != nil {
		return nil, guestrpc.Errorf(guestrpc.CodeInternal, "%v", err)
	}
	c, err := newChild(id, dir, path, req.Args, env, s.theirs, req.TTY != nil)
	if err != nil {
		return nil, startError(req.Args[0], err)
	}
	if p.group, err = a.jobs.add(); err != nil {
		return nil, guestrpc.Errorf(guestrpc.CodeInternal, "make a cgroup: %v", err)
	}
	c.cgroup = p.group.fd
	err = a.jobs.unguarded(func() (err error) {
		p.pid, err = from.start(c)
		return err
	})
	if err != nil {
		p.release()
		return nil, startError(req.Args[0], err)
	}
	return p, nil
}

// spawnUnconfined is for tests, which run on a host that they must not change.
func spawnUnconfined(req *guestrpc.Exec, id *identity, dir, path string, env []string, s *stdio) (*process, error) {
	fds := make([]uintptr, len(s.theirs))
	for i, fd := range s.theirs {
		fds[i] = uintptr(fd)
	}
	sys := &syscall.SysProcAttr{Setsid: true, Setctty: req.TTY != nil} // Ctty 0: the command's stdin
	if os.Geteuid() == 0 {
		sys.Credential = &syscall.Credential{Uid: id.uid, Gid: id.gid, Groups: id.groups}
	}
	pid, _, err := syscall.StartProcess(path, req.Args, &syscall.ProcAttr{Dir: dir, Env: env, Files: fds, Sys: sys})
	if err != nil {
		return nil, startError(req.Args[0], err)
	}
	return &process{pid: pid}, nil
}

// startError classifies what fork or execve said. That the program and the
// directory exist has been checked: what is missing now is the interpreter.
func startError(name string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return guestrpc.Errorf(guestrpc.CodeNotRunnable, "%s: its interpreter is missing", name)
	case errors.Is(err, unix.EAGAIN):
		return guestrpc.Errorf(guestrpc.CodeInternal, "start %s: the limit on processes is reached", name)
	case errors.Is(err, unix.ENOMEM):
		return guestrpc.Errorf(guestrpc.CodeInternal, "start %s: %v", name, err)
	}
	return guestrpc.Errorf(guestrpc.CodeNotRunnable, "%s: %v", name, err)
}

// wait waits for the process's end; with killAll it ends its descendants before
// the pid, which is also the group's number, is given back.
func (p *process) wait(killAll bool) (guestrpc.Exit, error) {
	for {
		err := unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return guestrpc.Exit{}, guestrpc.Errorf(guestrpc.CodeInternal, "wait: %v", err)
		}
	}
	if killAll {
		p.killAll()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reaped = true
	var status unix.WaitStatus
	var usage unix.Rusage
	for {
		_, err := unix.Wait4(p.pid, &status, 0, &usage)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return guestrpc.Exit{}, guestrpc.Errorf(guestrpc.CodeInternal, "wait: %v", err)
		}
	}
	exit := guestrpc.Exit{User: time.Duration(usage.Utime.Nano()), System: time.Duration(usage.Stime.Nano())}
	if status.Signaled() {
		exit.Signal = int(status.Signal())
	} else {
		exit.Code = status.ExitStatus()
	}
	return exit, nil
}

// signal sends a signal, unless the process is gone.
func (p *process) signal(s guestrpc.Signal) {
	if s.Group && s.Number == int(unix.SIGKILL) {
		p.killAll()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return
	}
	pid := p.pid
	if s.Group {
		pid = -pid // it leads its group
	}
	unix.Kill(pid, unix.Signal(s.Number))
}

// killAll ends the process and its descendants.
func (p *process) killAll() {
	if p.group != nil {
		p.group.kill()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		unix.Kill(-p.pid, unix.SIGKILL)
	}
}

// gone waits for what killAll has killed.
func (p *process) gone() {
	if p.group != nil {
		p.group.waitEmpty(emptyTimeout)
	}
}

// outOfMemory reports whether a process of the command was killed for memory.
func (p *process) outOfMemory() bool { return p.group != nil && p.group.outOfMemory() }

func (p *process) release() {
	if p.group != nil {
		p.group.release()
	}
}
