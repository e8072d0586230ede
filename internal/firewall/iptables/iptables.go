// Package iptables sets the firewall's rules by the programs iptables-restore,
// ip6tables-restore, iptables-save and ip6tables-save, for kernels without
// nftables. Start at [New].
//
// A ruleset is one chain of a fixed name, linked as the first rule from the chains
// of its hooks, in both families. Each family is set in one transaction: what
// iptables-restore reads is applied up to COMMIT as a whole. Between the two
// families there is none; an error in the second leaves the first set, which
// drops more and not less, and stops the start.
//
// What is read back is compared line by line, with the kernel's own names for
// everything. Which variant of the programs the host has (nf_tables or legacy) does
// not matter as long as it is the same for all; if not, the read-back finds nothing.
package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"golang.org/x/sys/unix"
)

// Bounds of what the programs may say and how long they may take.
const (
	maxOutput = 16 << 20 // of iptables-save, on hosts with many thousands of rules
	maxStderr = 4 << 10
	patience  = 30 * time.Second
)

// Options of New.
type Options struct {
	// Dirs are where the programs are looked for, in this order. Default: the
	// system's. The environment has no say: it belongs to the caller's caller.
	Dirs []string
}

// Backend is iptables in the network namespace of the calling thread. It needs
// CAP_NET_ADMIN there and CAP_NET_RAW for the legacy variant.
type Backend struct {
	dirs []string
}

var _ rules.Backend = (*Backend)(nil)

// New returns the backend. It looks for nothing yet.
func New(o Options) *Backend {
	if o.Dirs == nil {
		o.Dirs = []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"}
	}
	return &Backend{dirs: append([]string(nil), o.Dirs...)}
}

// Name is "iptables".
func (*Backend) Name() string { return "iptables" }

// Version is what the programs call themselves, the variant included:
// "v1.8.9 (nf_tables)".
func (b *Backend) Version(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := b.run(ctx, ipv4.restore, rules.Rules{}, "", "--version")
	if err != nil {
		return "", err
	}
	_, version, ok := strings.Cut(oneLine(out[:min(len(out), 200)]), ipv4.restore+" ")
	if !ok {
		return "", fmt.Errorf("%s says no version: %.80q", ipv4.restore, out)
	}
	return version, nil
}

// MissingToolError says that a program is not installed. Without ip6tables half of
// the packets would pass: so that one is missed as much as the other.
type MissingToolError struct {
	Tool string
	Dirs []string
}

func (e *MissingToolError) Error() string {
	return fmt.Sprintf("there is no %s in %s", e.Tool, strings.Join(e.Dirs, ", "))
}

// Hint is the remedy.
func (e *MissingToolError) Hint() string { return "sudo apt-get install -y iptables" }

// family is IPv4 or IPv6.
type family struct {
	name, restore, save string
}

var (
	ipv4 = family{"iptables", "iptables-restore", "iptables-save"}
	ipv6 = family{"ip6tables", "ip6tables-restore", "ip6tables-save"}
)

// families returns those that the kernel has. Rules for IPv6 can only be missing if
// nobody can make a socket for it.
func families() ([]family, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return []family{ipv4}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("see whether there is IPv6: %w", err)
	}
	unix.Close(fd)
	return []family{ipv4, ipv6}, nil
}

// Set sets the rules in both families. See rules.Backend, and the package for what
// is atomic. The errors of a program that is missing are *MissingToolError.
func (b *Backend) Set(ctx context.Context, r rules.Rules) error {
	return b.each(ctx, r, func(ctx context.Context, f family) error {
		script, err := setScript(r)
		if err != nil {
			return err
		}
		if r.Exclusive {
			return b.restore(ctx, f, r, script)
		}
		old, err := b.list(ctx, f, r)
		if err != nil {
			return err
		}
		return b.restore(ctx, f, r, guardScript(r, old))
	})
}

// Verify reads the rules back, of both families. See rules.Backend.
func (b *Backend) Verify(ctx context.Context, r rules.Rules) error {
	return b.each(ctx, r, func(ctx context.Context, f family) error {
		want, err := Text(r)
		if err != nil {
			return err
		}
		got, err := b.list(ctx, f, r)
		if err != nil {
			return err
		}
		return rules.Compare(f.name, want, got.text(r))
	})
}

