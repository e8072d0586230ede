package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What is read is bounded: in a table that is not as we made it there may be
// anything.
const (
	maxAnswer   = 64 << 10 // bytes of one datagram; the kernel sends 32 KiB at most
	maxMessages = 4096     // of one request
	patience    = 5 * time.Second
)

// conn is one netlink socket to the netfilter subsystem of the network namespace
// that its maker was in. The kernel answers within the system call that asks, so
// nothing here waits; the socket's timeout is for kernels that do otherwise.
// Sequential use only.
type conn struct {
	fd     int
	seq    uint32
	buf    []byte
	subsys uint8 // nftables' number in netfilter's netlink
}

// message is one netlink message without its header.
type message struct {
	typ  uint16 // its low byte, in messages of nftables: unix.NFT_MSG_...
	data []byte // after the nfgenmsg header
	fam  uint8
}

func dial(ctx context.Context) (*conn, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, unsupported(os.NewSyscallError("netlink socket", err))
	}
	c := &conn{fd: fd, buf: make([]byte, maxAnswer), subsys: unix.NFNL_SUBSYS_NFTABLES}
	wait := patience
	if d, ok := ctx.Deadline(); ok {
		wait = max(time.Millisecond, min(wait, time.Until(d)))
	}
	tv := unix.NsecToTimeval(wait.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		c.close()
		return nil, os.NewSyscallError("netlink timeout", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		c.close()
		return nil, os.NewSyscallError("netlink bind", err)
	}
	return c, nil
}

func (c *conn) close() { unix.Close(c.fd) }

// appendMessage appends a message with its headers.
func (c *conn) appendMessage(b []byte, typ, flags uint16, fam uint8, resource uint16, attrs []byte) []byte {
	c.seq++
	n := unix.SizeofNlMsghdr + 4 + len(attrs)
	b = binary.NativeEndian.AppendUint32(b, uint32(n))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = binary.NativeEndian.AppendUint32(b, c.seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, fam, unix.NFNETLINK_V0)
	b = binary.BigEndian.AppendUint16(b, resource)
	return pad(append(b, attrs...))
}

func (c *conn) typ(msg int) uint16 { return uint16(c.subsys)<<8 | uint16(msg) }

// command is one change in a batch.
type command struct {
	msg   int // unix.NFT_MSG_...
	flags uint16
	fam   uint8
	attrs []byte
	what  string // for errors
}

