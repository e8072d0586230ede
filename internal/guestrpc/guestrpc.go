// Package guestrpc is the protocol between the host and the guest agent.
// Both sides import it; it knows nothing of transports or processes.
//
// # Streams
//
// Every operation has a stream of its own (a [net.Conn] of package link), so
// two operations can never get out of step with each other, and a stream has
// exactly one reader for its whole life. The host opens the stream; the guest
// never does.
//
// A stream begins with one header from the host: four bytes, big endian, the
// length of the [Header] that follows. Everything after it, in both directions,
// is frames: one byte of type, four bytes of length (big endian), the payload.
// Lengths are checked against [MaxHeader] and [MaxFrame] before anything is
// allocated. How headers and payloads are made of bytes is said at [Message].
//
// # Operations
//
// hello: the first operation of a machine, on port [PortHello]. The host sends
// entropy, the host name and a secret. The guest asks for the time with an empty
// [FrameClock], at most [MaxClock] times, and answers with one [FrameHello]. Every
// later header carries the secret, so that another process of the host which can
// reach the guest's port cannot speak to the agent.
//
// ping: the guest echoes every [FrameData] until the host sends an empty one.
//
// exec: the guest starts a process and sends [FrameStarted], or [FrameError].
// Then [FrameStdout] and [FrameStderr] as they are written, and at last exactly
// one [FrameExit]. The host sends [FrameStdin] (empty: end of input),
// [FrameResize] and [FrameSignal] at any time after the header.
//
// inspect: the guest sends a [FrameDenial] for each call that it keeps as refused,
// the oldest first and at most [MaxDenials], a [FrameConfined] for each command that
// runs, at most [MaxConfined], and at last one [FrameInspected].
//
// # Flow control
//
// The transport's, with one exception: input for a process that does not read
// it must not hold up a signal behind it. So the host may have at most
// [StdinWindow] bytes of input under way; the guest returns credit with
// [FrameWindow] when the process has taken them.
//
// # The end of a stream
//
// There is no half-close on every transport, and closing may discard what the
// peer has not read. So the end is said in-band: the guest's last frame is
// FrameExit, FrameError, FrameHello or FrameInspected, the host answers with [FrameAck], and
// only then does either side close.
package guestrpc

import (
	"fmt"
	"time"
)

// Version is the protocol's version. The agent travels with the host program,
// so the two are always equal; a mismatch means a wrong initramfs.
const Version = 3

// Ports of the guest agent.
const (
	// PortHello takes the hello operation, once.
	PortHello uint32 = 1
	// PortAgent takes every other operation.
	PortAgent uint32 = 1024
)

// Limits of what either side accepts.
const (
	// MaxHeader bounds a header, in bytes. Linux allows 128 KiB for one
	// argument and about 2 MiB for all of them together.
	MaxHeader = 4 << 20
	// MaxFrame bounds a frame's payload, in bytes.
	MaxFrame = 64 << 10
	// MaxClock is how often a guest may ask for the time.
	MaxClock = 8
	// StdinWindow is how much input may be under way for one process, in bytes.
	StdinWindow = 1 << 20
	// MaxDenials is how many denials a guest keeps and may send.
	MaxDenials = 1024
	// MaxConfined is how many commands a guest may tell of.
	MaxConfined = 256
)

// Type is the type of a frame.
type Type uint8

// Types of frames. The numbers are the wire's; they never change meaning.
const (
	FrameStdin   Type = 1  // host: bytes for the process; empty means end of input
	FrameResize  Type = 2  // host: [Resize]
	FrameSignal  Type = 3  // host: [Signal]
	FrameAck     Type = 4  // host: the guest's last frame has arrived; empty
	FrameData    Type = 5  // both: bytes of a ping
	FrameClock   Type = 6  // guest: what time is it, empty; host: [Clock]
	FrameHello   Type = 16 // guest: [HelloReply]; last frame
	FrameStarted Type = 17 // guest: [Started]
	FrameStdout  Type = 18 // guest: bytes the process wrote
	FrameStderr  Type = 19 // guest: bytes the process wrote
	FrameWindow  Type = 20 // guest: [Window]
	FrameExit    Type = 21 // guest: [Exit]; last frame
	FrameError   Type = 22 // guest: [Error]; last frame

	FrameDenial    Type = 23 // guest: [Denial]
	FrameConfined  Type = 24 // guest: [Confined]
	FrameInspected Type = 25 // guest: [Inspected]; last frame
)

