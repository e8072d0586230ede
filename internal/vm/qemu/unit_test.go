package qemu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/ironclaw-run/ironclaw/internal/golden"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

func TestMain(m *testing.M) {
	jail.Init()
	goleak.VerifyTestMain(m)
}

// The command line as text: each option is there for a reason (command.go), and
// a snapshot will depend on all of them.
func TestCommand(t *testing.T) {
	base := vm.Spec{ID: "x", CPUs: 1, Memory: 256 << 20, Kernel: "/k/vmlinux", Initrd: "/k/initrd", Root: "/i/a,b"}
	for name, change := range map[string]func(*vm.Spec){
		"tcg-serial":     func(s *vm.Spec) { s.Accel, s.Link = vm.TCG, vm.LinkSerial },
		"tcg-serial-smp": func(s *vm.Spec) { s.Accel, s.Link, s.CPUs, s.Memory = vm.TCG, vm.LinkSerial, 4, 1<<30 },
		"kvm-vsock":      func(s *vm.Spec) { s.Accel, s.Link = vm.KVM, vm.LinkVsock },
		"saveable":       func(s *vm.Spec) { s.Accel, s.Link, s.Saveable = vm.TCG, vm.LinkSerial, true },
		"clone":          func(s *vm.Spec) { s.Accel, s.Link, s.From = vm.TCG, vm.LinkSerial, new(vm.Snapshot) },
		"clone-qemu10":   func(s *vm.Spec) { s.Accel, s.Link, s.From = vm.TCG, vm.LinkSerial, new(vm.Snapshot) },
		"tcg-aslr":       func(s *vm.Spec) { s.Accel, s.Link, s.RandomizeAddresses = vm.TCG, vm.LinkSerial, true },
		"tcg-qemu10":     func(s *vm.Spec) { s.Accel, s.Link = vm.TCG, vm.LinkSerial },
	} {
		t.Run(name, func(t *testing.T) {
			spec := base
			change(&spec)
			d := testDriver("7.2.22")
			if strings.HasSuffix(name, "qemu10") {
				d = testDriver("10.0.2")
			}
			got := strings.Join(d.command(&spec, paths{spec.Root, insideKernel, insideInitrd}, 4711), "\n") + "\n"
			path := filepath.Join("testdata", name+".golden")
			golden.Check(t, path, got)
		})
	}
}

func testDriver(version string) *Driver {
	return &Driver{program: "qemu", version: version, facts: &facts{d: factsData{TSCKHz: 2600000}}}
}

// No machine ever has a network device, a graphic card or a monitor socket.
func TestCommandHasNoNetwork(t *testing.T) {
	for _, l := range []vm.Link{vm.LinkSerial, vm.LinkVsock} {
		for _, a := range []vm.Accel{vm.TCG, vm.KVM} {
			spec := vm.Spec{ID: "x", CPUs: 2, Memory: 1 << 30, Kernel: "k", Initrd: "i", Root: "r", Accel: a, Link: l}
			line := strings.Join(testDriver("7.2.22").command(&spec, paths{"r", "k", "i"}, 3), " ")
			for _, bad := range []string{"-net", "-nic", "virtio-net", "path=", "tcp:", "unix:", "-vnc", "vfio", "9p", "virtiofs"} {
				if strings.Contains(line, bad) {
					t.Errorf("%s/%s: %q in %s", a, l, bad, line)
				}
			}
			for _, must := range []string{"-nodefaults", "-no-user-config", "-sandbox on,", "read-only=on", "-no-reboot"} {
				if !strings.Contains(line, must) {
					t.Errorf("%s/%s: no %q in %s", a, l, must, line)
				}
			}
		}
	}
}

func TestRing(t *testing.T) {
	r := newRing(10)
	for _, tt := range []struct{ write, want string }{
		{"abc", "abc"}, {"defghij", "abcdefghij"}, {"k", "bcdefghijk"},
		{strings.Repeat("x", 95) + "12345", "xxxxx12345"}, {"", "xxxxx12345"}, {"67890abcde", "67890abcde"},
	} {
		if n, err := r.Write([]byte(tt.write)); n != len(tt.write) || err != nil {
			t.Errorf("Write: %d, %v", n, err)
		}
		if got := string(r.tail(100)); got != tt.want {
			t.Errorf("after %.20q: %q, not %q", tt.write, got, tt.want)
		}
	}
	r = newRing(100)
	r.Write([]byte("one\ntwo\nthree\n"))
	if got := string(r.tail(9)); got != "three\n" {
		t.Errorf("tail %q", got)
	}
}

func TestTSC(t *testing.T) {
	a, b := measureTSC(), measureTSC()
	if d := a - b; a < 100_000 || d > a/1000 || d < -a/1000 {
		t.Errorf("measured %d and %d kHz", a, b)
	}
}

