package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// The files that scan keeps and edits replaces.
const (
	statusFile    = "var/lib/dpkg/status"
	passwdFile    = "etc/passwd"
	groupFile     = "etc/group"
	shadowFile    = "etc/shadow"
	gshadowFile   = "etc/gshadow"
	osReleaseFile = "usr/lib/os-release"
	skelDir       = "etc/skel"
)

// The user that commands in the guest run as.
const (
	AgentUser = "agent"
	AgentUID  = 1000
	AgentGID  = 1000
	AgentHome = "/home/agent"
)

// file is one file or directory that we put into the image.
type file struct {
	mode     int64
	uid, gid int
	data     []byte
	dir      bool
}

// edits are the files that make an image of packages a guest of ours: a user
// to work as, a host name, and nothing of the machine it was built on.
func (t *tree) edits() (map[string]file, error) {
	home := strings.TrimPrefix(AgentHome, "/")
	files := map[string]file{
		"etc/hostname":    {mode: 0o644, data: []byte("ironclaw\n")},
		"etc/hosts":       {mode: 0o644, data: []byte(hosts)},
		"etc/machine-id":  {mode: 0o444},
		"etc/resolv.conf": {mode: 0o644},
		home:              {mode: 0o750, uid: AgentUID, gid: AgentGID, dir: true},
	}
	for name, data := range t.kept {
		if isSkel(name) {
			to := path.Join(home, path.Base(name))
			files[to] = file{mode: 0o644, uid: AgentUID, gid: AgentGID, data: data}
		}
	}
	if err := t.addAccount(files); err != nil {
		return nil, err
	}
	for name, f := range files {
		old, ok := t.entries[name]
		if ok && (old.kind == tar.TypeDir) != f.dir {
			return nil, fmt.Errorf("/%s in the image is of an unexpected kind", name)
		}
	}
	return files, nil
}

const hosts = `127.0.0.1	localhost
127.0.1.1	ironclaw
::1	localhost ip6-localhost ip6-loopback
`

// addAccount puts the user of the guest into the account files.
func (t *tree) addAccount(files map[string]file) error {
	passwd, ok := t.kept[passwdFile]
	if !ok {
		return errors.New("the image has no /etc/passwd")
	}
	group, ok := t.kept[groupFile]
	if !ok {
		return errors.New("the image has no /etc/group")
	}
	for _, f := range []struct {
		name string
		data []byte
		id   int
	}{{passwdFile, passwd, AgentUID}, {groupFile, group, AgentGID}} {
		if who := taken(f.data, f.id); who != "" {
			return fmt.Errorf("/%s in the image already has %s", f.name, who)
		}
	}
	ids := fmt.Sprintf("%d:%d", AgentUID, AgentGID)
	files[passwdFile] = file{mode: 0o644, data: addLine(passwd, AgentUser+":x:"+ids+"::"+AgentHome+":/bin/bash")}
	files[groupFile] = file{mode: 0o644, data: addLine(group, fmt.Sprintf("%s:x:%d:", AgentUser, AgentGID))}

	// Without the package passwd there is no shadow file, while passwd points
	// at one.
	shadow, ok := t.kept[shadowFile]
	day := t.epoch.Unix() / 86400
	if !ok {
		for _, name := range accountNames(passwd) {
			shadow = addLine(shadow, fmt.Sprintf("%s:*:%d:0:99999:7:::", name, day))
		}
	}
	const groupShadow = 42
	files[shadowFile] = file{mode: 0o640, gid: groupShadow,
		data: addLine(shadow, fmt.Sprintf("%s:!:%d:0:99999:7:::", AgentUser, day))}
	if gshadow, ok := t.kept[gshadowFile]; ok {
		files[gshadowFile] = file{mode: 0o640, gid: groupShadow, data: addLine(gshadow, AgentUser+":!::")}
	}
	return nil
}

