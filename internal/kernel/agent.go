package kernel

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

//go:embed agent
var agentFiles embed.FS

const agentFile = "agent/ironclaw-init"

// Agent is a guest agent: the program which is /init of an initramfs.
type Agent struct {
	id   string                 // differs where the program does
	read func() ([]byte, error) // the program
}

// BuiltInAgent is the agent that is part of this program. It is an error if the
// program was built without one.
func BuiltInAgent() (Agent, error) {
	f, err := agentFiles.Open(agentFile)
	if err != nil {
		return Agent{}, errors.New("this program was built without its guest agent: build it with `make build`")
	}
	defer f.Close()
	// Reading and hashing all of it would cost each run ten milliseconds.
	head := make([]byte, 16<<10)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return Agent{}, fmt.Errorf("the guest agent this program was built with: %w", err)
	}
	a := Agent{read: func() ([]byte, error) { return agentFiles.ReadFile(agentFile) }}
	if id := buildID(head[:n]); id != "" {
		a.id = id
		return a, nil
	}
	b, err := a.read()
	if err != nil {
		return Agent{}, err
	}
	return AgentOf(b), nil
}

// AgentOf is the agent whose program is this.
func AgentOf(program []byte) Agent {
	sum := sha256.Sum256(program)
	return Agent{hex.EncodeToString(sum[:]), func() ([]byte, error) { return program, nil }}
}

// Program returns the agent's bytes. It is an error if they are no program.
func (a Agent) Program() ([]byte, error) {
	b, err := a.read()
	if err == nil {
		err = checkAgent(b)
	}
	if err != nil {
		return nil, fmt.Errorf("the guest agent: %w", err)
	}
	return b, nil
}

// buildID finds the id that the Go linker writes to the beginning of a program's
// text, the last part of which is a hash of the program (cmd/internal/buildid).
// It is "" if there is none.
func buildID(head []byte) string {
	_, rest, ok := bytes.Cut(head, []byte("\xff Go build ID: \""))
	id, _, ended := bytes.Cut(rest, []byte("\"\n \xff"))
	if !ok || !ended || len(id) < 40 {
		return ""
	}
	return "go " + string(id)
}

// checkAgent catches what would otherwise be a kernel panic without a word.
func checkAgent(data []byte) error {
	if len(data) < 4 || string(data[:4]) != "\x7fELF" {
		return fmt.Errorf("it is no program: %d bytes which are not ELF", len(data))
	}
	return nil
}
