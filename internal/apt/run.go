package apt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/filelock"

	"golang.org/x/sys/unix"
)

// hooksConf takes the host's hooks on "update" away. They would run shell
// commands that clean or refresh the system's own state, which is not ours to
// touch. Clearing works only in a file, and only in one read after the host's.
const hooksConf = "#clear APT::Update;\n"

// maxOutput bounds what is kept of a command's output. The largest is that of
// indextargets, a kilobyte per source.
const maxOutput = 16 << 20

// waitDelay is how long a killed apt may hold its pipes open.
const waitDelay = 5 * time.Second

// prepare makes the private state and returns the options that point apt to it.
func (a *Apt) prepare() ([]string, error) {
	dir, err := filepath.Abs(a.dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	for _, sub := range []string{"lists/partial", "cache/archives/partial", "log"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, err
		}
	}
	conf, status := filepath.Join(dir, "hooks.conf"), filepath.Join(dir, "status")
	if err := ensureFile(conf, hooksConf); err != nil {
		return nil, err
	}
	if err := ensureFile(status, ""); err != nil {
		return nil, err
	}
	options := []string{"-c", conf}
	for _, o := range []string{
		"Dir::State=" + dir,
		"Dir::State::lists=" + filepath.Join(dir, "lists"),
		"Dir::State::status=" + status,
		"Dir::Cache=" + filepath.Join(dir, "cache"),
		"Dir::Cache::archives=" + filepath.Join(dir, "cache/archives"),
		"Dir::Cache::pkgcache=pkgcache.bin", // Docker's images turn it off, and lookups take seconds
		"Dir::Cache::srcpkgcache=srcpkgcache.bin",
		"Dir::Log=" + filepath.Join(dir, "log"),
		"APT::Sandbox::User=root", // user _apt cannot read a private directory
	} {
		options = append(options, "-o", o)
	}
	return options, nil
}

// ensureFile makes sure that path has the content, without ever showing half of
// it to another process.
func ensureFile(path, content string) error {
	if have, err := os.ReadFile(path); err == nil && string(have) == content {
		return nil
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(content)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// lock takes the directory's lock, which the returned function gives back.
func (a *Apt) lock(ctx context.Context) (func(), error) {
	if _, err := a.prepare(); err != nil {
		return nil, err
	}
	return filelock.Lock(ctx, filepath.Join(a.dir, ".lock"))
}

// run runs one of apt's programs on the private state.
func (a *Apt) run(ctx context.Context, program string, args ...string) (out, errOut string, err error) {
	return a.runIn(ctx, "", program, args...)
}

func (a *Apt) runIn(ctx context.Context, dir, program string, args ...string) (out, errOut string, err error) {
	options, err := a.prepare()
	if err != nil {
		return "", "", err
	}
	path, err := exec.LookPath(program)
	if err != nil {
		return "", "", fmt.Errorf("%w (this needs a Debian or Ubuntu host)", err)
	}
	cmd := exec.CommandContext(ctx, path, append(options, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var stdout, stderr limited
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// Its own group, because apt's fetchers are processes of their own.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = waitDelay
	err = cmd.Run()
	out, errOut = stdout.String(), stderr.String()
	switch {
	case ctx.Err() != nil:
		return out, errOut, context.Cause(ctx)
	case err != nil:
		return out, errOut, fmt.Errorf("%s: %w%s", program, err, tail(errOut))
	case stdout.full:
		return out, errOut, fmt.Errorf("%s: more than %d bytes of output", program, maxOutput)
	}
	return out, errOut, nil
}

// limited keeps the first maxOutput bytes written to it and drops the rest.
type limited struct {
	bytes.Buffer
	full bool
}

func (l *limited) Write(p []byte) (int, error) {
	if room := maxOutput - l.Len(); len(p) > room {
		l.full = true
		l.Buffer.Write(p[:room])
		return len(p), nil
	}
	return l.Buffer.Write(p)
}

// tail returns ": " and the last lines of a program's complaints, or nothing.
func tail(s string) string {
	const lines, bytesMax = 5, 1000
	all := strings.Split(strings.TrimSpace(s), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	t := strings.Join(all, "\n")
	if len(t) > bytesMax {
		t = "..." + strings.ToValidUTF8(t[len(t)-bytesMax:], "")
	}
	if t == "" {
		return ""
	}
	return ": " + t
}
