package iptables

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/firewall/rules"
)

// builtin is iptables' own chain on a hook.
func builtin(h rules.Hook) string { return strings.ToUpper(string(h)) }

func target(v rules.Verdict) string { return strings.ToUpper(string(v)) }

// ruleText is a rule in our chain, as iptables-save writes it.
func ruleText(link string, rule rules.Rule) string {
	if rule.UIDs == nil {
		return "-A " + link + " -j " + target(rule.Verdict)
	}
	users := rule.UIDs.String()
	if rule.UIDs.First == rule.UIDs.Last {
		users = strconv.FormatUint(uint64(rule.UIDs.First), 10)
	}
	return "-A " + link + " -m owner --uid-owner " + users + " -j " + target(rule.Verdict)
}

// shared returns the rules that all of r's chains have. iptables links one chain to
// all hooks, so they must have the same, at the priority that filters have.
func shared(r rules.Rules) ([]rules.Rule, error) {
	for _, c := range r.Chains {
		if !slices.EqualFunc(c.Rules, r.Chains[0].Rules, func(a, b rules.Rule) bool { return a.String() == b.String() }) {
			return nil, fmt.Errorf("iptables cannot have other rules on %s than on %s", c.Hook, r.Chains[0].Hook)
		}
		if c.Priority != 0 {
			return nil, fmt.Errorf("iptables has no priority %d", c.Priority)
		}
		if !r.Exclusive && c.Policy != rules.Accept {
			return nil, errors.New("the policy of a namespace that is not ours alone is not ours to set")
		}
	}
	return r.Chains[0].Rules, nil
}

// Text is what iptables-save shows of the rules when they are set, without counters
// and comments. It is the same for IPv6. If r is not exclusive it is only what is
// ours of the table filter.
func Text(r rules.Rules) (string, error) {
	ours, err := shared(r)
	if err != nil {
		return "", err
	}
	l := listing{tables: []table{{name: "filter"}}}
	t := &l.tables[0]
	for _, c := range r.Chains {
		t.chains = append(t.chains, chain{builtin(c.Hook), target(c.Policy)})
		t.rules = append(t.rules, ruleLine{text: "-A " + builtin(c.Hook) + " -j " + r.Link})
	}
	t.chains = append(t.chains, chain{r.Link, "-"})
	for _, rule := range ours {
		t.rules = append(t.rules, ruleLine{text: ruleText(r.Link, rule)})
	}
	return l.text(r), nil
}

// setScript is the input of iptables-restore that makes the table filter hold r and
// nothing else. For rules that are not exclusive see guardScript.
func setScript(r rules.Rules) (string, error) {
	text, err := Text(r)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, ":") {
			line = strings.TrimSuffix(line, "\n") + " [0:0]\n"
		}
		b.WriteString(line)
	}
	return b.String(), nil
}

