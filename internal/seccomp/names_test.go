package seccomp

import (
	"bytes"
	"fmt"
	"go/format"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/golden"
)

// The table is made from the constants of golang.org/x/sys, which is made from the
// kernel's headers.
func TestNames(t *testing.T) {
	dir, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "golang.org/x/sys").Output()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(strings.TrimSpace(string(dir)) + "/unix/zsysnum_linux_amd64.go")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	b.WriteString("package seccomp\n\n// names are the system calls of x86-64 by their numbers. TestNames makes this file\n// from golang.org/x/sys: go test ./internal/seccomp -run TestNames -update\nvar names = [...]string{\n")
	found := 0
	for _, m := range regexp.MustCompile(`(?m)^\s+SYS_(\w+)\s+= (\d+)$`).FindAllStringSubmatch(string(text), -1) {
		nr, err := strconv.Atoi(m[2])
		if err != nil {
			t.Fatal(err)
		}
		name := strings.ToLower(m[1])
		if n, ok := number(name); !golden.Update() && (!ok || n != nr || Name(nr) != name) {
			t.Errorf("%s is %d in the table, %v; it is %d", name, n, ok, nr)
		}
		fmt.Fprintf(&b, "\t%d: %q,\n", nr, name)
		found++
	}
	b.WriteString("}\n")
	if found < 370 {
		t.Fatalf("only %d constants found", found)
	}
	want, err := format.Source(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if golden.Update() {
		if err := os.WriteFile("names.go", want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile("names.go"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("names.go is not as it would be made: %v", err)
	}
}

// number is the number of a call on x86-64.
func number(name string) (nr int, ok bool) {
	for i, n := range names {
		if n == name && name != "" {
			return i, true
		}
	}
	return 0, false
}
