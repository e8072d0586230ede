package verify

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/verify/probe"
	"github.com/ironclaw-run/ironclaw/internal/verify/testnet"
)

func guestAttacks() []Attack {
	return slices.Concat(networkAttacks(), vsockAttacks(), diskAttacks(), neighbourAttacks(), guestLayerAttacks(), floodAttacks(), imageAttack())
}

// networkAttacks go to each address that an attacker looks for, by each protocol
// and family.
func networkAttacks() []Attack {
	var all []Attack
	for _, t := range []struct {
		what  string
		hosts []string
		port  string
		ways  []string
	}{
		// Echo requests to a loopback are answered by the guest's own.
		{"the host's loopback", testnet.Loopback, testnet.Port, []string{"tcp", "udp"}},
		{"the LAN", testnet.LAN, testnet.Port, []string{"tcp", "udp", "icmp"}},
		{"a DNS server", testnet.DNS, testnet.DNSPort, []string{"tcp", "udp"}},
		{"the metadata address", testnet.Metadata, testnet.HTTPPort, []string{"tcp", "icmp"}},
	} {
		for _, host := range t.hosts {
			family := "IPv4"
			if strings.Contains(host, ":") {
				family = "IPv6"
			}
			for _, way := range t.ways {
				name := map[string]string{"tcp": "TCP", "udp": "UDP", "icmp": "raw ICMP"}[way]
				all = append(all, networkAttack(fmt.Sprintf("reach %s: %s, %s", t.what, name, family), way, host, t.port))
			}
		}
	}
	packet := func(r runner) attackFunc {
		return func(ctx context.Context, e *env) (Finding, error) {
			if e.net == nil {
				return Finding{}, e.noNet
			}
			// Sending on the guest's own loopback works, and goes nowhere: what
			// arrives here decides.
			f, err := e.counting(ctx, r, probe.Request{Attack: "net.packet", Args: []string{hex.EncodeToString(make([]byte, 64))}})
			f.Worked = f.packets > 0
			return f.Finding, err
		}
	}
	return append(all, Attack{
		Group: Guest, Layer: Machine, Name: "send frames on every interface by packet sockets", Expected: "no packet outside",
		run: packet((*env).guestProbe), control: packet((*env).childProbe),
	}, Attack{
		Group: Guest, Layer: Machine, Name: "find a network interface", Expected: "only a loopback",
		run: guestRefuses("net.interfaces"),
	})
}

// runner makes a probe's attack somewhere.
type runner func(*env, context.Context, probe.Request) (probe.Result, error)

type counted struct {
	Finding
	packets int
}

// counting makes an attack and counts the packets in the test network meanwhile.
func (e *env) counting(ctx context.Context, run runner, r probe.Request) (counted, error) {
	before, err := e.net.Packets()
	if err != nil {
		return counted{}, err
	}
	res, err := run(e, ctx, r)
	if err != nil {
		return counted{}, err
	}
	after, err := e.net.Packets()
	if err != nil {
		return counted{}, err
	}
	n := after - before
	return counted{Finding{fmt.Sprintf("%s; %d packets outside", res.Detail, n), res.Outcome == probe.Worked}, n}, nil
}

// networkAttack goes to one address. It has worked if somebody answered or if a
// packet came out.
func networkAttack(name, way, host, port string) Attack {
	try := func(run runner, isControl bool) attackFunc {
		return func(ctx context.Context, e *env) (Finding, error) {
			switch {
			case e.net == nil:
				return Finding{}, e.noNet
			case strings.Contains(host, ":") && !e.net.IPv6():
				return Finding{}, &notHere{"this host's kernel has no IPv6"}
			}
			address := e.net.Addresses([]string{host}, port)[0]
			r := probe.Request{Attack: "net." + way, Args: []string{address}}
			switch {
			case way == "icmp":
				r.Args = []string{host}
			case way == "udp" && port == testnet.DNSPort:
				r.Args = append(r.Args, hex.EncodeToString(testnet.Question()))
			case way == "udp":
				r.Args = append(r.Args, hex.EncodeToString([]byte("hello")))
			}
			f, err := e.counting(ctx, run, r)
			if isControl {
				f.Worked = f.Worked && f.packets > 0
			} else {
				f.Worked = f.Worked || f.packets > 0
			}
			return f.Finding, err
		}
	}
	return Attack{
		Group: Guest, Layer: Machine, Name: name, Expected: "no answer, no packet outside",
		run: try((*env).guestProbe, false), control: try((*env).childProbe, true),
	}
}

// guestRefuses makes a probe's attack as root in the guest.
func guestRefuses(attack string, args ...string) attackFunc {
	return func(ctx context.Context, e *env) (Finding, error) {
		res, err := e.guestProbe(ctx, probe.Request{Attack: attack, Args: args})
		return Finding{res.Detail, res.Outcome == probe.Worked}, err
	}
}

