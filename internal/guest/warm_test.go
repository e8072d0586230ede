package guest

import "testing"

// Whatever an image has in the place of the commands, the machine can be saved.
func TestRunOnce(t *testing.T) {
	a := testAgent(t, nil)
	for _, args := range [][]string{
		{"true"}, {"false"}, {"no-such-program"}, {"/"}, {"sh", "-c", "kill -9 $$"}, {"sh", "-c", "echo lost; sleep 0.01 & exit 3"},
	} {
		if err := a.runOnce(args); err != nil {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func TestAwaitClock(t *testing.T) {
	file := t.TempDir() + "/current"
	awaitClock(file) // there is none
	for _, name := range []string{"tsc\n", "kvm-clock\n"} {
		write(t, file, name)
		awaitClock(file)
	}
	write(t, file, "tsc-early\n")
	done := make(chan struct{})
	go func() {
		defer close(done)
		awaitClock(file)
	}()
	select {
	case <-done:
		t.Error("a clock on trial was taken for settled")
	default:
	}
	write(t, file, "tsc\n")
	<-done
}
