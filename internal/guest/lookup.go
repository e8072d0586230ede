package guest

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ironclaw-run/ironclaw/internal/guestrpc"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment is the command's: the guest's defaults, then what the host asks
// for. The last entry of a name wins.
func environment(id *identity, req *guestrpc.Exec) []string {
	env := []string{"PATH=" + defaultPath, "HOME=" + id.home, "LANG=C.UTF-8"}
	if id.name != "" {
		env = append(env, "USER="+id.name, "LOGNAME="+id.name)
	}
	if id.shell != "" {
		env = append(env, "SHELL="+id.shell)
	}
	if host, err := os.Hostname(); err == nil {
		env = append(env, "HOSTNAME="+host)
	}
	if req.TTY != nil {
		env = append(env, "TERM=xterm")
	}
	return dedupe(append(env, req.Env...))
}

func dedupe(env []string) []string {
	at := make(map[string]int, len(env))
	out := env[:0:0]
	for _, kv := range env {
		key, _, _ := strings.Cut(kv, "=")
		if i, ok := at[key]; ok {
			out[i] = kv
			continue
		}
		at[key] = len(out)
		out = append(out, kv)
	}
	return out
}

func getenv(env []string, key string) string {
	for _, kv := range env {
		if k, v, _ := strings.Cut(kv, "="); k == key {
			return v
		}
	}
	return ""
}

// locate finds the working directory and the program, with the eyes of the user
// who will run it.
func locate(id *identity, req *guestrpc.Exec, env []string) (dir, path string, err error) {
	uerr := asUser(id, func() {
		if dir, err = findDir(id, req.Dir); err == nil {
			path, err = findProgram(req.Args[0], dir, getenv(env, "PATH"))
		}
	})
	if uerr != nil {
		return "", "", guestrpc.Errorf(guestrpc.CodeInternal, "look up the program as the user: %v", uerr)
	}
	return dir, path, err
}

func findDir(id *identity, dir string) (string, error) {
	if dir == "" {
		if checkDir(id.home) == nil {
			return id.home, nil
		}
		return "/", nil // daemons' users have homes that do not exist
	}
	if err := checkDir(dir); err != nil {
		return "", guestrpc.Errorf(guestrpc.CodeNoDir, "working directory %s: %v", dir, err)
	}
	return dir, nil
}

func checkDir(dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return unix.ENOTDIR
	}
	return mayExecute(dir)
}

// findProgram finds a program as execvp does.
func findProgram(name, dir, path string) (string, error) {
	if strings.Contains(name, "/") {
		full := name
		if !strings.HasPrefix(name, "/") {
			full = filepath.Join(dir, name)
		}
		if err := checkProgram(full); err != nil {
			return "", programError(name, err)
		}
		return full, nil
	}
	var found error = unix.ENOENT
	for elem := range strings.SplitSeq(path, ":") {
		if !strings.HasPrefix(elem, "/") { // empty means the working directory
			elem = filepath.Join(dir, elem)
		}
		full := filepath.Join(elem, name)
		err := checkProgram(full)
		if err == nil {
			return full, nil
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			found = err
		}
	}
	return "", programError(name, found)
}

func checkProgram(full string) error {
	var st unix.Stat_t
	if err := unix.Stat(full, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return mayExecute(full)
	case unix.S_IFDIR:
		return unix.EISDIR
	}
	return unix.EACCES
}

func programError(name string, err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return guestrpc.Errorf(guestrpc.CodeNotFound, "%s: no such program", name)
	}
	return guestrpc.Errorf(guestrpc.CodeNotRunnable, "%s: %v", name, err)
}

func mayExecute(name string) error {
	return unix.Faccessat(unix.AT_FDCWD, name, unix.X_OK, unix.AT_EACCESS)
}

// asUser runs f with the file access of id. The kernel keeps a file system user
// for each thread: this one is changed and changed back, nobody else notices.
// If it cannot be changed back it stays locked, and ends with its goroutine.
func asUser(id *identity, f func()) error {
	if id.uid == 0 || os.Geteuid() != 0 { // tests run as themselves
		f()
		return nil
	}
	old, err := unix.Getgroups()
	if err != nil {
		return err
	}
	groups := make([]int, len(id.groups))
	for i, g := range id.groups {
		groups[i] = int(g)
	}
	runtime.LockOSThread()
	if err := setFileUser(int(id.uid), int(id.gid), groups); err != nil {
		return err
	}
	f()
	if err := setFileUser(0, 0, old); err != nil {
		return err
	}
	runtime.UnlockOSThread()
	return nil
}
