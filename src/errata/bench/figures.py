"""Pictures of a run's figures: radar charts, curves with bands, dots with intervals, transfer matrices.

Made to be read in print and by the colour-blind: Okabe and Ito's colours, and for each method also a marker and a line style
of its own, the same in every figure; names stand at the ends of lines, not in a legend far away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, isnan, nan, pi
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from errata.errors import RequestError
from errata.locate.figures import new_figure

Line = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Style:
    """How a method is drawn. A variant of a method ("sake-paper") has its colour and marker, hollow, and another line."""

    colour: str
    marker: str
    line: Line
    hollow: bool = False

    @property
    def face(self) -> str:
        """The marker's inside."""
        return "white" if self.hollow else self.colour


# Okabe and Ito 2008, without yellow, which is too light for lines on paper.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#767676"
SOLID: Line = "-"
DASHED: Line = (0, (4, 2))
DOTTED: Line = (0, (1, 1.5))
DASHDOT: Line = (0, (5, 1.5, 1, 1.5))
LONG: Line = (0, (8, 2))
LINES = (SOLID, DASHED, DASHDOT, DOTTED, LONG)
STYLES: Mapping[str, Style] = {
    "sake": Style(BLUE, "o", SOLID),
    "rome": Style(RED, "s", DASHED),
    "memit": Style(GREEN, "^", DASHDOT),
    "compmemit": Style(SKY, "v", LONG),
    "steam": Style(PINK, "D", SOLID),
    "uniform": Style(ORANGE, "P", DASHED),
    "actadd": Style(BLACK, "X", DOTTED),
    "icl": Style(GREY, "*", DASHDOT),
    "unedited": Style(GREY, "|", DOTTED),
}
# A second round of the colours has other markers and lines.
SPARE = tuple(
    Style(colour, "osD^vPX"[(i + shift) % 7], LINES[(i + shift) % 5])
    for shift in (0, 3)
    for i, colour in enumerate((BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK))
)
SMALL = 8
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f}")


@dataclass(frozen=True)
class Point:
    """One figure with its interval; low and high None where there is none. Shares, so 0 to 1."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line: its label, whose style it has (a method's name, or "" for the next spare one), its points by x."""

    label: str
    points: tuple[Point, ...]
    style: str = ""


