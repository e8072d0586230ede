package main

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
)

// newSandbox makes a machine in a place of its own.
func newSandbox(t *testing.T, opts sandbox.Options) *sandbox.Sandbox {
	t.Helper()
	p := newPlace(t)
	s, err := sandbox.Open(p.home()).Create(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// output runs a command to its end.
func output(t *testing.T, s *sandbox.Sandbox, cmd sandbox.Cmd) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	p, err := s.Start(ctx, cmd)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wait(ctx); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	return out.String()
}

// flood has calls refused as fast as can be, by one thread that repeats itself and by
// processes that are new each time.
const flood = `
import ctypes, os, threading
libc = ctypes.CDLL(None)
def forever():
    while True:
        libc.syscall(250, 0, 0)
threading.Thread(target=forever).start()
while True:
    pid = os.fork()
    if pid == 0:
        for nr in range(425, 436):
            libc.syscall(nr, -1, -1, -1)
            libc.syscall(nr - 265, -1, -1, -1)
        os._exit(0)
    os.waitpid(pid, 0)
`

// A command that has calls refused without end slows itself down: others start and
// run meanwhile, what is kept stays within its bound, and what is not kept is
// counted.
func TestDenialsWithoutEnd(t *testing.T) {
	s := newSandbox(t, sandbox.Options{})
	p, err := s.Start(t.Context(), sandbox.Cmd{Args: []string{"python3", "-c", flood}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		begun := time.Now()
		if out := output(t, s, sandbox.Cmd{Args: []string{"echo", "hello"}}); out != "hello\n" {
			t.Errorf("beside the flood: %q", out)
		}
		took := time.Since(begun)
		i, err := s.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		calls := i.Dropped
		for _, d := range i.Denials {
			calls += d.Count
		}
		t.Logf("%d kept, %d dropped, %d calls; a command took %v", len(i.Denials), i.Dropped, calls, took)
		if took > 10*time.Second {
			t.Errorf("a command took %v", took)
		}
		if len(i.Denials) > guestrpc.MaxDenials {
			t.Errorf("%d denials are kept", len(i.Denials))
		}
		if i.Dropped > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing was dropped: the flood is none")
		}
	}
	if err := p.Signal(9, true); err != nil {
		t.Error(err)
	}
	if exit, err := p.Wait(t.Context()); err != nil || exit.Signal != 9 {
		t.Errorf("%+v, %v", exit, err)
	}
}

// Each command of a sandbox has the profile that it asks for, and the guest's kernel
// says so of each while it runs.
func TestConfinedAsAsked(t *testing.T) {
	s := newSandbox(t, sandbox.Options{Seccomp: guestrpc.ProfileStrict})
	ctx := t.Context()
	want := map[string]bool{"": true, guestrpc.ProfileDefault: true, guestrpc.ProfilePermissive: true}
	pids := make(map[int]string)
	for profile := range want {
		p, err := s.Start(ctx, sandbox.Cmd{Args: []string{"sleep", "1000"}, User: "root", Seccomp: profile})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if profile == "" {
			profile = guestrpc.ProfileStrict
		}
		pids[p.PID()] = profile
	}
	i, err := s.Inspect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(i.Commands) != len(pids) {
		t.Errorf("%d commands run: %+v", len(i.Commands), i.Commands)
	}
	for _, c := range i.Commands {
		const few = 0x405fb
		if c.Profile != pids[c.PID] || c.Seccomp != 2 || c.Filters != 1 || !c.NoNewPrivs || c.CapBnd != few || c.CapEff != few || len(c.Without) != 0 {
			t.Errorf("%+v", c)
		}
	}
	_, dropped, err := s.Denials(ctx)
	if err != nil || dropped != 0 {
		t.Errorf("%d dropped, %v", dropped, err)
	}
}

// What a sandbox goes without, each of its commands goes without, and it is said.
func TestWithoutAll(t *testing.T) {
	without := layer.Set{}
	for _, l := range guestrpc.Layers() {
		without[layer.Name(l)] = true
	}
	s := newSandbox(t, sandbox.Options{Without: without})
	p, err := s.Start(t.Context(), sandbox.Cmd{Args: []string{"sleep", "1000"}, User: "root"})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	i, err := s.Inspect(t.Context())
	if err != nil || len(i.Commands) != 1 {
		t.Fatalf("%+v, %v", i, err)
	}
	c := i.Commands[0]
	if c.Seccomp != 0 || c.Filters != 0 || !c.NoNewPrivs || c.CapEff&(1<<21) == 0 || len(c.Without) != len(without) {
		t.Errorf("%+v", c)
	}
	out := output(t, s, sandbox.Cmd{User: "root", Args: []string{"sh", "-c", "cat /proc/1/comm; ls /dev/vda; python3 -c 'import ctypes; print(ctypes.CDLL(None).mount(b\"x\", b\"/mnt\", b\"tmpfs\", 0, None))'"}})
	if !strings.HasPrefix(out, "init\n/dev/vda\n") || !strings.HasSuffix(out, "\n0\n") {
		t.Errorf("%s", out)
	}
}

// foreign calls getpid by the ABIs of i386 and of x32.
const foreign = `
import ctypes, mmap
for code in (b"\xb8\x14\0\0\0" b"\xcd\x80" b"\xc3", b"\xb8\x27\0\0\x40" b"\x0f\x05" b"\xc3"):
    m = mmap.mmap(-1, 4096, prot=7)
    m.write(code)
    print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())
`

// A call by another ABI is refused, and noted as what it is: its number is that of
// another call.
func TestForeignCalls(t *testing.T) {
	s := newSandbox(t, sandbox.Options{})
	out := output(t, s, sandbox.Cmd{Args: []string{"python3", "-c", foreign}})
	if out != "-38\n-38\n" {
		t.Errorf("%q", out)
	}
	denials, _, err := s.Denials(t.Context())
	if err != nil || len(denials) != 2 {
		t.Fatalf("%v, %v", denials, err)
	}
	for i, want := range []string{"call 20 of architecture 0x40000003", fmt.Sprintf("call %d of architecture 0xc000003e", 0x40000000+39)} {
		if denials[i].Call != want || denials[i].Comm != "python3" {
			t.Errorf("%v", denials[i])
		}
	}
}
