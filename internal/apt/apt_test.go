package apt

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"

	"github.com/ironclaw-run/ironclaw/internal/apt/apttest"
)

const day = "Sat, 10 Jan 2026 10:11:12 UTC"

// debian is an archive with two versions of a kernel's packages in a suite and
// its security updates.
func debian(t *testing.T) *apttest.Archive {
	t.Helper()
	apttest.Need(t)
	ar := apttest.NewArchive(t)
	old := ar.AddDeb(t, "linux-image-cloud-amd64", "6.1-1", "linux-image-6.1-1-cloud-amd64 (= 6.1-1)", nil)
	fresh := ar.AddDeb(t, "linux-image-cloud-amd64", "6.1-2", "linux-image-6.1-2-cloud-amd64 (= 6.1-2) | other, kmod:any (>= 1)", nil)
	ar.Publish(t, "bookworm", "Debian", "Fri, 9 Jan 2026 00:00:00 UTC", old)
	ar.Publish(t, "bookworm-security", "Debian", day, fresh)
	return ar
}

func TestArchive(t *testing.T) {
	ar := debian(t)
	etc := apttest.UseSources(t, "a.list", fmt.Sprintf("# own\ndeb [trusted=yes] %s bookworm main\ndeb [trusted=yes] %[1]s bookworm-security main\n"+
		"deb http://localhost:1/third stable main\n", ar.URL))
	a := New(filepath.Join(t.TempDir(), "state"))
	if err := a.Update(t.Context()); err != nil {
		t.Fatalf("a third party which is down: %v", err)
	}
	if _, err := os.Stat(filepath.Join(etc, "hook-ran")); err == nil {
		t.Error("the host's hooks ran")
	}
	p, err := a.Candidate(t.Context(), "linux-image-cloud-amd64")
	if want := (Package{"linux-image-cloud-amd64", "6.1-2"}); err != nil || p != want {
		t.Errorf("Candidate = %v, %v; want %v", p, err, want)
	}
	deps, err := a.Depends(t.Context(), "linux-image-cloud-amd64")
	if want := []string{"linux-image-6.1-2-cloud-amd64", "kmod"}; err != nil || !slices.Equal(deps, want) {
		t.Errorf("Depends = %q, %v; want %q", deps, err, want)
	}
	src, err := a.Sources(t.Context())
	want := []string{"deb [trusted=yes] " + ar.URL + " bookworm main", "deb [trusted=yes] " + ar.URL + " bookworm-security main"}
	if err != nil || !slices.Equal(src, want) {
		t.Errorf("Sources = %q, %v; want %q", src, err, want)
	}
	date, err := a.ReleaseTime(t.Context())
	if want := time.Date(2026, 1, 10, 10, 11, 12, 0, time.UTC); err != nil || !date.Equal(want) {
		t.Errorf("ReleaseTime = %v, %v; want %v", date, err, want)
	}
	dest := t.TempDir()
	deb, err := a.Download(t.Context(), "linux-image-cloud-amd64", dest)
	if err != nil || filepath.Dir(deb) != dest || !strings.HasSuffix(deb, "6.1-2_amd64.deb") {
		t.Errorf("Download = %q, %v", deb, err)
	}
	if left, _ := os.ReadDir(dest); len(left) != 1 {
		t.Errorf("Download left %v", left)
	}
}

func TestNoPackage(t *testing.T) {
	ar := debian(t)
	apttest.UseSources(t, "a.list", "deb [trusted=yes] "+ar.URL+" bookworm main\n")
	a := New(t.TempDir())
	if err := a.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"nosuch", "", "-o=Dir::State=x", "linux-image-.*", "linux-image-cloud-amd6.", "../x", "a=b", strings.Repeat("a", 500)} {
		if _, err := a.Candidate(t.Context(), name); !errors.Is(err, ErrNoPackage) {
			t.Errorf("Candidate(%q): %v", name, err)
		}
		if _, err := a.Depends(t.Context(), name); !errors.Is(err, ErrNoPackage) {
			t.Errorf("Depends(%q): %v", name, err)
		}
		if _, err := a.Download(t.Context(), name, t.TempDir()); !errors.Is(err, ErrNoPackage) {
			t.Errorf("Download(%q): %v", name, err)
		}
	}
}

func TestDownloadRefusesWrongBytes(t *testing.T) {
	ar := debian(t)
	apttest.UseSources(t, "a.list", "deb [trusted=yes] "+ar.URL+" bookworm main\n")
	a := New(t.TempDir())
	if err := a.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	path := apttest.DebPath("linux-image-cloud-amd64", "6.1-1")
	good, _ := ar.File(path)
	bad := slices.Clone(good)
	bad[len(bad)-1] ^= 1
	ar.SetFile(path, bad)
	dest := t.TempDir()
	if _, err := a.Download(t.Context(), "linux-image-cloud-amd64", dest); err == nil {
		t.Error("Download took a package whose hash is wrong")
	}
	if left, _ := os.ReadDir(dest); len(left) != 0 {
		t.Errorf("Download left %v", left)
	}
}

