package sparse

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newFile(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	check(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func memfd(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	check(t, err)
	f := os.NewFile(uintptr(fd), "memfd")
	t.Cleanup(func() { f.Close() })
	return f
}

func allocated(t testing.TB, f *os.File) int64 {
	t.Helper()
	check(t, f.Sync())
	var st unix.Stat_t
	check(t, unix.Fstat(int(f.Fd()), &st))
	return st.Blocks * 512
}

// same copies want from src and compares.
func same(t testing.TB, src io.ReaderAt, want []byte) (written int64, dst *os.File) {
	t.Helper()
	dst = newFile(t)
	_, err := dst.WriteAt(bytes.Repeat([]byte("old"), 5000), 0) // has to go
	check(t, err)
	written, err = Copy(t.Context(), dst, src, int64(len(want)))
	check(t, err)
	got, err := os.ReadFile(dst.Name())
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Fatalf("the copy of %d bytes differs", len(want))
	}
	return written, dst
}

func TestCopies(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		want := make([]byte, rng.IntN(5<<20))
		src := memfd(t)
		for range rng.IntN(20) {
			if len(want) == 0 {
				break
			}
			off := rng.IntN(len(want))
			part := want[off:min(len(want), off+rng.IntN(100<<10))]
			for i := range part {
				part[i] = byte(rng.Uint32() | 1)
			}
			_, err := src.WriteAt(part, int64(off))
			check(t, err)
		}
		check(t, src.Truncate(int64(len(want))))
		a, _ := same(t, src, want)
		b, _ := same(t, bytes.NewReader(want), want) // no holes to be seen
		if a != b {
			t.Errorf("wrote %d bytes with and %d without holes", a, b)
		}
	}
}

func TestSparse(t *testing.T) {
	const size = 1 << 30
	src := memfd(t)
	check(t, src.Truncate(size))
	for _, off := range []int64{0, 4096*1000 + 17, 512 << 20, size - 1} {
		_, err := src.WriteAt([]byte{1}, off)
		check(t, err)
	}
	// Zeros that are not a hole.
	_, err := src.WriteAt(make([]byte, 4<<20), 100<<20)
	check(t, err)
	dst := newFile(t)
	written, err := Copy(t.Context(), dst, src, size)
	if err != nil || written != 4*block {
		t.Errorf("wrote %d bytes, %v", written, err)
	}
	if n := allocated(t, dst); n > 200<<10 {
		t.Errorf("%d bytes on the disk", n)
	}
	if st, _ := dst.Stat(); st.Size() != size {
		t.Errorf("%d bytes", st.Size())
	}
}

func TestShortSource(t *testing.T) {
	src := memfd(t)
	check(t, src.Truncate(5000))
	for _, r := range []io.ReaderAt{src, bytes.NewReader(make([]byte, 5000))} {
		if _, err := Copy(t.Context(), newFile(t), r, 5001); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%T: %v", r, err)
		}
	}
}

func TestErrors(t *testing.T) {
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	data := bytes.NewReader([]byte("x"))
	if _, err := Copy(ctx, newFile(t), data, 1); !errors.Is(err, cause) {
		t.Error(err)
	}
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	check(t, err)
	defer full.Close()
	if _, err := writeBlocks(full, []byte("x"), 0); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	f := newFile(t)
	check(t, f.Close())
	if _, err := Copy(t.Context(), f, data, 1); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}

func FuzzCopy(f *testing.F) {
	f.Add([]byte{1, 2, 3}, uint32(5000), uint32(60000))
	f.Add(make([]byte, 9000), uint32(0), uint32(4095))
	f.Fuzz(func(t *testing.T, data []byte, off, tail uint32) {
		off, tail = off%(64<<10), tail%(64<<10)
		want := append(append(make([]byte, off), data...), make([]byte, tail)...)
		src := memfd(t)
		_, err := src.WriteAt(data, int64(off))
		check(t, err)
		check(t, src.Truncate(int64(len(want))))
		same(t, src, want)
	})
}

// Memory of 1 GiB of which 80 MiB were touched.
func BenchmarkCopy(b *testing.B) {
	src := memfd(b)
	check(b, src.Truncate(1<<30))
	for i := range 80 {
		_, err := src.WriteAt(bytes.Repeat([]byte{1}, 1<<20), int64(i)*12<<20)
		check(b, err)
	}
	dst := newFile(b)
	b.SetBytes(80 << 20)
	for b.Loop() {
		_, err := Copy(b.Context(), dst, src, 1<<30)
		check(b, err)
	}
}
