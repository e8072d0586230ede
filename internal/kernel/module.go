package kernel

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"
)

const (
	maxModule  = 64 << 20 // of a module, uncompressed; the largest of Debian's has 10 MB
	maxModinfo = 1 << 20
	maxBuiltin = 4 << 20
)

// module is a module read from its file.
type module struct {
	name     string
	data     []byte // uncompressed
	depends  []string
	softdeps []string // to be loaded before it, if they exist
}

// moduleName returns the name in the one spelling the kernel uses.
func moduleName(name string) string { return strings.ReplaceAll(name, "-", "_") }

// moduleSuffixes are how the name of a module's file may end.
var moduleSuffixes = []string{".ko", ".ko.xz", ".ko.zst", ".ko.gz"}

// moduleTree is the directory of a kernel's modules. Packages carry no
// modules.dep (depmod makes it when they are installed): who needs whom is read
// from the modules themselves.
type moduleTree struct {
	dir     string
	release string
	files   map[string]string // path by name
	builtin map[string]bool
}

func readModuleTree(dir, release string) (*moduleTree, error) {
	t := &moduleTree{dir: dir, release: release, files: make(map[string]string), builtin: make(map[string]bool)}
	if err := t.readBuiltin(); err != nil {
		return nil, err
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		for _, suffix := range moduleSuffixes {
			name, ok := strings.CutSuffix(d.Name(), suffix)
			if !ok {
				continue
			}
			name = moduleName(name)
			// As depmod does it: what is in updates/ replaces the kernel's own.
			if t.files[name] == "" || strings.HasPrefix(path, filepath.Join(dir, "updates")+"/") {
				t.files[name] = path
			}
		}
		return nil
	})
	return t, err
}

// readBuiltin reads which modules are part of the kernel, if it is said at all.
func (t *moduleTree) readBuiltin() error {
	f, err := os.Open(filepath.Join(t.dir, "modules.builtin"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(io.LimitReader(f, maxBuiltin))
	for s.Scan() {
		name, ok := strings.CutSuffix(filepath.Base(strings.TrimSpace(s.Text())), ".ko")
		if ok {
			t.builtin[moduleName(name)] = true
		}
	}
	return s.Err()
}

// order returns the modules wanted, and those they need, such that each comes
// after what it needs. Of those built into the kernel there is nothing to return.
func (t *moduleTree) order(want []string) ([]*module, error) {
	o := &ordering{tree: t, state: make(map[string]visit)}
	for _, name := range want {
		if err := o.add(moduleName(name), nil); err != nil {
			return nil, fmt.Errorf("module %s: %w", name, err)
		}
	}
	return o.loaded, nil
}

type visit uint8

const (
	unseen visit = iota
	begun
	done
)

type ordering struct {
	tree   *moduleTree
	state  map[string]visit
	loaded []*module
}

// add puts a module after all it needs; path is who needs it.
func (o *ordering) add(name string, path []string) error {
	if o.tree.builtin[name] || o.state[name] == done {
		return nil
	}
	path = append(slices.Clone(path), name)
	if o.state[name] == begun {
		return fmt.Errorf("modules need each other: %s", strings.Join(path, " -> "))
	}
	file, ok := o.tree.files[name]
	if !ok {
		return fmt.Errorf("%s: neither in %s nor built into the kernel", strings.Join(path, " -> "), o.tree.dir)
	}
	m, err := readModule(file, name, o.tree.release)
	if err != nil {
		return err
	}
	o.state[name] = begun
	for _, soft := range m.softdeps {
		if soft = o.tree.soft(soft); soft != "" && o.state[soft] == unseen {
			if err := o.add(soft, path); err != nil {
				return err
			}
		}
	}
	for _, d := range m.depends {
		if err := o.add(d, path); err != nil {
			return err
		}
	}
	o.state[name] = done
	o.loaded = append(o.loaded, m)
	return nil
}

// soft returns the module that serves for a soft dependency, which may be an
// alias, such as "crc32c" for crc32c_generic. Without it the module asks for it
// by modprobe, which the guest does not have. It may be that none is there.
func (t *moduleTree) soft(name string) string {
	for _, n := range []string{name, name + "_generic"} {
		if t.builtin[n] {
			return ""
		}
		if t.files[n] != "" {
			return n
		}
	}
	return ""
}

// readModule reads a module's file and what it says of itself.
func readModule(path, name, release string) (*module, error) {
	data, err := readModuleFile(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	m := &module{name: name, data: data}
	info, err := modinfo(data)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		switch key {
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					m.depends = append(m.depends, moduleName(d))
				}
			}
		case "softdep":
			m.softdeps = append(m.softdeps, softdepsBefore(value)...)
		case "name":
			if moduleName(value) != name {
				return nil, fmt.Errorf("read %s: it says it is module %q", path, value)
			}
		case "vermagic":
			if of, _, _ := strings.Cut(value, " "); of != release {
				return nil, fmt.Errorf("read %s: it is for kernel %s, not %s", path, of, release)
			}
		}
	}
	return m, nil
}

// softdepsBefore returns a and b of "pre: a b post: c".
func softdepsBefore(value string) []string {
	var names []string
	before := false
	for word := range strings.FieldsSeq(value) {
		switch {
		case strings.HasSuffix(word, ":"):
			before = word == "pre:"
		case before:
			names = append(names, moduleName(word))
		}
	}
	return names
}

// modinfo returns a module's strings about itself, each ended by a zero byte.
func modinfo(data []byte) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("not a module: %w", err)
	}
	s := f.Section(".modinfo")
	if s == nil || s.Type == elf.SHT_NOBITS {
		return nil, errors.New("not a module: it says nothing of itself (no .modinfo)")
	}
	if s.Size > maxModinfo {
		return nil, fmt.Errorf("not a module: %d bytes of .modinfo", s.Size)
	}
	return s.Data()
}

// readModuleFile returns a module's bytes, decompressed.
func readModuleFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, cause(err)
	}
	defer f.Close()
	var r io.Reader = f
	switch filepath.Ext(path) {
	case ".xz":
		if r, err = xz.NewReader(f, maxWindow); err != nil {
			return nil, err
		}
	case ".gz":
		if r, err = gzip.NewReader(f); err != nil {
			return nil, err
		}
	case ".zst":
		z, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		defer z.Close()
		r = z
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxModule {
		return nil, fmt.Errorf("more than %d bytes", maxModule)
	}
	return data, nil
}
