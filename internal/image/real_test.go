package image_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/testenv"

	"github.com/ironclaw-run/ironclaw/internal/apt"
	"github.com/ironclaw-run/ironclaw/internal/image"
)

var _ image.Apt = (*apt.Apt)(nil)

// TestBuildBase builds the base image from the host's archives, as whoever runs
// the test: root and a normal user take different ways. IRONCLAW_TEST_IMAGES
// keeps the store.
func TestBuildBase(t *testing.T) {
	testenv.NeedNet(t)
	dir := os.Getenv("IRONCLAW_TEST_IMAGES")
	if dir == "" {
		dir = t.TempDir()
	}
	store := image.Open(dir)
	start := time.Now()
	img, err := store.Build(t.Context(), image.BuildOptions{
		Name: "base",
		Apt:  apt.New(t.TempDir()),
		Progress: func(step string) {
			t.Logf("%6.1fs %s", time.Since(start).Seconds(), step)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%6.1fs %s, %d bytes, %d packages, uid %d", time.Since(start).Seconds(), img.Digest, img.Size, len(img.Packages), os.Getuid())
	t.Logf("%+v", img.Recipe)
	got, err := store.Get(t.Context(), "base")
	if err != nil {
		t.Fatal(err)
	}
	if err := store.VerifyOnce(t.Context(), got); err != nil {
		t.Fatal(err)
	}
	for _, name := range image.BasePackages {
		if !slices.ContainsFunc(got.Packages, func(p image.Package) bool { return p.Name == name && p.Version != "" }) {
			t.Errorf("package %s is not recorded", name)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "builds", "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if e2fsck, err := exec.LookPath("e2fsck"); err == nil {
		out, err := exec.CommandContext(t.Context(), e2fsck, "-fn", got.Path).CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Errorf("e2fsck: %v", err)
		}
	}
}

// TestBuildStopped cancels a real build at the point where most is lying about,
// and asks for a package that does not exist.
func TestBuildStopped(t *testing.T) {
	testenv.NeedNet(t)
	dir := t.TempDir()
	store := image.Open(dir)
	source := apt.New(t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var stopped time.Time
	_, err := store.Build(ctx, image.BuildOptions{Name: "base", Apt: source, Progress: func(step string) {
		if strings.HasPrefix(step, "installing the base system") {
			time.AfterFunc(time.Second, func() { stopped = time.Now(); cancel() })
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	t.Logf("stopped within %v", time.Since(stopped).Round(time.Millisecond))
	var unknown *image.UnknownPackageError
	_, err = store.Build(t.Context(), image.BuildOptions{Name: "base", Apt: source, Packages: []string{"jq", "no-such-thing"}})
	if !errors.As(err, &unknown) || unknown.Package != "no-such-thing" {
		t.Errorf("unknown package: %v", err)
	}
	for _, pattern := range []string{filepath.Join(dir, "builds", "*"), "/var/tmp/ironclaw-image-*"} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}
