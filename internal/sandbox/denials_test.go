package sandbox

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/layer"
)

// inspectWith asks a guest that guest is.
func inspectWith(t *testing.T, guest func(g *guestEnd)) (*Inspection, error) {
	t.Helper()
	s := &Sandbox{machine: oneStream(t, func(g *guestEnd) {
		h, err := g.ReadHeader()
		if err != nil || h.Op != guestrpc.OpInspect {
			t.Errorf("%+v, %v", h, err)
		}
		guest(g)
		g.drain()
	})}
	return s.Inspect(t.Context())
}

func aDenial() *guestrpc.Denial {
	return &guestrpc.Denial{
		First: time.Unix(1, 0), Last: time.Unix(2, 0), Count: 3, PID: 4, UID: 5, Comm: "sh", Profile: "default",
		Arch: unix.AUDIT_ARCH_X86_64, Number: 165, Args: []uint64{1, 0xffffffffffffffff},
	}
}

func TestInspect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i, err := inspectWith(t, func(g *guestEnd) {
			d := aDenial()
			g.WriteMessage(guestrpc.FrameDenial, d)
			d.Number, d.Comm, d.Allowed = 9999, "a\x1b[2Jb\nc"+strings.Repeat("x", 1000), true
			g.WriteMessage(guestrpc.FrameDenial, d)
			d.Number, d.Arch, d.Comm = 20, 0x40000003, ""
			g.WriteMessage(guestrpc.FrameDenial, d)
			g.WriteMessage(guestrpc.FrameConfined, &guestrpc.Confined{PID: 9, Profile: "strict", Seccomp: 2, Without: []string{"a\x07"}})
			g.WriteMessage(guestrpc.FrameInspected, &guestrpc.Inspected{Dropped: 7})
			g.want("ack")
		})
		if err != nil || i.Dropped != 7 || len(i.Denials) != 3 || len(i.Commands) != 1 {
			t.Fatalf("%+v, %v", i, err)
		}
		for j, want := range []string{
			"sh (pid 4, uid 5): refused 3× mount(0x1, 0xffffffffffffffff) by profile default",
			"a[2Jb c" + strings.Repeat("x", maxWord-8) + " (pid 4, uid 5): noted 3× call 9999 of architecture 0xc000003e(0x1, 0xffffffffffffffff) by profile default",
			"?: noted 3× call 20 of architecture 0x40000003(0x1, 0xffffffffffffffff) by profile default",
		} {
			if got := i.Denials[j].String(); got != want {
				t.Errorf("%q, want %q", got, want)
			}
		}
		if c := i.Commands[0]; c.PID != 9 || c.Profile != "strict" || c.Without[0] != "a" {
			t.Errorf("%+v", c)
		}
	})
}

// A guest can make the host neither keep more than the protocol's bounds nor wait
// for ever.
func TestInspectHostile(t *testing.T) {
	endless := func(typ guestrpc.Type, m guestrpc.Message) func(*guestEnd) {
		return func(g *guestEnd) {
			for g.WriteMessage(typ, m) == nil {
			}
		}
	}
	many, none := aDenial(), aDenial()
	many.Args = make([]uint64, 7)
	none.Count = 0
	for name, guest := range map[string]func(*guestEnd){
		"denials without end":  endless(guestrpc.FrameDenial, aDenial()),
		"commands without end": endless(guestrpc.FrameConfined, &guestrpc.Confined{}),
		"too many arguments":   endless(guestrpc.FrameDenial, many),
		"none of a denial":     endless(guestrpc.FrameDenial, none),
		"too many layers":      endless(guestrpc.FrameConfined, &guestrpc.Confined{Without: make([]string, 100)}),
		"another frame":        func(g *guestEnd) { g.send("stdout", "x") },
		"a broken frame":       func(g *guestEnd) { g.WriteFrame(guestrpc.FrameDenial, []byte{1}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if i, err := inspectWith(t, guest); !errors.Is(err, errGuestProtocol) {
					t.Errorf("%+v, %v", i, err)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		_, err := inspectWith(t, func(g *guestEnd) { g.send("error", `{"code":"internal","message":"no"}`) })
		if !errors.Is(err, guestrpc.ErrInternal) {
			t.Error(err)
		}
	})
}

// The layers in the guest are called by one name on both sides.
func TestGuestLayersAreLayers(t *testing.T) {
	for _, name := range guestrpc.Layers() {
		if n := layer.Name(name); n.What() == "" || !n.Guest() {
			t.Errorf("%s is no layer of the guest", name)
		}
	}
}

func TestCheckConfinement(t *testing.T) {
	set := func(names ...layer.Name) layer.Set {
		s := layer.Set{}
		for _, n := range names {
			s[n] = true
		}
		return s
	}
	for _, c := range []struct {
		profile string
		without layer.Set
		want    string // "" means that it is fine
	}{
		{"", nil, ""},
		{"strict", set(layer.GuestDevices, layer.GuestCapabilities, layer.GuestProcesses), ""},
		{"", set(layer.GuestSeccomp, layer.Network), ""},
		{"strict", set(layer.GuestSeccomp), "only one can be meant"},
		{"none", nil, "unknown seccomp profile"},
		{"", set(layer.GuestUser), "name another user"},
		{"", set(layer.GuestNoNewPrivs), "no sandbox can go without"},
		{"", set(layer.GuestCgroup), "no sandbox can go without"},
	} {
		err := checkConfinement(c.profile, c.without)
		if got := fmt.Sprint(err); (err == nil) != (c.want == "") || !strings.Contains(got, c.want) && c.want != "" {
			t.Errorf("%q without %v: %v", c.profile, c.without, err)
		}
	}
	if got := guestLayers(set(layer.Network, layer.GuestDevices, layer.GuestSeccomp)); !slices.Equal(got, []string{"guest-seccomp", "guest-devices"}) {
		t.Errorf("%v", got)
	}
}
