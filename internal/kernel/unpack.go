package kernel

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds for what a package of a kernel may hold. Ubuntu's largest has 6,000
// modules of 150 MB.
const (
	maxEntries  = 100_000
	maxUnpacked = 2 << 30
	maxFile     = maxImage
)

const vmlinuzName = "vmlinuz"

// What is kept of a package: since Debian 13, and where /usr is merged, the same
// paths may begin with usr/.
var (
	imagePath  = regexp.MustCompile(`^(?:usr/)?(?:boot/vmlinuz-([0-9][0-9A-Za-z.+~_-]*)|lib/modules/([0-9][0-9A-Za-z.+~_-]*)/vmlinuz)$`)
	modulePath = regexp.MustCompile(`^(?:usr/)?lib/modules/([0-9][0-9A-Za-z.+~_-]*)/(modules\.builtin[a-z.]*|[^\x00]+\.ko(?:\.xz|\.zst|\.gz)?)$`)
)

// unpacker puts what is needed of the packages of one kernel into a directory:
// vmlinuz, and lib/modules/<release>/.
type unpacker struct {
	root    *os.Root
	release string // of everything in it; empty before the first file
	image   bool
	entries int
	bytes   int64
}

// deb unpacks a package. dpkg-deb does the outer format; the tar inside is read
// here, so that nothing can be written but the files chosen.
func (u *unpacker) deb(ctx context.Context, deb string) (err error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = u.tar(ctx, out)
	if err != nil {
		out.Close() // ends dpkg-deb, should it still be writing
	}
	waitErr := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil && waitErr != nil && stderr.Len() > 0:
		return fmt.Errorf("%w: dpkg-deb: %s", err, bytes.TrimSpace(stderr.Bytes()))
	case err == nil && waitErr != nil:
		return fmt.Errorf("dpkg-deb: %w: %s", waitErr, bytes.TrimSpace(stderr.Bytes()))
	}
	return err
}

func (u *unpacker) tar(ctx context.Context, r io.Reader) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, io.LimitReader(r, maxUnpacked)) // padding
			return err
		}
		if err != nil {
			return fmt.Errorf("read the files in it: %w", err)
		}
		if u.entries++; u.entries > maxEntries {
			return fmt.Errorf("more than %d files in it", maxEntries)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if err := u.file(strings.TrimPrefix(path.Clean("/"+h.Name), "/"), h.Size, t); err != nil {
			return fmt.Errorf("unpack %s: %w", h.Name, err)
		}
	}
}

// file keeps a file of the package if it is of use.
func (u *unpacker) file(name string, size int64, r io.Reader) error {
	var release, to string
	if m := imagePath.FindStringSubmatch(name); m != nil {
		release, to = m[1]+m[2], vmlinuzName // one of them is empty
		u.image = true
	} else if m := modulePath.FindStringSubmatch(name); m != nil {
		release, to = m[1], path.Join("lib/modules", m[1], m[2])
	} else {
		return nil
	}
	if u.release == "" {
		u.release = release
	}
	if release != u.release {
		return fmt.Errorf("it is of kernel %s, the rest of %s", release, u.release)
	}
	if u.bytes += size; size > maxFile || u.bytes > maxUnpacked {
		return fmt.Errorf("too large (%d bytes)", size)
	}
	if err := u.root.MkdirAll(path.Dir(to), 0o755); err != nil {
		return err
	}
	f, err := u.root.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
