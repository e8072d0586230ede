// Package verifyonce spares the second reading of large files.
//
// Files checked since the host booted are known by their size, times and inode:
// a write changes their mtime or ctime, and nobody can set a ctime, a replacement
// is another inode, and a boot of the host (after which a disk may hold anything)
// another boot id. What has been checked is written down in a memo, a small file
// beside them. Start with [Files].
//
// A write through a shared mapping may leave the times alone for a while; files
// that are verified this way are mapped private.
package verifyonce

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/atomicfile"
)

const (
	// maxMemo bounds a memo: a file in it takes less than 200 bytes.
	maxMemo = 16 << 10
	// tick is longer than the kernel's clock for file times stands still: 10 ms
	// with CONFIG_HZ=100.
	tick = 20 * time.Millisecond
)

// ChangedError says that a file was not the same before and after its check.
type ChangedError struct{ Path string }

func (e *ChangedError) Error() string { return e.Path + " changed while it was read" }

type identity struct {
	Size   int64  `json:"size"`
	Mtime  int64  `json:"mtime_ns"`
	Ctime  int64  `json:"ctime_ns"`
	Inode  uint64 `json:"inode"`
	Device uint64 `json:"device"`
	owner  uint32 // the owner has the say about the file and so about its memo
}

type record struct {
	Boot  string     `json:"boot_id"`
	Files []identity `json:"files"`
}

// Files runs check, which reads files, unless the file memo says that it passed
// since the host booted and that these files, in this order, are the same since.
// It returns the error of check, *ChangedError if a file changed meanwhile, or
// that ctx ended before the check began.
//
// A memo that cannot be read or written, or that somebody could have written who
// has no say about the files, costs only time; so does memo "", which remembers
// nothing. For files written just now it waits, up to 20 ms: a second write in the
// same tick of the kernel's clock would leave the times as they are.
//
// Safe for concurrent use by many processes.
func Files(ctx context.Context, memo string, check func(context.Context) error, files ...*os.File) error {
	boot := bootID()
	before, err := identify(files)
	if err != nil {
		return err
	}
	if memo != "" && boot != "" && known(memo, boot, before) {
		return nil
	}
	if young(before) {
		select {
		case <-time.After(tick):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if before, err = identify(files); err != nil {
			return err
		}
	}
	settled := !young(before)
	if err := check(ctx); err != nil {
		return err
	}
	after, err := identify(files)
	if err != nil {
		return err
	}
	for i := range files {
		if before[i] != after[i] {
			return &ChangedError{Path: files[i].Name()}
		}
	}
	if memo != "" && boot != "" && settled {
		if b, err := json.Marshal(record{Boot: boot, Files: before}); err == nil {
			_ = atomicfile.WriteFile(memo, append(b, '\n'), 0o644) // only costs time the next time
		}
	}
	return nil
}

func identify(files []*os.File) ([]identity, error) {
	ids := make([]identity, len(files))
	for i, f := range files {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return nil, &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
		}
		ids[i] = identity{
			Size: st.Size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano(),
			Inode: st.Ino, Device: uint64(st.Dev), owner: st.Uid,
		}
	}
	return ids, nil
}

// young says whether a write now might get the ctime that a file has.
func young(ids []identity) bool {
	now := time.Now().UnixNano()
	return slices.ContainsFunc(ids, func(id identity) bool {
		age := time.Duration(now - id.Ctime)
		return -tick < age && age < tick
	})
}

// known says whether the memo speaks of these files and may be believed.
func known(memo, boot string, ids []identity) bool {
	// A memo that is a fifo must not stop us.
	f, err := os.OpenFile(memo, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o022 != 0 {
		return false
	}
	others := slices.ContainsFunc(ids, func(id identity) bool { return id.owner != st.Uid })
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() && others {
		return false
	}
	b, err := io.ReadAll(io.LimitReader(f, maxMemo+1))
	if err != nil || len(b) > maxMemo {
		return false
	}
	var r record
	if json.Unmarshal(b, &r) != nil || r.Boot != boot {
		return false
	}
	return slices.EqualFunc(r.Files, ids, func(a, b identity) bool {
		a.owner = b.owner // not recorded
		return a == b
	})
}

// bootID is "" where the kernel does not tell: then nothing is remembered.
func bootID() string {
	b, err := atomicfile.ReadFile("/proc/sys/kernel/random/boot_id", 128)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
