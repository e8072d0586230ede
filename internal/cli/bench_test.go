package cli

import (
	"strings"
	"testing"
)

// Nothing is measured if something was typed wrong, and the error says what.
func TestBenchUsage(t *testing.T) {
	t.Setenv("IRONCLAW_HOME", t.TempDir())
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"nothing"}, `invalid argument "nothing"`},
		{[]string{"start", "nothing"}, `invalid argument "nothing"`},
		{[]string{"-n", "0"}, "-n 0: at least 1 is needed"},
		{[]string{"-n", "-3", "density"}, "-n -3: at least 1 is needed"},
		{[]string{"-n", "many"}, `invalid argument "many"`},
		{[]string{"--cpus", "2"}, "unknown flag: --cpus"},
	} {
		code, stdout, stderr := run(t, append([]string{"bench"}, c.args...)...)
		if code != 125 || stdout != "" || !strings.HasPrefix(stderr, "error: "+c.want) || !strings.HasSuffix(stderr, "\nhint: see `ironclaw bench --help`\n") {
			t.Errorf("%q: code %d, stdout %q, stderr %q", c.args, code, stdout, stderr)
		}
	}
}

// The help says when no median is quoted.
func TestBenchHelp(t *testing.T) {
	code, stdout, _ := run(t, "bench", "--help")
	for _, want := range []string{"start|exec|io|pool|density|cycles", "1.75", "5 %", "25 %", "-n, --runs"} {
		if code != 0 || !strings.Contains(stdout, want) {
			t.Errorf("code %d, no %q in %s", code, want, stdout)
		}
	}
}
