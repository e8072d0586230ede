package fakevm_test

import (
	"crypto/subtle"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/vm"
	"github.com/ironclaw-run/ironclaw/internal/vm/fakevm"
	"github.com/ironclaw-run/ironclaw/internal/vm/vmtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// What is tested on fake machines holds for real ones only as long as both pass
// the same suite.
func TestDriver(t *testing.T) {
	vmtest.Run(t, vmtest.Config{
		Driver: &fakevm.Driver{Guest: serve},
		Spec:   spec,
		Kill:   func(_ *testing.T, m vm.Machine) { m.(*fakevm.Machine).Kill() },
	})
}

func spec(t *testing.T) vm.Spec {
	t.Helper()
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return vm.Spec{ID: "vmtest", Kernel: file("kernel"), Initrd: file("initrd"), Root: file("root")}
}

// serve is a guest agent that knows hello and ping: the real one changes the
// machine that it runs on.
func serve(g link.Guest) {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer g.Close()
	hello, err := g.Listen(guestrpc.PortHello)
	if err != nil {
		return
	}
	conn, err := hello.Accept()
	if err != nil {
		return
	}
	secret, streams := greet(conn, g)
	if streams == nil {
		return
	}
	for {
		conn, err := streams.Accept()
		if err != nil {
			return
		}
		wg.Go(func() { echo(conn, secret) })
	}
}

// greet answers hello. The port of the agent opens before the answer.
func greet(conn net.Conn, g link.Guest) (secret []byte, streams net.Listener) {
	defer conn.Close()
	st := guestrpc.NewStream(conn)
	h, err := st.ReadHeader()
	if err != nil || h.Hello == nil {
		return nil, nil
	}
	if streams, err = g.Listen(guestrpc.PortAgent); err != nil {
		return nil, nil
	}
	err = st.WriteMessage(guestrpc.FrameHello, &guestrpc.HelloReply{Version: guestrpc.Version, Nonce: h.Hello.Nonce})
	if err != nil {
		return nil, nil
	}
	st.ReadFrame() // the acknowledgement
	return h.Hello.Secret, streams
}

// echo serves a ping.
func echo(conn net.Conn, secret []byte) {
	defer conn.Close()
	st := guestrpc.NewStream(conn)
	h, err := st.ReadHeader()
	if err != nil || h.Op != guestrpc.OpPing || subtle.ConstantTimeCompare(h.Secret, secret) != 1 {
		return
	}
	for {
		f, err := st.ReadFrame()
		if err != nil || len(f.Payload) == 0 || st.WriteFrame(guestrpc.FrameData, f.Payload) != nil {
			return
		}
	}
}