// Counters sums the packets that went from each hook into our chain. See
// rules.Backend.
func (b *Backend) Counters(ctx context.Context, r rules.Rules) ([]rules.Count, error) {
	counts := make([]rules.Count, len(r.Chains))
	err := b.each(ctx, r, func(ctx context.Context, f family) error {
		l, err := b.list(ctx, f, r)
		if err != nil {
			return err
		}
		return l.count(r, counts)
	})
	return counts, err
}

// Remove takes the rules out again. If they are exclusive the built-in chains
// accept afterwards.
func (b *Backend) Remove(ctx context.Context, r rules.Rules) error {
	return b.each(ctx, r, func(ctx context.Context, f family) error {
		if r.Exclusive {
			return b.restore(ctx, f, r, "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n")
		}
		l, err := b.list(ctx, f, r)
		if err != nil {
			return err
		}
		if script := removeScript(r, l); script != "" {
			return b.restore(ctx, f, r, script)
		}
		return nil
	})
}

// each calls do for each family with a bounded context.
func (b *Backend) each(ctx context.Context, r rules.Rules, do func(context.Context, family) error) error {
	if err := r.Validate(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	families, err := families()
	if err != nil {
		return err
	}
	for _, f := range families {
		if err := do(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

// restore applies a script as one transaction. Exclusive rules replace the whole
// table filter.
func (b *Backend) restore(ctx context.Context, f family, r rules.Rules, script string) error {
	args := []string{"-w"}
	if !r.Exclusive {
		args = append(args, "--noflush")
	}
	_, err := b.run(ctx, f.restore, r, script, args...)
	return err
}

// list reads what there is: all tables if the namespace is ours alone.
func (b *Backend) list(ctx context.Context, f family, r rules.Rules) (listing, error) {
	args := []string{"-c"}
	if !r.Exclusive {
		args = append(args, "-t", "filter")
	}
	out, err := b.run(ctx, f.save, r, "", args...)
	if err != nil {
		return listing{}, err
	}
	l, err := parse(out)
	if err != nil {
		return listing{}, fmt.Errorf("read what %s says: %w", f.save, err)
	}
	return l, nil
}

// find returns the absolute path of a program.
func (b *Backend) find(tool string) (string, error) {
	for _, dir := range b.dirs {
		path := filepath.Join(dir, tool)
		if st, err := os.Stat(path); filepath.IsAbs(path) && err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", &MissingToolError{Tool: tool, Dirs: b.dirs}
}

// run runs a program of this thread's network namespace to its end.
func (b *Backend) run(ctx context.Context, tool string, r rules.Rules, stdin string, args ...string) ([]byte, error) {
	path, err := b.find(tool)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{}
	if r.Exclusive {
		// The legacy variant locks a file in /run, which a user namespace may not
		// open and which all machines would wait for. Nobody but us is in this
		// network namespace: its own inode will do.
		cmd.Env = []string{"XTABLES_LOCKFILE=/proc/self/ns/net"}
	}
	cmd.Dir = "/"
	cmd.Stdin = strings.NewReader(stdin)
	out, says := &bounded{max: maxOutput, strict: true}, &bounded{max: maxStderr}
	cmd.Stdout, cmd.Stderr = out, says
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if out.err != nil {
			err = out.err
		}
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		if why := oneLine(says.buf.Bytes()); why != "" {
			return nil, fmt.Errorf("%s: %w: %s", tool, err, why)
		}
		return nil, fmt.Errorf("%s: %w", tool, err)
	}
	return out.buf.Bytes(), nil
}

// oneLine is what a program said, fit for a line of an error.
func oneLine(b []byte) string {
	printable := func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}
	return strings.Join(strings.Fields(strings.Map(printable, strings.ToValidUTF8(string(b), "?"))), " ")
}

// bounded keeps the first max bytes that are written to it. If it is strict more are an
// error, which ends the program; else they are forgotten. The buffer is not embedded: its
// ReadFrom would take everything, past Write.
type bounded struct {
	buf    bytes.Buffer
	max    int
	strict bool
	err    error
}

var _ io.Writer = (*bounded)(nil)

func (b *bounded) Write(p []byte) (int, error) {
	room := b.max - b.buf.Len()
	if len(p) > room && b.strict {
		b.err = fmt.Errorf("more than %d bytes of output", b.max)
		return 0, b.err
	}
	b.buf.Write(p[:min(len(p), room)])
	return len(p), nil
}
