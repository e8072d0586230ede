package guest

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
)

// serialName is what the host calls the port that is the link.
const serialName = "ironclaw.link"

var errBadLink = errors.New("ironclaw.link is neither serial nor vsock:PORT")

// linkSpec says what the link runs over.
type linkSpec struct {
	vsockPort uint32 // of the host; 0 means virtio-serial
}

func parseLink(s string) (linkSpec, error) {
	if s == "serial" {
		return linkSpec{}, nil
	}
	digits, ok := strings.CutPrefix(s, "vsock:")
	port, err := strconv.ParseUint(digits, 10, 32)
	if !ok || err != nil || port == 0 {
		return linkSpec{}, errBadLink
	}
	return linkSpec{vsockPort: uint32(port)}, nil
}

func (l linkSpec) open() (link.Guest, error) {
	if l.vsockPort != 0 {
		return link.GuestVsock(guestrpc.PortHello, l.vsockPort), nil
	}
	port, err := openSerial()
	if err != nil {
		return nil, err
	}
	return link.NewMux(port, link.GuestSide), nil
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
// A read of a port whose other end nobody holds gives end of file, at once. A
// host that has not connected yet, or that restores a snapshot and connects
// then, must not look like one that has gone: until the first byte, end of file
// means "not yet".
type serialPort struct {
	f       *os.File
	raw     syscall.RawConn
	started bool // a byte has been read; used by the one reader only
}

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
	var n int
	var rerr error
	err := p.raw.Read(func(fd uintptr) bool {
		for {
			n, rerr = unix.Read(int(fd), b)
			if rerr != unix.EINTR {
				break
			}
		}
		// The poller is edge-triggered: connecting alone wakes nobody up, the
		// first byte does.
		return rerr != unix.EAGAIN && (n > 0 || rerr != nil || p.started)
	})
	switch {
	case err != nil: // there are no deadlines: it is closed
		return 0, os.ErrClosed
	case rerr != nil:
		return 0, os.NewSyscallError("read", rerr)
	case n == 0:
		return 0, io.EOF
	}
	p.started = true
	return n, nil
}

func (p *serialPort) Write(b []byte) (int, error) { return p.f.Write(b) }

// Close unblocks Read and Write.
func (p *serialPort) Close() error { return p.f.Close() }
