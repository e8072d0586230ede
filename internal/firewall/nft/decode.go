package nft

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
	"golang.org/x/sys/unix"
)

// table is one as the kernel shows it.
type table struct {
	name   string
	family uint8
	attrs  attrs
	chains []chain
}

type chain struct {
	name  string
	attrs attrs
	rules [][]expression
}

// expression is one step of a rule.
type expression struct {
	name string
	data []byte
}

// read1 reads the tables that matter for r: all of the namespace if it is ours
// alone, else only r's own, at a cost that does not depend on what else the host
// has.
func (c *conn) read1(r rules.Rules) ([]table, error) {
	if r.Exclusive {
		return c.readAll()
	}
	name := appendString(nil, unix.NFTA_TABLE_NAME, r.Table)
	m, err := c.get(unix.NFT_MSG_GETTABLE, false, unix.NFPROTO_INET, name)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err = one(m, err); err != nil {
		return nil, err
	}
	t, err := decodeTable(m[0])
	if err != nil {
		return nil, err
	}
	// The kernel can list chains only of all tables. So those that ought to be
	// there are asked for by name, and the table's count tells of others (text).
	for _, want := range r.Chains {
		m, err := c.get(unix.NFT_MSG_GETCHAIN, false, unix.NFPROTO_INET,
			appendString(appendString(nil, unix.NFTA_CHAIN_TABLE, r.Table), unix.NFTA_CHAIN_NAME, want.Name))
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err = one(m, err); err != nil {
			return nil, err
		}
		if err := t.addChain(m[0]); err != nil {
			return nil, err
		}
	}
	tables := []table{t}
	return tables, c.readRules(tables, appendString(nil, unix.NFTA_RULE_TABLE, r.Table))
}

func one(m []message, err error) error {
	if err == nil && len(m) != 1 {
		return fmt.Errorf("the kernel answers with %d objects, where there is one", len(m))
	}
	return err
}

func (c *conn) readAll() ([]table, error) {
	m, err := c.get(unix.NFT_MSG_GETTABLE, true, unix.AF_UNSPEC, nil)
	if err != nil {
		return nil, err
	}
	var tables []table
	for _, m := range m {
		t, err := decodeTable(m)
		if err != nil {
			return nil, err
		}
		tables = append(tables, t)
	}
	m, err = c.get(unix.NFT_MSG_GETCHAIN, true, unix.AF_UNSPEC, nil)
	if err != nil {
		return nil, err
	}
	for _, m := range m {
		a, err := parseAttrs(m.data)
		if err != nil {
			return nil, err
		}
		t := find(tables, m.fam, a.str(unix.NFTA_CHAIN_TABLE))
		if t == nil {
			return nil, errChanged
		}
		if err := t.addChain(m); err != nil {
			return nil, err
		}
	}
	return tables, c.readRules(tables, nil)
}

// readRules reads the rules of tables. A kernel that does not know the filter
// answers with those of others, too.
func (c *conn) readRules(tables []table, filter []byte) error {
	m, err := c.get(unix.NFT_MSG_GETRULE, true, unix.AF_UNSPEC, filter)
	if err != nil {
		return err
	}
	for _, m := range m {
		a, err := parseAttrs(m.data)
		if err != nil {
			return err
		}
		t := find(tables, m.fam, a.str(unix.NFTA_RULE_TABLE))
		if t == nil {
			continue
		}
		exprs, err := decodeExprs(a[unix.NFTA_RULE_EXPRESSIONS])
		if err != nil {
			return err
		}
		name := a.str(unix.NFTA_RULE_CHAIN)
		if i := slices.IndexFunc(t.chains, func(c chain) bool { return c.name == name }); i >= 0 {
			t.chains[i].rules = append(t.chains[i].rules, exprs)
		}
	}
	return nil
}

func find(tables []table, family uint8, name string) *table {
	for i := range tables {
		if tables[i].name == name && tables[i].family == family {
			return &tables[i]
		}
	}
	return nil
}

func decodeTable(m message) (table, error) {
	a, err := parseAttrs(m.data)
	return table{name: a.str(unix.NFTA_TABLE_NAME), family: m.fam, attrs: a}, err
}

func (t *table) addChain(m message) error {
	a, err := parseAttrs(m.data)
	t.chains = append(t.chains, chain{name: a.str(unix.NFTA_CHAIN_NAME), attrs: a})
	return err
}

// more is how many objects the table has that are no chains we have read.
func (t table) more() int { return int(t.attrs.uint32(unix.NFTA_TABLE_USE)) - len(t.chains) }

