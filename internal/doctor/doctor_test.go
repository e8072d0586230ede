package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/kernel"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
)

func TestMain(m *testing.M) {
	jail.Init()
	os.Exit(m.Run())
}

func TestHealthy(t *testing.T) {
	for _, c := range []struct {
		statuses []Status
		want     bool
	}{
		{nil, true},
		{[]Status{OK, OK}, true},
		{[]Status{OK, Limited}, true},
		{[]Status{Limited, Missing, OK}, false},
	} {
		var checks []Check
		for _, s := range c.statuses {
			checks = append(checks, Check{Status: s})
		}
		if Healthy(checks) != c.want {
			t.Errorf("%v", c.statuses)
		}
	}
}

// tools makes a PATH of programs that note how they are called, and nothing else.
func tools(t *testing.T, programs ...string) (calls func() string) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	for _, p := range programs {
		script := fmt.Sprintf("#!/bin/sh\necho \"%s $*\" >>%s\necho 'QEMU emulator version 7.2.1 (Debian)'\n", p, log)
		if err := os.WriteFile(filepath.Join(dir, p), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	return func() string {
		b, _ := os.ReadFile(log) // absent if nothing was called
		return string(b)
	}
}

// byName runs every check, and fails if one of them boots or prepares something.
func byName(t *testing.T, h *sandbox.Host) map[string]Check {
	t.Helper()
	checks := Examine(t.Context(), h, func(step string) { t.Errorf("doctor does something long: %s", step) })
	found := make(map[string]Check)
	for _, c := range checks {
		if _, twice := found[c.Name]; twice || c.Detail == "" {
			t.Errorf("check %+v", c)
		}
		found[c.Name] = c
	}
	return found
}

func want(t *testing.T, c Check, status Status, detail, remedy string) {
	t.Helper()
	if c.Status != status || !strings.Contains(c.Detail, detail) || !strings.Contains(c.Remedy, remedy) || (remedy == "") != (c.Remedy == "") {
		t.Errorf("check %+v, want %s, %q, %q", c, status, detail, remedy)
	}
}

// Before setup nothing is booted, and nothing is called broken that the first
// run makes by itself.
func TestEmptyHome(t *testing.T) {
	calls := tools(t, "qemu-system-x86_64", "apt-get", "dpkg-deb", "mmdebstrap")
	h := sandbox.Open(filepath.Join(t.TempDir(), "home"))
	c := byName(t, h)
	want(t, c["QEMU"], OK, "7.2.1", "")
	want(t, c["kernel"], Limited, kernel.ErrNotInstalled.Error(), "ironclaw setup")
	want(t, c["image base"], Limited, "no such image", "ironclaw setup")
	want(t, c["accelerator"], Limited, "not known yet", "")
	want(t, c["apt"], OK, "/apt-get", "")
	if os.Geteuid() == 0 {
		want(t, c["image build"], OK, "mmdebstrap", "")
	} else {
		want(t, c["image build"], Limited, "newuidmap", "apt-get install -y uidmap")
	}
	if d := c["directory"]; d.Status == Missing || !strings.Contains(d.Detail, h.Home) {
		t.Errorf("directory: %+v", d)
	}
	if c["link"].Status != OK || c["memory"].Status == Missing {
		t.Errorf("link %+v, memory %+v", c["link"], c["memory"])
	}
	if a, err := kernel.BuiltInAgent(); err == nil {
		program, _ := a.Program()
		want(t, c["guest agent"], OK, fmt.Sprint(len(program)), "")
	} else {
		want(t, c["guest agent"], Missing, "without its guest agent", "make build")
	}
	if d := cmp.Diff("qemu-system-x86_64 --version\n", calls()); d != "" {
		t.Errorf("programs were called: %s", d)
	}
}

// Everybody mends things in this order: the program, what it needs, what it
// makes.
func TestOrder(t *testing.T) {
	tools(t, "qemu-system-x86_64", "apt-get", "dpkg-deb", "mmdebstrap")
	var got []string
	for _, c := range Examine(t.Context(), sandbox.Open(t.TempDir()), nil) {
		got = append(got, c.Name)
	}
	wanted := []string{"guest agent", "QEMU", "apt", "dpkg", "image build", "directory", "memory", "kernel", "image base", "accelerator", "link"}
	for _, n := range layer.All() {
		if !n.Guest() {
			wanted = append(wanted, "layer "+string(n))
		}
	}
	if d := cmp.Diff(wanted, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// Each program that is not there is named with what installs it; only QEMU is
// needed to run.
func TestNothingInstalled(t *testing.T) {
	tools(t)
	c := byName(t, sandbox.Open(t.TempDir()))
	want(t, c["QEMU"], Missing, "not installed", "apt-get install -y qemu-system-x86")
	want(t, c["image build"], Limited, "mmdebstrap is not installed", "apt-get install -y mmdebstrap")
	want(t, c["apt"], Limited, "not installed", "")
	want(t, c["dpkg"], Limited, "not installed", "")
}

// What is there and broken is not made by the first run: it has to be mended.
func TestDamagedHome(t *testing.T) {
	tools(t, "qemu-system-x86_64")
	h := sandbox.Open(t.TempDir())
	for name, content := range map[string]string{"images/names/base.json": "{", "kernels/packages/x/manifest.json": "{"} {
		path := filepath.Join(h.Home, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("packages/x", filepath.Join(h.Home, "kernels/current")); err != nil {
		t.Fatal(err)
	}
	c := byName(t, h)
	want(t, c["kernel"], Missing, "damaged", "ironclaw setup")
	want(t, c["image base"], Missing, "damaged", "ironclaw image build base")
	want(t, c["accelerator"], Limited, "not known yet", "")
}

func TestHomeThatCannotBe(t *testing.T) {
	tools(t, "qemu-system-x86_64")
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := byName(t, sandbox.Open(filepath.Join(file, "home")))
	want(t, c["directory"], Missing, "not a directory", "IRONCLAW_HOME")
}
