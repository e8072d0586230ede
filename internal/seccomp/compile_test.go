package seccomp

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/golden"
	"golang.org/x/sys/unix"
)

var testKey = Key{0x0123456789abcdef, 0xfedcba9876543210}

// decideByData says what a profile says, straight from its data.
func (p *Profile) decideByData(d *Data) Action {
	if !d.Native() {
		if p.Foreign == 0 {
			return KillProcess
		}
		return p.Foreign
	}
	for _, r := range p.Rules {
		if name := Name(int(d.Number)); name == "" || !slices.Contains(r.Calls, name) {
			continue
		}
		if !slices.ContainsFunc(r.Conds, func(c Cond) bool { return !c.holds(d) }) {
			return r.Action
		}
	}
	return p.Default
}

func (c Cond) holds(d *Data) bool {
	v := d.Args[c.Arg] & c.Mask
	return [...]bool{v == c.Value, v != c.Value, v < c.Value, v <= c.Value, v > c.Value, v >= c.Value}[c.Op]
}

// run is the kernel's interpreter of a filter, as far as filters go. steps is how
// many instructions it took.
func run(t testing.TB, prog []unix.SockFilter, d *Data) (a Action, steps int) {
	t.Helper()
	words := [16]uint32{uint32(d.Number), d.Arch, uint32(d.IP), uint32(d.IP >> 32)}
	for i, arg := range d.Args {
		words[4+2*i], words[5+2*i] = uint32(arg), uint32(arg>>32)
	}
	var acc uint32
	for pc := 0; pc < len(prog); pc++ {
		in := prog[pc]
		steps++
		jump := func(yes bool) {
			if yes {
				pc += int(in.Jt)
			} else {
				pc += int(in.Jf)
			}
		}
		switch int(in.Code) {
		case opLoad:
			if in.K%4 != 0 || in.K >= 64 {
				t.Fatalf("load at %d", in.K)
			}
			acc = words[in.K/4]
		case opAnd:
			acc &= in.K
		case opJump:
			pc += int(in.K)
		case opEqual:
			jump(acc == in.K)
		case opAbove:
			jump(acc > in.K)
		case opLeast:
			jump(acc >= in.K)
		case opRet:
			return Action(in.K), steps
		default:
			t.Fatalf("instruction %#x", in.Code)
		}
	}
	t.Fatal("the program has no end")
	return 0, 0
}

func compile(t testing.TB, p *Profile) []unix.SockFilter {
	t.Helper()
	prog, err := p.Compile()
	if err != nil {
		t.Fatal(err)
	}
	return prog
}

// check compares program and data for a call.
func check(t testing.TB, p *Profile, prog []unix.SockFilter, d Data) {
	t.Helper()
	got, _ := run(t, prog, &d)
	if want := p.decideByData(&d); got != want {
		t.Fatalf("%s: number %d, arch %#x, arguments %#x: %#x; by the data %#x", p.Name, d.Number, d.Arch, d.Args, got, want)
	}
}

// interesting are values of arguments at which the profile might change its mind.
func (p *Profile) interesting() []uint64 {
	values := []uint64{0, 1, Int, Long, 1 << 32, 1 << 63}
	for _, r := range p.Rules {
		for _, c := range r.Conds {
			values = append(values, c.Value, c.Value-1, c.Value+1, c.Value|1<<32, c.Value|^c.Mask, c.Value^1<<40, c.Mask)
		}
	}
	slices.Sort(values)
	return slices.Compact(values)
}

