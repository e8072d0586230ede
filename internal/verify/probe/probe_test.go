package probe

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCalled(t *testing.T) {
	for _, tc := range []struct {
		argv []string
		want string
		ok   bool
	}{
		{[]string{"/x/ironclaw-probe", "[]"}, "[]", true},
		{[]string{"/proc/self/exe", "ironclaw-probe", "[]"}, "[]", true},
		{[]string{"ironclaw", "run", "ironclaw-probe"}, "", false},
		{[]string{"ironclaw", "ironclaw-probe"}, "", false},
		{[]string{"ironclaw-probe"}, "", false},
		{[]string{"ironclaw"}, "", false},
	} {
		if got, ok := Called(tc.argv); got != tc.want || ok != tc.ok {
			t.Errorf("Called(%q) = %q, %v; want %q, %v", tc.argv, got, ok, tc.want, tc.ok)
		}
	}
}

// What a probe prints is read back as it was, and what an attacker could print in
// its place is refused.
func TestResults(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	code := Main(Line(Request{"file.create", []string{dir}}, Request{"file.read", []string{dir + "/nothing"}}, Request{"nonsense", nil}), &out)
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	results, err := ParseResults(out.Bytes(), 3)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []Result{{"file.create", Worked, dir}, {"file.read", Refused, "1× ENOENT"}, {"nonsense", Unknown, "there is no such attack"}} {
		if results[i] != want {
			t.Errorf("result %+v, want %+v", results[i], want)
		}
	}
	one := `{"attack":"a","outcome":"refused","detail":""}` + "\n"
	for _, bad := range []string{"", "refused\n", one + one, `{"attack":"a","outcome":"fine"}` + "\n", `{"outcome":"refused"`} {
		if _, err := ParseResults([]byte(bad), 1); err == nil {
			t.Errorf("%q was taken for a result", bad)
		}
	}
	if _, err := ParseResults([]byte(one), 1); err != nil {
		t.Error(err)
	}
}

// An attack that panics or does not end is neither refused nor a success.
func TestUnknown(t *testing.T) {
	limitAttacks["test.panic"] = func([]string) (Outcome, string) { panic("oh") }
	limitAttacks["test.hang"] = func([]string) (Outcome, string) { time.Sleep(time.Hour); return Refused, "" }
	defer delete(limitAttacks, "test.panic")
	defer delete(limitAttacks, "test.hang")
	for _, name := range []string{"test.panic", "test.hang"} {
		if r := run(Request{name, nil}, 20*time.Millisecond); r.Outcome != Unknown {
			t.Errorf("%s: %+v", name, r)
		}
	}
	var out bytes.Buffer
	if code := Main("garbage", &out); code == 0 {
		t.Error("garbage was run")
	}
}

func TestOutcomes(t *testing.T) {
	if o, d := tried("x", unix.EPERM); o != Refused || d != "x: EPERM" {
		t.Error(o, d)
	}
	if o, _ := tried("x", nil); o != Worked {
		t.Error(o)
	}
	// The permission was given, and only the nonsense was refused.
	if o, _ := triedBadly("x", unix.ENOEXEC, unix.ENOEXEC); o != Worked {
		t.Error(o)
	}
	if o, _ := triedBadly("x", unix.EPERM, unix.ENOEXEC); o != Refused {
		t.Error(o)
	}
	o, d := several([]string{"a", "b", "c"}, func(n string) error {
		if n == "b" {
			return nil
		}
		return errors.New("no")
	})
	if o != Worked || d != "b" {
		t.Error(o, d)
	}
	if o, _ := several(nil, nil); o != Unknown {
		t.Errorf("an attack on nothing is %s", o)
	}
}

// Each probe of files tells what is from what is not.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("token"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		attack string
		args   []string
		want   Outcome
	}{
		{"file.read", []string{file}, Worked},
		{"file.read", []string{file + "x", "/nonexistent"}, Refused},
		{"file.list", []string{dir}, Worked},
		{"file.list", []string{dir, "f", "g"}, Refused},
		{"file.create", []string{"/proc"}, Refused},
		{"file.change", []string{file}, Worked},
		{"file.change", []string{"/proc/version"}, Refused},
		{"file.has", []string{"token", dir + "/*"}, Worked},
		{"file.has", []string{"other", dir + "/*"}, Refused},
		{"disk.write", []string{file}, Worked},
		{"disk.write", []string{"/proc/version"}, Refused},
		{"limit.files", []string{"100000000"}, Refused},
		{"limit.files", []string{"3"}, Worked},
		{"limit.filesize", []string{"4096", dir}, Worked},
		{"limit.processes", []string{"3"}, Worked},
		{"process.signal", []string{strconv.Itoa(os.Getppid())}, Worked},
		{"process.signal", []string{"4194305"}, Refused},
		{"privilege.nnp", nil, Worked},
	} {
		if r := run(Request{tc.attack, tc.args}, timeout); r.Outcome != tc.want {
			if os.Geteuid() == 0 && tc.attack == "file.change" {
				continue // root may chmod what is in /proc
			}
			t.Errorf("%s %v: %+v, want %s", tc.attack, tc.args, r, tc.want)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "token" {
		t.Errorf("the file was changed: %q, %v", b, err)
	}
}

func TestNames(t *testing.T) {
	names := Names()
	if len(names) < 50 || find(names[0]) == nil || find("") != nil {
		t.Errorf("%d attacks", len(names))
	}
	if !strings.Contains(strings.Join(names, " "), "net.tcp") {
		t.Error(names)
	}
}

func FuzzParseResults(f *testing.F) {
	f.Add([]byte(`{"attack":"a","outcome":"refused","detail":""}`+"\n"), 1)
	f.Fuzz(func(t *testing.T, out []byte, want int) {
		results, err := ParseResults(out, want)
		if err == nil && len(results) < want {
			t.Errorf("%d results of %d without an error", len(results), want)
		}
	})
}
