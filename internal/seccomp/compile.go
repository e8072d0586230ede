package seccomp

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data, on a little-endian machine.
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16 // 8 bytes each, the lower half first
)

const (
	// x32 is the bit in the number of a call of the x32 ABI.
	x32 = 0x40000000
	// maxInsns bounds a program (BPF_MAXINSNS).
	maxInsns = 4096
	// maxJump is how far a conditional jump reaches.
	maxJump = 255
)

// Instructions in use.
const (
	opLoad  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	opAnd   = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	opJump  = unix.BPF_JMP | unix.BPF_JA
	opEqual = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	opAbove = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
	opLeast = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	opRet   = unix.BPF_RET | unix.BPF_K
)

func insn(code int, k uint32, jt, jf uint8) unix.SockFilter {
	return unix.SockFilter{Code: uint16(code), Jt: jt, Jf: jf, K: k}
}

// Compile makes the program of the profile. A profile that says something other
// than it seems to (an unknown name, a rule that can never apply) is an error.
func (p *Profile) Compile() ([]unix.SockFilter, error) {
	prog, err := p.compile()
	if err != nil {
		return nil, fmt.Errorf("seccomp profile %s: %w", p.Name, err)
	}
	return prog, nil
}

func (p *Profile) compile() ([]unix.SockFilter, error) {
	if p.Default == 0 {
		return nil, errors.New("it has no default action")
	}
	foreign := p.Foreign
	if foreign == 0 {
		foreign = KillProcess
	}
	chains, err := p.chains()
	if err != nil {
		return nil, err
	}
	body, err := p.search(p.ranges(chains))
	if err != nil {
		return nil, err
	}
	prog := append([]unix.SockFilter{
		insn(opLoad, offArch, 0, 0),
		insn(opEqual, unix.AUDIT_ARCH_X86_64, 1, 0),
		insn(opRet, uint32(foreign), 0, 0),
		insn(opLoad, offNumber, 0, 0),
		insn(opLeast, x32, 0, 1), // also -1, which a tracer can set
		insn(opRet, uint32(foreign), 0, 0),
	}, body...)
	if len(prog) > maxInsns {
		return nil, fmt.Errorf("it takes %d instructions; the kernel takes %d", len(prog), maxInsns)
	}
	return prog, nil
}

// chains lists for each number the rules that may decide it, in their order.
func (p *Profile) chains() ([][]int, error) {
	numbers := make(map[string]int, len(names))
	for nr, name := range names {
		if name != "" {
			numbers[name] = nr
		}
	}
	chains := make([][]int, len(names))
	for i, r := range p.Rules {
		if r.Action == 0 {
			return nil, fmt.Errorf("rule %d has no action", i)
		}
		if err := checkConds(r.Conds); err != nil {
			return nil, fmt.Errorf("rule %d: %w", i, err)
		}
		for _, name := range r.Calls {
			nr, ok := numbers[name]
			if !ok {
				return nil, fmt.Errorf("rule %d: there is no system call %q", i, name)
			}
			if c := chains[nr]; len(c) > 0 && len(p.Rules[c[len(c)-1]].Conds) == 0 {
				return nil, fmt.Errorf("rule %d never applies to %s: an earlier one always does", i, name)
			}
			chains[nr] = append(chains[nr], i)
		}
	}
	return chains, nil
}

func checkConds(conds []Cond) error {
	for _, c := range conds {
		switch {
		case c.Arg < 0 || c.Arg > 5:
			return fmt.Errorf("there is no argument %d", c.Arg)
		case c.Mask == 0:
			return fmt.Errorf("the condition of argument %d has no mask", c.Arg)
		case c.Value&^c.Mask != 0:
			return fmt.Errorf("the condition of argument %d compares bits that its mask takes away", c.Arg)
		case c.Op > GreaterEqual:
			return fmt.Errorf("there is no comparison %d", c.Op)
		}
	}
	return nil
}

// span is the numbers from first to the next span's, which one chain decides.
type span struct {
	first uint32
	chain []int
}

func (p *Profile) ranges(chains [][]int) []span {
	spans := []span{{0, chains[0]}}
	for nr, c := range append(chains[1:], nil) { // behind the table: the default
		if last := spans[len(spans)-1]; !p.same(last.chain, c) {
			spans = append(spans, span{uint32(nr + 1), c})
		}
	}
	return spans
}

