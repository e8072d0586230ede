// Package testnet makes a network to attack: a network namespace with the
// addresses that an attacker looks for (the host's loopback, a LAN, a name server,
// a cloud's metadata service), real servers on them, and a recorder of every packet.
//
// Start with [Command], which starts a program inside a new namespace, and in that
// program [Open]. No packet can leave the namespace: it has no interface but its
// loopback, and Open gives up if that is not so or if the namespace is not new. So
// what an attack sends goes to a server that was made here, or nowhere.
//
// [Net.Prove] shows that the servers answer and the recorder records, without which
// that nothing was received would prove nothing.
package testnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Addresses of the network, and who has them.
var (
	Loopback = []string{"127.0.0.1", "::1"}
	LAN      = []string{"10.213.7.1", "fd5e:213:7::1"}
	DNS      = []string{"10.213.7.53", "fd5e:213:7::53"}
	Metadata = []string{"169.254.169.254", "fd00:ec2::254"}
)

// Ports of its servers.
const (
	Port     = "8080" // TCP and UDP, of the loopback and the LAN
	DNSPort  = "53"
	HTTPPort = "80" // of the metadata service
)

// marker is in the environment of the program that Command starts.
const marker = "IRONCLAW_TEST_NETWORK"

// capabilities over the new namespace that the program inside needs: to set
// addresses, to listen on low ports, to record packets.
var capabilities = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_RAW}

// Command is a program that will run in a new network namespace: as root, of that
// alone; as a normal user inside a user namespace in which the user is the same.
func Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), marker+"=1")
	sys := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if uid, gid := os.Geteuid(), os.Getegid(); uid != 0 {
		sys.Cloneflags |= syscall.CLONE_NEWUSER
		sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		sys.AmbientCaps = capabilities
	}
	cmd.SysProcAttr = sys
	return cmd
}

// Inside reports whether this process was started by Command.
func Inside() bool { return os.Getenv(marker) != "" }

// Child is a program that will run beside this one in the namespace, with what it
// takes to send packets of any kind: an attacker whom nothing holds. Outside of a
// namespace it is a program like any other.
func Child(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 && Inside() {
		cmd.SysProcAttr.AmbientCaps = capabilities
	}
	return cmd
}

// Net is the network. Safe for concurrent use.
type Net struct {
	v6      bool
	rec     *recorder
	closers []func() error
	wg      sync.WaitGroup
}

// Open makes the network in this process's namespace, which must be new.
func Open() (*Net, error) {
	if err := checkNew(); err != nil {
		return nil, fmt.Errorf("make the test network: %w", err)
	}
	// What this process starts shall not have what it has: it would be more than
	// it has elsewhere.
	if os.Geteuid() != 0 {
		if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, 0); errno != 0 {
			return nil, fmt.Errorf("make the test network: drop inherited capabilities: %w", errno)
		}
	}
	n := &Net{}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"bring up the loopback", n.loopbackUp},
		{"set addresses", n.setAddresses},
		{"record packets", n.record},
		{"serve", n.serve},
	} {
		if err := step.do(); err != nil {
			n.Close()
			return nil, fmt.Errorf("make the test network: %s: %w", step.what, err)
		}
	}
	return n, nil
}

// checkNew refuses a namespace in which a packet could go anywhere: what the
// environment says is no proof.
func checkNew() error {
	if !Inside() {
		return errors.New("this process was not started in a network namespace of its own")
	}
	table, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(table)) {
		if name, _, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) != "lo" {
			return fmt.Errorf("the namespace has an interface %q", strings.TrimSpace(name))
		}
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return err
	}
	if lo.Flags&net.FlagUp != 0 {
		return errors.New("the namespace is not new: its loopback is up")
	}
	return nil
}

// IPv6 reports whether this host's kernel has IPv6.
func (n *Net) IPv6() bool { return n.v6 }

// Addresses gives those of a list that there are, with a port.
func (n *Net) Addresses(list []string, port string) []string {
	var out []string
	for _, a := range list {
		if n.v6 || !strings.Contains(a, ":") {
			out = append(out, net.JoinHostPort(a, port))
		}
	}
	return out
}

// Hosts gives those addresses of a list that there are.
func (n *Net) Hosts(list []string) []string {
	var out []string
	for _, a := range list {
		if n.v6 || !strings.Contains(a, ":") {
			out = append(out, a)
		}
	}
	return out
}

// Close ends the servers.
func (n *Net) Close() error {
	for _, c := range n.closers {
		_ = c()
	}
	n.wg.Wait()
	return nil
}

// Prove shows that every server answers and that the recorder sees it.
func (n *Net) Prove() error {
	before, err := n.Packets()
	if err != nil {
		return fmt.Errorf("prove the test network: %w", err)
	}
	for _, s := range n.servers() {
		if err := s.askUntil(time.Now().Add(fenceTime)); err != nil {
			return fmt.Errorf("prove the test network: %s %s does not answer: %w", s.network, s.address, err)
		}
		after, err := n.Packets()
		if err != nil {
			return fmt.Errorf("prove the test network: %w", err)
		}
		if after <= before {
			return fmt.Errorf("prove the test network: what was said to %s %s was not recorded", s.network, s.address)
		}
		before = after
	}
	return nil
}

// fenceTime bounds the wait for a packet of our own.
const fenceTime = 5 * time.Second
