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
	"slices"
	"strings"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/atomicfile"
)

// BasePackages are those of an image for which none were named.
var BasePackages = []string{"ca-certificates", "curl", "git", "jq", "procps", "python3", "tzdata"}

// Apt is the package manager of the host. Errors are shown to the person as
// they are.
type Apt interface {
	// Update fetches the lists of packages.
	Update(ctx context.Context) error
	// Sources are the distribution's own archives, as lines of a sources.list.
	Sources(ctx context.Context) ([]string, error)
	// ReleaseTime is when the newest of them was made.
	ReleaseTime(ctx context.Context) (time.Time, error)
}

// BuildOptions are what an image is built from.
type BuildOptions struct {
	// Name of the image. Required; see ValidName.
	Name string
	// Packages to install with all that they depend on, without what they only
	// recommend. Default: BasePackages.
	Packages []string
	// Apt is the package manager of the host. Required.
	Apt Apt
	// Progress is told what is done, in plain words. Default: nobody.
	Progress func(step string)
}

// Build makes an image of the host's own distribution and release and gives it
// the name, which an older image loses. It needs neither root nor mounts. When
// it fails or ctx ends, the store is as before.
//
// It returns a *PrerequisiteError when the host lacks something, and an
// *UnknownPackageError.
func (s *Store) Build(ctx context.Context, opts BuildOptions) (*Image, error) {
	opts, err := opts.complete()
	if err != nil {
		return nil, fmt.Errorf("build image: %w", err)
	}
	img, err := s.build(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("build image %s: %w", opts.Name, explainFull(err, s.dir))
	}
	return img, nil
}