// same reports whether two chains decide alike.
func (p *Profile) same(a, b []int) bool {
	action := func(chain []int) (Action, bool) {
		switch {
		case len(chain) == 0:
			return p.Default, true
		case len(p.Rules[chain[0]].Conds) == 0:
			return p.Rules[chain[0]].Action, true
		}
		return 0, false
	}
	x, always := action(a)
	y, alwaysToo := action(b)
	return always && alwaysToo && x == y || slices.Equal(a, b)
}

// search finds the number that is loaded among the spans, and decides.
func (p *Profile) search(spans []span) ([]unix.SockFilter, error) {
	if len(spans) == 1 {
		return p.decide(spans[0].chain)
	}
	mid := len(spans) / 2
	below, err := p.search(spans[:mid])
	if err != nil {
		return nil, err
	}
	above, err := p.search(spans[mid:])
	if err != nil {
		return nil, err
	}
	var prog []unix.SockFilter
	if len(below) <= maxJump {
		prog = append(prog, insn(opLeast, spans[mid].first, uint8(len(below)), 0))
	} else {
		prog = append(prog, insn(opLeast, spans[mid].first, 0, 1), insn(opJump, uint32(len(below)), 0, 0))
	}
	return append(append(prog, below...), above...), nil
}

// decide tries the rules of a chain in turn.
func (p *Profile) decide(chain []int) ([]unix.SockFilter, error) {
	var prog []unix.SockFilter
	for _, i := range chain {
		r := p.Rules[i]
		code, err := ruleCode(r)
		if err != nil {
			return nil, fmt.Errorf("rule %d: %w", i, err)
		}
		prog = append(prog, code...)
		if len(r.Conds) == 0 {
			return prog, nil
		}
	}
	return append(prog, insn(opRet, uint32(p.Default), 0, 0)), nil
}

// Where a jump of a condition leads, until all lengths are known.
const (
	next  = iota
	holds // to the next condition
	fails // behind the rule
)

// jump is an instruction whose jumps are still labels.
type jump struct {
	code int
	k    uint32
	t, f int
}

// ruleCode returns the rule's action if its conditions hold, and falls through
// otherwise.
func ruleCode(r Rule) ([]unix.SockFilter, error) {
	conds := make([][]jump, len(r.Conds))
	total := 1
	for i, c := range r.Conds {
		conds[i] = c.code()
		total += len(conds[i])
	}
	if total > maxJump {
		return nil, fmt.Errorf("%d conditions are too many for one rule", len(r.Conds))
	}
	prog := make([]unix.SockFilter, 0, total)
	for _, code := range conds {
		end := len(prog) + len(code)
		for _, j := range code {
			to := func(label int) uint8 {
				return uint8(map[int]int{next: 0, holds: end - len(prog) - 1, fails: total - len(prog) - 1}[label])
			}
			prog = append(prog, insn(j.code, j.k, to(j.t), to(j.f)))
		}
	}
	return append(prog, insn(opRet, uint32(r.Action), 0, 0)), nil
}

// code compares the upper half of the argument, if the mask has any of it, and
// then the lower.
func (c Cond) code() []jump {
	off := uint32(offArgs + 8*c.Arg)
	var code []jump
	if high := uint32(c.Mask >> 32); high != 0 {
		code = append(code, load(off+4, high)...)
		code = append(code, c.upper(uint32(c.Value>>32))...)
	}
	code = append(code, load(off, uint32(c.Mask))...)
	return append(code, c.lower(uint32(c.Value)))
}

func load(off, mask uint32) []jump {
	code := []jump{{code: opLoad, k: off}}
	if mask != Int {
		code = append(code, jump{code: opAnd, k: mask})
	}
	return code
}

// upper decides by the upper half, or goes on if that is equal.
func (c Cond) upper(v uint32) []jump {
	switch c.Op {
	case NotEqual:
		return []jump{{opEqual, v, next, holds}}
	case Greater, GreaterEqual:
		return []jump{{opAbove, v, holds, next}, {opEqual, v, next, fails}}
	case Less, LessEqual:
		return []jump{{opLeast, v, next, holds}, {opEqual, v, next, fails}}
	default:
		return []jump{{opEqual, v, next, fails}}
	}
}

func (c Cond) lower(v uint32) jump {
	switch c.Op {
	case NotEqual:
		return jump{opEqual, v, fails, holds}
	case Greater:
		return jump{opAbove, v, holds, fails}
	case GreaterEqual:
		return jump{opLeast, v, holds, fails}
	case Less:
		return jump{opLeast, v, fails, holds}
	case LessEqual:
		return jump{opAbove, v, fails, holds}
	default:
		return jump{opEqual, v, holds, fails}
	}
}
