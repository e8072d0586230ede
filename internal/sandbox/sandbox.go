// Package sandbox composes everything else into what a person asks for: a
// disposable machine in which commands run. It is the only package that knows
// all the others.
//
// [Open] gives a Host: the directory with kernels, images and records. [Host.Create]
// makes a [Sandbox] in named steps, each with its undo; [Sandbox.Start] runs a
// command in it; Close takes all of it down in reverse.
package sandbox

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/control"
	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/image"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/kernel"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/state"
	"github.com/ironclaw-run/ironclaw/internal/template"
	"github.com/ironclaw-run/ironclaw/internal/undo"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Options say what sandbox to make. The zero value of a field means its default.
type Options struct {
	Name    string   // "" means none
	Image   string   // name or digest; "" means "base"
	CPUs    int      // 0 means 1
	Memory  int64    // bytes; 0 means vm.DefaultMemory
	Overlay int64    // size of the writable overlay, bytes, part of Memory; 0 means half of it
	Pids    int      // bound on processes and threads; 0 means DefaultPids
	Driver  string   // "auto" or ""; "qemu"
	Accel   string   // "auto" or ""; "kvm", "tcg"
	Link    string   // "auto" or ""; "vsock", "serial"
	Kernel  string   // path of a kernel image; "" means the installed one
	Modules string   // directory with the modules of Kernel; "" means /lib/modules/<release>
	Command []string // noted in the record
	Cold    bool     // boot: neither use a template nor make one
	ASLR    bool     // keep the guest's address space randomisation where it costs much (see vm.Spec)
	// Seccomp is the profile of system calls of commands that name none: one of
	// guestrpc.Profiles; "" means guestrpc.ProfileDefault.
	Seccomp string
	// Without are the layers of isolation that a person chose to go without; of those in
	// the guest, guestrpc.Layers can be. Require are those that nothing else may stand in for.
	Without, Require layer.Set
	// Progress is told what takes long, nil for nobody.
	Progress func(step string)
	// Note is told what went otherwise than it should, and was mended; nil for
	// nobody.
	Note func(what string)
	// OnPhase is told each phase of the start when it has ended, nil for nobody.
	OnPhase func(Phase)
}

// DefaultPids bounds the processes of a sandbox.
const DefaultPids = 1024

// DefaultImage is what runs when nobody names an image.
const DefaultImage = "base"

// bootTimeout bounds the wait for a guest that neither comes up nor dies. A
// boot takes 2 s under emulation on an idle host.
const bootTimeout = 120 * time.Second

// Sandbox is a machine with a guest agent that answers. Safe for concurrent use.
type Sandbox struct {
	id      string
	machine vm.Machine
	secret  []byte
	hello   guestrpc.HelloReply
	image   *image.Image
	kernel  *kernel.Kernel
	seccomp string   // of commands that name no profile
	without []string // guest layers that commands go without
	release func()
}

// Phase is a part of the start and how long it took.
type Phase struct {
	Name     string
	Duration time.Duration
}

// Create makes a sandbox and returns when its guest agent has answered. After an
// error nothing of it remains.
func (h *Host) Create(ctx context.Context, opts Options) (*Sandbox, error) {
	if err := opts.fill(); err != nil {
		return nil, err
	}
	s := &Sandbox{id: newID(), seccomp: opts.Seccomp, without: guestLayers(opts.Without)}
	b := &builder{host: h, opts: &opts, s: s, last: time.Now()}
	defer b.stack.Run()
	steps := []struct {
		name string
		run  func(context.Context) error
	}{
		{"reserve", b.reserve},
		{"jail", b.prepareJail},
		{"image", b.findImage},
		{"kernel", b.findKernel},
		{"driver", b.chooseDriver},
		{"template", b.chooseTemplate},
		{"", b.bringUp}, // tells its phases itself
		{"", b.answerQuestions},
	}
	if opts.Kernel != "" { // refused, if it must be, before an image is built
		steps[2], steps[3] = steps[3], steps[2]
	}
	for _, step := range steps {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		if err := step.run(ctx); err != nil {
			return nil, err
		}
		if step.name != "" {
			b.phase(step.name)
		}
	}
	s.release = sync.OnceFunc(b.stack.Release())
	return s, nil
}

