package guest

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, lo); err != nil {
		return fmt.Errorf("read its flags: %w", err)
	}
	lo.SetUint16(lo.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("set its flags: %w", err)
	}
	return nil
}

// checkNoNetwork refuses a machine that has a way out besides the link. The VMM
// was told to add none; this is the proof.
func checkNoNetwork() error {
	table, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		return err
	}
	return onlyLoopback(string(table))
}

func onlyLoopback(table string) error {
	for line := range strings.SplitSeq(table, "\n") {
		name, _, ok := strings.Cut(line, ":")
		if name = strings.TrimSpace(name); ok && name != "lo" {
			return fmt.Errorf("there is a network interface, %q", name)
		}
	}
	return nil
}
