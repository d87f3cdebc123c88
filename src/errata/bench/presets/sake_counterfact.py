"""SAKE's CounterFact table: accuracy, generality and specificity of single edits (Scialanga et al. 2025)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.preset import Context, Preset
from errata.bench.presets import _common as common

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 150, 2000
OURS = {"Acc": "efficacy.generate", "Gen": "generalization.generate", "Spec": "specificity.generate"}


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits with paraphrases and neighbours."""
    return common.only(common.draw(context, N, published_n=PUBLISHED_N), "edit", "paraphrase", "neighborhood")


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """The paper's table by our protocol and by its own; paired differences; cost."""
    from errata.bench.tables import first_minus_others, paper_table

    note = f"{common.PROTOCOL_NOTE}\n{common.GATE_NOTE}"
    table = paper_table(rows, "CounterFact", "SAKE", list(OURS), preset="sake-counterfact", note=note)
    return [table, first_minus_others(rows, "Paired differences", OURS), common.cost_table(run)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """Ours as dots with intervals."""
    path = common.dot_figure(rows, run, "sake-counterfact", OURS)
    return [(path, "Accuracy, generality and specificity by our protocol, per cent, with 95 % intervals over edits.")]


PRESET = Preset(
    "sake-counterfact",
    "SAKE on CounterFact",
    "Scialanga et al. 2025, tables of Acc, Gen and Spec",
    cases,
    (
        common.SAKE,
        common.ROME,
        common.MEMIT,
        common.ACTADD,
        replace(common.UNIFORM, most=common.MORE),
        common.SAKE_PUBLISHED,
        common.ROME_PUBLISHED,
    ),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
)
