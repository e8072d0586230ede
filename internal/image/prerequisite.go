package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// needBytes is what a build needs while it works: packages, the tree, the
// archive and the disk.
const needBytes = 1500 << 20

// CanBuild tells whether this host lets this user build images. What it lacks is
// a *PrerequisiteError.
func CanBuild(ctx context.Context) error {
	_, err := prerequisites(ctx)
	return err
}

// prerequisites finds out what this host lacks to build, and returns the mode
// that mmdebstrap has to run in.
func prerequisites(ctx context.Context) (mode string, err error) {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return "", missing("mmdebstrap", "mmdebstrap")
	}
	if os.Geteuid() == 0 {
		return "root", nil
	}
	for _, tool := range []string{"newuidmap", "newgidmap"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", missing(tool, "uidmap")
		}
	}
	who, err := user.Current()
	if err != nil {
		return "", fmt.Errorf("find out who runs this: %w", err)
	}
	for _, path := range []string{"/etc/subuid", "/etc/subgid"} {
		if !hasSubIDs(path, who) {
			return "", &PrerequisiteError{
				Cause:  fmt.Sprintf("%s has no range of 65536 ids for %s, which installing packages without root needs", path, who.Username),
				Remedy: "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 " + who.Username,
			}
		}
	}
	return "unshare", tryUnshare(ctx)
}

func missing(tool, pkg string) error {
	return &PrerequisiteError{
		Cause:  "the program " + tool + " is not installed",
		Remedy: "sudo apt-get install -y " + pkg,
	}
}

// hasSubIDs says whether a file like /etc/subuid has a range for the user that
// is large enough for a Debian system. mmdebstrap looks by name, and takes the
// first entry.
func hasSubIDs(path string, who *user.User) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.Split(strings.TrimSpace(sc.Text()), ":")
		if len(fields) == 3 && fields[0] == who.Username {
			n, err := strconv.ParseUint(fields[2], 10, 32)
			return err == nil && n >= 65536
		}
	}
	return false
}

// tryUnshare makes a user namespace once, since what forbids it has many
// names: a sysctl, AppArmor, a container.
func tryUnshare(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var out tail
	cmd := command(ctx, "mmdebstrap", "--unshare-helper", "true")
	cmd.Dir = "/"
	cmd.Stderr = &out
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return &PrerequisiteError{
			Cause:  fmt.Sprintf("this host does not let a normal user make a user namespace: %s", out.lastLines(3, err)),
			Remedy: userNamespaceRemedy(),
		}
	}
	return nil
}

func userNamespaceRemedy() string {
	for _, s := range []struct{ path, bad, remedy string }{
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=15000"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"},
	} {
		if b, err := os.ReadFile(s.path); err == nil && strings.TrimSpace(string(b)) == s.bad {
			return s.remedy
		}
	}
	return "build the image as root: it can be used by everybody afterwards"
}

// checkSpace says so early when a disk is too full to build on.
func checkSpace(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look at the free space of %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * int64(st.Bsize); free < needBytes {
		return &PrerequisiteError{
			Cause:  fmt.Sprintf("%s has %d MB free, building an image needs %d MB", dir, free>>20, needBytes>>20),
			Remedy: "free some space there, or keep the images elsewhere",
		}
	}
	return nil
}

// explainFull turns "no space left" into something to act on.
func explainFull(err error, dir string) error {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) &&
		!strings.Contains(err.Error(), "No space left on device") {
		return err
	}
	return &PrerequisiteError{
		Cause:  fmt.Sprintf("the disk of %s is full: %v", dir, err),
		Remedy: fmt.Sprintf("free some space there: building an image needs %d MB", needBytes>>20),
	}
}
