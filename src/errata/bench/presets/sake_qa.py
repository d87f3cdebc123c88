"""Cloze, question and claim: an edit fitted in one form, asked in every other."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case, Probe
from errata.bench.makers import FORMS, form_probes, in_form, with_probes
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets import _common as common

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.metrics import Rate
    from errata.bench.tables import Table

N, PUBLISHED_N = 20, 150
METRIC = {"cloze": "generalization.generate", "question": "generalization.generate", "claim": "claim.generate"}


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits, each fitted in three forms (tag "fit") and asked in all three (tag "form")."""
    drawn = common.draw(context, N, published_n=PUBLISHED_N)
    asked = [with_probes(case, [*form_probes(case), *_stay(case)]) for case in drawn]
    return [in_form(case, form) for case in asked for form in FORMS]


def _stay(case: Case) -> list[Probe]:
    return [replace(p, tags={}) for p in case.probes if p.kind == "neighborhood"][:4]


def transfer(rows: "DataFrame", method: str) -> dict[tuple[str, str], "Rate"]:
    """(form of the fit, form of the probe) -> whole new object."""
    from errata.bench.metrics import score

    found: dict[tuple[str, str], Rate] = {}
    for fitted in FORMS:
        own = common.tagged(rows, fit=fitted)
        for form in FORMS:
            rate = score(own, METRIC[form], method, stratum=("form", form)) if len(own) else None
            if rate is not None:
                found[fitted, form] = rate
    return found


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """A table for each method: a line for the form of the fit, a column for the form of the probe."""
    from errata.bench.metrics import score
    from errata.bench.tables import Table

    note = (
        "Claims are statements that somebody vouches for, and the model is asked for their object: Atlas has no words for a "
        "verdict. Wordings of probes occur in no fit."
    )
    made: list[Table] = []
    for method in common.labels(rows):
        found = transfer(rows, method)
        lines = [
            [f"fitted as {fitted}", *(found.get((fitted, form)) for form in FORMS),
             score(common.tagged(rows, fit=fitted), "specificity.generate", method)]
            for fitted in FORMS
        ]  # fmt: skip
        made.append(
            Table(f"Transfer between forms: {method}", ["fit", *FORMS, "neighbours kept"], lines, "" if made else note)
        )
    return [*made, common.cost_table(run)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """A matrix for each method but the unedited model."""
    from errata.bench.figures import matrix

    found = []
    for method in common.labels(rows):
        values = {key: rate.value for key, rate in transfer(rows, method).items()}
        if method != common.UNEDITED and values:
            figure = matrix(values, FORMS, FORMS, left="fitted as", below="asked as")
            path = common.picture(run, f"sake-qa-{method}", figure)
            found.append((path, f"{method}: new object said whole, per cent, by the form of the fit and of the probe."))
    return found


PRESET = Preset(
    "sake-qa",
    "Cloze, question and claim",
    "ours",
    cases,
    (Method("sake", "sake", "single", common.MODEL), common.ROME),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
)