// rootDisk is the device of the machine's root disk.
const rootDisk = "/dev/vda"

func diskAttacks() []Attack {
	return []Attack{{
		Group: Guest, Layer: Machine, Name: "write to the root disk", Expected: "the device is read-only",
		run: guestRefuses("disk.write", rootDisk), control: hostFile("disk.write"),
	}, {
		Group: Guest, Layer: Machine, Name: "mount the root disk for writing", Expected: "the device is read-only",
		run: guestRefuses("disk.mount", rootDisk),
	}, {
		Group: Guest, Layer: Machine, Name: "write to any disk by a device node of one's own", Expected: "every device is read-only",
		run: guestRefuses("disk.node"),
	}}
}

// hostFile makes a probe's attack on a file of the host's own, which nothing
// protects.
func hostFile(attack string, args ...string) attackFunc {
	return func(ctx context.Context, e *env) (Finding, error) {
		path, err := e.file("control", strings.Repeat("x", 8192))
		if err != nil {
			return Finding{}, err
		}
		res, err := e.childProbe(ctx, probe.Request{Attack: attack, Args: append(slices.Clone(args), path)})
		return Finding{strings.ReplaceAll(res.Detail, path, "a file of the host"), res.Outcome == probe.Worked}, err
	}
}

// guestLayerAttacks are stopped by layers in the guest. Root of a guest is inside
// the border that counts; the layers keep most attackers from where they could
// begin on it.
func guestLayerAttacks() []Attack {
	var all []Attack
	for _, a := range []struct {
		layer        layer.Name
		name, attack string
		args         []string
	}{
		{layer.GuestCapabilities, "load a kernel module", "privilege.module", nil},
		{layer.GuestCapabilities, "boot another kernel (kexec)", "privilege.kexec", nil},
		{layer.GuestCapabilities, "restart the machine", "privilege.reboot", nil},
		{layer.GuestCapabilities, "open the machine's memory", "kernel.mem", nil},
		{layer.GuestCapabilities, "use I/O ports", "kernel.ports", nil},
		{layer.GuestCapabilities, "set the clock", "privilege.clock", nil},
		{layer.GuestCapabilities, "mount a file system", "privilege.mount", nil},
		{layer.GuestCapabilities, "make device nodes", "privilege.mknod", nil},
		{layer.GuestCapabilities, "open files by handle", "privilege.handle", nil},
		{layer.GuestCapabilities, "open packet and raw sockets", "net.socket", []string{"packet", "inet raw"}},
		{layer.GuestSeccomp, "run without a filter of system calls", "privilege.seccomp", nil},
		{layer.GuestSeccomp, "load BPF", "privilege.bpf", nil},
		{layer.GuestSeccomp, "set up io_uring", "privilege.uring", nil},
		{layer.GuestSeccomp, "use userfaultfd", "privilege.userfault", nil},
		{layer.GuestSeccomp, "use perf events", "privilege.perf", nil},
		{layer.GuestSeccomp, "use the kernel's keyrings", "privilege.keys", nil},
		{layer.GuestSeccomp, "open sockets of rare families", "net.socket", []string{"vsock", "alg", "bluetooth", "can", "tipc", "xdp", "key", "rds"}},
		{layer.GuestNoNewPrivs, "go without no_new_privs", "privilege.nnp", nil},
		{layer.GuestDevices, "open the link's device", "link.open", nil},
		{layer.GuestDevices, "read the root disk past its file system", "disk.read", []string{rootDisk}},
		{layer.GuestProcesses, "send the agent a signal", "agent.signal", nil},
		{layer.GuestProcesses, "take the agent's descriptors", "agent.fds", nil},
		{layer.GuestProcesses, "open the agent's memory", "agent.memory", nil},
		{layer.GuestProcesses, "trace the agent", "agent.trace", nil},
	} {
		all = append(all, Attack{
			Group: Guest, Layer: string(a.layer), Name: a.name, Expected: "refused",
			run: guestRefuses(a.attack, a.args...),
		})
	}
	return append(all, Attack{
		Group: Guest, Layer: string(layer.GuestUser), Name: "change the system as the usual user", Expected: "refused",
		run: asUser("", "file.create"), control: asUser("root", "file.create"),
	})
}

// asUser makes a probe's attack on the system's directories as a user.
func asUser(user, attack string) attackFunc {
	return func(ctx context.Context, e *env) (Finding, error) {
		s, err := e.attacker(ctx)
		if err != nil {
			return Finding{}, err
		}
		res, err := e.probeIn(ctx, s, user, probe.Request{Attack: attack, Args: []string{"/etc", "/usr/bin", "/root"}})
		return Finding{res.Detail, res.Outcome == probe.Worked}, err
	}
}
