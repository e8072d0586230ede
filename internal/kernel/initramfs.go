package kernel

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
)

// initramfsFormat is part of what an initramfs is cached by. Change it with the
// layout below.
const initramfsFormat = "ironclaw initramfs 3"

// initramfsDirs are the directories an init mounts something on. Parents first.
var initramfsDirs = []string{"dev", "proc", "sys", "run", "tmp", "lower", "overlay", "newroot", "modules"}

// Initramfs returns the path of an initramfs for the kernel:
//
//	/init                     the agent
//	/dev/console              so that what it prints is seen
//	/proc, /sys, /newroot ... empty directories
//	/modules/000-NAME.ko ...  the modules wanted and those they need; to be
//	                          loaded in the order of their names
//
// It is made once for each kernel, agent and list. A module which is built into
// the kernel is as good as there. An initramfs is an uncompressed newc archive,
// because a guest that is emulated spends seconds on decompression, and the same
// input makes the same bytes.
func (s *Store) Initramfs(ctx context.Context, k *Kernel, agent Agent, want []string) (string, error) {
	path, err := s.initramfs(ctx, k, agent, want)
	if err != nil {
		return "", fmt.Errorf("make an initramfs for kernel %s: %w", k.Release, err)
	}
	return path, nil
}

func (s *Store) initramfs(ctx context.Context, k *Kernel, agent Agent, want []string) (string, error) {
	key, err := s.initramfsKey(k, agent, want)
	if err != nil {
		return "", err
	}
	dir, err := filepath.Abs(filepath.Join(s.dir, "initramfs"))
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, key+".cpio")
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Size() > 0 {
		touch(path)
		return path, nil
	}
	tree, err := readModuleTree(k.Modules, k.Release)
	if err != nil {
		return "", err
	}
	modules, err := tree.order(want)
	if err != nil {
		return "", err
	}
	program, err := agent.Program()
	if err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	prune(dir)
	return path, writeInitramfs(path, program, modules, nil)
}

// HostileInitramfs makes in dir an initramfs whose agent attacks the host (see
// package guest/hostile) and returns its path. It is for `ironclaw verify` alone:
// nothing of it enters the store, and no other machine boots it.
func (s *Store) HostileInitramfs(k *Kernel, agent Agent, want []string, dir string) (string, error) {
	path := filepath.Join(dir, "hostile.cpio")
	err := func() error {
		tree, err := readModuleTree(k.Modules, k.Release)
		if err != nil {
			return err
		}
		modules, err := tree.order(want)
		if err != nil {
			return err
		}
		program, err := agent.Program()
		if err != nil {
			return err
		}
		return writeInitramfs(path, program, modules, []cpio.Record{static("hostile", nil, 0o600)})
	}()
	if err != nil {
		return "", fmt.Errorf("make a hostile initramfs for kernel %s: %w", k.Release, err)
	}
	return path, nil
}

// initramfsKey digests what the initramfs is made of. Modules in the store belong
// to the kernel and never change; elsewhere they may be built anew at any time.
func (s *Store) initramfsKey(k *Kernel, agent Agent, want []string) (string, error) {
	h := sha256.New()
	parts := []string{initramfsFormat, k.Digest, agent.id, k.Modules}
	for _, p := range append(parts, want...) {
		fmt.Fprintf(h, "%d:%s,", len(p), p)
	}
	store, err := filepath.Abs(s.dir)
	if err != nil {
		return "", err
	}
	if !strings.HasPrefix(k.Modules, store+"/") {
		if err := fingerprint(h, k.Modules); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// fingerprint adds what changes when a file below dir does.
func fingerprint(h hash.Hash, dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "%q %d %d\n", path, info.Size(), info.ModTime().UnixNano())
		return nil
	})
}

// writeInitramfs writes the archive under another name first.
func writeInitramfs(path string, agent []byte, modules []*module, more []cpio.Record) error {
	f, err := os.CreateTemp(filepath.Dir(path), tmpPrefix+"*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := writeArchive(w, agent, modules, more); err != nil {
		return err
	}
	if err := errors.Join(w.Flush(), f.Chmod(0o644), f.Sync()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncPath(filepath.Dir(path), unix.Fsync)
}

func writeArchive(w io.Writer, agent []byte, modules []*module, more []cpio.Record) error {
	out := cpio.Newc.Writer(w)
	var records []cpio.Record
	for _, dir := range initramfsDirs {
		records = append(records, cpio.Directory(dir, 0o755))
	}
	records = append(records, cpio.CharDev("dev/console", 0o600, 5, 1), static("init", agent, 0o755))
	for i, m := range modules {
		records = append(records, static(fmt.Sprintf("modules/%03d-%s.ko", i, m.name), unsigned(m.data), 0o644))
	}
	for i, r := range append(records, more...) {
		r.Ino = uint64(i + 1) // equal ones would be links to one another
		r.NLink = 1
		if err := out.WriteRecord(r); err != nil {
			return err
		}
	}
	return cpio.WriteTrailer(out)
}

func static(name string, data []byte, perm uint64) cpio.Record {
	return cpio.StaticRecord(data, cpio.Info{
		Name:     name,
		Mode:     cpio.S_IFREG | perm,
		FileSize: uint64(len(data)),
	})
}

// signatureMark ends a signed module: the signature, 12 bytes that describe it
// (struct module_signature of the kernel), and this.
const signatureMark = "~Module signature appended~\n"

// unsigned returns the module without its signature. The initramfs is ours, whole
// or not at all; checking each of its modules again costs an emulated guest a
// fifth of the time that loading them takes. What does not look like a signature
// stays.
func unsigned(data []byte) []byte {
	const info = 12
	body, ok := bytes.CutSuffix(data, []byte(signatureMark))
	if !ok || len(body) < info {
		return data
	}
	size := int64(binary.BigEndian.Uint32(body[len(body)-4:]))
	if size > int64(len(body)-info) {
		return data
	}
	return body[:int64(len(body))-info-size]
}
