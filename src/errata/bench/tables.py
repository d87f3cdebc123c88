"""Tables of rates: ours with intervals, the published numbers in columns of their own, and what every column measures.

A table is a value that renders itself to the terminal, Markdown, HTML and CSV. `metric_table` makes one from rows and names of
metrics, `paper_table` from a paper's letters, with ours and the published protocol side by side where the published has a fault.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.bench import rendering
from errata.bench.glossary import Term, term
from errata.bench.intervals import Rate, bootstrap
from errata.bench.metrics import Stratum, difference, metric_named, score
from errata.bench.published import NAMES, PUBLISHED, REMARKS, SOURCES
from errata.bench.rendering import Cell
from errata.bench.rows import UNEDITED
from errata.errors import ShapeError

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Group

Numbers = Mapping[str, Mapping[str, Mapping[str, float]]]  # model -> our row's label -> our column -> value
ELSEWHERE = "Published columns are of other models and data: they show the order of things, and are no target."


@dataclass(frozen=True)
class Table:
    """columns: the first is the label's; rows: one cell for each column. published: model -> label -> column -> value as printed
    in the paper; a label that no row has becomes a row without figures of ours. beside: column -> (group, heading) of columns that
    stand in a group of their own, as those by another protocol. note: sentences below it.
    Raises ShapeError for a row of another length, and for two rows with one label.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    published: Numbers = field(default_factory=dict)
    beside: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = [str(row[0]) for row in self.rows]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ShapeError(f"two rows of {self.title!r} have the label {twice[0]!r}; give each its own.")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ShapeError(
                    f"expected {len(self.columns)} cells in each row of {self.title!r}, found {len(row)} in {row[0]!r}; "
                    "use None for a cell without a figure."
                )

    def rich(self, width: int = 110) -> "Group":
        """For a terminal of so many characters: what does not fit side by side stands below."""
        return rendering.terminal(self, width)

    def markdown(self) -> str:
        """As Markdown: a heading, the table, the notes as a list."""
        return rendering.markdown(self)

    def html(self) -> str:
        """As one `<table>` with its notes; everything escaped. A cell's tooltip is its protocol."""
        return rendering.page(self)

    def csv(self) -> str:
        """As CSV, numbers in full: of a rate its value, low, high and n in columns of their own, fractions as fractions."""
        return rendering.sheet(self)

    def notes(self) -> list[str]:
        """What stands below: the note, units and n, each column's protocol, failed fits, and whose numbers the others are."""
        rates = [
            (c, cell) for row in self.rows for c, cell in zip(self.columns, row, strict=True) if isinstance(cell, Rate)
        ]
        found = [line for line in self.note.split("\n") if line]
        if rates:
            n = rendering.common_n(self)
            ways = dict.fromkeys(rate.interval for _, rate in rates if not rate.interval.startswith("Wilson"))
            if any(rate.interval.startswith("Wilson") for _, rate in rates):
                ways["ʷ Wilson's, where cases are few or all agree"] = None
            elsewhere = " except where a cell says" if any(rate.n != n for _, rate in rates) else ""
            found.append(f"Brackets: 95 % intervals ({'; '.join(ways)}). n = {n:,}{elsewhere}.")
        protocols = {column: rate.protocol for column, rate in reversed(rates)}
        alike: dict[str, list[str]] = {}
        for column in self.columns:
            if column in protocols:
                alike.setdefault(protocols[column], []).append(column)
        found += [f"{', '.join(columns)}: {protocol}" for protocol, columns in alike.items()]
        failed = {
            str(row[0]): cell.failed for row in self.rows for cell in row if isinstance(cell, Rate) and cell.failed
        }
        found += [
            f"{label}: the fit of {len(cases)} cases failed ({', '.join(cases[:8])}{', ...' if len(cases) > 8 else ''}); "
            "they count as the unedited model answers."
            for label, cases in failed.items()
        ]
        return [*found, ELSEWHERE] if self.published else found


# -- tables from rows ----------------------------------------------------------------------------------------------------


