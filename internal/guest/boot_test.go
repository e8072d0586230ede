package guest

import (
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCheckLink(t *testing.T) {
	for _, s := range []string{"serial", "vsock"} {
		if err := checkLink(s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range []string{"", "1234", "vsock:1234", "tcp:1"} {
		if err := checkLink(s); err == nil {
			t.Errorf("%q is a link", s)
		}
	}
}

func TestOnlyLoopback(t *testing.T) {
	const head = "Inter-|   Receive  |  Transmit\n face |bytes    packets|bytes    packets\n"
	if err := onlyLoopback(head + "    lo:       0       0\n"); err != nil {
		t.Error(err)
	}
	if err := onlyLoopback(head + "    lo:  0  0\n  eth0:  0  0\n"); err == nil {
		t.Error("eth0 was overlooked")
	}
}

func TestCommandMemory(t *testing.T) {
	info := func(total, available string) string {
		return "MemTotal:  " + total + " kB\nMemFree:  1 kB\nMemAvailable: " + available + " kB\n"
	}
	for _, c := range []struct {
		total, available string
		want             int64
	}{
		{"223768", "182412", 182412<<10 - minReserve},
		{"4000000", "3900000", 3900000<<10 - 200000<<10},
	} {
		if got, err := commandMemory(info(c.total, c.available)); err != nil || got != c.want {
			t.Errorf("%s: %d, %v; want %d", c.total, got, err, c.want)
		}
	}
	for _, s := range []string{"", info("60000", "20000"), info("x", "y")} {
		if n, err := commandMemory(s); err == nil {
			t.Errorf("%q: %d", s, n)
		}
	}
}

func TestDetect(t *testing.T) {
	for want, put := range map[string]func(b []byte){
		"ext4":     func(b []byte) { copy(b[0x438:], "\x53\xef") },
		"squashfs": func(b []byte) { copy(b, "hsqs") },
		"erofs":    func(b []byte) { copy(b[1024:], "\xe2\xe1\xf5\xe0") },
		"":         func([]byte) {},
	} {
		b := make([]byte, 4096)
		put(b)
		name := t.TempDir() + "/disk"
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := detect(name); got != want || (err == nil) != (want != "") {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
}

func TestEnsureDir(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/", dir+"/tmp"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := ensureDir(dir+"/tmp", 0o777|os.ModeSticky); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Lstat(dir + "/tmp"); err != nil || st.Mode() != os.ModeDir|os.ModeSticky|0o777 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// A FIFO ends and begins again as a virtio-serial port does: it gives end of
// file while nobody holds the other end.
func TestSerialPortWaitsForItsHost(t *testing.T) {
	name := t.TempDir() + "/fifo"
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	port, err := newSerialPort(f)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	read := func() {
		var b [16]byte
		n, err := port.Read(b[:])
		if err == nil && string(b[:n]) != "hello" {
			err = errors.New(string(b[:n]))
		}
		got <- err
	}
	go read()
	connect := func() *os.File {
		w, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	connect().Close() // a host that came and went, as a snapshot's does
	select {
	case err := <-got:
		t.Fatalf("read before the host has come: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	w := connect()
	w.WriteString("hello")
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	w.Close()
	go read()
	if err := <-got; err != io.EOF {
		t.Errorf("after the host has gone: %v", err)
	}

	go read()
	<-got
	port.started = false
	go read()
	time.Sleep(20 * time.Millisecond)
	port.Close()
	if err := <-got; !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestFindSerial(t *testing.T) {
	class := t.TempDir()
	for dev, name := range map[string]string{"vport0p1": "other\n", "vport1p1": serialName + "\n"} {
		if err := os.Mkdir(class+"/"+dev, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(class+"/"+dev+"/name", []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := findSerial(class); got != "/dev/vport1p1" {
		t.Errorf("%q", got)
	}
	if got := findSerial(class + "/nothing"); got != "" {
		t.Errorf("%q", got)
	}
}
