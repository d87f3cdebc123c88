"""Judge single edits, each alone on the model: a batch carries one patch per row, so that a thousand edits are asked at batched speed."""

from collections.abc import Sequence
from typing import Any, Literal

from errata.bench.ask import Question, ask
from errata.bench.cases import Kind
from errata.bench.metrics import PROTOCOL_EFFICACY, PROTOCOL_GENERALIZATION, Rate, by_case, rate
from errata.errors import RequestError
from errata.patch import Patch

Metric = Literal["efficacy", "generalization", "other_subjects", "other_relations"]
PROTOCOLS: dict[Metric, str] = {
    "efficacy": PROTOCOL_EFFICACY,
    "generalization": PROTOCOL_GENERALIZATION,
    "other_subjects": "other_subjects.generate: unedited greedy answer kept, same relation of other subjects; mean over edits",
    "other_relations": "other_relations.generate: unedited greedy answer kept, other relations of the subject; mean over edits",
}
KINDS: dict[Metric, Kind] = {
    "efficacy": "edit",
    "generalization": "paraphrase",
    "other_subjects": "neighborhood",
    "other_relations": "other_relation",
}


def alone(patch: Patch) -> list[Patch]:
    """Each edit of a patch as a patch of its own; only where edits were fitted independently is it a single edit."""
    return [patch.only(edit) for edit in patch.ids]


def judge_singles(
    model: Any, tokenizer: Any, patches: Sequence[Patch], questions: Sequence[Question], batch: int = 64
) -> dict[Metric, Rate]:
    """The rate of each metric that is asked about, over edits, under patches of one edit each; `batch` rows at a time.

    Raises RequestError for a patch of several edits, or a question about an edit that no patch holds.
    """
    owners = {patch.ids[0]: patch for patch in patches if len(patch) == 1}
    unknown = [q.edit for q in questions if q.edit not in owners]
    if len(owners) < len(patches) or unknown:
        raise RequestError(
            f"expected patches of one edit each, no edit twice, and questions about these, found {len(patches)} patches of "
            f"{len(owners)} single edits and {len(unknown)} questions about others; split a patch with `alone`"
        )
    rows = ask(model, tokenizer, questions, patches=owners, batch=batch, figures=False)
    found: dict[Metric, Rate] = {}
    for metric, protocol in PROTOCOLS.items():
        own = [row for row in rows if row["kind"] == KINDS[metric]]
        cases = by_case((row["edit"] for row in own), (row["passed"] for row in own))
        if (figure := rate(cases.values(), f"{protocol}; each edit alone")) is not None:
            found[metric] = figure
    return found
