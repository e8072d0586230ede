package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/vm"
	"github.com/ironclaw-run/ironclaw/internal/vm/fakevm"
)

func TestFill(t *testing.T) {
	const mib = 1 << 20
	for name, c := range map[string]struct {
		opts Options
		want string // of the error, "" for none
	}{
		"nothing":                 {Options{}, ""},
		"name":                    {Options{Name: "a-1"}, ""},
		"name in capitals":        {Options{Name: "A"}, "bad name"},
		"name that is a path":     {Options{Name: "../a"}, "bad name"},
		"name too long":           {Options{Name: strings.Repeat("a", 64)}, "bad name"},
		"no processes":            {Options{Pids: -1}, "at least 1"},
		"disk of all memory":      {Options{Overlay: vm.DefaultMemory}, ""},
		"disk over the default":   {Options{Overlay: vm.DefaultMemory + mib}, "257 MiB does not fit the memory of 256 MiB"},
		"disk over the memory":    {Options{Memory: 512 * mib, Overlay: 513 * mib}, "does not fit"},
		"negative disk":           {Options{Overlay: -mib}, "does not fit"},
		"negative memory, a disk": {Options{Memory: -mib, Overlay: mib}, "does not fit"},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.opts.fill()
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %q", err, c.want)
			}
			if o := c.opts; err == nil && (o.Image != DefaultImage || o.Pids != DefaultPids || o.Memory != vm.DefaultMemory || o.Progress == nil) {
				t.Errorf("filled in as %+v", o)
			}
		})
	}
}

func TestChooseLink(t *testing.T) {
	both, serial := []vm.Link{vm.LinkVsock, vm.LinkSerial}, []vm.Link{vm.LinkSerial}
	for _, c := range []struct {
		have []vm.Link
		want string
		link vm.Link
		err  string
	}{
		{both, "", vm.LinkVsock, ""},
		{both, "auto", vm.LinkVsock, ""},
		{both, "serial", vm.LinkSerial, ""},
		{serial, "auto", vm.LinkSerial, ""},
		{serial, "vsock", "", "no access to /dev/vhost-vsock"},
		{serial, "pigeon", "", `unknown link "pigeon": there are auto, vsock and serial`},
	} {
		l, err := chooseLink(vm.Features{Links: c.have}, c.want)
		if l != c.link || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%v, %q: %q, %v", c.have, c.want, l, err)
		}
	}
}

func TestChooseAccel(t *testing.T) {
	h := Open(t.TempDir())
	for want, accel := range map[string]vm.Accel{"tcg": vm.TCG, "auto": vm.TCG, "": vm.TCG} {
		if got, err := h.chooseAccel(t.Context(), &fakevm.Driver{}, vm.Spec{}, want, nil); got != accel || err != nil {
			t.Errorf("%q: %q, %v", want, got, err)
		}
	}
	_, err := h.chooseAccel(t.Context(), &fakevm.Driver{}, vm.Spec{}, "kvm", nil)
	if e, ok := errors.AsType[*NoKVMError](err); !ok || !strings.Contains(e.Hint(), "--accel auto") {
		t.Errorf("kvm: %v", err)
	}
	if _, err = h.chooseAccel(t.Context(), &fakevm.Driver{}, vm.Spec{}, "warp", nil); err == nil || !strings.Contains(err.Error(), `unknown accelerator "warp"`) {
		t.Errorf("warp: %v", err)
	}
}

// Who may not open the device is told how to mend it.
func TestNoKVMHint(t *testing.T) {
	e := &NoKVMError{Reason: "no permission to open /dev/kvm"}
	if !strings.Contains(e.Hint(), KVMPermissionRemedy()) || !strings.Contains(e.Error(), e.Reason) {
		t.Errorf("%q, %q", e.Error(), e.Hint())
	}
}

