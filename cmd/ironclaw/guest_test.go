package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// The guest's clock is the host's, and two machines share nothing that should be
// theirs alone.
func TestClockAndUniqueness(t *testing.T) {
	p := newPlace(t)
	var first []string
	for range 2 {
		var stderr bytes.Buffer
		cmd := p.command(t.Context(), "run", "--", "sh", "-c",
			"date +%s.%N; head -c 64 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; echo; cat /proc/sys/kernel/random/boot_id; hostname")
		cmd.Stderr = &stderr
		before := time.Now()
		out, err := cmd.Output()
		after := time.Now()
		if err != nil {
			t.Fatalf("%v: %s", err, &stderr)
		}
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		if len(lines) != 4 || len(lines[1]) != 128 {
			t.Fatalf("%q", out)
		}
		seconds, err := strconv.ParseFloat(lines[0], 64)
		if err != nil {
			t.Fatal(err)
		}
		guest := time.UnixMicro(int64(seconds * 1e6))
		const slack = 50 * time.Millisecond
		if guest.Before(before.Add(-slack)) || guest.After(after.Add(slack)) {
			t.Errorf("the guest's clock says %v, between %v and %v", guest, before, after)
		}
		for i := range first {
			if i > 0 && first[i] == lines[i] {
				t.Errorf("two machines share %q", lines[i])
			}
		}
		first = lines
	}
}

// Every flag of run is in its page.
func TestFlagsAreDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(testenv.Root(t), "docs", "run.md"))
	if err != nil {
		t.Fatal(err)
	}
	p := &place{dir: t.TempDir(), env: os.Environ()}
	help, err := p.command(t.Context(), "run", "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	flags := regexp.MustCompile(`(?m)^ +(?:(-\w), )?(--[a-z-]+)`).FindAllStringSubmatch(string(help), -1)
	if len(flags) < 15 {
		t.Fatalf("found only %d flags in\n%s", len(flags), help)
	}
	for _, f := range flags {
		short, long := f[1], f[2]
		if long != "--help" && !strings.Contains(string(page), "`"+long) && (short == "" || !strings.Contains(string(page), "`"+short)) {
			t.Errorf("docs/run.md does not mention %s", long)
		}
	}
}
