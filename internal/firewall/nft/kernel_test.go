package nft

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/firewall/firewalltest"
	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
	"golang.org/x/sys/unix"
)

// What nft, which is not ours, reads is what the golden files say.
func TestAnotherReader(t *testing.T) {
	testenv.NeedTool(t, "nft", "nftables")
	for _, r := range []rules.Rules{rules.Machine("m"), rules.Guard(200000, 265535), rules.Guard(7, 7)} {
		n := firewalltest.New(t)
		if err := n.Do(func() error { return Backend{}.Set(t.Context(), r) }); err != nil {
			t.Fatal(err)
		}
		got := strings.NewReplacer(" packets 0 bytes 0", "", "priority filter", "priority 0", "\n\n", "\n").
			Replace(n.Run(t, "nft list ruleset"))
		if got != r.String() {
			t.Errorf("nft reads\n%s\nof\n%s", got, r)
		}
	}
}

// An error in any command of the batch leaves what was there, nothing or the rules.
func TestAtomic(t *testing.T) {
	n, r := firewalltest.New(t), rules.Machine("m")
	bad := command{unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE, unix.NFPROTO_INET,
		appendString(appendString(nil, unix.NFTA_RULE_TABLE, r.Table), unix.NFTA_RULE_CHAIN, "nowhere"), "add rule to nowhere"}
	for _, before := range []bool{false, true} {
		if before { // the rest of the batch is what replaces a table
			if err := n.Do(func() error { return Backend{}.Set(t.Context(), r) }); err != nil {
				t.Fatal(err)
			}
		}
		batch := append(remove(r), create(r)...)
		for i := range len(batch) + 1 {
			err := n.Do(func() error {
				return with(t.Context(), func(c *conn) error { return c.commit(slices.Insert(slices.Clone(batch), i, bad)) })
			})
			if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "nowhere") {
				t.Errorf("an error at %d: %v", i, err)
			}
			err = n.Do(func() error { return Backend{}.Verify(t.Context(), r) })
			diff, different := errors.AsType[*rules.DifferenceError](err)
			if before && err != nil || !before && (!different || !diff.Missing) {
				t.Errorf("an error at %d left: %v", i, err)
			}
		}
	}
}

