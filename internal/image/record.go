package image

import (
	"encoding/json"
	"errors"
	"fmt"
)

const (
	recordVersion = 1
	// maxRecord bounds a record: 20 000 packages need about 1.5 MB.
	maxRecord = 4 << 20
)

// record is an Image as written in names/<name>.json.
type record struct {
	Version int `json:"version"`
	Image
}

func formatRecord(img *Image) ([]byte, error) {
	b, err := json.MarshalIndent(record{Version: recordVersion, Image: *img}, "", "\t")
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// parseRecord reads the record of the image called name.
func parseRecord(b []byte, name string) (*Image, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("not a record: %w", err)
	}
	switch {
	case r.Version != recordVersion:
		return nil, fmt.Errorf("record version %d, this program knows %d", r.Version, recordVersion)
	case r.Name != name:
		return nil, fmt.Errorf("record of %.80q in the file of %q", r.Name, name)
	case r.Size <= 0:
		return nil, errors.New("no size")
	}
	if _, err := diskHex(r.Digest); err != nil {
		return nil, err
	}
	return &r.Image, nil
}
