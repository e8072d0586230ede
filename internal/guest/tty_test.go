package guest

import (
	"strings"
	"testing"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

func TestTTY(t *testing.T) {
	h := startAgent(t)
	size := &guestrpc.Resize{Rows: 33, Cols: 101}
	r := h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", "tty; stty size; echo $TERM; echo err >&2"}, TTY: size, Stdin: true}).wait()
	lines := strings.Split(string(r.stdout), "\r\n")
	if len(lines) != 5 || !strings.HasPrefix(lines[0], "/dev/pts/") || lines[1] != "33 101" || lines[2] != "xterm" || lines[3] != "err" {
		t.Errorf("%q", r.stdout)
	}
	if len(r.stderr) != 0 {
		t.Errorf("stderr %q", r.stderr)
	}
}

func TestTTYResize(t *testing.T) {
	h := startAgent(t)
	s := h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"}, TTY: &guestrpc.Resize{}})
	s.started()
	s.next()
	s.WriteMessage(guestrpc.FrameResize, &guestrpc.Resize{Rows: 7, Cols: 9})
	if r := s.wait(); !strings.Contains(string(r.stdout), "7 9") {
		t.Errorf("%q", r.stdout)
	}
}

func TestTTYEndOfInput(t *testing.T) {
	h := startAgent(t)
	for _, input := range []string{"", "line\n", "half"} {
		s := h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", "stty -echo; echo ready; exec cat"}, TTY: &guestrpc.Resize{}, Stdin: true})
		s.started()
		s.next()
		s.write([]byte(input), nil)
		s.WriteFrame(guestrpc.FrameStdin, nil)
		if r := s.wait(); strings.TrimSpace(string(r.stdout)) != strings.TrimSpace(input) || r.exit.Code != 0 {
			t.Errorf("%q: %q %+v", input, r.stdout, r.exit)
		}
	}
}

func TestTTYWholeOutput(t *testing.T) {
	h := startAgent(t)
	for range 20 {
		r := h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", "head -c 100000 /dev/zero"}, TTY: &guestrpc.Resize{}}).wait()
		if len(r.stdout) != 100000 {
			t.Fatalf("%d bytes", len(r.stdout))
		}
	}
}

// One who has left the terminal's session keeps it open and must not be waited for.
func TestTTYHeldOpen(t *testing.T) {
	h := startAgent(t)
	start := time.Now()
	r := h.exec(&guestrpc.Exec{Args: []string{"sh", "-c", "setsid sleep 1000 & sleep 0.2; echo $!"}, TTY: &guestrpc.Resize{}}).wait()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	kill(t, r.stdout)
}
