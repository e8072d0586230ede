package bench

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode/utf8"
)

// Row is one measured thing.
type Row struct {
	Of     string    `json:"of,omitempty"` // the row of which it is a part
	Name   string    `json:"name"`
	Unit   string    `json:"unit"`   // "" is a plain number
	Values []float64 `json:"values"` // as measured, in order
}

// Quantile is the value below which the part q of the values lies.
func (r *Row) Quantile(q float64) float64 { return quantile(r.Values, q) }

func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// Table is what one benchmark measured.
type Table struct {
	Name       string     `json:"name"`
	Host       Host       `json:"host"`
	Machine    Machine    `json:"machine"`
	Rows       []*Row     `json:"rows"`
	Ratios     []Ratio    `json:"ratios,omitempty"` // none if it is noisy
	Notes      []string   `json:"notes,omitempty"`
	Noisy      string     `json:"noisy,omitempty"` // why; "" if it is not
	Conditions Conditions `json:"conditions"`
}

// Ratio is a plain number computed from rows of the same table.
type Ratio struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
}

func (t *Table) row(of, name, unit string) *Row {
	if r := t.find(of, name); r != nil {
		return r
	}
	r := &Row{Of: of, Name: name, Unit: unit}
	t.Rows = append(t.Rows, r)
	return r
}

func (t *Table) find(of, name string) *Row {
	for _, r := range t.Rows {
		if r.Of == of && r.Name == name {
			return r
		}
	}
	return nil
}

// add adds a value to a row that is part of no other.
func (t *Table) add(name, unit string, v float64) { t.addTo("", name, unit, v) }

func (t *Table) addTo(of, name, unit string, v float64) {
	r := t.row(of, name, unit)
	r.Values = append(r.Values, v)
}

func (t *Table) drop(name string) {
	t.Rows = slices.DeleteFunc(t.Rows, func(r *Row) bool { return r.Of == "" && r.Name == name })
}

func (t *Table) note(format string, args ...any) {
	t.Notes = append(t.Notes, fmt.Sprintf(format, args...))
}

// ratio adds a ratio, unless the table is noisy or there is nothing to divide by.
func (t *Table) ratio(name string, of, by float64) {
	if t.Noisy == "" && of > 0 && by > 0 {
		t.Ratios = append(t.Ratios, Ratio{name, of / by})
	}
}

// p returns a quantile of a row that is part of no other, 0 if there is none.
func (t *Table) p(name string, q float64) float64 {
	if r := t.find("", name); r != nil {
		return r.Quantile(q)
	}
	return 0
}

// Print writes the table for people.
func (t *Table) Print(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n  host: %v\n  machine: %v\n", t.Name, t.Host, t.Machine)
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "\tmin\tp50\tp90\tn\tunit\t")
	width := 0
	for _, r := range t.Rows {
		width = max(width, utf8.RuneCountInString(r.label()))
	}
	for _, r := range t.Ratios {
		width = max(width, utf8.RuneCountInString(r.Name))
	}
	for _, r := range t.Rows {
		p50, p90 := number(r.Quantile(0.5)), number(r.Quantile(0.9))
		if t.Noisy != "" {
			p50, p90 = "-", "-"
		}
		// Padded by hand: the figures align to the right, the names to the left.
		fmt.Fprintf(tw, "%-*s\t%s\t%s\t%s\t%d\t%s\t\n", width, r.label(), number(r.Quantile(0)), p50, p90, len(r.Values), r.Unit)
	}
	for _, r := range t.Ratios {
		fmt.Fprintf(tw, "%-*s\t\t%s\t\t\tratio\t\n", width, r.Name, number(r.Value))
	}
	tw.Flush() // to memory
	if t.Noisy != "" {
		fmt.Fprintf(&b, "  too noisy to quote medians: %s\n", t.Noisy)
	}
	for _, n := range t.Notes {
		fmt.Fprintf(&b, "  note: %s\n", n)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// label is the name, set in if it is part of another row.
func (r *Row) label() string {
	if r.Of == "" {
		return r.Name
	}
	return "  " + r.Name
}

func number(v float64) string {
	size := v
	if v < 0 {
		size = -v
	}
	switch {
	case size >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case size >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}
