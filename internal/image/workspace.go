package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/atomicfile"
)

// workspace is where one build works. Its lock says that the build is alive:
// the next build removes those whose lock nobody holds.
type workspace struct {
	dir  string   // in the store
	tmp  string   // for mmdebstrap; not always in the store
	lock *os.File // held, by us and by mmdebstrap
}

const (
	buildPrefix   = "build-"
	outsidePrefix = "ironclaw-image-"
	// outsideFile in a workspace names the tmp directory outside of the store.
	outsideFile = "outside"
	// cleanTimeout bounds the removal of a workspace after a build.
	cleanTimeout = 2 * time.Minute
)

// newWorkspace removes what killed builds have left and makes a new workspace,
// with enough space for a build.
func (s *Store) newWorkspace(ctx context.Context, mode string) (_ *workspace, err error) {
	builds := filepath.Join(s.dir, "builds")
	if err := os.MkdirAll(builds, 0o755); err != nil {
		return nil, fmt.Errorf("make image store: %w", err)
	}
	if err := checkSpace(builds); err != nil {
		return nil, err
	}
	unlock, err := s.lock(ctx) // so that no other build sees it before its lock is held
	if err != nil {
		return nil, err
	}
	defer unlock()
	removeLeftovers(ctx, builds)
	w := &workspace{}
	if w.dir, err = os.MkdirTemp(builds, buildPrefix); err != nil {
		return nil, fmt.Errorf("make workspace: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close(ctx))
		}
	}()
	if w.lock, err = w.create("lock"); err != nil {
		return nil, err
	}
	if err := flock(w.lock, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("lock workspace: %w", err)
	}
	if w.tmp, err = w.makeTemp(mode); err != nil {
		return nil, fmt.Errorf("make workspace: %w", err)
	}
	return w, checkSpace(w.tmp)
}

// makeTemp makes the directory for mmdebstrap. In unshare mode it runs as
// other users, who cannot pass through a home directory of mode 0700, where
// stores usually are.
func (w *workspace) makeTemp(mode string) (string, error) {
	if mode != "unshare" {
		dir := filepath.Join(w.dir, "tmp")
		return dir, os.Mkdir(dir, 0o755)
	}
	if passable(w.dir) {
		// MkdirTemp has made it for us alone.
		if err := os.Chmod(w.dir, 0o711); err != nil {
			return "", err
		}
		dir := filepath.Join(w.dir, "tmp")
		if err := os.Mkdir(dir, 0o711); err != nil {
			return "", err
		}
		return dir, os.Chmod(dir, 0o711) // whatever the umask
	}
	// The name is written down before the directory exists, so that it is
	// found again whenever this process ends.
	dir := filepath.Join(outsideDir(), outsidePrefix+filepath.Base(w.dir))
	if err := atomicfile.WriteFile(filepath.Join(w.dir, outsideFile), []byte(dir), 0o600); err != nil {
		return "", err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o711)
}

// outsideDir is a directory for large temporary files that everybody may pass.
// /var/tmp is on a disk more often than /tmp.
func outsideDir() string {
	if st, err := os.Stat("/var/tmp"); err == nil && st.IsDir() && st.Mode()&os.ModeSticky != 0 {
		return "/var/tmp"
	}
	return os.TempDir()
}

// passable says whether any user can pass through the parents of dir.
func passable(dir string) bool {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return false
	}
	for dir != "/" {
		dir = filepath.Dir(dir)
		st, err := os.Stat(dir)
		if err != nil || st.Mode().Perm()&0o001 == 0 {
			return false
		}
	}
	return true
}

func (w *workspace) create(name string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(w.dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make workspace: %w", err)
	}
	return f, nil
}

// close removes the workspace, also after ctx has ended.
func (w *workspace) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
	defer cancel()
	err := removeWorkspace(ctx, w.dir)
	if w.lock != nil {
		w.lock.Close()
	}
	return err
}

func removeWorkspace(ctx context.Context, dir string) error {
	b, err := atomicfile.ReadFile(filepath.Join(dir, outsideFile), maxPath)
	if err == nil {
		outside := string(b)
		// Only what makeTemp can have written, and only if it is ours.
		if filepath.Base(outside) == outsidePrefix+filepath.Base(dir) && filepath.IsAbs(outside) && owned(outside) {
			if err := removeTree(ctx, outside); err != nil {
				return err
			}
		}
	}
	if err := removeTree(ctx, filepath.Join(dir, "tmp")); err != nil {
		return err
	}
	return removeTree(ctx, dir)
}

func owned(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && int(st.Uid) == os.Geteuid()
}

// removeLeftovers removes the workspaces of builds that are no more. The caller
// holds the lock of the store. What cannot be removed now, because a process of a
// killed build still writes there, costs space until the next build tries again;
// it is no reason not to build.
func removeLeftovers(ctx context.Context, builds string) {
	entries, err := os.ReadDir(builds)
	if err != nil {
		return
	}
	for _, e := range entries {
		dir := filepath.Join(builds, e.Name())
		if !strings.HasPrefix(e.Name(), buildPrefix) || !owned(dir) {
			continue
		}
		free, err := lockDisk(filepath.Join(dir, "lock"))
		if err != nil {
			continue // at work
		}
		_ = removeWorkspace(ctx, dir)
		free()
	}
}
