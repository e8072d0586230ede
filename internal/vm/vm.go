// Package vm says what a virtual machine is to the rest of IronClaw: types and
// contracts, no code that runs one. Drivers live below it (vm/qemu); vm/vmtest
// is the suite that each of them passes; vm/fakevm is one without a VMM.
//
// Running a command is not here: it sits above, once, for all drivers (package
// sandbox), on the streams that [Machine.Dial] gives.
package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/layer"
)

// Driver starts machines with one kind of VMM. Safe for concurrent use.
type Driver interface {
	// Features says what the driver can do here. It does not change.
	Features() Features
	// Start starts a machine. When it returns nil the VMM runs, confined as the
	// Spec asks and verified to be so; the guest may still be booting. ctx
	// bounds the call and not the machine's life: that ends with Close, with
	// the guest, or with the process that called Start, however that ends.
	//
	// After an error nothing remains: no process, no file.
	Start(ctx context.Context, spec Spec) (Machine, error)
	// SnapshotInputs names what a snapshot of this Spec's machine depends on,
	// beside the contents of Kernel, Initrd and Root: only where all of it is
	// equal may a machine start from the snapshot. The error is ErrNoSnapshots
	// if Features has no such Mode.
	SnapshotInputs(spec Spec) (map[string]string, error)
}

// SnapshotError is returned by Start for a Spec with From whose snapshot was the
// trouble: the VMM ran, and could not go on from it.
type SnapshotError struct{ Err error }

func (e *SnapshotError) Error() string { return "start from the snapshot: " + e.Err.Error() }
func (e *SnapshotError) Unwrap() error { return e.Err }

// ErrNoSnapshots is returned where a machine can be neither saved nor started
// from what was saved.
var ErrNoSnapshots = errors.New("this driver cannot save machines of this kind")

// Features is what a driver can do.
type Features struct {
	Name    string  // of the driver: "qemu"
	Version string  // of the VMM
	Accels  []Accel // which it knows, best first; whether they work is another question
	Links   []Link  // which work here, best first

	Snapshots []Mode // in which machines can be saved and started from what was saved
}

// Mode is a way for machines to run.
type Mode struct {
	Accel Accel
	Link  Link
}

// Accel is how the guest's instructions are executed.
type Accel string

// Accelerators.
const (
	KVM Accel = "kvm" // by the processor
	TCG Accel = "tcg" // by software emulation
)

// Link is the transport of the streams (see package link).
type Link string

// Links.
const (
	LinkVsock  Link = "vsock"  // AF_VSOCK through /dev/vhost-vsock
	LinkSerial Link = "serial" // a virtio-serial port
)

// Spec describes a machine. The zero value of a field means what its comment
// says.
type Spec struct {
	ID     string // required; see ValidID
	CPUs   int    // 1 to MaxCPUs; 0 means 1
	Memory int64  // bytes, a multiple of MiB, at least MinMemory; 0 means DefaultMemory
	Kernel string // path of an uncompressed ELF kernel; required
	Initrd string // path of an initramfs whose /init is the guest agent; required
	Root   string // path of the root disk, attached read-only; required
	Accel  Accel  // "" means TCG
	Link   Link   // "" means the first of Features.Links

	// RandomizeAddresses keeps the guest's address space randomisation where a
	// driver would turn it off for speed. See the drivers.
	RandomizeAddresses bool

	// Jail is where the VMM runs; the machine takes it over, whether Start succeeds or
	// not. nil means one with every layer.
	Jail *jail.Jail

	Saveable bool      // Machine.Save will be called
	From     *Snapshot // what the machine starts from, in place of a boot; nil means a boot
}

// Snapshot is a saved machine, in two files. Its Memory may be mapped by every
// machine that was started from it: it must never change. It holds no secret,
// if it was saved before the first stream was opened.
type Snapshot struct {
	Memory *os.File // as large as the machine's memory, with holes for zeros
	State  *os.File // of processors and devices, in the VMM's own format
}

// Limits of a Spec.
const (
	MaxCPUs       = 64
	MinMemory     = 64 << 20
	DefaultMemory = 256 << 20
	MaxMemory     = 1 << 40

	// Overhead is what a VMM may use beside its machine's memory, bytes.
	Overhead = 256 << 20
)