def styles_of(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label: a method's own, a variant's like its method's but hollow, a spare one for anything else.

    No two are alike while there are styles left.
    """
    found: dict[str, Style] = {name: STYLES[name] for name in labels if name in STYLES}
    for number, name in enumerate(labels):
        if name in found:
            continue
        method = max((known for known in STYLES if name.startswith(f"{known}-")), key=len, default="")
        own = STYLES.get(method)
        wanted = [replace(own, line=line, hollow=True) for line in LINES if line != own.line] if own else []
        spare = [SPARE[(number + i) % len(SPARE)] for i in range(len(SPARE))]
        taken = list(found.values())
        found[name] = next((style for style in (*wanted, *spare) if style not in taken), SPARE[number % len(SPARE)])
    return {name: found[name] for name in labels}


def curves(
    panels: Mapping[str, Sequence[Series]],
    xlabel: str,
    ylabel: str,
    *,
    log: bool = False,
    ticks: Sequence[float] | None = None,
    low: float | None = None,
    marks: Mapping[str, Mapping[str, float]] | None = None,
    shared: bool = True,
) -> Figure:
    """Lines with 95 % bands, a panel for each title, shares as per cent on one scale.

    log: x on a logarithmic scale (symmetric around 0, so that 0 has a place); ticks: of x; low: where the scale of y begins
    (default: 0); marks: named places on the x axis of a panel, a thin vertical line each; shared: whether one scale of x serves
    all panels. Raises RequestError without a point.
    """
    shown = {title: [s for s in series if s.points] for title, series in panels.items()}
    if not any(shown.values()):
        raise RequestError("expected points to draw, found none.")
    columns = min(3, len(shown))
    rows = ceil(len(shown) / columns)
    figure = new_figure(1.0 + 3.3 * columns, 0.5 + 2.7 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=True)
    styles = styles_of(list(dict.fromkeys(s.style or s.label for series in shown.values() for s in series)))
    for axes, (title, series) in zip(grid.flat, shown.items(), strict=False):
        if log:
            axes.set_xscale("symlog", linthresh=1)
        for one in series:
            _line(axes, one, styles[one.style or one.label])
        for name, x in (marks or {}).get(title, {}).items():
            axes.axvline(x, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(name, (x, 0), xycoords=("data", "axes fraction"), xytext=(-2, 3), textcoords="offset points",
                          fontsize=SMALL - 1, color=GREY, va="bottom", ha="right", rotation=90)  # fmt: skip
        if ticks is not None:
            axes.set_xticks(list(ticks), labels=[f"{t:g}" for t in ticks])
            axes.minorticks_off()
        axes.set_title(title, fontsize=SMALL + 1, loc="left")
        _plain(axes)
        axes.set_ylim(0.0 if low is None else low, 1.02)
        axes.tick_params(labelbottom=True)  # of a panel that has none below it, too
        axes.set_xlabel(xlabel, fontsize=SMALL)
        axes.yaxis.set_major_formatter(_PERCENT)
        _end_labels(axes, [(s.label, s.points, styles[s.style or s.label]) for s in series])
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel(ylabel, fontsize=SMALL)
    return figure


def _line(axes: Axes, series: Series, style: Style) -> None:
    x, y = [p.x for p in series.points], [p.y for p in series.points]
    every = max(1, len(x) // 8)
    axes.plot(
        x,
        y,
        color=style.colour,
        linestyle=style.line,
        marker=style.marker,
        markersize=4,
        markevery=every,
        linewidth=1.4,
    )
    low = np.array([nan if p.low is None else p.low for p in series.points])
    high = np.array([nan if p.high is None else p.high for p in series.points])
    if not np.isnan(low).all():
        axes.fill_between(x, low, high, color=style.colour, alpha=0.1, linewidth=0)


def _end_labels(axes: Axes, lines: Sequence[tuple[str, tuple[Point, ...], Style]], apart: float = 0.062) -> None:
    """Names at the right of lines, pushed apart where lines end side by side (`apart`: a share of the y axis)."""
    bottom, top = axes.get_ylim()
    ends = sorted(((points[-1].y - bottom) / (top - bottom), name, style) for name, points, style in lines)[::-1]
    places: list[float] = []
    for y, _, _ in ends:
        places.append(min(y, places[-1] - apart) if places else min(y, 1.0))
    if places and places[-1] < 0.0:  # too many at the bottom: lift them together
        places = [max(p, (len(places) - 1 - i) * apart) for i, p in enumerate(places)]
    for (y, name, style), place in zip(ends, places, strict=True):
        x = max(points[-1].x for label, points, _ in lines if label == name)
        axes.annotate(
            name, (x, bottom + y * (top - bottom)), xytext=(1.03, place), textcoords="axes fraction", fontsize=SMALL,
            color=style.colour if style.colour != SKY else BLUE, va="center", annotation_clip=False,
            # Grey and dotted: a line that ends early must not look as if it went on to its name.
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "linestyle": (0, (1, 3)), "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


def radar(scores: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> Figure:
    """All metrics of one model on spokes from 0 to 100 %, a polygon for each method; a missing metric leaves a gap.

    Raises RequestError for fewer than three metrics, or without methods.
    """
    if len(metrics) < 3 or not scores:
        raise RequestError(f"expected at least three metrics and a method, found {len(metrics)} and {len(scores)}.")
    figure = new_figure(7.0, 5.0)
    figure.get_layout_engine().set(w_pad=0.25)  # type: ignore[union-attr, call-arg]  # labels lie outside the axes
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_offset(pi / 2)
    axes.set_theta_direction(-1)
    angles = [2 * pi * i / len(metrics) for i in range(len(metrics))]
    for label, style in styles_of(list(scores)).items():
        values = [scores[label].get(m, nan) for m in metrics]
        axes.plot([*angles, angles[0]], [*values, values[0]], color=style.colour, linestyle=style.line, marker=style.marker,
                  markersize=4, markerfacecolor=style.face, linewidth=1.5, label=label)  # fmt: skip
    axes.set_xticks(angles, labels=metrics, fontsize=SMALL + 1)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        text.set_horizontalalignment(
            "center" if min(angle, abs(angle - pi)) < 0.1 else "left" if angle < pi else "right"
        )
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], labels=["25", "50", "75", "100"], fontsize=SMALL - 1, color=GREY)
    axes.set_rlabel_position(180 / len(metrics))
    axes.tick_params(axis="x", pad=6)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines["polar"].set_color("#BBBBBB")
    figure.legend(loc="outside right center", fontsize=SMALL, frameon=False, handlelength=3.5)
    return figure


def dots(rows: Mapping[str, Mapping[str, tuple[float, float, float]]], metrics: Sequence[str]) -> Figure:
    """Figures with their 95 % intervals: a row for each method, a panel for each metric; shares as per cent.

    rows: method -> metric -> (value, low, high). Raises RequestError without rows.
    """
    if not rows or not metrics:
        raise RequestError("expected methods and metrics to draw, found none.")
    names = list(rows)
    figure = new_figure(1.3 + 1.7 * len(metrics), 0.8 + 0.27 * len(names))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    styles = styles_of(names)
    for axes, metric in zip(panels, metrics, strict=True):
        for y, name in enumerate(names):
            if metric not in rows[name] or isnan(rows[name][metric][0]):
                continue
            value, low, high = rows[name][metric]
            colour, style = styles[name].colour, styles[name]
            axes.plot([low, high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot(
                value, y, marker=style.marker, color=colour, markerfacecolor=style.face, markersize=5.5, linestyle="",
                clip_on=False,
            )  # fmt: skip
        axes.set_title(metric, fontsize=SMALL, loc="left")
        axes.set_xlim(-0.05, 1.05)
        axes.set_xticks([0, 0.5, 1.0])
        axes.xaxis.set_major_formatter(_PERCENT)
        _plain(axes)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    panels[0].set_yticks(range(len(names)), labels=names, fontsize=SMALL)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


def matrix(
    values: Mapping[tuple[str, str], float], rows: Sequence[str], columns: Sequence[str], *, left: str, below: str
) -> Figure:
    """Shares by row and column as a grey scale with the number in each cell: what is fitted against what is asked.

    Raises RequestError without a value.
    """
    if not values:
        raise RequestError("expected values to draw, found none.")
    figure = new_figure(1.8 + 0.9 * len(columns), 1.0 + 0.5 * len(rows))
    axes = figure.subplots()
    table = np.array([[values.get((r, c), nan) for c in columns] for r in rows])
    axes.imshow(table, cmap="Greys", vmin=0, vmax=1.25, aspect="auto")
    for i, j in np.ndindex(table.shape):
        text = "–" if isnan(table[i, j]) else f"{100 * table[i, j]:.0f}"
        axes.text(
            j, i, text, ha="center", va="center", fontsize=SMALL + 1, color="white" if table[i, j] > 0.62 else "black"
        )
    axes.set_xticks(range(len(columns)), labels=columns, fontsize=SMALL)
    axes.set_yticks(range(len(rows)), labels=rows, fontsize=SMALL)
    axes.set_xlabel(below, fontsize=SMALL)
    axes.set_ylabel(left, fontsize=SMALL)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=SMALL - 1, width=0.6)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
