"""KnowledgeEditor's scatter: the logit of every other claim before an edit and after it (De Cao et al. 2021).

A logit is log P(SUPPORTS) - log P(REFUTES). On the diagonal nothing has moved; in the quadrants beside it a verdict has changed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.data.kilt import FEVER_LABELS
from errata.bench.preset import Context, Preset
from errata.bench.presets import _claims as claims
from errata.bench.presets import _common as common

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N = 40
SHOWN = ("ft-all", "ke-l2", "ke+views")


def cases(context: Context) -> Sequence[Case]:
    """A few claims, each with fifty others."""
    return claims.cases(context, N)


def logits(rows: "DataFrame", method: str) -> "DataFrame":
    """A line for each claim that was asked under an edit: kind, before, after (nats), kept (the verdict)."""
    import numpy as np

    keys = ["case", "probe"]
    asked = rows[rows["p_alternative"].notna() & (rows["p_expected"] > 0) & (rows["p_alternative"] > 0)]
    towards = np.where([names[0] == "SUPPORTS" for names in asked["expected"]], 1.0, -1.0)
    both = asked.assign(logit=towards * np.log(asked["p_expected"] / asked["p_alternative"]))
    before = both[both["method"] == common.UNEDITED].set_index(keys)["logit"]
    after = both[both["method"] == method].set_index(keys)
    found = after.assign(before=before.reindex(after.index), after=after["logit"])
    return found.assign(kept=np.sign(found["before"]) == np.sign(found["after"]))[["kind", "before", "after", "kept"]]


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """How far other claims' logits move, and which verdicts with them."""
    from errata.bench import streams
    from errata.bench.tables import Table

    lines: list[list[float | str | None]] = []
    for method in [m for m in common.labels(rows) if m != common.UNEDITED]:
        found = logits(rows, method)
        own, others = found[found["kind"] == "edit"], found[found["kind"] == "locality"]
        moved = (others["after"] - others["before"]).abs()
        spread = others["before"].corr(others["after"]) if len(others) > 1 else None
        lines.append(
            [method, float((own["after"] - own["before"]).abs().mean()), float(moved.mean()), float(moved.quantile(0.95)),
             None if spread is None else float(spread), float(1 - others["kept"].mean())]
        )  # fmt: skip
    reasons = streams.left_out(run)
    lines += [[label, *[None] * 5] for label in reasons]
    heads = [
        "method",
        "edited claim moves, nats",
        "others move, nats",
        "95 % of them less than",
        "correlation",
        "verdicts changed",
    ]
    note = "\n".join(
        ["A logit is log P(SUPPORTS) - log P(REFUTES).", *(f"{m}: not run: {why}." for m, why in reasons.items())]
    )
    return [Table("Logits before and after an edit", heads, lines, note)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """A panel for each method: other claims' logits before and after, and the edited ones'."""
    from errata.locate.figures import new_figure

    methods = [m for m in common.labels(rows) if m != common.UNEDITED]
    if not methods:
        return []
    figure = new_figure(0.6 + 2.9 * len(methods), 3.2)
    grid = figure.subplots(1, len(methods), squeeze=False, sharex=True, sharey=True)
    for axes, method in zip(grid[0], methods, strict=True):
        found = logits(rows, method)
        for kind, colour, size, label in (
            ("locality", "#5b7ba6", 3, "other claims"),
            ("edit", "#c1553b", 12, "edited"),
        ):
            own = found[found["kind"] == kind]
            axes.scatter(own["before"], own["after"], s=size, color=colour, alpha=0.5, linewidths=0, label=label)
        axes.axline((0, 0), slope=1, color="#999999", linewidth=0.8)
        axes.axhline(0, color="#cccccc", linewidth=0.8)
        axes.axvline(0, color="#cccccc", linewidth=0.8)
        axes.set_title(method, loc="left", fontsize=9)
        axes.set_xlabel("before", fontsize=8)
    grid[0][0].set_ylabel("after", fontsize=8)
    grid[0][0].legend(fontsize=7, frameon=False)
    return [(common.picture(run, "ke-logits", figure), "Logits before and after an edit, nats.")]


PRESET = Preset(
    "ke-logits",
    "Logits before and after an edit",
    "De Cao et al. 2021, figure of logits",
    cases,
    tuple(method for method in claims.METHODS if method.label in SHOWN),
    tables,
    n=N,
    figures=figures,
    roles=("classifier",),
    labels=FEVER_LABELS,
)
