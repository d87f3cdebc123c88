"""Quick judgement of edits by the probes that their requests carry, in teacher-forced passes: what choices on dev sets use.

An object is said if every token of it is the likeliest behind those before: whole objects, as under greedy decoding, at the
cost of one pass. Edits are judged all at once, or one at a time with a patch in each row of a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from errata.bench.ask import Question
from errata.bench.forced import forced
from errata.bench.metrics import by_case, rate
from errata.bench.probes import METRICS, probes_of
from errata.edit import EditRequest
from errata.model.generate import cut, greedy
from errata.patch import Patch

ANSWER_TOKENS = 6  # of an unedited answer that is compared


@dataclass(frozen=True)
class Asked:
    """Probes and what each should say. Probes whose unedited answer is empty are left out."""

    probes: tuple[Question, ...]
    answers: tuple[str, ...]

    def of(self, edit: str) -> "Asked":
        """What concerns one edit."""
        at = [i for i, q in enumerate(self.probes) if q.edit == edit]
        return Asked(tuple(self.probes[i] for i in at), tuple(self.answers[i] for i in at))


def ask_unedited(model: Any, tokenizer: Any, requests: Sequence[EditRequest]) -> Asked:
    """The probes of the requests, neighbours with the unedited model's own answers. The model must carry no patch."""
    probes = list(probes_of(requests))
    open_ones = list(dict.fromkeys(q.probe.prompt for q in probes if not q.probe.expected))
    own = dict(zip(open_ones, map(cut, greedy(model, tokenizer, open_ones, ANSWER_TOKENS)), strict=True))
    known = [(q, q.probe.expected[0] if q.probe.expected else own[q.probe.prompt]) for q in probes]
    known = [(q, answer) for q, answer in known if answer]
    return Asked(tuple(q for q, _ in known), tuple(answer for _, answer in known))


def judge(
    model: Any, tokenizer: Any, patch: Patch, asked: Asked, *, single: bool, batch: int = 64
) -> dict[str, float | None]:
    """{efficacy, generalization, specificity}: means over edits; None without probes. single: each edit by itself."""
    pairs = [(q.probe.prompt, answer) for q, answer in zip(asked.probes, asked.answers, strict=True)]
    own = {edit: patch.only(edit) for edit in patch.ids} if single else {}
    patches = [own[q.edit] for q in asked.probes] if single else None
    with nullcontext() if single else patch.attach(model, tokenizer):
        said = [answer.whole for answer in forced(model, tokenizer, pairs, patches=patches, batch=batch)]
    found: dict[str, float | None] = {}
    for kind, metric in METRICS.items():
        at = [i for i, q in enumerate(asked.probes) if q.probe.kind == kind]
        figure = rate(by_case((asked.probes[i].case for i in at), (said[i] for i in at)).values(), metric)
        found[metric] = figure.value if figure else None
    return found


def averaged(figures: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means over edits of what was judged of each by itself, over those that have it."""
    known: dict[str, list[float]] = {name: [] for name in METRICS.values()}
    for own in figures:
        for name, value in own.items():
            known[name] += [] if value is None else [value]
    return {name: sum(values) / len(values) if values else None for name, values in known.items()}
