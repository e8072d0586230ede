// Package vmtest is the suite that every driver passes: what package vm
// promises, and above all what happens when a machine, its VMM or its caller
// ends at a bad moment.
package vmtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Config says what to test.
type Config struct {
	Driver vm.Driver
	// Spec makes a valid Spec whose guest runs the guest agent.
	Spec func(t *testing.T) vm.Spec
	// Kill ends the machine's VMM from outside.
	Kill func(t *testing.T, m vm.Machine)
}

// Run runs the suite.
func Run(t *testing.T, c Config) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Config)
	}{
		{"Features", testFeatures},
		{"HelloAndPing", testHelloAndPing},
		{"ManyStreams", testManyStreams},
		{"StartContextBoundsTheCall", testStartContext},
		{"StartCancelled", testStartCancelled},
		{"BadSpecs", testBadSpecs},
		{"DialRefused", testDialRefused},
		{"DialCancelled", testDialCancelled},
		{"CloseTwice", testCloseTwice},
		{"CloseUnblocks", testCloseUnblocks},
		{"VMMDies", testVMMDies},
		{"TwoMachines", testTwoMachines},
		{"Snapshot", testSnapshot},
		{"SnapshotDamaged", testSnapshotDamaged},
		{"SaveCancelled", testSaveCancelled},
		{"SaveUnprepared", testSaveUnprepared},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

const deadline = 2 * time.Minute // for a boot under emulation on a loaded host

// boot starts a machine and greets its guest.
func boot(t *testing.T, c Config) (vm.Machine, []byte) {
	t.Helper()
	m := start(t, c)
	return m, hello(t, m)
}

func start(t *testing.T, c Config) vm.Machine {
	t.Helper()
	m, err := c.Driver.Start(t.Context(), c.Spec(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func hello(t *testing.T, m vm.Machine) (secret []byte) {
	t.Helper()
	conn := dial(t, m, guestrpc.PortHello)
	secret = bytes.Repeat([]byte{7}, 32)
	s := guestrpc.NewStream(conn)
	err := s.WriteHeader(&guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpHello, Hello: &guestrpc.Hello{
		Secret: secret, Entropy: bytes.Repeat([]byte{9}, 64), Hostname: "vmtest", Nonce: "n", Pids: 100,
	}})
	if err != nil {
		t.Fatal(err)
	}
	f, err := s.ReadFrame()
	for err == nil && f.Type == guestrpc.FrameClock {
		if err = s.WriteMessage(guestrpc.FrameClock, &guestrpc.Clock{Now: time.Now()}); err == nil {
			f, err = s.ReadFrame()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	var reply guestrpc.HelloReply
	if err := f.Decode(&reply); f.Type != guestrpc.FrameHello || err != nil || reply.Nonce != "n" {
		t.Fatalf("hello answered by frame %d %q, %v", f.Type, f.Payload, err)
	}
	s.WriteFrame(guestrpc.FrameAck, nil)
	return secret
}

func dial(t *testing.T, m vm.Machine, port uint32) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	conn, err := m.Dial(ctx, port)
	if err != nil {
		t.Fatalf("dial port %d: %v", port, err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(deadline))
	return conn
}

// ping sends n random bytes to the agent and back, frame by frame.
func ping(conn net.Conn, secret []byte, n int) error {
	s := guestrpc.NewStream(conn)
	if err := s.WriteHeader(&guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpPing, Secret: secret}); err != nil {
		return err
	}
	for n > 0 {
		b := make([]byte, min(n, guestrpc.MaxFrame))
		rand.Read(b)
		if err := s.WriteFrame(guestrpc.FrameData, b); err != nil {
			return err
		}
		f, err := s.ReadFrame()
		if err != nil {
			return err
		}
		if f.Type != guestrpc.FrameData || !bytes.Equal(f.Payload, b) {
			return fmt.Errorf("frame of type %d, %d bytes came back changed", f.Type, len(b))
		}
		n -= len(b)
	}
	return s.WriteFrame(guestrpc.FrameData, nil)
}

func testFeatures(t *testing.T, c Config) {
	f := c.Driver.Features()
	if f.Name == "" || f.Version == "" || len(f.Accels) == 0 || len(f.Links) == 0 {
		t.Errorf("incomplete features: %+v", f)
	}
	if again := c.Driver.Features(); fmt.Sprint(again) != fmt.Sprint(f) {
		t.Errorf("features changed from %+v to %+v", f, again)
	}
}

func testHelloAndPing(t *testing.T, c Config) {
	m, secret := boot(t, c)
	if err := ping(dial(t, m, guestrpc.PortAgent), secret, 1<<20); err != nil {
		t.Error(err)
	}
	if err := m.Err(); err != nil {
		t.Errorf("a running machine has the error %v", err)
	}
	info := m.Info()
	if info.Driver != c.Driver.Features().Name || info.Accel == "" || info.Link == "" || info.Started.IsZero() {
		t.Errorf("incomplete info: %+v", info)
	}
}

func testManyStreams(t *testing.T, c Config) {
	m, secret := boot(t, c)
	var wg sync.WaitGroup
	for range 20 {
		conn := dial(t, m, guestrpc.PortAgent)
		wg.Go(func() {
			if err := ping(conn, secret, 100_000); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// The context of Start bounds the call and not the machine's life.
func testStartContext(t *testing.T, c Config) {
	ctx, cancel := context.WithCancel(t.Context())
	m, err := c.Driver.Start(ctx, c.Spec(t))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	cancel()
	secret := hello(t, m)
	if err := ping(dial(t, m, guestrpc.PortAgent), secret, 10); err != nil {
		t.Error(err)
	}
}

func testStartCancelled(t *testing.T, c Config) {
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	m, err := c.Driver.Start(ctx, c.Spec(t))
	if err == nil {
		m.Close()
		t.Fatal("started with a cancelled context")
	}
	if !errors.Is(err, cause) {
		t.Errorf("error %q does not say why", err)
	}
}

func testBadSpecs(t *testing.T, c Config) {
	empty := t.TempDir() + "/empty"
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*vm.Spec){
		"no id":             func(s *vm.Spec) { s.ID = "" },
		"hostile id":        func(s *vm.Spec) { s.ID = "../x" },
		"long id":           func(s *vm.Spec) { s.ID = strings.Repeat("a", 64) },
		"too many cpus":     func(s *vm.Spec) { s.CPUs = 1000 },
		"negative cpus":     func(s *vm.Spec) { s.CPUs = -1 },
		"little memory":     func(s *vm.Spec) { s.Memory = 1 << 20 },
		"odd memory":        func(s *vm.Spec) { s.Memory = 256<<20 + 1 },
		"huge memory":       func(s *vm.Spec) { s.Memory = 1 << 60 },
		"no kernel":         func(s *vm.Spec) { s.Kernel = "" },
		"kernel absent":     func(s *vm.Spec) { s.Kernel += ".absent" },
		"kernel directory":  func(s *vm.Spec) { s.Kernel = t.TempDir() },
		"empty initramfs":   func(s *vm.Spec) { s.Initrd = empty },
		"root disk absent":  func(s *vm.Spec) { s.Root += ".absent" },
		"root disk a fifo?": func(s *vm.Spec) { s.Root = "/dev/null" },
	} {
		t.Run(name, func(t *testing.T) {
			spec := c.Spec(t)
			change(&spec)
			m, err := c.Driver.Start(t.Context(), spec)
			if err == nil {
				m.Close()
				t.Fatal("started")
			}
		})
	}
}

func testDialRefused(t *testing.T, c Config) {
	m, secret := boot(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if _, err := m.Dial(ctx, 4711); !errors.Is(err, link.ErrRefused) {
		t.Errorf("dial of a port on which nobody listens: %v", err)
	}
	if err := ping(dial(t, m, guestrpc.PortAgent), secret, 10); err != nil {
		t.Errorf("after a refused dial: %v", err)
	}
}

// Dial ends with its context, long before a guest is there.
func testDialCancelled(t *testing.T, c Config) {
	m := start(t, c)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if conn, err := m.Dial(ctx, guestrpc.PortAgent); err == nil {
		conn.Close()
	} else if !errors.Is(err, cause) && !errors.Is(err, link.ErrRefused) {
		t.Errorf("dial with a cancelled context: %v", err)
	}
}

func testCloseTwice(t *testing.T, c Config) {
	m, _ := boot(t, c)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			select {
			case <-m.Done():
			default:
				t.Error("Close returned before the end")
			}
		})
	}
	wg.Wait()
	if err := m.Err(); err != nil {
		t.Errorf("a machine that was closed has the error %v", err)
	}
	if _, err := m.Dial(t.Context(), guestrpc.PortAgent); !errors.Is(err, link.ErrClosed) {
		t.Errorf("dial after Close: %v", err)
	}
	if pid := m.Info().PID; pid != 0 {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			t.Errorf("process %d is still there", pid)
		}
	}
}

// Close ends reads, writes and dials that are waiting.
func testCloseUnblocks(t *testing.T, c Config) {
	m, secret := boot(t, c)
	conn := dial(t, m, guestrpc.PortAgent)
	s := guestrpc.NewStream(conn)
	if err := s.WriteHeader(&guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpPing, Secret: secret}); err != nil {
		t.Fatal(err)
	}
	read := make(chan error)
	go func() {
		_, err := io.ReadFull(conn, make([]byte, 1))
		read <- err
	}()
	m.Close()
	if err := <-read; !ended(err) {
		t.Errorf("a read that waited for a closed machine: %v", err)
	}
}

// ended reports whether err is one of those by which callers know that a stream's
// machine has ended, or its peer: whichever the transport notices first.
func ended(err error) bool {
	return errors.Is(err, link.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// A VMM that dies ends the machine, its streams and its dials, with the reason.
func testVMMDies(t *testing.T, c Config) {
	m, secret := boot(t, c)
	conn := dial(t, m, guestrpc.PortAgent)
	s := guestrpc.NewStream(conn)
	if err := s.WriteHeader(&guestrpc.Header{Version: guestrpc.Version, Op: guestrpc.OpPing, Secret: secret}); err != nil {
		t.Fatal(err)
	}
	c.Kill(t, m)
	if _, err := s.ReadFrame(); !ended(err) {
		t.Errorf("read from a dead machine: %v", err)
	}
	select {
	case <-m.Done():
	case <-time.After(deadline):
		t.Fatal("the machine does not know that it has ended")
	}
	var exit *vm.ExitError
	if err := m.Err(); !errors.As(err, &exit) || exit.Reason == "" {
		t.Errorf("a machine whose VMM died has the error %v", err)
	}
	if _, err := m.Dial(t.Context(), guestrpc.PortAgent); !errors.As(err, &exit) {
		t.Errorf("dial of a dead machine: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// Machines do not share anything: the end of one is not noticed by the other.
func testTwoMachines(t *testing.T, c Config) {
	a, secretA := boot(t, c)
	b, _ := boot(t, c)
	b.Close()
	if err := ping(dial(t, a, guestrpc.PortAgent), secretA, 10_000); err != nil {
		t.Error(err)
	}
}
