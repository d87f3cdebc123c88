"""SAKE's CounterFact table: accuracy, generality and specificity of single edits (Scialanga et al. 2025)."""

from collections.abc import Sequence
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
THEIRS = {"Acc": "efficacy.sake_code", "Gen": "generalization.sake_code", "Spec": "specificity.sake_code"}


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits with paraphrases and neighbours."""
    return common.only(common.draw(context, N, published_n=PUBLISHED_N), "edit", "paraphrase", "neighborhood")


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """Whole objects and every edit's gate (ours); first tokens and the edit's own gate (published); cost."""
    return common.both_protocols(rows, run, "sake-counterfact", "CounterFact", OURS, THEIRS)


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
        common.UNIFORM,
        common.SAKE_PAPER,
        common.SAKE_CODE,
        common.ROME_PUBLISHED,
    ),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
)
