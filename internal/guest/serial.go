package guest

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guest/hostile"
	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
)

// serialName is what the host calls the port that is the link.
const serialName = "ironclaw.link"

// Values of ironclaw.link.
const (
	linkSerial = "serial"
	linkVsock  = "vsock"
)

func checkLink(name string) error {
	if name != linkSerial && name != linkVsock {
		return errors.New("ironclaw.link is neither serial nor vsock")
	}
	return nil
}

func openLink(name string) (link.Guest, error) {
	if name == linkVsock {
		return link.GuestVsock(guestrpc.PortHello, vsockHostPort), nil
	}
	port, err := openSerial()
	if err != nil {
		return nil, err
	}
	return link.NewMux(port, link.GuestSide), nil
}

// runHostile runs the hostile agent on the link.
func runHostile(name string) error {
	if name == linkVsock {
		return hostile.Vsock(link.GuestVsock(guestrpc.PortHello, vsockHostPort))
	}
	port, err := openSerial()
	if err != nil {
		return err
	}
	return hostile.Serial(port)
}

// vsockHostPort is where the host waits for our call: at the port that has the
// number of our address, which changes when a saved machine is started again.
func vsockHostPort() (uint32, error) {
	f, err := os.Open("/dev/vsock")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return unix.IoctlGetUint32(int(f.Fd()), unix.IOCTL_VM_SOCKETS_GET_LOCAL_CID)
}

// openSerial waits for the port: the host names it in a message of its own,
// some time after the driver has found the device.
func openSerial() (*serialPort, error) {
	u, err := openUevents()
	if err != nil {
		return nil, err
	}
	defer u.Close()
	var device string
	err = u.wait(time.Now().Add(deviceTimeout), func() (bool, error) {
		device = findSerial("/sys/class/virtio-ports")
		return device != "", nil
	})
	if err != nil {
		return nil, errors.New("find port " + serialName + ": " + err.Error())
	}
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return newSerialPort(f)
}

func findSerial(class string) string {
	names, _ := filepath.Glob(class + "/*/name")
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(b)) == serialName {
			return "/dev/" + filepath.Base(filepath.Dir(name))
		}
	}
	return ""
}

// serialPort is a virtio-serial port as a stream.
//
// A read of a port whose other end nobody holds gives end of file, at once. Two
// things look like that and are not the end:
//
//   - A host that has not connected yet, or that restores a snapshot and
//     connects then. Until the first byte, end of file means "not yet".
//   - A host that has just connected. The driver hears of that by another queue
//     than that of the bytes, which may come first. So the end is believed only
//     if it lasts.
type serialPort struct {
	f       *os.File
	raw     syscall.RawConn
	started bool // a byte has been read; used by the one reader only
}

// hostGrace is how long nobody must hold the other end for the host to be gone.
const hostGrace = time.Second

var _ io.ReadWriteCloser = (*serialPort)(nil)

func newSerialPort(f *os.File) (*serialPort, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &serialPort{f: f, raw: raw}, nil
}

func (p *serialPort) Read(b []byte) (int, error) {
	for {
		n, err := p.read(b, p.started)
		if n > 0 {
			p.started = true
		}
		if n > 0 || err != nil {
			return n, err
		}
		p.f.SetReadDeadline(time.Now().Add(hostGrace))
		n, err = p.read(b, false)
		p.f.SetReadDeadline(time.Time{})
		switch {
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return n, err
		case p.hungUp():
			return 0, io.EOF
		}
	}
}

// read reads what is there or comes. At an end of file it returns 0 if it may,
// and waits otherwise: the poller tells of the next byte.
func (p *serialPort) read(b []byte, mayEnd bool) (n int, err error) {
	var rerr error
	err = p.raw.Read(func(fd uintptr) bool {
		for {
			n, rerr = unix.Read(int(fd), b)
			if rerr != unix.EINTR {
				break
			}
		}
		return n > 0 || rerr != unix.EAGAIN && (rerr != nil || mayEnd)
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, err
	case err != nil: // package poll's own error, for a file that is closed
		return 0, os.ErrClosed
	case rerr != nil:
		return 0, os.NewSyscallError("read", rerr)
	}
	return n, nil
}

// hungUp reports whether nobody holds the other end.
func (p *serialPort) hungUp() bool {
	up := false
	err := p.raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, err := unix.Poll(poll, 0)
		up = err == nil && poll[0].Revents&unix.POLLHUP == 0
	})
	return err != nil || !up
}

func (p *serialPort) Write(b []byte) (int, error) { return p.f.Write(b) }

// Close unblocks Read and Write.
func (p *serialPort) Close() error { return p.f.Close() }
