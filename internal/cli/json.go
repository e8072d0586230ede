package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// runResult is what run --json prints.
type runResult struct {
	ID       string             `json:"id,omitempty"`
	Image    string             `json:"image,omitempty"`  // digest
	Kernel   string             `json:"kernel,omitempty"` // release
	Driver   string             `json:"driver,omitempty"`
	Accel    vm.Accel           `json:"accel,omitempty"`
	Link     vm.Link            `json:"link,omitempty"`
	Code     int                `json:"exit_code"` // ironclaw's own
	Signal   int                `json:"signal,omitempty"`
	OOM      bool               `json:"oom"`
	TimedOut bool               `json:"timed_out"`
	Error    string             `json:"error,omitempty"`
	CPU      float64            `json:"cpu_ms"`     // of the command, user and system
	Cloned   bool               `json:"cloned"`     // from a template, not booted
	Timings  map[string]float64 `json:"timings_ms"` // of ironclaw, by phase
	VMM      map[string]float64 `json:"vmm_ms"`     // moments since the VMM was started
	Guest    map[string]float64 `json:"guest_ms"`   // of the guest's boot, since its kernel's start; not of a clone
	Total    float64            `json:"total_ms"`
}

func (r *runner) reportJSON(err error) {
	res := runResult{
		Code:    r.app.code,
		Timings: make(map[string]float64),
		VMM:     make(map[string]float64),
		Guest:   make(map[string]float64),
		Total:   ms(time.Since(r.begun)),
	}
	for _, p := range r.phases {
		res.Timings[p.Name] = ms(p.Duration)
	}
	if err != nil {
		res.Error = vm.Printable([]byte(err.Error())) // JSON escapes less than a terminal obeys
		res.TimedOut = res.Code == exitTimeout
	}
	if s := r.sandbox; s != nil {
		info, t := s.Machine().Info(), s.Hello().Timings
		res.ID, res.Image, res.Kernel = s.ID(), s.Image().Digest, s.Kernel().Release
		res.Driver, res.Accel, res.Link = info.Driver, info.Accel, info.Link
		res.Cloned = info.Cloned
		for name, at := range map[string]time.Duration{
			"ready": info.Ready, "running": info.Running,
			"hello": since(info.Started, r.created), "started": since(info.Started, r.started), "first_output": since(info.Started, r.firstOutput()),
		} {
			if at > 0 {
				res.VMM[name] = ms(at)
			}
		}
		if !info.Cloned {
			for name, d := range map[string]time.Duration{
				"init": t.Init, "modules": t.Modules, "root": t.Root, "agent": t.Agent, "hello": t.Hello,
			} {
				res.Guest[name] = ms(d)
			}
		}
	}
	if r.ended {
		res.Signal, res.OOM = r.exit.Signal, r.exit.OOM
		res.CPU = ms(r.exit.User + r.exit.System)
	}
	a := r.app
	a.ui.mu.Lock()
	defer a.ui.mu.Unlock()
	writeJSON(a.ui.w, res, "")
}

// since is the time from begun to at; less than nothing if at never came.
func since(begun, at time.Time) time.Duration {
	if at.IsZero() {
		return -1
	}
	return at.Sub(begun)
}

// writeJSON prints v; indent is "" for one line.
func writeJSON(w io.Writer, v any, indent string) {
	enc := json.NewEncoder(w)
	enc.SetIndent("", indent)
	if err := enc.Encode(v); err != nil {
		fmt.Fprintf(w, "{\"error\":%q}\n", err.Error())
	}
}