// packageName is what may be handed to apt: a name, of one architecture or one
// version perhaps, and nothing that apt takes for an option, a pattern or a
// file.
var packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]*(:[a-z0-9-]+)?(=[a-zA-Z0-9.+:~-]+)?$`)

// maxPackages and maxPackageName keep a mistake from becoming a command line.
const (
	maxPackages    = 2000
	maxPackageName = 200
)

func (o BuildOptions) complete() (BuildOptions, error) {
	if !ValidName(o.Name) {
		return o, fmt.Errorf("%.80q is not a name for an image: small letters, digits and '-' up to 63", o.Name)
	}
	if o.Apt == nil {
		return o, errors.New("no package manager was given")
	}
	if len(o.Packages) == 0 {
		o.Packages = BasePackages
	}
	if len(o.Packages) > maxPackages {
		return o, fmt.Errorf("%d packages, more than %d", len(o.Packages), maxPackages)
	}
	for _, p := range o.Packages {
		// "curl-" asks apt to remove curl.
		if len(p) > maxPackageName || !packageName.MatchString(p) || strings.HasSuffix(p, "-") {
			return o, fmt.Errorf("%.80q is not the name of a package", p)
		}
	}
	// The order in which packages were named must not change the image.
	o.Packages = slices.Compact(slices.Sorted(slices.Values(o.Packages)))
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	return o, nil
}

func (s *Store) build(ctx context.Context, opts BuildOptions) (_ *Image, err error) {
	mode, err := prerequisites(ctx)
	if err != nil {
		return nil, err
	}
	room, err := s.newWorkspace(ctx, mode)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, room.close(ctx)) }()

	b, err := s.prepare(ctx, mode, room, opts)
	if err != nil {
		return nil, err
	}
	archive, err := room.create("tree.tar")
	if err != nil {
		return nil, err
	}
	defer archive.Close()
	if err := b.run(ctx, &limitedWriter{w: archive, left: maxDisk}); err != nil {
		return nil, err
	}
	opts.Progress("making the disk of the image")
	disk, err := room.create("disk")
	if err != nil {
		return nil, err
	}
	defer disk.Close()
	img, err := makeDisk(ctx, archive, disk, b.epoch)
	if err != nil {
		return nil, err
	}
	img.Name, img.Created = opts.Name, time.Now().UTC().Truncate(time.Second)
	img.Recipe.Suite, img.Recipe.Packages, img.Recipe.Epoch = b.suite, opts.Packages, b.epoch.UTC()
	return img, s.install(ctx, img, disk.Name())
}

// prepare asks the host's package manager what to install from.
func (s *Store) prepare(ctx context.Context, mode string, room *workspace, opts BuildOptions) (*bootstrap, error) {
	opts.Progress("asking the distribution for its packages")
	if err := opts.Apt.Update(ctx); err != nil {
		return nil, err
	}
	sources, err := opts.Apt.Sources(ctx)
	if err != nil {
		return nil, err
	}
	epoch, err := opts.Apt.ReleaseTime(ctx)
	if err != nil {
		return nil, err
	}
	suite, err := mainSuite(sources)
	if err != nil {
		return nil, err
	}
	options := filepath.Join(room.tmp, "apt.conf")
	perm := os.FileMode(0o600)
	if mode == "unshare" {
		perm = 0o644 // read by another user; nothing in it that ours could not read of the host
	}
	if err := atomicfile.WriteFile(options, aptOptions(ctx), perm); err != nil {
		return nil, fmt.Errorf("write apt options: %w", err)
	}
	return &bootstrap{
		mode: mode, suite: suite, sources: sources, packages: opts.Packages, epoch: epoch,
		dir: room.tmp, options: options, lock: room.lock, progress: opts.Progress,
	}, nil
}

// mainSuite is the release among the lines of a sources.list, which has
// updates and security beside it.
func mainSuite(sources []string) (string, error) {
	var first string
	for _, line := range sources {
		if strings.ContainsAny(line, "\r\n") {
			return "", fmt.Errorf("source %.200q has more than one line", line)
		}
		_, rest, _ := strings.Cut(line, " ")
		if strings.HasPrefix(strings.TrimSpace(rest), "[") {
			_, rest, _ = strings.Cut(rest, "]")
		}
		fields := strings.Fields(rest)
		if len(fields) < 2 {
			return "", fmt.Errorf("source %.200q has no suite", line)
		}
		suite := fields[1]
		if first == "" {
			first = suite
		}
		if !strings.ContainsAny(suite, "-/") {
			return suite, nil
		}
	}
	if first == "" || strings.HasPrefix(first, "-") {
		return "", errors.New("the host's package manager has no archives of its distribution")
	}
	return first, nil
}

// hostOptions are those of the host's apt that say how to reach an archive.
// mmdebstrap's apt looks into the image for them, where there are none.
var hostOptions = regexp.MustCompile(`(?m)^Acquire::(https?::|ftp::|tor::|Proxy-Auto-Detect|ProxyAutoDetect|Check-Valid-Until|Check-Date|Retries|ForceIPv).*$`)

// aptOptions is a file of apt's for the build. Without apt-config there are
// none, and apt says itself what it cannot reach.
func aptOptions(ctx context.Context) []byte {
	var out bytes.Buffer
	cmd := command(ctx, "apt-config", "dump", "--no-empty", "--format", `%f "%v";%n`, "Acquire")
	cmd.Stdout = &limitedWriter{w: &out, left: maxKept}
	if _, err := exec.LookPath("apt-config"); err != nil || cmd.Run() != nil {
		out.Reset()
	}
	options := bytes.Join(hostOptions.FindAll(out.Bytes(), -1), []byte("\n"))
	// Passwords for archives, where we may read them.
	return append(options, "\nDir::Etc::netrc \"/etc/apt/auth.conf\";\nDir::Etc::netrcparts \"/etc/apt/auth.conf.d\";\n"...)
}

// makeDisk turns the archive into a disk and says what it is.
func makeDisk(ctx context.Context, archive, disk *os.File, epoch time.Time) (*Image, error) {
	if _, err := archive.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	t, err := scan(readerWithContext{ctx, archive}, epoch)
	if err != nil {
		return nil, err
	}
	edits, err := t.edits()
	if err != nil {
		return nil, err
	}
	if _, err := archive.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	if err := t.convert(ctx, archive, edits, disk); err != nil {
		return nil, err
	}
	packages, err := installedPackages(t.kept[statusFile])
	if err != nil {
		return nil, err
	}
	// A disk is never written again; sandboxes of any user may read it.
	if err := errors.Join(disk.Chmod(0o444), disk.Sync()); err != nil {
		return nil, fmt.Errorf("write disk: %w", err)
	}
	digest, err := hashFile(ctx, disk)
	if err != nil {
		return nil, fmt.Errorf("read disk: %w", err)
	}
	st, err := disk.Stat()
	if err != nil {
		return nil, fmt.Errorf("read disk: %w", err)
	}
	return &Image{
		Digest: digest, Size: st.Size(), Packages: packages,
		Recipe: Recipe{Distribution: distribution(t.kept[osReleaseFile])},
	}, nil
}

// limitedWriter ends a program that writes without end.
type limitedWriter struct {
	w    io.Writer
	left int64
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	if int64(len(p)) > l.left {
		return 0, fmt.Errorf("more output than expected")
	}
	l.left -= int64(len(p))
	return l.w.Write(p)
}
