// Package link carries byte streams between the host and one guest: the only
// way in or out of a machine.
//
// Two transports give the same thing, a [net.Conn] for each operation:
//
//   - AF_VSOCK, where the host has /dev/vhost-vsock. Each stream is a socket of
//     its own (package link/vsock on the host, [GuestVsock] in the guest).
//   - A virtio-serial port, which works everywhere and survives a snapshot. One
//     byte stream, on which [Mux] runs many.
//
// A conn of either kind has no half-close: Close ends both directions, what was
// written before still arrives. Who needs to know that it did must be told by
// the peer in-band (see package guestrpc).
//
// The guest is hostile. Nothing it sends makes the host allocate more than
// [Window] bytes for a stream the host opened, or block a call beyond its
// deadline; whatever breaks the protocol ends the link with [ErrProtocol].
package link

import (
	"context"
	"errors"
	"net"
)

// Host is the host's end of the link to one machine.
type Host interface {
	// Dial opens a stream to a port of the guest. It waits until the guest is
	// there, ctx ends or the link is closed. A port on which nobody listens
	// gives ErrRefused. Safe for concurrent use.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Close ends every stream and unblocks every Dial. Idempotent.
	Close() error
}

// Guest is the guest's end of the link.
type Guest interface {
	// Listen accepts streams that the host opens to port.
	Listen(port uint32) (net.Listener, error)
	// Close ends every stream and listener. Idempotent.
	Close() error
}

// Errors on which callers branch.
var (
	// ErrClosed is returned by every call once the link is gone: closed on this
	// side, or the machine has died.
	ErrClosed = errors.New("link closed")
	// ErrRefused is returned by Dial when nobody listens on the port.
	ErrRefused = errors.New("connection refused by the guest")
	// ErrProtocol ends the link when the peer breaks its rules.
	ErrProtocol = errors.New("link protocol violated by the peer")
)

// Addr is the address of one end of a stream.
type Addr struct {
	Side string // "host" or "guest"
	Port uint32
}

var _ net.Addr = Addr{}

// Network returns "ironclaw".
func (Addr) Network() string { return "ironclaw" }

func (a Addr) String() string { return a.Side + ":" + utoa(a.Port) }

func utoa(n uint32) string {
	var b [10]byte
	i := len(b)
	for {
		i--
		b[i] = byte('0' + n%10)
		if n /= 10; n == 0 {
			return string(b[i:])
		}
	}
}
