"""KnowledgeEditor's table on FEVER: a verdict is turned round, others stay, and rephrases follow (De Cao et al. 2021).

Equivalence is the share of rephrases whose verdict after the edit is that of the claim itself after the edit, whichever it is;
rephrases that the unedited model judged otherwise than the claim do not count, as published.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cases import Case
from errata.bench.data.kilt import FEVER_LABELS
from errata.bench.preset import Context, Preset
from errata.bench.presets import _claims as claims
from errata.bench.presets import _common as common

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.intervals import Rate
    from errata.bench.tables import Table

N, PUBLISHED_N = 200, 10_444


def cases(context: Context) -> Sequence[Case]:
    """Claims with rephrases, related claims, and fifty others."""
    return claims.cases(context, N)


def equivalence(rows: "DataFrame", method: str) -> "Rate | None":
    """The share of an edit's rephrases that are judged as its claim is, after the edit; mean over edits."""
    from errata.bench.metrics import rate

    own = rows[rows["method"] == method]
    judged = dict(zip(*(own.loc[own["kind"] == "edit", name] for name in ("case", "generated")), strict=True))
    asked = own[(own["kind"] == "paraphrase") & own["case"].isin(judged)]
    same = asked["generated"] == asked["case"].map(judged)
    text = "equivalence: rephrases judged as the claim itself is, after the edit; mean over edits"
    return rate(same.astype(float).groupby(asked["case"]).mean(), text)


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """The paper's table, with related claims apart; cost."""
    from errata.bench import streams
    from errata.bench.metrics import score
    from errata.bench.published import PUBLISHED, SOURCES
    from errata.bench.tables import Table

    heads, lines = ["success", "retain", "equivalence", "rephrases turned", "related kept"], list[list[Any]]()
    for method in common.labels(rows):
        kept = {
            tag: score(rows, "locality.generate", method, stratum=("of", tag))
            for tag in ("other claims", "related claims")
        }
        success, turned = (score(rows, f"{name}.generate", method) for name in ("efficacy", "generalization"))
        lines.append([method, success, kept["other claims"], equivalence(rows, method), turned, kept["related claims"]])
    reasons = streams.left_out(run)
    lines += [[label, *[None] * len(heads)] for label in reasons]
    names = {theirs: ours for ours, theirs in claims.NAMES.items()}
    published = {
        model: {names.get(name, name): values for name, values in numbers.items()}
        for model, numbers in PUBLISHED["ke-fever"].items()
    }
    note = [
        "success: the claim is judged the other way. retain: verdicts on other claims that stay. related: claims about the same "
        "subject or relation.",
        f"Published: {SOURCES['ke-fever']}; per cent; retain over all other claims.",
        *(f"{label}: not run: {why}." for label, why in reasons.items()),
    ]
    title = "Verdicts turned round"
    return [Table(title, ["method", *heads], lines, "\n".join(note), published), common.cost_table(run)]


PRESET = Preset(
    "ke-fever",
    "Verdicts turned round",
    "De Cao et al. 2021, table of FEVER on BERT",
    cases,
    claims.METHODS,
    tables,
    n=N,
    published_n=PUBLISHED_N,
    roles=("classifier",),
    labels=FEVER_LABELS,
)
