"""SAKE's RippleEdits table: what edits entail, and what they must leave alone (Scialanga et al. 2025; Cohen et al. 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.preset import Context, Preset
from errata.bench.presets import _common as common

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 300, 885  # of Atlas's, so many that each stratum of compositions has a hundred tests
AXES = {
    "CI": "compositionality_i",
    "CII": "compositionality_ii",
    "SA": "subject_aliasing",
    "RS": "relation_specificity",
}
OURS = {"Acc": "efficacy.generate"} | {letters: f"{axis}.generate" for letters, axis in AXES.items()}
MORE = {"LG": "logical_generalization.generate", "PV": "forgetfulness.generate"}
RIPPLE = {letters: f"{axis}.ripple" for letters, axis in AXES.items()}


def cases(context: Context) -> Sequence[Case]:
    """RippleEdits' edits with all six axes and their conditions."""
    # Of Atlas's, a random half of the compositions is in the fit, in another phrasing.
    return common.draw(
        context, N, atlas="atlas-ripple", published="ripple-popular", published_n=PUBLISHED_N, implications="half"
    )


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """Ours and the published protocols; paired differences; compositions by whether the fit held them; the pass rate of conditions."""
    from errata.bench.tables import first_minus_others, metric_table, paper_table

    # What SA's published filter needs, the same maps with the gate always open, is the run's `sake-open`.
    shown = [label for label in common.labels(rows) if label != common.SAKE_OPEN.label]
    through = {"sake": "sake-open", "sake-alone": "sake-open"} if common.SAKE_OPEN.label in set(rows["method"]) else {}
    note = f"{common.PROTOCOL_NOTE}\n{common.GATE_NOTE}"
    split = {letters: OURS[letters] for letters in ("CI", "CII", "SA")}
    conditions = {letters: f"{axis}_condition.generate" for letters, axis in AXES.items() if axis != "subject_aliasing"}
    of_split = {letters: conditions.get(letters) for letters in split}
    return [
        paper_table(rows, "RippleEdits", "SAKE", list(AXES), shown, preset="sake-ripple", ungated=through, note=note),
        first_minus_others(rows, "Paired differences", OURS, shown),
        metric_table(rows, "Further axes, and the edit itself", {"Acc": OURS["Acc"]} | MORE, shown),
        metric_table(rows, "RippleEdits, scored as its authors do", RIPPLE, shown),
        *(
            metric_table(
                rows,
                f"Compositions and aliases that were {stratum}",
                split,
                shown,
                stratum=("stratum", stratum),
                note=counted(rows, stratum, of_split),
            )
            for stratum in sorted(common.tag_values(rows, "stratum"), reverse=True)
        ),
        metric_table(rows, "Tests whose conditions hold on the unedited model", conditions, [common.UNEDITED]),
        common.cost_table(run),
    ]


def counted(rows: "DataFrame", stratum: str, conditions: Mapping[str, str | None]) -> str:
    """How many tests a stratum has, and how many of their conditions hold where there is a metric for them."""
    from errata.bench.metrics import score

    plain = rows[(rows["method"] == common.UNEDITED) & ~rows["condition"].astype(bool)]
    said = []
    for letters, metric in conditions.items():
        own = common.tagged(plain[plain["kind"] == AXES[letters]], stratum=stratum)
        tests = own[["case", "test"]].drop_duplicates()
        held = score(rows, metric, common.UNEDITED, stratum=("stratum", stratum)) if metric else None
        if metric is None and len(tests):
            said.append(f"{letters}: {len(tests):,} tests of {tests['case'].nunique():,} edits.")
        if held is not None:
            said.append(
                f"{letters}: {len(tests):,} tests of {tests['case'].nunique():,} edits; the conditions of {100 * held.value:.1f} % "
                "(mean over edits) hold on the unedited model, and only these tests count."
            )
    return "\n".join(said)


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """Ours as dots with intervals."""
    shown = rows[rows["method"] != common.SAKE_OPEN.label]
    path = common.dot_figure(shown, run, "sake-ripple", OURS)
    return [(path, "RippleEdits' axes by our protocol, per cent, with 95 % intervals over edits.")]


PRESET = Preset(
    "sake-ripple",
    "SAKE on RippleEdits Popular",
    "Scialanga et al. 2025, tables of CI, CII, SA and RS",
    cases,
    (
        common.SAKE,
        common.SAKE_ALONE,
        common.ROME,
        *(replace(m, most=common.MORE) for m in (common.MEMIT, common.COMPMEMIT, common.ACTADD, common.UNIFORM)),
        common.SAKE_PAPER_POPULAR,
        common.SAKE_CODE_POPULAR,
        common.SAKE_OPEN,
    ),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
)
