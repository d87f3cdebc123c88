"""Tables of rates: ours with intervals, the published numbers in columns of their own, and what every column measures.

A table is a value that renders itself to the terminal, Markdown, HTML and CSV. `metric_table` makes one from rows and names of
metrics, `paper_table` from a paper's letters, with ours and the published protocol side by side where the published has a fault.
"""

import csv
import html
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.bench.glossary import term
from errata.bench.intervals import Rate, bootstrap
from errata.bench.metrics import Stratum, difference, metric_named, score
from errata.bench.published import NAMES, PUBLISHED, REMARKS, SOURCES
from errata.bench.rows import UNEDITED
from errata.errors import ShapeError

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table as RichTable

Cell = Rate | float | int | str | None
Numbers = Mapping[str, Mapping[str, Mapping[str, float]]]  # model -> our row's label -> our column -> value
ELSEWHERE = "Published columns are of other models and data: they show the order of things, and are no target."


@dataclass(frozen=True)
class Table:
    """columns: the first is the label's; rows: one cell for each column. published: model -> label -> column -> value as printed
    in the paper; a label that no row has becomes a row without figures of ours. note: sentences below it.
    Raises ShapeError for a row of another length.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    published: Numbers = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ShapeError(
                    f"expected {len(self.columns)} cells in each row of {self.title!r}, found {len(row)} in {row[0]!r}; "
                    "use None for a cell without a figure."
                )

    def rich(self) -> "RichTable":
        """For a terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        caption = "\n".join(self.notes())
        made = RichTable(title=Text(self.title), title_justify="left", header_style="bold", caption=Text(caption))
        made.caption_justify = "left"
        for i, heading in enumerate(self._headings()):
            made.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
        for line in self._lines():
            made.add_row(*(Text(cell.replace(" [", "\n[")) for cell in line))
        return made

    def markdown(self) -> str:
        """As Markdown: a heading, the table, the notes as a list."""

        def row(cells: Sequence[str]) -> str:
            return f"| {' | '.join(_escaped(cell) for cell in cells)} |"

        headings = self._headings()
        lines = [f"### {self.title}", "", row(headings), f"|{'---|' + '---:|' * (len(headings) - 1)}"]
        lines += [row(line) for line in self._lines()]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes())]) + "\n"

    def html(self) -> str:
        """As one `<table>` with its notes; everything escaped. A cell's tooltip is its protocol."""
        esc = html.escape
        head = "".join(f'<th scope="col">{esc(heading)}</th>' for heading in self._headings())
        body = []
        for cells, line in zip(self._cells(), self._lines(), strict=True):
            label = f'<th scope="row">{esc(line[0])}</th>'
            rest = "".join(_html_cell(cell, text) for cell, text in zip(cells[1:], line[1:], strict=True))
            body.append(f"<tr>{label}{rest}</tr>")
        notes = "".join(f"<li>{esc(note)}</li>" for note in self.notes())
        below = f'<ul class="notes">{notes}</ul>' if notes else ""
        return (
            f"<figure><table><caption>{esc(self.title)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table>{below}</figure>"
        )

    def csv(self) -> str:
        """As CSV, numbers in full: of a rate its value, low, high and n in columns of their own, fractions as fractions."""
        rates = {c for row in self.rows for c, cell in zip(self.columns, row, strict=True) if isinstance(cell, Rate)}
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        heads = [[c, f"{c} low", f"{c} high", f"{c} n"] if c in rates else [c] for c in self.columns]
        writer.writerow([*(h for group in heads for h in group), *self._headings()[len(self.columns) :]])
        for cells in self._cells():
            line: list[Any] = []
            for column, cell in zip(self.columns, cells, strict=False):
                one = [cell.value, cell.low, cell.high, cell.n] if isinstance(cell, Rate) else [cell]
                line += [*one, *([None] * (4 - len(one)) if column in rates else [])]
            writer.writerow([*line, *cells[len(self.columns) :]])
        return sink.getvalue()

    def notes(self) -> list[str]:
        """What stands below: the note, units and n, each column's protocol, failed fits, and whose numbers the others are."""
        rates = [
            (c, cell) for row in self.rows for c, cell in zip(self.columns, row, strict=True) if isinstance(cell, Rate)
        ]
        found = [line for line in self.note.split("\n") if line]
        if rates:
            n = self._common_n()
            ways = dict.fromkeys(rate.interval for _, rate in rates if not rate.interval.startswith("Wilson"))
            if any(rate.interval.startswith("Wilson") for _, rate in rates):
                ways["ʷ Wilson's, where cases are few or all agree"] = None
            elsewhere = " except where a cell says" if any(rate.n != n for _, rate in rates) else ""
            found.append(f"Brackets: 95 % intervals ({'; '.join(ways)}). n = {n:,}{elsewhere}.")
        protocols = {column: rate.protocol for column, rate in reversed(rates)}
        found += [f"{column}: {protocols[column]}" for column in self.columns if column in protocols]
        failed = {
            str(row[0]): cell.failed for row in self.rows for cell in row if isinstance(cell, Rate) and cell.failed
        }
        found += [
            f"{label}: the fit of {len(cases)} cases failed ({', '.join(cases[:8])}{', ...' if len(cases) > 8 else ''}); "
            "they count as the unedited model answers."
            for label, cases in failed.items()
        ]
        return [*found, ELSEWHERE] if self.published else found

    def _headings(self) -> list[str]:
        return [*self.columns, *(f"{column} (published, {model})" for model, column in self._others())]

    def _others(self) -> list[tuple[str, str]]:
        """(model, column) of the published numbers."""
        return [
            (model, column)
            for model, numbers in self.published.items()
            for column in self.columns
            if any(column in own for own in numbers.values())
        ]

    def _cells(self) -> Iterator[list[Cell]]:
        """Each row with the published numbers behind it, then the published methods that we have no row of."""
        labels = [str(row[0]) for row in self.rows]
        theirs = dict.fromkeys(label for numbers in self.published.values() for label in numbers)
        blank: list[list[Cell]] = [
            [label, *[None] * (len(self.columns) - 1)] for label in theirs if label not in labels
        ]
        for row in [*(list(row) for row in self.rows), *blank]:
            yield [*row, *(self.published[m].get(str(row[0]), {}).get(c) for m, c in self._others())]

    def _lines(self) -> Iterator[list[str]]:
        n, ours = self._common_n(), len(self.columns)
        for cells in self._cells():
            yield [_text(cell, n) if i < ours or cell is None else f"{cell:g}" for i, cell in enumerate(cells)]

    def _common_n(self) -> int:
        found = Counter(cell.n for row in self.rows for cell in row if isinstance(cell, Rate))
        return found.most_common(1)[0][0] if found else 0


