package jail

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/firewall"
	"github.com/ironclaw-run/ironclaw/internal/layer"
)

// stageName is the first argument by which this program knows that it is the stage.
const stageName = "ironclaw-jail"

// controlFD is where the stage finds its socket, and where it keeps it out of the
// way of the descriptors that it is given. Those will be 3 and so on: numbers that are taken from
// the stage's start, for Go's runtime has descriptors of its own, and a runtime whose epoll
// was replaced by something else dies.
const (
	controlFD     = 3
	maxGiven      = 8 // descriptors for the program
	controlParked = 200
	parked        = 201 // where descriptors wait until all have arrived
)

const (
	maxMessage = 64 << 10 // bytes of a message, either way
	maxRights  = maxGiven // descriptors with one message
)

// setup is what the stage is told at its start, as an argument.
type setup struct {
	ID       string
	Firewall bool // set it up
}

// plan is what the stage is told to become, as the message on its socket.
type plan struct {
	Path     string
	Args     []string
	Files    []File
	Mounts   bool // leave everything else of the file system behind
	UID      int  // to become; 0 means to stay
	Limits   []limit
	Affinity int  // processors to use at most; 0 means all
	CgroupNS bool // make a cgroup namespace
	UTS      bool // forget the host's name
	NoNew    bool
	Landlock bool
	Require  bool // of Landlock: not having it is an error
	DropCaps bool
	Seccomp  bool
}

// limit is a resource limit (setrlimit(2)), both of its values.
type limit struct {
	Resource int
	Value    uint64
}

// reply is what the stage says.
type reply struct {
	Firewall  string `json:",omitempty"` // what was set and read back
	Landlock  *int   `json:",omitempty"` // the ABI that confines it, 0 for none
	Executing bool   `json:",omitempty"` // the last word before execve
	Layer     layer.Name
	Error     string
	Remedy    string
}

// error is what the stage gave up for.
func (r *reply) error() error {
	switch {
	case r.Error == "":
		return nil
	case r.Layer == "":
		return errors.New(r.Error)
	}
	return &layer.Error{Layer: r.Layer, Err: errors.New(r.Error), Remedy: r.Remedy}
}

// initialised is set by Init. A program that does not call it would, started as a stage, do all over again
// what made it start one, without end.
var initialised atomic.Bool

// Init becomes the stage, and does not return, if this process was started as
// one. It must be called first in main, and in the TestMain of tests that make jails.
func Init() {
	initialised.Store(true)
	if len(os.Args) == 2 && os.Args[0] == stageName {
		runtime.LockOSThread()
		s := new(stage)
		s.fail(s.run(os.Args[1]))
	}
	if len(os.Args) == 2 && os.Args[1] == idleName {
		idle()
	}
}

// stage is the process that becomes the program.
type stage struct {
	layer layer.Name // what it is busy with
	p     plan
	given []int // descriptors for the program
}

