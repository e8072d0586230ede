package jail

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// loaderCache tells the dynamic loader where libraries are.
const loaderCache = "/etc/ld.so.cache"

// ProgramFiles lists what an executable, and what it loads, need to run: the dynamic loader, its
// cache and all libraries, as the loader of this host finds them. A static executable needs nothing.
// The executable itself is not in the list.
func ProgramFiles(ctx context.Context, program string, loads ...string) ([]string, error) {
	loader, err := loaderOf(program)
	if err != nil {
		return nil, fmt.Errorf("find what %s needs: %w", program, err)
	}
	if loader == "" {
		return nil, nil
	}
	files := append([]string{loader}, loads...)
	if _, err := os.Stat(loaderCache); err == nil {
		files = append(files, loaderCache)
	}
	for _, path := range append([]string{program}, loads...) {
		libs, err := libraries(ctx, loader, path)
		if err != nil {
			return nil, fmt.Errorf("find what %s needs: %w", path, err)
		}
		files = append(files, libs...)
	}
	slices.Sort(files)
	return slices.Compact(files), nil
}

// loaderOf is the dynamic loader that an executable asks for, "" for a static one.
func loaderOf(program string) (string, error) {
	f, err := elf.Open(program)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < 4096 {
			b, err := io.ReadAll(p.Open())
			return string(bytes.TrimRight(b, "\x00")), err
		}
	}
	return "", nil
}

const maxListing = 256 << 10 // bytes that a loader may list

// libraries asks the loader which libraries a file would be linked with, and where they are
// (ld.so(8), --list).
func libraries(ctx context.Context, loader, path string) ([]string, error) {
	cmd := exec.CommandContext(ctx, loader, "--list", path)
	cmd.Env = []string{}
	out, err := cmd.Output()
	switch {
	case err != nil:
		return nil, err
	case len(out) > maxListing:
		return nil, errors.New("the loader lists too much")
	}
	var libs []string
	for line := range strings.Lines(string(out)) {
		_, after, ok := strings.Cut(line, " => ")
		if !ok {
			continue
		}
		lib, _, _ := strings.Cut(strings.TrimSpace(after), " (")
		if !filepath.IsAbs(lib) {
			return nil, errors.New(strings.TrimSpace(line))
		}
		libs = append(libs, lib)
	}
	return libs, nil
}