func TestUpdateFails(t *testing.T) {
	ar := debian(t)
	third := apttest.NewArchive(t)
	third.Publish(t, "stable", "Docker", day, third.AddDeb(t, "docker-ce", "1", "", nil))
	ok := "deb [trusted=yes] " + ar.URL + " bookworm main\n"
	for name, sources := range map[string]string{
		"nothing there":        "deb http://127.0.0.1:1/debian bookworm main\n",
		"no sources at all":    "# none\n",
		"only a third party":   "deb [trusted=yes] " + third.URL + " stable main\n",
		"unsigned":             "deb " + ar.URL + " bookworm main\n",
		"security never came":  ok + "deb http://localhost:1/security bookworm-security main\n",
		"not even a source":    "deb [ http://",
		"component is missing": "deb [trusted=yes] " + ar.URL + " bookworm contrib\n",
	} {
		t.Run(name, func(t *testing.T) {
			apttest.UseSources(t, "a.list", sources)
			err := New(t.TempDir()).Update(t.Context())
			if err == nil || !strings.HasPrefix(err.Error(), "update package lists: ") {
				t.Errorf("Update: %v", err)
			}
			t.Log(err)
		})
	}
}

func TestUpdateKeepsOldListsApart(t *testing.T) {
	ar := debian(t)
	apttest.UseSources(t, "a.list", "deb [trusted=yes] "+ar.URL+" bookworm main\n")
	a := New(t.TempDir())
	if err := a.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	ar.Close()
	if err := a.Update(t.Context()); err == nil {
		t.Error("Update: success, with the lists of last time")
	} else {
		t.Log(err)
	}
	if _, err := a.Candidate(t.Context(), "linux-image-cloud-amd64"); err != nil {
		t.Errorf("the old lists are gone: %v", err)
	}
}

func TestSourcesInStanzas(t *testing.T) {
	ar := debian(t)
	apttest.UseSources(t, "a.sources", fmt.Sprintf(`# a comment

Types: deb
# another
URIs: %s
Suites: bookworm bookworm-security
Components: main
Trusted: yes
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQ==
 -----END PGP PUBLIC KEY BLOCK-----
`, ar.URL))
	dir := t.TempDir()
	a := New(dir)
	if err := a.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	src, err := a.Sources(t.Context())
	if err != nil || len(src) != 2 {
		t.Fatalf("Sources = %q, %v", src, err)
	}
	keys, err := filepath.Glob(filepath.Join(dir, "keys", "*.asc"))
	if err != nil || len(keys) != 1 || !strings.Contains(src[0], "[signed-by="+keys[0]+" trusted=yes] ") {
		t.Fatalf("Sources = %q, keys %q", src, keys)
	}
	data, err := os.ReadFile(keys[0])
	if want := "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQ==\n-----END PGP PUBLIC KEY BLOCK-----\n"; err != nil || string(data) != want {
		t.Errorf("key %q, %v; want %q", data, err, want)
	}
}

func TestNothingYet(t *testing.T) {
	apttest.UseSources(t, "a.list", "deb http://localhost:1/debian bookworm main\n")
	a := New(t.TempDir())
	if s, err := a.Sources(t.Context()); err == nil {
		t.Errorf("Sources = %q before Update", s)
	}
	if d, err := a.ReleaseTime(t.Context()); err == nil {
		t.Errorf("ReleaseTime = %v before Update", d)
	}
}

func TestCancel(t *testing.T) {
	stuck := make(chan struct{})
	asked := make(chan struct{}, 16)
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked <- struct{}{}
		<-stuck
	}))
	defer srv.Close()
	defer close(stuck)
	apttest.UseSources(t, "a.list", "deb [trusted=yes] "+srv.URL+" bookworm main\n")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	dir := t.TempDir()
	go func() { done <- New(dir).Update(ctx) }()
	select {
	case <-asked:
	case err := <-done:
		t.Fatalf("Update ended by itself: %v", err)
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("Update: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Update goes on after cancel")
	}
	// The lock is free again, and waiting for it ends with the context too.
	unlock, err := New(dir).lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if err := New(dir).Update(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Update of a locked directory: %v", err)
	}
}

func TestFirstAlternatives(t *testing.T) {
	got := firstAlternatives("a (= 1) | b, c:any [amd64],d(>= 2),, e | f")
	if want := []string{"a", "c", "d", "e"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := firstAlternatives(""); got != nil {
		t.Errorf("got %q of nothing", got)
	}
}

func TestTail(t *testing.T) {
	if got := tail("\n"); got != "" {
		t.Errorf("tail of nothing: %q", got)
	}
	if got := tail("1\n2\n3\n4\n5\n6\n"); got != ": 2\n3\n4\n5\n6" {
		t.Errorf("tail: %q", got)
	}
	if got := tail(strings.Repeat("x", 1<<20)); len(got) > 1100 {
		t.Errorf("tail of a long line is %d bytes", len(got))
	}
}

// TestDistribution asks the distribution itself.
func TestDistribution(t *testing.T) {
	testenv.NeedNet(t)
	a := New(filepath.Join(t.TempDir(), "apt"))
	if err := a.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	src, err := a.Sources(t.Context())
	t.Logf("sources %q, %v", src, err)
	if err != nil {
		t.Error(err)
	}
	date, err := a.ReleaseTime(t.Context())
	t.Logf("release time %v, %v", date, err)
	if err != nil || time.Since(date) > 10*365*24*time.Hour {
		t.Errorf("ReleaseTime = %v, %v", date, err)
	}
	deps, err := a.Depends(t.Context(), "base-files")
	if err != nil {
		t.Errorf("Depends = %q, %v", deps, err)
	}
	deb, err := a.Download(t.Context(), "hello", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Log(deb)
}
