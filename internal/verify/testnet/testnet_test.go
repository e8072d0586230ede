package testnet

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// inside is in the environment of this test when it runs in the namespace. The
// marker of the package alone would make Open, which is tested, believe it.
const inside = "IRONCLAW_TESTNET_TEST"

// rerun runs this test once more in a new namespace.
func rerun(t *testing.T) {
	t.Helper()
	cmd := Command(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(cmd.Env, inside+"=1")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		testenv.Skip(t, "needs network namespaces: "+err.Error())
	}
	if strings.Contains(string(out), "--- SKIP") {
		testenv.Skip(t, string(out))
	}
	if err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
}

// A network that was made answers at every address, and the recorder counts what is
// said and nothing else.
func TestNet(t *testing.T) {
	if os.Getenv(inside) == "" {
		rerun(t)
		return
	}
	n, err := Open()
	if errors.Is(err, syscall.ENOTSUP) {
		testenv.Skip(t, "a normal user needs a program without cgo: CGO_ENABLED=0")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if err := n.Prove(); err != nil {
		t.Fatal(err)
	}
	before, err := n.Packets()
	if err != nil {
		t.Fatal(err)
	}
	after, err := n.Packets()
	if err != nil || after != before {
		t.Errorf("%d packets, then %d, %v: counting counts", before, after, err)
	}
	c, err := net.Dial("tcp", net.JoinHostPort(Metadata[0], HTTPPort))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if last, err := n.Packets(); err != nil || last <= after {
		t.Errorf("%d packets, then %d, %v: a connection was not seen", after, last, err)
	}
	// A second network in the same namespace is one in which something is already.
	if _, err := Open(); err == nil || !strings.Contains(err.Error(), "not new") {
		t.Errorf("a namespace in use was taken: %v", err)
	}
}

// Proof fails when a server has gone: it can fail.
func TestProveFails(t *testing.T) {
	if os.Getenv(inside) == "" {
		rerun(t)
		return
	}
	n, err := Open()
	if errors.Is(err, syscall.ENOTSUP) {
		testenv.Skip(t, "a normal user needs a program without cgo: CGO_ENABLED=0")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	_ = n.closers[len(n.closers)-1]()
	if err := n.Prove(); err == nil {
		t.Error("a server that is gone was proved")
	}
}

// Outside of a namespace of its own nothing is made.
func TestOpenOutside(t *testing.T) {
	if os.Getenv(inside) != "" {
		return
	}
	if _, err := Open(); err == nil {
		t.Fatal("the host's own network was taken")
	}
	t.Setenv(marker, "1") // a person who believes the environment
	if _, err := Open(); err == nil {
		t.Fatal("the host's own network was taken because the environment said so")
	}
}
