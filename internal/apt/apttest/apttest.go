// Package apttest lets tests of what uses apt run without the network: an archive
// of packages on a local HTTP server, and the host's apt told to read nothing but
// the sources of the test.
package apttest

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// Archive is a package archive, served at URL until the test ends. Sources have to
// say [trusted=yes], since it is not signed.
type Archive struct {
	*httptest.Server

	mu     sync.Mutex
	files  map[string][]byte
	served map[string]int
}

// NewArchive returns an empty archive.
func NewArchive(t *testing.T) *Archive {
	t.Helper()
	ar := &Archive{files: make(map[string][]byte), served: make(map[string]int)}
	ar.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := strings.TrimPrefix(r.URL.Path, "/")
		ar.mu.Lock()
		ar.served[path]++
		ar.mu.Unlock()
		data, ok := ar.File(path)
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Write(data)
	}))
	t.Cleanup(ar.Close)
	return ar
}

// File returns a file of the archive.
func (ar *Archive) File(path string) ([]byte, bool) {
	ar.mu.Lock()
	defer ar.mu.Unlock()
	data, ok := ar.files[path]
	return data, ok
}

// SetFile puts a file into the archive.
func (ar *Archive) SetFile(path string, data []byte) {
	ar.mu.Lock()
	defer ar.mu.Unlock()
	ar.files[path] = data
}

// Served returns how often a file was asked for.
func (ar *Archive) Served(path string) int {
	ar.mu.Lock()
	defer ar.mu.Unlock()
	return ar.served[path]
}

// Publish makes a suite, of component main, out of stanzas as AddDeb returns them.
func (ar *Archive) Publish(t *testing.T, suite, origin, date, packages string) {
	t.Helper()
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	w.Write([]byte(packages))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	base := "dists/" + suite + "/"
	ar.SetFile(base+"main/binary-amd64/Packages.gz", gz.Bytes())
	ar.SetFile(base+"Release", fmt.Appendf(nil, `Origin: %s
Label: %[1]s
Suite: %s
Codename: %[2]s
Date: %s
Architectures: amd64
Components: main
SHA256:
 %x %d main/binary-amd64/Packages
 %x %d main/binary-amd64/Packages.gz
`, origin, suite, date, sha256.Sum256([]byte(packages)), len(packages), sha256.Sum256(gz.Bytes()), gz.Len()))
}

// DebPath returns where in the archive AddDeb puts a package.
func DebPath(name, version string) string {
	return "pool/" + name + "_" + version + "_amd64.deb"
}

// AddDeb builds a package of the given files, puts it into the archive, and
// returns its stanza for Publish.
func (ar *Archive) AddDeb(t *testing.T, name, version, depends string, files map[string][]byte) string {
	t.Helper()
	root := t.TempDir()
	control := fmt.Sprintf("Package: %s\nVersion: %s\nArchitecture: amd64\nMaintainer: A <a@example.org>\nDescription: test\n", name, version)
	if depends != "" {
		control += "Depends: " + depends + "\n"
	}
	write(t, filepath.Join(root, "DEBIAN/control"), []byte(control))
	for path, data := range files {
		write(t, filepath.Join(root, path), data)
	}
	deb := filepath.Join(t.TempDir(), "x.deb")
	if out, err := exec.CommandContext(t.Context(), "dpkg-deb", "-Zgzip", "--root-owner-group", "-b", root, deb).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v\n%s", err, out)
	}
	data, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	path := DebPath(name, version)
	ar.SetFile(path, data)
	return fmt.Sprintf("%sFilename: %s\nSize: %d\nSHA256: %x\n\n", control, path, len(data), sha256.Sum256(data))
}

// Need skips the test on a host without apt and dpkg.
func Need(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("no %s here: run this test on Debian or Ubuntu", tool)
		}
	}
}

// UseSources makes apt read this file of sources instead of the host's until the
// test ends. It returns a directory in which the file hook-ran appears if apt runs
// the hooks of the configuration.
func UseSources(t *testing.T, name, content string) string {
	t.Helper()
	Need(t)
	etc := t.TempDir()
	parts := filepath.Join(etc, "parts")
	write(t, filepath.Join(parts, name), []byte(content))
	conf := fmt.Sprintf(`Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "%s";
Acquire::Retries "0";
Acquire::http::Proxy "DIRECT";
APT::Architecture "amd64";
APT::Update::Post-Invoke { "touch %s/hook-ran"; };
`, parts, etc)
	write(t, filepath.Join(etc, "apt.conf"), []byte(conf))
	t.Setenv("APT_CONFIG", filepath.Join(etc, "apt.conf"))
	return etc
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