// Every number, and around the values that rules compare with, is decided as the
// data says.
func TestCompiledDecidesAsTheData(t *testing.T) {
	for _, p := range []*Profile{Default(testKey), Strict(testKey), Permissive()} {
		prog := compile(t, p)
		values := p.interesting()
		longest := 0
		for nr := int32(-2); nr < int32(len(names))+20; nr++ {
			for i, v := range values {
				for arg := range 4 {
					d := Data{Number: nr, Arch: unix.AUDIT_ARCH_X86_64}
					d.Args[arg] = v
					d.Args[(arg+1)%4] = values[(i*7)%len(values)]
					check(t, p, prog, d)
				}
			}
			for _, d := range []Data{
				{Number: nr | x32, Arch: unix.AUDIT_ARCH_X86_64},
				{Number: nr, Arch: unix.AUDIT_ARCH_I386},
				{Number: nr, Arch: unix.AUDIT_ARCH_AARCH64},
				{Number: nr, Arch: 0},
			} {
				check(t, p, prog, d)
			}
			_, steps := run(t, prog, &Data{Number: nr, Arch: unix.AUDIT_ARCH_X86_64})
			longest = max(longest, steps)
		}
		if longest > 40 {
			t.Errorf("%s: %d instructions for one call", p.Name, longest)
		}
		t.Logf("%s: %d instructions, at most %d for a call", p.Name, len(prog), longest)
	}
}

// What the profiles are for, said once more and from the other side: calls as
// attackers make them.
func TestRefusals(t *testing.T) {
	cases := []struct {
		call            string
		args            []uint64
		byDefault, bare bool // allowed by default, by strict
	}{
		{"read", nil, true, true},
		{"execve", nil, true, true},
		{"clone", []uint64{uint64(unix.SIGCHLD)}, true, true},
		{"clone", []uint64{unix.CLONE_NEWUSER | uint64(unix.SIGCHLD)}, false, false},
		{"clone", []uint64{unix.CLONE_NEWNS}, false, false},
		{"clone", []uint64{unix.CLONE_PARENT | uint64(unix.SIGCHLD)}, false, false},
		{"clone", []uint64{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}, true, true},
		{"clone", []uint64{unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD}, true, true},
		{"clone3", []uint64{0x1000, 88}, false, false},
		{"clone3", []uint64{0x1000, 88, testKey[0], 0}, false, false},
		{"clone3", []uint64{0x1000, 88, 0, testKey[1]}, false, false},
		{"clone3", []uint64{0x1000, 88, testKey[0] & Int, testKey[1]}, false, false},
		{"clone3", []uint64{0x1000, 88, testKey[0], testKey[1]}, true, true},
		{"unshare", []uint64{unix.CLONE_NEWUSER}, false, false},
		{"unshare", []uint64{unix.CLONE_NEWTIME}, false, false},
		{"unshare", []uint64{unix.CLONE_FILES}, true, false},
		{"setns", nil, false, false},
		{"socket", []uint64{unix.AF_UNIX, unix.SOCK_STREAM}, true, true},
		{"socket", []uint64{unix.AF_UNIX | 1<<40, unix.SOCK_STREAM}, true, true}, // the kernel does not look there
		{"socket", []uint64{unix.AF_INET, unix.SOCK_STREAM | unix.SOCK_CLOEXEC}, true, false},
		{"socket", []uint64{unix.AF_INET6, unix.SOCK_DGRAM}, true, false},
		{"socket", []uint64{unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP}, false, false},
		{"socket", []uint64{unix.AF_INET, unix.SOCK_PACKET}, false, false},
		{"socket", []uint64{unix.AF_PACKET, unix.SOCK_RAW}, false, false},
		{"socket", []uint64{unix.AF_VSOCK, unix.SOCK_STREAM}, false, false},
		{"socket", []uint64{unix.AF_VSOCK | 1<<32, unix.SOCK_STREAM}, false, false},
		{"socket", []uint64{unix.AF_ALG, unix.SOCK_SEQPACKET}, false, false},
		{"socket", []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE}, true, false},
		{"socket", []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER}, false, false},
		{"socketpair", []uint64{unix.AF_UNIX}, true, true},
		{"socketpair", []uint64{unix.AF_TIPC}, false, false},
		{"personality", []uint64{0xffffffff}, true, true},
		{"personality", []uint64{0x40000}, false, false}, // ADDR_NO_RANDOMIZE
		{"ioctl", []uint64{0, unix.TCGETS}, true, true},
		{"ioctl", []uint64{0, unix.TIOCSTI}, false, false},
		{"ioctl", []uint64{0, unix.TIOCSTI | 1<<32}, false, false}, // CVE-2019-10063
		{"ptrace", nil, true, false},
		{"shmget", nil, true, false},
	}
	for _, name := range []string{
		"kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "bpf",
		"perf_event_open", "mount", "umount2", "pivot_root", "move_mount", "fsopen", "fsmount", "fspick",
		"fsconfig", "open_tree", "open_tree_attr", "mount_setattr", "keyctl", "add_key", "request_key", "userfaultfd", "io_uring_setup",
		"io_uring_enter", "io_uring_register", "open_by_handle_at", "ioperm", "iopl", "settimeofday",
		"clock_settime", "reboot", "swapon", "acct", "syslog", "quotactl", "kcmp", "pidfd_getfd",
		"process_madvise", "fanotify_init", "lookup_dcookie", "sethostname", "setdomainname", "vhangup", "nfsservctl",
		"_sysctl", "uselib", "ustat", "sysfs", "migrate_pages", "move_pages",
	} {
		cases = append(cases, struct {
			call            string
			args            []uint64
			byDefault, bare bool
		}{call: name})
	}
	byDefault, strict := compile(t, Default(testKey)), compile(t, Strict(testKey))
	for _, c := range cases {
		nr, ok := number(c.call)
		if !ok {
			t.Errorf("no call %s", c.call)
			continue
		}
		d := Data{Number: int32(nr), Arch: unix.AUDIT_ARCH_X86_64}
		copy(d.Args[:], c.args)
		if a, _ := run(t, byDefault, &d); (a == Allow) != c.byDefault {
			t.Errorf("default: %s%#x: %#x", c.call, c.args, a)
		}
		if a, _ := run(t, strict, &d); (a == Allow) != c.bare {
			t.Errorf("strict: %s%#x: %#x", c.call, c.args, a)
		}
	}
}