// A table of our name that another process keeps for itself cannot be replaced, and is
// not taken for ours.
func TestOwnedByAnother(t *testing.T) {
	n, r := firewalltest.New(t), rules.Guard(200000, 265535)
	const owner = 2 // NFT_TABLE_F_OWNER: until the socket is closed
	other := create(r)
	other[0].attrs = appendUint32(other[0].attrs, unix.NFTA_TABLE_FLAGS, owner)
	err := n.Do(func() error {
		return with(t.Context(), func(c *conn) error {
			if err := c.commit(other); err != nil {
				return err
			}
			err := Backend{}.Verify(t.Context(), r)
			if diff, ok := errors.AsType[*rules.DifferenceError](err); !ok || !strings.Contains(diff.Diff, "+\tflags 0x2;") {
				t.Errorf("verify: %v", err)
			}
			if err := (Backend{}).Set(t.Context(), r); !errors.Is(err, unix.EPERM) {
				t.Errorf("set: %v", err)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Without the capability nothing is set, and that is no reason to try iptables.
func TestNotAllowed(t *testing.T) {
	firewalltest.NeedUsers(t)
	n := firewalltest.New(t)
	err := n.As(65534, func() error { return Backend{}.Set(t.Context(), rules.Machine("m")) })
	if !errors.Is(err, unix.EPERM) || errors.Is(err, rules.ErrUnsupported) {
		t.Error(err)
	}
}

func TestUnsupported(t *testing.T) {
	for errno, want := range map[unix.Errno]bool{
		unix.EOPNOTSUPP: true, unix.EPROTONOSUPPORT: true, unix.EAFNOSUPPORT: true,
		unix.EPERM: false, unix.ENOENT: false, unix.EEXIST: false, unix.ENOMEM: false, unix.EINVAL: false,
	} {
		err := unsupported(fmt.Errorf("x: %w", errno))
		if errors.Is(err, rules.ErrUnsupported) != want || !errors.Is(err, errno) {
			t.Errorf("%v: %v", errno, err)
		}
	}
}

// Who reads while others change the table all the time sees it whole or says that
// it could not, and never a mixture.
func TestReadWhileOthersChange(t *testing.T) {
	n := firewalltest.New(t)
	a, b := rules.Guard(200000, 265535), rules.Machine("m")
	b.Table, b.Exclusive = a.Table, false // other chains, in a table of the same name
	for i := range b.Chains {
		b.Chains[i].Policy = rules.Accept
	}
	ctx, cancel := context.WithCancel(t.Context())
	writer, ready := make(chan error, 1), make(chan bool)
	go func() {
		writer <- n.Do(func() error {
			return with(t.Context(), func(c *conn) error { // kept open: to close it takes long
				for i := 0; ctx.Err() == nil; i++ {
					r := []rules.Rules{a, b}[i%2]
					if err := c.commit(append(remove(r), create(r)...)); err != nil {
						return err
					}
					if i == 0 {
						close(ready)
					}
				}
				return nil
			})
		})
	}()
	<-ready
	seen, changed := 0, 0
	err := n.Do(func() error {
		return with(t.Context(), func(c *conn) error {
			for end := time.Now().Add(time.Second); time.Now().Before(end) && seen < 2000; {
				tables, err := c.snapshot(b)
				if errors.Is(err, errChanged) {
					changed++
					continue
				}
				if err != nil {
					return err
				}
				seen++
				if got := text(tables, b); got != a.String() && got != b.String() {
					return errors.New("a mixture:\n" + got)
				}
			}
			return nil
		})
	})
	cancel()
	if err := errors.Join(err, <-writer); err != nil {
		t.Error(err)
	}
	t.Logf("read %d times, changed %d times", seen, changed)
	if seen == 0 {
		t.Error("never read it")
	}
}

// A kernel that knows netfilter's netlink but no nftables answers as the real one does
// to the number of a subsystem that is no more.
func TestNoSubsystem(t *testing.T) {
	n := firewalltest.New(t)
	err := n.Do(func() error {
		return with(t.Context(), func(c *conn) error {
			c.subsys = unix.NFNL_SUBSYS_ULOG
			if _, err := c.generation(); !errors.Is(err, rules.ErrUnsupported) {
				t.Errorf("read: %v", err)
			}
			if err := c.commit(create(rules.Machine("m"))); !errors.Is(err, rules.ErrUnsupported) {
				t.Errorf("set: %v", err)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Another process may send to our socket: its acknowledgements are not the kernel's.
func TestForgedAnswer(t *testing.T) {
	n := firewalltest.New(t)
	err := n.Do(func() error {
		return with(t.Context(), func(c *conn) error {
			sa, err := unix.Getsockname(c.fd)
			if err != nil {
				return err
			}
			forger, err := dial(t.Context())
			if err != nil {
				return err
			}
			defer forger.close()
			forger.seq = c.seq + 1 // of the first command, after the batch's begin
			ack := forger.appendMessage(nil, unix.NLMSG_ERROR, 0, 0, 0, make([]byte, 16))
			if err := unix.Sendto(forger.fd, ack, 0, sa); err != nil {
				return err
			}
			nowhere := create(rules.Machine("m"))[1:2] // a chain of a table that is not there
			if err := c.commit(nowhere); !errors.Is(err, unix.ENOENT) {
				t.Errorf("the forger was believed: %v", err)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// FuzzDecode: whatever bytes the kernel sends, reading them ends, and only our rules
// are taken for ours.
func FuzzDecode(f *testing.F) {
	r := rules.Guard(200000, 265535)
	c := &conn{subsys: unix.NFNL_SUBSYS_NFTABLES}
	var b []byte
	for _, cmd := range create(r) {
		b = c.appendMessage(b, c.typ(cmd.msg), 0, cmd.fam, 0, cmd.attrs)
	}
	f.Add(b)
	f.Add(encodeRule(r.Chains[0].Rules[0]))
	f.Add([]byte{16, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	want := r.Chains[0].Rules[0].String()
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = messages(b, func(_ unix.NlMsghdr, data []byte) error {
			if len(data) < 4 {
				return nil
			}
			m := message{fam: data[0], data: data[4:]}
			tab, err := decodeTable(m)
			if err == nil && tab.addChain(m) == nil {
				_ = text([]table{tab}, r)
				_, _ = count([]table{tab}, r)
			}
			return nil
		})
		exprs, err := decodeExprs(b)
		if err == nil && ruleText(exprs) == want && len(exprs) != 5 {
			t.Errorf("%d expressions are taken for ours", len(exprs))
		}
	})
}

func BenchmarkSetVerify(b *testing.B) {
	n, r := firewalltest.New(b), rules.Machine("m")
	run(b, n, func() error {
		return errors.Join(Backend{}.Set(b.Context(), r), Backend{}.Verify(b.Context(), r))
	})
}

func BenchmarkVerifyGuard(b *testing.B) {
	n, r := firewalltest.New(b), rules.Guard(200000, 265535)
	if err := n.Do(func() error { return Backend{}.Set(b.Context(), r) }); err != nil {
		b.Fatal(err)
	}
	run(b, n, func() error { return Backend{}.Verify(b.Context(), r) })
}

// BenchmarkFresh is what a start has: a namespace in which nothing was set yet.
func BenchmarkFresh(b *testing.B) {
	r := rules.Machine("m")
	for b.Loop() {
		b.StopTimer()
		n := firewalltest.New(b)
		b.StartTimer()
		if err := n.Do(func() error {
			return errors.Join(Backend{}.Set(b.Context(), r), Backend{}.Verify(b.Context(), r))
		}); err != nil {
			b.Fatal(err)
		}
	}
}

func run(b *testing.B, n *firewalltest.Namespace, f func() error) {
	b.Helper()
	err := n.Do(func() error {
		for b.Loop() {
			if err := f(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}
