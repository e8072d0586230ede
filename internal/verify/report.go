package verify

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// maxCell is how long a text in the table may be; JSON has all of it.
const maxCell = 72

// Print writes the report as a table, and what it comes to. long also prints the
// controls and whole texts.
func (r *Report) Print(w io.Writer, long bool) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "LAYER\tATTACK\tEXPECTED\tOBSERVED\tRESULT")
	var group Group
	for _, row := range r.Rows {
		if row.Group != group {
			group = row.Group
			fmt.Fprintf(tw, "-- %s --\t\t\t\t\n", group)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", row.Layer, cell(row.Attack, long), cell(row.Expected, long), cell(row.Observed, long), row.State)
		if row.Control != "" && (long || row.State == Failed) {
			fmt.Fprintf(tw, "\t  without it\t\t%s\t\n", cell(row.Control, long))
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, r.Summary())
	return err
}

// cell is a text as it goes into the table: one line, printable, not too long.
func cell(s string, long bool) string {
	s = strings.Join(strings.Fields(printable(s)), " ")
	if runes := []rune(s); !long && len(runes) > maxCell {
		return string(runes[:maxCell-1]) + "…"
	}
	return s
}

// Summary says in a line what the report comes to.
func (r *Report) Summary() string {
	controls := 0
	for _, row := range r.Rows {
		if strings.HasPrefix(row.Control, "works: ") {
			controls++
		}
	}
	s := fmt.Sprintf("%d attacks in %.0f s: %d held", len(r.Rows), r.Seconds, r.Count(Held))
	for _, more := range []struct {
		state State
		text  string
	}{
		{Worked, "%d WORKED"},
		{Failed, "%d could not be tried or proved nothing"},
		{Off, "%d worked against layers that you chose to go without"},
		{Absent, "%d worked that only a layer stops which this host does not have"},
	} {
		if n := r.Count(more.state); n > 0 {
			s += "; " + fmt.Sprintf(more.text, n)
		}
	}
	return s + fmt.Sprintf(". %d were also made without what stops them, and worked.", controls)
}
