package firewall

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/ironclaw-run/ironclaw/internal/firewall/firewalltest"
	"github.com/ironclaw-run/ironclaw/internal/firewall/iptables"
	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
	"golang.org/x/sys/unix"
)

// lacking, in the environment, is what the kernel shall not have.
const lacking = "IRONCLAW_TEST_LACKING"

func TestMain(m *testing.M) {
	if what := os.Getenv(lacking); what != "" {
		os.Exit(without(what))
	}
	os.Exit(firewalltest.Main(m))
}

// options are with the programs of one variant of iptables, or of none.
func options(t testing.TB, backend, multi string) Options {
	t.Helper()
	dir := t.TempDir()
	o := Options{Backend: backend, Lock: filepath.Join(dir, "lock"), Tools: iptables.Options{Dirs: []string{dir}}}
	if multi == "" {
		return o
	}
	path := filepath.Join("/usr/sbin", multi)
	if _, err := os.Stat(path); err != nil {
		testenv.Skip(t, "needs "+path+": sudo apt-get install -y iptables")
	}
	for _, name := range []string{"iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

var variants = []struct{ backend, multi string }{
	{NFT, ""}, {IPTables, "xtables-nft-multi"}, {IPTables, "xtables-legacy-multi"},
}

func TestSet(t *testing.T) {
	n, r, o := firewalltest.New(t), Machine("m"), options(t, Auto, "")
	err := n.Do(func() error {
		got, err := Set(t.Context(), r, o)
		if got.Backend != NFT || got.String() != "nft: everything is dropped on input, forward, output" {
			t.Errorf("%+v", got)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range variants[1:] {
		n, o := firewalltest.New(t), options(t, v.backend, v.multi)
		err := n.Do(func() error {
			got, err := Set(t.Context(), r, o)
			variant := map[string]string{"xtables-nft-multi": "(nf_tables)", "xtables-legacy-multi": "(legacy)"}[v.multi]
			if !strings.HasPrefix(got.Version, "v") || !strings.Contains(got.String(), variant) {
				t.Errorf("%+v", got)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	err = n.Do(func() error { _, err := Set(t.Context(), r, Options{Backend: "pf"}); return err })
	if err == nil || !strings.Contains(err.Error(), "pf") {
		t.Errorf("a firewall that is none: %v", err)
	}
}

// What Verify finds stops Set: here another table, which Set does not touch.
func TestSetFailsClosed(t *testing.T) {
	testenv.NeedTool(t, "nft", "nftables")
	n, o := firewalltest.New(t), options(t, Auto, "")
	n.Run(t, "nft add table netdev other")
	err := n.Do(func() error {
		got, err := Set(t.Context(), Machine("m"), o)
		if got.Backend != "" {
			t.Errorf("%+v", got)
		}
		return err
	})
	if diff, ok := errors.AsType[*rules.DifferenceError](err); !ok || !strings.Contains(diff.Diff, "other") {
		t.Error(err)
	}
	if _, tried := errors.AsType[*NoBackendError](err); tried {
		t.Errorf("iptables was tried, although nftables is there: %v", err)
	}
}

// A namespace with a network is not closed, as it may be the host's. Devices that are
// down are no network.
func TestSetNotInUse(t *testing.T) {
	testenv.NeedTool(t, "ip", "iproute2")
	n, o := firewalltest.New(t), options(t, Auto, "")
	n.Run(t, "ip link set lo up\nip link add v0 type veth peer name v1")
	set := func() error {
		return n.Do(func() error { _, err := Set(t.Context(), Machine("m"), o); return err })
	}
	if err := set(); err != nil {
		t.Error(err)
	}
	n.Run(t, "ip link set v0 up")
	used, ok := errors.AsType[*InUseError](set())
	if !ok || !strings.Contains(used.Error(), "v0") || strings.Contains(used.Error(), "v1") {
		t.Error(used)
	}
}

// The guard is found, installed, repaired, and told about.
func TestEnsureGuard(t *testing.T) {
	firewalltest.NeedUsers(t)
	testenv.NeedTool(t, "nft", "nftables")
	for _, v := range variants {
		t.Run(v.backend+v.multi, func(t *testing.T) {
			n, o := firewalltest.New(t), options(t, v.backend, v.multi)
			ensure := func(first, last uint32, want GuardState, was string) {
				t.Helper()
				err := n.Do(func() error {
					got, err := EnsureGuard(t.Context(), first, last, o)
					if got.State != want || got.Backend != v.backend || !strings.Contains(got.Was, was) || (was == "") != (got.Was == "") {
						t.Errorf("%+v, want %s", got, want)
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			ensure(200000, 200099, Installed, "")
			ensure(200000, 200099, Found, "")
			ensure(200000, 200199, Repaired, "200000-200099")
			ensure(200000, 200199, Found, "")
			switch v.backend {
			case NFT:
				n.Run(t, "nft flush table inet ironclaw_guard")
			default:
				n.Run(t, "/usr/sbin/"+v.multi+" iptables -w -F IRONCLAW_GUARD")
			}
			ensure(200000, 200199, Repaired, "200000-200199")
			ensure(200000, 200199, Found, "")
			for _, bad := range [][2]uint32{{0, 5}, {5, 4}, {5, 1<<32 - 1}} {
				if err := n.Do(func() error { _, err := EnsureGuard(t.Context(), bad[0], bad[1], o); return err }); err == nil {
					t.Errorf("users %v", bad)
				}
			}
			ensure(200000, 200199, Found, "")
		})
	}
}

// Of fifty at once one installs the guard and all have it, exactly once.
func TestEnsureGuardManyAtOnce(t *testing.T) {
	firewalltest.NeedUsers(t)
	for _, v := range variants {
		t.Run(v.backend+v.multi, func(t *testing.T) {
			n, o := firewalltest.New(t), options(t, v.backend, v.multi)
			var mu sync.Mutex
			states := make(map[GuardState]int)
			var wg sync.WaitGroup
			for range 50 {
				wg.Go(func() {
					err := n.Do(func() error {
						got, err := EnsureGuard(t.Context(), 200000, 265535, o)
						mu.Lock()
						states[got.State]++
						mu.Unlock()
						return err
					})
					if err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if states[Installed] != 1 || states[Found] != 49 {
				t.Errorf("%v", states)
			}
		})
	}
}

// A guard that cannot be put there, for want of the lock, of the right or of time, is an
// error, and nothing starts.
func TestEnsureGuardFailsClosed(t *testing.T) {
	firewalltest.NeedUsers(t)
	n, o := firewalltest.New(t), options(t, NFT, "")
	o.Lock = "/nowhere/lock"
	err := n.Do(func() error { _, err := EnsureGuard(t.Context(), 200000, 200099, o); return err })
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a lock: %v", err)
	}
	o.Lock = filepath.Join(t.TempDir(), "lock")
	err = n.As(65534, func() error { _, err := EnsureGuard(t.Context(), 200000, 200099, o); return err })
	if err == nil {
		t.Error("a user has installed the guard")
	}
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(enough)
	if err := n.Do(func() error { _, err := EnsureGuard(ctx, 200000, 200099, o); return err }); !errors.Is(err, enough) {
		t.Errorf("called off: %v", err)
	}
}

// Kernels without nftables: a filter of system calls denies what they do not have.
// With iptables' legacy variant, which needs no netlink, all goes on; with none the
// error names both reasons.
func TestFallback(t *testing.T) {
	firewalltest.New(t)
	legacy := options(t, Auto, "xtables-legacy-multi").Tools.Dirs[0]
	for _, test := range []struct{ name, lacks, backend, dir, want string }{
		{"Legacy", "nftables", Auto, legacy, "set by iptables"},
		{"NoneInstalled", "nftables", Auto, t.TempDir(), "*firewall.NoBackendError: no firewall can be set: "},
		{"OnlyNFT", "nftables", NFT, legacy, "not in this kernel"},
		{"NFTVariant", "nftables", Auto, options(t, Auto, "xtables-nft-multi").Tools.Dirs[0], "iptables-restore: "},
		{"NoIPv6", "ipv6", IPTables, legacy, "set by iptables"},
		{"NoIPv6NFT", "ipv6", Auto, legacy, "set by nft"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.lacks == "ipv6" && test.backend == IPTables {
				// To see that it is not looked for, it is not there.
				test.dir = options(t, Auto, "xtables-legacy-multi").Tools.Dirs[0]
				for _, name := range []string{"ip6tables-save", "ip6tables-restore"} {
					if err := os.Remove(filepath.Join(test.dir, name)); err != nil {
						t.Fatal(err)
					}
				}
			}
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
			cmd.Env = []string{lacking + "=" + test.lacks + ":" + test.backend + ":" + test.dir}
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), test.want) {
				t.Errorf("%v, %s\nwant %q", err, out, test.want)
			}
			if test.name == "NoneInstalled" && !(strings.Contains(string(out), "protocol not supported") &&
				strings.Contains(string(out), "iptables-restore") && strings.Contains(string(out), "hint: sudo modprobe nf_tables; or sudo apt-get")) {
				t.Errorf("both reasons and the remedy are not in:\n%s", out)
			}
		})
	}
}

// without is the process of TestFallback: it sets a machine's rules in a namespace of
// its own, in a kernel without something, and says how that went.
func without(what string) int {
	runtime.LockOSThread()
	f := strings.SplitN(what, ":", 3)
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		err = deny(f[0])
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	got, err := Set(context.Background(), Machine("m"), Options{Backend: f[1], Tools: iptables.Options{Dirs: []string{f[2]}}})
	if err != nil {
		fmt.Printf("%T: %v\n", err, err)
		var h interface{ Hint() string }
		if errors.As(err, &h) {
			fmt.Println("hint:", h.Hint())
		}
		return 0
	}
	fmt.Println("set by", got.Backend)
	return 0
}

// deny installs a filter for all threads that fails socket(2) as a kernel does which
// has no netfilter netlink, or no IPv6.
func deny(what string) error {
	const nr, arg0, arg2 = 0, 16, 32 // offsets in struct seccomp_data
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	// Unless equal, skip to the end, which allows.
	unless := func(k uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: skip, K: k}
	}
	ret := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	const errno, allow = unix.SECCOMP_RET_ERRNO, unix.SECCOMP_RET_ALLOW
	filter := []unix.SockFilter{load(nr), unless(unix.SYS_SOCKET, 5), load(arg0), unless(unix.AF_NETLINK, 3),
		load(arg2), unless(unix.NETLINK_NETFILTER, 1), ret(errno | uint32(unix.EPROTONOSUPPORT)), ret(allow)}
	if what == "ipv6" {
		filter = []unix.SockFilter{load(nr), unless(unix.SYS_SOCKET, 3), load(arg0), unless(unix.AF_INET6, 1),
			ret(errno | uint32(unix.EAFNOSUPPORT)), ret(allow)}
	}
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		return errors.New("the offsets above are those of little-endian machines")
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if e != 0 {
		return os.NewSyscallError("seccomp", e)
	}
	return nil
}

func BenchmarkEnsureGuard(b *testing.B) {
	firewalltest.NeedUsers(b)
	n, o := firewalltest.New(b), options(b, NFT, "")
	err := n.Do(func() error {
		for b.Loop() {
			if _, err := EnsureGuard(b.Context(), 200000, 265535, o); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}

func BenchmarkSet(b *testing.B) {
	o := options(b, Auto, "")
	for b.Loop() {
		b.StopTimer()
		n := firewalltest.New(b)
		b.StartTimer()
		if err := n.Do(func() error { _, err := Set(b.Context(), Machine("m"), o); return err }); err != nil {
			b.Fatal(err)
		}
	}
}
