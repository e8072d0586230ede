// Package nft sets the firewall's rules by nftables, through netlink, without the
// program nft. Start at [Backend].
//
// A ruleset is one table, replaced in one batch: the kernel makes all changes of a
// batch or none, and no packet sees a state between. What is read back is compared
// down to the bytes of each expression; what this package does not know is shown
// as the bytes that it is, and is a difference. The library that exists for this
// (google/nftables) leaves out expressions that it does not know, byteorder among
// them, which would make a rule with a condition look like one without.
package nft

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"golang.org/x/sys/unix"
)

// Backend is nftables in the network namespace of the calling thread. It needs
// CAP_NET_ADMIN in the user namespace that owns that one. The zero value is ready;
// it has no state.
type Backend struct{}

var _ rules.Backend = Backend{}

// Name is "nft".
func (Backend) Name() string { return "nft" }

// Set replaces the table. See rules.Backend.
func (Backend) Set(ctx context.Context, r rules.Rules) error {
	if err := r.Validate(); err != nil {
		return err
	}
	err := with(ctx, func(c *conn) error {
		// A batch that removes something makes the kernel wait, when the socket is
		// closed, until no processor uses it any more: 15 ms. A machine's namespace
		// is new and has nothing to remove.
		err := c.commit(create(r))
		if errors.Is(err, unix.EEXIST) {
			err = c.commit(append(remove(r), create(r)...))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("set table inet %s by nftables: %w", r.Table, err)
	}
	return nil
}

// Verify reads the table back. If r is exclusive every table of the namespace is
// read, as those with chains at a network device see a packet before ours does and
// can send it elsewhere. Tables at our hooks could do no harm: a drop is final.
func (Backend) Verify(ctx context.Context, r rules.Rules) error {
	if err := r.Validate(); err != nil {
		return err
	}
	var got string
	err := with(ctx, func(c *conn) error {
		tables, err := c.snapshot(r)
		got = text(tables, r)
		return err
	})
	if err != nil {
		return fmt.Errorf("read table inet %s back from nftables: %w", r.Table, err)
	}
	return rules.Compare("nftables", r.String(), got)
}

// Counters tells how many packets matched. See rules.Backend.
func (Backend) Counters(ctx context.Context, r rules.Rules) ([]rules.Count, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	var counts []rules.Count
	err := with(ctx, func(c *conn) error {
		tables, err := c.snapshot(r)
		if err != nil {
			return err
		}
		counts, err = count(tables, r)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the counters of table inet %s: %w", r.Table, err)
	}
	return counts, nil
}

// Remove removes the table.
func (Backend) Remove(ctx context.Context, r rules.Rules) error {
	if err := r.Validate(); err != nil {
		return err
	}
	if err := with(ctx, func(c *conn) error { return c.commit(remove(r)) }); err != nil {
		return fmt.Errorf("remove table inet %s: %w", r.Table, err)
	}
	return nil
}

// with calls f with a connection of its own.
func with(ctx context.Context, f func(*conn) error) error {
	c, err := dial(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	return f(c)
}

// snapshot reads until nothing has changed meanwhile.
//
// A change takes two steps in the kernel. While it is prepared, nothing shows it but the
// count of a table's objects. Then the generation's number changes, and a moment later the
// rules do. An empty batch waits for the end of both: after the first look at the number,
// so that a change which had begun then is over.
func (c *conn) snapshot(r rules.Rules) ([]table, error) {
	const tries = 50
	var odd uint32 // the generation in which a count did not fit
	for range tries {
		before, err := c.generation()
		if err != nil {
			return nil, err
		}
		if err := c.commit(nil); err != nil {
			return nil, err
		}
		tables, err := c.read1(r)
		if errors.Is(err, errChanged) {
			continue
		}
		if err != nil {
			return nil, err
		}
		after, err := c.generation()
		if err != nil {
			return nil, err
		}
		if before != after {
			continue
		}
		fits := !slices.ContainsFunc(tables, func(t table) bool { return t.more() != 0 })
		if fits || odd == before {
			return tables, nil // twice in one generation: nothing is being prepared
		}
		odd = before
	}
	return nil, fmt.Errorf("%w, %d times in a row", errChanged, tries)
}

// generation is a number that changes with every change of the namespace's rules.
func (c *conn) generation() (uint32, error) {
	m, err := c.get(unix.NFT_MSG_GETGEN, false, unix.AF_UNSPEC, nil)
	if errors.Is(err, unix.EINVAL) {
		// nfnetlink is there, and knows no subsystem of this number.
		return 0, fmt.Errorf("%w: %w", rules.ErrUnsupported, err)
	}
	if err != nil {
		return 0, unsupported(err)
	}
	if len(m) != 1 {
		return 0, fmt.Errorf("the kernel names %d generations of the rules", len(m))
	}
	a, err := parseAttrs(m[0].data)
	return a.uint32(unix.NFTA_GEN_ID), err
}

// unsupported marks errors which say that the kernel has no nftables, or none for
// the family inet.
func unsupported(err error) error {
	for _, errno := range []unix.Errno{unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT} {
		if errors.Is(err, errno) {
			return fmt.Errorf("%w: %w", rules.ErrUnsupported, err)
		}
	}
	return err
}
