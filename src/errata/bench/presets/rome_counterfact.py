"""ROME's CounterFact table: scores by probabilities, magnitudes, fluency and consistency (Meng et al. 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.methods import LIMITED, MODEL
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets import _common as common

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 60, 7500
# The paper's KE is the one that was retrained beside MEND; -CF: trained on CounterFact.
BASELINES = (
    Method("ft", "ft", "single", MODEL),
    Method("ft-l", "ft", "single", LIMITED),
    Method("kn", "kn", "single", MODEL),
    Method("ke", "ke", "single", "mend-code"),
    Method("ke-cf", "ke", "single", "mend-code-cf"),
    Method("mend", "mend", "single"),
    Method("mend-cf", "mend", "single", "mend-cf"),
)
SHARES = {"ES": "efficacy.prob", "PS": "generalization.prob", "NS": "specificity.prob", "S": "score.prob"}
METRICS = {
    "S": "score.prob",
    "ES": "efficacy.prob",
    "EM": "efficacy_magnitude.prob",
    "PS": "generalization.prob",
    "PM": "generalization_magnitude.prob",
    "NS": "specificity.prob",
    "NM": "specificity_magnitude.prob",
    "GE": "fluency.entropy",
    "RS": "consistency.tfidf",
}
GREEDY = {
    "efficacy": "efficacy.generate",
    "generalization": "generalization.generate",
    "specificity": "specificity.generate",
}


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits with everything that the table scores; one free text in two for each edit of Atlas."""
    drawn = common.draw(context, N, published_n=PUBLISHED_N)
    most = {"generation": 5} if common.is_atlas(context.model_name) else {}
    return common.only(drawn, "edit", "paraphrase", "neighborhood", "generation", most=most)


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """The paper's table; whole objects by greedy generation; cost."""
    from errata.bench import streams
    from errata.bench.tables import metric_table, paper_table

    note = "\n".join(f"{label}: not run: {why}." for label, why in streams.left_out(run).items())
    return [
        paper_table(rows, "CounterFact, by probabilities", "ROME", list(METRICS), preset="rome-counterfact", note=note),
        metric_table(rows, "The same edits, whole objects by greedy generation", GREEDY, note=common.PROTOCOL_NOTE),
        common.cost_table(run),
    ]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """The scores as dots with intervals."""
    path = common.dot_figure(rows, run, "rome-counterfact", SHARES)
    return [(path, "Scores by probabilities, per cent, with 95 % intervals over edits.")]


PRESET = Preset(
    "rome-counterfact",
    "ROME on CounterFact",
    "Meng et al. 2022, table of CounterFact",
    cases,
    (common.ROME, common.ROME_PUBLISHED, *BASELINES, common.MEMIT, common.SAKE),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    roles=("decoder", "encoder-decoder"),
    figures=figures,
)
