package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/ironclaw-run/ironclaw/internal/atomicfile"
	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

const maxEnvFile = 4 << 20

// environment puts the entries of files and of -e together, later ones last. As
// with docker, KEY alone passes our own variable on, and a file has an entry a
// line, with # for comments.
func environment(entries, files []string) ([]string, error) {
	var env []string
	for _, file := range files {
		b, err := atomicfile.ReadFile(file, maxEnvFile)
		if err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
		number := 0
		for line := range strings.Lines(strings.TrimPrefix(string(b), "\ufeff")) {
			number++
			line = strings.TrimRight(strings.TrimLeft(line, " \t"), "\r\n")
			if line == "" || line[0] == '#' {
				continue
			}
			if env, err = appendEnv(env, line); err != nil {
				return nil, fmt.Errorf("--env-file: %s:%d: %w", file, number, err)
			}
		}
	}
	for _, e := range entries {
		var err error
		if env, err = appendEnv(env, e); err != nil {
			return nil, fmt.Errorf("--env: %w", err)
		}
	}
	return env, nil
}

func appendEnv(env []string, entry string) ([]string, error) {
	key, _, hasValue := strings.Cut(entry, "=")
	if key == "" || strings.ContainsAny(key, " \t\n") {
		return nil, fmt.Errorf("%s is not KEY=VALUE", quoteArg(entry))
	}
	if strings.ContainsRune(entry, 0) { // the value may be a secret: only the key is shown
		return nil, fmt.Errorf("the entry of %s holds a NUL byte", quoteArg(key))
	}
	if !hasValue {
		value, ok := os.LookupEnv(key)
		if !ok {
			return env, nil
		}
		entry = key + "=" + value
	}
	if err := guestrpc.ValidateEnv(entry); err != nil {
		return nil, err
	}
	return append(env, entry), nil
}