// Machine is a running machine. Safe for concurrent use.
type Machine interface {
	// Dial opens a stream to a port of the guest; the first must go to
	// guestrpc.PortHello. It waits until the guest is there, the machine has
	// ended (an *ExitError) or ctx ends.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Save waits until the guest agent waits for its first stream, stops the
	// machine and writes it to the files of s, from their beginning. Only for a
	// Spec with Saveable, and before the first Dial. The machine has ended when
	// Save returns.
	Save(ctx context.Context, s Snapshot) error
	// Done is closed when the machine has ended and nothing of it remains.
	Done() <-chan struct{}
	// Err says why the machine ended: nil while it runs and after Close ended
	// it, otherwise an *ExitError.
	Err() error
	// Close ends the machine at once, whatever the guest does, and waits until
	// nothing of it remains. Idempotent.
	Close() error
	// Info says what was started.
	Info() Info
}

// Info describes a running machine.
type Info struct {
	Driver  string        // its Features.Name
	PID     int           // of the VMM, 0 if there is none
	Accel   Accel         // in use
	Link    Link          // in use
	Command []string      // of the VMM
	Started time.Time     // when the VMM was started
	Ready   time.Duration // from there until it answered
	Running time.Duration // from there until the guest ran
	Cloned  bool          // from a snapshot, not booted
	Layers  layer.Report  // how the layers around the VMM stand, as the kernel tells it
}

// ExitError says how a machine ended that nobody closed.
type ExitError struct {
	Reason  string // "the guest's kernel panicked", "QEMU was killed by signal 9", ...
	Console string // the last of what the guest's console printed; hostile bytes, printable only
	Stderr  string // the last of what the VMM printed
}

func (e *ExitError) Error() string { return "the machine ended: " + e.Reason }

// Validate checks everything but the files, and fills in what is zero.
func (s *Spec) Validate(f Features) error {
	if s.CPUs == 0 {
		s.CPUs = 1
	}
	if s.Memory == 0 {
		s.Memory = DefaultMemory
	}
	if s.Accel == "" {
		s.Accel = TCG
	}
	if s.Link == "" && len(f.Links) > 0 {
		s.Link = f.Links[0]
	}
	switch {
	case !ValidID(s.ID):
		return fmt.Errorf("bad id %q: an id is 1 to 63 of a-z, 0-9 and -, and begins with a letter or digit", s.ID)
	case s.CPUs < 1 || s.CPUs > MaxCPUs:
		return fmt.Errorf("%d cpus: 1 to %d are possible", s.CPUs, MaxCPUs)
	case s.Memory < MinMemory || s.Memory > MaxMemory || s.Memory%(1<<20) != 0:
		return fmt.Errorf("memory of %d bytes: whole MiB from %d MiB are possible", s.Memory, MinMemory>>20)
	case s.Kernel == "" || s.Initrd == "" || s.Root == "":
		return fmt.Errorf("a machine needs a kernel, an initramfs and a root disk")
	case s.Saveable && s.From != nil:
		return fmt.Errorf("a machine that was started from a snapshot cannot be saved")
	case (s.Saveable || s.From != nil) && !slices.Contains(f.Snapshots, Mode{s.Accel, s.Link}):
		return ErrNoSnapshots
	}
	return nil
}

// ValidID reports whether id matches ^[a-z0-9][a-z0-9-]{0,62}$. Ids become
// parts of paths, host names and command lines, so every door checks them.
func ValidID(id string) bool {
	if len(id) < 1 || len(id) > 63 || id[0] == '-' {
		return false
	}
	for i := range len(id) {
		c := id[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return false
		}
	}
	return true
}

// Printable keeps what of a console's bytes can go to a terminal: a guest must
// not be able to move the cursor, set a title or answer in the user's name.
func Printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return r
		case r < ' ' || r >= 0x7f && r < 0xa0 || r == '\uFFFD':
			return -1
		case r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069: // bidirectional overrides
			return -1
		}
		return r
	}, string(b))
}