// serveQMP plays QEMU's side from a script: lines to send, and "<" for a line to
// read.
func serveQMP(t *testing.T, script ...string) *qmp {
	t.Helper()
	a, file, err := socketPair("qmp")
	if err != nil {
		t.Fatal(err)
	}
	b, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer b.Close()
		r := bufio.NewReader(b)
		for _, line := range script {
			if line == "<" {
				r.ReadString('\n')
			} else {
				fmt.Fprintln(b, line)
			}
		}
		r.ReadString('\n')
	}()
	q := newQMP(a)
	t.Cleanup(q.close)
	return q
}

func TestQMP(t *testing.T) {
	q := serveQMP(t, `{"QMP":{"version":{}}}`, "<", `{"event":"RESUME"}`, `{"return":{}}`,
		"<", `{"error":{"class":"GenericError","desc":"no such thing"}}`,
		`{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-reset"}}`, "<", `{"return":{"a":1}}`)
	<-q.ready
	if _, err := q.do(nil, "qmp_capabilities", nil); err != nil {
		t.Error(err)
	}
	var qe *qmpError
	if _, err := q.do(nil, "frob", nil); !errors.As(err, &qe) || qe.Desc != "no such thing" {
		t.Errorf("%v", err)
	}
	if r, err := q.do(nil, "query", map[string]int{"x": 1}); err != nil || string(r) != `{"a":1}` {
		t.Errorf("%s, %v", r, err)
	}
	if q.shutdownReason() != "guest-reset" {
		t.Errorf("reason %q", q.shutdownReason())
	}
}

// An event that somebody waits for happens once, whatever QEMU says later.
func TestQMPEvents(t *testing.T) {
	q := serveQMP(t, `{"QMP":{}}`,
		`{"event":"VSERPORT_CHANGE","data":{"open":false,"id":"link"}}`,
		`{"event":"MIGRATION","data":{"status":"setup"}}`, `{"event":"MIGRATION","data":{"status":"active"}}`,
		`{"event":"VSERPORT_CHANGE","data":{"open":true,"id":"link"}}`,
		`{"event":"MIGRATION","data":{"status":"failed"}}`, `{"event":"MIGRATION","data":{"status":"completed"}}`,
		"<")
	if err := q.wait(t.Context(), &q.portOpen); err != nil {
		t.Error(err)
	}
	if err := q.wait(t.Context(), &q.migrated); err == nil {
		t.Error("a migration that failed succeeded")
	}
	gone := serveQMP(t, `{"QMP":{}}`)
	gone.conn.Close()
	if err := gone.wait(t.Context(), &gone.portOpen); !errors.Is(err, errQMPClosed) {
		t.Errorf("QEMU has ended: %v", err)
	}
	silent := serveQMP(t, `{"QMP":{}}`, "<")
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	cancel(enough)
	if err := silent.wait(ctx, &silent.portOpen); !errors.Is(err, enough) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestAtLeast(t *testing.T) {
	for version, want := range map[string]bool{
		"7.2.22": false, "8.1.9": false, "8.2.0": true, "8.10": true, "10.0.2": true, "9": false, "": false, "x.y": false,
	} {
		if got := testDriver(version).atLeast(8, 2); got != want {
			t.Errorf("%q at least 8.2: %v", version, got)
		}
	}
}

func TestQMPEnds(t *testing.T) {
	for name, script := range map[string][]string{
		"closed":   {`{"QMP":{}}`},
		"garbage":  {`{"QMP":{}}`, "not json"},
		"too long": {`{"QMP":{}}`, strings.Repeat("x", maxQMP+10)},
	} {
		t.Run(name, func(t *testing.T) {
			q := serveQMP(t, script...)
			<-q.ready
			if _, err := q.do(nil, "cont", nil); err == nil {
				t.Error("answered")
			}
		})
	}
}

func TestQMPCancel(t *testing.T) {
	q := serveQMP(t, `{"QMP":{}}`, "<", "<")
	cancel := make(chan struct{})
	close(cancel)
	if _, err := q.do(cancel, "cont", nil); err == nil {
		t.Error("answered")
	}
}

// A facts file that is damaged, foreign or not writable costs time, not truth.
func TestFacts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "facts.json")
	f := loadFacts(path)
	f.update(func(d *factsData) { d.TSCKHz = 42 })
	if got := loadFacts(path).tscKHz(); got != 42 {
		t.Errorf("read back %d", got)
	}
	for name, content := range map[string]string{
		"garbage": "{", "other boot": `{"bootID":"x","tscKHz":42}`, "types": `{"tscKHz":"fast"}`, "empty": "",
	} {
		os.WriteFile(path, []byte(content), 0o600)
		if got := loadFacts(path).d.TSCKHz; got != 0 {
			t.Errorf("%s: believed %d", name, got)
		}
	}
	loadFacts("/proc/none/facts.json").update(func(d *factsData) { d.TSCKHz = 1 })
}

func TestPrintable(t *testing.T) {
	in := "ok\x1b[2J\x1b]0;title\x07\r\nü\u202e\xff\x00end"
	if got := vm.Printable([]byte(in)); got != "ok[2J]0;title\nüend" {
		t.Errorf("%q", got)
	}
}