# -- tables from rows ----------------------------------------------------------------------------------------------------


def metric_table(
    rows: "DataFrame", title: str, metrics: Mapping[str, str], methods: Sequence[str] | None = None, *,
    edits: int | None = None, ungated: Mapping[str, str] | None = None, stratum: Stratum | None = None,
    note: str = "", published: Numbers | None = None, seed: int = 0,
) -> Table:  # fmt: skip
    """A row for the unedited model, then one for each method; a column for each metric.

    metrics: heading -> name. methods: labels, by default all in the order of the rows. ungated: label -> the label of the
    same method with its gate always open, for protocols that need it. edits, stratum: as of `score`.
    """
    labels = list(dict.fromkeys(rows["method"])) if methods is None else list(methods)
    lines: list[list[Cell]] = []
    for label in [UNEDITED, *(label for label in labels if label != UNEDITED)]:
        open_one = (ungated or {}).get(label)
        line: list[Cell] = [label]
        for name in metrics.values():
            cannot = metric_named(name).ungated and open_one is None
            line.append(
                None
                if cannot
                else score(
                    rows,
                    name,
                    label,
                    edits=None if label == UNEDITED else edits,
                    ungated=open_one,
                    stratum=stratum,
                    seed=seed,
                )  # fmt: skip
            )
        lines.append(line)
    return Table(title, ["method", *metrics], lines, note, published or {})


def paper_table(
    rows: "DataFrame", title: str, paper: str, letters: Sequence[str], methods: Sequence[str] | None = None, *,
    preset: str = "", editors: Mapping[str, str] | None = None, others: bool = True, note: str = "", **options: Any,
) -> Table:  # fmt: skip
    """A paper's table: of each of its letters ours, then its own protocol where that has a fault; published numbers behind.

    preset: whose published numbers; editors: our label -> the editor's name, where they differ. others: whether published
    methods that were not run have a row. options: as of `metric_table`.
    """
    terms = [term(paper, name) for name in letters]
    metrics: dict[str, str] = {}
    for one in terms:
        metrics[one.letters] = one.ours
        if one.published not in (None, one.ours):
            metrics[f"{one.letters} ({paper}'s protocol)"] = str(one.published)
    labels = list(dict.fromkeys(rows["method"])) if methods is None else list(methods)
    known = {NAMES.get((editors or {}).get(label, label), label): label for label in reversed([*labels, UNEDITED])}
    published = {
        model: {known.get(name, name): own for name, own in numbers.items() if others or name in known}
        for model, numbers in PUBLISHED.get(preset, {}).items()
    }
    faults: dict[str, list[str]] = {}
    for one in terms:
        if one.fault:
            faults.setdefault(one.fault, []).append(one.letters)
    said = [note, "; ".join(f"{one.letters}: {one.name}" for one in terms) + "."]
    said += [f"Fault of {paper}'s protocol for {', '.join(names)}: {fault}." for fault, names in faults.items()]
    if preset in SOURCES:
        said.append(f"Published: {SOURCES[preset]}.")
    said += REMARKS.get(preset, ())
    return metric_table(
        rows, title, metrics, labels, note="\n".join(line for line in said if line), published=published, **options
    )


