// Package template keeps machines that were booted once: the memory and the
// state of the devices of each, to be cloned copy-on-write.
//
// Start with [Open], then [Store.Get], and [Store.Make] if there is none. The
// package stores files; what is in them is the business of who makes and loads
// them. What it guarantees:
//
//   - a template is whole or not there: it is made aside, checksummed, synced to
//     the disk and renamed into place, its manifest written last;
//   - Get returns only files whose checksums were seen to match since the host
//     booted, made from exactly the inputs asked for, and which nobody else can
//     write: other owners, links, devices and loose modes are refused;
//   - what a killed maker leaves behind is never returned, and the next Make or
//     Prune removes it. The kernel says whether a maker lives (flock), not its pid
//     or its age;
//   - a template that is removed stays whole for those who have it open.
//
// A template holds secrets of a booted kernel: its files are their owner's alone.
package template

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// DefaultLimit is how many bytes on disk all templates of a store may take
// together, if Open is not told.
const DefaultLimit = 4 << 30

// ErrNotFound says that there is no such template. Store.Get and Store.Remove
// return it.
var ErrNotFound = errors.New("no such template")

// DamagedError says that a file of the store is not what it should be.
type DamagedError struct {
	Path string // the file or directory
	What string // what is wrong with it
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("template file %s is damaged: %s", e.Path, e.What)
}

func damaged(path, format string, args ...any) error {
	return &DamagedError{Path: path, What: fmt.Sprintf(format, args...)}
}

func isDamaged(err error) bool {
	_, ok := errors.AsType[*DamagedError](err)
	return ok
}

// Inputs names everything a template depends on, such as "kernel":
// "sha256:...". Names and values are UTF-8.
type Inputs map[string]string

const (
	formatVersion = 1
	idDigits      = 32
	minPrefix     = 4
)

// ID is the name of the template of these inputs, 32 hex digits. Another format
// of the store or another effective user gives another.
func (in Inputs) ID() string {
	h := sha256.New()
	// Lengths before strings: no two inputs are written the same.
	number := func(n int) { h.Write(binary.BigEndian.AppendUint64(nil, uint64(n))) }
	text := func(s string) { number(len(s)); h.Write([]byte(s)) }
	text("ironclaw template")
	number(formatVersion)
	number(os.Geteuid())
	number(len(in))
	for _, name := range slices.Sorted(maps.Keys(in)) {
		text(name)
		text(in[name])
	}
	return hex.EncodeToString(h.Sum(nil))[:idDigits]
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

func validID(s string) bool { return len(s) == idDigits && isHex(s) }

// Template is a machine that can be cloned.
type Template struct {
	ID     string
	Inputs Inputs
	// Created is when it was made, Used when Get or Make last returned it. Both
	// are what the host's clock said.
	Created, Used time.Time
	// Memory and State are open for reading; nil in the results of List.
	// They stay readable when the template is removed. Their modes let the owner
	// open them for writing through /proc/self/fd; who does, maps them private.
	Memory, State *os.File
	// MemorySize is the length of Memory in bytes, holes included.
	MemorySize int64
	// DiskSize is the bytes that all files of the template take on the disk.
	DiskSize int64
	// Damaged says what is wrong with it; only in results of List, where it is
	// "" for a good one.
	Damaged string

	close sync.Once
}

// Close closes Memory and State. Calls after the first do nothing, and it is safe
// for concurrent use.
func (t *Template) Close() error {
	var err error
	t.close.Do(func() {
		for _, f := range []*os.File{t.Memory, t.State} {
			if f != nil {
				err = errors.Join(err, f.Close())
			}
		}
	})
	return err
}
