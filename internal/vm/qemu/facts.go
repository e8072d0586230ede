package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/ironclaw-run/ironclaw/internal/atomicfile"
)

// facts are what takes time to find out and holds until the host reboots or
// QEMU is replaced. They are kept in a file; one that is missing, damaged or of
// another boot counts as empty, and not being able to write it costs only time.
type facts struct {
	path string

	mu sync.Mutex // guards d
	d  factsData
}

type factsData struct {
	BootID   string              `json:"bootID"`
	TSCKHz   int                 `json:"tscKHz,omitempty"`
	Versions map[string]string   `json:"versions,omitempty"` // of QEMU, by fingerprint
	Files    map[string][]string `json:"files,omitempty"`    // that QEMU consists of, by fingerprint
	KVM      map[string]Verdict  `json:"kvm,omitempty"`      // by what was booted
}

// Verdict says whether KVM runs machines here.
type Verdict struct {
	Works  bool   `json:"works"`
	Reason string `json:"reason"` // a sentence's end: "a machine booted with it in 0.3 s"
}

const maxFacts = 1 << 20

func loadFacts(path string) *facts {
	f := &facts{path: path}
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	id := strings.TrimSpace(string(bootID))
	if err != nil || id == "" {
		f.path = "" // without it nothing may be remembered
	}
	if f.path != "" {
		b, err := atomicfile.ReadFile(f.path, maxFacts)
		if err != nil || json.Unmarshal(b, &f.d) != nil || f.d.BootID != id {
			f.d = factsData{}
		}
	}
	f.d.BootID = id
	return f
}

// update changes the facts and keeps them.
func (f *facts) update(change func(*factsData)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.d)
	if f.path == "" {
		return
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent("", "  ")
	if enc.Encode(f.d) != nil || os.MkdirAll(filepath.Dir(f.path), 0o700) != nil {
		return
	}
	_ = atomicfile.WriteFile(f.path, b.Bytes(), 0o600) // only a cache
}

func (f *facts) tscKHz() int {
	f.mu.Lock()
	khz := f.d.TSCKHz
	f.mu.Unlock()
	if khz == 0 {
		khz = measureTSC()
		f.update(func(d *factsData) { d.TSCKHz = khz })
	}
	return khz
}

func (f *facts) version(ctx context.Context, path string) (string, error) {
	key, err := fingerprint(path)
	if err != nil {
		return "", err
	}
	f.mu.Lock()
	v := f.d.Versions[key]
	f.mu.Unlock()
	if v != "" {
		return v, nil
	}
	if v, err = queryVersion(ctx, path); err != nil {
		return "", err
	}
	f.update(func(d *factsData) { d.Versions = map[string]string{key: v} })
	return v, nil
}

// fingerprint changes when a file is replaced or written.
func fingerprint(path string) (string, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	var inode uint64
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		inode = s.Ino
	}
	return fmt.Sprintf("%s:%d:%d:%d", path, st.Size(), st.ModTime().UnixNano(), inode), nil
}