func TestDefaultHome(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("IRONCLAW_HOME", "somewhere") // commands are run in other directories
	if got, err := DefaultHome(); got != wd+"/somewhere" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	t.Setenv("IRONCLAW_HOME", "")
	t.Setenv("XDG_DATA_HOME", "/data")
	want := "/data/ironclaw"
	if os.Geteuid() == 0 {
		want = "/var/lib/ironclaw"
	}
	if got, err := DefaultHome(); got != want || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

func TestIDsAreValid(t *testing.T) {
	seen := make(map[string]bool)
	for range 1000 {
		id := newID()
		if !vm.ValidID(id) || seen[id] {
			t.Fatalf("id %q", id)
		}
		seen[id] = true
	}
}

// helloOf reads the host's hello.
func helloOf(t testing.TB, g *guestEnd) guestrpc.Hello {
	h, err := g.ReadHeader()
	if err != nil || h.Hello == nil || len(h.Secret) > 0 {
		t.Errorf("hello: %+v, %v", h, err)
		return guestrpc.Hello{}
	}
	return *h.Hello
}

func TestGreet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told := make(chan guestrpc.Hello, 1)
		m := oneStream(t, func(g *guestEnd) {
			h := helloOf(t, g)
			told <- h
			g.send("hello", fmt.Sprintf(`{"version":%d,"nonce":%q,"kernel":"9.8.7"}`, guestrpc.Version, h.Nonce))
			g.want("ack")
			g.drain()
		})
		secret, reply, err := greet(t.Context(), m, guestrpc.Hello{Hostname: "x", Pids: 5, Overlay: 6})
		if err != nil || reply.Kernel != "9.8.7" {
			t.Fatalf("%+v, %v", reply, err)
		}
		h := <-told
		if string(h.Secret) != string(secret) || len(secret) != 32 || len(h.Entropy) < 32 ||
			h.Hostname != "x" || h.Pids != 5 || h.Overlay != 6 {
			t.Errorf("told %+v", h)
		}
	})
}

// A guest that does not answer as ours does is not spoken to any further.
func TestGreetHostile(t *testing.T) {
	for name, c := range map[string]struct{ answer, want string }{
		"wrong nonce":       {`< hello {"version":2,"nonce":"other"}`, errGuestProtocol.Error()},
		"no nonce":          {`< hello {"version":2}`, errGuestProtocol.Error()},
		"long nonce":        {`< hello {"version":2,"nonce":"` + strings.Repeat("x", 60_000) + `"}`, errGuestProtocol.Error()},
		"wrong version":     {`< hello {"version":4,"nonce":"NONCE"}`, "version 4"},
		"wrong frame":       {`< started {"pid":1}`, "frame 17 in place of hello"},
		"garbage":           {`< hello []`, errGuestProtocol.Error()},
		"error":             {`< error {"code":"internal","message":"set the clock: no"}`, "set the clock: no"},
		"error of garbage":  {`< error 1`, errGuestProtocol.Error()},
		"huge frame":        {`< raw 10ffffffff`, errGuestProtocol.Error()},
		"hangs up":          {`< close`, "EOF"},
		"hangs up half way": {"< raw 1000000010\n< close", "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := oneStream(t, func(g *guestEnd) {
					g.play(strings.ReplaceAll(c.answer, "NONCE", helloOf(t, g).Nonce))
				})
				_, _, err := greet(t.Context(), m, guestrpc.Hello{})
				if err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 600 {
					t.Errorf("error %.700v, want %q", err, c.want)
				}
			})
		})
	}
}

