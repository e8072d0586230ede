package template

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// The test binary is its own helper: with this variable, "dir step", it makes the
// template of testInputs and stops at the step, says so, and waits to be killed.
// It says "made" when it fills, and "done" at the end.
const helperEnv = "IRONCLAW_TEMPLATE_HELPER"

func TestMain(m *testing.M) {
	if what := os.Getenv(helperEnv); what != "" {
		helper(what)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func helper(what string) {
	dir, last, _ := strings.Cut(what, " ")
	s := Open(dir, 0)
	s.step = func(name string) {
		if name == last {
			fmt.Println("at", name)
			select {}
		}
	}
	t, err := s.Make(context.Background(), testInputs, func(_ context.Context, dir string) error {
		fmt.Println("made")
		if err := writeFile(dir, MemoryFile, 1<<20); err != nil {
			return err
		}
		s.step("memory")
		if err := writeFile(dir, StateFile, 1000); err != nil {
			return err
		}
		s.step("state")
		time.Sleep(100 * time.Millisecond) // for others to come and wait
		return nil
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	t.Close()
	fmt.Println("done")
}

var testInputs = Inputs{"kernel": "sha256:abc", "qemu": "7.2.22 /usr/bin/qemu-system-x86_64"}

// writeFile writes size bytes, the second half of them a hole.
func writeFile(dir, name string, size int) error {
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(bytes.Repeat([]byte(name[:1]), size/2)); err != nil {
		return err
	}
	return f.Truncate(int64(size))
}

func fill(_ context.Context, dir string) error {
	return errors.Join(writeFile(dir, MemoryFile, 1<<20), writeFile(dir, StateFile, 1000))
}

func mustNotFill(context.Context, string) error { return errors.New("called fill") }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testStore(t *testing.T) *Store { return Open(filepath.Join(t.TempDir(), "templates"), 0) }

// put makes the template of one input and closes it.
func put(t *testing.T, s *Store, name string) (Inputs, string) {
	t.Helper()
	in := Inputs{"name": name}
	tpl, err := s.Make(t.Context(), in, fill)
	check(t, err)
	check(t, tpl.Close())
	return in, tpl.ID
}

// tree is what is in the store, one name a line, without the locks.
func tree(t *testing.T, s *Store) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		check(t, err)
		rel, _ := filepath.Rel(s.dir, path)
		if d.IsDir() && rel == "locks" {
			return filepath.SkipDir
		}
		if !d.IsDir() && rel != "lock" {
			fmt.Fprintln(&b, rel)
		}
		return nil
	})
	check(t, err)
	return b.String()
}

func wholeTree(id string) string {
	return fmt.Sprintf("templates/%[1]s/manifest.json\ntemplates/%[1]s/memory\ntemplates/%[1]s/state\ntemplates/%[1]s/used\ntemplates/%[1]s/verified\n", id)
}

func TestMakeAndGet(t *testing.T) {
	s := testStore(t)
	if _, err := s.Get(t.Context(), testInputs); !errors.Is(err, ErrNotFound) {
		t.Errorf("from nowhere: %v", err)
	}
	if list, err := s.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("list of nowhere: %v, %v", list, err)
	}
	if _, err := os.Lstat(s.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("looking made the store: %v", err)
	}
	before := time.Now().Add(-time.Second)
	made, err := s.Make(t.Context(), testInputs, fill)
	check(t, err)
	got, err := s.Get(t.Context(), testInputs)
	check(t, err)
	again, err := s.Make(t.Context(), testInputs, mustNotFill)
	check(t, err)
	for _, tpl := range []*Template{made, got, again} {
		if tpl.ID != testInputs.ID() || tpl.MemorySize != 1<<20 || tpl.Inputs["kernel"] != "sha256:abc" || len(tpl.Inputs) != 2 ||
			tpl.Created.Before(before) || tpl.Used.Before(before) || tpl.Created.After(time.Now()) {
			t.Errorf("%+v", tpl)
		}
		if tpl.DiskSize < 512<<10 || tpl.DiskSize > 600<<10 {
			t.Errorf("%d bytes on the disk", tpl.DiskSize)
		}
		memory, err := io.ReadAll(tpl.Memory)
		check(t, err)
		state, err := io.ReadAll(tpl.State)
		check(t, err)
		if len(memory) != 1<<20 || len(state) != 1000 || memory[5] != 'm' || state[5] != 's' {
			t.Errorf("%d and %d bytes", len(memory), len(state))
		}
		if _, err := tpl.Memory.WriteAt([]byte("x"), 0); err == nil {
			t.Error("memory is open for writing")
		}
		// QEMU opens it again, for writing, though it maps it private.
		f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", tpl.Memory.Fd()), os.O_RDWR, 0)
		check(t, err)
		check(t, f.Close())
		check(t, tpl.Close())
		check(t, tpl.Close())
	}
	if got, want := tree(t, s), wholeTree(testInputs.ID()); got != want {
		t.Errorf("the store holds\n%swant\n%s", got, want)
	}
	for _, name := range []string{".", MemoryFile, StateFile, manifestFile, usedFile} {
		st, err := os.Stat(filepath.Join(s.path(testInputs.ID()), name))
		check(t, err)
		if st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", name, st.Mode())
		}
	}
	if _, err := s.Get(t.Context(), Inputs{"kernel": "sha256:abc"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("other inputs: %v", err)
	}
}

