package testnet

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// recorder counts the packets of all interfaces of the namespace.
type recorder struct {
	file  *os.File
	fence *net.UDPConn // sends to itself

	mu    sync.Mutex // guards the rest
	count int
	fences
}

// fences are packets of our own: when one has been seen, all before it have been.
type fences struct {
	want []byte
	seen chan struct{}
}

// fenceMark begins every packet that does not count.
var fenceMark = []byte("ironclaw-fence-")

func (n *Net) record() error {
	const all = 0x0300 // ETH_P_ALL in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
	if err != nil {
		return err
	}
	r := &recorder{file: os.NewFile(uintptr(fd), "packets")}
	n.closers = append(n.closers, r.file.Close)
	r.fence, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	n.closers = append(n.closers, r.fence.Close)
	n.rec = r
	n.wg.Go(r.read)
	n.wg.Go(func() { drain(r.fence) })
	return nil
}

func drain(c *net.UDPConn) {
	for b := make([]byte, 256); ; {
		if _, err := c.Read(b); errors.Is(err, net.ErrClosed) {
			return
		}
	}
}

func (r *recorder) read() {
	raw, err := r.file.SyscallConn()
	if err != nil {
		return
	}
	b := make([]byte, 64<<10)
	for {
		var n int
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, rerr = unix.Read(int(fd), b)
			return rerr != unix.EAGAIN
		})
		if err != nil {
			return
		}
		if rerr == nil {
			r.add(b[:n])
		}
	}
}

func (r *recorder) add(packet []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if bytes.Contains(packet, fenceMark) {
		if r.want != nil && bytes.Contains(packet, r.want) {
			close(r.seen)
			r.want = nil
		}
		return
	}
	r.count++
}

// Packets is how many packets have been on any interface of the namespace until
// now.
func (n *Net) Packets() (int, error) {
	r := n.rec
	mark := append(bytes.Clone(fenceMark), rand.Text()...)
	seen := make(chan struct{})
	r.mu.Lock()
	r.fences = fences{mark, seen}
	r.mu.Unlock()
	if _, err := r.fence.WriteTo(mark, r.fence.LocalAddr()); err != nil {
		return 0, fmt.Errorf("count packets: %w", err)
	}
	select {
	case <-seen:
	case <-time.After(fenceTime):
		return 0, errors.New("count packets: the recorder has not seen a packet of ours")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.count, nil
}
