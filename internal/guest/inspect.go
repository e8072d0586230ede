package guest

import (
	"net"
	"slices"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/seccomp"
)

// inspectTimeout bounds an inspect, for a host that stops reading.
const inspectTimeout = 30 * time.Second

// inspect serves an inspect stream: what was refused, and how commands stand.
func (a *Agent) inspect(conn net.Conn, st *guestrpc.Stream) error {
	conn.SetDeadline(time.Now().Add(inspectTimeout))
	dropped := 0
	if a.confiner != nil {
		var kept []seccomp.Denial
		kept, dropped = a.confiner.ring.Read()
		for i := range kept {
			if err := st.WriteMessage(guestrpc.FrameDenial, denialMessage(&kept[i])); err != nil {
				return err
			}
		}
		for _, p := range a.commands() {
			m, err := confined(p)
			if err != nil {
				continue // it has ended meanwhile
			}
			if err := st.WriteMessage(guestrpc.FrameConfined, m); err != nil {
				return err
			}
		}
	}
	if err := st.WriteMessage(guestrpc.FrameInspected, &guestrpc.Inspected{Dropped: dropped}); err != nil {
		return err
	}
	awaitAck(st)
	return nil
}

func denialMessage(d *seccomp.Denial) *guestrpc.Denial {
	return &guestrpc.Denial{
		First: d.Time, Last: d.Last, Count: d.Count, PID: d.PID, UID: d.UID, Comm: d.Comm, Profile: d.Profile,
		Arch: int(d.Data.Arch), Number: int(d.Data.Number), Args: slices.Clone(d.Data.Args[:]), Allowed: d.Allowed,
	}
}

// commands are those that run, at most maxExecs.
func (a *Agent) commands() []*process {
	a.mu.Lock()
	defer a.mu.Unlock()
	var list []*process
	for p := range a.running {
		list = append(list, p)
	}
	slices.SortFunc(list, func(x, y *process) int { return x.pid - y.pid })
	return list
}

// runs notes that a command runs, until the returned function is called.
func (a *Agent) runs(p *process) (ended func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.running[p] = true
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.running, p)
	}
}