// taken says who in an account file has the name or the number of our user.
func taken(data []byte, id int) string {
	for line := range strings.SplitSeq(string(data), "\n") {
		fields := strings.Split(line, ":")
		if len(fields) >= 3 && (fields[0] == AgentUser || fields[2] == fmt.Sprint(id)) {
			return fmt.Sprintf("%s with the number %s", fields[0], fields[2])
		}
	}
	return ""
}

func accountNames(data []byte) (names []string) {
	for line := range strings.SplitSeq(string(data), "\n") {
		if name, _, ok := strings.Cut(line, ":"); ok && name != "" {
			names = append(names, name)
		}
	}
	return names
}

func addLine(data []byte, line string) []byte {
	out := slices.Clone(data)
	if len(out) > 0 && out[len(out)-1] != '\n' {
		out = append(out, '\n')
	}
	return append(append(out, line...), '\n')
}

// dropped says whether an entry stays out of the image: what belongs to the
// machine the image was built on, what differs from build to build, and what
// is only of use for a next installation.
func dropped(hdr *tar.Header) bool {
	name := hdr.Name
	dir, base := path.Dir(name), path.Base(name)
	regular := hdr.Typeflag == tar.TypeReg
	switch {
	case name == "lost+found": // the filesystem has its own
		return true
	case name == "etc/apt/sources.list", name == "etc/apt/auth.conf", name == "etc/apt/apt.conf.d/99mmdebstrap",
		under(name, "etc/apt/sources.list.d"), under(name, "etc/apt/auth.conf.d"):
		return true // mirrors and proxies of the host, with passwords perhaps
	case under(name, "var/lib/apt/lists"), under(name, "var/cache/apt"):
		return true
	case regular && dir == "etc/ssh" && strings.HasPrefix(base, "ssh_host_"):
		return true // every sandbox would have the same secret key
	case regular && (name == "var/lib/systemd/random-seed" || name == "var/lib/systemd/credential.secret" ||
		name == "var/lib/dbus/machine-id"):
		return true
	case regular && under(name, "var/log"):
		return hdr.Size > 0
	case regular && (under(name, "tmp") || under(name, "var/tmp") || under(name, "run")):
		return true
	case regular && (dir == "var/cache/debconf" || dir == "var/lib/dpkg") && strings.HasSuffix(base, "-old"):
		return true
	case regular && dir == "etc" && (base == "passwd-" || base == "group-" || base == "shadow-" || base == "gshadow-"):
		return true
	}
	return name == "etc/.pwd.lock" || name == "var/lib/dpkg/lock" || name == "var/lib/dpkg/lock-frontend"
}

func under(name, dir string) bool { return strings.HasPrefix(name, dir+"/") }

// installedPackages reads dpkg's status file.
func installedPackages(status []byte) ([]Package, error) {
	var all []Package
	var p Package
	installed := false
	flush := func() {
		if installed && p.Name != "" {
			all = append(all, p)
		}
		p, installed = Package{}, false
	}
	sc := bufio.NewScanner(bytes.NewReader(status))
	sc.Buffer(nil, maxKept)
	for sc.Scan() {
		line := sc.Text()
		if line == "" {
			flush()
			continue
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch field {
		case "Package":
			p.Name = value
		case "Version":
			p.Version = value
		case "Status":
			installed = strings.HasSuffix(value, " installed")
		}
	}
	flush()
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read dpkg status: %w", err)
	}
	if len(all) == 0 {
		return nil, errors.New("read dpkg status: no package is installed")
	}
	slices.SortFunc(all, func(a, b Package) int {
		return strings.Compare(a.Name+" "+a.Version, b.Name+" "+b.Version)
	})
	return all, nil
}

// distribution is the ID of an os-release file.
func distribution(osRelease []byte) string {
	for line := range strings.SplitSeq(string(osRelease), "\n") {
		if v, ok := strings.CutPrefix(line, "ID="); ok {
			return strings.Trim(v, `"'`)
		}
	}
	return "linux" // what os-release(5) says an absent ID means
}