// A guest that says nothing is waited for as long as the caller wants, and never
// for ever.
func TestGreetSilence(t *testing.T) {
	cause := errors.New("enough")
	for name, guest := range map[string]func(*guestEnd){
		"takes nothing": func(*guestEnd) {},
		"says nothing":  func(g *guestEnd) { g.drain() },
		"stops half way": func(g *guestEnd) {
			go g.drain()
			g.conn.Write([]byte{byte(guestrpc.FrameHello), 0, 0, 0})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				go func() { synctest.Wait(); cancel(cause) }()
				if _, _, err := greet(ctx, oneStream(t, guest), guestrpc.Hello{}); !errors.Is(err, cause) {
					t.Errorf("cancelled: %v", err)
				}
			})
			synctest.Test(t, func(t *testing.T) { // the time in a bubble passes by itself
				_, _, err := greet(t.Context(), oneStream(t, guest), guestrpc.Hello{})
				if err == nil || !strings.Contains(err.Error(), "did not come up within") {
					t.Errorf("never ends: %v", err)
				}
			})
		})
	}
}

// A stream that breaks is the machine's end only if that ended.
func TestEnded(t *testing.T) {
	exit := &vm.ExitError{Reason: "killed"}
	other := errors.New("other")
	for name, c := range map[string]struct {
		machine error // of a machine that has ended; nil: closed by us
		alive   bool
		err     error
		want    error
	}{
		"eof":               {exit, false, io.EOF, exit},
		"in a frame":        {exit, false, io.ErrUnexpectedEOF, exit},
		"write":             {exit, false, &net.OpError{Op: "write", Err: syscall.EPIPE}, exit},
		"vsock":             {exit, false, &net.OpError{Op: "read", Err: syscall.ECONNRESET}, exit},
		"link":              {exit, false, &net.OpError{Op: "read", Err: link.ErrClosed}, exit},
		"said already":      {exit, false, fmt.Errorf("x: %w", exit), exit},
		"closed by us":      {nil, false, io.EOF, link.ErrClosed},
		"agent hung up":     {nil, true, io.EOF, io.EOF},
		"something else":    {nil, true, other, other},
		"nothing":           {nil, true, nil, nil},
		"protocol violated": {nil, true, errGuestProtocol, errGuestProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := &stubMachine{done: make(chan struct{}), err: c.machine}
				if !c.alive {
					close(m.done)
				}
				if err := (&Sandbox{machine: m}).ended(c.err); !errors.Is(err, c.want) {
					t.Errorf("%v became %v", c.err, err)
				}
			})
		})
	}
}

func TestPing(t *testing.T) {
	for name, c := range map[string]struct{ script, want string }{
		"same bytes":  {"> data hello\n< data hello\n> data", ""},
		"other bytes": {"> data hello\n< data hallo", "other bytes"},
		"fewer bytes": {"> data hello\n< data", "other bytes"},
		"other frame": {"> data hello\n< stdout hello", "other bytes"},
		"hangs up":    {"> data hello\n< close", "hung up"},
		"huge frame":  {"> data hello\n< raw 05ffffffff", errGuestProtocol.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := oneStream(t, func(g *guestEnd) {
					if h, err := g.ReadHeader(); err != nil || h.Op != guestrpc.OpPing || string(h.Secret) != "secret" {
						t.Errorf("header %+v, %v", h, err)
					}
					g.play(c.script)
				})
				err := (&Sandbox{machine: m, secret: []byte("secret")}).Ping(t.Context(), []byte("hello"))
				if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
					t.Errorf("error %v, want %q", err, c.want)
				}
			})
		})
	}
}

// What makes no sense does not reach the guest.
func TestStartValidates(t *testing.T) {
	s := &Sandbox{machine: &stubMachine{dial: func(context.Context, uint32) (net.Conn, error) {
		return nil, errors.New("it was dialled")
	}}}
	for _, cmd := range []Cmd{{}, {Args: []string{""}}, {Args: []string{"a", "b\x00"}}, {Args: []string{"a"}, Dir: "tmp"},
		{Args: []string{"a"}, Env: []string{"KEY"}}, {Args: []string{"a"}, User: "x\x00"}} {
		if _, err := s.Start(t.Context(), cmd); !errors.Is(err, guestrpc.ErrBadRequest) {
			t.Errorf("%+v: %v", cmd, err)
		}
	}
}

