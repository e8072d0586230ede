package bench_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/bench"
	"github.com/ironclaw-run/ironclaw/internal/cli"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/kernel"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// The test's own program is the ironclaw that start runs.
func TestMain(m *testing.M) {
	jail.Init()
	if len(os.Args) > 1 && os.Args[1] == "run" {
		os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// Each benchmark measures what it says, on real machines, as few times as it can.
func TestBenchmarks(t *testing.T) {
	h := ownHome(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"start": {
			"run -- true", "run -- true/hello", "run -- true/close", "run -- echo x: first output after the VMM's start",
			"run -- true, without the jail but for its filters", "run --cold -- true", "run --cold -- true/guest: agent", "3 at once: each", "reference: qemu-system-x86_64 --version",
		},
		"exec":    {"ping of the guest agent", "exec true", "reference: true on the host", "memory of the VMM at rest (Pss)"},
		"io":      {"stdout", "stdin", "reference: a pipe on the host"},
		"pool":    {"warmed up with echo", "warmed up with true", "reference: on the host"},
		"density": {"start of one, beside those before it", "memory of each VMM (Pss), mean", "CPU of each, idle", "machines that do not answer"},
		"cycles":  {"a cycle", "a cycle/create", "a cycle/close", "more files below the home", "more descriptors"},
	} {
		t.Run(name, func(t *testing.T) {
			b := bench.Bench{Host: h, Program: self, Sandbox: sandbox.Options{Accel: "tcg", Link: "serial"}, N: 2}
			b.Hasten()
			table, err := b.Run(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, r := range table.Rows {
				got = append(got, strings.TrimPrefix(r.Of+"/"+r.Name, "/"))
				if len(r.Values) == 0 || r.Quantile(1) <= 0 && r.Unit == "ms" {
					t.Errorf("row %+v", r)
				}
			}
			for _, w := range want {
				if !slices.Contains(got, w) {
					t.Errorf("no row %q among %q", w, got)
				}
			}
			if !table.Machine.Cloned || table.Machine.Accel != "tcg" || table.Machine.Memory != 256 || !strings.HasPrefix(table.Machine.VMM, "qemu ") {
				t.Errorf("machine %+v", table.Machine)
			}
			if len(table.Conditions.Calibration) < 2 {
				t.Errorf("conditions %+v", table.Conditions)
			}
		})
	}
}

// ownHome is a directory of the test's own, with the user's kernels and images.
func ownHome(t *testing.T) *sandbox.Host {
	t.Helper()
	testenv.NeedVM(t)
	if _, err := kernel.BuiltInAgent(); err != nil {
		testenv.Skip(t, err.Error())
	}
	real, err := sandbox.DefaultHome()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sandbox.Open(real).Images.Get(t.Context(), sandbox.DefaultImage); err != nil {
		testenv.Skip(t, err.Error()+": run `bin/ironclaw setup`")
	}
	home := filepath.Join(t.TempDir(), "home")
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kernels", "images", "facts.json"} {
		if err := os.Symlink(filepath.Join(real, name), filepath.Join(home, name)); err != nil {
			t.Fatal(err)
		}
	}
	return sandbox.Open(home)
}
