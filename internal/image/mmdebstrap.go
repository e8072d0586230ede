package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// stopGrace is how long mmdebstrap has to clean up after itself when a build
// is cancelled.
const stopGrace = 30 * time.Second

// bootstrap is one run of mmdebstrap.
type bootstrap struct {
	mode     string // root or unshare
	suite    string
	sources  []string
	packages []string
	epoch    time.Time
	dir      string // for its temporary files
	options  string // a file of apt's options
	lock     *os.File
	progress func(string)
}

// run writes the tree as a tar archive to out.
func (b *bootstrap) run(ctx context.Context, out io.Writer) error {
	cmd := command(ctx, "mmdebstrap", b.args()...)
	// In unshare mode its user may not be able to look into our directory.
	cmd.Dir = "/"
	cmd.Env = append(cmd.Env,
		"TMPDIR="+b.dir,
		"SOURCE_DATE_EPOCH="+strconv.FormatInt(b.epoch.Unix(), 10),
		// The order of sets in compiled Python modules hangs on it.
		"PYTHONHASHSEED=0",
	)
	// By stdin, because a command line is for everybody to read and a mirror
	// may have a password.
	cmd.Stdin = strings.NewReader(strings.Join(b.sources, "\n") + "\n")
	cmd.Stdout = out
	// If we are killed, it goes on for a while. As long as any of its programs
	// has the lock open, the workspace is not taken for a leftover.
	cmd.ExtraFiles = []*os.File{b.lock}
	said := &tail{line: b.step}
	cmd.Stderr = said
	err := cmd.Run()
	killGroup(cmd)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		return nil
	}
	if m := unknownPackage.FindStringSubmatch(said.String()); m != nil {
		return &UnknownPackageError{Package: m[1], Suite: b.suite}
	}
	return fmt.Errorf("mmdebstrap: %w:\n%s", err, said.lastLines(15, nil))
}

var unknownPackage = regexp.MustCompile(`(?m)^E: (?:Unable to locate package|Package) '?([a-z0-9][a-z0-9+.:-]*)'?(?:$| has no installation candidate)`)

func (b *bootstrap) args() []string {
	args := []string{
		"--mode=" + b.mode,
		// Essential packages, without apt: a guest has no network to fetch from.
		"--variant=essential",
		"--format=tar",
		"--include=" + strings.Join(b.packages, ","),
		"--aptopt=" + b.options,
		`--aptopt=Acquire::Languages "none"`,
	}
	for _, opt := range []string{
		"path-exclude=/usr/share/doc/*",
		"path-include=/usr/share/doc/*/copyright",
		"path-exclude=/usr/share/man/*",
		"path-exclude=/usr/share/info/*",
		"path-exclude=/usr/share/locale/*",
		"path-include=/usr/share/locale/locale.alias",
	} {
		args = append(args, "--dpkgopt="+opt)
	}
	return append(args, b.suite, "-", "-")
}

// step tells the person what mmdebstrap says it does.
func (b *bootstrap) step(line string) {
	list := strings.Join(b.packages, ", ")
	for said, step := range map[string]string{
		"running apt-get update":       "reading the lists of packages",
		"downloading packages":         "downloading packages",
		"installing essential":         "installing the base system into the image",
		"installing remaining":         "installing packages into the image (" + list + ")",
		"creating tarball":             "collecting the files of the image",
		"cleaning package lists":       "cleaning up the image",
		"extracting archives":          "unpacking the base system",
		"main() received signal":       "stopping",
		"run_progress() received sign": "stopping",
	} {
		if strings.HasPrefix(line, "I: "+said) {
			b.progress(step)
		}
	}
}

// command is a program in its own process group, which gets SIGTERM as a whole
// when ctx ends: mmdebstrap starts many others.
func command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		// As root mmdebstrap mounts /dev/shm, /sys and others of the host into the
		// image. In a mount namespace of its own they end with it, however we and
		// it end; in ours they would stay, and a removal of the store would reach
		// through them.
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = stopGrace
	cmd.Env = environment()
	return cmd
}

// killGroup ends what a command has left running.
func killGroup(cmd *exec.Cmd) {
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // ESRCH: nothing is left
	}
}

// environment is what of ours the maintainer scripts of packages may see: the
// result must not hang on the shell it was built from.
func environment() []string {
	env := []string{"LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for _, name := range []string{"HOME", "USER", "LOGNAME",
		"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// tail keeps the end of what a program says, and calls line for each line.
type tail struct {
	line func(string)
	buf  []byte
	part []byte // of a line
}

const maxTail = 64 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if len(t.buf) > 2*maxTail {
		t.buf = append(t.buf[:0], t.buf[len(t.buf)-maxTail:]...)
	}
	if t.line == nil {
		return len(p), nil
	}
	t.part = append(t.part, p...)
	for {
		line, rest, ok := bytes.Cut(t.part, []byte("\n"))
		if !ok {
			break
		}
		t.line(string(line))
		t.part = rest
	}
	if len(t.part) > maxTail {
		t.part = nil
	}
	return len(p), nil
}

func (t *tail) String() string { return string(t.buf) }

// lastLines is the last n lines, or the error when nothing was said.
func (t *tail) lastLines(n int, err error) string {
	lines := strings.Split(strings.TrimSpace(t.String()), "\n")
	text := strings.Join(lines[max(0, len(lines)-n):], "\n")
	if text == "" && err != nil {
		return err.Error()
	}
	return strings.ToValidUTF8(text, "?")
}

// removeTree removes dir and all in it, which in unshare mode belongs in part
// to other users. It does not leave the filesystem: a mount that a killed build
// has left in there may be the host's /dev.
func removeTree(ctx context.Context, dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	// Belonging to our own user, so only we can remove it; and first, because
	// the other users may remove only what lies below.
	var said tail
	rm := []string{"rm", "--recursive", "--force", "--one-file-system", "--", dir}
	cmd := command(ctx, rm[0], rm[1:]...)
	cmd.Dir = "/"
	if cmd.Run() == nil {
		return nil
	}
	if os.Geteuid() != 0 {
		// The private user in there owns the trees that mmdebstrap made.
		inner, _ := filepath.Glob(filepath.Join(dir, "mmdebstrap.*"))
		helper := append([]string{"--unshare-helper"}, rm[:len(rm)-1]...)
		cmd = command(ctx, "mmdebstrap", append(helper, inner...)...)
		cmd.Dir = "/"
		_ = cmd.Run() // it may not remove the top of a tree; the next one does
	}
	cmd = command(ctx, rm[0], rm[1:]...)
	cmd.Dir = "/"
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("remove %s: %s", dir, said.lastLines(3, err))
	}
	return nil
}
