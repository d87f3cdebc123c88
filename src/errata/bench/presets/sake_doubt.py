"""SAKE's doubts: does the edit hold when somebody objects, or takes the old object's side (Scialanga et al. 2025, B.3)?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.makers import doubts, with_probes
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets import _common as common

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N = PUBLISHED_N = 150
OURS = {"DI": "doubt_i.generate", "DII": "doubt_ii.generate", "Acc": "efficacy.generate"}
GATES = {"DI": "doubt_i.gate", "DII": "doubt_ii.gate"}
# The released code's gate for doubts reads the last state with a threshold of 1000, which is always open.
SAKE_DOUBT_CODE = Method("sake-code", "sake", "single", "code-doubt", most=common.FEW)


def cases(context: Context) -> Sequence[Case]:
    """The first CounterFact edits with both doubts over the prompt, as published, and over a question.

    An edit of what the model says anyway has no old object that a doubt could assert, and is left out.
    """
    drawn = common.draw(context, N, published_n=PUBLISHED_N)
    found = []
    for case in drawn:
        if case.request.target_true is None:
            context.left_out[f"case {case.id}"] = (
                "a doubt asserts the old object, and neither data nor model give another"
            )
        else:
            found.append(with_probes(case, doubts(case), keep=("edit",)))
    return found


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """The doubts as published are over the prompt; over a question they stand in a table of their own."""
    from errata.bench.metrics import score
    from errata.bench.tables import Table, first_minus_others, metric_table, paper_table

    own, asked = (common.tagged_or_untagged(rows, form=form) for form in ("prompt", "question"))
    doubted = {letters: OURS[letters] for letters in GATES}
    note = common.PROTOCOL_NOTE
    found = [
        paper_table(own, "Doubts over the edit's prompt", "SAKE", list(GATES), preset="sake-doubt", note=note),
        first_minus_others(own, "Paired differences", OURS),
        metric_table(rows, "The edit itself", {"Acc": OURS["Acc"]}),
    ]
    if common.tag_values(rows[rows["kind"] == "doubt_i"], "form") != ["prompt"]:
        found.append(metric_table(asked, "Doubts over a natural question", doubted))
    steered = [[label, *(score(own, metric, label) for metric in GATES.values())] for label in common.gated(own)]
    found.append(Table("The edit's own gate is open behind the doubt", ["method", *GATES], steered))
    return [*found, common.cost_table(run)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """Ours as dots with intervals."""
    own = common.tagged_or_untagged(rows, form="prompt")
    path = common.dot_figure(own, run, "sake-doubt", OURS)
    return [(path, "The new object said whole behind either doubt, per cent, with 95 % intervals over edits.")]


PRESET = Preset(
    "sake-doubt",
    "SAKE under doubt",
    "Scialanga et al. 2025, table of DI and DII",
    cases,
    (common.SAKE, common.SAKE_ALONE, common.ROME, common.ACTADD, common.ICL, SAKE_DOUBT_CODE),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
    roles=("decoder", "encoder-decoder"),
)
