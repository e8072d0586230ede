package sandbox

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

var update = flag.Bool("update", false, "make the transcripts of testdata anew")

// Whatever a guest sends, the caller gets an exit or an error, no panic, and
// every goroutine ends: a bubble in which one is left fails.
func TestTranscripts(t *testing.T) {
	const path = "testdata/exec.txtar"
	archive, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i, file := range archive.Files {
		t.Run(file.Name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				script, _, _ := strings.Cut(string(file.Data), "\n= ")
				script += "\n"
				got := script + outcome(t, script)
				if d := cmp.Diff(string(file.Data), got); d != "" && !*update {
					t.Errorf("-want +got:\n%s", d)
				}
				if strings.HasPrefix(file.Name, "hostile") && !strings.Contains(got, "\n= error: ") {
					t.Error("the caller was told that all is well")
				}
				archive.Files[i].Data = []byte(got)
			})
		})
	}
	if *update {
		if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// outcome plays a script and says what the caller got.
func outcome(t *testing.T, script string) string {
	host, g := openStream(t)
	go func() {
		if _, err := g.ReadHeader(); err != nil {
			t.Errorf("read header: %v", err)
		}
		g.play(script)
	}()
	var stdout, stderr bytes.Buffer
	cmd := &Cmd{Stdout: &stdout, Stderr: &stderr}
	if _, input, ok := strings.Cut(script, "+ stdin "); ok {
		input, _, _ = strings.Cut(input, "\n")
		cmd.Stdin = strings.NewReader(input)
	}
	p, err := start(t.Context(), host, execHeader(), cmd, as)
	if err != nil {
		return fmt.Sprintf("= error: %s%v\n", codeOf(err), err)
	}
	exit, err := p.Wait(t.Context())
	text := ""
	if stdout.Len()+stderr.Len() > 0 {
		text = fmt.Sprintf("= stdout %q, stderr %q\n", &stdout, &stderr)
	}
	if err != nil {
		return text + fmt.Sprintf("= error: %s%v\n", codeOf(err), err)
	}
	return text + fmt.Sprintf("= pid %d, exit code %d, signal %d, out of memory %v\n", p.PID(), exit.Code, exit.Signal, exit.OOM)
}

func codeOf(err error) string {
	if e, ok := errors.AsType[*guestrpc.Error](err); ok {
		return "(" + string(e.Code) + ") "
	}
	return ""
}

// 10 MB each way through frames of all sizes arrive whole, in order and apart.
func TestOutputOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stdout, stderr := sha256.New(), sha256.New()
		p, g := startProcess(t, &Cmd{Stdout: stdout, Stderr: stderr})
		sent := map[guestrpc.Type]hash.Hash{guestrpc.FrameStdout: sha256.New(), guestrpc.FrameStderr: sha256.New()}
		random := rand.NewChaCha8([32]byte{1})
		for total := 0; total < 20<<20; {
			b := make([]byte, random.Uint64()%guestrpc.MaxFrame+1)
			random.Read(b)
			typ := guestrpc.FrameStdout + guestrpc.Type(random.Uint64()%2)
			if err := g.WriteFrame(typ, b); err != nil {
				t.Fatal(err)
			}
			sent[typ].Write(b)
			total += len(b)
		}
		go g.play("< exit {}\n> ack")
		if _, err := p.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(sent[guestrpc.FrameStdout].Sum(nil), stdout.Sum(nil)) {
			t.Error("stdout came changed")
		}
		if !bytes.Equal(sent[guestrpc.FrameStderr].Sum(nil), stderr.Sum(nil)) {
			t.Error("stderr came changed")
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// Never more input is under way than the guest has said it can keep; credit lets
// exactly as much more through.
func TestStdinWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, g := startProcess(t, &Cmd{Stdin: zeros{}})
		var mu sync.Mutex
		got := 0
		var wg sync.WaitGroup
		wg.Go(func() {
			for f, err := g.ReadFrame(); err == nil; f, err = g.ReadFrame() {
				mu.Lock()
				got += len(f.Payload)
				mu.Unlock()
			}
		})
		want := guestrpc.StdinWindow
		for _, credit := range []int{1, 10, guestrpc.MaxFrame, guestrpc.StdinWindow - 1, guestrpc.StdinWindow} {
			synctest.Wait() // the host has sent what it will send
			mu.Lock()
			if got != want {
				t.Errorf("%d bytes were sent, %d were allowed", got, want)
			}
			mu.Unlock()
			g.send("window", fmt.Sprintf(`{"bytes":%d}`, credit))
			want += credit
		}
		synctest.Wait()
		g.send("exit", "{}")
		if _, err := p.Wait(t.Context()); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if got != want {
			t.Errorf("%d bytes were sent, %d were allowed", got, want)
		}
	})
}