def difference_table(
    rows: "DataFrame", title: str, metrics: Mapping[str, str], pairs: Sequence[tuple[str, str]], *, note: str = "", **options: Any
) -> Table:  # fmt: skip
    """Paired differences: a row for each pair of methods, the first minus the second. options: as of `difference`."""
    lines: list[list[Cell]] = [
        [f"{a} - {b}", *(difference(rows, name, a, b, **options) for name in metrics.values())] for a, b in pairs
    ]
    return Table(title, ["methods", *metrics], lines, note)


def speed_table(
    fits: "DataFrame", summary: Mapping[str, Any], title: str = "Speed and size", *, methods: Sequence[str] | None = None, seed: int = 0
) -> Table:  # fmt: skip
    """Seconds per fit, bytes per edit, failed fits, and tokens per second with the edits in, also against the unedited model.

    fits: rows of FITS; summary: the run's `summary.json`, with `methods` -> label -> tokens_per_second,
    tokens_per_second_unedited, edits_while_timed.
    """
    speeds = summary.get("methods", {})
    plain = [s["tokens_per_second_unedited"] for s in speeds.values() if s.get("tokens_per_second_unedited")]
    lines: list[list[Cell]] = [[UNEDITED, None, None, None, None, float(np.mean(plain)) if plain else None, "100 %"]]
    for label in dict.fromkeys(fits["method"]) if methods is None else methods:
        own = fits[fits["method"] == label]
        made, speed = own[own["error"].fillna("") == ""], speeds.get(label, {})
        pace, base = speed.get("tokens_per_second"), speed.get("tokens_per_second_unedited")
        lines.append(
            [
                label,
                _mean(made["seconds"].dropna().to_numpy(float), "seconds of a fit, a batch's shared over its edits", "seconds", seed),
                _mean(made["nbytes"].dropna().to_numpy(float), "bytes of the patch's tensors for an edit", "bytes", seed),
                len(own) - len(made),
                speed.get("edits_while_timed"),
                pace,
                f"{pace / base:.0%}".replace("%", " %") if pace and base else None,
            ]
        )  # fmt: skip
    heads = ["method", "s per fit", "bytes per edit", "failed fits", "edits while timed", "tokens/s", "of unedited"]
    return Table(title, heads, lines)


def _mean(values: "np.ndarray[Any, np.dtype[np.float64]]", protocol: str, unit: Any, seed: int) -> Rate | None:
    if not len(values):
        return None
    low, high = bootstrap(len(values), lambda index: values[index].mean(1), seed)
    return Rate(float(values.mean()), low, high, len(values), protocol, "bootstrap over fits", unit=unit)


# -- cells ---------------------------------------------------------------------------------------------------------------


def _escaped(text: str) -> str:
    """For a cell of a Markdown table."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def _html_cell(cell: Cell, text: str) -> str:
    if not isinstance(cell, Rate):
        return f"<td>{html.escape(text)}</td>"
    value, _, rest = text.partition(" ")
    return f'<td title="{html.escape(cell.protocol)}">{html.escape(value)} <small>{html.escape(rest)}</small></td>'


def _text(cell: Cell, n: int) -> str:
    """A cell as text. Fractions are per cent; a rate has its interval behind it, and its n where it is not the table's."""
    if isinstance(cell, Rate):
        low, high = (_number(value, cell.unit) for value in (cell.low, cell.high))
        mark = "ʷ" if cell.interval.startswith("Wilson") else ""
        return f"{_number(cell.value, cell.unit)} [{low}, {high}]{mark}{'' if cell.n == n else f' n={cell.n:,}'}"
    if cell is None:
        return "-"
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}" if isinstance(cell, float) else cell


def _number(value: float, unit: str) -> str:
    if unit in ("fraction", "difference"):
        return f"{100 * value:.1f}"
    if unit == "bytes":
        return f"{value:,.0f}"
    return f"{value:.1f}" if unit == "points" else f"{value:.3g}"
