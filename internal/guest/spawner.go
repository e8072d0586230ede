package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/seccomp"
)

// confinement is what a command is confined by, as a key of what is made ahead
// for it.
type confinement struct {
	profile                                      string // "" without one
	everyCapability, agentsProcesses, allDevices bool   // layers to go without
}

func confinementOf(req *guestrpc.Exec) confinement {
	without := func(layer string) bool { return slices.Contains(req.Without, layer) }
	c := confinement{
		profile:         req.Profile,
		everyCapability: without(guestrpc.LayerCapabilities),
		agentsProcesses: without(guestrpc.LayerProcesses),
		allDevices:      without(guestrpc.LayerDevices),
	}
	if c.profile == "" {
		c.profile = guestrpc.ProfileDefault
	}
	if without(guestrpc.LayerSeccomp) {
		c.profile = ""
	}
	return c
}

// without lists the layers that c goes without.
func (c confinement) without() []string {
	var layers []string
	for _, l := range []struct {
		off  bool
		name string
	}{
		{c.profile == "", guestrpc.LayerSeccomp},
		{c.everyCapability, guestrpc.LayerCapabilities},
		{c.agentsProcesses, guestrpc.LayerProcesses},
		{c.allDevices, guestrpc.LayerDevices},
	} {
		if l.off {
			layers = append(layers, l.name)
		}
	}
	return layers
}

// confiner keeps what commands are started with: views, and spawners. They are made
// when they are first asked for; those that every command gets, before the machine
// is saved. There are at most as many as there are values of confinement.
type confiner struct {
	key   seccomp.Key
	ring  *seccomp.Ring
	fatal chan error // takes what must end the agent

	mu       sync.Mutex // guards what follows
	views    map[[2]bool]*view
	spawners map[confinement]*spawner
}

func newConfiner() (*confiner, error) {
	// All machines that are started from one that was saved have the same. It is
	// kept from a machine's commands, not from who has broken another one's kernel.
	var b [16]byte
	if _, err := unix.Getrandom(b[:], 0); err != nil {
		return nil, fmt.Errorf("draw a key: %w", err)
	}
	return &confiner{
		key:      seccomp.Key{binary.NativeEndian.Uint64(b[:8]), binary.NativeEndian.Uint64(b[8:])},
		ring:     seccomp.NewRing(guestrpc.MaxDenials),
		fatal:    make(chan error, 1),
		views:    make(map[[2]bool]*view),
		spawners: make(map[confinement]*spawner),
	}, nil
}

// die ends the agent, and with it the machine: something that confines commands
// is gone.
func (c *confiner) die(err error) {
	select {
	case c.fatal <- err:
	default: // it is ending
	}
}

// spawner returns the spawner for commands that are so confined.
func (c *confiner) spawner(want confinement) (*spawner, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.spawners[want]; s != nil {
		return s, nil
	}
	v, err := c.view(!want.agentsProcesses, !want.allDevices)
	if err != nil {
		return nil, fmt.Errorf("make the commands' view of the machine: %w", err)
	}
	s, err := newSpawner(want, v, c.key)
	if err != nil {
		return nil, fmt.Errorf("confine commands: %w", err)
	}
	if s.listener >= 0 {
		w := &watcher{listener: s.listener, profile: want.profile, ring: c.ring, details: newBucket(detailsBurst, detailsRate)}
		go func() { c.die(fmt.Errorf("listen for refused system calls: %w", w.run())) }()
	}
	c.spawners[want] = s
	return s, nil
}

func (c *confiner) view(processes, devices bool) (*view, error) {
	key := [2]bool{processes, devices}
	if v := c.views[key]; v != nil {
		return v, nil
	}
	v, err := newView(processes, devices)
	if err != nil {
		return nil, err
	}
	if processes {
		go func() { c.die(v.wait()) }() // for the agent's life
	}
	c.views[key] = v
	return v, nil
}

// spawner is a thread that is confined as commands are to be, once, and from which
// they are born: they inherit its filter, capabilities and namespaces, at no cost of
// their own. It belongs to nobody else: the runtime makes no thread from it, and so
// the rest of the agent is not confined.
//
// The agent answers what its filter leaves to a listener. The thread must thus never
// make such a call: it would not give back the runtime's only processor, which
// whoever answers needs. What it and its children do before they are programs is in
// child, and allowed by every profile.
type spawner struct {
	confinement
	view     *view
	listener int // -1 without a filter
	key      seccomp.Key
	births   chan *birth
}

