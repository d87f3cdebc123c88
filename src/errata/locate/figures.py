"""Causal traces as pictures: tokens by layers, and average effects with their bands.

matplotlib's figures are made without pyplot, so that neither its backend nor its list of open figures is touched.
"""

import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from errata.errors import ConfigError, RequestError
from errata.files import write_atomically
from errata.locate.averages import CLASSES, Averages
from errata.locate.tracing import Kind, Trace

FORMATS = ("png", "pdf", "svg")
COLOURS: dict[Kind, str] = {"hidden": "Purples", "mlp": "Greens", "attention": "Reds"}
LINES = ("#E69F00", "#56B4E9", "#CC3311", "#009E73", "#0072B2", "#666666")  # told apart by the colour-blind too
NAMES: dict[Kind, str] = {"hidden": "hidden state", "mlp": "MLP", "attention": "attention"}


def heat_map(traces: Sequence[Trace]) -> Figure:
    """Traces of one prompt side by side: a row per token (the corrupted subject's have a star), a column per layer.

    Colour is the answer's probability with the cell restored, from white at the corrupted passes' probability.
    Raises RequestError without traces, or for traces of several prompts.
    """
    if not traces or len({(t.fact, t.tokens) for t in traces}) > 1:
        raise RequestError("expected one or more traces of one prompt to draw, found none or several prompts.")
    tokens, n_layers = traces[0].tokens, traces[0].restored.shape[1]
    width = 1.2 + max(2.6, 0.11 * n_layers)
    figure = new_figure(width * len(traces) + 1.2, 1.4 + 0.21 * len(tokens))
    figure.suptitle(_wrapped(traces[0].fact.prompt, 28 * len(traces)), parse_math=False, fontsize=10)
    panels = figure.subplots(1, len(traces), sharey=True, squeeze=False)[0]
    for axes, t in zip(panels, traces, strict=True):
        values = t.restored.numpy()
        top = max(float(values.max()), t.corrupted + 1e-9)
        image = axes.imshow(values, cmap=COLOURS[t.kind], vmin=t.corrupted, vmax=top, aspect="auto")
        _layers(axes, n_layers, t.kind, t.window)
        axes.set_title(_title(t.kind, t.sever), fontsize=9)
        bar = figure.colorbar(image, ax=axes)
        bar.ax.set_title(f"p({_shown(t.answer)})", parse_math=False, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    panels[0].set_yticks(range(len(tokens)), labels=labels(traces[0]), parse_math=False, fontsize=8)
    return figure


def labels(trace: Trace) -> list[str]:
    """The prompt's tokens, with a star behind those that were corrupted."""
    return [_shown(t) + ("*" if trace.first <= i <= trace.last else "") for i, t in enumerate(trace.tokens)]


def average_figure(averages: Sequence[Averages]) -> Figure:
    """Average indirect effects: above, token classes by layers (negative ones as zero); below, lines with 95 % bands.

    Raises RequestError without averages.
    """
    if not averages:
        raise RequestError("expected averages to draw, found none.")
    figure = new_figure(1.2 + 3.6 * len(averages), 5.4)
    panels = figure.subplots(2, len(averages), squeeze=False, height_ratios=(2, 3))
    for column, a in enumerate(averages):
        upper, lower = panels[0, column], panels[1, column]
        rows = np.full((len(CLASSES), a.n_layers), np.nan)
        for name, effect in a.effects.items():
            rows[CLASSES.index(name)] = effect.mean.clamp(min=0).numpy()
        top = max(float(np.nanmax(rows)), 1e-9)
        image = upper.imshow(rows, cmap=COLOURS[a.kind], vmin=0.0, vmax=top, aspect="auto")
        upper.set_title(f"{_title(a.kind, a.sever)}, {a.n} facts", fontsize=9)
        upper.set_yticks(range(len(CLASSES)), labels=CLASSES if column == 0 else [], fontsize=8)
        figure.colorbar(image, ax=upper).ax.tick_params(labelsize=7)
        _lines(lower, a)
        for axes in (upper, lower):
            _layers(axes, a.n_layers, a.kind, a.window)
    panels[1, 0].set_ylabel("average indirect effect", fontsize=8)
    figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _lines(axes: Axes, a: Averages) -> None:
    for name, colour in zip(CLASSES, LINES, strict=True):
        effect = a.effects.get(name)
        mean = effect.mean.numpy() if effect else np.full(a.n_layers, np.nan)
        axes.plot(mean, color=colour, label=name, linewidth=1.4)
        if effect and effect.n > 1:
            half = effect.half.numpy()
            axes.fill_between(np.arange(a.n_layers), mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(0.0, color="black", linewidth=0.5)
    axes.tick_params(labelsize=7)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure in the format that the name ends in, whole or not at all. Raises ConfigError for another format."""
    kind = format_of(path)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a token in a script that the font lacks
        figure.savefig(buffer, format=kind, dpi=200)
    write_atomically(path, buffer.getvalue())


def format_of(path: str | Path) -> str:
    """png, pdf or svg, by the name. Raises ConfigError for any other."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ConfigError(f"expected a figure named *.{', *.'.join(FORMATS)}, found {Path(path).name!r}.")
    return kind


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, drawn by Agg."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _layers(axes: Axes, n_layers: int, kind: Kind, window: int) -> None:
    axes.set_xlim(-0.5, n_layers - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("layer" if kind == "hidden" else f"centre of {window} layers", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)


def _title(kind: Kind, sever: Sequence[Kind]) -> str:
    severed = f", {' and '.join(NAMES[k] for k in sever)} severed" if sever else ""
    return f"{NAMES[kind]} restored{severed}"


def _shown(text: str) -> str:
    """A token in one line: spaces around it do not show, line breaks and tabs are spelt out."""
    return text.strip(" ").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") or "␣"


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, max(40, width))[:4])
