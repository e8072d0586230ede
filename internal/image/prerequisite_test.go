package image

import (
	"os"
	"os/user"
	"path/filepath"
	"testing"
)

// mmdebstrap looks for the user's name, takes the first entry, and a system needs
// 65536 ids.
func TestHasSubIDs(t *testing.T) {
	someone := &user.User{Username: "someone"}
	for name, c := range map[string]struct {
		content string
		want    bool
	}{
		"nothing":             {"", false},
		"ours":                {"root:1:65536\nsomeone:100000:65536\n", true},
		"no newline":          {"someone:100000:65536", true},
		"of another":          {"someoneelse:100000:65536\nsome:100000:65536\n", false},
		"by number":           {"1000:100000:65536\n", false},
		"a comment":           {"#someone:100000:65536\n", false},
		"too few":             {"someone:100000:65535\n", false},
		"none":                {"someone:100000:0\n", false},
		"the first one is it": {"someone:100000:10\nsomeone:200000:65536\n", false},
		"no count":            {"someone:100000\n", false},
		"garbage":             {"someone:100000:many\n", false},
		"negative":            {"someone:100000:-65536\n", false},
		"too many fields":     {"someone:100000:65536:1\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "subuid")
			if err := os.WriteFile(file, []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := hasSubIDs(file, someone); got != c.want {
				t.Errorf("%v", got)
			}
		})
	}
	if hasSubIDs("/nonexistent", someone) {
		t.Error("a range in a file that is not there")
	}
}