// Op names an operation.
type Op string

// Operations.
const (
	OpHello Op = "hello"
	OpPing  Op = "ping"
	OpExec  Op = "exec"

	OpInspect Op = "inspect" // it has no fields
)

// Header opens a stream. Exactly the field that Op names is set.
type Header struct {
	Version int
	Op      Op
	Secret  []byte // as given in Hello; not on hello itself
	Hello   *Hello
	Exec    *Exec
}

// Hello is what a machine is told before anything runs in it.
type Hello struct {
	Secret   []byte // 32 bytes; every later header repeats it
	Entropy  []byte // at least 32 bytes, fed to the kernel's generator
	Hostname string // valid as a sandbox id
	Nonce    string // returned in the reply
	Overlay  int64  // size of the writable overlay, in bytes; 0 means half of the memory
	Pids     int    // limit on processes and threads of all commands; 0 means none
}

// Clock is what the host's clock shows at the time of sending.
type Clock struct {
	Now time.Time
}

// HelloReply is the guest's answer. All of it is the guest's word: a host may
// show it, and must not decide by it.
type HelloReply struct {
	Version int
	Nonce   string
	Kernel  string // uname -r
	Timings Timings
}

// Timings are moments of the guest's boot, each counted from the start of its
// kernel's clock.
type Timings struct {
	Init    time.Duration // PID 1 runs
	Modules time.Duration // kernel modules are loaded
	Root    time.Duration // the root is mounted
	Agent   time.Duration // the agent listens
	Hello   time.Duration // hello is answered
}

// Exec says which process to start.
type Exec struct {
	Args    []string // at least one; Args[0] is looked up in the PATH of Env
	Env     []string // KEY=VALUE, over the guest's defaults
	Dir     string   // absolute; empty means the user's home
	User    string   // name or uid, optionally ":" group or gid; empty means DefaultUser
	Stdin   bool     // input will come; otherwise the process reads /dev/null
	TTY     *Resize  // a terminal of this size instead of pipes
	KillAll bool     // when the process ends, end its descendants too
	Profile string   // of system calls; "" means ProfileDefault
	Without []string // layers of isolation to go without, of those the guest has
}

// Profiles of system calls.
const (
	ProfileDefault    = "default"    // what ordinary programs need
	ProfileStrict     = "strict"     // what programs need that only compute
	ProfilePermissive = "permissive" // nothing is refused; what default would refuse is noted
)

// Layers of isolation that a command can go without.
const (
	LayerSeccomp      = "guest-seccomp"      // no profile at all
	LayerCapabilities = "guest-capabilities" // root keeps them all
	LayerProcesses    = "guest-processes"    // the machine's own /proc and /sys, agent included
	LayerDevices      = "guest-devices"      // the machine's own /dev
)

// Profiles lists the profiles.
func Profiles() []string { return []string{ProfileDefault, ProfileStrict, ProfilePermissive} }

// Layers lists the layers that [Exec.Without] may name.
func Layers() []string {
	return []string{LayerSeccomp, LayerCapabilities, LayerProcesses, LayerDevices}
}

// DefaultUser is who a command runs as when nobody is named.
const DefaultUser = "agent"

// Resize is a terminal's size, in cells.
type Resize struct {
	Rows uint16
	Cols uint16
}

// Signal asks for a signal to be sent to the process.
type Signal struct {
	Number int  // 1 to 64, Linux numbering
	Group  bool // to its whole process group; SIGKILL then ends all descendants
}

// Started is sent when the process runs.
type Started struct {
	PID int // as the agent knows it; the command has another one in its own pid namespace
}

// Window returns credit for input.
type Window struct {
	Bytes int // 1 to StdinWindow
}

// Exit says how the process ended.
type Exit struct {
	Code   int           // 0 to 255; meaningless if Signal is not 0
	Signal int           // the signal that ended it, if one did
	OOM    bool          // the guest's memory ran out and the kernel killed for it
	User   time.Duration // CPU time
	System time.Duration
}

