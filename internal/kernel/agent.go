package kernel

import (
	"embed"
	"errors"
	"fmt"
)

//go:embed agent
var agentFiles embed.FS

// Agent returns the guest agent, the program which is /init of every initramfs.
// It is an error if this program was built without one.
func Agent() ([]byte, error) {
	data, err := agentFiles.ReadFile("agent/ironclaw-init")
	if err != nil {
		return nil, errors.New("this program was built without its guest agent: build it with `make build`")
	}
	if err := checkAgent(data); err != nil {
		return nil, fmt.Errorf("the guest agent this program was built with: %w", err)
	}
	return data, nil
}

// checkAgent catches what would otherwise be a kernel panic without a word.
func checkAgent(data []byte) error {
	if len(data) < 4 || string(data[:4]) != "\x7fELF" {
		return fmt.Errorf("it is no program: %d bytes which are not ELF", len(data))
	}
	return nil
}
