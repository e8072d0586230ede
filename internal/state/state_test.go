package state

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// The test binary is its own helper: with this variable it reserves a record in
// the directory named, says so, and waits to be killed.
const helperEnv = "IRONCLAW_STATE_HELPER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(helperEnv); dir != "" {
		e, err := Open(dir).Reserve(Record{ID: "victim", Name: "name", Created: time.Now()})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		sleep := exec.Command("sleep", "1000")
		if err := sleep.Start(); err == nil {
			p, _ := Describe(sleep.Process.Pid)
			err = e.Update(func(r *Record) { r.VMM = p })
			fmt.Println("reserved", sleep.Process.Pid, err)
		}
		select {}
	}
	os.Exit(m.Run())
}

func reserve(t *testing.T, s *Store, id, name string) *Entry {
	t.Helper()
	e, err := s.Reserve(Record{ID: id, Name: name, Created: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestReserveAndRelease(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "run"))
	e := reserve(t, s, "abc", "box")
	records, err := s.List()
	if err != nil || len(records) != 1 || records[0].ID != "abc" || records[0].Owner.PID != os.Getpid() {
		t.Fatalf("%+v, %v", records, err)
	}
	for _, r := range []Record{{ID: "abc"}, {ID: "other", Name: "box"}, {ID: "third", Name: "abc"}} {
		if _, err := s.Reserve(r); !errors.Is(err, ErrNameInUse) {
			t.Errorf("reserve %+v: %v", r, err)
		}
	}
	if cleaned, err := s.Reconcile(); err != nil || len(cleaned) != 0 {
		t.Errorf("reconcile took a record that is held: %v, %v", cleaned, err)
	}
	if err := e.Release(); err != nil {
		t.Fatal(err)
	}
	reserve(t, s, "abc", "box").Release()
	if records, err := s.List(); err != nil || len(records) != 0 {
		t.Errorf("%+v, %v", records, err)
	}
}

// Ids become paths: every door checks them.
func TestBadIDs(t *testing.T) {
	s := Open(t.TempDir())
	for _, id := range []string{"", "..", "a/b", "A", "-a", "a_b", "a\n", strings.Repeat("a", 64)} {
		if _, err := s.Reserve(Record{ID: id}); err == nil {
			t.Errorf("reserved %q", id)
		}
		if _, err := s.Reserve(Record{ID: "ok", Name: id}); err == nil && id != "" {
			t.Errorf("reserved the name %q", id)
		}
	}
}

// What an owner that was killed leaves behind is cleaned up, its VMM too, by the
// next one, once.
func TestReconcileAfterKill(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	var pid int
	if _, err := fmt.Sscanf(line, "reserved %d <nil>", &pid); err != nil {
		t.Fatalf("helper: %q", line)
	}
	s := Open(dir)
	if cleaned, err := s.Reconcile(); err != nil || len(cleaned) != 0 {
		t.Fatalf("while the owner lives: %v, %v", cleaned, err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	cleaned, err := s.Reconcile()
	if err != nil || len(cleaned) != 1 || cleaned[0].ID != "victim" {
		t.Fatalf("%+v, %v", cleaned, err)
	}
	if _, err := Describe(pid); err == nil {
		t.Errorf("process %d lives on", pid)
	}
	if cleaned, err := s.Reconcile(); err != nil || len(cleaned) != 0 {
		t.Errorf("cleaned twice: %v, %v", cleaned, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 { // .lock
		t.Errorf("%d files are left", len(entries))
	}
}

// A pid that is somebody else's by now is left alone.
func TestReconcileSparesOthers(t *testing.T) {
	dir := t.TempDir()
	other := exec.Command("sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { other.Process.Kill(); other.Wait() }()
	p, err := Describe(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for i, wrong := range []Process{
		{p.PID, p.Start + 1, p.Exe},
		{p.PID, p.Start, "/usr/bin/qemu-system-x86_64"},
		{1, p.Start, p.Exe},
		{-1, 0, ""},
	} {
		id := fmt.Sprintf("old%d", i)
		os.Mkdir(filepath.Join(dir, id), 0o700)
		b := fmt.Sprintf(`{"id":%q,"vmm":{"pid":%d,"start":%d,"exe":%q}}`, id, wrong.PID, wrong.Start, wrong.Exe)
		os.WriteFile(filepath.Join(dir, id, recordFile), []byte(b), 0o600)
	}
	if cleaned, err := Open(dir).Reconcile(); err != nil || len(cleaned) != 4 {
		t.Errorf("%v, %v", cleaned, err)
	}
	if now, err := Describe(p.PID); err != nil || now != p {
		t.Errorf("the process was ended")
	}
}

// Damaged records are cleaned like others; what is no record is not touched.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{
		"empty": "", "garbage": "{{{", "wrongid": `{"id":"other"}`, "null": "null", "types": `{"id":7,"vmm":[]}`,
	} {
		os.Mkdir(filepath.Join(dir, name), 0o700)
		os.WriteFile(filepath.Join(dir, name, recordFile), []byte(content), 0o600)
	}
	os.Mkdir(filepath.Join(dir, "norecord"), 0o700)
	os.Mkdir(filepath.Join(dir, "Not-Ours"), 0o700)
	os.WriteFile(filepath.Join(dir, "file"), nil, 0o600)
	cleaned, err := Open(dir).Reconcile()
	if err != nil || len(cleaned) != 6 {
		t.Errorf("%+v, %v", cleaned, err)
	}
	for _, name := range []string{"Not-Ours", "file"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
}

// Many at once: every name is given once.
func TestConcurrentReserve(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range 20 {
		wg.Go(func() {
			e, err := Open(dir).Reserve(Record{ID: fmt.Sprintf("id%d", i), Name: "same"})
			if err == nil {
				mu.Lock()
				won++
				mu.Unlock()
				t.Cleanup(func() { e.Release() })
			} else if !errors.Is(err, ErrNameInUse) {
				t.Error(err)
			}
			Open(dir).Reconcile()
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d got the name", won)
	}
}

// The second field of stat is the program's name, which may look like the rest.
func TestStartTime(t *testing.T) {
	dir := t.TempDir()
	evil := filepath.Join(dir, "x) S 1 2 3")
	b, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(evil, b, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(evil, "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	self, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	other, err := startTime(cmd.Process.Pid)
	if err != nil || other < self || other > self+100_000 {
		t.Errorf("started at %d, we at %d, %v", other, self, err)
	}
}

// A record that is being released is never taken for one whose owner has ended.
func TestReconcileDuringRelease(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "run"))
	stop := make(chan struct{})
	var reconciling, releasing sync.WaitGroup
	for range 3 {
		reconciling.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if cleaned, err := s.Reconcile(); err != nil || len(cleaned) != 0 {
					t.Errorf("%+v, %v", cleaned, err)
					return
				}
			}
		})
	}
	for w := range 3 {
		releasing.Go(func() {
			for i := range 100 {
				e, err := s.Reserve(Record{ID: fmt.Sprintf("s%d-%d", w, i)})
				if err == nil {
					err = e.Release()
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	releasing.Wait()
	close(stop)
	reconciling.Wait()
}

// What Release did not get to remove is removed by the next command, silently.
func TestReleaseKilled(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "run"))
	left := filepath.Join(s.dir, gonePrefix+"abc")
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	if cleaned, err := s.Reconcile(); err != nil || len(cleaned) != 0 {
		t.Errorf("%+v, %v", cleaned, err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", left, err)
	}
}
