// Package state keeps a record of every sandbox that exists, so that whatever
// happens to the process that runs one, the next command finds what is left of
// it and cleans up.
//
// A record is written before the thing exists, and is held by a lock on a file
// of its own for as long as its owner lives: the kernel lets go of the lock when
// the owner ends, however it ends. [Store.Reconcile] removes what nobody holds.
// A process that a record names is ended only if its pid, start time and
// executable are all the recorded ones: a pid alone is soon somebody else's.
package state

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/atomicfile"
	"github.com/ironclaw-run/ironclaw/internal/filelock"
	"github.com/ironclaw-run/ironclaw/internal/layer"
	"github.com/ironclaw-run/ironclaw/internal/undo"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// ErrNameInUse is returned by Reserve for a name or id that another sandbox has.
var ErrNameInUse = errors.New("name in use")

// ErrNotFound is returned by Find for what no sandbox is called.
var ErrNotFound = errors.New("no such sandbox")

const (
	recordFile = "record.json"
	lockFile   = "lock"
	maxRecord  = 1 << 20
)

// Record describes one sandbox.
type Record struct {
	ID      string    `json:"id"`
	Name    string    `json:"name,omitempty"`
	Image   string    `json:"image"`
	Command []string  `json:"command,omitempty"`
	Created time.Time `json:"created"`
	Owner   Process   `json:"owner"`
	VMM     Process   `json:"vmm,omitzero"`
	// Layers is how the layers around the VMM stand, as the kernel told it when the
	// machine started; empty until then.
	Layers  layer.Report `json:"layers,omitempty"`
	Without []layer.Name `json:"without,omitempty"` // that a person chose to go without
}

// Process names a process beyond doubt.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // field 22 of /proc/<pid>/stat
	Exe   string `json:"exe"`
}

// Store is a directory of records. Safe for use by many processes.
type Store struct{ dir string }

// Open names the directory. It is made when the first record is.
func Open(dir string) *Store { return &Store{dir: dir} }

// Entry is a record that this process holds.
type Entry struct {
	store  *Store
	lock   *os.File
	record Record
}

// Reserve writes a record and holds it. ID and Name must be free, and valid by
// vm.ValidID.
func (s *Store) Reserve(r Record) (*Entry, error) {
	if !vm.ValidID(r.ID) || r.Name != "" && !vm.ValidID(r.Name) {
		return nil, fmt.Errorf("bad sandbox id %q or name %q", r.ID, r.Name)
	}
	unlock, err := s.lockAll()
	if err != nil {
		return nil, fmt.Errorf("reserve sandbox %s: %w", r.ID, err)
	}
	defer unlock()
	others, err := s.List()
	if err != nil {
		return nil, err
	}
	for _, o := range others {
		if o.ID == r.ID || r.Name != "" && (o.Name == r.Name || o.ID == r.Name) {
			return nil, fmt.Errorf("%w: sandbox %s has the name %q", ErrNameInUse, o.ID, r.Name)
		}
	}
	var stack undo.Stack
	defer stack.Run()
	dir := filepath.Join(s.dir, r.ID)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("reserve sandbox: %w", err)
	}
	stack.Add(func() { os.RemoveAll(dir) })
	lock, err := tryLock(filepath.Join(dir, lockFile))
	if err != nil {
		return nil, fmt.Errorf("reserve sandbox: %w", err)
	}
	stack.Add(func() { lock.Close() })
	e := &Entry{store: s, lock: lock, record: r}
	if e.record.Owner, err = Describe(os.Getpid()); err != nil {
		return nil, fmt.Errorf("reserve sandbox: %w", err)
	}
	if err := e.write(); err != nil {
		return nil, fmt.Errorf("reserve sandbox: %w", err)
	}
	stack.Release()
	return e, nil
}

// Update changes the record on disk.
func (e *Entry) Update(change func(*Record)) error {
	change(&e.record)
	if err := e.write(); err != nil {
		return fmt.Errorf("update record of sandbox %s: %w", e.record.ID, err)
	}
	return nil
}

