package hostile

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
)

func TestScenario(t *testing.T) {
	for _, tc := range [][2]string{
		{"hostile-mux-garbage-12x3", "mux-garbage"},
		{"hostile-exec-1x1", "exec"},
		{"hostile-exec", "exec"},
		{"", ""},
	} {
		if got := scenario(tc[0]); got != tc[1] {
			t.Errorf("scenario(%q) = %q, want %q", tc[0], got, tc[1])
		}
	}
	if len(escapes()) < 50<<10 || len(escapes()) > guestrpc.MaxFrame-100 {
		t.Errorf("escapes of %d bytes", len(escapes()))
	}
}

// host runs the host's side against a hostile agent with this host name, over a
// serial port, and returns how hello ended.
func host(t *testing.T, hostname string, then func(m *link.Mux)) error {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan error, 1)
	m := link.NewMux(ours, link.HostSide)
	defer m.Close()
	go func() { done <- Serial(theirs) }()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	conn, err := m.Dial(ctx, guestrpc.PortHello)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	st := guestrpc.NewStream(conn)
	err = st.WriteHeader(&guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpHello, Hello: &guestrpc.Hello{Hostname: hostname, Nonce: "n"}})
	if err != nil {
		return err
	}
	f, err := st.ReadFrame()
	if err != nil {
		return err
	}
	var reply guestrpc.HelloReply
	if f.Type != guestrpc.FrameHello || f.Decode(&reply) != nil || reply.Nonce != "n" {
		return errors.New("no honest hello")
	}
	if err := st.WriteFrame(guestrpc.FrameAck, nil); err != nil {
		return err
	}
	if then != nil {
		then(m)
	}
	return nil
}

// The agent does what the host name says: on the mux, in hello, and after an honest
// hello in a command.
func TestSerial(t *testing.T) {
	if err := host(t, Prefix+"mux-garbage-1", nil); !errors.Is(err, link.ErrProtocol) {
		t.Errorf("mux: %v", err)
	}
	if err := host(t, Prefix+"hello-nonce-1", nil); err == nil || !strings.Contains(err.Error(), "no honest hello") {
		t.Errorf("hello: %v", err)
	}
	err := host(t, Prefix+Exec+"-1", func(m *link.Mux) {
		conn, err := m.Dial(t.Context(), guestrpc.PortAgent)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		st := guestrpc.NewStream(conn)
		err = st.WriteHeader(&guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpExec, Exec: &guestrpc.Exec{Args: []string{"exec-no-started"}}})
		if err != nil {
			t.Fatal(err)
		}
		if f, err := st.ReadFrame(); err != nil || f.Type != guestrpc.FrameExit {
			t.Errorf("exec: frame %d, %v", f.Type, err)
		}
	})
	if err != nil {
		t.Error(err)
	}
}
