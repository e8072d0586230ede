package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"
)

var (
	releasePattern = regexp.MustCompile(`^[0-9][0-9A-Za-z.+~_-]{0,126}`)
	banner         = []byte("Linux version ")
)

// maxRelease is more than the kernel allows for the name of its release (64).
const maxRelease = 128

// leadingRelease returns the release that text begins with, or nothing.
func leadingRelease(text []byte) string {
	text = text[:min(len(text), maxRelease)]
	release := releasePattern.Find(text)
	if len(release) == len(text) {
		return "" // it does not end
	}
	switch text[len(release)] {
	case 0, ' ', '\n':
		return string(release)
	}
	return ""
}

// elfRelease finds the release in a kernel's banner, "Linux version 6.1.0 (...".
func elfRelease(r io.Reader) (string, error) {
	const chunk = 1 << 20
	overlap := len(banner) + maxRelease
	buf := make([]byte, 0, chunk+overlap)
	for {
		n, err := io.ReadFull(r, buf[len(buf):len(buf)+chunk])
		buf = buf[:len(buf)+n]
		for rest := buf; ; {
			i := bytes.Index(rest, banner)
			if i < 0 {
				break
			}
			rest = rest[i+len(banner):]
			if release := leadingRelease(rest); release != "" {
				return release, nil
			}
		}
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return "", errors.New(`no release in it: "Linux version" was not found`)
		case err != nil:
			return "", err
		}
		keep := copy(buf[:overlap], buf[len(buf)-overlap:])
		buf = buf[:keep]
	}
}

// checkELF verifies that a file is a kernel which a VMM can start directly:
// x86-64, something to load, all there, and with the PVH entry point.
func checkELF(r io.ReaderAt, size int64) error {
	f, err := elf.NewFile(r)
	if err != nil {
		return fmt.Errorf("not a usable ELF file: %w", err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("an ELF file for %v, %v; x86-64 is needed", f.Machine, f.Class)
	}
	load, pvh := false, false
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD && p.Type != elf.PT_NOTE {
			continue
		}
		if p.Off > uint64(size) || p.Filesz > uint64(size)-p.Off {
			return fmt.Errorf("truncated: a segment ends at byte %d, the file at %d", p.Off+p.Filesz, size)
		}
		switch {
		case p.Type == elf.PT_LOAD && p.Filesz > 0:
			load = true
		case p.Type == elf.PT_NOTE:
			found, err := hasPVHNote(p.Open(), p.Filesz)
			if err != nil {
				return fmt.Errorf("read the notes: %w", err)
			}
			pvh = pvh || found
		}
	}
	if !load {
		return errors.New("an ELF file with nothing to load in it")
	}
	if !pvh {
		return errors.New("no PVH entry point in it: the kernel was built without CONFIG_PVH")
	}
	return nil
}

const (
	maxNotes         = 1 << 20
	notePhys32Entry  = 18 // XEN_ELFNOTE_PHYS32_ENTRY
	noteName         = "Xen\x00"
	noteHeaderLength = 12
)

// hasPVHNote looks for the note that carries the PVH entry point.
func hasPVHNote(r io.Reader, size uint64) (bool, error) {
	notes, err := io.ReadAll(io.LimitReader(r, int64(min(size, maxNotes))))
	if err != nil {
		return false, err
	}
	for len(notes) >= noteHeaderLength {
		le := binary.LittleEndian
		nameLen, descLen, kind := uint64(le.Uint32(notes)), uint64(le.Uint32(notes[4:])), le.Uint32(notes[8:])
		notes = notes[noteHeaderLength:]
		desc := (nameLen + 3) &^ 3
		end := desc + (descLen+3)&^3
		if desc+descLen > uint64(len(notes)) {
			return false, nil
		}
		if kind == notePhys32Entry && descLen >= 4 && string(notes[:nameLen]) == noteName {
			return true, nil
		}
		notes = notes[min(end, uint64(len(notes))):]
	}
	return false, nil
}