func (o *Options) fill() error {
	if o.Image == "" {
		o.Image = DefaultImage
	}
	if o.Pids == 0 {
		o.Pids = DefaultPids
	}
	if o.CPUs == 0 {
		o.CPUs = 1
	}
	if o.Memory == 0 {
		o.Memory = vm.DefaultMemory
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	if o.Note == nil {
		o.Note = func(string) {}
	}
	for _, choice := range []struct {
		what, value string
		known       []string
	}{
		{"driver", o.Driver, []string{"auto", "qemu"}},
		{"accelerator", o.Accel, []string{"auto", "kvm", "tcg"}},
		{"link", o.Link, []string{"auto", "vsock", "serial"}},
	} {
		if choice.value != "" && !slices.Contains(choice.known, choice.value) {
			return fmt.Errorf("unknown %s %q: there are %s", choice.what, choice.value, strings.Join(choice.known, ", "))
		}
	}
	switch {
	case o.Name != "" && !vm.ValidID(o.Name):
		return fmt.Errorf("bad name %q: a name is 1 to 63 of a-z, 0-9 and -, and begins with a letter or digit", o.Name)
	case o.Pids < 1:
		return fmt.Errorf("%d processes: at least 1 is needed", o.Pids)
	case o.Overlay < 0 || o.Overlay > o.Memory:
		return fmt.Errorf("a writable disk of %d MiB does not fit the memory of %d MiB: it lives there", o.Overlay>>20, o.Memory>>20)
	}
	return checkConfinement(o.Seccomp, o.Without)
}

// newID makes an id that no other sandbox has: 60 random bits.
func newID() string {
	const digits = "0123456789abcdefghijkmnpqrstuvwx" // 32
	var b [12]byte
	rand.Read(b[:])
	for i := range b {
		b[i] = digits[b[i]%32]
	}
	return string(b[:])
}

// builder carries what the steps of Create hand to each other.
type builder struct {
	host  *Host
	opts  *Options
	s     *Sandbox
	stack undo.Stack
	last  time.Time

	entry  *state.Entry
	driver vm.Driver
	spec   vm.Spec

	template *template.Template // what the machine starts from; nil means that it boots
}

func (b *builder) phase(name string) {
	now := time.Now()
	if b.opts.OnPhase != nil {
		b.opts.OnPhase(Phase{name, now.Sub(b.last)})
	}
	b.last = now
}

// reserve writes the record: from here on whatever happens to this process is
// noticed by the next one.
func (b *builder) reserve(context.Context) error {
	entry, err := b.host.state.Reserve(state.Record{
		ID: b.s.id, Name: b.opts.Name, Image: b.opts.Image, Command: b.opts.Command, Created: time.Now().UTC(),
		Without: b.opts.Without.Names(),
	})
	if err != nil {
		return err
	}
	b.entry = entry
	b.stack.Add(func() { _ = entry.Release() }) // what remains is reconciled
	return nil
}

// prepareJail begins to make the jail: most of what that takes happens beside the
// steps that follow.
func (b *builder) prepareJail(ctx context.Context) error {
	j, err := jail.Prepare(ctx, b.jailOptions(b.s.id))
	if err != nil {
		return err
	}
	b.stack.Add(func() { _ = j.Close() })
	b.spec.Jail = j
	return nil
}

func (b *builder) jailOptions(id string) jail.Options {
	return jail.Options{
		ID: id, CPUs: b.opts.CPUs, Memory: b.opts.Memory + vm.Overhead, Disk: b.host.Home,
		Without: b.opts.Without, Require: b.opts.Require,
	}
}

func (b *builder) findImage(ctx context.Context) error {
	img, err := b.host.Image(ctx, b.opts.Image, b.opts.Progress)
	if err != nil {
		return err
	}
	release, err := b.host.Images.Use(img)
	if err != nil {
		return err
	}
	b.stack.Add(release)
	b.s.image = img
	b.spec.Root = img.Path
	return nil
}

func (b *builder) findKernel(ctx context.Context) error {
	k, err := b.host.Kernel(ctx, b.opts.Kernel, b.opts.Modules, b.opts.Progress)
	if err != nil {
		return err
	}
	b.s.kernel = k
	b.spec.Kernel = k.ELF
	return nil
}

func (b *builder) chooseDriver(ctx context.Context) (err error) {
	b.driver, err = b.host.Driver(ctx, b.opts.Driver)
	if err != nil {
		return err
	}
	b.spec.ID = b.s.id
	b.spec.CPUs = b.opts.CPUs
	b.spec.Memory = b.opts.Memory
	b.spec.RandomizeAddresses = b.opts.ASLR
	if b.spec.Link, err = chooseLink(b.driver.Features(), b.opts.Link); err != nil {
		return err
	}
	if b.spec.Initrd, err = b.host.initramfs(ctx, b.s.kernel, b.spec.Link); err != nil {
		return err
	}
	b.spec.Accel, err = b.host.chooseAccel(ctx, b.driver, b.spec, b.opts.Accel, b.opts.Progress)
	return err
}

func (b *builder) startMachine(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("it did not answer within %v", bootTimeout))
	defer cancel()
	m, err := b.driver.Start(ctx, b.spec)
	if err != nil {
		return err
	}
	b.stack.Add(func() { _ = m.Close() })
	b.s.machine = m
	if pid := m.Info().PID; pid != 0 {
		vmm, err := state.Describe(pid)
		if err != nil {
			return b.s.ended(err)
		}
		return b.entry.Update(func(r *state.Record) { r.VMM, r.Layers = vmm, m.Info().Layers })
	}
	return nil
}

