package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// flipByte changes a byte of a file where there is data, and leaves its mtime as
// it was.
func flipByte(t *testing.T, path string) {
	t.Helper()
	st, err := os.Stat(path)
	check(t, err)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	check(t, err)
	defer f.Close()
	off, err := f.Seek(st.Size()/2, unix.SEEK_DATA)
	check(t, err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, off)
	check(t, err)
	b[0] ^= 0x40
	_, err = f.WriteAt(b, off)
	check(t, err)
	check(t, os.Chtimes(path, st.ModTime(), st.ModTime()))
}

// replaceIn edits a file, which must contain old.
func replaceIn(t *testing.T, path, old, with string) {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	if !bytes.Contains(b, []byte(old)) {
		t.Fatalf("no %q in %s", old, b)
	}
	check(t, os.WriteFile(path, bytes.Replace(b, []byte(old), []byte(with), 1), 0o600))
}

// A template to which something happened is not used: the next run says so, makes
// another, and goes right.
func TestTemplateFaults(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.fineClone(t)
	before := p.remains(t)
	id := p.onlyTemplate(t)
	dir := p.dirOf(id)
	for _, tt := range []struct {
		name, note string
		do         func(t *testing.T)
	}{
		{"memory", "memory is damaged: its checksum is", func(t *testing.T) { flipByte(t, dir+"/memory") }},
		{"state", "state is damaged: its checksum is", func(t *testing.T) { flipByte(t, dir+"/state") }},
		{"memory, and the memo put back", "memory is damaged: its checksum is", func(t *testing.T) {
			memo, err := os.ReadFile(dir + "/verified")
			check(t, err)
			flipByte(t, dir+"/memory")
			check(t, os.Remove(dir+"/verified"))
			check(t, os.WriteFile(dir+"/verified", memo, 0o644))
		}},
		{"manifest", "manifest.json is damaged", func(t *testing.T) { replaceIn(t, dir+"/manifest.json", "tcg", "kvm") }},
		{"truncated", "memory is damaged: it has 5000000 bytes", func(t *testing.T) { check(t, os.Truncate(dir+"/memory", 5_000_000)) }},
		{"a link", "memory is damaged: it cannot be opened", func(t *testing.T) {
			moved := filepath.Join(p.dir, "tmp", "memory")
			check(t, os.Rename(dir+"/memory", moved))
			check(t, os.Symlink(moved, dir+"/memory"))
			t.Cleanup(func() { os.Remove(moved) })
		}},
		{"writable by all", "others may write it (mode 0666)", func(t *testing.T) { check(t, os.Chmod(dir+"/memory", 0o666)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			was := p.templates(t)[0].Created
			tt.do(t)
			o := p.fine(t)
			if notes := o.notes(); !o.cloned() || !strings.HasPrefix(notes, "note: template not used: template "+id) ||
				!strings.Contains(notes, tt.note) || strings.Count(notes, "\n") != 0 {
				t.Errorf("%s", o.stderr)
			}
			if again := p.onlyTemplate(t); again != id {
				t.Errorf("template %s, then %s", id, again)
			}
			if now := p.templates(t)[0].Created; !now.After(was) {
				t.Errorf("made at %v, then at %v", was, now)
			}
		})
	}
	p.fineClone(t)
	p.sameAs(t, before)
}

// What happens to a template that does not change it, nor what it depends on, is
// no reason not to use it.
func TestTemplateStaysGood(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.fineClone(t)
	id := p.onlyTemplate(t)
	made := p.templates(t)[0].Created
	before := p.remains(t)
	touched := func(at time.Time) func() {
		return func() {
			err := filepath.WalkDir(p.dirOf(id), func(path string, _ fs.DirEntry, err error) error {
				return errors.Join(err, os.Chtimes(path, at, at))
			})
			check(t, err)
		}
	}
	for name, do := range map[string]func(){
		"the clock was set back":    touched(time.Now().AddDate(1, 0, 0)),
		"the clock was set forward": touched(time.Now().AddDate(-1, 0, 0)),
		"no memo":                   func() { check(t, os.Remove(filepath.Join(p.dirOf(id), "verified"))) },
		"a memo of garbage":         func() { check(t, os.WriteFile(filepath.Join(p.dirOf(id), "verified"), []byte("{"), 0o644)) },
		"no time of use":            func() { check(t, os.Remove(filepath.Join(p.dirOf(id), "used"))) },
	} {
		do()
		o := p.fineClone(t)
		if list := p.templates(t); len(list) != 1 || list[0].ID != id || !list[0].Created.Equal(made) {
			t.Errorf("%s: %+v\n%s", name, list, o.stderr)
		}
	}
	check(t, os.WriteFile(filepath.Join(p.dirOf(id), "used"), nil, 0o600))
	p.sameAs(t, before)
}

// A machine that is another in any way is not started from this one's template,
// which serves again when things are as they were.
func TestTemplateOfOther(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.wrapQEMU(t, `real "$@"`)
	wrapper := filepath.Join(p.dir, "bin", "qemu-system-x86_64")
	st, err := os.Stat(wrapper)
	check(t, err)
	names := otherImage(t, p)
	first := p.fineClone(t, "--accel", "tcg")
	id := p.onlyTemplate(t)
	for i, change := range []func(){
		func() { check(t, os.Chtimes(wrapper, time.Time{}, st.ModTime().Add(time.Second))) }, // QEMU was upgraded
		func() { check(t, os.Rename(names+"/other.json", names+"/base.json")) },              // the image was built again
	} {
		change()
		o := p.fineClone(t, "--accel", "tcg")
		list := p.templates(t)
		if len(list) != i+2 || list[0].ID == id || !list[0].Created.After(list[1].Created) {
			t.Errorf("%d: %+v", i, list)
		}
		if o.phase(t, "template") < first.phase(t, "template")/4 {
			t.Errorf("%d: was one made?\n%s", i, o.stderr)
		}
	}
	check(t, os.Chtimes(wrapper, time.Time{}, st.ModTime()))
	check(t, os.Rename(names+"/first.json", names+"/base.json"))
	p.fineClone(t, "--accel", "tcg")
	if list := p.templates(t); len(list) != 3 || list[0].ID != id {
		t.Errorf("not from %s: %+v", id, list)
	}
}

// otherImage gives the place images of its own, "base" and another that would be
// "base" if its record, other.json, had that name: as after a build. first.json is
// the first one's record. It returns the directory of the records.
func otherImage(t *testing.T, p *place) string {
	t.Helper()
	images := filepath.Join(p.home(), "images")
	real, err := filepath.EvalSymlinks(images)
	check(t, err)
	check(t, os.Remove(images))
	img, err := sandbox.Open(filepath.Dir(real)).Images.Get(t.Context(), sandbox.DefaultImage)
	check(t, err)
	record, err := os.ReadFile(filepath.Join(real, "names", "base.json"))
	check(t, err)
	disk, err := os.ReadFile(img.Path)
	check(t, err)
	names, disks := filepath.Join(images, "names"), filepath.Join(images, "disks")
	check(t, os.MkdirAll(names, 0o700))
	check(t, os.MkdirAll(disks, 0o700))
	check(t, os.WriteFile(filepath.Join(disks, filepath.Base(img.Path)), disk, 0o644))
	disk[0] ^= 1 // before the file system begins
	digest := fmt.Sprintf("%x", sha256.Sum256(disk))
	check(t, os.WriteFile(filepath.Join(disks, digest), disk, 0o644))
	for name, b := range map[string][]byte{
		"base": record, "first": record, "other": bytes.Replace(record, []byte(filepath.Base(img.Path)), []byte(digest), 1),
	} {
		check(t, os.WriteFile(filepath.Join(names, name+".json"), b, 0o600))
	}
	return names
}

// inMounts runs a script, in which "$ironclaw" is the program and $store the store
// of templates, where its mounts are nobody else's.
func (p *place) inMounts(t *testing.T, script string) outcome {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "unshare", "util-linux")
	bin := filepath.Join(p.dir, "ironclaw") // its name tells it what to be: see TestMain
	if _, err := os.Lstat(bin); err != nil {
		check(t, os.Symlink(os.Args[0], bin))
	}
	store := filepath.Join(p.home(), "templates")
	check(t, os.MkdirAll(store, 0o700))
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--propagation", "private", "sh", "-euc", script)
	cmd.Env = append(p.env, "ironclaw="+bin, "store="+store)
	cmd.Dir = p.dir
	cmd.WaitDelay = time.Second
	return observe(cmd)
}

