package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/ironclaw-run/ironclaw/internal/cli"
	"github.com/ironclaw-run/ironclaw/internal/jail"
	"github.com/ironclaw-run/ironclaw/internal/kernel"
	"github.com/ironclaw-run/ironclaw/internal/sandbox"
	"github.com/ironclaw-run/ironclaw/internal/testenv"
)

// quickRace spares the second that a program built with -race sleeps at its end.
const quickRace = "atexit_sleep_ms=10"

func TestMain(m *testing.M) {
	jail.Init()
	os.Setenv("GORACE", quickRace)
	testscript.Main(m, map[string]func(){
		"ironclaw": func() { os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) },
	})
}

// TestScripts runs what people type. Those in testdata/fast boot no machine.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/fast",
		Setup: func(e *testscript.Env) error {
			e.Setenv("IRONCLAW_HOME", filepath.Join(e.WorkDir, "home"))
			e.Setenv("GORACE", quickRace)
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond != "agent" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			_, err := kernel.BuiltInAgent()
			return err == nil, nil
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// TestMachineScripts runs what people type, on real machines.
func TestMachineScripts(t *testing.T) {
	prepared(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/machine",
		Setup: func(e *testscript.Env) error {
			if err := useHome(e.WorkDir, e.Setenv); err != nil {
				return err
			}
			e.Setenv("GORACE", quickRace)
			k, err := sandbox.Open(filepath.Join(e.WorkDir, "home")).Kernels.Current(context.Background())
			if err == nil {
				e.Setenv("KERNEL", k.ELF)
				e.Setenv("MODULES", k.Modules)
				e.Setenv("RELEASE", k.Release)
			}
			return err
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": exits,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// exits runs a command and checks its exit code: exits CODE COMMAND ARGS...
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND ARGS...")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if err != nil {
		code = -1
		if _, after, ok := strings.Cut(err.Error(), "exit status "); ok {
			fmt.Sscan(after, &code)
		}
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("exit code %d, not %s", code, args[0])
	}
}

// prepared skips unless kernel, image and agent are there.
func prepared(t testing.TB) {
	t.Helper()
	testenv.NeedVM(t)
	if _, err := kernel.BuiltInAgent(); err != nil {
		testenv.Skip(t, err.Error())
	}
	home, err := sandbox.DefaultHome()
	if err != nil {
		t.Fatal(err)
	}
	h := sandbox.Open(home)
	if _, err := h.Kernels.Current(t.Context()); err != nil {
		testenv.Skip(t, err.Error()+": run `bin/ironclaw setup`")
	}
	if _, err := h.Images.Get(t.Context(), sandbox.DefaultImage); err != nil {
		testenv.Skip(t, err.Error()+": run `bin/ironclaw setup`")
	}
}

// useHome makes dir/home an IRONCLAW_HOME of its own that shares kernels,
// images and what is known of the host with the user's.
func useHome(dir string, setenv func(key, value string)) error {
	real, err := sandbox.DefaultHome()
	if err != nil {
		return err
	}
	home := filepath.Join(dir, "home")
	if err := os.MkdirAll(home, 0o700); err != nil {
		return err
	}
	for _, name := range []string{"kernels", "images", "facts.json"} {
		if err := os.Symlink(filepath.Join(real, name), filepath.Join(home, name)); err != nil {
			return err
		}
	}
	setenv("IRONCLAW_HOME", home)
	return nil
}
