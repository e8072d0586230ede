package sandbox

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/seccomp"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Denial is a system call of a command that was refused, or noted only. All of it
// is the guest's word: to be shown, never to decide by. Texts are printable.
type Denial struct {
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
	Count   int       `json:"count"` // how often the same thread did the same
	PID     int       `json:"pid"`   // 0 if it is not known
	UID     int       `json:"uid"`   // -1 if it is not known
	Comm    string    `json:"comm,omitempty"`
	Profile string    `json:"profile"`
	Call    string    `json:"call"` // its name, or number
	Args    []uint64  `json:"args"`
	Allowed bool      `json:"allowed"` // it was noted and let pass
}

// String is the denial in a line.
func (d Denial) String() string {
	who := "?"
	if d.Comm != "" {
		who = fmt.Sprintf("%s (pid %d, uid %d)", d.Comm, d.PID, d.UID)
	}
	args := make([]string, len(d.Args))
	for i, a := range d.Args {
		args[i] = fmt.Sprintf("%#x", a)
	}
	verdict := "refused"
	if d.Allowed {
		verdict = "noted"
	}
	return fmt.Sprintf("%s: %s %d× %s(%s) by profile %s", who, verdict, d.Count, d.Call, strings.Join(args, ", "), d.Profile)
}

// Confined is what the guest's kernel says of a command that runs, as told by the
// guest: to be shown, never to decide by.
type Confined = guestrpc.Confined

// Inspection is what a guest says of its commands' confinement.
type Inspection struct {
	Denials  []Denial   `json:"denials"` // the oldest first
	Dropped  int        `json:"dropped"` // denials that the guest did not keep
	Commands []Confined `json:"commands"`
}

// Denials returns the system calls that were refused, the oldest first, and how many
// more there were that the guest did not keep.
func (s *Sandbox) Denials(ctx context.Context) (denials []Denial, dropped int, err error) {
	i, err := s.Inspect(ctx)
	if err != nil {
		return nil, 0, err
	}
	return i.Denials, i.Dropped, nil
}

// Inspect asks the guest agent what was refused and what its kernel says of the
// commands that run. ctx bounds the call.
func (s *Sandbox) Inspect(ctx context.Context) (*Inspection, error) {
	conn, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	i, err := s.inspect(conn)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("inspect the guest: %w", s.ended(err))
	}
	return i, nil
}

func (s *Sandbox) inspect(conn net.Conn) (*Inspection, error) {
	stream := guestrpc.NewStream(conn)
	if err := stream.WriteHeader(s.header(guestrpc.OpInspect, nil)); err != nil {
		return nil, err
	}
	i := new(Inspection)
	for {
		frame, err := readFrame(stream)
		if err != nil {
			return nil, err
		}
		switch {
		case frame.Type == guestrpc.FrameDenial && len(i.Denials) < guestrpc.MaxDenials:
			err = i.addDenial(frame)
		case frame.Type == guestrpc.FrameConfined && len(i.Commands) < guestrpc.MaxConfined:
			err = i.addCommand(frame)
		case frame.Type == guestrpc.FrameInspected:
			var end guestrpc.Inspected
			if err := decode(frame, &end); err != nil {
				return nil, err
			}
			i.Dropped = max(end.Dropped, 0)
			return i, stream.WriteFrame(guestrpc.FrameAck, nil)
		case frame.Type == guestrpc.FrameError:
			return nil, remoteError(frame)
		default:
			err = fmt.Errorf("%w: frame %d in an inspect", errGuestProtocol, frame.Type)
		}
		if err != nil {
			return nil, err
		}
	}
}

// maxWord bounds a word of the guest's that is shown, in bytes.
const maxWord = 64

// word makes a word of the guest's fit to be shown.
func word(s string) string {
	s = strings.ReplaceAll(vm.Printable([]byte(s[:min(len(s), maxWord)])), "\n", " ")
	return strings.TrimSpace(s)
}

func (i *Inspection) addDenial(frame guestrpc.Frame) error {
	var m guestrpc.Denial
	if err := decode(frame, &m); err != nil {
		return err
	}
	if len(m.Args) > 6 || m.Count < 1 {
		return fmt.Errorf("%w: a denial of %d arguments, %d times", errGuestProtocol, len(m.Args), m.Count)
	}
	d := Denial{
		First: m.First, Last: m.Last, Count: m.Count, PID: m.PID, UID: m.UID, Comm: word(m.Comm), Profile: word(m.Profile),
		Call: fmt.Sprintf("call %d of architecture %#x", m.Number, m.Arch), Args: slices.Clone(m.Args), Allowed: m.Allowed,
	}
	if name := seccomp.Name(m.Number); m.Arch == unix.AUDIT_ARCH_X86_64 && name != "" {
		d.Call = name
	}
	i.Denials = append(i.Denials, d)
	return nil
}

func (i *Inspection) addCommand(frame guestrpc.Frame) error {
	var m guestrpc.Confined
	if err := decode(frame, &m); err != nil {
		return err
	}
	if len(m.Without) > len(guestrpc.Layers()) {
		return fmt.Errorf("%w: a command without %d layers", errGuestProtocol, len(m.Without))
	}
	m.Profile = word(m.Profile)
	for j := range m.Without {
		m.Without[j] = word(m.Without[j])
	}
	i.Commands = append(i.Commands, m)
	return nil
}

// guestLayers are the layers of set that the guest's commands go without.
func guestLayers(set layer.Set) []string {
	var names []string
	for _, n := range set.Names() {
		if n.Guest() {
			names = append(names, string(n))
		}
	}
	return names
}

// checkConfinement refuses what no guest can do.
func checkConfinement(profile string, without layer.Set) error {
	if profile != "" && !slices.Contains(guestrpc.Profiles(), profile) {
		return fmt.Errorf("unknown seccomp profile %q: there are %s", profile, strings.Join(guestrpc.Profiles(), ", "))
	}
	if profile != "" && without.Has(layer.GuestSeccomp) {
		return fmt.Errorf("a seccomp profile, %s, and none at all: only one can be meant", profile)
	}
	for _, name := range guestLayers(without) {
		switch {
		case layer.Name(name) == layer.GuestUser:
			return fmt.Errorf("to go without the layer %s, name another user for the command", name)
		case !slices.Contains(guestrpc.Layers(), name):
			return fmt.Errorf("no sandbox can go without the layer %s", name)
		}
	}
	return nil
}
