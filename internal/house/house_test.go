// Package house holds the rules of this code base, as tests: who may import
// whom, that every package says what it is for, how long a function may be.
package house

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

const module = "github.com/ironclaw-run/ironclaw"

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func load(t *testing.T, pattern ...string) map[string]pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Imports,Deps"}, pattern...)...)
	cmd.Dir = testenv.Root(t)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	pkgs := make(map[string]pkg)
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs[strings.TrimPrefix(p.ImportPath, module+"/")] = p
	}
}

// What runs in the guest is small and knows nothing of the host's side.
func TestGuestImportsNothingOfTheHost(t *testing.T) {
	p := load(t, "./cmd/ironclaw-init")["cmd/ironclaw-init"]
	allowed := []string{"guest", "guest/hostile", "guestrpc", "link", "seccomp"}
	for _, d := range p.Deps {
		if in, ok := strings.CutPrefix(d, module+"/internal/"); ok && !slices.Contains(allowed, in) {
			t.Errorf("the guest's init imports internal/%s", in)
		}
		for _, heavy := range []string{"net/http", "os/user", "crypto/tls", "text/template", "github.com/spf13/cobra", "github.com/mdlayher/vsock"} {
			if d == heavy {
				t.Errorf("the guest's init imports %s", heavy)
			}
		}
	}
}

// Each package may import only what is below it.
func TestLayers(t *testing.T) {
	rules := []struct {
		importer, forbidden, why string
	}{
		{"internal/vm", "internal/vm/", "the contract knows no implementation"},
		{"internal/vm", "internal/link", "the contract knows no implementation"},
		{"internal/vm", "internal/guestrpc", "exec is above the drivers"},
		{"internal/layer", "internal/", "layers are names"},
		{"internal/control", "internal/", "it carries questions and knows no answer"},
		{"internal/jail", "internal/vm", "a jail knows no machine: it is for every driver's"},
		{"internal/jail", "internal/sandbox", "only sandbox knows all the others"},
		{"internal/guestrpc", "internal/", "the protocol knows no transport"},
		{"internal/link", "internal/", "the link carries bytes and knows no one"},
		{"internal/seccomp", "internal/", "filters are for guest and host, which it does not know"},
		{"internal/guest", "internal/vm", "the guest knows nothing of the host"},
		{"internal/guest", "internal/sandbox", "the guest knows nothing of the host"},
		{"internal/vm/qemu", "internal/sandbox", "a driver is below the composition"},
		{"internal/vm/qemu", "internal/guestrpc", "exec is above the drivers"},
		{"internal/image", "internal/sandbox", "only sandbox knows all the others"},
		{"internal/kernel", "internal/sandbox", "only sandbox knows all the others"},
		{"internal/pool", "internal/", "a pool knows its members by an interface"},
		{"internal/template", "internal/vm", "a store of files knows no machine"},
		{"internal/template", "internal/sandbox", "only sandbox knows all the others"},
		{"internal/verifyonce", "internal/image", "it knows files, not what they are for"},
		{"internal/verifyonce", "internal/template", "it knows files, not what they are for"},
		{"internal/firewall/rules", "internal/", "rules are data"},
		{"internal/firewall/nft", "internal/firewall/iptables", "one way to set rules knows nothing of the other"},
		{"internal/firewall/iptables", "internal/firewall/nft", "one way to set rules knows nothing of the other"},
		{"internal/firewall", "internal/sandbox", "only sandbox knows all the others"},
		{"internal/sparse", "internal/", "it copies bytes and knows no one"},
		{"internal/cli", "internal/vm/", "the command line links no driver"},
		{"internal/guest/hostile", "internal/guest/", "it takes the agent's place and uses nothing of it"},
		{"internal/verify/probe", "internal/", "it is the attacker's program and knows nothing of ours"},
		{"internal/verify/testnet", "internal/", "a network knows nobody in it"},
	}
	for path, p := range load(t, "./...") {
		for _, r := range rules {
			if path != r.importer {
				continue
			}
			for _, imp := range p.Imports {
				if in, ok := strings.CutPrefix(imp, module+"/"); ok && strings.HasPrefix(in, r.forbidden) {
					t.Errorf("%s imports %s: %s", path, in, r.why)
				}
			}
		}
		for _, imp := range p.Imports {
			if imp == module+"/internal/cli" && path != "cmd/ironclaw" {
				t.Errorf("%s imports the command line", path)
			}
		}
	}
}

