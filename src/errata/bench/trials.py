"""Quick judgement of edits by the probes that their requests carry, in teacher-forced passes: what choices on dev sets use.

An object is said if every token of it is the likeliest behind those before: whole objects, as under greedy decoding, at the
cost of one pass. Edits are judged all at once, or one at a time with a patch in each row of a batch.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from errata.bench.metrics import by_case, rate
from errata.bench.probes import Probe, probes_of
from errata.bench.singles import alone
from errata.edit import EditRequest
from errata.model.generate import cut, greedy
from errata.model.room import check_room
from errata.model.tokens import continuation_ids, pad, pad_id, token_ids
from errata.patch import Patch, attach_rows

ANSWER_TOKENS = 6  # of an unedited answer that is compared


@dataclass(frozen=True)
class Asked:
    """Probes and what each should say. Probes whose unedited answer is empty are left out."""

    probes: tuple[Probe, ...]
    rows: tuple[tuple[int, ...], ...]  # prompt and expected answer
    answers: tuple[tuple[int, ...], ...]  # the answer alone


def ask_unedited(model: Any, tokenizer: Any, requests: Sequence[EditRequest]) -> Asked:
    """The probes of the requests, neighbours with the unedited model's own answers. The model must carry no patch."""
    probes = list(probes_of(requests))
    open_ones = [probe for probe in probes if probe.expected is None]
    texts = greedy(model, tokenizer, [probe.prompt for probe in open_ones], ANSWER_TOKENS) if open_ones else []
    own = dict(zip(open_ones, map(cut, texts), strict=True))
    probes = [probe for probe in probes if probe.expected or own[probe]]
    heads = token_ids(tokenizer, [probe.prompt for probe in probes])
    answers = [tuple(continuation_ids(tokenizer, p.prompt, p.expected or own[p])) for p in probes]
    rows = [(*head, *answer) for head, answer in zip(heads, answers, strict=True)]
    check_room(model, [list(row) for row in rows], [probe.prompt for probe in probes])
    return Asked(tuple(probes), tuple(rows), tuple(answers))


def judge(
    model: Any, tokenizer: Any, patch: Patch, asked: Asked, *, single: bool, batch: int = 64
) -> dict[str, float | None]:
    """{efficacy, generalization, specificity}: means over edits; None without probes. single: each edit by itself."""
    own_patch = {one.ids[0]: one for one in alone(patch)} if single else {}
    order = sorted(range(len(asked.rows)), key=lambda i: len(asked.rows[i]))
    said = [False] * len(order)
    device = next(model.parameters()).device
    with nullcontext() if single else patch.attach(model, tokenizer):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            rows = pad([asked.rows[i] for i in chosen], pad_id(tokenizer), device)
            own = [own_patch[asked.probes[i].case] for i in chosen] if single else []
            with torch.no_grad(), attach_rows(model, tokenizer, own) if single else nullcontext():
                best = model(**rows.inputs(model), use_cache=False).logits.argmax(-1).cpu()
            for row, i in enumerate(chosen):
                end, n = len(asked.rows[i]) - 1, len(asked.answers[i])
                said[i] = best[row, end - n : end].tolist() == list(asked.answers[i])
    found: dict[str, float | None] = {}
    for kind in ("efficacy", "generalization", "specificity"):
        at = [i for i, probe in enumerate(asked.probes) if probe.kind == kind]
        figure = rate(by_case((asked.probes[i].case for i in at), (said[i] for i in at)).values(), kind)
        found[kind] = figure.value if figure else None
    return found
