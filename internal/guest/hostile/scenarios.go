package hostile

import (
	"bytes"
	"io"
	"maps"
	"math"
	"strings"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

// muxScenarios have the port to themselves, the host's first stream being open.
func muxScenarios() map[string]muxAttack {
	return map[string]muxAttack{
		"mux-garbage": func(port io.ReadWriteCloser, _ uint32) error {
			return endless(port, bytes.Repeat([]byte{0xa5, 0xff, 0x00, 0x13}, 4096))
		},
		"mux-zeros": func(port io.ReadWriteCloser, _ uint32) error { return endless(port, make([]byte, 16<<10)) },
		"mux-length": func(port io.ReadWriteCloser, stream uint32) error {
			return endless(port, muxFrame(frameData, 0xffffff, stream, make([]byte, 4096)))
		},
		"mux-truncated": func(port io.ReadWriteCloser, stream uint32) error {
			return once(port, muxFrame(frameData, 64<<10, stream, make([]byte, 100)))
		},
		"mux-header-only": func(port io.ReadWriteCloser, _ uint32) error { return once(port, []byte{frameData, 0, 1}) },
		"mux-unknown-stream": func(port io.ReadWriteCloser, _ uint32) error {
			return endless(port, muxFrame(frameData, 4, 77777, []byte("here")))
		},
		"mux-open-flood":   func(port io.ReadWriteCloser, _ uint32) error { return openFlood(port, 2) },
		"mux-open-foreign": func(port io.ReadWriteCloser, stream uint32) error { return openFlood(port, stream) },
		"mux-open-hello": func(port io.ReadWriteCloser, _ uint32) error {
			return once(port, muxFrame(frameOpen, 2, 2, []byte{0, 1}))
		},
		"mux-window": func(port io.ReadWriteCloser, stream uint32) error {
			// A frame of hello that would be 4 GiB, and more than anybody may send unread.
			return endless(port, muxFrame(frameData, 64<<10, stream, append([]byte{16, 0, 0, 0xff, 0xff}, make([]byte, 64<<10-5)...)))
		},
		"mux-credit": func(port io.ReadWriteCloser, stream uint32) error {
			return endless(port, muxFrame(frameCredit, 4, stream, []byte{0xff, 0xff, 0xff, 0xff}))
		},
		"mux-credit-short": func(port io.ReadWriteCloser, stream uint32) error {
			return once(port, muxFrame(frameCredit, 1, stream, []byte{1}))
		},
		"mux-opened-twice": func(port io.ReadWriteCloser, stream uint32) error {
			return endless(port, muxFrame(frameOpened, 0, stream, nil))
		},
		"mux-reset": func(port io.ReadWriteCloser, stream uint32) error {
			return endless(port, muxFrame(frameReset, 0, stream, nil))
		},
		"mux-close-twice": func(port io.ReadWriteCloser, stream uint32) error {
			return endless(port, muxFrame(frameClose, 0, stream, nil))
		},
		"mux-data-after-close": func(port io.ReadWriteCloser, stream uint32) error {
			return once(port, append(muxFrame(frameClose, 0, stream, nil), muxFrame(frameData, 4, stream, []byte("more"))...))
		},
		"mux-empty-data": func(port io.ReadWriteCloser, stream uint32) error {
			return endless(port, bytes.Repeat(muxFrame(frameData, 0, stream, nil), 512))
		},
		"mux-slow": func(port io.ReadWriteCloser, stream uint32) error {
			slowly(port, muxFrame(frameData, 60, stream, make([]byte, 60)))
			return stay()
		},
		"mux-silent": func(io.ReadWriteCloser, uint32) error { return stay() },
		"mux-hang-up": func(port io.ReadWriteCloser, _ uint32) error {
			_ = port.Close()
			return stay()
		},
		"mux-end": func(io.ReadWriteCloser, uint32) error { return io.EOF }, // the machine ends
	}
}

type muxAttack func(port io.ReadWriteCloser, stream uint32) error

// endless writes the same until the host has hung up, and does not read: the host
// must not wait for that.
func endless(port io.Writer, b []byte) error {
	forever(func() error {
		_, err := port.Write(b)
		return err
	})
	return stay()
}

func once(port io.Writer, b []byte) error {
	if _, err := port.Write(b); err != nil {
		return err
	}
	return stay()
}

// openFlood opens streams towards the host.
func openFlood(port io.Writer, first uint32) error {
	id := first
	forever(func() error {
		var b []byte
		for range 512 {
			b = append(b, muxFrame(frameOpen, 4, id, []byte{0, 0, 4, 0})...)
			id += 2
		}
		_, err := port.Write(b)
		return err
	})
	return stay()
}

// escapes is a message that would take over a terminal: clear it, set its title,
// make it answer, switch its character set.
func escapes() string {
	const all = "\x1b[2J\x1b]0;pwned\x07\x1b[6n\x0e\u202e\x9b5n\r\n"
	return strings.Repeat(all, 60<<10/len(all))
}

// helloScenarios have a stream on which the host waits for the answer to hello.
func helloScenarios() map[string]func(p peer) {
	return map[string]func(p peer){
		"hello-type":      func(p peer) { _ = p.frame(guestrpc.FrameStarted, &guestrpc.Started{PID: 1}) },
		"hello-type-zero": func(p peer) { _ = p.raw(0, 0, nil) },
		"hello-4g":        func(p peer) { _ = p.raw(guestrpc.FrameHello, math.MaxUint32, make([]byte, 4096)) },
		"hello-2g":        func(p peer) { _ = p.raw(guestrpc.FrameHello, 1<<31, make([]byte, 4096)) },
		"hello-1g":        func(p peer) { p.fill(guestrpc.FrameHello) },
		"hello-big":       func(p peer) { _ = p.raw(guestrpc.FrameHello, guestrpc.MaxFrame+1, make([]byte, 4096)) },
		"hello-truncated": func(p peer) { _ = p.raw(guestrpc.FrameHello, 100, make([]byte, 10)) },
		"hello-garbage":   func(p peer) { _ = p.raw(guestrpc.FrameHello, 100, bytes.Repeat([]byte{0xff}, 100)) },
		"hello-trailing": func(p peer) {
			_ = p.frame(guestrpc.FrameHello, &guestrpc.HelloReply{Version: guestrpc.Version, Nonce: p.nonce})
			forever(func() error { return p.raw(guestrpc.FrameHello, 1000, make([]byte, 1000)) })
		},
		"hello-silent": func(peer) {},
		"hello-slow":   func(p peer) { slowly(p.conn, make([]byte, 600)) },
		"hello-hang-up": func(p peer) {
			p.conn.Close()
		},
		"hello-hang-up-inside": func(p peer) {
			_ = p.raw(guestrpc.FrameHello, 100, make([]byte, 10))
			p.conn.Close()
		},
		"hello-nonce": func(p peer) {
			_ = p.frame(guestrpc.FrameHello, &guestrpc.HelloReply{Version: guestrpc.Version, Nonce: "another"})
		},
		"hello-version": func(p peer) {
			_ = p.frame(guestrpc.FrameHello, &guestrpc.HelloReply{Version: guestrpc.Version + 1, Nonce: p.nonce})
		},
		"hello-clock": func(p peer) { forever(func() error { return p.st.WriteFrame(guestrpc.FrameClock, nil) }) },
		"hello-error": func(p peer) {
			_ = p.frame(guestrpc.FrameError, &guestrpc.Error{Code: "\x1b[31m", Message: escapes()})
		},
		"hello-output": func(p peer) {
			forever(func() error { return p.st.WriteFrame(guestrpc.FrameStdout, make([]byte, guestrpc.MaxFrame)) })
		},
	}
}

// execScenarios have a stream on which the host has asked for a command.
func execScenarios() map[string]func(p peer) {
	all := map[string]func(p peer){
		"exec-silent":  func(peer) { time.Sleep(time.Hour) },
		"exec-hang-up": func(peer) {},
		"exec-hang-up-started": func(p peer) {
			p.started()
		},
		"exec-hang-up-inside": func(p peer) {
			p.started()
			_ = p.raw(guestrpc.FrameStdout, 1000, make([]byte, 10))
		},
		"exec-no-started": func(p peer) { p.exit(0) },
		"exec-started-twice": func(p peer) {
			p.started()
			p.started()
			time.Sleep(time.Hour)
		},
		"exec-exit-twice": func(p peer) {
			p.started()
			p.exit(0)
			p.exit(1)
			time.Sleep(time.Hour)
		},
		"exec-output-after-exit": func(p peer) {
			p.started()
			p.exit(0)
			p.output()
		},
		"exec-error": func(p peer) {
			_ = p.frame(guestrpc.FrameError, &guestrpc.Error{Code: guestrpc.CodeNotFound, Message: escapes()})
			time.Sleep(time.Hour)
		},
		"exec-error-late": func(p peer) {
			p.started()
			_ = p.frame(guestrpc.FrameError, &guestrpc.Error{Code: "no such code", Message: escapes()})
			time.Sleep(time.Hour)
		},
		"exec-output": func(p peer) {
			p.started()
			p.output()
		},
		"exec-empty-output": func(p peer) {
			p.started()
			forever(func() error { return p.st.WriteFrame(guestrpc.FrameStdout, nil) })
		},
		"exec-slow": func(p peer) { slowly(p.conn, make([]byte, 600)) },
		"exec-clock": func(p peer) {
			p.started()
			forever(func() error { return p.st.WriteFrame(guestrpc.FrameClock, nil) })
		},
	}
	maps.Copy(all, cutFrames())
	maps.Copy(all, longFrames())
	maps.Copy(all, execLies())
	return all
}

// longFrames are frames that say that they are longer than any may be.
func longFrames() map[string]func(p peer) {
	return map[string]func(p peer){
		"exec-4g": func(p peer) {
			p.started()
			_ = p.raw(guestrpc.FrameStdout, math.MaxUint32, nil)
			forever(func() error { _, err := p.conn.Write(make([]byte, 64<<10)); return err })
		},
		"exec-1g": func(p peer) {
			p.started()
			p.fill(guestrpc.FrameStdout)
		},
		"exec-2g": func(p peer) { _ = p.raw(guestrpc.FrameStarted, 1<<31, nil); time.Sleep(time.Hour) },
	}
}

// execLies are frames that are whole and say what cannot be.
func execLies() map[string]func(p peer) {
	return map[string]func(p peer){
		"exec-exit-code": func(p peer) {
			p.started()
			_ = p.frame(guestrpc.FrameExit, &guestrpc.Exit{Code: 1 << 40, Signal: -9})
			time.Sleep(time.Hour)
		},
		"exec-credit": func(p peer) {
			p.started()
			forever(func() error { return p.frame(guestrpc.FrameWindow, &guestrpc.Window{Bytes: math.MaxInt64}) })
		},
		"exec-credit-negative": func(p peer) {
			p.started()
			forever(func() error { return p.frame(guestrpc.FrameWindow, &guestrpc.Window{Bytes: math.MinInt64}) })
		},
	}
}

// cutFrames are frames of every type, cut off within the payload, and with a
// payload that is shorter than what it has to hold.
func cutFrames() map[string]func(p peer) {
	all := make(map[string]func(p peer))
	for name, t := range map[string]guestrpc.Type{
		"hello": guestrpc.FrameHello, "started": guestrpc.FrameStarted, "stdout": guestrpc.FrameStdout, "stderr": guestrpc.FrameStderr,
		"window": guestrpc.FrameWindow, "exit": guestrpc.FrameExit, "error": guestrpc.FrameError, "unknown": 0xee,
	} {
		all["exec-truncated-"+name] = func(p peer) {
			_ = p.raw(t, 64, make([]byte, 5))
			p.conn.Close()
		}
		all["exec-short-"+name] = func(p peer) {
			_ = p.raw(t, 3, []byte{1, 2, 3})
			time.Sleep(time.Hour)
		}
	}
	return all
}

// fill sends a frame of a GiB, all of it: a host that lets a peer choose how much it
// allocates has that much less.
func (p peer) fill(t guestrpc.Type) {
	_ = p.raw(t, 1<<30, nil)
	forever(func() error { _, err := p.conn.Write(make([]byte, 64<<10)); return err })
}

func (p peer) started() { _ = p.frame(guestrpc.FrameStarted, &guestrpc.Started{PID: 1}) }

func (p peer) exit(code int) { _ = p.frame(guestrpc.FrameExit, &guestrpc.Exit{Code: code}) }

// output writes without an end.
func (p peer) output() {
	b := bytes.Repeat([]byte("\x1b[2J"), guestrpc.MaxFrame/4)
	forever(func() error { return p.st.WriteFrame(guestrpc.FrameStdout, b) })
}
