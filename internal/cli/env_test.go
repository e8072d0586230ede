package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func envFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestEnvironment(t *testing.T) {
	t.Setenv("IRONCLAW_TEST_OURS", "our own")
	for name, c := range map[string]struct {
		file    string
		entries []string
		want    []string
	}{
		"nothing":           {"", nil, nil},
		"comments, blanks":  {"# A=1\n\n  \n\t# B=2\nC=3\n", nil, []string{"C=3"}},
		"CRLF":              {"A=1\r\n\r\n# x\r\nB=2\r\n", nil, []string{"A=1", "B=2"}},
		"byte order mark":   {"\ufeffA=1\nB=2\n", nil, []string{"A=1", "B=2"}},
		"no newline at end": {"A=1\nB=2", nil, []string{"A=1", "B=2"}},
		"indented":          {"  A=1\n\tB=2\n", nil, []string{"A=1", "B=2"}},
		"value as it is":    {"A= b # c = \"d\" $E  \n", nil, []string{`A= b # c = "d" $E  `}},
		"empty value":       {"A=\n", nil, []string{"A="}},
		"key alone":         {"IRONCLAW_TEST_OURS\nIRONCLAW_TEST_ABSENT\n", nil, []string{"IRONCLAW_TEST_OURS=our own"}},
		"key alone, CRLF":   {"IRONCLAW_TEST_OURS\r\n", nil, []string{"IRONCLAW_TEST_OURS=our own"}},
		"flags come last":   {"A=1\n", []string{"A=2", "IRONCLAW_TEST_OURS"}, []string{"A=1", "A=2", "IRONCLAW_TEST_OURS=our own"}},
		"value of lines":    {"", []string{"A=1\n2"}, []string{"A=1\n2"}},
		"as long as it may": {"A=" + strings.Repeat("x", maxEnvFile-3) + "\n", nil, []string{"A=" + strings.Repeat("x", maxEnvFile-3)}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := environment(c.entries, []string{envFile(t, c.file)})
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("-want +got:\n%.2000s", d)
			}
		})
	}
}

// A bad entry is named by file and line, and its value, which may be a secret,
// is not repeated.
func TestBadEnvironment(t *testing.T) {
	for name, c := range map[string]struct{ file, want string }{
		"no key":         {"A=1\n=secret\n", ":2: "},
		"blank in key":   {"# x\n\nexport A=secret\n", ":3: "},
		"NUL in value":   {"A=se\x00cret\n", ":1: "},
		"NUL in key":     {"A\x00=1\n", ":1: "},
		"NUL, key alone": {"A\x00B\n", ":1: "},
		"long with NUL":  {"A=" + strings.Repeat("secret", 100_000) + "\x00\n", ":1: "},
		"too large":      {"A=" + strings.Repeat("x", maxEnvFile), "larger than"},
	} {
		t.Run(name, func(t *testing.T) {
			path := envFile(t, c.file)
			env, err := environment(nil, []string{path})
			if err == nil {
				t.Fatalf("accepted as %.100q", env)
			}
			if text := err.Error(); !strings.Contains(text, path) || !strings.Contains(text, c.want) || len(text) > len(path)+200 {
				t.Errorf("error %.500q", text)
			}
			if name != "no key" && name != "blank in key" && strings.Contains(err.Error(), "cret") {
				t.Errorf("the value is repeated: %v", err)
			}
		})
	}
	for _, entry := range []string{"", "=", "=x", "a b=1", "A\t=1", "A=\x00", "\x00"} {
		if env, err := environment([]string{entry}, nil); err == nil || !strings.HasPrefix(err.Error(), "--env: ") {
			t.Errorf("--env %q: %q, %v", entry, env, err)
		}
	}
	for _, path := range []string{t.TempDir(), "/nonexistent", "/dev/zero"} {
		if _, err := environment(nil, []string{path}); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("--env-file %s: %v", path, err)
		}
	}
}

func TestParseSize(t *testing.T) {
	const mib = 1 << 20
	for s, want := range map[string]int64{
		"512M": 512 * mib, "512m": 512 * mib, "512MiB": 512 * mib, "512MB": 512 * mib, "1g": 1024 * mib, "1.5G": 1536 * mib,
		"1": mib, "1048577": 2 * mib, "1K": mib, "1T": mib * mib,
	} {
		if got, err := parseSize(s); got != want || err != nil {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "0", "-1", "-5M", "lots", "M", "1X", "1 2M", "nan", "inf", "0x10", "1e30", "1e300", "9999P", "8192P",
		"9223372036854775807", "9223372036854774784", "9223372036854775808", "1M\n", "1M\x1b[2J"} {
		if got, err := parseSize(s); err == nil || !strings.Contains(err.Error(), "bad size") {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
}
