"""Probes: prompts that judge an edit and never fit it, and what each should say."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from errata.edit import EditRequest
from errata.model.generate import greedy
from errata.model.room import check_room
from errata.model.tokens import continuation_ids

Kind = Literal["efficacy", "generalization", "specificity"]


@dataclass(frozen=True)
class Probe:
    """One question to the edited model. expected None: what the unedited model says."""

    kind: Kind
    case: str
    prompt: str
    expected: str | None


def probes_of(requests: Sequence[EditRequest]) -> Iterator[Probe]:
    """The probes that requests carry: their own prompt, their paraphrases, their neighbours."""
    for request in requests:
        yield Probe("efficacy", request.id, request.text, request.target_new)
        for prompt in request.paraphrase_prompts:
            yield Probe("generalization", request.id, prompt, request.target_new)
        for prompt in request.neighborhood_prompts:
            yield Probe("specificity", request.id, prompt, None)


def answers(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe],
    among: Sequence[Probe] = (),
    wrap: Callable[[str], str] = str,
) -> list[str]:
    """The greedy continuation of each probe, long enough for every expected object and the token behind it.

    among: all probes that are compared, where `probes` are some of them: continuations to be compared have one length.
    wrap: what a prompt goes through before it is asked (`errata.model.tokens.wrapper`).
    """
    expected = {p.expected for p in among or probes}
    lengths = {e: len(tokenizer(f" {e}", add_special_tokens=False)["input_ids"]) for e in expected if e}
    longest = max(lengths.values(), default=10)
    return greedy(model, tokenizer, [wrap(p.prompt) for p in probes], max_new_tokens=longest + 2)


def exact(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_tokens: int = 8192) -> list[bool]:
    """Whether greedy decoding of each prompt says the whole object: every token of it is the argmax behind the ones before.

    Equal to generating, at the cost of one forward pass for each batch (a generated object spelled in other tokens counts
    as wrong). Rows of like length share a batch.
    """
    device = next(model.parameters()).device
    rows = [(prompt, continuation_ids(tokenizer, prompt, target)) for prompt, target in pairs]
    ids = [[*tokenizer(prompt)["input_ids"], *target] for prompt, target in rows]
    check_room(model, ids, [prompt for prompt, _ in pairs])
    order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
    found = [False] * len(rows)
    while order:
        width = len(ids[order[min(len(order), 256) - 1]])
        chosen = order[: max(1, min(256, batch_tokens // width))]
        order = order[len(chosen) :]
        x = torch.zeros(len(chosen), max(len(ids[i]) for i in chosen), dtype=torch.long)
        mask = torch.zeros_like(x)
        for row, i in enumerate(chosen):
            x[row, : len(ids[i])], mask[row, : len(ids[i])] = torch.tensor(ids[i]), 1
        with torch.no_grad():
            best = (
                model(input_ids=x.to(device), attention_mask=mask.to(device), use_cache=False).logits.argmax(-1).cpu()
            )
        for row, i in enumerate(chosen):
            target = rows[i][1]
            start = len(ids[i]) - len(target) - 1
            found[i] = best[row, start : start + len(target)].tolist() == target
    return found