// No two inputs have the same ID.
func TestInputsID(t *testing.T) {
	seen := make(map[string]Inputs)
	for _, in := range []Inputs{
		nil, {"": ""}, {"a": ""}, {"": "a"}, {"a": "b"}, {"ab": ""}, {"a": "b", "c": "d"}, {"a": "d", "c": "b"},
		{"a": "b\x00c"}, {"a\x00b": "c"}, {"a": "b", "": ""}, {"A": "b"}, {"a": "bc", "d": ""}, {"a": "b", "cd": ""},
	} {
		id := in.ID()
		if old, ok := seen[id]; ok || !validID(id) {
			t.Errorf("%q and %q have the ID %s", old, in, id)
		}
		seen[id] = in
		if id != in.ID() {
			t.Errorf("%q has more than one ID", in)
		}
	}
}

// Make refuses inputs that a manifest could not hold, before the work.
func TestBadInputs(t *testing.T) {
	s := testStore(t)
	for _, in := range []Inputs{{"a": "\xff"}, {"\xff": "a"}, {"a": strings.Repeat("x", maxManifest)}} {
		if _, err := s.Make(t.Context(), in, mustNotFill); err == nil || strings.Contains(err.Error(), "called fill") {
			t.Errorf("%.20q: %v", in, err)
		}
	}
}

func TestBadFill(t *testing.T) {
	bad := errors.New("bad")
	file := func(name, content string) func(string) error {
		return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600) }
	}
	memory, state := file(MemoryFile, "m"), file(StateFile, "s")
	for _, tt := range []struct {
		name string
		want string
		fill []func(dir string) error
	}{
		{"error", "bad", []func(string) error{memory, state, func(string) error { return bad }}},
		{"nothing", "memory is damaged: missing", nil},
		{"no state", "state is damaged: missing", []func(string) error{memory}},
		{"empty memory", "memory is empty", []func(string) error{state, file(MemoryFile, "")}},
		{"empty state", "state is empty", []func(string) error{memory, file(StateFile, "")}},
		{"more", `"other" was left beside`, []func(string) error{memory, state, file("other", "x")}},
		{"link", "cannot be opened", []func(string) error{state, func(dir string) error { return os.Symlink("state", dir+"/memory") }}},
		{"hard link", "it has 2 names", []func(string) error{state, func(dir string) error { return os.Link(dir+"/state", dir+"/memory") }}},
		{"directory", "not a regular file", []func(string) error{state, func(dir string) error { return os.Mkdir(dir+"/memory", 0o700) }}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := testStore(t)
			_, err := s.Make(t.Context(), testInputs, func(_ context.Context, dir string) error {
				st, err := os.Stat(dir)
				check(t, err)
				if entries, _ := os.ReadDir(dir); st.Mode().Perm() != 0o700 || len(entries) != 0 {
					t.Errorf("%v with %d files", st.Mode(), len(entries))
				}
				for _, f := range tt.fill {
					if err := f(dir); err != nil {
						return err
					}
				}
				return nil
			})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v", err)
			}
			if tt.name == "error" && !errors.Is(err, bad) {
				t.Errorf("%v is not that of fill", err)
			}
			if left := tree(t, s); left != "" {
				t.Errorf("left:\n%s", left)
			}
		})
	}
}

// A VMM that still writes after fill has returned is noticed.
func TestStillWritten(t *testing.T) {
	for _, name := range []string{MemoryFile, StateFile} {
		s := testStore(t)
		s.step = func(step string) {
			if step == "manifest" { // both have been read
				flip(t, filepath.Join(s.makingPath(testInputs.ID()), name))
			}
		}
		if _, err := s.Make(t.Context(), testInputs, fill); err == nil || !strings.Contains(err.Error(), name+" changed while it was read") {
			t.Errorf("%v", err)
		}
		if left := tree(t, s); left != "" {
			t.Errorf("left:\n%s", left)
		}
	}
}