// Where no template can be kept the machine boots, and -v says why.
func TestTemplateNowhere(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	const readOnly = `mount --bind $store $store; mount -o remount,ro,bind $store; `
	const run = `$ironclaw run -v -- echo fine; `
	p.inMounts(t, "true") // so that all it makes is there
	before := p.remains(t)
	for _, tt := range []struct{ name, script, note string }{
		{"read-only", readOnly + run, "read-only file system"},
		{"full", `mount -t tmpfs -o size=30m,mode=700 tmpfs $store; ` + run + `find $store -type f -size +0 -o -path '*/making/*'`, "no space left on device"},
		{"no inodes", `mount -t tmpfs -o nr_inodes=7,mode=700 tmpfs $store; ` + run + `find $store -type f -size +0 -o -path '*/making/*'`, "no space left on device"},
		{"a file", `mv $store $store.moved; touch $store; ` + run + `rm $store; mv $store.moved $store`, "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := p.inMounts(t, tt.script)
			if o.code != 0 || o.stdout != "fine\n" || !o.booted() {
				t.Errorf("code %d, %q\n%s", o.code, o.stdout, o.stderr)
			}
			if notes := o.notes(); !strings.Contains(notes, "note: no template was made, so the machine boots: ") || !strings.Contains(notes, tt.note) {
				t.Errorf("%s", o.stderr)
			}
			if list := p.templates(t); len(list) != 0 {
				t.Errorf("%+v", list)
			}
			p.sameAs(t, before)
		})
	}
	t.Run("read-only with one", func(t *testing.T) {
		p.fineClone(t)
		before := p.remains(t)
		for range 2 {
			o := p.inMounts(t, readOnly+run)
			// Before 8.2 QEMU opens the memory for writing, which it never does.
			why := "can't open backing store"
			if o.code != 0 || o.stdout != "fine\n" || o.booted() != strings.Contains(o.notes(), why) || o.cloned() != (o.notes() == "") {
				t.Errorf("code %d, %q\n%s", o.code, o.stdout, o.stderr)
			}
			os.Remove(filepath.Join(p.dirOf(p.onlyTemplate(t)), "verified")) // to be read again each time
		}
		p.sameAs(t, before)
	})
}