// guardScript puts our chain in order in a table that is not ours alone: the links
// that there are go, the chain is emptied by being declared, and it is linked once,
// before all that others have there.
func guardScript(r rules.Rules, old listing) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*filter\n:%s - [0:0]\n", r.Link)
	for _, rule := range old.links(r.Link) {
		b.WriteString(strings.Replace(rule, "-A ", "-D ", 1) + "\n")
	}
	for _, rule := range r.Chains[0].Rules {
		b.WriteString(ruleText(r.Link, rule) + "\n")
	}
	for _, c := range r.Chains {
		fmt.Fprintf(&b, "-I %s 1 -j %s\n", builtin(c.Hook), r.Link)
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// removeScript removes our chain and its links, and is empty if there are none.
func removeScript(r rules.Rules, old listing) string {
	if !old.has(r.Link) {
		return ""
	}
	var b strings.Builder
	b.WriteString("*filter\n")
	for _, rule := range old.links(r.Link) {
		b.WriteString(strings.Replace(rule, "-A ", "-D ", 1) + "\n")
	}
	fmt.Fprintf(&b, "-F %s\n-X %s\nCOMMIT\n", r.Link, r.Link)
	return b.String()
}

// listing is what iptables-save writes.
type listing struct {
	tables  []table
	remarks []string // comments, but those that only say when and by whom
}

type table struct {
	name   string
	chains []chain
	rules  []ruleLine
}

type chain struct{ name, policy string } // policy "-": not a built-in chain

type ruleLine struct {
	text           string // from "-A" on
	packets, bytes uint64
}

// chain is the name of the chain that the rule is in.
func (r ruleLine) chain() string {
	f := fields(r.text)
	if len(f) < 2 {
		return ""
	}
	return f[1]
}

// to is the chain or target that the rule ends in.
func (r ruleLine) to() string {
	f := fields(r.text)
	for i := len(f) - 2; i >= 0; i-- {
		if f[i] == "-j" || f[i] == "-g" {
			return f[i+1]
		}
	}
	return ""
}

// fields splits a rule into words. What iptables-save has put between quotes, a
// comment for instance, is one word, and never an option.
func fields(s string) []string {
	var words []string
	var word strings.Builder
	quoted, escaped, inWord := false, false, false
	for _, r := range s {
		switch {
		case escaped:
			word.WriteRune(r)
			escaped = false
		case r == '\\' && quoted:
			escaped = true
		case r == '"':
			quoted, inWord = !quoted, true
			word.WriteRune(r)
		case r == ' ' && !quoted:
			if inWord {
				words = append(words, word.String())
			}
			word.Reset()
			inWord = false
		default:
			inWord = true
			word.WriteRune(r)
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words
}

var errLine = errors.New("a line that iptables-save does not write")

// parse reads the output of iptables-save -c.
func parse(out []byte) (listing, error) {
	var l listing
	for raw := range bytes.Lines(out) {
		line := strings.TrimSuffix(string(raw), "\n")
		var t *table
		if n := len(l.tables); n > 0 {
			t = &l.tables[n-1]
		}
		switch {
		case line == "" || line == "COMMIT":
		case line[0] == '#':
			l.remark(line)
		case line[0] == '*':
			l.tables = append(l.tables, table{name: line[1:]})
		case t == nil:
			return l, fmt.Errorf("%w: %.80q", errLine, line)
		case line[0] == ':':
			f := strings.Fields(line[1:])
			if len(f) != 3 {
				return l, fmt.Errorf("%w: %.80q", errLine, line)
			}
			t.chains = append(t.chains, chain{f[0], f[1]})
		default:
			r, err := parseRule(line)
			if err != nil {
				return l, err
			}
			t.rules = append(t.rules, r)
		}
	}
	return l, nil
}

// remark keeps a comment that tells of something: of chains that iptables cannot
// show, for instance.
func (l *listing) remark(line string) {
	for _, usual := range []string{"# Generated by ", "# Completed on ", "# Warning: iptables-legacy tables present",
		"# Warning: ip6tables-legacy tables present"} {
		if strings.HasPrefix(line, usual) {
			return
		}
	}
	l.remarks = append(l.remarks, line)
}

// parseRule reads "[packets:bytes] -A CHAIN ...".
func parseRule(line string) (ruleLine, error) {
	count, text, ok := strings.Cut(line, "] ")
	p, b, colon := strings.Cut(strings.TrimPrefix(count, "["), ":")
	packets, err1 := strconv.ParseUint(p, 10, 64)
	bytes, err2 := strconv.ParseUint(b, 10, 64)
	if !ok || !colon || err1 != nil || err2 != nil || !strings.HasPrefix(line, "[") || !strings.HasPrefix(text, "-A ") {
		return ruleLine{}, fmt.Errorf("%w: %.80q", errLine, line)
	}
	return ruleLine{text, packets, bytes}, nil
}

func (l listing) filter() table {
	for _, t := range l.tables {
		if t.name == "filter" {
			return t
		}
	}
	return table{}
}

// links are the rules of other chains that go to ours.
func (l listing) links(link string) []string {
	var found []string
	for _, r := range l.filter().rules {
		if r.to() == link && r.chain() != link {
			found = append(found, r.text)
		}
	}
	return found
}

// has reports whether there is a chain of this name.
func (l listing) has(name string) bool {
	return slices.ContainsFunc(l.filter().chains, func(c chain) bool { return c.name == name })
}

// text writes what was found in a fixed order: everything if r is exclusive, else
// what is ours.
func (l listing) text(r rules.Rules) string {
	var b strings.Builder
	if !r.Exclusive {
		l.filter().guardText(&b, r)
		return b.String()
	}
	for _, t := range l.tables {
		// The legacy variant has tables as soon as somebody looks at them.
		if t.name != "filter" && len(t.rules) == 0 && !slices.ContainsFunc(t.chains, func(c chain) bool { return c.policy != "ACCEPT" }) {
			continue
		}
		t.text(&b)
	}
	for _, line := range l.remarks {
		b.WriteString(line + "\n")
	}
	return b.String()
}

// text writes the chains by name, the built-in ones first, and the rules of each in
// their order.
func (t table) text(b *strings.Builder) {
	fmt.Fprintf(b, "*%s\n", t.name)
	chains := slices.Clone(t.chains)
	slices.SortStableFunc(chains, func(x, y chain) int {
		if own := strings.Compare(x.policy, "-") - strings.Compare(y.policy, "-"); own != 0 {
			return -own
		}
		return strings.Compare(x.name, y.name)
	})
	for _, c := range chains {
		fmt.Fprintf(b, ":%s %s\n", c.name, c.policy)
	}
	byChain := make(map[string][]string)
	for _, r := range t.rules {
		byChain[r.chain()] = append(byChain[r.chain()], r.text)
	}
	for _, c := range chains {
		for _, text := range byChain[c.name] {
			b.WriteString(text + "\n")
		}
		delete(byChain, c.name)
	}
	for _, name := range slices.Sorted(maps.Keys(byChain)) {
		for _, text := range byChain[name] {
			b.WriteString(text + "\n")
		}
	}
	b.WriteString("COMMIT\n")
}

// guardText writes our chain and its links, and of the links also what stands
// before them: a rule there that accepts makes ours worthless.
func (t table) guardText(b *strings.Builder, r rules.Rules) {
	seen := make(map[string]bool)
	hooks := make(map[string]bool)
	for _, c := range r.Chains {
		hooks[builtin(c.Hook)] = true
	}
	var links, own []string
	for _, rule := range t.rules {
		name := rule.chain()
		switch {
		case name == r.Link:
			own = append(own, rule.text)
		case rule.to() == r.Link && hooks[name] && seen[name]:
			links = append(links, rule.text+" # not the first rule")
		case rule.to() == r.Link:
			links = append(links, rule.text)
		}
		seen[name] = true
	}
	for _, c := range t.chains {
		if c.name == r.Link {
			fmt.Fprintf(b, ":%s %s\n", c.name, c.policy)
		}
	}
	for _, line := range slices.Concat(links, own) {
		b.WriteString(line + "\n")
	}
}

// count adds the counters of the links.
func (l listing) count(r rules.Rules, counts []rules.Count) error {
	for i, c := range r.Chains {
		counts[i].Hook = c.Hook
		rows := l.filter().rules
		at := slices.IndexFunc(rows, func(row ruleLine) bool { return row.chain() == builtin(c.Hook) && row.to() == r.Link })
		if !r.Exclusive {
			// Everybody's packets pass our link there: count those in our chain.
			at = slices.IndexFunc(rows, func(row ruleLine) bool { return row.chain() == r.Link })
		}
		if at < 0 {
			return fmt.Errorf("there is no rule for %s", c.Hook)
		}
		counts[i].Packets += rows[at].packets
		counts[i].Bytes += rows[at].bytes
	}
	return nil
}