func (s *stage) run(arg string) error {
	var conf setup
	if err := json.Unmarshal([]byte(arg), &conf); err != nil {
		return err
	}
	if err := unix.Dup3(controlFD, controlParked, unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("keep the socket: %w", err)
	}
	if err := unix.Dup3(controlFD+1, controlFD, unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("give up the socket's number: %w", err)
	}
	ready := reply{}
	if conf.Firewall {
		s.layer = layer.Firewall
		set, err := firewall.Set(context.Background(), firewall.Machine(conf.ID), firewall.Options{})
		if err != nil {
			return err
		}
		ready.Firewall = set.String()
		s.layer = ""
	}
	if err := s.say(ready, -1); err != nil {
		return err
	}
	if err := s.listen(); err != nil {
		return err
	}
	for _, step := range s.steps() {
		s.layer = step.layer
		if !step.wanted {
			continue
		}
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return s.execute()
}

type step struct {
	layer  layer.Name
	wanted bool
	what   string
	do     func() error
}

// steps is the order in which the process confines itself. Each may need what the
// next ones take away.
func (s *stage) steps() []step {
	return []step{
		{layer.Namespaces, s.p.CgroupNS, "make a cgroup namespace", func() error { return unix.Unshare(unix.CLONE_NEWCGROUP) }},
		{layer.Namespaces, s.p.UTS, "forget the host's name", func() error { return unix.Sethostname([]byte("jail")) }},
		{layer.Mounts, s.p.Mounts, "make the root", func() error { return enclose(s.p.Files, s.p.UID != 0) }},
		{"", true, "arrange the descriptors", s.arrange},
		{layer.NoNewPrivs, s.p.NoNew, "set no_new_privs", func() error { return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }},
		{layer.Landlock, s.p.Landlock, "restrict files by Landlock", s.landlock},
		{layer.Rlimits, true, "set limits", s.limit},
		{layer.User, s.p.UID != 0, "become the user", func() error { return becomeUser(s.p.UID) }},
		{layer.Capabilities, s.p.DropCaps, "drop all capabilities", dropCapabilities},
		{"", true, "end with the supervisor", s.endWithParent},
		{layer.Seccomp, s.p.Seccomp, "filter system calls", s.filter},
	}
}

// listen waits for the plan and what comes with it.
func (s *stage) listen() error {
	b, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxRights))
	for {
		n, oobn, flags, _, err := unix.Recvmsg(controlParked, b, oob, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("listen: %w", err)
		case n == 0:
			os.Exit(0) // nobody is left who could tell what to run
		case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
			return errors.New("listen: the plan is too long")
		}
		fds, err := descriptors(oob[:oobn])
		if err != nil {
			return err
		}
		for i, fd := range fds {
			if err := unix.Dup3(fd, parked+i, unix.O_CLOEXEC); err != nil {
				return fmt.Errorf("keep a descriptor: %w", err)
			}
			s.given = append(s.given, parked+i)
		}
		return json.Unmarshal(b[:n], &s.p)
	}
}

// descriptors takes the descriptors out of a message's control data.
func descriptors(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parse a message: %w", err)
	}
	var all []int
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return nil, fmt.Errorf("parse a message: %w", err)
		}
		all = append(all, fds...)
	}
	return all, nil
}

// arrange gives the program its descriptors, from 3 on, and marks all others,
// whoever made them, to be closed by execve.
func (s *stage) arrange() error {
	for i, fd := range s.given {
		if err := unix.Dup3(fd, 3+i, 0); err != nil {
			return err
		}
	}
	return unix.CloseRange(uint(3+len(s.given)), ^uint(0)>>32, unix.CLOSE_RANGE_CLOEXEC)
}

// endWithParent is set anew: a change of user has cleared it (prctl(2)). If the
// supervisor has ended meanwhile, its end of the socket is closed.
func (s *stage) endWithParent() error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	fds := []unix.PollFd{{Fd: controlParked, Events: unix.POLLRDHUP}}
	if n, err := unix.Poll(fds, 0); err != nil && err != unix.EINTR {
		return err
	} else if n > 0 && fds[0].Revents&(unix.POLLHUP|unix.POLLRDHUP) != 0 {
		os.Exit(0)
	}
	return nil
}

// execute becomes the program. Its environment is empty: nothing of the
// supervisor's is for a VMM to know.
func (s *stage) execute() error {
	s.layer = ""
	if err := s.say(reply{Executing: true}, -1); err != nil {
		return err
	}
	err := syscall.Exec(s.p.Path, append([]string{s.p.Path}, s.p.Args...), []string{})
	return fmt.Errorf("execute %s: %w", s.p.Path, err)
}

// say sends a message, with a descriptor unless that is negative.
func (s *stage) say(r reply, fd int) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	return unix.Sendmsg(controlParked, b, oob, nil, unix.MSG_NOSIGNAL)
}

// fail tells why the stage gives up.
func (s *stage) fail(err error) {
	_ = s.say(reply{Layer: s.layer, Error: err.Error(), Remedy: remedyOf(err)}, -1)
	os.Exit(1)
}

// idleName is the argument by which this program knows that it runs in a jail only to be
// looked at.
const idleName = "ironclaw-jail-idle"

// idle waits until the other end of descriptor 3 is closed.
func idle() {
	var b [1]byte
	_, _ = unix.Write(3, []byte{1}) // it runs
	for {
		if n, err := unix.Read(3, b[:]); n == 0 || err != nil && err != unix.EINTR {
			os.Exit(0)
		}
	}
}
