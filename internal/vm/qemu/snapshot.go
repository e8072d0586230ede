package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/link/vsock"
	"github.com/ironclaw-run/ironclaw/internal/sparse"
	"github.com/ironclaw-run/ironclaw/internal/vm"
)

// snapshotCapabilities make QEMU leave shared memory out of a machine's state,
// on both sides (docs/devel/migration).
var snapshotCapabilities = map[string]any{"capabilities": []map[string]any{
	{"capability": "x-ignore-shared", "state": true},
}}

// maxState bounds a machine's state without its memory, in bytes. It takes some
// hundred KiB.
const maxState = 64 << 20

// openSnapshot makes the files that QEMU uses as memory and writes its state to.
// They have no name and are memory themselves: what is written to them costs no
// disk, a full disk cannot kill the machine, and only what matters of them is
// copied to one.
func (m *machine) openSnapshot() error {
	for _, f := range []struct {
		name string
		file **os.File
	}{{"memory", &m.saved.Memory}, {"state", &m.saved.State}} {
		fd, err := unix.MemfdCreate("ironclaw-"+f.name, unix.MFD_CLOEXEC)
		if err != nil {
			m.closeSnapshot()
			return fmt.Errorf("make a file in memory: %w", err)
		}
		*f.file = os.NewFile(uintptr(fd), f.name)
	}
	return nil
}

func (m *machine) closeSnapshot() {
	for _, f := range []*os.File{m.saved.Memory, m.saved.State} {
		if f != nil {
			f.Close()
		}
	}
}

// Save writes the machine to s and ends it.
func (m *machine) Save(ctx context.Context, s vm.Snapshot) error {
	if m.saved.Memory == nil {
		return errors.New("save the machine: it was not started for that")
	}
	defer m.Close()
	if err := m.save(ctx, s); err != nil {
		select {
		case <-m.process.Exited(): // which explains it
			<-m.done
			if m.err != nil {
				err = m.err
			}
		default:
		}
		return fmt.Errorf("save the machine: %w", err)
	}
	return nil
}

func (m *machine) save(ctx context.Context, s vm.Snapshot) error {
	if err := m.agentWaits(ctx); err != nil {
		return err
	}
	if err := m.settle(ctx); err != nil {
		return err
	}
	// An outgoing migration takes only a descriptor that was given by name.
	if err := m.qmp.giveFile(ctx.Done(), "state", m.saved.State); err != nil {
		return err
	}
	for _, c := range []qmpCommand{
		{"stop", nil},
		{"migrate-set-capabilities", snapshotCapabilities},
		{"migrate", map[string]string{"uri": "fd:state"}},
	} {
		if _, err := m.qmp.do(ctx.Done(), c.name, c.args); err != nil {
			return err
		}
	}
	if err := m.qmp.wait(ctx, &m.qmp.migrated); err != nil {
		return err
	}
	st, err := m.saved.Memory.Stat()
	if err != nil {
		return err
	}
	if _, err := sparse.Copy(ctx, s.Memory, m.saved.Memory, st.Size()); err != nil {
		return fmt.Errorf("copy the memory: %w", err)
	}
	if _, err := m.saved.State.Seek(0, io.SeekStart); err != nil {
		return err
	}
	n, err := io.Copy(s.State, io.LimitReader(m.saved.State, maxState+1))
	switch {
	case err != nil:
		return fmt.Errorf("copy the state: %w", err)
	case n == 0 || n > maxState:
		return fmt.Errorf("QEMU wrote a state of %d bytes", n)
	}
	return nil
}

// agentWaits waits until the guest agent waits for its first stream.
func (m *machine) agentWaits(ctx context.Context) error {
	if v, ok := m.link.(*vsock.Link); ok {
		select {
		case <-v.Called():
			return nil
		case <-m.process.Exited():
			return errQMPClosed
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return m.qmp.wait(ctx, &m.qmp.portOpen)
}

// A guest counts as settled when its processors have been idle but for a tenth
// of this time.
const (
	settleTime  = 100 * time.Millisecond
	settleBound = 3 * time.Second
)

// settle waits until the guest has nothing left to do: what it were in the middle
// of, every machine started from the snapshot would have to finish first. There
// is no event for that, so QEMU's use of the processor is looked at. A guest that
// never rests is saved all the same.
func (m *machine) settle(ctx context.Context) error {
	deadline := time.Now().Add(settleBound)
	before, err := cpuTime(m.info.PID)
	for err == nil && time.Now().Before(deadline) {
		select {
		case <-time.After(settleTime):
		case <-m.process.Exited():
			return errQMPClosed
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		var now time.Duration
		now, err = cpuTime(m.info.PID)
		if now-before < settleTime/10 {
			break
		}
		before = now
	}
	return err
}

// cpuTime is what a process has used of all processors (proc(5), schedstat of
// each of its threads).
func cpuTime(pid int) (time.Duration, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(files) == 0 {
		return 0, fmt.Errorf("read the processor time of QEMU: process %d has no threads to look at", pid)
	}
	var sum time.Duration
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		used, _, _ := strings.Cut(string(b), " ")
		ns, err := strconv.ParseInt(used, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the processor time of QEMU: %w", err)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}