// commit makes all changes or none.
func (c *conn) commit(commands []command) error {
	b := c.appendMessage(nil, unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, uint16(c.subsys), nil)
	first := c.seq
	for _, cmd := range commands {
		b = c.appendMessage(b, c.typ(cmd.msg), unix.NLM_F_ACK|cmd.flags, cmd.fam, 0, cmd.attrs)
	}
	b = c.appendMessage(b, unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, uint16(c.subsys), nil)
	if err := c.send(b); err != nil {
		return err
	}
	// Success is an acknowledgement for every command, and nothing less. With an
	// error the kernel has undone them all.
	for acked := 0; acked < len(commands); {
		err := c.receive(func(h unix.NlMsghdr, data []byte) error {
			if h.Type != unix.NLMSG_ERROR || int32(h.Seq-first) < 0 { // an older batch's
				return nil
			}
			errno, err := answer(data)
			if err != nil || errno == 0 {
				acked++
				return err
			}
			what := "the batch"
			if i := int(h.Seq) - int(first) - 1; i >= 0 && i < len(commands) {
				what = commands[i].what
			}
			return unsupported(fmt.Errorf("%s: %w", what, errno))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// answer is the error number in the message that says how a request went.
func answer(data []byte) (unix.Errno, error) {
	if len(data) < 4 {
		return 0, errShort
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(data))), nil
}

// get asks for one object (dump: all of them) and returns the messages of the
// answer.
func (c *conn) get(msg int, dump bool, fam uint8, attrs []byte) ([]message, error) {
	var flags uint16 = unix.NLM_F_ACK
	if dump {
		flags = unix.NLM_F_DUMP
	}
	if err := c.send(c.appendMessage(nil, c.typ(msg), flags, fam, 0, attrs)); err != nil {
		return nil, err
	}
	var found []message
	for done := false; !done; {
		err := c.receive(func(h unix.NlMsghdr, data []byte) error {
			switch {
			case h.Seq != c.seq:
				return nil
			case h.Flags&unix.NLM_F_DUMP_INTR != 0:
				return errChanged
			case h.Type == unix.NLMSG_ERROR || h.Type == unix.NLMSG_DONE:
				done = true
				errno, err := answer(data)
				if err == nil && errno != 0 {
					err = errno
				}
				return err
			case len(data) < 4:
				return errShort
			case len(found) == maxMessages:
				return fmt.Errorf("more than %d objects", maxMessages)
			}
			found = append(found, message{typ: h.Type, fam: data[0], data: append([]byte(nil), data[4:]...)})
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

func (c *conn) send(b []byte) error {
	for {
		err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("netlink send", err)
		}
	}
}

var (
	errShort   = errors.New("an answer of the kernel ends too early")
	errChanged = errors.New("the rules change while they are read")
)

// receive reads one datagram and calls each for the messages in it.
func (c *conn) receive(each func(h unix.NlMsghdr, data []byte) error) error {
	n, flags, err := c.read()
	if err != nil {
		return os.NewSyscallError("netlink receive", err)
	}
	if flags&unix.MSG_TRUNC != 0 {
		return fmt.Errorf("an answer of the kernel has more than %d bytes", maxAnswer)
	}
	return messages(c.buf[:n], each)
}

func (c *conn) read() (n, flags int, err error) {
	for {
		n, _, flags, from, err := unix.Recvmsg(c.fd, c.buf, nil, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if sa, ok := from.(*unix.SockaddrNetlink); err == nil && (!ok || sa.Pid != 0) {
			continue // another process may write to our address; the kernel is number 0
		}
		return n, flags, err
	}
}

// messages splits a datagram.
func messages(b []byte, each func(h unix.NlMsghdr, data []byte) error) error {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return errShort
		}
		h := unix.NlMsghdr{
			Len:   binary.NativeEndian.Uint32(b),
			Type:  binary.NativeEndian.Uint16(b[4:]),
			Flags: binary.NativeEndian.Uint16(b[6:]),
			Seq:   binary.NativeEndian.Uint32(b[8:]),
		}
		if h.Len < unix.SizeofNlMsghdr || uint64(h.Len) > uint64(len(b)) {
			return errShort
		}
		if err := each(h, b[unix.SizeofNlMsghdr:h.Len]); err != nil {
			return err
		}
		b = b[min(len(b), align(int(h.Len))):]
	}
	return nil
}

func align(n int) int { return (n + 3) &^ 3 }

func pad(b []byte) []byte { return append(b, make([]byte, align(len(b))-len(b))...) }

// appendAttr appends an attribute.
func appendAttr(b []byte, typ uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	return pad(append(b, data...))
}

func appendString(b []byte, typ uint16, s string) []byte {
	return appendAttr(b, typ, append([]byte(s), 0))
}

func appendUint32(b []byte, typ uint16, n uint32) []byte {
	return appendAttr(b, typ, binary.BigEndian.AppendUint32(nil, n))
}

func appendNested(b []byte, typ uint16, data []byte) []byte {
	return appendAttr(b, typ|unix.NLA_F_NESTED, data)
}

// eachAttr calls each for the attributes in b, without the flags of their types,
// which depend on the kernel's version.
func eachAttr(b []byte, each func(typ uint16, data []byte) error) error {
	for len(b) > 0 {
		if len(b) < 4 {
			return errShort
		}
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return errShort
		}
		if err := each(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:n]); err != nil {
			return err
		}
		b = b[min(len(b), align(n)):]
	}
	return nil
}

// attrs are the attributes of one object. Of those that come twice it knows
// neither: see twice.
type attrs map[uint16][]byte

func parseAttrs(b []byte) (attrs, error) {
	a := make(attrs)
	err := eachAttr(b, func(typ uint16, data []byte) error {
		if _, ok := a[typ]; ok {
			return fmt.Errorf("attribute %d comes twice", typ)
		}
		a[typ] = data
		return nil
	})
	return a, err
}

func (a attrs) str(typ uint16) string {
	b := a[typ]
	if n := len(b); n > 0 && b[n-1] == 0 {
		b = b[:n-1]
	}
	return string(b)
}

// uint32 is 0 if the attribute is absent or has another length.
func (a attrs) uint32(typ uint16) uint32 {
	if b := a[typ]; len(b) == 4 {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (a attrs) uint64(typ uint16) uint64 {
	if b := a[typ]; len(b) == 8 {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}