// What strict allows, default allows.
func TestStrictIsSmaller(t *testing.T) {
	byDefault, strict := compile(t, Default(testKey)), compile(t, Strict(testKey))
	more := 0
	for nr := range int32(len(names)) {
		for _, v := range Default(testKey).interesting() {
			d := Data{Number: nr, Arch: unix.AUDIT_ARCH_X86_64, Args: [6]uint64{v, 1}}
			a, _ := run(t, byDefault, &d)
			b, _ := run(t, strict, &d)
			if b == Allow && a != Allow {
				t.Errorf("strict allows %s%#x and default does not", Name(int(nr)), d.Args)
			}
			if v == 0 && a == Allow && b != Allow {
				more++
			}
		}
	}
	if more < 30 {
		t.Errorf("default allows only %d calls more", more)
	}
}

func TestBadProfiles(t *testing.T) {
	ok := Rule{Calls: []string{"read"}, Action: Allow}
	many := Rule{Calls: []string{"read"}, Action: Allow}
	for i := range 70 {
		many.Conds = append(many.Conds, Cond{0, Long, NotEqual, uint64(i) << 20})
	}
	for why, p := range map[string]*Profile{
		"no default action":       {Rules: []Rule{ok}},
		"has no action":           {Default: Allow, Rules: []Rule{{Calls: []string{"read"}}}},
		"no system call":          {Default: Allow, Rules: []Rule{{Calls: []string{"reed"}, Action: Allow}}},
		"an earlier one":          {Default: Allow, Rules: []Rule{ok, ok}},
		"no argument 6":           {Default: Allow, Rules: []Rule{{[]string{"read"}, Allow, []Cond{{6, Int, Equal, 0}}}}},
		"has no mask":             {Default: Allow, Rules: []Rule{{[]string{"read"}, Allow, []Cond{{0, 0, Equal, 0}}}}},
		"its mask takes away":     {Default: Allow, Rules: []Rule{{[]string{"read"}, Allow, []Cond{{0, Int, Equal, 1 << 32}}}}},
		"no comparison":           {Default: Allow, Rules: []Rule{{[]string{"read"}, Allow, []Cond{{0, Int, 9, 1}}}}},
		"conditions are too many": {Default: Allow, Rules: []Rule{many}},
	} {
		if _, err := p.Compile(); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", why, err)
		}
	}
}

