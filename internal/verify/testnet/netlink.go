package testnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

func (n *Net) loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_LOOPBACK)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}

// setAddresses gives the loopback all addresses of the network.
func (n *Net) setAddresses() error {
	if _, err := os.Stat("/proc/self/net/if_inet6"); err == nil {
		n.v6 = true
	}
	for _, list := range [][]string{LAN, DNS, Metadata} {
		for _, a := range n.Hosts(list) {
			if err := addAddress(netip.MustParseAddr(a)); err != nil {
				return fmt.Errorf("%s: %w", a, err)
			}
		}
	}
	return nil
}

// loopbackIndex is the number of the loopback in every network namespace.
const loopbackIndex = 1

// addAddress is `ip address add A dev lo`: RTM_NEWADDR of rtnetlink(7), with an
// acknowledgement.
func addAddress(a netip.Addr) error {
	family, bits := byte(unix.AF_INET), byte(32)
	if a.Is6() {
		family, bits = unix.AF_INET6, 128
	}
	body := []byte{family, bits, unix.IFA_F_NODAD, 0} // struct ifaddrmsg
	body = binary.NativeEndian.AppendUint32(body, loopbackIndex)
	for _, attr := range []uint16{unix.IFA_LOCAL, unix.IFA_ADDRESS} {
		raw := a.AsSlice()
		body = binary.NativeEndian.AppendUint16(body, uint16(4+len(raw)))
		body = binary.NativeEndian.AppendUint16(body, attr)
		body = append(body, raw...)
	}
	msg := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	msg = binary.NativeEndian.AppendUint16(msg, unix.RTM_NEWADDR)
	msg = binary.NativeEndian.AppendUint16(msg, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	msg = binary.NativeEndian.AppendUint64(msg, 1) // sequence number 1, port 0
	return askKernel(append(msg, body...))
}

func askKernel(msg []byte) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	b := make([]byte, 4096)
	got, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil {
		return err
	}
	// A struct nlmsghdr and a struct nlmsgerr, which begins with minus the error.
	if got < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel gave no acknowledgement")
	}
	if code := int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}