// A command too long for one header is refused by us, with the limit.
func TestCommandTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Sandbox{machine: oneStream(t, (*guestEnd).drain)}
		_, err := s.Start(t.Context(), Cmd{Args: []string{"echo", strings.Repeat("x", guestrpc.MaxHeader)}})
		if !errors.Is(err, guestrpc.ErrBadRequest) || !strings.Contains(err.Error(), "at most 4194304") {
			t.Errorf("start: %.200v", err)
		}
	})
}

// greeted is a sandbox without a host, in whose machine serve serves the streams.
func greeted(t *testing.T, serve func(*guestEnd)) (*Sandbox, *fakevm.Machine) {
	t.Helper()
	m, err := (&fakevm.Driver{Guest: agent(t, serve)}).Start(t.Context(), testSpec(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	secret, hello, err := greet(t.Context(), m, guestrpc.Hello{Hostname: "x"})
	if err != nil {
		t.Fatal(err)
	}
	return &Sandbox{machine: m, secret: secret, hello: hello}, m.(*fakevm.Machine)
}

// dying is such a sandbox whose machine dies when it is spoken to.
func dying(t *testing.T) *Sandbox {
	t.Helper()
	spoken := make(chan struct{})
	s, m := greeted(t, func(g *guestEnd) {
		g.ReadHeader()
		close(spoken)
		g.drain()
	})
	go func() {
		<-spoken
		m.Kill()
	}()
	return s
}

// Whenever the machine dies, the caller learns that and why.
func TestMachineDies(t *testing.T) {
	wantExit := func(t *testing.T, err error) {
		t.Helper()
		if e, ok := errors.AsType[*vm.ExitError](err); !ok || e.Reason != "killed" {
			t.Errorf("error %v", err)
		}
	}
	t.Run("during the start", func(t *testing.T) {
		_, err := dying(t).Start(t.Context(), Cmd{Args: []string{"x"}})
		wantExit(t, err)
	})
	t.Run("while it runs", func(t *testing.T) {
		s, m := greeted(t, func(g *guestEnd) {
			g.ReadHeader()
			g.play(`< started {"pid":1}`)
		})
		p, err := s.Start(t.Context(), Cmd{Args: []string{"x"}, Stdin: zeros{}})
		if err != nil {
			t.Fatal(err)
		}
		m.Kill()
		_, err = p.Wait(t.Context())
		wantExit(t, err)
		_, err = s.Start(t.Context(), Cmd{Args: []string{"x"}})
		wantExit(t, err)
		wantExit(t, s.Ping(t.Context(), nil))
	})
	t.Run("during a ping", func(t *testing.T) {
		wantExit(t, dying(t).Ping(t.Context(), []byte("x")))
	})
}

// agent is an honest guest agent whose streams but the first are served by
// serve.
func agent(t testing.TB, serve func(*guestEnd)) func(link.Guest) {
	return func(l link.Guest) {
		var wg sync.WaitGroup
		defer wg.Wait()
		defer l.Close()
		hello, err := l.Listen(guestrpc.PortHello)
		if err != nil {
			return
		}
		conn, err := hello.Accept()
		if err != nil {
			return // the machine was closed; so below
		}
		streams := answerHello(t, l, conn)
		if streams == nil {
			return
		}
		for {
			conn, err := streams.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				serve(&guestEnd{t, conn, guestrpc.NewStream(conn)})
			})
		}
	}
}

func answerHello(t testing.TB, l link.Guest, conn net.Conn) net.Listener {
	defer conn.Close()
	g := &guestEnd{t, conn, guestrpc.NewStream(conn)}
	h, err := g.ReadHeader()
	if err != nil || h.Hello == nil {
		return nil
	}
	streams, err := l.Listen(guestrpc.PortAgent)
	if err != nil {
		return nil
	}
	g.send("hello", fmt.Sprintf(`{"version":%d,"nonce":%q,"kernel":"9.8.7"}`, guestrpc.Version, h.Hello.Nonce))
	g.drain()
	return streams
}