// Denial is a system call that was refused, or noted by [ProfilePermissive]. All of
// it is the guest's word, and Comm is what a hostile process calls itself.
type Denial struct {
	First   time.Time
	Last    time.Time // equal to First unless it was repeated
	Count   int       // how often the same thread did the same, 1 at least
	PID     int       // as the sandbox's processes know it; 0 if it could not be found out
	UID     int       // -1 if it could not be found out
	Comm    string    // the process's name; "" if it could not be found out
	Profile string
	Arch    int // AUDIT_ARCH_*
	Number  int // of the call
	Args    []uint64
	Allowed bool // it was only noted
}

// Confined is what the guest's kernel says of a command that runs: the lines of its
// /proc/PID/status.
type Confined struct {
	PID        int // as in [Started]
	Profile    string
	Without    []string
	Seccomp    int // 0 none, 2 filters
	Filters    int
	NoNewPrivs bool
	CapEff     uint64 // capabilities in effect, bit by bit
	CapBnd     uint64 // capabilities that it could ever have
}

// Inspected ends an inspect.
type Inspected struct {
	Dropped int // denials that were not kept
}

// Code classifies an [Error].
type Code string

// Codes of errors. They cross the wire; [errors.Is] against the Err values
// below works on both sides.
const (
	CodeNotFound    Code = "not_found"    // no such program
	CodeNotRunnable Code = "not_runnable" // it is there and cannot be executed
	CodeBadRequest  Code = "bad_request"  // the request makes no sense; also a broken frame
	CodeNoUser      Code = "no_user"      // no such user or group
	CodeNoDir       Code = "no_dir"       // no such working directory
	CodeDenied      Code = "denied"       // wrong or missing secret
	CodeInternal    Code = "internal"     // the guest's own trouble
)

// Error is an error of the other side. Code is one of a closed set; Message is
// the guest's text, at most a few hundred bytes are worth showing.
type Error struct {
	Code    Code
	Message string
}

// Targets for [errors.Is].
var (
	ErrNotFound    = &Error{Code: CodeNotFound}
	ErrNotRunnable = &Error{Code: CodeNotRunnable}
	ErrBadRequest  = &Error{Code: CodeBadRequest}
	ErrNoUser      = &Error{Code: CodeNoUser}
	ErrNoDir       = &Error{Code: CodeNoDir}
	ErrDenied      = &Error{Code: CodeDenied}
	ErrInternal    = &Error{Code: CodeInternal}
)

func (e *Error) Error() string { return e.Message }

// Is reports whether target is an *Error of the same code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// Errorf makes an Error.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Validate checks what a peer asked for: the shape only, not whether the
// program, user or directory exists.
func (e *Exec) Validate() error {
	if len(e.Args) == 0 || e.Args[0] == "" {
		return Errorf(CodeBadRequest, "no command")
	}
	for _, s := range e.Args {
		if hasNUL(s) {
			return Errorf(CodeBadRequest, "an argument holds a NUL byte")
		}
	}
	for _, kv := range e.Env {
		if err := ValidateEnv(kv); err != nil {
			return err
		}
	}
	if hasNUL(e.Dir) || e.Dir != "" && e.Dir[0] != '/' {
		return Errorf(CodeBadRequest, "working directory %q is not absolute", e.Dir)
	}
	if hasNUL(e.User) {
		return Errorf(CodeBadRequest, "bad user %q", e.User)
	}
	if e.Profile != "" && !oneOf(e.Profile, Profiles()) {
		return Errorf(CodeBadRequest, "no seccomp profile %.40q", e.Profile)
	}
	for _, l := range e.Without {
		if !oneOf(l, Layers()) {
			return Errorf(CodeBadRequest, "no command can go without the layer %.40q", l)
		}
	}
	return nil
}

func oneOf(s string, list []string) bool {
	for _, l := range list {
		if s == l {
			return true
		}
	}
	return false
}

// ValidateEnv checks one environment entry, KEY=VALUE.
func ValidateEnv(kv string) error {
	for i := 0; i < len(kv); i++ {
		if kv[i] == 0 {
			return Errorf(CodeBadRequest, "environment entry %q holds a NUL byte", kv)
		}
	}
	for i := 0; i < len(kv); i++ {
		if kv[i] == '=' {
			if i == 0 {
				break
			}
			return nil
		}
	}
	return Errorf(CodeBadRequest, "environment entry %q is not KEY=VALUE", kv)
}

func hasNUL(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] == 0 {
			return true
		}
	}
	return false
}