func (e *Entry) write() error {
	b, err := json.MarshalIndent(e.record, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.WriteFile(filepath.Join(e.store.dir, e.record.ID, recordFile), append(b, '\n'), 0o600)
}

// Dir is the record's directory, which is this user's alone and goes with the record.
func (e *Entry) Dir() string { return filepath.Join(e.store.dir, e.record.ID) }

// Dir is the directory of a record.
func (s *Store) Dir(id string) string { return filepath.Join(s.dir, id) }

// Find returns the record of a sandbox by its id, its name, or the beginning of its id
// if no other begins so.
func (s *Store) Find(ref string) (Record, error) {
	records, err := s.List()
	if err != nil {
		return Record{}, err
	}
	var found []Record
	for _, r := range records {
		if r.ID == ref || r.Name == ref {
			return r, nil
		}
		if ref != "" && strings.HasPrefix(r.ID, ref) {
			found = append(found, r)
		}
	}
	switch len(found) {
	case 0:
		return Record{}, fmt.Errorf("%w: %.80q", ErrNotFound, ref)
	case 1:
		return found[0], nil
	}
	return Record{}, fmt.Errorf("%d sandboxes have an id that begins with %q", len(found), ref)
}

// Release removes the record: nothing of the sandbox exists any more. The record
// is gone at once: half of one would look like that of a process that has ended.
func (e *Entry) Release() error {
	gone := filepath.Join(e.store.dir, gonePrefix+e.record.ID)
	err := os.Rename(filepath.Join(e.store.dir, e.record.ID), gone)
	return errors.Join(err, os.RemoveAll(gone), e.lock.Close())
}

// gonePrefix begins the name of a record that was released. It is no id.
const gonePrefix = ".gone-"

// sweep removes released records whose owners ended before they could.
func (s *Store) sweep() error {
	left, err := filepath.Glob(filepath.Join(s.dir, gonePrefix+"*"))
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// List returns the records that can be read, held or not.
func (s *Store) List() ([]Record, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var records []Record
	for _, e := range entries {
		if !e.IsDir() || !vm.ValidID(e.Name()) {
			continue
		}
		b, err := atomicfile.ReadFile(filepath.Join(s.dir, e.Name(), recordFile), maxRecord)
		var r Record
		if err != nil || json.Unmarshal(b, &r) != nil || r.ID != e.Name() {
			r = Record{ID: e.Name()} // damaged, or its owner ended while writing it
		}
		records = append(records, r)
	}
	return records, nil
}

// Reconcile cleans up after owners that have ended, and returns their records.
// What it does not recognise it does not touch.
func (s *Store) Reconcile() ([]Record, error) {
	if _, err := os.Stat(s.dir); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	unlock, err := s.lockAll()
	if err != nil {
		return nil, fmt.Errorf("reconcile: %w", err)
	}
	defer unlock()
	records, err := s.List()
	if err != nil {
		return nil, err
	}
	var cleaned []Record
	errs := []error{s.sweep()}
	for _, r := range records {
		dir := filepath.Join(s.dir, r.ID)
		lock, err := tryLock(filepath.Join(dir, lockFile))
		if err != nil {
			if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
			continue // somebody holds it, or has just released it
		}
		if !filelock.Holds(lock, filepath.Join(dir, lockFile)) {
			lock.Close() // released between our opening and our locking it
			continue
		}
		errs = append(errs, r.VMM.end(), os.RemoveAll(dir))
		lock.Close()
		cleaned = append(cleaned, r)
	}
	return cleaned, errors.Join(errs...)
}

// lockAll keeps other processes from reserving or reconciling meanwhile. The
// lock is held for moments.
func (s *Store) lockAll() (unlock func(), err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	return filelock.Lock(context.Background(), filepath.Join(s.dir, ".lock"))
}

func tryLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Describe names a running process of this host.
func Describe(pid int) (Process, error) {
	start, err := startTime(pid)
	if err != nil {
		return Process{}, fmt.Errorf("describe process %d: %w", pid, err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return Process{}, fmt.Errorf("describe process %d: %w", pid, err)
	}
	return Process{PID: pid, Start: start, Exe: exe}, nil
}

// startTime is field 22 of /proc/<pid>/stat. The second field is the program's
// name in parentheses and may hold anything, so the count starts after the last.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	const after = 22 - 3 // fields[0] is field 3
	if len(fields) <= after {
		return 0, errors.New("short stat")
	}
	return strconv.ParseUint(fields[after], 10, 64)
}

// end kills the process if it is still the recorded one. The pidfd is opened
// before the check, so what is checked is what is killed.
func (p Process) end() error {
	if p.PID <= 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return nil // gone
	}
	defer unix.Close(fd)
	if now, err := Describe(p.PID); err != nil || now != p {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("end process %d: %w", p.PID, err)
	}
	// Readable when it has ended.
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000)
	if err != nil && err != unix.EINTR {
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	return nil
}
