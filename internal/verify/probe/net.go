package probe

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// answerTime is how long an answer may take that comes from the same host.
const answerTime = 2 * time.Second

var netAttacks = map[string]attack{
	"net.tcp":        tcp,
	"net.udp":        udp,
	"net.icmp":       icmp,
	"net.packet":     packet,
	"net.interfaces": interfaces,
	"net.vsock":      vsockConnect,
	"net.socket":     socketFamilies,
	"net.unix":       unixConnect,
	"net.netlink":    netlinkAddress,
	"net.self":       toSelf,
	"net.given":      askGiven,
	"net.serve":      serve,
}

// tcp ADDRESS...: connects.
func tcp(args []string) (Outcome, string) {
	return several(args, func(address string) error {
		c, err := net.DialTimeout("tcp", address, answerTime)
		if err != nil {
			return shortTimeout(err)
		}
		return c.Close()
	})
}

// serve ADDRESS MILLISECONDS: listens, for others to try to reach it.
func serve(args []string) (Outcome, string) {
	if len(args) != 2 {
		return Unknown, "an address and a time are needed"
	}
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return Unknown, err.Error()
	}
	time.AfterFunc(duration(args[1:]), func() { l.Close() })
	if _, err := os.Stdout.WriteString("up\n"); err != nil {
		return Unknown, err.Error()
	}
	for calls := 0; ; calls++ {
		c, err := l.Accept()
		if err != nil {
			return Refused, fmt.Sprintf("%d calls", calls)
		}
		c.Close()
	}
}

// udp ADDRESS HEX...: sends a datagram of those bytes and waits for an answer.
func udp(args []string) (Outcome, string) {
	var addresses []string
	payload := make(map[string][]byte)
	for i := 0; i+1 < len(args); i += 2 {
		b, err := hex.DecodeString(args[i+1])
		if err != nil {
			return Unknown, err.Error()
		}
		addresses, payload[args[i]] = append(addresses, args[i]), b
	}
	return several(addresses, func(address string) error {
		c, err := net.DialTimeout("udp", address, answerTime)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write(payload[address]); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(answerTime / 2))
		_, err = c.Read(make([]byte, 1500))
		return shortTimeout(err)
	})
}

func shortTimeout(err error) error {
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return errors.New("no answer")
	}
	return err
}

// icmp ADDRESS...: sends an echo request on a raw socket and waits for the reply.
func icmp(args []string) (Outcome, string) {
	return several(args, func(address string) error {
		a, err := netip.ParseAddr(address)
		if err != nil {
			return err
		}
		return ping(a)
	})
}

func ping(a netip.Addr) error {
	family, proto := unix.AF_INET, unix.IPPROTO_ICMP
	request, reply := byte(8), byte(0)
	var to unix.Sockaddr = &unix.SockaddrInet4{Addr: as4(a)}
	if a.Is6() {
		family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
		request, reply = 128, 129
		to = &unix.SockaddrInet6{Addr: a.As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(int64(answerTime / 4))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	msg := []byte{request, 0, 0, 0, 0x1c, 0x1a, 0, 1, 'i', 'r', 'o', 'n'}
	binary.BigEndian.PutUint16(msg[2:], checksum(msg)) // the kernel makes ICMPv6's
	if err := unix.Sendto(fd, msg, 0, to); err != nil {
		return err
	}
	for deadline := time.Now().Add(answerTime / 2); time.Now().Before(deadline); {
		b := make([]byte, 1500)
		n, _, err := unix.Recvfrom(fd, b, 0)
		if err != nil {
			return errors.New("no answer")
		}
		b = b[:n]
		if family == unix.AF_INET && n > 20 {
			b = b[int(b[0]&15)*4:]
		}
		if len(b) >= 6 && b[0] == reply && b[4] == 0x1c && b[5] == 0x1a {
			return nil
		}
	}
	return errors.New("no answer")
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// packet HEX: puts a frame of those bytes on every interface there is. Whether it
// arrived anywhere is for others to say.
func packet(args []string) (Outcome, string) {
	if len(args) != 1 {
		return Unknown, "one frame is needed"
	}
	payload, err := hex.DecodeString(args[0])
	if err != nil {
		return Unknown, err.Error()
	}
	names, err := interfaceNames()
	if err != nil {
		return Unknown, err.Error()
	}
	return several(names, func(name string) error { return sendFrame(name, payload) })
}

func sendFrame(name string, payload []byte) error {
	const ethPIP = 0x0800
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifi, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifi); err != nil {
		return err
	}
	frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, ethPIP >> 8, ethPIP & 0xff}, payload...)
	return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: int(ifi.Uint32()), Halen: 6, Protocol: 0x0008})
}