// A panic leaves nothing either, and gives the lock back.
func TestFillPanics(t *testing.T) {
	s := testStore(t)
	func() {
		defer func() { recover() }()
		s.Make(t.Context(), testInputs, func(ctx context.Context, dir string) error {
			check(t, fill(ctx, dir))
			panic("fill")
		})
	}()
	if left := tree(t, s); left != "" {
		t.Errorf("left:\n%s", left)
	}
	tpl, err := s.Make(t.Context(), testInputs, fill)
	check(t, err)
	tpl.Close()
}

// Of many who want the same template, one makes it.
func TestMadeOnce(t *testing.T) {
	s := testStore(t)
	var calls atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			tpl, err := s.Make(t.Context(), testInputs, func(ctx context.Context, dir string) error {
				calls.Add(1)
				time.Sleep(20 * time.Millisecond)
				return fill(ctx, dir)
			})
			if err != nil {
				t.Error(err)
				return
			}
			if tpl.Memory == nil || tpl.ID != testInputs.ID() {
				t.Errorf("%+v", tpl)
			}
			tpl.Close()
		})
	}
	wg.Wait()
	if n := calls.Load(); n != 1 {
		t.Errorf("made %d times", n)
	}
}

func startHelper(t *testing.T, s *Store, step string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"="+s.dir+" "+step)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	return cmd, bufio.NewReader(out)
}

func TestMadeOnceByProcesses(t *testing.T) {
	s := testStore(t)
	var cmds []*exec.Cmd
	var outs []*bufio.Reader
	for range 3 {
		cmd, out := startHelper(t, s, "none")
		cmds, outs = append(cmds, cmd), append(outs, out)
	}
	var all strings.Builder
	for i, cmd := range cmds {
		b, err := io.ReadAll(outs[i])
		check(t, err)
		all.Write(b)
		check(t, cmd.Wait())
	}
	if strings.Count(all.String(), "made") != 1 || strings.Count(all.String(), "done") != 3 {
		t.Errorf("the processes said\n%s", all.String())
	}
}

// Who waits for another maker leaves when its context ends.
func TestWaiterGivesUp(t *testing.T) {
	s := testStore(t)
	cause := errors.New("enough")
	tpl, err := s.Make(t.Context(), testInputs, func(ctx context.Context, dir string) error {
		waiter, cancel := context.WithCancelCause(ctx)
		time.AfterFunc(30*time.Millisecond, func() { cancel(cause) })
		if _, err := s.Make(waiter, testInputs, mustNotFill); !errors.Is(err, cause) {
			t.Errorf("gave up with %v", err)
		}
		if _, err := s.Get(ctx, testInputs); !errors.Is(err, ErrNotFound) {
			t.Errorf("found while it was made: %v", err)
		}
		return fill(ctx, dir)
	})
	check(t, err)
	tpl.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := s.Make(ctx, Inputs{"b": ""}, mustNotFill); !errors.Is(err, cause) {
		t.Errorf("make: %v", err)
	}
	if _, err := s.Get(ctx, testInputs); !errors.Is(err, cause) {
		t.Errorf("get: %v", err)
	}
	// A check that was broken off is no damage.
	check(t, os.Remove(filepath.Join(s.path(testInputs.ID()), memoFile)))
	if _, err := s.Get(ctx, testInputs); !errors.Is(err, cause) || isDamaged(err) {
		t.Errorf("get unverified: %v", err)
	}
	got, err := s.Get(t.Context(), testInputs)
	check(t, err)
	got.Close()
}

