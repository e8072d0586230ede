package nft

import (
	"encoding/binary"

	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"golang.org/x/sys/unix"
)

// Verdicts in the kernel (NF_DROP, NF_ACCEPT).
const (
	nfDrop   = 0
	nfAccept = 1
)

func verdictCode(v rules.Verdict) uint32 {
	if v == rules.Accept {
		return nfAccept
	}
	return nfDrop
}

func hookNumber(h rules.Hook) uint32 {
	switch h {
	case rules.Input:
		return unix.NF_INET_LOCAL_IN
	case rules.Forward:
		return unix.NF_INET_FORWARD
	}
	return unix.NF_INET_LOCAL_OUT
}

// remove returns the commands that make the table absent. To delete one that is
// not there is an error, so it is made first.
func remove(r rules.Rules) []command {
	name := appendString(nil, unix.NFTA_TABLE_NAME, r.Table)
	return []command{
		{unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, unix.NFPROTO_INET, name, "add table"},
		{unix.NFT_MSG_DELTABLE, 0, unix.NFPROTO_INET, name, "delete table"},
	}
}

// create returns the commands that make the table.
func create(r rules.Rules) []command {
	commands := []command{{
		unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE | unix.NLM_F_EXCL, unix.NFPROTO_INET,
		appendString(nil, unix.NFTA_TABLE_NAME, r.Table), "add table",
	}}
	for _, c := range r.Chains {
		commands = append(commands, command{
			unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE | unix.NLM_F_EXCL, unix.NFPROTO_INET,
			encodeChain(r.Table, c), "add chain " + c.Name,
		})
		for _, rule := range c.Rules {
			b := appendString(nil, unix.NFTA_RULE_TABLE, r.Table)
			b = appendString(b, unix.NFTA_RULE_CHAIN, c.Name)
			b = appendNested(b, unix.NFTA_RULE_EXPRESSIONS, encodeRule(rule))
			commands = append(commands, command{
				unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE | unix.NLM_F_APPEND, unix.NFPROTO_INET,
				b, "add rule to chain " + c.Name,
			})
		}
	}
	return commands
}

func encodeChain(table string, c rules.Chain) []byte {
	hook := appendUint32(nil, unix.NFTA_HOOK_HOOKNUM, hookNumber(c.Hook))
	hook = appendUint32(hook, unix.NFTA_HOOK_PRIORITY, uint32(c.Priority))
	b := appendString(nil, unix.NFTA_CHAIN_TABLE, table)
	b = appendString(b, unix.NFTA_CHAIN_NAME, c.Name)
	b = appendNested(b, unix.NFTA_CHAIN_HOOK, hook)
	b = appendUint32(b, unix.NFTA_CHAIN_POLICY, verdictCode(c.Policy))
	return appendString(b, unix.NFTA_CHAIN_TYPE, "filter")
}

// encodeRule returns the expressions of a rule: the user of the sending socket into
// register 1, made big-endian, as ranges are compared byte by byte; the range; a
// counter; the verdict.
func encodeRule(r rules.Rule) []byte {
	var b []byte
	if r.UIDs != nil {
		meta := appendUint32(nil, unix.NFTA_META_KEY, unix.NFT_META_SKUID)
		b = appendExpr(b, "meta", appendUint32(meta, unix.NFTA_META_DREG, unix.NFT_REG_1))

		order := appendUint32(nil, unix.NFTA_BYTEORDER_SREG, unix.NFT_REG_1)
		order = appendUint32(order, unix.NFTA_BYTEORDER_DREG, unix.NFT_REG_1)
		order = appendUint32(order, unix.NFTA_BYTEORDER_OP, unix.NFT_BYTEORDER_HTON)
		order = appendUint32(order, unix.NFTA_BYTEORDER_LEN, 4)
		b = appendExpr(b, "byteorder", appendUint32(order, unix.NFTA_BYTEORDER_SIZE, 4))

		between := appendUint32(nil, unix.NFTA_RANGE_SREG, unix.NFT_REG_1)
		between = appendUint32(between, unix.NFTA_RANGE_OP, unix.NFT_RANGE_EQ)
		between = appendNested(between, unix.NFTA_RANGE_FROM_DATA, appendUint32(nil, unix.NFTA_DATA_VALUE, r.UIDs.First))
		b = appendExpr(b, "range", appendNested(between, unix.NFTA_RANGE_TO_DATA, appendUint32(nil, unix.NFTA_DATA_VALUE, r.UIDs.Last)))
	}
	counter := appendAttr(nil, unix.NFTA_COUNTER_BYTES, binary.BigEndian.AppendUint64(nil, 0))
	b = appendExpr(b, "counter", appendAttr(counter, unix.NFTA_COUNTER_PACKETS, binary.BigEndian.AppendUint64(nil, 0)))

	verdict := appendUint32(nil, unix.NFTA_VERDICT_CODE, verdictCode(r.Verdict))
	imm := appendUint32(nil, unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
	return appendExpr(b, "immediate", appendNested(imm, unix.NFTA_IMMEDIATE_DATA, appendNested(nil, unix.NFTA_DATA_VERDICT, verdict)))
}

func appendExpr(b []byte, name string, data []byte) []byte {
	e := appendString(nil, unix.NFTA_EXPR_NAME, name)
	return appendNested(b, unix.NFTA_LIST_ELEM, appendNested(e, unix.NFTA_EXPR_DATA, data))
}
