package rules

import (
	"fmt"
	"strings"
)

// maxDiff bounds the lines of each side that are compared for an error's text.
// What somebody put into a table is as long as they like.
const maxDiff = 100

// DifferenceError says that the kernel holds other rules than were asked for.
type DifferenceError struct {
	Where string // whose rules: "nftables", "ip6tables"
	Diff  string // lines that are missing ("-"), that are too many ("+"), and those around them (" ")
	// Missing is true if there is nothing of the rules at all.
	Missing bool
}

func (e *DifferenceError) Error() string {
	if e.Missing {
		return e.Where + " does not hold our rules"
	}
	return e.Where + " does not hold exactly our rules:\n" + e.Diff
}

// Compare returns a *DifferenceError if got is not want.
func Compare(where, want, got string) error {
	if want == got {
		return nil
	}
	return &DifferenceError{Where: where, Diff: diff(lines(want), lines(got)), Missing: got == ""}
}

func lines(s string) []string {
	l := strings.Split(strings.TrimSuffix(s, "\n"), "\n")
	if len(l) > maxDiff {
		l = append(l[:maxDiff:maxDiff], fmt.Sprintf("... %d lines more", len(l)-maxDiff))
	}
	return l
}

// diff is the shortest way from a to b.
func diff(a, b []string) string {
	// common[i][j] is how many lines a[i:] and b[j:] have in common, in order.
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			common[i][j] = max(common[i+1][j], common[i][j+1])
			if a[i] == b[j] {
				common[i][j] = 1 + common[i+1][j+1]
			}
		}
	}
	var out strings.Builder
	for i, j := 0, 0; i < len(a) || j < len(b); {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			out.WriteString(" " + a[i] + "\n")
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1]:
			out.WriteString("-" + a[i] + "\n")
			i++
		default:
			out.WriteString("+" + b[j] + "\n")
			j++
		}
	}
	return out.String()
}
