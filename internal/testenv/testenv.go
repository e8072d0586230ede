// Package testenv says what a test needs. A test that does not get it skips with
// the remedy; one that is named in IRONCLAW_MUST_RUN fails instead, so that a
// machine which is there to run it cannot pass by skipping.
package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Environment variables.
const (
	// VM set to 1 lets tests boot machines: they take seconds each.
	VM = "IRONCLAW_TEST_VM"
	// Net set to 1 lets tests fetch packages from the distribution.
	Net = "IRONCLAW_TEST_NET"
	// MustRun lists tests that may not skip, by the names of their top-level
	// functions, separated by spaces or commas.
	MustRun = "IRONCLAW_MUST_RUN"
)

// Skip skips the test, saying what it needs, unless it must run.
func Skip(t testing.TB, need string) {
	t.Helper()
	top, _, _ := strings.Cut(t.Name(), "/")
	names := strings.FieldsFunc(os.Getenv(MustRun), func(r rune) bool { return r == ' ' || r == ',' || r == '\n' })
	if slices.Contains(names, top) {
		t.Fatalf("%s may not be skipped here (%s): %s", top, MustRun, need)
	}
	t.Skip(need)
}

// NeedVM skips unless tests may boot machines and QEMU is there.
func NeedVM(t testing.TB) {
	t.Helper()
	if os.Getenv(VM) != "1" {
		Skip(t, "boots a machine: run `make test`, or set "+VM+"=1 after `make build` and `bin/ironclaw setup`")
	}
	NeedTool(t, "qemu-system-x86_64", "qemu-system-x86")
}

// NeedNet skips unless tests may use the distribution's package archive.
func NeedNet(t testing.TB) {
	t.Helper()
	if os.Getenv(Net) != "1" {
		Skip(t, "fetches packages: set "+Net+"=1")
	}
}

// NeedRoot skips unless the test runs as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "needs root: run the tests with sudo")
	}
}

// NeedTool skips unless a program is installed.
func NeedTool(t testing.TB, program, pkg string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		Skip(t, "needs "+program+": sudo apt-get install -y "+pkg)
	}
}

// NeedDevice skips unless a device can be opened for reading and writing.
func NeedDevice(t testing.TB, path, remedy string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		Skip(t, err.Error()+": "+remedy)
	}
	f.Close()
}

// Root is the directory of the module.
func Root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			t.Fatal("no go.mod above the test")
		}
		dir = parent
	}
}
