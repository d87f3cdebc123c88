"""Judge single edits, each alone on the model: a batch carries one patch per row, so that a thousand edits are asked at batched speed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from errata.bench.metrics import PROTOCOL_EFFICACY, PROTOCOL_GENERALIZATION, Rate, by_case, rate
from errata.errors import RequestError
from errata.low_rank import LowRank
from errata.model.generate import cut, greedy, says
from errata.model.tokens import token_ids
from errata.patch import Patch, attach_rows

Metric = Literal["efficacy", "generalization", "other_subjects", "other_relations"]
PROTOCOLS: dict[Metric, str] = {
    "efficacy": PROTOCOL_EFFICACY,
    "generalization": PROTOCOL_GENERALIZATION,
    "other_subjects": "other_subjects.generate: unedited greedy answer kept, same relation of other subjects; mean over edits",
    "other_relations": "other_relations.generate: unedited greedy answer kept, other relations of the subject; mean over edits",
}


@dataclass(frozen=True)
class Question:
    """A prompt put to the model under one edit (its id). expected None: what the unedited model says."""

    edit: str
    metric: Metric
    prompt: str
    expected: str | None = None


def alone(patch: Patch) -> list[Patch]:
    """Each edit of a low-rank patch as a patch of its own; only where edits were fitted independently is it a single edit.

    Raises RequestError for steering parts, which act by their scope.
    """
    if patch.steering:
        raise RequestError(f"expected a patch of low-rank parts only, found steering parts in a {patch.method} patch")
    return [
        replace(
            patch,
            requests=(request,),
            parts=tuple(own for p in patch.parts if isinstance(p, LowRank) and (own := p.only(request.id)) is not None),
            report={k: v for k, v in patch.report.items() if k == request.id},
        )
        for request in patch.requests
    ]


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
    expected = [f" {q.expected}" for q in questions if q.expected]
    longest = max(map(len, token_ids(tokenizer, expected, special=False)), default=10) + 2
    kept = list(dict.fromkeys(q.prompt for q in questions if q.expected is None))
    before = dict(zip(kept, greedy(model, tokenizer, kept, longest, batch), strict=True))
    passed: dict[Question, bool] = {}
    # `greedy` runs prompts in ascending length, ties as given: in this order its rows stay beside their patches.
    order = sorted(questions, key=lambda q: len(q.prompt))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        with attach_rows(model, tokenizer, [owners[q.edit] for q in rows]):
            texts = greedy(model, tokenizer, [q.prompt for q in rows], longest, len(rows))
        for q, text in zip(rows, texts, strict=True):
            passed[q] = cut(text) == cut(before[q.prompt]) if q.expected is None else says(text, q.expected)
    found: dict[Metric, Rate] = {}
    for metric, protocol in PROTOCOLS.items():
        asked = [q for q in questions if q.metric == metric]
        cases = by_case((q.edit for q in asked), (passed[q] for q in asked))
        if (figure := rate(cases.values(), f"{protocol}; each edit alone")) is not None:
            found[metric] = figure
    return found
