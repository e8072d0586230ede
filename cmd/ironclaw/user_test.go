package main

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// A normal user runs machines too: with kernel and image of their own, no
// capability and no device. Tests that run as a normal user show it all the
// time; this one is for those that run as root.
func TestRunAsNormalUser(t *testing.T) {
	testenv.NeedRoot(t)
	prepared(t)
	const nobody = 65534
	dir := t.TempDir()
	copyHome(t, dir, nobody)
	program := filepath.Join(dir, "ironclaw")
	if out, err := exec.CommandContext(t.Context(), "cp", os.Args[0], program).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Chmod(program, 0o755); err != nil {
		t.Fatal(err)
	}
	for path := dir; path != "/" && path != "/tmp"; path = filepath.Dir(path) {
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), program, args...)
		cmd.Dir = "/"
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "IRONCLAW_HOME=" + filepath.Join(dir, "home"), "HOME=/nonexistent"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run("run", "--", "sh", "-c", "id -un; echo fine"); err != nil || out != "agent\nfine\n" {
		t.Errorf("run: %q, %v", out, err)
	}
	if out, err := run("run", "--accel", "kvm", "true"); err == nil || !strings.Contains(out, "/dev/kvm") {
		// Where everybody may open /dev/kvm and it works, that is fine too.
		if err != nil {
			t.Errorf("run --accel kvm without /dev/kvm: %q, %v", out, err)
		}
	} else if !strings.Contains(out, "hint: ") {
		t.Errorf("no hint in %q", out)
	}
	if out, err := run("doctor"); err != nil {
		t.Errorf("doctor: %s, %v", out, err)
	}
}

// copyHome gives a user a directory with copies of the kernel and the images.
func copyHome(t *testing.T, dir string, uid int) {
	t.Helper()
	real := filepath.Join(dir, "real")
	if err := os.Mkdir(real, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := useHome(real, func(string, string) {}); err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(dir, "home")
	for _, name := range []string{"kernels", "images"} {
		src, err := filepath.EvalSymlinks(filepath.Join(real, "home", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(home, 0o755); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "cp", "-r", "--preserve=links,timestamps", src, filepath.Join(home, name)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	err := filepath.WalkDir(home, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, uid)
	})
	if err != nil {
		t.Fatal(err)
	}
}
