"""STEAM's sweeps: the strength of the alignment and the depth of the aligned layers (Jeong et al. 2025)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets import _common as common
from errata.bench.presets.steam_counterfact import FEW

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 24, 200
WEIGHTS = (0.0, 1.0, 5.0, 20.0, 100.0)
DEPTHS = {"early": (0.375, 0.625), "middle": (0.5, 0.75), "late": (0.625, 0.875), "all": (0.375, 1.0)}
METRICS = {
    "efficacy": "efficacy.generate",
    "paraphrase": "generalization.generate",
    "neighborhood": "specificity.generate",
    "portability": "portability.generate",
    "fluency": "fluency.entropy",
}
STRENGTHS = {w: Method(f"weight-{w:g}", "steam", "single", common.MODEL, {"weight": w, **FEW}) for w in WEIGHTS}
LAYERS = tuple(
    Method(f"layers-{name}", "steam", "single", common.MODEL, {"depth": depth, **FEW}) for name, depth in DEPTHS.items()
)


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits from which something follows through the new object."""
    drawn = common.draw(context, N, published_n=PUBLISHED_N, portable="yes")
    most = {"generation": 2, "neighborhood": 4}
    return common.only(drawn, "edit", "paraphrase", "neighborhood", "portability", "generation", most=most)


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """A line for each setting; weight 0 is STEAM's base."""
    from errata.bench.published import REMARKS
    from errata.bench.tables import metric_table

    note = (
        "weight-0 is STEAM's base, ROME with the same options (rome-base in steam-counterfact). Depths are shares of the "
        "model's layers; strength 20 throughout.\n" + REMARKS["steam-sweep"][0]
    )
    return [metric_table(rows, "STEAM by strength and by aligned layers", METRICS, note=note), common.cost_table(run)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """Shares over the strength, and by the depth of the aligned layers."""
    from errata.bench.figures import Series, curves, dots
    from errata.bench.metrics import score

    there = {w: m.label for w, m in STRENGTHS.items() if m.label in set(rows["method"])}
    shares, drawn = {name: metric for name, metric in METRICS.items() if metric.endswith(".generate")}, []
    if there:
        found = {
            name: [(w, score(rows, metric, label)) for w, label in there.items()] for name, metric in shares.items()
        }
        series = [
            Series(name, tuple(common.point(w, r) for w, r in own if r is not None)) for name, own in found.items()
        ]
        figure = curves({"STEAM on ROME": series}, "strength of the alignment", "per cent", log=True, ticks=list(there))
        drawn.append((common.picture(run, "steam-sweep", figure), "By the strength of the alignment, with 95 % bands."))
    deep = [m.label for m in (STRENGTHS[0.0], *LAYERS) if m.label in set(rows["method"])]
    if set(deep) - set(there.values()):
        by_depth = common.rates(rows, shares, deep)
        values = {m: {c: (r.value, r.low, r.high) for c, r in own.items()} for m, own in by_depth.items()}
        path = common.picture(
            run, "steam-sweep-depth", dots(values, [c for c in shares if any(c in v for v in values.values())])
        )
        drawn.append(
            (path, "By the depth of the aligned layers, without alignment at the top, with 95 % intervals over edits.")
        )
    return drawn


PRESET = Preset(
    "steam-sweep",
    "STEAM by strength and depth",
    "Jeong et al. 2025, sweeps",
    cases,
    (*STRENGTHS.values(), *LAYERS),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
)
