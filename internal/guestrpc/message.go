package guestrpc

import (
	"encoding/binary"
	"time"
)

// Message is what a header or a frame's payload holds when it is not plain bytes:
// a pointer to one of this package's structs.
//
// The fields are on the wire in the order of the struct, all of them, each in the
// only form it can have:
//
//	int, int64, Duration, Time   8 bytes, big endian, two's complement; times in
//	                             nanoseconds, counted from 1970 if it is a Time
//	uint64                       8 bytes, big endian
//	uint16                       2 bytes, big endian
//	bool                         1 byte, 0 or 1
//	string, []byte               4 bytes of length, then the bytes
//	[]string                     4 bytes of number, then the strings
//	[]uint64                     4 bytes of number, then the numbers
//	pointer                      a bool, then what it points to unless it is nil
//
// So a message has one encoding, and what is longer, shorter or otherwise is
// refused. An empty list decodes as nil. Strings are bytes: they need not be UTF-8.
//
// There is no reflection here, and few different pieces of code: where the guest's
// processor is emulated, it is the first execution of a piece that costs.
type Message interface {
	append(b []byte) []byte
	parse(r *reader)
}

func (h *Header) append(b []byte) []byte {
	b = appendInt(b, int64(h.Version))
	b = appendString(b, string(h.Op))
	b = appendString(b, string(h.Secret))
	b = appendBool(b, h.Hello != nil)
	if h.Hello != nil {
		b = h.Hello.append(b)
	}
	b = appendBool(b, h.Exec != nil)
	if h.Exec != nil {
		b = h.Exec.append(b)
	}
	return b
}

// parse looks at nothing behind a version that is not ours.
func (h *Header) parse(r *reader) {
	h.Version = int(r.int())
	if r.err == nil && h.Version != Version {
		r.fail("protocol version %d; this side speaks %d", h.Version, Version)
	}
	h.Op = Op(r.bytes())
	h.Secret = r.blob()
	h.Hello, h.Exec = nil, nil
	if r.bool() {
		h.Hello = new(Hello)
		h.Hello.parse(r)
	}
	if r.bool() {
		h.Exec = new(Exec)
		h.Exec.parse(r)
	}
	if (h.Hello != nil) != (h.Op == OpHello) || (h.Exec != nil) != (h.Op == OpExec) {
		r.fail("the operation %.40q is asked for with the fields of another", h.Op)
	}
}

func (m *Hello) append(b []byte) []byte {
	b = appendString(b, string(m.Secret))
	b = appendString(b, string(m.Entropy))
	b = appendString(b, m.Hostname)
	b = appendString(b, m.Nonce)
	b = appendInt(b, m.Overlay)
	return appendInt(b, int64(m.Pids))
}

func (m *Hello) parse(r *reader) {
	m.Secret = r.blob()
	m.Entropy = r.blob()
	m.Hostname = string(r.bytes())
	m.Nonce = string(r.bytes())
	m.Overlay = r.int()
	m.Pids = int(r.int())
}

func (m *Clock) append(b []byte) []byte { return appendInt(b, m.Now.UnixNano()) }

func (m *Clock) parse(r *reader) { m.Now = time.Unix(0, r.int()) }

func (m *HelloReply) append(b []byte) []byte {
	b = appendInt(b, int64(m.Version))
	b = appendString(b, m.Nonce)
	b = appendString(b, m.Kernel)
	return m.Timings.append(b)
}

func (m *HelloReply) parse(r *reader) {
	m.Version = int(r.int())
	m.Nonce = string(r.bytes())
	m.Kernel = string(r.bytes())
	m.Timings.parse(r)
}

func (m *Timings) append(b []byte) []byte {
	b = appendInt(b, int64(m.Init))
	b = appendInt(b, int64(m.Modules))
	b = appendInt(b, int64(m.Root))
	b = appendInt(b, int64(m.Agent))
	return appendInt(b, int64(m.Hello))
}

func (m *Timings) parse(r *reader) {
	m.Init = time.Duration(r.int())
	m.Modules = time.Duration(r.int())
	m.Root = time.Duration(r.int())
	m.Agent = time.Duration(r.int())
	m.Hello = time.Duration(r.int())
}

func (e *Exec) append(b []byte) []byte {
	b = appendList(b, e.Args)
	b = appendList(b, e.Env)
	b = appendString(b, e.Dir)
	b = appendString(b, e.User)
	b = appendBool(b, e.Stdin)
	b = appendBool(b, e.TTY != nil)
	if e.TTY != nil {
		b = e.TTY.append(b)
	}
	b = appendBool(b, e.KillAll)
	b = appendString(b, e.Profile)
	return appendList(b, e.Without)
}

