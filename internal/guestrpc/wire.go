package guestrpc

import (
	"encoding/binary"
)

func appendInt(b []byte, n int64) []byte { return binary.BigEndian.AppendUint64(b, uint64(n)) }

func appendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

func appendList(b []byte, list []string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(list)))
	for _, s := range list {
		b = appendString(b, s)
	}
	return b
}

// decode parses all of b as m. After an error the content of m means nothing.
func decode(b []byte, m Message) error {
	r := reader{b: b}
	m.parse(&r)
	if r.err == nil && len(r.b) > 0 {
		r.fail("a message is followed by %d bytes", len(r.b))
	}
	if r.err != nil {
		return r.err
	}
	return nil
}

// reader takes apart what a peer has sent. After its first error there is nothing
// more to read, and all it returns is zero. What it returns it has copied, if the
// doc does not say otherwise, and only after its length has been found to be there.
type reader struct {
	b   []byte // what is left
	err *Error
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = Errorf(CodeBadRequest, format, args...)
	}
	r.b = nil
}

// take returns the next n bytes, not copied, or nil.
func (r *reader) take(n uint32) []byte {
	if uint64(n) > uint64(len(r.b)) {
		r.fail("a message ends early: %d bytes are due, %d are left", n, len(r.b))
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) uint16() uint16 {
	b := r.take(2)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

func (r *reader) uint32() uint32 {
	b := r.take(4)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func (r *reader) int() int64 {
	b := r.take(8)
	if b == nil {
		return 0
	}
	return int64(binary.BigEndian.Uint64(b))
}

func (r *reader) bool() bool {
	b := r.take(1)
	if b == nil {
		return false
	}
	if b[0] > 1 {
		r.fail("a message has a byte of %d in place of 0 or 1", b[0])
	}
	return b[0] == 1
}

// bytes returns bytes that were sent with their length, not copied.
func (r *reader) bytes() []byte { return r.take(r.uint32()) }

// blob is bytes, copied; nil if there are none.
func (r *reader) blob() []byte { return append([]byte(nil), r.bytes()...) }

// list returns strings. Each takes four bytes at least, which bounds their number.
func (r *reader) list() []string {
	n := r.uint32()
	if uint64(n) > uint64(len(r.b)/4) {
		r.fail("a message ends early: a list of %d is due, %d bytes are left", n, len(r.b))
	}
	if n == 0 || r.err != nil {
		return nil
	}
	list := make([]string, n)
	for i := range list {
		list[i] = string(r.bytes())
	}
	return list
}

// numbers returns numbers, each of eight bytes, which bounds how many there are.
func (r *reader) numbers() []uint64 {
	n := r.uint32()
	if uint64(n) > uint64(len(r.b)/8) {
		r.fail("a message ends early: %d numbers are due, %d bytes are left", n, len(r.b))
	}
	if n == 0 || r.err != nil {
		return nil
	}
	list := make([]uint64, n)
	for i := range list {
		list[i] = uint64(r.int())
	}
	return list
}
