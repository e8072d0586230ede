package guestrpc

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// wire is every message as it is on the wire, in hex; spaces part the fields.
// Who changes a line changes the protocol, and raises Version.
var wire = []struct {
	name string
	m    Message
	hex  string
}{
	{"hello", &Header{Version: Version, Op: OpHello, Hello: &Hello{
		Secret: []byte{1, 2, 3}, Entropy: []byte{4, 5}, Hostname: "box", Nonce: "n1", Overlay: 1 << 30, Pids: 4096,
	}}, "0000000000000003 00000005 68656c6c6f 00000000 01" +
		" 00000003 010203 00000002 0405 00000003 626f78 00000002 6e31 0000000040000000 0000000000001000 00"},
	{"ping", &Header{Version: Version, Op: OpPing, Secret: []byte{7, 7}},
		"0000000000000003 00000004 70696e67 00000002 0707 00 00"},
	{"exec", &Header{Version: Version, Op: OpExec, Secret: []byte{7, 7}, Exec: &Exec{Args: []string{"true"}}},
		"0000000000000003 00000004 65786563 00000002 0707 00 01" +
			" 00000001 00000004 74727565 00000000 00000000 00000000 00 00 00 00000000 00000000"},
	{"exec with all", &Exec{
		Args: []string{"sh", "-c", ""}, Env: []string{"A=1"}, Dir: "/d", User: "u:g", Stdin: true, TTY: &Resize{24, 80}, KillAll: true,
		Profile: "strict", Without: []string{"a", "bc"},
	}, "00000003 00000002 7368 00000002 2d63 00000000 00000001 00000003 413d31" +
		" 00000002 2f64 00000003 753a67 01 01 0018 0050 01 00000006 737472696374 00000002 00000001 61 00000002 6263"},
	{"exec of bytes", &Exec{Args: []string{"\xff\x00\n"}}, "00000001 00000003 ff000a 00000000 00000000 00000000 00 00 00 00000000 00000000"},
	{"clock", &Clock{time.Date(2026, 7, 1, 12, 0, 0, 5, time.UTC)}, "18be28a6f37c8005"},
	{"clock before 1970", &Clock{time.Unix(0, -1)}, "ffffffffffffffff"},
	{"reply", &HelloReply{Version: Version, Nonce: "n1", Kernel: "6.1", Timings: Timings{Init: 1, Modules: 2, Root: 3, Agent: 4, Hello: time.Second}},
		"0000000000000003 00000002 6e31 00000003 362e31" +
			" 0000000000000001 0000000000000002 0000000000000003 0000000000000004 000000003b9aca00"},
	{"timings", &Timings{Hello: math.MaxInt64},
		"0000000000000000 0000000000000000 0000000000000000 0000000000000000 7fffffffffffffff"},
	{"resize", &Resize{Rows: 1, Cols: math.MaxUint16}, "0001 ffff"},
	{"signal", &Signal{Number: 9, Group: true}, "0000000000000009 01"},
	{"negative signal", &Signal{Number: -9}, "fffffffffffffff7 00"},
	{"started", &Started{PID: 257}, "0000000000000101"},
	{"window", &Window{Bytes: math.MaxInt64}, "7fffffffffffffff"},
	{"exit", &Exit{Code: 255, User: 1, System: math.MinInt64}, "00000000000000ff 0000000000000000 00 0000000000000001 8000000000000000"},
	{"killed", &Exit{Signal: 9, OOM: true}, "0000000000000000 0000000000000009 01 0000000000000000 0000000000000000"},
	{"error", &Error{CodeNoDir, "no \xff"}, "00000006 6e6f5f646972 00000004 6e6f20ff"},
	{"inspect", &Header{Version: Version, Op: OpInspect, Secret: []byte{7, 7}},
		"0000000000000003 00000007 696e7370656374 00000002 0707 00 00"},
	{"denial", &Denial{
		First: time.Unix(0, 1), Last: time.Unix(0, 2), Count: 3, PID: 4, UID: -1, Comm: "x\xff", Profile: "p",
		Arch: 0xc000003e, Number: 41, Args: []uint64{40, math.MaxUint64}, Allowed: true,
	}, "0000000000000001 0000000000000002 0000000000000003 0000000000000004 ffffffffffffffff 00000002 78ff 00000001 70" +
		" 00000000c000003e 0000000000000029 00000002 0000000000000028 ffffffffffffffff 01"},
	{"confined", &Confined{
		PID: 1, Profile: "p", Without: []string{"l"}, Seccomp: 2, Filters: 3, NoNewPrivs: true, CapEff: 1 << 63, CapBnd: 5,
	}, "0000000000000001 00000001 70 00000001 00000001 6c 0000000000000002 0000000000000003 01 8000000000000000 0000000000000005"},
	{"inspected", &Inspected{Dropped: 7}, "0000000000000007"},
	{"empty error", &Error{}, "00000000 00000000"},
}

