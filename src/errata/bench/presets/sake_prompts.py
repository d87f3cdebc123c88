"""SAKE by the number of training prompts: accuracy, generality and specificity (Scialanga et al. 2025)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets import _common as common
from errata.bench.presets.sake_counterfact import OURS

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 40, 150
COUNTS = (2, 5, 10, 25, 50, 100)
METHODS = {
    n: Method(f"sake-{n}", "sake", changes={"prompts": n, "context_prompts": min(n, 12), "implications": "none"})
    for n in COUNTS
}


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits with paraphrases and neighbours."""
    return common.only(common.draw(context, N, published_n=PUBLISHED_N), "edit", "paraphrase", "neighborhood")


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """A line for each number of prompts."""
    from errata.bench.tables import metric_table

    note = "An edit of Atlas brings some 26 prompts of its own; more are the same ones behind lead-ins."
    return [metric_table(rows, "By the number of training prompts", OURS, note=note), common.cost_table(run)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """Three curves over the number of prompts."""
    from errata.bench.figures import Series, curves
    from errata.bench.metrics import score

    there = {n: m.label for n, m in METHODS.items() if m.label in set(rows["method"])}
    series = []
    for letters, metric in OURS.items():
        found = [(n, score(rows, metric, label)) for n, label in there.items()]
        series.append(Series(letters, tuple(common.point(n, rate) for n, rate in found if rate is not None)))
    figure = curves({"SAKE": series}, "training prompts", "per cent", log=True, ticks=list(there))
    return [(common.picture(run, "sake-prompts", figure), "By the number of training prompts, with 95 % bands.")]


PRESET = Preset(
    "sake-prompts",
    "SAKE by the number of training prompts",
    "Scialanga et al. 2025, figure of Acc, Gen and Spec by prompts",
    cases,
    tuple(METHODS.values()),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
)
