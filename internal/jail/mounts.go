package jail

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// newRoot is covered by the jail's root while that is made. Every Linux system has it, and
// no file that a VMM needs lies below it.
const newRoot = "/proc"

// enclose makes a root that holds only files, and leaves the host's behind: nothing of
// it is mounted any more in this namespace. Then the root is made read-only as a whole.
//
// foreign says that another user than the files' own will read them.
func enclose(files []File, foreign bool) error {
	// What is mounted here must not appear on the host.
	switch err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err {
	case nil:
	case unix.EINVAL:
		return &notMountedError{}
	default:
		return fmt.Errorf("make the mounts private: %w", err)
	}
	if err := unix.Mount("jail", newRoot, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=1m,mode=0755"); err != nil {
		return fmt.Errorf("mount its tmpfs: %w", err)
	}
	made := map[string]bool{}
	for _, f := range files {
		if foreign && !f.Device {
			if err := readableByAll(f.Host); err != nil {
				return err
			}
		}
		if err := f.bind(made); err != nil {
			return err
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	// pivot_root(2): the old root ends up on top of the new one, and goes.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return protect(files)
}

// notMountedError says that the root directory is not the root of a mount: that there is a
// chroot(2) around this program, which pivot_root(2) cannot leave.
type notMountedError struct{}

func (*notMountedError) Error() string { return "the root directory is that of a chroot and no mount" }

// Hint is the remedy.
func (*notMountedError) Hint() string {
	return "mount the directory before the chroot: mount --bind DIR DIR"
}

// unreadableError is about a file that the VMM's user may not read.
type unreadableError struct{ path string }

func (e *unreadableError) Error() string { return "the VMM's user may not read " + e.path }

// Hint is the remedy.
func (e *unreadableError) Hint() string { return "chmod o+r " + e.path }

// readableByAll checks one file. That its directories let nobody in is no matter: a mount
// leads past them.
func readableByAll(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if st.Mode&0o004 == 0 {
		return &unreadableError{path}
	}
	return nil
}

// bind mounts the file at its place below newRoot.
func (f *File) bind(made map[string]bool) error {
	target := filepath.Join(newRoot, f.Inside) // cleaned: no way out
	if dir := filepath.Dir(target); !made[dir] {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make a place for %s: %w", f.Inside, err)
		}
		made[dir] = true
	}
	fd, err := unix.Open(target, unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_WRONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make a place for %s: %w", f.Inside, err)
	}
	unix.Close(fd)
	if err := unix.Mount(f.Host, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", f.Host, err)
	}
	return nil
}

// protect makes every mount read-only, without devices and setuid programs, but for the
// devices that were asked for.
func protect(files []File) error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &attr)
	if errors.Is(err, unix.ENOSYS) {
		return errors.New("this kernel has no mount_setattr: Linux 5.14 or later is needed")
	}
	if err != nil {
		return fmt.Errorf("make the root read-only: %w", err)
	}
	for _, f := range files {
		if !f.Device {
			continue
		}
		// A read-only mount does not keep a device from being written to.
		attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_NODEV}
		if err := unix.MountSetattr(unix.AT_FDCWD, f.Inside, 0, &attr); err != nil {
			return fmt.Errorf("let %s be a device: %w", f.Inside, err)
		}
	}
	return nil
}