// blank returns a message of m's type that is full of what was there before.
func blank(m Message) Message {
	switch m.(type) {
	case *Header:
		return &Header{Secret: []byte("old"), Hello: &Hello{Nonce: "old"}, Exec: &Exec{Dir: "old"}}
	case *Exec:
		return &Exec{Args: []string{"old"}, Env: []string{"old"}, TTY: &Resize{1, 1}, Stdin: true, KillAll: true, Profile: "old", Without: []string{"old"}}
	}
	return reflect.New(reflect.TypeOf(m).Elem()).Interface().(Message)
}

func TestWire(t *testing.T) {
	seen := make(map[reflect.Type]bool)
	for _, c := range wire {
		seen[reflect.TypeOf(c.m)] = true
		want, err := hex.DecodeString(strings.ReplaceAll(c.hex, " ", ""))
		if err != nil {
			t.Fatal(c.name, err)
		}
		if got := c.m.append(nil); !bytes.Equal(got, want) {
			t.Errorf("%s is\n%x, want\n%x", c.name, got, want)
		}
		m := blank(c.m)
		if err := decode(want, m); err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else if d := cmp.Diff(c.m, m); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
	}
	if len(seen) != 14 {
		t.Errorf("%d types of messages are tested", len(seen))
	}
}

// A message has one length and one form.
func TestNeitherShorterNorLonger(t *testing.T) {
	for _, c := range wire {
		b := c.m.append(nil)
		for n := range b {
			if err := decode(b[:n:n], blank(c.m)); !errors.Is(err, ErrBadRequest) {
				t.Errorf("%s, %d of %d bytes: %v", c.name, n, len(b), err)
			}
		}
		for x := range 256 {
			if err := decode(append(b, byte(x)), blank(c.m)); !errors.Is(err, ErrBadRequest) {
				t.Errorf("%s and a byte of %d: %v", c.name, x, err)
			}
		}
	}
}

func TestBoolIsStrict(t *testing.T) {
	for x := range 256 {
		err := decode([]byte{0, 0, 0, 0, 0, 0, 0, 9, byte(x)}, new(Signal))
		if ok := x < 2; ok != (err == nil) || !ok && !errors.Is(err, ErrBadRequest) {
			t.Errorf("byte %d: %v", x, err)
		}
	}
}