func (e *Exec) parse(r *reader) {
	e.Args = r.list()
	e.Env = r.list()
	e.Dir = string(r.bytes())
	e.User = string(r.bytes())
	e.Stdin = r.bool()
	e.TTY = nil
	if r.bool() {
		e.TTY = new(Resize)
		e.TTY.parse(r)
	}
	e.KillAll = r.bool()
	e.Profile = string(r.bytes())
	e.Without = r.list()
}

func (m *Resize) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, m.Rows)
	return binary.BigEndian.AppendUint16(b, m.Cols)
}

func (m *Resize) parse(r *reader) {
	m.Rows = r.uint16()
	m.Cols = r.uint16()
}

func (m *Signal) append(b []byte) []byte {
	b = appendInt(b, int64(m.Number))
	return appendBool(b, m.Group)
}

func (m *Signal) parse(r *reader) {
	m.Number = int(r.int())
	m.Group = r.bool()
}

func (m *Started) append(b []byte) []byte { return appendInt(b, int64(m.PID)) }

func (m *Started) parse(r *reader) { m.PID = int(r.int()) }

func (m *Window) append(b []byte) []byte { return appendInt(b, int64(m.Bytes)) }

func (m *Window) parse(r *reader) { m.Bytes = int(r.int()) }

func (m *Exit) append(b []byte) []byte {
	b = appendInt(b, int64(m.Code))
	b = appendInt(b, int64(m.Signal))
	b = appendBool(b, m.OOM)
	b = appendInt(b, int64(m.User))
	return appendInt(b, int64(m.System))
}

func (m *Exit) parse(r *reader) {
	m.Code = int(r.int())
	m.Signal = int(r.int())
	m.OOM = r.bool()
	m.User = time.Duration(r.int())
	m.System = time.Duration(r.int())
}

func (e *Error) append(b []byte) []byte {
	b = appendString(b, string(e.Code))
	return appendString(b, e.Message)
}

func (e *Error) parse(r *reader) {
	e.Code = Code(r.bytes())
	e.Message = string(r.bytes())
}

func (m *Denial) append(b []byte) []byte {
	b = appendInt(b, m.First.UnixNano())
	b = appendInt(b, m.Last.UnixNano())
	b = appendInt(b, int64(m.Count))
	b = appendInt(b, int64(m.PID))
	b = appendInt(b, int64(m.UID))
	b = appendString(b, m.Comm)
	b = appendString(b, m.Profile)
	b = appendInt(b, int64(m.Arch))
	b = appendInt(b, int64(m.Number))
	b = binary.BigEndian.AppendUint32(b, uint32(len(m.Args)))
	for _, a := range m.Args {
		b = binary.BigEndian.AppendUint64(b, a)
	}
	return appendBool(b, m.Allowed)
}

func (m *Denial) parse(r *reader) {
	m.First = time.Unix(0, r.int())
	m.Last = time.Unix(0, r.int())
	m.Count = int(r.int())
	m.PID = int(r.int())
	m.UID = int(r.int())
	m.Comm = string(r.bytes())
	m.Profile = string(r.bytes())
	m.Arch = int(r.int())
	m.Number = int(r.int())
	m.Args = r.numbers()
	m.Allowed = r.bool()
}

func (m *Confined) append(b []byte) []byte {
	b = appendInt(b, int64(m.PID))
	b = appendString(b, m.Profile)
	b = appendList(b, m.Without)
	b = appendInt(b, int64(m.Seccomp))
	b = appendInt(b, int64(m.Filters))
	b = appendBool(b, m.NoNewPrivs)
	b = binary.BigEndian.AppendUint64(b, m.CapEff)
	return binary.BigEndian.AppendUint64(b, m.CapBnd)
}

func (m *Confined) parse(r *reader) {
	m.PID = int(r.int())
	m.Profile = string(r.bytes())
	m.Without = r.list()
	m.Seccomp = int(r.int())
	m.Filters = int(r.int())
	m.NoNewPrivs = r.bool()
	m.CapEff = uint64(r.int())
	m.CapBnd = uint64(r.int())
}

func (m *Inspected) append(b []byte) []byte { return appendInt(b, int64(m.Dropped)) }

func (m *Inspected) parse(r *reader) { m.Dropped = int(r.int()) }