// interfaceNames reads them from /proc, or asks the kernel where there is no
// /proc: sysfs shows those of the namespace in which it was mounted.
func interfaceNames() ([]string, error) {
	f, err := os.Open("/proc/net/dev")
	if err != nil {
		list, err := net.Interfaces()
		var names []string
		for _, i := range list {
			names = append(names, i.Name)
		}
		return names, err
	}
	defer f.Close()
	var names []string
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, _, ok := strings.Cut(s.Text(), ":"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names, nil
}

// interfaces: looks for a network interface that is not the loopback.
func interfaces([]string) (Outcome, string) {
	names, err := interfaceNames()
	if err != nil {
		return tried("list interfaces", err)
	}
	list := strings.Join(names, ", ")
	for _, n := range names {
		if n != "lo" {
			return Worked, list
		}
	}
	return Refused, "there is only " + list
}

// netlinkAddress: asks the kernel for its routes by netlink.
func netlinkAddress([]string) (Outcome, string) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err == nil {
		unix.Close(fd)
	}
	return tried("open a netlink socket", err)
}

// vsockConnect CID:PORT...: CID may be a number, or "own", "own+1", "own-1".
func vsockConnect(args []string) (Outcome, string) {
	own, hasOwn := uint32(0), false
	if f, err := os.Open("/dev/vsock"); err == nil {
		cid, err := unix.IoctlGetUint32(int(f.Fd()), unix.IOCTL_VM_SOCKETS_GET_LOCAL_CID)
		own, hasOwn = cid, err == nil && cid != unix.VMADDR_CID_ANY
		f.Close()
	}
	return several(args, func(address string) error {
		cid, port, err := vsockAddress(address, own, hasOwn)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Connect(fd, &unix.SockaddrVM{CID: cid, Port: port}) // the kernel waits two seconds at most
	})
}

func vsockAddress(s string, own uint32, hasOwn bool) (cid, port uint32, err error) {
	c, p, _ := strings.Cut(s, ":")
	if rest, ok := strings.CutPrefix(c, "own"); ok {
		if !hasOwn {
			return 0, 0, errors.New("no address of its own")
		}
		delta, _ := strconv.Atoi(rest)
		cid = own + uint32(delta)
	} else if n, err := strconv.ParseUint(c, 10, 32); err == nil {
		cid = uint32(n)
	} else {
		return 0, 0, err
	}
	n, err := strconv.ParseUint(p, 10, 32)
	return cid, uint32(n), err
}

// families are those by which something outside can be reached, or that have had
// more than their share of the kernel's faults.
var families = map[string][2]int{
	"unix":       {unix.AF_UNIX, unix.SOCK_STREAM},
	"inet":       {unix.AF_INET, unix.SOCK_STREAM},
	"inet udp":   {unix.AF_INET, unix.SOCK_DGRAM},
	"inet raw":   {unix.AF_INET, unix.SOCK_RAW},
	"inet6":      {unix.AF_INET6, unix.SOCK_STREAM},
	"netlink":    {unix.AF_NETLINK, unix.SOCK_RAW},
	"packet":     {unix.AF_PACKET, unix.SOCK_RAW},
	"vsock":      {unix.AF_VSOCK, unix.SOCK_STREAM},
	"alg":        {unix.AF_ALG, unix.SOCK_SEQPACKET},
	"bluetooth":  {unix.AF_BLUETOOTH, unix.SOCK_RAW},
	"can":        {unix.AF_CAN, unix.SOCK_RAW},
	"tipc":       {unix.AF_TIPC, unix.SOCK_STREAM},
	"xdp":        {unix.AF_XDP, unix.SOCK_RAW},
	"key":        {unix.AF_KEY, unix.SOCK_RAW},
	"rds":        {unix.AF_RDS, unix.SOCK_SEQPACKET},
	"socketpair": {-1, 0},
}

// socketFamilies NAME...: opens a socket of each family.
func socketFamilies(args []string) (Outcome, string) {
	return several(args, func(name string) error {
		f, ok := families[name]
		if !ok {
			return fmt.Errorf("no family %q", name)
		}
		if f[0] < 0 {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				unix.Close(fds[0])
				unix.Close(fds[1])
			}
			return err
		}
		fd, err := unix.Socket(f[0], f[1]|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	})
}

// unixConnect PATH...: connects to a Unix socket; "@name" is an abstract one.
func unixConnect(args []string) (Outcome, string) {
	return several(args, func(name string) error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Connect(fd, &unix.SockaddrUnix{Name: name})
	})
}

func as4(a netip.Addr) [4]byte {
	if a.Unmap().Is4() {
		return a.Unmap().As4()
	}
	return [4]byte{}
}

// askGiven: asks the socket that it was given, which was made on the host, for the network
// devices of where it was made.
func askGiven([]string) (Outcome, string) {
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return Unknown, err.Error()
	}
	return tried("SIOCGIFFLAGS of the host's lo", unix.IoctlIfreq(awaitFD, unix.SIOCGIFFLAGS, ifr))
}

// toSelf: brings its loopback up and sends itself a packet over it.
func toSelf([]string) (Outcome, string) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return tried("socket", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return Unknown, err.Error()
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return tried("bring the loopback up", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return tried("bind", err)
	}
	self, err := unix.Getsockname(fd)
	if err != nil {
		return Unknown, err.Error()
	}
	if err := unix.Sendto(fd, []byte("x"), 0, self); err != nil {
		return tried("send", err)
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 1000); err != nil || n == 0 {
		return Refused, "sent, and nothing arrived"
	}
	return Worked, "a packet to itself arrived"
}