// randomProfile makes a profile out of a seed.
func randomProfile(r *rand.Rand) *Profile {
	actions := []Action{Allow, Notify, Log, Trap, KillProcess, Errno(unix.EPERM), Errno(unix.ENOSYS)}
	action := func() Action { return actions[r.IntN(len(actions))] }
	p := &Profile{Name: "random", Default: action()}
	if r.IntN(2) == 0 {
		p.Foreign = action()
	}
	closed := make(map[string]bool) // calls that a rule always decides
	for range r.IntN(30) {
		rule := Rule{Action: action()}
		for range r.IntN(3) {
			mask := []uint64{Int, Long, 0xf, 0xf << 30, r.Uint64() | 1}[r.IntN(5)]
			rule.Conds = append(rule.Conds, Cond{r.IntN(6), mask, Op(r.IntN(6)), []uint64{0, mask, r.Uint64() & mask, uint64(r.IntN(4)) & mask}[r.IntN(4)]})
		}
		for range 1 + r.IntN(12) {
			name := Name(r.IntN(len(names)))
			if name == "" || closed[name] || slices.Contains(rule.Calls, name) {
				continue
			}
			rule.Calls = append(rule.Calls, name)
			closed[name] = len(rule.Conds) == 0
		}
		p.Rules = append(p.Rules, rule)
	}
	return p
}

func FuzzCompile(f *testing.F) {
	for seed := range uint64(200) {
		f.Add(seed, seed*2654435761)
	}
	f.Fuzz(func(t *testing.T, a, b uint64) {
		r := rand.New(rand.NewPCG(a, b))
		p := randomProfile(r)
		prog := compile(t, p)
		values := p.interesting()
		for range 2000 {
			d := Data{Number: int32(r.IntN(len(names) + 10)), Arch: unix.AUDIT_ARCH_X86_64}
			if r.IntN(20) == 0 {
				d.Arch, d.Number = []uint32{unix.AUDIT_ARCH_I386, r.Uint32()}[r.IntN(2)], int32(r.Uint32())
			}
			for i := range d.Args {
				d.Args[i] = values[r.IntN(len(values))]
			}
			check(t, p, prog, d)
		}
	})
}

// The programs as people read them. A change of a profile is a change of these.
func TestGolden(t *testing.T) {
	for _, p := range []*Profile{Default(testKey), Strict(testKey), Permissive()} {
		got := p.String() + "\nprogram\n" + disassemble(compile(t, p))
		golden.Check(t, "testdata/"+p.Name+".txt", got)
	}
}

func disassemble(prog []unix.SockFilter) string {
	var b strings.Builder
	for i, in := range prog {
		jump := func(op string) string {
			return fmt.Sprintf("if %s %#x goto %d else %d", op, in.K, i+1+int(in.Jt), i+1+int(in.Jf))
		}
		var s string
		switch int(in.Code) {
		case opLoad:
			s = fmt.Sprintf("load [%d]", in.K)
		case opAnd:
			s = fmt.Sprintf("and %#x", in.K)
		case opJump:
			s = fmt.Sprintf("goto %d", i+1+int(in.K))
		case opEqual:
			s = jump("==")
		case opAbove:
			s = jump(">")
		case opLeast:
			s = jump(">=")
		case opRet:
			s = Action(in.K).String()
		}
		fmt.Fprintf(&b, "%4d  %s\n", i, s)
	}
	return b.String()
}
