package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// loadModules loads the modules of a directory in the order of their names,
// which is the order of their dependencies, and removes them.
func loadModules(dir string) error {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		if err := loadModule(name); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
		if err := os.Remove(name); err != nil { // the initramfs is memory
			return err
		}
	}
	return nil
}

func loadModule(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) { // built in, or loaded already
		return nil
	}
	return err
}
