package firewalltest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

const (
	arrives = 10 * time.Second       // how long a packet that should arrive may take
	nothing = 150 * time.Millisecond // how long one that should not is waited for
)

// lab is three namespaces in a row. That of the machine has, other than a real one,
// devices, addresses and routes, and forwards: all that an attacker could wish for.
// No packet can leave for anywhere else: there is no other device.
type lab struct {
	lan, machine, far *Namespace
}

// newLab makes it. The neighbours are entered by hand: otherwise the firewall would
// stop IPv6 already by stopping neighbour discovery, and a test could not tell.
func newLab(t testing.TB) *lab {
	t.Helper()
	testenv.NeedTool(t, "ip", "iproute2")
	l := &lab{lan: New(t), machine: New(t), far: New(t)}
	l.lan.Run(t, `
		ip link add l0 address 02:00:00:00:00:01 type veth peer name m0 address 02:00:00:00:00:02
		ip link set m0 netns `+l.machine.path())
	l.far.Run(t, `
		ip link add f0 address 02:00:00:00:00:04 type veth peer name m1 address 02:00:00:00:00:03
		ip link set m1 netns `+l.machine.path())
	l.lan.Run(t, `
		ip link set lo up
		ip link set l0 up
		ip addr add 10.77.0.1/24 dev l0
		ip addr add 10.77.0.53/24 dev l0
		ip addr add 169.254.169.254/32 dev l0
		ip addr add fd77::1/64 dev l0 nodad
		ip addr add fd00:ec2::254/128 dev l0 nodad
		ip neigh replace fd77::2 lladdr 02:00:00:00:00:02 dev l0 nud permanent
		ip route add default via 10.77.0.2
		ip route add default via fd77::2`)
	l.machine.Run(t, `
		ip link set lo up
		ip link set m0 up
		ip link set m1 up
		ip addr add 10.77.0.2/24 dev m0
		ip addr add 10.78.0.1/24 dev m1
		ip addr add fd77::2/64 dev m0 nodad
		ip addr add fd78::1/64 dev m1 nodad
		ip neigh replace fd77::1 lladdr 02:00:00:00:00:01 dev m0 nud permanent
		ip neigh replace fd78::2 lladdr 02:00:00:00:00:04 dev m1 nud permanent
		ip route add default via 10.77.0.1
		ip route add default via fd77::1`)
	l.far.Run(t, `
		ip link set lo up
		ip link set f0 up
		ip addr add 10.78.0.2/24 dev f0
		ip addr add fd78::2/64 dev f0 nodad
		ip neigh replace fd78::1 lladdr 02:00:00:00:00:03 dev f0 nud permanent
		ip route add default via 10.78.0.1
		ip route add default via fd78::1`)
	err := l.machine.Do(func() error {
		return errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// probe is a packet that somebody wants to get somewhere.
type probe struct {
	name     string
	hook     rules.Hook // that it meets in the machine's namespace
	from, to *Namespace
	uid      uint32 // who sends it
	toUID    uint32 // whose socket it is for
	network  string // "udp", "tcp", "icmp", "icmp6"
	addr     string // in the namespace to; with a port unless it is ICMP
}

func (p probe) String() string {
	return fmt.Sprintf("%s (%s %s, from user %d to user %d)", p.name, p.network, p.addr, p.uid, p.toUID)
}

// probes are the ways out of the machine, into it and through it.
func (l *lab) probes() []probe {
	out := func(name, network, addr string) probe {
		return probe{name: name, hook: rules.Output, from: l.machine, to: l.lan, network: network, addr: addr}
	}
	in := func(network, addr string) probe {
		return probe{name: "into the machine", hook: rules.Input, from: l.lan, to: l.machine, network: network, addr: addr}
	}
	through := func(network, addr string) probe {
		return probe{name: "through the machine", hook: rules.Forward, from: l.far, to: l.lan, network: network, addr: addr}
	}
	back := func(network, addr string) probe {
		return probe{name: "back through the machine", hook: rules.Forward, from: l.lan, to: l.far, network: network, addr: addr}
	}
	return []probe{
		out("LAN", "tcp", "10.77.0.1:8080"), out("LAN", "udp", "10.77.0.1:8080"), out("LAN", "icmp", "10.77.0.1"),
		out("LAN", "tcp", "[fd77::1]:8080"), out("LAN", "udp", "[fd77::1]:8080"), out("LAN", "icmp6", "fd77::1"),
		out("DNS", "udp", "10.77.0.53:53"), out("DNS", "tcp", "10.77.0.53:53"),
		out("metadata", "tcp", "169.254.169.254:80"), out("metadata", "udp", "169.254.169.254:80"),
		out("metadata", "tcp", "[fd00:ec2::254]:80"), out("metadata", "udp", "[fd00:ec2::254]:80"),
		in("tcp", "10.77.0.2:22"), in("udp", "10.77.0.2:22"), in("icmp", "10.77.0.2"),
		in("tcp", "[fd77::2]:22"), in("udp", "[fd77::2]:22"), in("icmp6", "fd77::2"),
		through("tcp", "169.254.169.254:80"), through("udp", "10.77.0.53:53"), through("icmp", "10.77.0.1"),
		through("tcp", "[fd77::1]:8080"), through("udp", "[fd00:ec2::254]:80"), through("icmp6", "fd77::1"),
		back("udp", "10.78.0.2:53"), back("udp", "[fd78::2]:53"),
	}
}

// loopback are packets that stay in the machine's namespace.
func (l *lab) loopback() []probe {
	var all []probe
	for _, addr := range []string{"127.0.0.1:8080", "[::1]:8080"} {
		for _, network := range []string{"tcp", "udp"} {
			all = append(all, probe{name: "loopback", hook: rules.Output, from: l.machine, to: l.machine, network: network, addr: addr})
		}
	}
	return all
}

// oneWay reports whether delivery needs no packet back.
func (p probe) oneWay() bool { return p.network != "tcp" }

// delivered sends the packet and reports whether it came to the socket that it was
// for. An error says that the test could not be made.
func (p probe) delivered(wait time.Duration) (bool, error) {
	ok := false
	err := p.to.As(p.toUID, func() error {
		l, err := p.listen()
		if err != nil {
			return err
		}
		defer l.Close()
		nonce := []byte(rand.Text())
		var sent error
		// A packet may get lost for other reasons: a device that has just come up
		// drops some. So it is sent again, as programs do.
		for end := time.Now().Add(wait); !ok && time.Now().Before(end); {
			once := wait
			if p.oneWay() {
				once = nothing / 3
			}
			sent = p.from.As(p.uid, func() error { return p.send(nonce, once) })
			if err := l.receive(nonce, once); err == nil {
				ok = true
			} else if ne, isNet := errors.AsType[net.Error](err); !isNet || !ne.Timeout() {
				return err
			}
		}
		if ok && sent != nil {
			return fmt.Errorf("it arrived, and yet: %w", sent)
		}
		return nil
	})
	if err != nil {
		return ok, fmt.Errorf("%s: %w", p, err)
	}
	return ok, nil
}

// receiver waits for one nonce.
type receiver interface {
	receive(nonce []byte, wait time.Duration) error
	Close() error
}

type streams struct{ *net.TCPListener }

func (l streams) receive(nonce []byte, wait time.Duration) error {
	l.SetDeadline(time.Now().Add(wait))
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(wait))
	got := make([]byte, len(nonce))
	if _, err := c.Read(got); err != nil {
		return err
	}
	if string(got) != string(nonce) {
		return errors.New("something else arrived")
	}
	return nil
}

type packets struct{ net.PacketConn }

func (l packets) receive(nonce []byte, wait time.Duration) error {
	l.SetDeadline(time.Now().Add(wait))
	buf := make([]byte, 2048)
	for { // others' packets come to raw sockets, too
		n, _, err := l.ReadFrom(buf)
		if err != nil {
			return err
		}
		if strings.HasSuffix(string(buf[:n]), string(nonce)) {
			return nil
		}
	}
}

func (p probe) listen() (receiver, error) {
	var c net.ListenConfig
	ctx := context.Background() // not waited with: see onThread
	switch p.network {
	case "tcp":
		l, err := c.Listen(ctx, "tcp", p.addr)
		if err != nil {
			return nil, err
		}
		return streams{l.(*net.TCPListener)}, nil
	case "udp":
		l, err := c.ListenPacket(ctx, "udp", p.addr)
		return packets{l}, err
	case "icmp":
		l, err := c.ListenPacket(ctx, "ip4:icmp", p.addr)
		return packets{l}, err
	case "icmp6":
		l, err := c.ListenPacket(ctx, "ip6:ipv6-icmp", p.addr)
		return packets{l}, err
	}
	return nil, fmt.Errorf("no network %q", p.network)
}

func (p probe) send(nonce []byte, wait time.Duration) error {
	network, data := p.network, nonce
	switch p.network {
	case "icmp":
		network = "ip4:icmp"
		data = echo(ipv4.ICMPTypeEcho, nonce)
	case "icmp6":
		network = "ip6:ipv6-icmp"
		data = echo(ipv6.ICMPTypeEchoRequest, nonce)
	}
	c, err := net.DialTimeout(network, p.addr, wait)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write(data)
	return err
}

// echo is an echo request. The kernel makes the checksum for IPv6.
func echo(typ icmp.Type, nonce []byte) []byte {
	b, err := (&icmp.Message{Type: typ, Body: &icmp.Echo{ID: 1, Seq: 1, Data: nonce}}).Marshal(nil)
	if err != nil {
		panic(err) // only for types that are none
	}
	return b
}

// expect sends the probes, all at once but those that have the same address, and
// compares which of them arrive.
func expect(t *testing.T, when string, probes []probe, want func(probe) bool) {
	t.Helper()
	same := make(map[string][]probe)
	for _, p := range probes {
		same[p.network+p.addr] = append(same[p.network+p.addr], p)
	}
	var wg sync.WaitGroup
	for _, probes := range same {
		wg.Go(func() {
			for _, p := range probes {
				wait := nothing
				if want(p) {
					wait = arrives
				}
				got, err := p.delivered(wait)
				if err != nil {
					t.Errorf("%s: %v", when, err)
				} else if got != want(p) {
					t.Errorf("%s: %s arrived: %v, want %v", when, p, got, want(p))
				}
			}
		})
	}
	wg.Wait()
}

func all(probe) bool  { return true }
func none(probe) bool { return false }
