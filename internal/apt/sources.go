package apt

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// target is one list of packages of the distribution's own, as apt-get
// indextargets tells it.
type target struct {
	repoURI   string // without a slash at the end
	baseURI   string // of the suite: .../dists/bookworm/
	suite     string // as the source says it
	codename  string
	component string
	filename  string // of the list; there if it was fetched
	metaKey   string // name of the list in the Release file
	entry     string // FILE:N, the source's place
}

func (t target) archive() string { return t.repoURI + " " + t.suite }

// releaseDate returns the date of the Release file which the list came with.
func (t target) releaseDate() (time.Time, error) {
	// Both names begin the same: the suite's URI, mangled by apt's rules.
	i := strings.LastIndex(t.filename, strings.ReplaceAll(t.metaKey, "/", "_"))
	if t.metaKey == "" || i < 0 {
		return time.Time{}, fmt.Errorf("%s: no Release file belongs to it", t.filename)
	}
	date, err := releaseDate(t.filename[:i] + "InRelease")
	if os.IsNotExist(err) {
		return releaseDate(t.filename[:i] + "Release")
	}
	return date, err
}

// targets returns the lists of the distribution's own packages for this machine's
// architecture which are there.
func (a *Apt) targets(ctx context.Context) ([]target, error) {
	arch, _, err := a.run(ctx, "apt-config", "dump", "--format", "%v%n", "APT::Architecture")
	if err != nil {
		return nil, err
	}
	arch = strings.TrimSpace(arch)
	out, _, err := a.run(ctx, "apt-get", "indextargets", "Created-By: Packages")
	if err != nil {
		return nil, err
	}
	stanzas, err := parseStanzas(strings.NewReader(out))
	if err != nil {
		return nil, fmt.Errorf("read the list of apt's indexes: %w", err)
	}
	var own []target
	for _, s := range stanzas {
		origin := s["origin"] == "Debian" || s["origin"] == "Ubuntu"
		if !origin || s["architecture"] != arch || s["target-of"] != "deb" {
			continue
		}
		if _, err := os.Stat(s["filename"]); err != nil {
			continue
		}
		own = append(own, target{
			repoURI:   strings.TrimSuffix(s["repo-uri"], "/"),
			baseURI:   s["base-uri"],
			suite:     s["release"],
			codename:  s["codename"],
			component: s["component"],
			filename:  s["filename"],
			metaKey:   s["metakey"],
			entry:     s["sourcesentry"],
		})
	}
	return own, nil
}

// Sources returns the distribution's own archives, and none of a third party, as
// lines of a sources.list. Keys that a source brings along are kept as files in
// the private state.
func (a *Apt) Sources(ctx context.Context) ([]string, error) {
	own, err := a.targets(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the distribution's sources: %w", err)
	}
	var heads []string
	components := make(map[string][]string)
	for _, t := range own {
		if t.component == "" || strings.HasPrefix(t.repoURI, "cdrom:") {
			continue
		}
		options, err := a.entryOptions(t.entry)
		if err != nil {
			return nil, fmt.Errorf("read the source %s: %w", t.entry, err)
		}
		head := "deb " + options + t.archive()
		if !slices.Contains(heads, head) {
			heads = append(heads, head)
		}
		if !slices.Contains(components[head], t.component) {
			components[head] = append(components[head], t.component)
		}
	}
	if len(heads) == 0 {
		return nil, errors.New("list the distribution's sources: there are none of Debian or Ubuntu yet")
	}
	for i, head := range heads {
		heads[i] = head + " " + strings.Join(components[head], " ")
	}
	return heads, nil
}

// carried are the options of a source that decide whom it trusts. The rest is the
// host's business.
var carried = []string{"signed-by", "trusted", "check-valid-until"}

// entryOptions returns the options, "[a=b c=d] " or nothing, of the source at
// FILE:N: the N-th stanza of a .sources file, the N-th line of any other.
func (a *Apt) entryOptions(entry string) (string, error) {
	i := strings.LastIndexByte(entry, ':')
	if i < 0 {
		return "", nil
	}
	n, err := strconv.Atoi(entry[i+1:])
	if err != nil || n < 1 {
		return "", fmt.Errorf("%q is no place", entry)
	}
	f, err := os.Open(entry[:i])
	if err != nil {
		return "", err
	}
	defer f.Close()
	have, err := readEntry(f, n, strings.HasSuffix(entry[:i], ".sources"))
	if err != nil {
		return "", err
	}
	var options []string
	for _, key := range carried {
		value := have[key]
		if key == "signed-by" && strings.Contains(value, "BEGIN PGP") {
			if value, err = a.keepKey(value); err != nil {
				return "", err
			}
		}
		if value != "" {
			options = append(options, key+"="+strings.Join(strings.Fields(value), ","))
		}
	}
	if len(options) == 0 {
		return "", nil
	}
	return "[" + strings.Join(options, " ") + "] ", nil
}

// readEntry returns the options of the n-th stanza or line of a file of sources.
func readEntry(r io.Reader, n int, stanza bool) (map[string]string, error) {
	if stanza {
		all, err := parseStanzas(r)
		if err != nil {
			return nil, err
		}
		if n > len(all) {
			return nil, fmt.Errorf("it has no stanza %d", n)
		}
		return all[n-1], nil
	}
	s := bufio.NewScanner(io.LimitReader(r, maxRelease))
	for line := 1; s.Scan(); line++ {
		if line != n {
			continue
		}
		_, rest, ok := strings.Cut(s.Text(), "[")
		rest, _, closed := strings.Cut(rest, "]")
		options := make(map[string]string)
		if ok && closed {
			for option := range strings.FieldsSeq(rest) {
				key, value, _ := strings.Cut(option, "=")
				options[strings.ToLower(key)] = value
			}
		}
		return options, nil
	}
	return nil, fmt.Errorf("it has no line %d", n)
}

// keepKey writes a key that stands in the source itself to a file, because a
// one-line source can only name one.
func (a *Apt) keepKey(value string) (string, error) {
	var b strings.Builder
	for line := range strings.Lines(value) {
		line = strings.TrimSpace(line)
		if line == "." { // an empty line, in this format
			line = ""
		}
		b.WriteString(line + "\n")
	}
	key := strings.TrimLeft(b.String(), "\n")
	dir, err := filepath.Abs(filepath.Join(a.dir, "keys"))
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	path := filepath.Join(dir, fmt.Sprintf("%x.asc", sha256.Sum256([]byte(key))))
	return path, ensureFile(path, key)
}

// parseStanzas reads fields in the format of Debian's control files. Names are
// lower-cased; a continued value keeps its lines. Comments are dropped.
func parseStanzas(r io.Reader) ([]map[string]string, error) {
	var all []map[string]string
	var current map[string]string
	var last string
	s := bufio.NewScanner(io.LimitReader(r, maxOutput))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := s.Text()
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			current, last = nil, ""
		case line[0] == ' ' || line[0] == '\t':
			if last != "" {
				current[last] += "\n" + strings.TrimSpace(line)
			}
		default:
			name, value, ok := strings.Cut(line, ":")
			if !ok {
				return nil, fmt.Errorf("line without a field: %.80q", line)
			}
			if current == nil {
				current = make(map[string]string)
				all = append(all, current)
			}
			last = strings.ToLower(strings.TrimSpace(name))
			current[last] = strings.TrimSpace(value)
		}
	}
	return all, s.Err()
}
