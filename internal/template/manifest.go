package template

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
	"time"
)

const maxManifest = 64 << 10

// content is a file of a template, as its manifest has it.
type content struct {
	Size   int64  `json:"size"` // bytes, holes included
	Digest string `json:"digest"`
}

// manifest is manifest.json.
type manifest struct {
	Version int       `json:"version"`
	ID      string    `json:"id"`
	UID     int       `json:"uid"`
	Created time.Time `json:"created"`
	Inputs  Inputs    `json:"inputs"`
	Memory  content   `json:"memory"`
	State   content   `json:"state"`
	// Sum is the checksum of the manifest without it, against bad disks: there is
	// no secret in it.
	Sum string `json:"sum"`
}

func newManifest(in Inputs) *manifest {
	return &manifest{
		Version: formatVersion, ID: in.ID(), UID: os.Geteuid(),
		Created: time.Now().UTC().Round(0), Inputs: maps.Clone(in),
	}
}

func (m *manifest) sum() (string, error) {
	bare := *m
	bare.Sum = ""
	b, err := json.Marshal(bare)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

// format sets the checksum and returns the file.
func (m *manifest) format() ([]byte, error) {
	sum, err := m.sum()
	if err != nil {
		return nil, err
	}
	m.Sum = sum
	b, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return nil, err
	}
	if len(b) >= maxManifest {
		return nil, fmt.Errorf("a manifest of %d bytes; at most %d", len(b), maxManifest)
	}
	return append(b, '\n'), nil
}

// checkInputs says whether a manifest can hold these inputs.
func checkInputs(in Inputs) error {
	m := newManifest(in)
	widest := content{Size: 1<<63 - 1, Digest: digestPrefix + strings.Repeat("0", 2*sha256.Size)}
	m.Memory, m.State = widest, widest
	b, err := m.format()
	if err != nil {
		return err
	}
	_, err = parseManifest(b, m.ID) // text that is not UTF-8 does not come back
	return err
}

// parseManifest reads the manifest of the template id. It accepts only what
// format writes, byte for byte.
func parseManifest(b []byte, id string) (*manifest, error) {
	if len(b) > maxManifest {
		return nil, fmt.Errorf("more than %d bytes", maxManifest)
	}
	var m manifest
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&m); err != nil {
		return nil, fmt.Errorf("not a manifest: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("more follows it")
	}
	switch {
	case m.Version != formatVersion:
		return nil, fmt.Errorf("format %d, this program knows %d", m.Version, formatVersion)
	case m.UID != os.Geteuid():
		return nil, fmt.Errorf("made by user %d", m.UID)
	case m.Memory.Size <= 0 || m.State.Size <= 0:
		return nil, errors.New("no size")
	case !validDigest(m.Memory.Digest) || !validDigest(m.State.Digest):
		return nil, errors.New("no checksum")
	case m.ID != id || m.Inputs.ID() != id:
		return nil, errors.New("of other inputs")
	}
	sum := m.Sum
	again, err := m.format()
	if err != nil || m.Sum != sum || !bytes.Equal(again, b) {
		return nil, errors.New("it is not as it was written")
	}
	return &m, nil
}