// birth is a child that waits for its spawner.
type birth struct {
	child *child
	pid   int
	err   error
	done  chan struct{}
}

func newSpawner(c confinement, v *view, key seccomp.Key) (*spawner, error) {
	s := &spawner{confinement: c, view: v, listener: -1, key: key, births: make(chan *birth)}
	ready := make(chan error)
	onThread(func() { s.run(ready) })
	return s, <-ready
}

// onThread runs f in a goroutine that has a thread of its own, which ends with it. It
// is never the process's first, which outlives its goroutine and is what /proc/PID
// shows for the whole process.
func onThread(f func()) {
	go func() {
		runtime.LockOSThread() // and never unlocked: nothing else may run on what f leaves
		if unix.Gettid() == unix.Getpid() {
			onThread(f) // on another: this one is taken until that has begun
			return
		}
		f()
	}()
}

// start makes the child.
func (s *spawner) start(c *child) (pid int, err error) {
	b := &birth{child: c, done: make(chan struct{})}
	s.births <- b
	<-b.done
	return b.pid, b.err
}

// run is the spawner's thread. It ends with the agent, or at once with the error
// that it sends.
func (s *spawner) run(ready chan<- error) {
	err := s.confine()
	if err != nil && s.listener >= 0 {
		unix.Close(s.listener)
	}
	ready <- err
	if err != nil {
		return
	}
	for b := range s.births {
		b.pid, b.err = b.child.start(s.key)
		close(b.done)
	}
}

// confine makes of the thread what commands are to be. The filter comes last: it
// takes away what the steps before it need.
func (s *spawner) confine() error {
	if err := blockSignals(); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	if err := s.enter(); err != nil {
		return err
	}
	if !s.everyCapability {
		if err := dropCapabilities(commandCapabilities); err != nil {
			return err
		}
	}
	if s.profile != "" {
		if err := s.install(); err != nil {
			return err
		}
	}
	return s.verify()
}

// enter goes into the view.
func (s *spawner) enter() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // threads that share a root cannot change it
		return fmt.Errorf("have a root of its own: %w", err)
	}
	if err := unix.Setns(s.view.mounts, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter the mounts: %w", err)
	}
	if s.view.pids < 0 {
		return nil
	}
	if err := unix.Setns(s.view.pids, unix.CLONE_NEWPID); err != nil { // that of its children
		return fmt.Errorf("enter the processes: %w", err)
	}
	return nil
}

func profileNamed(name string, key seccomp.Key) (*seccomp.Profile, error) {
	switch name {
	case guestrpc.ProfileDefault:
		return seccomp.Default(key), nil
	case guestrpc.ProfileStrict:
		return seccomp.Strict(key), nil
	case guestrpc.ProfilePermissive:
		return seccomp.Permissive(), nil
	}
	return nil, fmt.Errorf("there is no profile %q", name)
}

func (s *spawner) install() error {
	p, err := profileNamed(s.profile, s.key)
	if err != nil {
		return err
	}
	prog, err := p.Compile()
	if err != nil {
		return err
	}
	s.listener, err = seccomp.Install(prog, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
	return err
}

// verify asks the kernel whether the thread is what it was to become.
func (s *spawner) verify() error {
	nnp, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil || nnp != 1 {
		return fmt.Errorf("no_new_privs is %d: %w", nnp, errors.Join(err, errNotConfined))
	}
	mode, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0)
	if err != nil || (mode == unix.SECCOMP_MODE_FILTER) != (s.profile != "") {
		return fmt.Errorf("seccomp is in mode %d: %w", mode, errors.Join(err, errNotConfined))
	}
	for c := range uintptr(unix.CAP_CHECKPOINT_RESTORE + 1) {
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if err != nil || !s.everyCapability && (has == 1) != (commandCapabilities&(1<<c) != 0) {
			return fmt.Errorf("capability %d is %d: %w", c, has, errors.Join(err, errNotConfined))
		}
	}
	return nil
}

var errNotConfined = errors.New("the thread is not confined")
