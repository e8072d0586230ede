package iptables

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/firewall/firewalltest"
	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(firewalltest.Main(m)) }

// tools returns a directory with the programs of one variant of iptables.
func tools(t testing.TB, multi string) string {
	t.Helper()
	path := filepath.Join("/usr/sbin", multi)
	if _, err := os.Stat(path); err != nil {
		testenv.Skip(t, "needs "+path+": sudo apt-get install -y iptables")
	}
	dir := t.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// both are commands for IPv4 and IPv6, without the programs' names.
func both(dir, args string) string {
	var b strings.Builder
	for line := range strings.Lines(args) {
		b.WriteString(dir + "/iptables -w " + line + "\n" + dir + "/ip6tables -w " + line + "\n")
	}
	return b.String()
}

func config(dir string) firewalltest.Config {
	only := func(family, args string) string { return dir + "/" + family + " -w " + args }
	link := rules.LinkName("machine-0123456789-0123456789-0123456789-0123456789-0123456789x")
	return firewalltest.Config{
		Backend: New(Options{Dirs: []string{dir}}), Tool: "iptables", Package: "iptables",
		Open: func(r rules.Rules, h rules.Hook) string {
			return both(dir, "-P "+builtin(h)+" ACCEPT\n-F "+builtin(h))
		},
		Machine: []firewalltest.Tamper{
			{"NoLink", both(dir, "-F OUTPUT"), "--A OUTPUT -j " + link},
			{"NoLink4", only("iptables", "-F OUTPUT"), "--A OUTPUT -j " + link},
			{"NoLink6", only("ip6tables", "-F OUTPUT"), "ip6tables does not"},
			{"NoRule", both(dir, "-F "+link), "--A " + link + " -j DROP"},
			{"Policy", only("iptables", "-P INPUT ACCEPT"), "+:INPUT ACCEPT"},
			{"Policy6", only("ip6tables", "-P FORWARD ACCEPT"), "+:FORWARD ACCEPT"},
			{"AcceptFirst", both(dir, "-I OUTPUT -j ACCEPT"), "+-A OUTPUT -j ACCEPT"},
			{"AcceptInOurs", both(dir, "-I "+link+" -p tcp -j ACCEPT"), "-p tcp -j ACCEPT"},
			{"AcceptAfter", both(dir, "-A OUTPUT -j ACCEPT"), "+-A OUTPUT -j ACCEPT"},
			{"Condition", both(dir, "-F "+link+"\n-A "+link+" -p udp -j DROP"), "-p udp -j DROP"},
			{"OneMoreChain", both(dir, "-N OTHER"), "+:OTHER -"},
			{"foreign table", both(dir, "-t mangle -A PREROUTING -j ACCEPT"), "+*mangle"},
			{"foreign policy", only("ip6tables", "-t raw -P OUTPUT DROP"), "+:OUTPUT DROP"},
		},
		Guard: []firewalltest.Tamper{
			{"GuardNoLink", both(dir, "-D OUTPUT -j IRONCLAW_GUARD"), "--A OUTPUT -j IRONCLAW_GUARD"},
			{"GuardNoLink6", only("ip6tables", "-D OUTPUT -j IRONCLAW_GUARD"), "ip6tables does not"},
			{"GuardNothing", both(dir, "-F OUTPUT\n-F IRONCLAW_GUARD\n-X IRONCLAW_GUARD"), "does not hold our rules"},
			{"GuardNoRule", both(dir, "-F IRONCLAW_GUARD"), "--A IRONCLAW_GUARD -m owner"},
			{"GuardOtherUsers", both(dir, "-F IRONCLAW_GUARD\n-A IRONCLAW_GUARD -m owner --uid-owner 200000-200098 -j DROP"), "200000-200098"},
			{"GuardNotThese", both(dir, "-F IRONCLAW_GUARD\n-A IRONCLAW_GUARD -m owner ! --uid-owner 200000-200099 -j DROP"), "! --uid-owner"},
			{"GuardNotFirst", both(dir, "-I OUTPUT 1 -p tcp -j ACCEPT"), "# not the first rule"},
			{"GuardTwice", both(dir, "-A OUTPUT -j IRONCLAW_GUARD"), "+-A OUTPUT -j IRONCLAW_GUARD"},
			{"GuardLinkedElsewhere", both(dir, "-N OTHER\n-A OTHER -p udp -j IRONCLAW_GUARD"), "+-A OTHER -p udp -j IRONCLAW_GUARD"},
			{"GuardAccept", both(dir, "-I IRONCLAW_GUARD -j RETURN"), "+-A IRONCLAW_GUARD -j RETURN"},
		},
		Foreign: both(dir, `-N OTHER
			-A INPUT -p tcp -j OTHER
			-A OUTPUT -p udp -j OTHER
			-A OUTPUT -p tcp -m comment --comment x-j_IRONCLAW_GUARD -j ACCEPT
			-A OTHER -j RETURN`),
		List: both(dir, "-S"),
	}
}

func TestMachineRules(t *testing.T) {
	for _, multi := range []string{"xtables-nft-multi", "xtables-legacy-multi"} {
		t.Run(multi, func(t *testing.T) { firewalltest.Machine(t, config(tools(t, multi))) })
	}
}

func TestGuardRules(t *testing.T) {
	for _, multi := range []string{"xtables-nft-multi", "xtables-legacy-multi"} {
		t.Run(multi, func(t *testing.T) { firewalltest.Guard(t, config(tools(t, multi))) })
	}
}

// As a normal user, in a user namespace.
func TestMachineRulesAsUser(t *testing.T) { firewalltest.AsUser(t, "TestMachineRules") }

// A program that is not there is an error which names it, the second family's too.
func TestMissingTool(t *testing.T) {
	n, r := firewalltest.New(t), rules.Machine("m")
	for _, gone := range []string{"iptables-restore", "ip6tables-restore", "iptables-save", "ip6tables-save"} {
		dir := tools(t, "xtables-nft-multi")
		if err := os.Remove(filepath.Join(dir, gone)); err != nil {
			t.Fatal(err)
		}
		b := New(Options{Dirs: []string{dir}})
		err := n.Do(func() error { return errors.Join(b.Set(t.Context(), r), b.Verify(t.Context(), r)) })
		missing, ok := errors.AsType[*MissingToolError](err)
		if !ok || missing.Tool != gone || !strings.Contains(err.Error(), gone) || missing.Hint() == "" {
			t.Errorf("without %s: %v", gone, err)
		}
	}
	// Neither the environment nor the working directory says where programs are.
	t.Setenv("PATH", tools(t, "xtables-nft-multi"))
	t.Chdir(os.Getenv("PATH"))
	for _, dirs := range [][]string{{"/nowhere"}, {"."}, {""}} {
		err := n.Do(func() error { return New(Options{Dirs: dirs}).Set(t.Context(), r) })
		if _, ok := errors.AsType[*MissingToolError](err); !ok {
			t.Errorf("in %q: %v", dirs, err)
		}
	}
}

// The programs get nothing of our environment, and may neither talk nor wait for ever.
func TestStrangeTools(t *testing.T) {
	t.Setenv("LD_PRELOAD_OF_THE_CALLER", "x")
	r := rules.Guard(1, 2)
	for _, test := range []struct {
		name, script string
		wait         time.Duration
		want         string
	}{
		{"Environment", "/usr/bin/env >&2; exit 3", patience, "exit status 3: "},
		{"Talks", "exec /usr/bin/yes", patience, "more than 16777216 bytes of output"},
		{"Complains", "/usr/bin/head -c 100000 /dev/zero >&2; exit 3", patience, "exit status 3"},
		{"Waits", "exec /usr/bin/sleep 1000", 200 * time.Millisecond, context.DeadlineExceeded.Error()},
		{"Lies", "echo nonsense", patience, errLine.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, name := range []string{"iptables-save", "ip6tables-save"} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+test.script+"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), test.wait)
			defer cancel()
			err := New(Options{Dirs: []string{dir}}).Verify(ctx, r)
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "LD_PRELOAD") || len(err.Error()) > 2*maxStderr {
				t.Errorf("%v\nwant %q", err, test.want)
			}
		})
	}
}
