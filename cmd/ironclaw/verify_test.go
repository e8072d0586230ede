package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
	"github.com/ironclaw-run/ironclaw/internal/verify"
)

// staticProgram builds this program as users have it: what attacks from inside a
// guest can have no dynamic linker, and a test binary with -race needs one.
func staticProgram(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "ironclaw")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", path, "./cmd/ironclaw")
	cmd.Dir = testenv.Root(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// verifyLimit is far above what the attacks take on two busy processors.
const verifyLimit = 6 * time.Minute

// runVerify runs `ironclaw verify --json` and reads its report.
func runVerify(t *testing.T, cmd *exec.Cmd) (*verify.Report, string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := new(verify.Report)
	if jerr := json.Unmarshal(stdout.Bytes(), r); jerr != nil {
		t.Fatalf("%v, %v: %s%s", err, jerr, &stdout, &stderr)
	}
	if err != nil {
		t.Errorf("%v: %s", err, &stderr)
	}
	return r, stderr.String()
}

// checkReport fails for each attack that was not held, and for too few of them. like is the
// command that made them.
func checkReport(t *testing.T, r *verify.Report, like *exec.Cmd) {
	t.Helper()
	list := exec.CommandContext(t.Context(), like.Path, append(like.Args[1:], "--list")...)
	list.Env, list.Dir, list.SysProcAttr = like.Env, like.Dir, like.SysProcAttr
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range r.Rows {
		if row.State != verify.Held {
			t.Errorf("%s: %s: %s: %s (without it: %s)", row.State, row.Group, row.Attack, row.Observed, row.Control)
		}
	}
	if want := bytes.Count(out, []byte("\n")); len(r.Rows) != want || want < 50 || r.Err() != nil {
		t.Errorf("%d of %d attacks, %v", len(r.Rows), want, r.Err())
	}
	t.Log(r.Summary())
}

// TestVerify attacks as whoever runs the tests, and leaves nothing.
func TestVerify(t *testing.T) {
	p := newPlace(t)
	program := staticProgram(t, t.TempDir())
	before := p.remains(t)
	ctx, cancel := context.WithTimeout(t.Context(), verifyLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "verify", "--json", "--group", "guest,link,jail,host")
	cmd.Env, cmd.Dir = p.env, p.dir
	r, _ := runVerify(t, cmd)
	checkReport(t, r, cmd)
	p.sameAs(t, before)
}

// TestVerifyAsNormalUser attacks as a user who is nobody, for those who run the
// tests as root. The link's attacks are the same for all users.
func TestVerifyAsNormalUser(t *testing.T) {
	testenv.NeedRoot(t)
	prepared(t)
	const nobody = 65534
	dir := t.TempDir()
	copyHome(t, dir, nobody)
	program := staticProgram(t, dir)
	tmp := filepath.Join(dir, "tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(tmp, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	for path := dir; path != "/" && path != "/tmp"; path = filepath.Dir(path) {
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), verifyLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "verify", "--json", "--group", "guest,jail", "--group", "host")
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "IRONCLAW_HOME=" + filepath.Join(dir, "home"), "HOME=/nonexistent", "TMPDIR=" + tmp}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	r, _ := runVerify(t, cmd)
	checkReport(t, r, cmd)
	if left, _ := os.ReadDir(tmp); len(left) > 0 {
		t.Errorf("left in TMPDIR: %v", left)
	}
}

// Without namespaces nothing goes to a network, and that is no pass: every attack
// that needs one says why it was not made, and the exit code is 125.
func TestVerifyWithoutNamespaces(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "setpriv", "util-linux")
	p := newPlace(t)
	program := staticProgram(t, t.TempDir())
	run := func(only string) (*verify.Report, int, string) {
		// Root without CAP_SYS_ADMIN may not make a network namespace.
		cmd := exec.CommandContext(t.Context(), "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin",
			program, "verify", "--group", "guest", "--only", only, "--json")
		cmd.Env, cmd.Dir = p.env, p.dir
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run()
		r := new(verify.Report)
		if err := json.Unmarshal(stdout.Bytes(), r); err != nil {
			t.Fatalf("%v: %s%s", err, &stdout, &stderr)
		}
		return r, cmd.ProcessState.ExitCode(), stderr.String()
	}
	r, code, stderr := run("the LAN")
	if code != 125 || !strings.Contains(stderr, "error: no network namespace can be made") || len(r.Rows) < 6 {
		t.Errorf("exit code %d, %d attacks: %s", code, len(r.Rows), stderr)
	}
	for _, row := range r.Rows {
		if row.State != verify.Failed {
			t.Errorf("%s: %s: %s", row.Attack, row.State, row.Observed)
		}
	}
	// What needs no network is made all the same.
	if r, code, stderr := run("root disk"); code != 0 || r.Count(verify.Held) < 2 {
		t.Errorf("exit code %d: %+v %s", code, r.Rows, stderr)
	}
}
