package nft

import (
	"os"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/firewall/firewalltest"
	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
)

func TestMain(m *testing.M) { os.Exit(firewalltest.Main(m)) }

var config = firewalltest.Config{
	Backend: Backend{}, Tool: "nft", Package: "nftables",
	Open: func(r rules.Rules, h rules.Hook) string {
		return "nft flush chain inet " + r.Table + " " + string(h) + "\nnft delete chain inet " + r.Table + " " + string(h)
	},
	Machine: []firewalltest.Tamper{
		{"NoTable", "nft delete table inet ironclaw", "does not hold our rules"},
		{"NoRule", "nft flush chain inet ironclaw output", "-\t\tcounter drop"},
		{"Policy", "nft chain inet ironclaw input { policy accept ; }", "+\t\ttype filter hook input priority 0; policy accept;"},
		{"AcceptFirst", "nft insert rule inet ironclaw output accept", "+\t\taccept"},
		{"AcceptAfter", "nft add rule inet ironclaw output accept", "+\t\taccept"},
		{"Condition", "nft flush chain inet ironclaw output\nnft add rule inet ironclaw output ip daddr 10.0.0.0/8 counter drop", "[payload "},
		// What google/nftables does not show at all.
		{"UnknownExpression", "nft flush chain inet ironclaw output\nnft add rule inet ironclaw output socket mark 1 counter drop", "[socket "},
		{"NoChain", "nft delete chain inet ironclaw forward", "-\tchain forward {"},
		{"OneMoreChain", "nft add chain inet ironclaw more", "+\tchain more {"},
		{"Dormant", "nft add table inet ironclaw { flags dormant ; }", "+\tflags 0x1;"},
		{"Set", "nft add set inet ironclaw s { type ipv4_addr ; }", "+\t1 more objects"},
		{"Priority", "nft flush chain inet ironclaw input\nnft delete chain inet ironclaw input\n" +
			"nft add chain inet ironclaw input { type filter hook input priority 5 ; policy drop ; }\n" +
			"nft add rule inet ironclaw input counter drop", "+\t\ttype filter hook input priority 5; policy drop;"},
		{"foreign table", "nft add table ip other", "+table of family 2 other {"},
		{"foreign hook", "nft add table netdev other\nnft add chain netdev other c { type filter hook ingress device lo priority 0 ; }", "+table of family 5 other {"},
	},
	Guard: []firewalltest.Tamper{
		{"GuardNoTable", "nft delete table inet ironclaw_guard", "does not hold our rules"},
		{"GuardOtherUsers", "nft flush chain inet ironclaw_guard output\nnft add rule inet ironclaw_guard output meta skuid 200000-200098 counter drop", "[cmp "},
		{"GuardNotThese", "nft flush chain inet ironclaw_guard output\nnft add rule inet ironclaw_guard output meta skuid != 200000-200099 counter drop", "[range "},
		{"GuardAllGroups", "nft flush chain inet ironclaw_guard output\nnft add rule inet ironclaw_guard output meta skgid 200000-200099 counter drop", "[meta "},
		{"GuardAccept", "nft insert rule inet ironclaw_guard output meta skuid 200001 accept", "accept"},
		{"GuardPolicy", "nft chain inet ironclaw_guard output { policy drop ; }", "policy drop;"},
		{"GuardNoChain", "nft flush chain inet ironclaw_guard output\nnft delete chain inet ironclaw_guard output", "-\tchain output {"},
		{"GuardOneMoreChain", "nft add chain inet ironclaw_guard more", "+\t1 more objects"},
		{"GuardDormant", "nft add table inet ironclaw_guard { flags dormant ; }", "+\tflags 0x1;"},
	},
	Foreign: "nft add table inet other\n" +
		"nft add chain inet other output { type filter hook output priority 0 ; policy accept ; }\n" +
		"nft add rule inet other output ip daddr 10.1.2.3 accept\n" +
		"nft add table ip filter",
	List: "nft list ruleset",
}

func TestMachineRules(t *testing.T) { firewalltest.Machine(t, config) }

func TestGuardRules(t *testing.T) { firewalltest.Guard(t, config) }

// As a normal user, in a user namespace.
func TestMachineRulesAsUser(t *testing.T) { firewalltest.AsUser(t, "TestMachineRules") }
