"""How a table of rates is set: for a terminal of any width, as Markdown, HTML or CSV.

Columns stand in groups: ours, the published protocol's, and the published numbers of each model. What does not fit side by side
stands below, group by group, with the labels repeated, so that no cell is ever folded letter by letter.
"""

import csv
import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from errata.bench.intervals import Rate

if TYPE_CHECKING:
    from rich.console import Group

Cell = Rate | float | int | str | None
MARKDOWN_WIDTH = 130  # characters, of cells; a page of documentation scrolls beyond
PAGE_WIDTH = 140  # likewise, of HTML, whose intervals stand below their figures
GAP = 3  # characters between columns
WIDEST_LABEL = 34
THEIRS = "published"


class Tabular(Protocol):
    """What is set: see `errata.bench.tables.Table`."""

    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def columns(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def rows(self) -> Sequence[Sequence[Cell]]: ...  # noqa: D102
    @property
    def published(self) -> Mapping[str, Mapping[str, Mapping[str, float]]]: ...  # noqa: D102
    @property
    def beside(self) -> Mapping[str, tuple[str, str]]: ...  # noqa: D102

    def notes(self) -> list[str]:
        """Sentences below."""


@dataclass(frozen=True)
class Column:
    """One column: its group ("" for the table's own), heading, and cells by label. ours: whether its figures are."""

    group: str
    heading: str
    cells: Mapping[str, Cell]
    texts: Mapping[str, str]
    ours: bool = True

    def width(self, broken: bool, mixed: bool = False) -> int:
        """Characters that it needs; broken: with intervals on a line of their own; mixed: beside columns of ours."""
        group = self.group if mixed else self.group.removeprefix(f"{THEIRS}, ")
        pieces = [piece for text in self.texts.values() for piece in (text.split(" [") if broken else [text])]
        sizes = [len(piece) + (broken and piece.endswith(("]", "]ʷ"))) for piece in pieces]
        return max([*sizes, *(len(word) for name in (self.heading, group) for word in name.split())], default=1)


Part = list[Column]


def columns_of(table: Tabular) -> list[Column]:
    """The table's columns behind the labels, then the published numbers, model by model."""
    n = common_n(table)
    labels = [str(row[0]) for row in table.rows]
    found = []
    for i, name in list(enumerate(table.columns))[1:]:
        group, heading = table.beside.get(name, ("", name))
        cells = dict(zip(labels, (row[i] for row in table.rows), strict=True))
        found.append(Column(group, heading, cells, {label: text_of(cell, n) for label, cell in cells.items()}))
    found.sort(key=lambda column: column.group != "")
    for model, numbers in table.published.items():
        for name in table.columns:
            theirs = {label: own[name] for label, own in numbers.items() if name in own}
            if theirs:
                digits = max(len(f"{value:g}".partition(".")[2]) for value in theirs.values())  # as printed
                texts = {label: f"{value:.{digits}f}" for label, value in theirs.items()}
                heading = table.beside.get(name, ("", name))[1]
                found.append(Column(f"{THEIRS}, {model}", heading, dict(theirs), texts, False))
    return found


def labels_of(table: Tabular, part: Part) -> list[str]:
    """The lines of a part: all of ours where it has a column of ours, and whatever published methods it has figures of."""
    own = [str(row[0]) for row in table.rows]
    theirs = dict.fromkeys(label for column in part if not column.ours for label in column.texts)
    if not any(column.ours for column in part):
        return [label for label in dict.fromkeys([*own, *theirs]) if label in theirs]
    return list(dict.fromkeys([*own, *theirs]))


def packed(columns: Sequence[Column], width: int, broken: bool) -> list[Part]:
    """Columns in parts of at most so many characters; a group is torn apart only if it is wider by itself, and published numbers
    stand beside ours only where all columns do.
    """
    groups: dict[str, Part] = {}
    for column in columns:
        groups.setdefault(column.group, []).append(column)
    parts: list[Part] = [[]]

    def size(part: Part, mixed: bool = False) -> int:
        return sum(column.width(broken, mixed) + GAP for column in part)

    whole = size(list(columns), True) <= width
    for group in groups.values():
        like = not parts[-1] or whole or parts[-1][-1].ours == group[0].ours
        if like and size(parts[-1] + group) <= width:
            parts[-1] += group
            continue
        rest = group
        if parts[-1]:
            parts.append([])
        even = -(-len(group) // max(1, -(-size(group) // max(1, width))))  # halves rather than all but one and one
        while rest:
            n = max(1, next((k for k in range(min(even, len(rest)), 0, -1) if size(rest[:k]) <= width), 1))
            parts[-1] += rest[:n]
            rest = rest[n:]
            if rest:
                parts.append([])
    return [part for part in parts if part]


def terminal(table: Tabular, width: int) -> "Group":
    """For a terminal of so many characters."""
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = columns_of(table)
    labels = [str(row[0]) for row in table.rows] + [label for column in columns for label in column.texts]
    own = min(WIDEST_LABEL, max(len(text) for text in [*labels, str(table.columns[0])])) + GAP
    flat, high = (packed(columns, width - own - GAP, broken) for broken in (False, True))
    broken = len(high) < len(flat)
    parts = high if broken else flat
    shown: list[Any] = [Text(table.title, style="bold")]
    for part in parts:
        groups = list(dict.fromkeys(column.group for column in part))
        over, names = _over(groups)
        mixed = len({column.ours for column in part}) > 1
        if over:
            shown.append(Text(f"  {over}", style="italic"))
        made = RichTable(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
        made.add_column(Text(str(table.columns[0])), overflow="fold", width=own - GAP)
        for column in part:
            heading = f"{names[column.group]}\n{column.heading}".strip()
            made.add_column(Text(heading), justify="right", overflow="fold", min_width=column.width(broken, mixed))
        for label in labels_of(table, part):
            texts = [column.texts.get(label, "-") for column in part]
            made.add_row(Text(label), *(Text(t.replace(" [", "\n[") if broken else t) for t in texts))
        shown.append(made)
    notes = RichTable.grid(padding=(0, 1))
    notes.add_column()
    notes.add_column(max_width=max(20, width - 2))
    for note in table.notes():
        notes.add_row(Text("-", style="dim"), Text(note, style="dim"))
    return Group(*shown, notes, Text(""))


def _over(groups: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What stands over a part of these groups, and over the columns of each."""
    if len(groups) == 1:
        return groups[0], {groups[0]: ""}
    if all(group.startswith(f"{THEIRS}, ") for group in groups):
        return THEIRS, {group: group.removeprefix(f"{THEIRS}, ") for group in groups}
    return "", {group: group for group in groups}


def markdown(table: Tabular) -> str:
    """As Markdown: a heading, the table in as many parts as it needs, the notes as a list."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(_escaped(cell) for cell in cells)} |"

    lines = [f"### {table.title}", ""]
    for part in packed(columns_of(table), MARKDOWN_WIDTH, False):
        over, names = _over(list(dict.fromkeys(column.group for column in part)))
        lines += [f"*{_escaped(over)}*", ""] if over else []
        heads = [f"{c.heading} ({names[c.group]})" if names[c.group] else c.heading for c in part]
        lines += [line([str(table.columns[0]), *heads]), f"|{'---|' + '---:|' * len(heads)}"]
        lines += [line([name, *(c.texts.get(name, "-") for c in part)]) for name in labels_of(table, part)]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in table.notes())]) + "\n"


def page(table: Tabular) -> str:
    """As HTML with its notes, everything escaped: one `<table>`, or several where a page is too narrow. Groups have a heading
    over their columns' headings, and a cell's tooltip is its protocol.
    """
    parts = packed(columns_of(table), PAGE_WIDTH, True)
    caption = f"<caption>{html.escape(table.title)}</caption>"
    tables = [_html_table(table, part, caption if i == 0 else "") for i, part in enumerate(parts)]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes())
    below = f'<ul class="notes">{notes}</ul>' if notes else ""
    return f"<figure>{''.join(tables)}{below}</figure>"


