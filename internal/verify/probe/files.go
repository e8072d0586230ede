package probe

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var fileAttacks = map[string]attack{
	"file.read":   fileRead,
	"file.list":   fileList,
	"file.create": fileCreate,
	"file.change": fileChange,
	"file.has":    fileHas,
	"file.plant":  filePlant,
}

// fileRead PATH...: opens files and directories for reading.
func fileRead(args []string) (Outcome, string) {
	return several(args, func(name string) error {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	})
}

// fileList DIR NAME...: lists a directory; it works if there is anything in it
// beside those names.
func fileList(args []string) (Outcome, string) {
	if len(args) == 0 {
		return Unknown, "no directory"
	}
	entries, err := os.ReadDir(args[0])
	if err != nil {
		return tried("list "+args[0], err)
	}
	var more []string
	for _, e := range entries {
		if !slices.Contains(args[1:], e.Name()) {
			more = append(more, e.Name())
		}
	}
	if len(more) > 0 {
		return Worked, fmt.Sprintf("%s has %s", args[0], strings.Join(more, ", "))
	}
	return Refused, fmt.Sprintf("%s has the %d names that were expected or fewer", args[0], len(args)-1)
}

// fileCreate DIR...: creates a file, and removes it.
func fileCreate(args []string) (Outcome, string) {
	return several(args, func(dir string) error {
		f, err := os.CreateTemp(dir, ".probe-")
		if err != nil {
			return err
		}
		return errors.Join(f.Close(), os.Remove(f.Name()))
	})
}

// fileChange PATH...: gets hold of a file for writing by any of the ways there
// are. Nothing of the file is changed where one works.
func fileChange(args []string) (Outcome, string) { return several(args, change) }

func change(name string) error {
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return err
	}
	var errs []error
	for _, way := range []func() error{
		func() error { return openClose(name, unix.O_RDWR) },
		func() error { return openClose(name, unix.O_WRONLY|unix.O_APPEND) },
		func() error { return unix.Chmod(name, st.Mode&0o7777) },
		func() error { return unix.Chown(name, int(st.Uid), int(st.Gid)) },
		func() error { return renameBack(name) },
		func() error { return linkBack(name) },
		func() error {
			return unix.Mount("", filepath.Dir(name), "", unix.MS_REMOUNT|unix.MS_BIND, "")
		},
		func() error { return bindOver(name) },
	} {
		err := way()
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errs[0]
}

func openClose(name string, flags int) error {
	fd, err := unix.Open(name, flags|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func renameBack(name string) error {
	if err := os.Rename(name, name+".probe"); err != nil {
		return err
	}
	return os.Rename(name+".probe", name)
}

func linkBack(name string) error {
	if err := os.Link(name, name+".probe"); err != nil {
		return err
	}
	return os.Remove(name + ".probe")
}

// bindOver binds a file over itself, which a remount could then make writable.
func bindOver(name string) error {
	if err := unix.Mount(name, name, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	defer unix.Unmount(name, unix.MNT_DETACH)
	return unix.Mount("", name, "", unix.MS_REMOUNT|unix.MS_BIND, "")
}

// filePlant TEXT PATH...: writes files.
func filePlant(args []string) (Outcome, string) {
	if len(args) < 2 {
		return Unknown, "no text or no path"
	}
	return several(args[1:], func(name string) error { return os.WriteFile(name, []byte(args[0]), 0o666) })
}

// fileHas TEXT PATH...: looks for a text in files. A pattern may name many.
func fileHas(args []string) (Outcome, string) {
	if len(args) < 2 {
		return Unknown, "no text or no path"
	}
	return several(args[1:], func(pattern string) error {
		names, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, name := range names {
			f, err := os.Open(name)
			if err != nil {
				continue
			}
			b := make([]byte, 4096)
			n, _ := f.Read(b)
			f.Close()
			if strings.Contains(string(b[:n]), args[0]) {
				return nil
			}
		}
		return errors.New("not there")
	})
}
