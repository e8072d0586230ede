package guestrpc

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

const prefix = 5 // a frame's type and length

// Frame is one frame as read. Payload is valid until the next ReadFrame.
type Frame struct {
	Type    Type
	Payload []byte
}

// Decode parses the payload as m. After an error, which is of [CodeBadRequest],
// the content of m means nothing. m keeps nothing of the payload.
func (f Frame) Decode(m Message) error { return decode(f.Payload, m) }

// Stream reads and writes the frames of one operation. It is the only reader
// of its connection: nothing is buffered anywhere else, so no byte is lost when
// one part of the code hands the connection to another.
//
// One goroutine may read while others write.
type Stream struct {
	rw  io.ReadWriter
	in  []byte // payload of the last frame read; grows up to MaxFrame
	pre [prefix]byte

	mu  sync.Mutex // guards out and the order of writes
	out []byte     // a frame is written by one Write, prefix and payload together
}

// NewStream wraps rw. The caller closes rw.
func NewStream(rw io.ReadWriter) *Stream { return &Stream{rw: rw} }

// WriteHeader sends the header. It is the host's first write.
func (s *Stream) WriteHeader(h *Header) error {
	msg := h.append(make([]byte, 4, 512))
	n := len(msg) - 4
	if n > MaxHeader {
		return Errorf(CodeBadRequest, "the command, its arguments and environment take %d bytes; at most %d are allowed", n, MaxHeader)
	}
	binary.BigEndian.PutUint32(msg, uint32(n))
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.rw.Write(msg)
	return err
}

// ReadHeader reads the header. It is the guest's first read. The length is
// bounded before the allocation. A header of another version, or whose fields are
// not exactly those of its operation, is an error of [CodeBadRequest].
func (s *Stream) ReadHeader() (*Header, error) {
	if _, err := io.ReadFull(s.rw, s.pre[:4]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(s.pre[:4])
	if n > MaxHeader {
		return nil, Errorf(CodeBadRequest, "header of %d bytes; at most %d are allowed", n, MaxHeader)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(s.rw, b); err != nil {
		return nil, noEOF(err)
	}
	h := new(Header)
	if err := decode(b, h); err != nil {
		return nil, err
	}
	return h, nil
}

// ReadFrame reads the next frame. It returns [io.EOF] only between frames; a
// stream that ends inside one gives [io.ErrUnexpectedEOF].
func (s *Stream) ReadFrame() (Frame, error) {
	if _, err := io.ReadFull(s.rw, s.pre[:]); err != nil {
		return Frame{}, err
	}
	n := binary.BigEndian.Uint32(s.pre[1:])
	if n > MaxFrame {
		return Frame{}, Errorf(CodeBadRequest, "frame of %d bytes; at most %d are allowed", n, MaxFrame)
	}
	if cap(s.in) < int(n) {
		s.in = make([]byte, n)
	}
	p := s.in[:n]
	if _, err := io.ReadFull(s.rw, p); err != nil {
		return Frame{}, noEOF(err)
	}
	return Frame{Type: Type(s.pre[0]), Payload: p}, nil
}

// WriteFrame sends one frame. A payload over MaxFrame is a bug of the caller.
func (s *Stream) WriteFrame(t Type, payload []byte) error {
	if len(payload) > MaxFrame {
		return fmt.Errorf("guestrpc: frame of %d bytes", len(payload))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out = append(s.out[:0], byte(t))
	s.out = binary.BigEndian.AppendUint32(s.out, uint32(len(payload)))
	s.out = append(s.out, payload...)
	_, err := s.rw.Write(s.out)
	return err
}

// WriteMessage sends m as one frame.
func (s *Stream) WriteMessage(t Type, m Message) error { return s.WriteFrame(t, m.append(nil)) }

// Writer returns a writer whose every Write becomes frames of type t, in order,
// each sent before Write returns.
func (s *Stream) Writer(t Type) io.Writer { return frameWriter{s, t} }

type frameWriter struct {
	s *Stream
	t Type
}

func (w frameWriter) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n := min(len(p)-done, MaxFrame)
		if err := w.s.WriteFrame(w.t, p[done:done+n]); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