func (b *builder) waitForGuest(ctx context.Context) error {
	name := b.opts.Name
	if name == "" {
		name = b.s.id
	}
	secret, reply, err := greet(ctx, b.s.machine, guestrpc.Hello{
		Hostname: name, Overlay: b.opts.Overlay, Pids: b.opts.Pids,
	})
	if err != nil {
		return b.s.ended(err)
	}
	b.s.secret, b.s.hello = secret, reply
	return nil
}

// opInspect asks for an Inspection, over the control socket.
const opInspect = "inspect"

// answerQuestions lets other commands of this user ask about the sandbox.
func (b *builder) answerQuestions(context.Context) error {
	server, err := control.Serve(b.entry.Dir(), func(ctx context.Context, r control.Request) (any, error) {
		if r.Op != opInspect {
			return nil, fmt.Errorf("no question %.40q is known", r.Op)
		}
		return b.s.Inspect(ctx)
	})
	if err != nil {
		return err
	}
	b.stack.Add(func() { _ = server.Close() })
	return nil
}

// greet says hello to a machine's guest agent and waits for the answer.
func greet(ctx context.Context, m vm.Machine, hello guestrpc.Hello) (secret []byte, reply guestrpc.HelloReply, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("the guest did not come up within %v", bootTimeout))
	defer cancel()
	conn, err := m.Dial(ctx, guestrpc.PortHello)
	if err != nil {
		return nil, reply, fmt.Errorf("boot: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()

	hello.Secret = randomBytes(32)
	hello.Entropy = randomBytes(64)
	hello.Nonce = fmt.Sprintf("%x", randomBytes(16))
	stream := guestrpc.NewStream(conn)
	err = stream.WriteHeader(&guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpHello, Hello: &hello})
	if err == nil {
		err = readHello(stream, &hello, &reply)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, reply, fmt.Errorf("greet the guest agent: %w", err)
	}
	return hello.Secret, reply, nil
}

