"""ROME's CounterFact table: scores by probabilities, magnitudes, fluency and consistency (Meng et al. 2022)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.methods import LIMITED, MODEL
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets import _common as common
from errata.model.anatomy import anatomy

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 60, 7500
UNRELATED = 4  # unrelated texts asked of each edit, the next ones of the next
FEWER = {"gptj": 2000}  # of the paper's, by family
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
GREEDY = {name: f"{name}.generate" for name in ("efficacy", "generalization", "specificity")}
FORCED = {f"{name}, teacher-forced": f"{name}.teacher_forced_exact" for name in GREEDY}  # MEMIT's greedy accuracies
DRAWDOWN = {"drawdown": "drawdown.nll"}


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits with everything that the table scores, and unrelated texts; one free text in two for each edit of Atlas."""
    published_n = FEWER.get(anatomy(context.model).family, PUBLISHED_N)
    drawn = common.draw(context, N, published_n=published_n, references=True)
    most = {"generation": 5} if common.is_atlas(context.model_name) else {}
    chosen = common.only(drawn, "edit", "paraphrase", "neighborhood", "generation", most=most)
    texts = common.unrelated(context)
    return [replace(c, probes=(*c.probes, *common.in_turn(texts, i, UNRELATED))) for i, c in enumerate(chosen)]


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """The paper's table; whole objects by greedy generation and teacher-forced, drawdown; paired differences; cost."""
    from errata.bench import streams
    from errata.bench.glossary import term
    from errata.bench.tables import faults, first_minus_others, metric_table, paper_table

    note = "\n".join(f"{label}: not run: {why}." for label, why in streams.left_out(run).items())
    terms = {name: term("MEMIT", letters) for name, letters in zip(GREEDY, ("ES", "PS", "NS"), strict=True)}
    return [
        paper_table(rows, "CounterFact, by probabilities", "ROME", list(METRICS), preset="rome-counterfact", note=note),
        metric_table(
            rows,
            "The same edits, whole objects by greedy generation",
            GREEDY | FORCED | DRAWDOWN,
            note="\n".join((common.PROTOCOL_NOTE, *faults("MEMIT", terms), common.DRAWDOWN_NOTE)),
            beside={column: ("MEMIT's protocol", column.split(",")[0]) for column in FORCED},
        ),
        first_minus_others(rows, "Paired differences", METRICS | DRAWDOWN),
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