def metric_table(
    rows: "DataFrame", title: str, metrics: Mapping[str, str], methods: Sequence[str] | None = None, *,
    edits: int | None = None, ungated: Mapping[str, str] | None = None, stratum: Stratum | None = None,
    note: str = "", published: Numbers | None = None, beside: Mapping[str, tuple[str, str]] | None = None, seed: int = 0,
) -> Table:  # fmt: skip
    """A row for the unedited model, then one for each method; a column for each metric.

    metrics: heading -> name. methods: labels, by default all in the order of the rows. ungated: label -> the label of the
    same method with its gate always open, for protocols that need it. edits, stratum: as of `score`.
    """
    labels = list(dict.fromkeys(rows["method"])) if methods is None else list(methods)
    lines: list[list[Cell]] = []
    for label in [UNEDITED, *(label for label in labels if label != UNEDITED)]:
        open_one = (ungated or {}).get(label)
        own = rows[rows["method"].isin({UNEDITED, label, open_one})]
        line: list[Cell] = [label]
        for name in metrics.values():
            cannot = metric_named(name).ungated and open_one is None
            line.append(
                None
                if cannot
                else score(
                    own,
                    name,
                    label,
                    edits=None if label == UNEDITED else edits,
                    ungated=open_one,
                    stratum=stratum,
                    seed=seed,
                )  # fmt: skip
            )
        lines.append(line)
    return Table(title, ["method", *metrics], lines, note, published or {}, beside or {})


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
    beside: dict[str, tuple[str, str]] = {}
    for one in terms:
        metrics[one.letters] = one.ours
        if one.published not in (None, one.ours):
            column = f"{one.letters} ({paper}'s protocol)"
            metrics[column], beside[column] = str(one.published), (f"{paper}'s protocol", one.letters)
    labels = list(dict.fromkeys(rows["method"])) if methods is None else list(methods)
    known = {NAMES.get((editors or {}).get(label, label), label): label for label in reversed([*labels, UNEDITED])}
    published = {
        model: {known.get(name, name): own for name, own in numbers.items() if others or name in known}
        for model, numbers in PUBLISHED.get(preset, {}).items()
    }
    said = [note, "; ".join(f"{one.letters}: {one.name}" for one in terms) + "."]
    said += faults(paper, {one.letters: one for one in terms})
    if preset in SOURCES:
        said.append(f"Published: {SOURCES[preset]}.")
    said += REMARKS.get(preset, ())
    return metric_table(
        rows, title, metrics, labels, note="\n".join(line for line in said if line), published=published, beside=beside,
        **options,
    )  # fmt: skip


def faults(paper: str, terms: Mapping[str, Term]) -> list[str]:
    """What is wrong with a paper's protocols, a sentence for each fault. terms: by the heading of their columns."""
    alike: dict[str, list[str]] = {}
    for name, one in terms.items():
        if one.fault:
            alike.setdefault(one.fault, []).append(name)
    return [f"Fault of {paper}'s protocol for {', '.join(names)}: {fault}." for fault, names in alike.items()]


def difference_table(
    rows: "DataFrame", title: str, metrics: Mapping[str, str], pairs: Sequence[tuple[str, str]], *, note: str = "", **options: Any
) -> Table:  # fmt: skip
    """Paired differences: a row for each pair of methods, the first minus the second. options: as of `difference`."""
    lines: list[list[Cell]] = [
        [f"{a} - {b}", *(difference(rows, name, a, b, **options) for name in metrics.values())] for a, b in pairs
    ]
    return Table(title, ["methods", *metrics], lines, note)


def first_minus_others(
    rows: "DataFrame", title: str, metrics: Mapping[str, str], methods: Sequence[str] | None = None, *, note: str = "", **options: Any
) -> Table:  # fmt: skip
    """Paired differences of the first method to each of the others, over the cases that both were given, as their n says.

    methods: labels, by default all in the order of the rows; a lone one is compared with the unedited model. options: as of
    `difference`.
    """
    there = [m for m in (methods or dict.fromkeys(rows["method"])) if m != UNEDITED]
    given = {method: set(own["case"]) for method, own in rows.groupby("method")}
    lines: list[Sequence[Cell]] = []
    for first, other in ((there[0], other) for other in there[1:] or [UNEDITED]) if there else ():
        both = rows[rows["case"].isin(given[first] & given[other])]
        made = difference_table(both, "", metrics, [(first, other)] if len(both) else [], **options)
        lines += made.rows or [[f"{first} - {other}", *[None] * len(metrics)]]
    said = "Paired over the cases that both methods were given; of these, those that the other tables count."
    return Table(title, ["methods", *metrics], lines, "\n".join(line for line in (note, said) if line))


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
    there = [*(label for label in speeds if label in set(fits["method"])), *fits["method"]]  # in the order of the run
    for label in dict.fromkeys(there) if methods is None else methods:
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
    heads = ["method", "s per fit", "bytes per edit", "failed fits", "edits in", "tokens/s", "of unedited"]
    note = (
        "Tokens/s: greedy generation behind up to 32 edit prompts as one batch, the best of three rounds in turns with the "
        "unedited model."
    )
    return Table(title, heads, lines, note if speeds else "")


def _mean(values: "np.ndarray[Any, np.dtype[np.float64]]", protocol: str, unit: Any, seed: int) -> Rate | None:
    if not len(values):
        return None
    low, high = bootstrap(len(values), lambda index: values[index].mean(1), seed)
    return Rate(float(values.mean()), low, high, len(values), protocol, "bootstrap over fits", unit=unit)