// files calls f for every Go file of the project that is no test.
func files(t *testing.T, f func(path string, file *ast.File, set *token.FileSet)) {
	t.Helper()
	root := testenv.Root(t)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != root || d.Name() == "testdata"):
			return filepath.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		f(rel, file, set)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	documented := make(map[string]bool)
	files(t, func(path string, file *ast.File, _ *token.FileSet) {
		dir := filepath.Dir(path)
		documented[dir] = documented[dir] || file.Doc != nil && len(file.Doc.Text()) > 40
	})
	for dir, ok := range documented {
		if !ok {
			t.Errorf("package %s has no doc comment", dir)
		}
	}
}

func TestFunctionsAndFilesAreShort(t *testing.T) {
	const maxFunc, maxFile = 80, 560
	files(t, func(path string, file *ast.File, set *token.FileSet) {
		if n := set.Position(file.End()).Line; n > maxFile {
			t.Errorf("%s has %d lines; %d are enough", path, n, maxFile)
		}
		for _, d := range file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				if n := set.Position(fn.End()).Line - set.Position(fn.Pos()).Line; n > maxFunc {
					t.Errorf("%s: %s has %d lines; %d are enough", path, fn.Name.Name, n, maxFunc)
				}
			}
		}
	})
}

// Libraries return errors: they do not print, log, exit or catch signals.
func TestLibrariesAreSilent(t *testing.T) {
	files(t, func(path string, file *ast.File, set *token.FileSet) {
		if strings.HasPrefix(path, "internal/cli/") || strings.HasPrefix(path, "cmd/") ||
			path == "internal/guest/boot.go" || path == "internal/jail/stage.go" { // bodies of processes of their own
			return
		}
		ast.Inspect(file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			x, ok := sel.X.(*ast.Ident)
			if !ok {
				return true
			}
			switch name := x.Name + "." + sel.Sel.Name; name {
			case "fmt.Print", "fmt.Println", "fmt.Printf", "log.Print", "log.Println", "log.Printf",
				"log.Fatal", "log.Fatalf", "os.Exit", "signal.Notify":
				t.Errorf("%s: %s in a library", set.Position(sel.Pos()), name)
			}
			return true
		})
	})
}

// Tests skip through testenv, so that CI can forbid it (IRONCLAW_MUST_RUN).
func TestSkipsGoThroughTestenv(t *testing.T) {
	root := testenv.Root(t)
	cmd := exec.CommandContext(t.Context(), "git", "grep", "--untracked", "-nE", `\bt\.Skip(f|Now)?\(`, "--", "*_test.go")
	cmd.Dir = root
	out, _ := cmd.Output() // fails when nothing is found
	for line := range strings.Lines(string(out)) {
		if !strings.HasPrefix(line, "internal/house/") {
			t.Errorf("skips by itself: %s", strings.TrimSpace(line))
		}
	}
}

// A test that may not be skipped in CI, and has been renamed, would be skipped
// for ever.
func TestMustRunExists(t *testing.T) {
	root := testenv.Root(t)
	list, err := os.ReadFile(filepath.Join(root, ".ci", "must-run"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(string(list)) {
		cmd := exec.CommandContext(t.Context(), "git", "grep", "--untracked", "-qF", "func "+name+"(t *testing.T)", "--", "*_test.go")
		cmd.Dir = root
		if err := cmd.Run(); err != nil {
			t.Errorf("there is no test %s", name)
		}
	}
}
