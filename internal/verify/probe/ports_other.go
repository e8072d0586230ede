//go:build !amd64

package probe

// kernelPorts: other processors have no I/O ports.
func kernelPorts([]string) (Outcome, string) { return Refused, "this processor has none" }
