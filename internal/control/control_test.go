package control

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The directory's path is longer than a socket's name can be.
func serve(t *testing.T, handle Handler) (dir string, s *Server) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), strings.Repeat("long", 40))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := Serve(dir, handle)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return dir, s
}

func echo(_ context.Context, r Request) (any, error) {
	if r.Op == "bad" {
		return nil, errors.New("no such luck")
	}
	return r.Op + r.Op, nil
}

func TestAsk(t *testing.T) {
	dir, _ := serve(t, echo)
	var got string
	if err := Ask(t.Context(), dir, Request{"ab"}, &got); err != nil || got != "abab" {
		t.Errorf("%q, %v", got, err)
	}
	if err := Ask(t.Context(), dir, Request{"bad"}, &got); err == nil || err.Error() != "no such luck" {
		t.Error(err)
	}
}

// An endless request, garbage and silence end, and do not keep others from being answered.
func TestBadRequests(t *testing.T) {
	dir, _ := serve(t, echo)
	path, done, err := short(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	for _, what := range []string{"", "{", "\n", "{}\n", strings.Repeat("x", 2*maxRequest), strings.Repeat("[", maxRequest-1) + "\n"} {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, _ = conn.Write([]byte(what)) // it may have been closed meanwhile
	}
	var got string
	if err := Ask(t.Context(), dir, Request{"x"}, &got); err != nil || got != "xx" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestLongAnswer(t *testing.T) {
	dir, _ := serve(t, func(context.Context, Request) (any, error) { return strings.Repeat("x", maxAnswer), nil })
	var got string
	if err := Ask(t.Context(), dir, Request{"x"}, &got); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Error(err)
	}
}

func TestNobody(t *testing.T) {
	dir, s := serve(t, echo)
	s.Close()
	var got string
	for _, dir := range []string{dir, t.TempDir(), "/no/such"} {
		if err := Ask(t.Context(), dir, Request{"x"}, &got); !errors.Is(err, ErrNobody) {
			t.Error(err)
		}
	}
}

// Close does not wait for a handler that waits for its context, nor for who says nothing.
func TestCloseEndsAll(t *testing.T) {
	entered := make(chan struct{})
	dir, s := serve(t, func(ctx context.Context, _ Request) (any, error) {
		close(entered)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	path, done, err := short(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	silent, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	asked := make(chan error, 1)
	go func() {
		var got string
		asked <- Ask(context.Background(), dir, Request{"x"}, &got)
	}()
	<-entered
	s.Close()
	if err := <-asked; err == nil {
		t.Error("answered after Close")
	}
}
