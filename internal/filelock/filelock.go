// Package filelock waits for locks between processes (flock(2)) with a context,
// and without looking again and again.
//
// The kernel gives a lock back when its holder ends, however it ends.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Lock takes the exclusive lock on the file at path, which is made if it is not
// there, and waits for it until ctx ends. unlock gives it back.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	unlock = func() { f.Close() }
	err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return unlock, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	got := make(chan error, 1)
	go func() { got <- flock(f, unix.LOCK_EX) }()
	select {
	case err := <-got:
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		return unlock, nil
	case <-ctx.Done():
		// flock(2) cannot be called off: when it has the lock, it is given back.
		go func() {
			<-got
			f.Close()
		}()
		return nil, fmt.Errorf("wait for the lock %s: %w", path, context.Cause(ctx))
	}
}

// flock tries again after EINTR, which is no answer.
func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Holds reports whether path still names the open file f. A lock on a file that
// has been removed or replaced meanwhile holds nothing.
func Holds(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}