// readerFunc is a reader of the caller's that does what it wants.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// A terminal on which nobody types must not hold up the end of the command.
func TestStuckStdinDoesNotHoldUpWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		typed := make(chan struct{})
		p, g := startProcess(t, &Cmd{Stdin: readerFunc(func([]byte) (int, error) {
			<-typed
			return 0, io.EOF
		})})
		go g.play(`< exit {"code":5}`)
		if exit, err := p.Wait(t.Context()); err != nil || exit.Code != 5 {
			t.Errorf("%+v, %v", exit, err)
		}
		close(typed)
	})
}

// A read error ends the input as its end does: a command that reads to the end
// must not wait for ever.
func TestStdinError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, g := startProcess(t, &Cmd{Stdin: io.MultiReader(strings.NewReader("some"), readerFunc(func([]byte) (int, error) {
			return 0, errors.New("disk on fire")
		}))})
		go g.play("> stdin some\n> stdin\n< exit {}\n> ack")
		if _, err := p.Wait(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// brokenWriter fails after a first write, and counts what is still tried.
type brokenWriter struct {
	err   error
	tries int
}

func (w *brokenWriter) Write(p []byte) (int, error) {
	if w.tries++; w.tries > 1 {
		return 0, w.err
	}
	return len(p), nil
}

// As with a pipe: the group gets one SIGPIPE, the rest is dropped, the exit is
// still told.
func TestReaderOfOutputGoes(t *testing.T) {
	for _, broken := range []error{syscall.EPIPE, &os.PathError{Op: "write", Path: "|1", Err: syscall.EPIPE}, io.ErrClosedPipe} {
		t.Run(broken.Error(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &brokenWriter{err: broken}
				var stderr bytes.Buffer
				p, g := startProcess(t, &Cmd{Stdout: w, Stderr: &stderr})
				go g.play("< stdout 1\n< stdout 2\n> signal {\"Number\":13,\"Group\":true}\n< stdout 3\n< stdout 4\n< stderr x\n" +
					"< exit {\"signal\":13}\n> ack")
				exit, err := p.Wait(t.Context())
				if err != nil || exit.Signal != 13 {
					t.Errorf("%+v, %v", exit, err)
				}
				if w.tries != 2 || stderr.String() != "x" {
					t.Errorf("%d writes to a reader that has gone, stderr %q", w.tries, &stderr)
				}
			})
		})
	}
}

// Both outputs may have one reader: one SIGPIPE is enough.
func TestBothReadersGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, g := startProcess(t, &Cmd{Stdout: &brokenWriter{err: syscall.EPIPE, tries: 1}, Stderr: &brokenWriter{err: syscall.EPIPE, tries: 1}})
		go g.play("< stdout 1\n> signal {\"Number\":13,\"Group\":true}\n< stderr 2\n< exit {\"code\":1}\n> ack")
		if exit, err := p.Wait(t.Context()); err != nil || exit.Code != 1 {
			t.Errorf("%+v, %v", exit, err)
		}
	})
}

// A guest that takes nothing more must not, by the SIGPIPE that it does not
// take, keep its exit from being read. (No bubble: its clock stands still while
// a goroutine waits for a mutex, here for the answer to the exit.)
func TestReaderGoesAndGuestDoesNotListen(t *testing.T) {
	t.Parallel()
	p, g := startProcess(t, &Cmd{Stdout: &brokenWriter{err: syscall.EPIPE, tries: 1}})
	g.send("stdout", "1")
	go g.send("exit", `{"code":1}`)
	if exit, err := p.Wait(t.Context()); err != nil || exit.Code != 1 {
		t.Errorf("%+v, %v", exit, err)
	}
}

// Output that cannot be written is lost, and the caller has to hear of it.
func TestOutputError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, g := startProcess(t, &Cmd{Stderr: &brokenWriter{err: syscall.ENOSPC}})
		go g.play("< stderr 1\n< stderr 2\n< stderr 3\n< exit {}")
		if exit, err := p.Wait(t.Context()); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%+v, %v", exit, err)
		}
	})
}

