package layer

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseSet(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want string
		ok   bool
	}{
		{nil, "", true},
		{[]string{"landlock", "user"}, "user, landlock", true},
		{[]string{"guest-seccomp, mounts"}, "mounts, guest-seccomp", true},
		{[]string{""}, "", false},
		{[]string{"user,"}, "", false},
		{[]string{"User"}, "", false},
	} {
		got, err := ParseSet(tc.args)
		if (err == nil) != tc.ok || err == nil && got.String() != tc.want {
			t.Errorf("ParseSet(%q) = %v, %v; want %q, ok %v", tc.args, got, err, tc.want, tc.ok)
		}
	}
}

func TestReport(t *testing.T) {
	r := Report{{GuestSeccomp, Off, ""}, {Cgroup, Held, "rlimits"}, {User, Off, ""}}
	r.Sort()
	if diff := cmp.Diff([]Name{User, GuestSeccomp}, r.Without()); diff != "" {
		t.Error(diff)
	}
	if r[1].Layer != Cgroup {
		t.Errorf("sorted: %v", r)
	}
}

func TestErrorHint(t *testing.T) {
	e := &Error{Landlock, errors.New("no such thing"), ""}
	if got, want := e.Hint(), "go without it, knowingly: --without landlock"; got != want {
		t.Errorf("Hint() = %q, want %q", got, want)
	}
	e.Remedy = "mend it"
	if got, want := e.Hint(), "mend it; or go without it, knowingly: --without landlock"; got != want {
		t.Errorf("Hint() = %q, want %q", got, want)
	}
}

func TestEveryLayerSaysWhatItDoes(t *testing.T) {
	for _, n := range All() {
		if n.What() == "" {
			t.Errorf("%s says nothing", n)
		}
	}
}
