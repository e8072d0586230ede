package guest

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// nameFiles are the files that say who the machine is. They are made before
// hello, and at hello only written: that is little work, which matters in a
// machine that was started from a snapshot and has hardly run yet.
type nameFiles struct {
	machineID, hostname, hosts *os.File
}

// makeNameFiles makes the files. Whatever an image has in the place of one is
// replaced; of hosts the content is kept.
func makeNameFiles(etc string) (_ *nameFiles, err error) {
	if err := os.Mkdir(etc, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	hosts, err := readFile(etc + "/hosts")
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, errNotRegular) {
		return nil, err
	}
	n := new(nameFiles)
	for _, f := range []struct {
		file          **os.File
		name, content string
	}{
		{&n.machineID, "/machine-id", ""}, // empty: not yet known (machine-id(5))
		{&n.hostname, "/hostname", ""},
		{&n.hosts, "/hosts", hostsFile(hosts)},
	} {
		if err := replaceFile(etc+f.name, f.content); err != nil {
			return nil, err
		}
		if *f.file, err = os.OpenFile(etc+f.name, os.O_WRONLY|os.O_APPEND, 0); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func hostsFile(old string) string {
	if !strings.Contains(old, "localhost") {
		old = withLine(old, "127.0.0.1 localhost")
		old = withLine(old, "::1 localhost ip6-localhost")
	}
	if !strings.HasSuffix(old, "\n") {
		old += "\n"
	}
	return old
}

// setMachineID gives the machine an id (machine-id(5)). That of the kernel,
// boot_id, is drawn when it is first read, which nobody has done yet.
func (n *nameFiles) setMachineID() error {
	var id [16]byte
	if _, err := unix.Getrandom(id[:], 0); err != nil {
		return err
	}
	return appendAndClose(n.machineID, hex.EncodeToString(id[:])+"\n")
}

func (n *nameFiles) setHostname(name string) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	if err := appendAndClose(n.hostname, name+"\n"); err != nil {
		return err
	}
	return appendAndClose(n.hosts, "127.0.1.1 "+name+"\n")
}

func appendAndClose(f *os.File, text string) error {
	_, err := f.WriteString(text)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	return nil
}