func decodeExprs(b []byte) ([]expression, error) {
	var exprs []expression
	err := eachAttr(b, func(_ uint16, data []byte) error {
		a, err := parseAttrs(data)
		exprs = append(exprs, expression{a.str(unix.NFTA_EXPR_NAME), a[unix.NFTA_EXPR_DATA]})
		return err
	})
	return exprs, err
}

// text writes what was found as Rules.String writes what is wanted: the same text
// if and only if it is the same.
func text(tables []table, r rules.Rules) string {
	var b strings.Builder
	for _, t := range tables {
		if t.family == unix.NFPROTO_INET {
			fmt.Fprintf(&b, "table inet %s {\n", printable(t.name))
		} else {
			fmt.Fprintf(&b, "table of family %d %s {\n", t.family, printable(t.name))
		}
		// A dormant table has all its chains and does nothing.
		if f := t.attrs.uint32(unix.NFTA_TABLE_FLAGS); f != 0 {
			fmt.Fprintf(&b, "\tflags %#x;\n", f)
		}
		for _, c := range inOrder(t.chains, r) {
			c.text(&b)
		}
		// Sets, named counters and the like, or chains of other names.
		if n := t.more(); n != 0 {
			fmt.Fprintf(&b, "\t%d more objects\n", n)
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// inOrder returns the chains in the order in which r names them, then the others.
func inOrder(chains []chain, r rules.Rules) []chain {
	place := func(c chain) int {
		i := slices.IndexFunc(r.Chains, func(w rules.Chain) bool { return w.Name == c.name })
		if i < 0 {
			return len(r.Chains)
		}
		return i
	}
	chains = slices.Clone(chains)
	slices.SortStableFunc(chains, func(a, b chain) int { return place(a) - place(b) })
	return chains
}

func (c chain) text(b *strings.Builder) {
	fmt.Fprintf(b, "\tchain %s {\n", printable(c.name))
	if _, ok := c.attrs[unix.NFTA_CHAIN_HOOK]; ok {
		fmt.Fprintf(b, "\t\ttype %s hook %s; policy %s;\n",
			printable(c.attrs.str(unix.NFTA_CHAIN_TYPE)), c.hook(), c.policy())
	}
	// 1 says that it is a base chain, which only newer kernels do.
	if f := c.attrs.uint32(nftaChainFlags); f > 1 {
		fmt.Fprintf(b, "\t\tflags %#x;\n", f)
	}
	for _, r := range c.rules {
		fmt.Fprintf(b, "\t\t%s\n", ruleText(r))
	}
	b.WriteString("\t}\n")
}

// nftaChainFlags is NFTA_CHAIN_FLAGS, which x/sys/unix does not have.
const nftaChainFlags = 0xa

// hook is the chain's hook and priority.
func (c chain) hook() string {
	a, err := parseAttrs(c.attrs[unix.NFTA_CHAIN_HOOK])
	number, priority := a.uint32(unix.NFTA_HOOK_HOOKNUM), int32(a.uint32(unix.NFTA_HOOK_PRIORITY))
	delete(a, unix.NFTA_HOOK_HOOKNUM)
	delete(a, unix.NFTA_HOOK_PRIORITY)
	for _, h := range rules.Hooks() {
		if err == nil && len(a) == 0 && number == hookNumber(h) {
			return fmt.Sprintf("%s priority %d", h, priority)
		}
	}
	return fmt.Sprintf("[%x]", c.attrs[unix.NFTA_CHAIN_HOOK])
}

func (c chain) policy() string {
	b := c.attrs[unix.NFTA_CHAIN_POLICY]
	switch n := c.attrs.uint32(unix.NFTA_CHAIN_POLICY); {
	case len(b) == 4 && n == nfDrop:
		return string(rules.Drop)
	case len(b) == 4 && n == nfAccept:
		return string(rules.Accept)
	}
	return fmt.Sprintf("[%x]", b)
}

// ruleText writes a rule; expressions that are not exactly as encodeRule makes
// them are shown as they came.
func ruleText(exprs []expression) string {
	var words []string
	for len(exprs) > 0 {
		e := exprs[0]
		if u, ok := userRange(exprs); ok {
			words = append(words, "meta skuid "+u.String())
			exprs = exprs[3:]
			continue
		}
		if _, _, ok := counter(e); ok {
			words = append(words, "counter")
		} else if v, ok := verdict(e); ok {
			words = append(words, string(v))
		} else {
			words = append(words, fmt.Sprintf("[%s %x]", printable(e.name), e.data))
		}
		exprs = exprs[1:]
	}
	return strings.Join(words, " ")
}

// is reports whether the expression has this name and exactly these numbers.
func (e expression) is(name string, want map[uint16]uint32) bool {
	a, err := parseAttrs(e.data)
	if err != nil || e.name != name || len(a) != len(want) {
		return false
	}
	for typ, n := range want {
		if len(a[typ]) != 4 || a.uint32(typ) != n {
			return false
		}
	}
	return true
}

// userRange recognises the three expressions that match a range of users.
func userRange(exprs []expression) (rules.Range, bool) {
	if len(exprs) < 3 || exprs[2].name != "range" ||
		!exprs[0].is("meta", map[uint16]uint32{unix.NFTA_META_KEY: unix.NFT_META_SKUID, unix.NFTA_META_DREG: unix.NFT_REG_1}) ||
		!exprs[1].is("byteorder", map[uint16]uint32{
			unix.NFTA_BYTEORDER_SREG: unix.NFT_REG_1, unix.NFTA_BYTEORDER_DREG: unix.NFT_REG_1,
			unix.NFTA_BYTEORDER_OP: unix.NFT_BYTEORDER_HTON, unix.NFTA_BYTEORDER_LEN: 4, unix.NFTA_BYTEORDER_SIZE: 4,
		}) {
		return rules.Range{}, false
	}
	a, err := parseAttrs(exprs[2].data)
	first, ok1 := value(a[unix.NFTA_RANGE_FROM_DATA])
	last, ok2 := value(a[unix.NFTA_RANGE_TO_DATA])
	delete(a, unix.NFTA_RANGE_FROM_DATA)
	delete(a, unix.NFTA_RANGE_TO_DATA)
	same := maps.EqualFunc(a, map[uint16]uint32{unix.NFTA_RANGE_SREG: unix.NFT_REG_1, unix.NFTA_RANGE_OP: unix.NFT_RANGE_EQ},
		func(b []byte, n uint32) bool { return len(b) == 4 && attrs{0: b}.uint32(0) == n })
	return rules.Range{First: first, Last: last}, err == nil && ok1 && ok2 && same
}

// value is the number in the data of a register.
func value(b []byte) (uint32, bool) {
	a, err := parseAttrs(b)
	v := a[unix.NFTA_DATA_VALUE]
	return a.uint32(unix.NFTA_DATA_VALUE), err == nil && len(a) == 1 && len(v) == 4
}

func counter(e expression) (packets, bytes uint64, ok bool) {
	a, err := parseAttrs(e.data)
	for typ := range a {
		if typ != unix.NFTA_COUNTER_BYTES && typ != unix.NFTA_COUNTER_PACKETS && typ != unix.NFTA_COUNTER_PAD {
			return 0, 0, false
		}
	}
	return a.uint64(unix.NFTA_COUNTER_PACKETS), a.uint64(unix.NFTA_COUNTER_BYTES), err == nil && e.name == "counter"
}

func verdict(e expression) (rules.Verdict, bool) {
	a, err := parseAttrs(e.data)
	if err != nil || e.name != "immediate" || len(a) != 2 || len(a[unix.NFTA_IMMEDIATE_DREG]) != 4 ||
		a.uint32(unix.NFTA_IMMEDIATE_DREG) != unix.NFT_REG_VERDICT {
		return "", false
	}
	d, err := parseAttrs(a[unix.NFTA_IMMEDIATE_DATA])
	if err != nil || len(d) != 1 {
		return "", false
	}
	v := expression{"verdict", d[unix.NFTA_DATA_VERDICT]}
	switch {
	case v.is("verdict", map[uint16]uint32{unix.NFTA_VERDICT_CODE: nfDrop}):
		return rules.Drop, true
	case v.is("verdict", map[uint16]uint32{unix.NFTA_VERDICT_CODE: nfAccept}):
		return rules.Accept, true
	}
	return "", false
}

// count sums the counters of each chain of r.
func count(tables []table, r rules.Rules) ([]rules.Count, error) {
	t := find(tables, unix.NFPROTO_INET, r.Table)
	if t == nil {
		return nil, errors.New("the table is not there")
	}
	counts := make([]rules.Count, len(r.Chains))
	for i, want := range r.Chains {
		counts[i].Hook = want.Hook
		for _, c := range t.chains {
			if c.name != want.Name {
				continue
			}
			for _, e := range slices.Concat(c.rules...) {
				if packets, bytes, ok := counter(e); ok {
					counts[i].Packets += packets
					counts[i].Bytes += bytes
				}
			}
		}
	}
	return counts, nil
}

// printable makes a name of somebody else's fit for a terminal and for one line.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`"{}[];`, r) }) {
		return fmt.Sprintf("%q", s)
	}
	return s
}