// Of two who share a directory each gets only what is theirs: a template is
// memory of a machine, and whoever can write it is in all that start from it.
func TestTemplateOfOtherUser(t *testing.T) {
	t.Parallel()
	testenv.NeedRoot(t)
	p := newPlace(t)
	const nobody = 65534
	for path := p.home(); path != "/" && path != "/tmp"; path = filepath.Dir(path) {
		check(t, os.Chmod(path, 0o755))
	}
	check(t, os.Chmod(filepath.Join(p.dir, "tmp"), 0o777))
	program := filepath.Join(p.dir, "ironclaw")
	if out, err := exec.CommandContext(t.Context(), "cp", os.Args[0], program).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	check(t, os.Chmod(program, 0o755))
	p.fineClone(t)
	id := p.onlyTemplate(t)
	asNobody := func(args ...string) outcome {
		ctx, cancel := context.WithTimeout(t.Context(), runLimit)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Dir, cmd.Env = "/", p.env
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		return observe(cmd)
	}
	// As root's programs leave it, the directory is root's alone.
	if o := asNobody("run", "true"); o.code != 125 || !strings.Contains(o.stderr, "error: ") || !strings.Contains(o.stderr, "permission denied") {
		t.Errorf("code %d, %s", o.code, o.stderr)
	}
	for _, open := range []struct {
		name string
		do   func(path string) error
	}{
		{"records", func(string) error { return nil }},
		{"read", func(path string) error { return openTo(path, 0o444, 0o555) }},
		{"write", func(path string) error { return openTo(path, 0o666, 0o777) }},
	} {
		check(t, os.Chmod(filepath.Join(p.home(), "run"), 0o777))
		check(t, os.Chmod(filepath.Join(p.home(), "run", ".lock"), 0o666))
		check(t, filepath.WalkDir(filepath.Join(p.home(), "templates"), func(path string, _ fs.DirEntry, err error) error {
			return errors.Join(err, open.do(path))
		}))
		o := asNobody("run", "-v", "--accel", "tcg", "--", "echo", "fine")
		if o.code != 0 || o.stdout != "fine\n" || !o.booted() || !strings.Contains(o.notes(), "note: no template was made") {
			t.Errorf("%s: code %d, %q\n%s", open.name, o.code, o.stdout, o.stderr)
		}
		for _, args := range [][]string{{"ls"}, {"rm", id}, {"prune", "-a"}} {
			if o := asNobody(append([]string{"template"}, args...)...); o.code != 125 || !strings.HasPrefix(o.stderr, "error: ") {
				t.Errorf("%s: template %q: code %d, %s%s", open.name, args, o.code, o.stdout, o.stderr)
			}
		}
		if _, err := os.Stat(filepath.Join(p.dirOf(id), "memory")); err != nil {
			t.Error(err)
		}
	}
	// Since others could have written it, it is not root's any more either.
	o := p.fine(t)
	if !o.booted() || !strings.Contains(o.notes(), "others may write it (mode 0777)") {
		t.Errorf("not said that others could write it:\n%s", o.stderr)
	}
}

func openTo(path string, file, dir fs.FileMode) error {
	st, err := os.Stat(path)
	if err == nil && st.IsDir() {
		return os.Chmod(path, dir)
	}
	return errors.Join(err, os.Chmod(path, file))
}
