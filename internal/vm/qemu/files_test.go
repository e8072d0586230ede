package qemu

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/golden"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// Everything that exists in a QEMU's jail, as text. Which libraries a QEMU has differs between
// distributions, so all of them are one line; that they are libraries is what counts.
func TestFiles(t *testing.T) {
	testenv.NeedTool(t, Program, "qemu-system-x86")
	j, err := jail.Prepare(t.Context(), jail.Options{ID: "files", Memory: 1 << 30})
	if err != nil {
		if lacking, ok := err.(*layer.Error); ok {
			testenv.Skip(t, lacking.Error()+": "+lacking.Hint())
		}
		t.Fatal(err)
	}
	defer j.Close()
	d, err := New(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, spec := range map[string]vm.Spec{
		"files-boot":  {Kernel: "/host/vmlinux", Initrd: "/host/initrd", Root: "/host/disk"},
		"files-clone": {Kernel: "/host/vmlinux", Initrd: "/host/initrd", Root: "/host/disk", From: new(vm.Snapshot)},
	} {
		files, err := d.files(t.Context(), j, &spec)
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, f := range files {
			lines = append(lines, describeFile(t, f))
		}
		slices.Sort(lines)
		got := strings.Join(slices.Compact(lines), "\n") + "\n"
		path := filepath.Join("testdata", name+".golden")
		golden.Check(t, path, got)
	}
}

var (
	library = regexp.MustCompile(`^/(usr/)?lib(64)?/.*\.so(\.[0-9.]+)?$`)
	loader  = regexp.MustCompile(`^/lib(64)?/(.*/)?ld-linux-x86-64\.so\.2$`)
)

func describeFile(t *testing.T, f jail.File) string {
	t.Helper()
	name := f.Inside
	switch {
	case loader.MatchString(name):
		name = "the loader"
	case strings.HasSuffix(name, "/qemu/accel-tcg-x86_64.so"):
		name = "a library" // on some distributions emulation is a module
	case library.MatchString(name):
		name = "a library"
	case strings.HasSuffix(name, "/"+firmware):
		name = "the firmware " + firmware
	case name == f.Host && filepath.Base(name) == Program:
		name = "QEMU"
	case name != f.Host:
		name += " is " + f.Host
	}
	if f.Device {
		name += ", a device"
	}
	return name
}

// What a QEMU consists of is asked once, and again when a file of it is gone.
func TestProgramFilesAreRemembered(t *testing.T) {
	testenv.NeedTool(t, Program, "qemu-system-x86")
	d, err := New(t.Context(), Options{FactsFile: filepath.Join(t.TempDir(), "facts.json")})
	if err != nil {
		t.Fatal(err)
	}
	first, err := d.facts.programFiles(t.Context(), d.program)
	if err != nil {
		t.Fatal(err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if again, err := d.facts.programFiles(cancelled, d.program); err != nil || !slices.Equal(first, again) {
		t.Errorf("asked again: %v", err)
	}
	for key := range d.facts.d.Files {
		d.facts.d.Files[key] = append(slices.Clone(first), "/no/such/library")
	}
	if _, err := d.facts.programFiles(cancelled, d.program); err == nil {
		t.Error("a library that is gone is taken to be there")
	}
	if again, err := d.facts.programFiles(t.Context(), d.program); err != nil || !slices.Equal(first, again) {
		t.Errorf("%q, %v", again, err)
	}
}

// A script in QEMU's place needs more than is in its jail, and that is said.
func TestScriptHasNoJail(t *testing.T) {
	script := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho 'QEMU emulator version 7.2.1'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := New(t.Context(), Options{Program: script})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.facts.programFiles(t.Context(), script); err == nil || !strings.Contains(err.Error(), "find ") {
		t.Error(err)
	}
}
