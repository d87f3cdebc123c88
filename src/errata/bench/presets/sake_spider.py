"""SAKE's radar chart: all metrics of one model (Scialanga et al. 2025)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.makers import doubts
from errata.bench.preset import Context, Preset, unfit
from errata.bench.presets import _common as common
from errata.bench.presets import sake_counterfact, sake_doubt, sake_ripple
from errata.errors import ConfigError

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 40, 150
METRICS = sake_counterfact.OURS | {k: v for k, v in sake_ripple.OURS.items() if k != "Acc"} | {
    letters: sake_doubt.OURS[letters] for letters in ("DI", "DII")
}  # fmt: skip


def cases(context: Context) -> Sequence[Case]:
    """As many CounterFact edits, with doubts, as RippleEdits edits; edits of a fact that is in both are taken once.

    Raises ConfigError for a data set that is to stand in for both.
    """
    if (why := unfit(PRESET, context.model, context.data)) is not None:
        raise ConfigError(f"{why}; leave it out, or take the preset of one of the two.")
    first = common.only(common.draw(context, N, published_n=PUBLISHED_N), "edit", "paraphrase", "neighborhood")
    first = [replace(c, id=f"counterfact-{c.id}", probes=(*c.probes, *doubts(c)[:2])) for c in first]
    keys = {case.request.key for case in first}
    # The first ones of that preset's own draw, so that their fits are shared.
    drawn = sake_ripple.cases(replace(context, n=None))[: len(first)]
    second = [replace(c, id=f"ripple-{c.id}") for c in drawn if c.request.key not in keys]
    return [*first, *second]


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """All metrics, by our protocol."""
    from errata.bench.tables import metric_table

    return [metric_table(rows, "All metrics", METRICS, note=common.PROTOCOL_NOTE), common.cost_table(run)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """The radar chart."""
    from errata.bench.figures import radar

    found = common.rates(rows, METRICS)
    columns = [c for c in METRICS if any(c in own for own in found.values())]
    values = {method: {c: rate.value for c, rate in own.items()} for method, own in found.items()}
    path = common.picture(run, "sake-spider", radar(values, columns))
    return [(path, "All metrics of one model by our protocol, per cent; the centre is 0.")]


PRESET = Preset(
    "sake-spider",
    "SAKE on all metrics",
    "Scialanga et al. 2025, radar chart",
    cases,
    (common.SAKE, common.ROME, common.MEMIT, common.ACTADD, common.UNIFORM, common.ICL),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
    roles=("decoder", "encoder-decoder"),
    own_data="both CounterFact and RippleEdits",
)
