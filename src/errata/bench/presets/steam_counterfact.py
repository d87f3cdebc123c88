"""STEAM against its bases: does pulling an edit to where its object lives carry it further (Jeong et al. 2025)?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets import _common as common
from errata.editors._contexts import FIXED

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 50, 2000
METRICS = {
    "efficacy": "efficacy.generate",
    "paraphrase": "generalization.generate",
    "neighborhood": "specificity.generate",
    "portability": "portability.generate",
    "of these, condition known": "portability.generate_known",
    "fluency": "fluency.entropy",
    "consistency": "consistency.tfidf",
}
PROB = {"efficacy": "efficacy.prob", "paraphrase": "generalization.prob", "neighborhood": "specificity.prob"}
# Base and STEAM alike in the five contexts in which STEAM's strength was chosen.
FEW = {"contexts": FIXED[:5]}
METHODS = (
    Method("rome", "rome", "single", common.MODEL, FEW),
    Method("steam", "steam", "single", common.MODEL, {"base": "rome", **FEW}),
    Method("memit", "memit", "all", common.MODEL, FEW),
    Method("steam-memit", "steam", "all", common.MODEL, {"base": "memit", **FEW}),
)


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits from which something follows through the new object."""
    drawn = common.draw(context, N, published_n=PUBLISHED_N, portable="yes")
    most = {"generation": 3, "neighborhood": 4} if common.is_atlas(context.model_name) else {}
    return common.only(drawn, "edit", "paraphrase", "neighborhood", "portability", "generation", most=most)


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """Every metric, gains over the base paired over edits, scores by probabilities, cost."""
    from errata.bench.published import REMARKS
    from errata.bench.tables import difference_table, metric_table

    remarks = "\n".join((common.PROTOCOL_NOTE, *REMARKS["steam-counterfact"]))
    pairs = [("steam", "rome"), ("steam-memit", "memit")]
    return [
        metric_table(rows, "STEAM and its bases", METRICS, note=remarks),
        difference_table(rows, "Gain over the base, paired over edits", METRICS, pairs),
        metric_table(rows, "By probabilities, as published", PROB),
        common.cost_table(run),
    ]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """The shares as dots with intervals."""
    shares = {name: metric for name, metric in METRICS.items() if metric.endswith(".generate")}
    path = common.dot_figure(rows, run, "steam-counterfact", shares)
    return [
        (path, "STEAM and its bases, whole objects by greedy generation, per cent, with 95 % intervals over edits.")
    ]


PRESET = Preset(
    "steam-counterfact",
    "STEAM on CounterFact",
    "Jeong et al. 2025, single and batch editing",
    cases,
    METHODS,
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
)