func readHello(stream *guestrpc.Stream, hello *guestrpc.Hello, reply *guestrpc.HelloReply) error {
	frame, err := readFrame(stream)
	for asked := 0; err == nil && frame.Type == guestrpc.FrameClock && asked < guestrpc.MaxClock; asked++ {
		if err := stream.WriteMessage(guestrpc.FrameClock, &guestrpc.Clock{Now: time.Now()}); err != nil {
			return err
		}
		frame, err = readFrame(stream)
	}
	if err != nil {
		return err
	}
	if frame.Type == guestrpc.FrameError {
		return remoteError(frame)
	}
	if frame.Type != guestrpc.FrameHello {
		return fmt.Errorf("%w: frame %d in place of hello", errGuestProtocol, frame.Type)
	}
	if err := decode(frame, reply); err != nil {
		return err
	}
	if reply.Version != guestrpc.Version || reply.Nonce != hello.Nonce {
		return fmt.Errorf("%w: hello of version %d, nonce %.40q", errGuestProtocol, reply.Version, reply.Nonce)
	}
	return stream.WriteFrame(guestrpc.FrameAck, nil)
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// Start starts a command. ctx bounds the start only.
func (s *Sandbox) Start(ctx context.Context, cmd Cmd) (*Process, error) {
	exec := &guestrpc.Exec{
		Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir, User: cmd.User,
		Stdin: cmd.Stdin != nil, TTY: cmd.TTY, KillAll: cmd.KillAll,
		Profile: cmp.Or(cmd.Seccomp, s.seccomp), Without: s.without,
	}
	if err := exec.Validate(); err != nil {
		return nil, err
	}
	conn, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	return start(ctx, conn, s.header(guestrpc.OpExec, exec), &cmd, s.ended)
}

// Ping sends b to the guest agent and back.
func (s *Sandbox) Ping(ctx context.Context, b []byte) error {
	conn, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	stream := guestrpc.NewStream(conn)
	if err := stream.WriteHeader(s.header(guestrpc.OpPing, nil)); err != nil {
		return s.ended(err)
	}
	if err := stream.WriteFrame(guestrpc.FrameData, b); err != nil {
		return s.ended(err)
	}
	frame, err := readFrame(stream)
	if err != nil {
		return s.ended(err)
	}
	if frame.Type != guestrpc.FrameData || string(frame.Payload) != string(b) {
		return fmt.Errorf("ping: %w: other bytes came back", errGuestProtocol)
	}
	return stream.WriteFrame(guestrpc.FrameData, nil)
}

func (s *Sandbox) dial(ctx context.Context) (net.Conn, error) {
	conn, err := s.machine.Dial(ctx, guestrpc.PortAgent)
	if err != nil {
		return nil, s.ended(err)
	}
	return conn, nil
}

func (s *Sandbox) header(op guestrpc.Op, exec *guestrpc.Exec) *guestrpc.Header {
	return &guestrpc.Header{Version: guestrpc.Version, Op: op, Secret: s.secret, Exec: exec}
}

// endGrace is how long a broken stream may precede the news of its machine's end.
const endGrace = 5 * time.Second

// ended turns the error of a stream into why its machine ended, if it did.
func (s *Sandbox) ended(err error) error {
	var exit *vm.ExitError
	if err == nil || errors.As(err, &exit) {
		return err
	}
	if !isBroken(err) {
		return err
	}
	select {
	case <-s.machine.Done():
		if e := s.machine.Err(); e != nil {
			return e
		}
		return link.ErrClosed
	case <-time.After(endGrace): // the guest agent hung up and the machine lives
		return fmt.Errorf("the guest agent hung up: %w", err)
	}
}

// ID is the sandbox's id.
func (s *Sandbox) ID() string { return s.id }

// Machine is the machine it runs in.
func (s *Sandbox) Machine() vm.Machine { return s.machine }

// Hello is what the guest said of itself: to be shown, never to decide by.
func (s *Sandbox) Hello() guestrpc.HelloReply { return s.hello }

// Image is what its root disk was made from.
func (s *Sandbox) Image() *image.Image { return s.image }

// Kernel is what it booted.
func (s *Sandbox) Kernel() *kernel.Kernel { return s.kernel }

// Close ends the machine and removes everything that belongs to the sandbox,
// and returns when that is done, also to those who call it meanwhile. Idempotent.
func (s *Sandbox) Close() error {
	s.release()
	return nil
}
