package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	rootDisk = "/dev/vda"

	lowerDir   = "/lower"   // the disk, read-only
	overlayDir = "/overlay" // a tmpfs: what is written
	newRoot    = "/newroot" // both together
)

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func (m mount) do() error {
	if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
	}
	return nil
}

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		if err := m.do(); err != nil {
			return err
		}
	}
	return nil
}

func mountKernelFiles() error {
	return mountAll([]mount{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	})
}

// mountLower mounts the root disk. The device is read-only and the image was
// written by the host, so there is no journal to replay.
func mountLower() error {
	fstype, err := detect(rootDisk)
	if err != nil {
		return err
	}
	return mount{rootDisk, lowerDir, fstype, unix.MS_RDONLY, ""}.do()
}

// detect tells a file system by its magic number.
func detect(device string) (string, error) {
	f, err := os.Open(device)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var b [2048]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return "", err
	}
	switch {
	case binary.LittleEndian.Uint16(b[0x438:]) == 0xEF53:
		return "ext4", nil
	case string(b[:4]) == "hsqs":
		return "squashfs", nil
	case binary.LittleEndian.Uint32(b[1024:]) == 0xE0F5E1E2:
		return "erofs", nil
	}
	return "", errors.New("it is neither ext4 nor squashfs nor erofs")
}

// mountOverlay makes the new root. The tmpfs gets its final size at hello,
// through the descriptor kept here.
//
// The layers' own mounts are then taken away: overlayfs holds private ones, and
// so no path leads from the new root to the raw layers.
func (b *boot) mountOverlay() error {
	// Inodes are charged to the cgroup of who makes them; a count of them
	// would only be a second, worse limit.
	err := mount{"overlay", overlayDir, "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=50%,nr_inodes=0"}.do()
	if err != nil {
		return err
	}
	for _, dir := range []string{"/upper", "/work"} {
		if err := os.Mkdir(overlayDir+dir, 0o755); err != nil {
			return err
		}
	}
	b.overlay, err = unix.Open(overlayDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", overlayDir, err)
	}
	// nodev: /dev is devtmpfs; device nodes that an image brings are not for use.
	// volatile: the upper layer is memory, there is nothing to sync.
	err = mount{"overlay", newRoot, "overlay", unix.MS_NODEV,
		"lowerdir=" + lowerDir + ",upperdir=" + overlayDir + "/upper,workdir=" + overlayDir + "/work,redirect_dir=on,volatile"}.do()
	if err != nil {
		return err
	}
	for _, dir := range []string{lowerDir, overlayDir} {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("detach %s: %w", dir, err)
		}
	}
	return nil
}

// mountRootFiles fills the new root with what no image has.
func mountRootFiles() error {
	for dir, mode := range map[string]os.FileMode{
		"/proc": 0o555, "/sys": 0o555, "/dev": 0o755, "/run": 0o755, "/tmp": 0o777 | os.ModeSticky,
	} {
		if err := ensureDir(newRoot+dir, mode); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := unix.Mount(dir, newRoot+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	for _, dir := range []string{"/dev/pts", "/dev/shm"} {
		if err := ensureDir(newRoot+dir, 0o755); err != nil {
			return err
		}
	}
	err := mountAll([]mount{
		{"run", newRoot + "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"devpts", newRoot + "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"},
		{"shm", newRoot + "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	})
	if err != nil {
		return err
	}
	return linkDev(newRoot + "/dev")
}

func linkDev(dev string) error {
	for _, l := range [][2]string{
		{"/proc/self/fd", "/fd"},
		{"/proc/self/fd/0", "/stdin"},
		{"/proc/self/fd/1", "/stdout"},
		{"/proc/self/fd/2", "/stderr"},
	} {
		if err := os.Symlink(l[0], dev+l[1]); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// ensureDir makes name a directory of this mode. A link in its place would be
// resolved against the initramfs, so whatever is no directory goes.
func ensureDir(name string, mode os.FileMode) error {
	if st, err := os.Lstat(name); err == nil && !st.IsDir() {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	if err := os.Mkdir(name, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return os.Chmod(name, mode)
}

// switchRoot leaves the initramfs. It is the namespace's first mount and cannot
// be pivoted away, so it is emptied and covered.
func (b *boot) switchRoot() error {
	for _, name := range []string{"/init", "/modules", "/dev", "/proc", "/sys", "/run", lowerDir, overlayDir} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			// A directory with something in it costs a page of memory, no more.
			if !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
				return err
			}
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	b.agent.Times.Root = sinceBoot()
	return nil
}

func mountCgroups() error {
	err := mount{"cgroup2", cgroupRoot, "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""}.do()
	if err != nil {
		return err
	}
	return writeControl(cgroupRoot+"/cgroup.subtree_control", "+memory +pids +cpu")
}