// A maker killed at any moment leaves nothing that is ever found, and nothing for
// ever.
func TestKilledMaker(t *testing.T) {
	for _, clean := range []string{"make", "make another", "prune"} {
		for _, step := range []string{"fill", "memory", "state", "seal", "manifest", "rename", "evict"} {
			t.Run(clean+" after "+step, func(t *testing.T) {
				t.Parallel()
				s := testStore(t)
				cmd, out := startHelper(t, s, step)
				for line := ""; line != "at "+step+"\n"; {
					var err error
					line, err = out.ReadString('\n')
					check(t, err)
				}
				// Alive, it is left alone. It holds the store in the last two.
				placed := step == "evict"
				if step != "rename" && !placed {
					if removed, freed, err := s.Prune(t.Context(), true); err != nil || len(removed) != 0 || freed != 0 {
						t.Errorf("pruned a live maker: %v, %d, %v", removed, freed, err)
					}
				}
				check(t, cmd.Process.Kill())
				cmd.Wait()
				left := tree(t, s)
				tpl, err := s.Get(t.Context(), testInputs)
				if placed {
					check(t, err)
					tpl.Close()
				} else if !errors.Is(err, ErrNotFound) {
					t.Fatalf("found %+v, %v", tpl, err)
				}
				if list, err := s.List(t.Context()); err != nil || len(list) != 0 && !placed {
					t.Errorf("listed %v, %v", list, err)
				}
				id := testInputs.ID()
				switch clean {
				case "make":
					tpl, err = s.Make(t.Context(), testInputs, fill)
					check(t, err)
					check(t, tpl.Close())
				case "make another":
					_, id = put(t, s, "another")
					if placed {
						return
					}
				case "prune":
					_, freed, err := s.Prune(t.Context(), false)
					check(t, err)
					if placed {
						break
					}
					if strings.Contains(left, "memory") != (freed >= 512<<10) {
						t.Errorf("freed %d bytes", freed)
					}
					if left := tree(t, s); left != "" {
						t.Errorf("left:\n%s", left)
					}
					return
				}
				if got, want := tree(t, s), wholeTree(id); got != want {
					t.Errorf("left:\n%swant:\n%s", got, want)
				}
			})
		}
	}
}

// What a killed remover left is removed, and not found.
func TestKilledRemover(t *testing.T) {
	s := testStore(t)
	in, id := put(t, s, "a")
	check(t, os.Rename(s.path(id), filepath.Join(s.templates(), gonePrefix+id+"-x")))
	if _, err := s.Get(t.Context(), in); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	put(t, s, "b")
	if entries, _ := os.ReadDir(s.templates()); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
}

// Many processes' worth of everything at once; the race detector looks on.
func TestConcurrent(t *testing.T) {
	s := testStore(t)
	all := []Inputs{{"a": "1"}, {"a": "2"}, {"a": "3"}}
	var wg sync.WaitGroup
	use := func(tpl *Template, err error) {
		switch {
		case err == nil:
			if sum, err := digest(t.Context(), tpl.Memory, tpl.MemorySize); err != nil || !validDigest(sum) {
				t.Error(err)
			}
			tpl.Close()
		case !errors.Is(err, ErrNotFound):
			t.Error(err)
		}
	}
	for i := range 4 {
		wg.Go(func() {
			for n := range 15 {
				in := all[(i+n)%len(all)]
				tpl, err := s.Make(t.Context(), in, fill)
				use(tpl, err)
				if err != nil {
					t.Errorf("make: %v", err)
				}
				use(s.Get(t.Context(), in))
			}
		})
		wg.Go(func() {
			for n := range 15 {
				if _, err := s.Remove(t.Context(), all[(i+n)%len(all)].ID()); err != nil && !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
				list, err := s.List(t.Context())
				if err != nil {
					t.Error(err)
				}
				if slices.ContainsFunc(list, func(tpl *Template) bool { return tpl.Damaged != "" }) {
					t.Errorf("listed as damaged: %+v", list)
				}
				if _, _, err := s.Prune(t.Context(), n%5 == 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// One that is being removed is there or not, and never looks damaged.
func TestRemovedWhileLooking(t *testing.T) {
	s := testStore(t)
	_, id := put(t, s, "a")
	aside := filepath.Join(t.TempDir(), "a")
	check(t, os.CopyFS(aside, os.DirFS(s.path(id))))
	check(t, os.Chmod(aside, 0o700))
	check(t, os.Chmod(filepath.Join(aside, MemoryFile), 0o600))
	var done atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !done.Load() {
			o, err := look(s.path(id), id)
			if err == nil {
				o.Close()
			} else if !errors.Is(err, ErrNotFound) {
				t.Error(err)
				return
			}
		}
	})
	for range 200 {
		_, err := s.Remove(t.Context(), id)
		check(t, err)
		next := filepath.Join(s.makings(), "next")
		check(t, os.CopyFS(next, os.DirFS(aside)))
		check(t, os.Chmod(next, 0o700))
		check(t, os.Rename(next, s.path(id)))
	}
	done.Store(true)
	wg.Wait()
}

// Clones run on when their template is removed.
func TestRemovedWhileOpen(t *testing.T) {
	s := testStore(t)
	tpl, err := s.Make(t.Context(), testInputs, fill)
	check(t, err)
	defer tpl.Close()
	_, err = s.Remove(t.Context(), tpl.ID)
	check(t, err)
	b, err := io.ReadAll(tpl.Memory)
	if err != nil || len(b) != 1<<20 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}