func TestSignalAndResize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, g := startProcess(t, &Cmd{})
		go g.play("> signal {\"Number\":15,\"Group\":false}\n> signal {\"Number\":9,\"Group\":true}\n> resize {\"Rows\":24,\"Cols\":80}\n< exit {}\n> ack")
		for _, err := range []error{p.Signal(syscall.SIGTERM, false), p.Signal(syscall.SIGKILL, true), p.Resize(guestrpc.Resize{Rows: 24, Cols: 80})} {
			if err != nil {
				t.Error(err)
			}
		}
		<-p.Done()
		if err := errors.Join(p.Signal(syscall.SIGTERM, false), p.Resize(guestrpc.Resize{})); err != nil {
			t.Errorf("a signal for a command that has ended: %v", err)
		}
	})
}

// A guest that does not listen holds up a signal, but not Close.
func TestCloseUnblocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := startProcess(t, &Cmd{})
		var wg sync.WaitGroup
		wg.Go(func() { _ = p.Signal(syscall.SIGTERM, true) })
		synctest.Wait()
		for range 3 {
			wg.Go(func() {
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		if _, err := p.Wait(t.Context()); err == nil {
			t.Error("a command that was hung up has an exit")
		}
		wg.Wait()
	})
}

// The guest says its last word and does not wait for the answer, or does not
// take it: the exit counts.
func TestExitIsNotHeldUpByAck(t *testing.T) {
	for name, then := range map[string]func(*guestEnd){
		"gone": func(g *guestEnd) { g.conn.Close() }, "deaf": func(*guestEnd) {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, g := startProcess(t, &Cmd{Stdin: zeros{}})
			g.send("exit", `{"code":4}`)
			then(g)
			if exit, err := p.Wait(t.Context()); err != nil || exit.Code != 4 {
				t.Errorf("%+v, %v", exit, err)
			}
		})
	}
}

// ctx bounds a wait and not the command.
func TestWaitCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, g := startProcess(t, &Cmd{})
		ctx, cancel := context.WithCancelCause(t.Context())
		cause := errors.New("enough")
		cancel(cause)
		if _, err := p.Wait(ctx); !errors.Is(err, cause) {
			t.Errorf("cancelled: %v", err)
		}
		go g.play(`< exit {"code":4}`)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if exit, err := p.Wait(t.Context()); err != nil || exit.Code != 4 {
					t.Errorf("%+v, %v", exit, err)
				}
			})
		}
		wg.Wait()
	})
}

// A start whose caller loses patience hangs up, so that nothing is left running.
func TestStartCancelled(t *testing.T) {
	for name, guest := range map[string]func(*guestEnd){
		"guest that takes nothing": func(*guestEnd) {},
		"guest that says nothing":  func(g *guestEnd) { g.ReadHeader(); g.drain() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				cause := errors.New("enough")
				host, g := openStream(t)
				go guest(g)
				go func() { synctest.Wait(); cancel(cause) }()
				p, err := start(ctx, host, execHeader(), &Cmd{}, as)
				if p != nil || !errors.Is(err, cause) {
					t.Errorf("start: %v, %v", p, err)
				}
				if _, err := g.ReadFrame(); !errors.Is(err, io.EOF) {
					t.Errorf("the host has not hung up: %v", err)
				}
			})
		})
	}
}

// The guest's words are shown: not without end, and not none at all.
func TestRemoteErrorIsBounded(t *testing.T) {
	for _, message := range []string{"", " \n ", strings.Repeat("ä", 30_000), "no \xff", strings.Repeat("\xff", 60_000)} {
		var buf bytes.Buffer
		guestrpc.NewStream(&buf).WriteMessage(guestrpc.FrameError, guestrpc.Errorf(guestrpc.CodeNotFound, "%s", message))
		f, err := guestrpc.NewStream(&buf).ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		err = remoteError(f)
		text := err.Error()
		if !errors.Is(err, guestrpc.ErrNotFound) || strings.TrimSpace(text) == "" || len(text) > 600 || strings.ToValidUTF8(text, "") != text {
			t.Errorf("message of %d bytes became %d bytes: %.60q", len(message), len(text), text)
		}
	}
}
