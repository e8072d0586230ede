// Package undo keeps what must be released again.
//
// Acquire, and register the release on the next line:
//
//	var stack undo.Stack
//	defer stack.Run()
//	f, err := os.Create(path)
//	if err != nil { return err }
//	stack.Add(func() { os.Remove(path) })
//	...
//	stack.Release() // all went well: keep it
package undo

// Stack is a list of releases. The zero value is ready. Not safe for concurrent
// use.
type Stack struct {
	steps []func()
}

// Add registers a release.
func (s *Stack) Add(release func()) { s.steps = append(s.steps, release) }

// Run runs the releases, last first, each once however often it is called.
func (s *Stack) Run() {
	for len(s.steps) > 0 {
		last := len(s.steps) - 1
		step := s.steps[last]
		s.steps = s.steps[:last]
		step()
	}
}

// Release forgets the releases and returns one function that runs them.
func (s *Stack) Release() func() {
	kept := &Stack{steps: s.steps}
	s.steps = nil
	return kept.Run
}
