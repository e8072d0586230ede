package jail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/layer"
)

// insideSelf is this program's place in such a jail.
const insideSelf = "/ironclaw"

// ownExe leads a process to its own executable, whoever may enter the directories above that.
const ownExe = "/proc/self/exe"

// Check makes a jail with this program in it and looks at every layer, as it is
// on this host for this user. The report has the layers that stand; the errors, each a *layer.Error
// but for one that is of no layer, say what the others lack. Nothing of it remains.
func Check(ctx context.Context, without layer.Set) (layer.Report, []error) {
	without = maps.Clone(without)
	if without == nil {
		without = layer.Set{}
	}
	var errs []error
	for {
		report, err := try(ctx, without)
		if err == nil {
			return report, errs
		}
		errs = append(errs, err)
		lacking, ok := errors.AsType[*layer.Error](err)
		if !ok || without[lacking.Layer] || ctx.Err() != nil {
			return nil, errs
		}
		without[lacking.Layer] = true // and look at the others
	}
}

func try(ctx context.Context, without layer.Set) (layer.Report, error) {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	j, err := Prepare(ctx, Options{ID: "check", Memory: 256 << 20, Without: without})
	if err != nil {
		return nil, err
	}
	defer j.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	files := []File{{Host: self, Inside: insideSelf}}
	needs, err := ProgramFiles(ctx, self)
	if err != nil {
		return nil, err
	}
	for _, path := range needs {
		files = append(files, File{Host: path, Inside: path})
	}
	p, err := j.Start(ctx, Program{
		Path: j.Path(ownExe, insideSelf), Args: []string{idleName},
		Files:       files,
		Descriptors: []*os.File{theirs},
		Stdout:      io.Discard, Stderr: io.Discard,
	})
	if err != nil {
		return nil, err
	}
	defer p.Close()
	theirs.Close()
	var b [1]byte
	if _, err := ours.Read(b[:]); err != nil {
		return nil, fmt.Errorf("run this program in a jail: %w", err)
	}
	return p.Verify(1)
}
