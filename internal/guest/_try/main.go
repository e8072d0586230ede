package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
	"github.com/ironclaw-run/ironclaw/internal/link"
)

var mux *link.Mux
var secret = make([]byte, 32)

func main() {
	sock := flag.String("sock", "", "")
	overlay := flag.Int64("overlay", 0, "")
	pids := flag.Int("pids", 0, "")
	user := flag.String("user", "", "")
	tty := flag.Bool("tty", false, "")
	killAll := flag.Bool("killall", false, "")
	par := flag.Int("par", 1, "")
	noHello := flag.Bool("nohello", false, "")
	flag.Parse()
	t0 := time.Now()
	c, err := net.Dial("unix", *sock)
	must(err)
	mux = link.NewMux(c, link.HostSide)
	rand.Read(secret)
	if !*noHello {
		hello(*overlay, *pids)
		fmt.Println("hello answered after", time.Since(t0))
	}
	for _, cmd := range flag.Args() {
		t := time.Now()
		done := make(chan struct{})
		for i := 0; i < *par; i++ {
			go func() {
				run(cmd, *user, *tty, *killAll)
				done <- struct{}{}
			}()
		}
		for i := 0; i < *par; i++ {
			<-done
		}
		fmt.Printf("  [%v]\n", time.Since(t).Round(time.Millisecond))
	}
}

func dial(port uint32) (net.Conn, *guestrpc.Stream) {
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		conn, err := mux.Dial(ctx, port)
		cancel()
		if err == nil {
			return conn, guestrpc.NewStream(conn)
		}
		must(err)
	}
}

func hello(overlay int64, pids int) {
	_, st := dial(guestrpc.PortHello)
	e := make([]byte, 64)
	rand.Read(e)
	must(st.WriteHeader(&guestrpc.Header{Version: 1, Op: guestrpc.OpHello, Hello: &guestrpc.Hello{Secret: secret, Entropy: e, Now: time.Now(), Hostname: "try-1", Nonce: "n", Overlay: overlay, Pids: pids}}))
	f, err := st.ReadFrame()
	must(err)
	fmt.Println("hello:", f.Type, string(f.Payload))
	var r guestrpc.HelloReply
	json.Unmarshal(f.Payload, &r)
	fmt.Printf("timings: %+v\n", r.Timings)
	must(st.WriteFrame(guestrpc.FrameAck, nil))
}

func run(cmd, user string, tty, killAll bool) {
	conn, st := dial(guestrpc.PortAgent)
	defer conn.Close()
	ex := &guestrpc.Exec{Args: []string{"sh", "-c", cmd}, User: user, KillAll: killAll}
	if a, ok := strings.CutPrefix(cmd, "!"); ok {
		ex.Args = strings.Fields(a)
	}
	if tty {
		ex.TTY = &guestrpc.Resize{Rows: 33, Cols: 99}
	}
	must(st.WriteHeader(&guestrpc.Header{Version: 1, Op: guestrpc.OpExec, Secret: secret, Exec: ex}))
	var out bytes.Buffer
	n := 0
	for {
		f, err := st.ReadFrame()
		if err != nil {
			fmt.Println("stream:", err)
			os.Exit(1)
		}
		switch f.Type {
		case guestrpc.FrameStdout, guestrpc.FrameStderr:
			n += len(f.Payload)
			if out.Len() < 20000 {
				out.Write(f.Payload)
			}
		case guestrpc.FrameStarted:
		case guestrpc.FrameExit, guestrpc.FrameError:
			fmt.Printf("$ %.100s\n%s  -> %s (%d bytes)\n", cmd, out.String(), f.Payload, n)
			st.WriteFrame(guestrpc.FrameAck, nil)
			return
		}
	}
}

func must(err error) {
	if err != nil {
		fmt.Println("try:", err)
		os.Exit(1)
	}
}
