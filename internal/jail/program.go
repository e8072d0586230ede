package jail

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/layer"
)

// Program is what runs in a jail.
type Program struct {
	Path string   // in the jail
	Args []string // without the program's name
	// Files are all that exists in the jail; see File.
	Files []File
	// Descriptors, 8 at most, become 3, 4 and so on. Nothing else is inherited.
	Descriptors []*os.File
	// Opens are names that the program may open for reading and writing, though no
	// such file exists: it gets what is given here, until Seal. What is open only for
	// reading stays so, whatever was asked for. All other opening for
	// writing is refused. Needs the layer seccomp.
	Opens map[string]*os.File
	// FileSize bounds, in bytes, the files that the program can write or make larger.
	FileSize int64
	// Stdout and Stderr take what the program writes there; from it they are pipes.
	Stdout, Stderr io.Writer
}

// File is one file of the host that exists in the jail, read-only.
type File struct {
	Host   string // its path on the host
	Inside string // its path in the jail, absolute
	Device bool   // a device, to be used as one; also for writing
}

// Process is a program in its jail. Safe for concurrent use.
type Process struct {
	jail    *Jail
	program *Program
	opener  *opener // nil without the layer seccomp
	begun   time.Time
}

// Start makes the jail's process execute the program and returns when it does.
// After an error the jail is of no more use and is to be closed.
func (j *Jail) Start(ctx context.Context, p Program) (*Process, error) {
	select {
	case <-j.ready:
	case <-ctx.Done():
		return nil, fmt.Errorf("make a jail: %w", context.Cause(ctx))
	}
	if j.failed != nil {
		return nil, fmt.Errorf("make a jail: %w", j.failed)
	}
	if len(p.Descriptors) > maxGiven {
		return nil, fmt.Errorf("start in the jail: %d descriptors are too many: %d are possible", len(p.Descriptors), maxGiven)
	}
	msg, err := json.Marshal(j.plan(&p))
	if err != nil {
		return nil, err
	}
	j.out.set(p.Stdout)
	j.errOut.set(p.Stderr)
	var rights []int
	for _, f := range p.Descriptors {
		rights = append(rights, int(f.Fd()))
	}
	proc := &Process{jail: j, program: &p, begun: time.Now()}
	if err := unix.Sendmsg(j.control, msg, unix.UnixRights(rights...), nil, unix.MSG_NOSIGNAL); err != nil {
		return nil, fmt.Errorf("tell the jail what to run: %w", err)
	}
	if err := j.follow(ctx, proc); err != nil {
		proc.Seal() // it may have asked already
		return nil, fmt.Errorf("start in the jail: %w", err)
	}
	return proc, nil
}

// follow reads what the stage says until it has become the program.
func (j *Jail) follow(ctx context.Context, proc *Process) error {
	executing := false
	for {
		reply, fds, err := j.receive(ctx)
		switch {
		case errors.Is(err, io.EOF) && executing:
			return nil // its end of the socket was closed by execve
		case errors.Is(err, io.EOF):
			return j.endedEarly()
		case err != nil:
			return err
		}
		executing = executing || reply.Executing
		if reply.Landlock != nil {
			j.noteLandlock(*reply.Landlock)
		}
		if len(fds) == 1 && proc.opener == nil {
			proc.opener = newOpener(fds[0], proc.program.Opens, j.on(layer.Mounts))
			continue
		}
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
}

// noteLandlock notes what Landlock there is; a kernel without one is told and, unless a
// person requires it, goes without.
func (j *Jail) noteLandlock(abi int) {
	if abi > 0 {
		j.add(layer.Landlock, fmt.Sprintf("ABI %d; opening / was refused", abi))
		return
	}
	j.report = append(j.report, layer.Status{Layer: layer.Landlock, State: layer.Absent,
		Detail: "this kernel has no Landlock; it is held by the layers mounts and user"})
}

// receive waits for a message of the stage. io.EOF is the end of its socket: it
// has become the program, or has ended.
func (j *Jail) receive(ctx context.Context) (reply, []int, error) {
	stop := context.AfterFunc(ctx, func() { _ = unix.Shutdown(j.control, unix.SHUT_RDWR) })
	defer stop()
	b, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxRights))
	for {
		n, oobn, flags, _, err := unix.Recvmsg(j.control, b, oob, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case ctx.Err() != nil:
			return reply{}, nil, context.Cause(ctx)
		case err != nil:
			return reply{}, nil, fmt.Errorf("listen to the jail: %w", err)
		case n == 0:
			return reply{}, nil, io.EOF
		case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
			return reply{}, nil, errors.New("listen to the jail: a message is too long")
		}
		fds, err := descriptors(oob[:oobn])
		if err != nil {
			return reply{}, nil, err
		}
		var r reply
		if err := json.Unmarshal(b[:n], &r); err != nil {
			return reply{}, nil, fmt.Errorf("listen to the jail: %w", err)
		}
		return r, fds, r.error()
	}
}

// endMoment bounds the wait for a process that has closed its socket to be reaped.
const endMoment = time.Second

// endedEarly says why the stage ended without a word.
func (j *Jail) endedEarly() error {
	select {
	case <-j.exited:
		return fmt.Errorf("the jail's process ended: %v %s", j.exitErr, strings.TrimSpace(j.errOut.text()))
	case <-time.After(endMoment):
		return errors.New("the jail's process says nothing")
	}
}

// PID is the process.
func (p *Process) PID() int { return p.jail.cmd.Process.Pid }

// Kill ends the process.
func (p *Process) Kill() { _ = p.jail.cmd.Process.Kill() } // an error says that it has ended

// Exited is closed when the process has ended and been reaped.
func (p *Process) Exited() <-chan struct{} { return p.jail.exited }

// Err says how the process ended, as exec.Cmd.Wait does. Only after Exited.
func (p *Process) Err() error { return p.jail.exitErr }

// Begun is when the jail was told to run the program.
func (p *Process) Begun() time.Time { return p.begun }

// Seal ends what Opens allowed: from here on the program opens nothing for writing and
// executes no other program. Idempotent.
func (p *Process) Seal() {
	if p.opener != nil {
		p.opener.close()
	}
}

// Close ends the process and removes its jail. Idempotent.
func (p *Process) Close() error {
	_ = p.jail.Close()
	p.Seal()
	return nil
}
