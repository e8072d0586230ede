package guestrpc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

func TestHeaderRoundTrip(t *testing.T) {
	var buf bytes.Buffer
	want := &Header{Version: Version, Op: OpExec, Secret: []byte("s"), Exec: &Exec{
		Args: []string{"sh", "-c", "echo \x00?"}, Env: []string{"A=1"}, User: "root", TTY: &Resize{24, 80},
	}}
	if err := NewStream(&buf).WriteHeader(want); err != nil {
		t.Fatal(err)
	}
	got, err := NewStream(&buf).ReadHeader()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// Header and frames that arrive in one piece, or byte by byte, lose nothing:
// there is one reader, and it takes exactly what is its own.
func TestNothingIsLost(t *testing.T) {
	var buf bytes.Buffer
	w := NewStream(&buf)
	w.WriteHeader(&Header{Version: Version, Op: OpPing})
	for i := range 100 {
		w.WriteFrame(FrameStdout, bytes.Repeat([]byte{byte(i)}, i*37))
	}
	sent := buf.Bytes()
	for name, r := range map[string]io.Reader{
		"whole":  bytes.NewReader(sent),
		"bytes":  iotest.OneByteReader(bytes.NewReader(sent)),
		"halves": iotest.HalfReader(bytes.NewReader(sent)),
	} {
		s := NewStream(struct {
			io.Reader
			io.Writer
		}{r, io.Discard})
		if _, err := s.ReadHeader(); err != nil {
			t.Fatal(name, err)
		}
		for i := range 100 {
			f, err := s.ReadFrame()
			if err != nil || f.Type != FrameStdout || len(f.Payload) != i*37 || len(f.Payload) > 0 && f.Payload[0] != byte(i) {
				t.Fatalf("%s: frame %d: %d bytes, %v", name, i, len(f.Payload), err)
			}
		}
		if _, err := s.ReadFrame(); err != io.EOF {
			t.Errorf("%s: after the last frame: %v", name, err)
		}
	}
}

// A length is refused before anything is allocated for it.
func TestLengthsAreBounded(t *testing.T) {
	huge := binary.BigEndian.AppendUint32(nil, 0xffffffff)
	allocs := testing.AllocsPerRun(1, func() {
		_, err := NewStream(bytes.NewBuffer(bytes.Clone(huge))).ReadHeader()
		if !errors.Is(err, ErrBadRequest) {
			t.Errorf("huge header: %v", err)
		}
		_, err = NewStream(bytes.NewBuffer(append([]byte{byte(FrameStdout)}, huge...))).ReadFrame()
		if !errors.Is(err, ErrBadRequest) {
			t.Errorf("huge frame: %v", err)
		}
	})
	if allocs > 40 {
		t.Errorf("%v allocations", allocs)
	}
	big := &Header{Version: Version, Op: OpExec, Exec: &Exec{Args: []string{strings.Repeat("x", MaxHeader)}}}
	if err := NewStream(new(bytes.Buffer)).WriteHeader(big); !errors.Is(err, ErrBadRequest) {
		t.Errorf("own huge header: %v", err)
	}
}

func TestTruncated(t *testing.T) {
	var buf bytes.Buffer
	NewStream(&buf).WriteFrame(FrameStderr, []byte("hello"))
	sent := buf.Bytes()
	for n := 1; n < len(sent); n++ {
		_, err := NewStream(bytes.NewBuffer(bytes.Clone(sent[:n]))).ReadFrame()
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes: %v", n, len(sent), err)
		}
	}
}

func TestWrongVersion(t *testing.T) {
	var buf bytes.Buffer
	NewStream(&buf).WriteHeader(&Header{Version: Version + 1, Op: OpPing})
	if _, err := NewStream(&buf).ReadHeader(); !errors.Is(err, ErrBadRequest) || !strings.Contains(err.Error(), "protocol version 4;") {
		t.Error(err)
	}
	// What follows a version that is not ours is nobody's business.
	buf.Write([]byte{0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, Version + 1, 'x'})
	if _, err := NewStream(&buf).ReadHeader(); !errors.Is(err, ErrBadRequest) || !strings.Contains(err.Error(), "protocol version 4;") {
		t.Error(err)
	}
}

// errors.Is works on the receiving side: codes cross the wire, not strings.
func TestErrorsCross(t *testing.T) {
	a, b := net.Pipe()
	go NewStream(a).WriteMessage(FrameError, Errorf(CodeNoDir, "no directory %q", "/x"))
	f, err := NewStream(b).ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	got := new(Error)
	if err := f.Decode(got); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(got, ErrNoDir) || errors.Is(got, ErrNoUser) || got.Error() != `no directory "/x"` {
		t.Errorf("%#v", got)
	}
}

func TestWriterSplits(t *testing.T) {
	var buf bytes.Buffer
	data := bytes.Repeat([]byte("abc"), MaxFrame)
	if n, err := NewStream(&buf).Writer(FrameStdin).Write(data); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
	s := NewStream(&buf)
	var got []byte
	for {
		f, err := s.ReadFrame()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, f.Payload...)
	}
	if !bytes.Equal(got, data) {
		t.Errorf("%d bytes of %d", len(got), len(data))
	}
}

func TestValidate(t *testing.T) {
	for name, e := range map[string]Exec{
		"no command":    {},
		"empty command": {Args: []string{""}},
		"nul in arg":    {Args: []string{"a\x00b"}},
		"env no =":      {Args: []string{"a"}, Env: []string{"FOO"}},
		"env no key":    {Args: []string{"a"}, Env: []string{"=x"}},
		"env nul":       {Args: []string{"a"}, Env: []string{"A=\x00"}},
		"relative dir":  {Args: []string{"a"}, Dir: "tmp"},
		"nul in dir":    {Args: []string{"a"}, Dir: "/\x00"},
		"nul in user":   {Args: []string{"a"}, User: "\x00"},
		"bad profile":   {Args: []string{"a"}, Profile: "unconfined"},
		"bad layer":     {Args: []string{"a"}, Without: []string{LayerSeccomp, "seccomp"}},
	} {
		if err := e.Validate(); !errors.Is(err, ErrBadRequest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ok := Exec{Args: []string{"a", ""}, Env: []string{"A=", "B==x"}, Dir: "/tmp", Profile: ProfileStrict, Without: Layers()}
	if err := ok.Validate(); err != nil {
		t.Error(err)
	}
}

// Foreign bytes never panic, and never make more than the limits.
func FuzzStream(f *testing.F) {
	var buf bytes.Buffer
	w := NewStream(&buf)
	w.WriteHeader(&Header{Version: Version, Op: OpExec, Exec: &Exec{Args: []string{"true"}}})
	w.WriteMessage(FrameSignal, &Signal{Number: 9})
	f.Add(buf.Bytes())
	f.Add([]byte{0, 0, 0, 2, '{', '}'})
	f.Add(binary.BigEndian.AppendUint32(nil, MaxHeader))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := NewStream(bytes.NewBuffer(data))
		if h, err := s.ReadHeader(); err == nil && h.Exec != nil {
			_ = h.Exec.Validate()
		}
		for {
			frame, err := s.ReadFrame()
			if err != nil {
				return
			}
			if len(frame.Payload) > MaxFrame {
				t.Fatalf("frame of %d bytes", len(frame.Payload))
			}
			_ = frame.Decode(new(Exit))
			_ = frame.Decode(new(Window))
			_ = frame.Decode(new(HelloReply))
		}
	})
}