// Exactly the field that the operation names is set.
func TestFieldsOfTheOperation(t *testing.T) {
	for name, h := range map[string]*Header{
		"hello without hello": {Op: OpHello},
		"hello with exec":     {Op: OpHello, Exec: &Exec{}},
		"hello with both":     {Op: OpHello, Hello: &Hello{}, Exec: &Exec{}},
		"exec without exec":   {Op: OpExec},
		"exec with hello":     {Op: OpExec, Hello: &Hello{}},
		"ping with exec":      {Op: OpPing, Exec: &Exec{}},
		"inspect with exec":   {Op: OpInspect, Exec: &Exec{}},
		"other with hello":    {Op: "reboot", Hello: &Hello{}},
	} {
		h.Version = Version
		var buf bytes.Buffer
		NewStream(&buf).WriteHeader(h)
		if _, err := NewStream(&buf).ReadHeader(); !errors.Is(err, ErrBadRequest) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEmptyIsNil(t *testing.T) {
	want := &Header{Version: Version, Op: OpExec, Exec: &Exec{}}
	got := new(Header)
	full := &Header{Version: Version, Op: OpExec, Secret: []byte{}, Exec: &Exec{Args: []string{}, Env: []string{}}}
	if err := decode(full.append(nil), got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
}

// A message keeps nothing of the payload, which the next frame overwrites.
func TestNothingIsShared(t *testing.T) {
	for _, c := range wire {
		b := c.m.append(nil)
		m := blank(c.m)
		if err := decode(b, m); err != nil {
			t.Fatal(c.name, err)
		}
		clear(b)
		if d := cmp.Diff(c.m, m); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
	}
}

// allocated is how many bytes f makes.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// Each length in a message, made as large as can be, is refused before anything
// is allocated for it.
func TestLengthsInside(t *testing.T) {
	for _, c := range wire {
		b := c.m.append(nil)
		for i := 0; i+4 <= len(b); i++ {
			for _, n := range []uint32{1<<32 - 1, 1 << 31, 1 << 28, uint32(len(b))} {
				x := bytes.Clone(b)
				binary.BigEndian.PutUint32(x[i:], n)
				if got := allocated(func() { _ = decode(x, blank(c.m)) }); got > 64<<10 {
					t.Errorf("%s with a length of %d at %d allocates %d bytes", c.name, n, i, got)
				}
			}
		}
	}
}

// Foreign bytes are either the one encoding of a message or an error, never a
// panic, and what is made of them is bounded by their number: a string of a list
// takes 4 bytes on the wire and 16 in memory.
func FuzzDecode(f *testing.F) {
	for i, c := range wire {
		f.Add(uint8(i), c.m.append(nil))
	}
	f.Add(uint8(3), []byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, kind uint8, data []byte) {
		m := blank(wire[int(kind)%len(wire)].m)
		var err error
		// The fuzzing engine allocates too.
		if n := allocated(func() { err = decode(data, m) }); n > uint64(16*len(data)+1<<20) {
			t.Errorf("%d bytes make %d", len(data), n)
		}
		if err != nil {
			if !errors.Is(err, ErrBadRequest) {
				t.Error(err)
			}
			return
		}
		if again := m.append(nil); !bytes.Equal(again, data) {
			t.Errorf("%x is decoded as %+v, which is %x", data, m, again)
		}
	})
}

// What is sent arrives.
func FuzzExec(f *testing.F) {
	f.Add("sh\n-c\ntrue", "A=1\nB=", "/tmp", "root:wheel", true, uint16(24), uint16(80), false, []byte("secret"), "strict", "guest-seccomp")
	f.Add("", "", "", "", false, uint16(0), uint16(0), true, []byte(nil), "", "a\nb")
	f.Fuzz(func(t *testing.T, args, env, dir, user string, stdin bool, rows, cols uint16, kill bool, secret []byte, profile, without string) {
		want := &Header{Version: Version, Op: OpExec, Secret: secret, Exec: &Exec{
			Args: strings.Split(args, "\n"), Env: strings.Split(env, "\n"),
			Dir: dir, User: user, Stdin: stdin, KillAll: kill,
			Profile: profile, Without: strings.Split(without, "\n"),
		}}
		if len(secret) == 0 {
			want.Secret = nil
		}
		if rows > 0 {
			want.Exec.TTY = &Resize{rows, cols}
		}
		var buf bytes.Buffer
		if err := NewStream(&buf).WriteHeader(want); err != nil {
			t.Fatal(err)
		}
		got, err := NewStream(&buf).ReadHeader()
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Error(cmp.Diff(want, got))
		}
	})
}