def _html_table(table: Tabular, part: Part, caption: str) -> str:
    esc = html.escape
    groups = Counter(column.group for column in part)
    over = ""
    if any(groups):
        cells = "".join(f'<th scope="colgroup" colspan="{n}">{esc(name)}</th>' for name, n in groups.items())
        over = f'<tr class="groups"><th></th>{cells}</tr>'
    first = {id(next(c for c in part if c.group == name)) for name in list(groups)[1:]}
    head = "".join(f'<th scope="col"{_edge(id(column) in first)}>{esc(column.heading)}</th>' for column in part)
    body = []
    for name in labels_of(table, part):
        cells = "".join(_html_cell(c.cells.get(name), c.texts.get(name, "-"), id(c) in first) for c in part)
        body.append(f'<tr><th scope="row">{esc(name)}</th>{cells}</tr>')
    return (
        f'<table>{caption}<thead>{over}<tr><th scope="col">{esc(str(table.columns[0]))}</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def sheet(table: Tabular) -> str:
    """As CSV, numbers in full: of a rate its value, low, high and n in columns of their own, fractions as fractions."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    columns = columns_of(table)
    heads: list[str] = [str(table.columns[0])]
    wide = [any(isinstance(cell, Rate) for cell in column.cells.values()) for column in columns]
    for column, rates in zip(columns, wide, strict=True):
        name = f"{column.heading} ({column.group})" if column.group else column.heading
        heads += [name, f"{name} low", f"{name} high", f"{name} n"] if rates else [name]
    writer.writerow(heads)
    for label in labels_of(table, columns):
        line: list[Any] = [label]
        for column, rates in zip(columns, wide, strict=True):
            cell = column.cells.get(label)
            one = [cell.value, cell.low, cell.high, cell.n] if isinstance(cell, Rate) else [cell]
            line += [*one, *([None] * (4 - len(one)) if rates else [])]
        writer.writerow(line)
    return sink.getvalue()


def common_n(table: Tabular) -> int:
    """The n that most cells have."""
    found = Counter(cell.n for row in table.rows for cell in row if isinstance(cell, Rate))
    return found.most_common(1)[0][0] if found else 0


# -- cells ---------------------------------------------------------------------------------------------------------------


def text_of(cell: Cell, n: int) -> str:
    """A cell as text. Fractions are per cent; a rate has its interval behind it, and its n where it is not the table's."""
    if isinstance(cell, Rate):
        value, low, high = (_number(number, cell.unit) for number in (cell.value, cell.low, cell.high))
        mark = "ʷ" if cell.interval.startswith("Wilson") else ""
        same = cell.unit in ("bytes", "seconds") and low == value == high
        return f"{value}{'' if same else f' [{low}, {high}]{mark}'}{'' if cell.n == n else f' n={cell.n:,}'}"
    if cell is None:
        return "-"
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}" if isinstance(cell, float) else cell


def _number(value: float, unit: str) -> str:
    if unit in ("fraction", "difference"):
        return f"{100 * value:.1f}"
    if unit == "bytes":
        return f"{value:,.0f}"
    return f"{value:.1f}" if unit == "points" else f"{value:.3g}"


def _escaped(text: str) -> str:
    """For a cell of a Markdown table."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def _edge(first: bool) -> str:
    return ' class="edge"' if first else ""


def _html_cell(cell: Cell, text: str, first: bool) -> str:
    if not isinstance(cell, Rate):
        return f"<td{_edge(first)}>{html.escape(text)}</td>"
    value, _, rest = text.partition(" ")
    small = f" <small>{html.escape(rest)}</small>" if rest else ""
    return f'<td{_edge(first)} title="{html.escape(cell.protocol)}">{html.escape(value)}{small}</td>'
