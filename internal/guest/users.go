package guest

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

const (
	// maxID bounds uids and gids. All ones means "leave as it is" to the
	// kernel, which here would be root.
	maxID = 1<<31 - 1
	// maxGroups bounds a user's supplementary groups.
	maxGroups = 256

	agentID   = 1000
	agentHome = "/home/" + guestrpc.DefaultUser
)

// identity is who a command runs as.
type identity struct {
	uid, gid          uint32
	groups            []uint32
	name, home, shell string // name is empty for a uid that has none
}

// userFiles are the files that name users and groups. They are the image's:
// lines that make no sense are passed over.
type userFiles struct{ passwd, group string }

var systemUsers = userFiles{"/etc/passwd", "/etc/group"}

// resolve finds the user that spec names: name or uid, optionally with ":" and a
// group or gid. As in a container, a uid without an entry is allowed and has the
// group 0 and the home "/"; and who names a group has no supplementary ones.
func (f userFiles) resolve(spec string) (*identity, error) {
	if spec == "" {
		spec = guestrpc.DefaultUser
	}
	user, group, hasGroup := strings.Cut(spec, ":")
	if user == "" || hasGroup && group == "" {
		return nil, guestrpc.Errorf(guestrpc.CodeBadRequest, "bad user %q", spec)
	}
	passwd, err := readOptional(f.passwd)
	if err != nil {
		return nil, guestrpc.Errorf(guestrpc.CodeNoUser, "%v", err)
	}
	groups, err := readOptional(f.group)
	if err != nil {
		return nil, guestrpc.Errorf(guestrpc.CodeNoUser, "%v", err)
	}
	id, ok := findUser(passwd, user)
	if !ok {
		uid, isID := parseID(user)
		if !isID {
			return nil, guestrpc.Errorf(guestrpc.CodeNoUser, "no user %q", user)
		}
		id = &identity{uid: uid, home: "/"}
	}
	if !hasGroup {
		id.groups = memberOf(groups, id)
		return id, nil
	}
	if id.gid, ok = findGroup(groups, group); !ok {
		return nil, guestrpc.Errorf(guestrpc.CodeNoUser, "no group %q", group)
	}
	return id, nil
}

// findUser finds a user by name, or else by uid.
func findUser(passwd, user string) (*identity, bool) {
	wanted, isID := parseID(user)
	var byID *identity
	for line := range strings.SplitSeq(passwd, "\n") {
		id, ok := parseUser(line)
		switch {
		case !ok:
		case id.name == user:
			return id, true
		case isID && byID == nil && id.uid == wanted:
			byID = id
		}
	}
	return byID, byID != nil
}

// parseUser parses name:password:uid:gid:comment:home:shell.
func parseUser(line string) (*identity, bool) {
	f := strings.SplitN(line, ":", 8)
	if len(f) != 7 || f[0] == "" || strings.ContainsRune(line, 0) {
		return nil, false
	}
	uid, ok1 := parseID(f[2])
	gid, ok2 := parseID(f[3])
	if !ok1 || !ok2 {
		return nil, false
	}
	id := &identity{uid: uid, gid: gid, name: f[0], home: f[5], shell: strings.TrimSpace(f[6])}
	if !strings.HasPrefix(id.home, "/") {
		id.home = "/"
	}
	return id, true
}

// parseGroup parses name:password:gid:members.
func parseGroup(line string) (name string, gid uint32, members string, ok bool) {
	f := strings.SplitN(line, ":", 5)
	if len(f) != 4 || f[0] == "" {
		return "", 0, "", false
	}
	gid, ok = parseID(f[2])
	return f[0], gid, strings.TrimSpace(f[3]), ok
}

// findGroup finds a gid by the group's name, or takes it as a number.
func findGroup(groups, group string) (uint32, bool) {
	for line := range strings.SplitSeq(groups, "\n") {
		if name, gid, _, ok := parseGroup(line); ok && name == group {
			return gid, true
		}
	}
	return parseID(group)
}

// memberOf lists the groups that name the user as a member.
func memberOf(groups string, id *identity) []uint32 {
	if id.name == "" {
		return nil
	}
	var gids []uint32
	for line := range strings.SplitSeq(groups, "\n") {
		_, gid, members, ok := parseGroup(line)
		if !ok || gid == id.gid || slices.Contains(gids, gid) {
			continue
		}
		for member := range strings.SplitSeq(members, ",") {
			if member == id.name {
				gids = append(gids, gid)
				break
			}
		}
		if len(gids) == maxGroups {
			break
		}
	}
	return gids
}

func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n <= maxID
}

// readOptional reads a file that an image need not have.
func readOptional(name string) (string, error) {
	text, err := readFile(name)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return "", nil
	}
	return text, err
}

// ensureDefaultUser adds the default user to an image that has none, and makes
// its home.
func ensureDefaultUser(f userFiles) error {
	passwd, err := readOptional(f.passwd)
	if err != nil {
		return err
	}
	for line := range strings.SplitSeq(passwd, "\n") {
		if id, ok := parseUser(line); ok && id.name == guestrpc.DefaultUser {
			return nil
		}
	}
	groups, err := readOptional(f.group)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(f.passwd), 0o755); err != nil {
		return err
	}
	entry := guestrpc.DefaultUser + ":x:1000:1000::" + agentHome + ":/bin/sh"
	if err := replaceFile(f.passwd, withLine(passwd, entry)); err != nil {
		return err
	}
	if !strings.HasPrefix(groups, guestrpc.DefaultUser+":") && !strings.Contains(groups, "\n"+guestrpc.DefaultUser+":") {
		if err := replaceFile(f.group, withLine(groups, guestrpc.DefaultUser+":x:1000:")); err != nil {
			return err
		}
	}
	return makeHome(agentHome, agentID)
}

func makeHome(home string, id int) error {
	if err := os.MkdirAll(home, 0o755); err != nil {
		return err
	}
	return os.Lchown(home, id, id)
}
