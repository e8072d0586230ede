package firewalltest

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
)

// guardPackets takes the lab's namespace in the middle for a host's. What the guarded
// users send is delivered without the guard, not with it, and again when it is gone;
// what all others send and receive always is.
func guardPackets(t *testing.T, b rules.Backend) {
	l, r := newLab(t), rules.Guard(guarded.First, guarded.Last)
	var theirs, others []probe
	for _, p := range append(l.probes(), l.loopback()...) {
		if p.hook == rules.Output && p.oneWay() == (p.network == "udp") { // ICMP needs a capability
			for _, uid := range []uint32{guarded.First, guarded.First + 42, guarded.Last} {
				p.uid = uid
				theirs = append(theirs, p)
			}
			for _, uid := range []uint32{1, guarded.First - 1, guarded.Last + 1, 65534} {
				p.uid = uid
				others = append(others, p)
			}
		}
		p.uid = 0
		others = append(others, p)
	}
	// A connection to one of them needs an answer, which is dropped. What needs none
	// comes in: see docs/network-isolation.md, "What is not covered".
	for _, addr := range []string{"10.77.0.2:2222", "[fd77::2]:2222"} {
		p := probe{name: "to theirs", hook: rules.Input, from: l.lan, to: l.machine, toUID: guarded.First, network: "tcp", addr: addr}
		theirs = append(theirs, p)
		p.network = "udp"
		others = append(others, p)
	}
	escaped := openSocket(t, l, guarded.First)
	root := openConns(t, l)
	expect(t, "without the guard", append(theirs, others...), all)
	escaped(t, "without the guard", true)

	set(t, b, l.machine, r)
	root(t, "with the guard")
	escaped(t, "with the guard", false)
	expect(t, "with the guard", theirs, none)
	expect(t, "with the guard", others, all)
	in(t, l.machine, func() error {
		counts, err := b.Counters(t.Context(), r)
		if err == nil && (len(counts) != 1 || counts[0].Packets < uint64(len(theirs))) {
			err = fmt.Errorf("counted %v, of at least %d", counts, len(theirs))
		}
		return err
	})
	if d := verify(t, b, l.machine, r); d != nil {
		t.Errorf("after packets have been counted: %v", d)
	}

	in(t, l.machine, func() error { return b.Remove(t.Context(), r) })
	expect(t, "after the guard", append(theirs, others...), all)
	escaped(t, "after the guard", true)
	root(t, "after the guard")
}

// openSocket makes a socket as uid, to be used later: a process that had one before
// the guard came is held by it, too. What is returned sends by it.
func openSocket(t *testing.T, l *lab, uid uint32) func(t *testing.T, when string, want bool) {
	t.Helper()
	var to net.PacketConn
	var from net.Conn
	err := errors.Join(
		l.lan.Do(func() (err error) { to, err = net.ListenPacket("udp", "10.77.0.1:9999"); return err }),
		l.machine.As(uid, func() (err error) { from, err = net.Dial("udp", "10.77.0.1:9999"); return err }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { to.Close(); from.Close() })
	return func(t *testing.T, when string, want bool) {
		t.Helper()
		nonce, wait := []byte(rand.Text()), nothing
		if want {
			wait = arrives
		}
		_, sent := from.Write(nonce)
		err := packets{to}.receive(nonce, wait)
		if (err == nil) != want {
			t.Errorf("%s: by a socket from before: received: %v, sent: %v", when, err, sent)
		}
	}
}

// openConns opens connections of the host's own, out and in, with both families.
// What is returned checks that they still carry bytes both ways.
func openConns(t *testing.T, l *lab) func(t *testing.T, when string) {
	t.Helper()
	type pair struct{ here, there net.Conn }
	var pairs []pair
	open := func(from, to *Namespace, addr string) error {
		var ln net.Listener
		var p pair
		err := to.Do(func() (err error) { ln, err = net.Listen("tcp", addr); return err })
		if err != nil {
			return err
		}
		defer ln.Close()
		err = from.Do(func() (err error) { p.here, err = net.DialTimeout("tcp", addr, arrives); return err })
		if err != nil {
			return err
		}
		t.Cleanup(func() { p.here.Close() })
		if p.there, err = ln.Accept(); err != nil {
			return err
		}
		t.Cleanup(func() { p.there.Close() })
		pairs = append(pairs, p)
		return nil
	}
	err := errors.Join(open(l.machine, l.lan, "10.77.0.1:7"), open(l.machine, l.lan, "[fd77::1]:7"),
		open(l.lan, l.machine, "10.77.0.2:7"), open(l.lan, l.machine, "[fd77::2]:7"), open(l.machine, l.machine, "127.0.0.1:7"))
	if err != nil {
		t.Fatal(err)
	}
	return func(t *testing.T, when string) {
		t.Helper()
		for _, p := range pairs {
			for _, way := range [][2]net.Conn{{p.here, p.there}, {p.there, p.here}} {
				nonce := rand.Text()
				got := make([]byte, len(nonce))
				_, err := io.WriteString(way[0], nonce)
				if err == nil {
					way[1].SetReadDeadline(time.Now().Add(arrives))
					_, err = io.ReadFull(way[1], got)
				}
				if err != nil || string(got) != nonce {
					t.Errorf("%s: %v -> %v: %q, %v", when, way[0].LocalAddr(), way[1].LocalAddr(), got, err)
				}
			}
		}
	}
}
