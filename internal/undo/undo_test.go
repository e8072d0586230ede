package undo

import (
	"slices"
	"testing"
)

func TestStack(t *testing.T) {
	var got []int
	var s Stack
	for i := range 3 {
		s.Add(func() { got = append(got, i) })
	}
	s.Run()
	s.Run()
	if !slices.Equal(got, []int{2, 1, 0}) {
		t.Errorf("ran %v", got)
	}
}

func TestRelease(t *testing.T) {
	n := 0
	var s Stack
	s.Add(func() { n++ })
	keep := s.Release()
	s.Run()
	if n != 0 {
		t.Error("ran after Release")
	}
	keep()
	keep()
	if n != 1 {
		t.Errorf("ran %d times", n)
	}
}

// A release that panics does not keep the others from running on the way out.
func TestPanic(t *testing.T) {
	ran := false
	func() {
		defer func() { _ = recover() }()
		var s Stack
		defer s.Run()
		s.Add(func() { ran = true })
		defer s.Run()
		s.Add(func() { panic("x") })
	}()
	if !ran {
		t.Error("the rest did not run")
	}
}
