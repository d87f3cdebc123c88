"""Requests as what a model is trained on and asked: token ids, and what it is to say where. For editors that learn by gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from errata.edit import EditRequest
from errata.editors._value_rows import Row, ValueJob, rows_of
from errata.model.states import input_device
from errata.model.tokens import pad

Call = Callable[..., Any]
"""The model, or the model with other parameters: keyword inputs -> an output with logits."""


def items_of(tokenizer: Any, requests: Sequence[EditRequest], ending: str = "") -> list[Row]:
    """Each request as one row: prompt and target teacher forced; `at` is its subject's last token (the prompt's without a subject)."""
    jobs = [ValueJob(r.prompt, r.target_new + ending, r.subject) for r in requests]
    return [own[0] for own in rows_of(tokenizer, jobs)]


def logits_of(model: Any, items: Sequence[Row], call: Call | None = None) -> Tensor:
    """(n, T, V) logits of the items as one batch, padded on the right."""
    batch = pad([item.ids for item in items], 0, input_device(model))
    logits: Tensor = (call or model)(**batch.inputs(model), use_cache=False).logits
    return logits


def losses_of(model: Any, items: Sequence[Row], call: Call | None = None, at_prompt: bool = False) -> Tensor:
    """(n,) mean over each item's target tokens of -log P(token), nats.

    at_prompt: all are read at the prompt's last token (the published fine-tuning's "prompt_last"), right for targets of one
    token.
    """
    logits = logits_of(model, items, call)
    found = []
    for i, item in enumerate(items):
        reads = [item.reads[0]] * len(item.reads) if at_prompt else list(item.reads)
        targets = torch.tensor(item.targets, device=logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        found.append(F.cross_entropy(logits[i, reads].to(wide), targets))
    return torch.stack(found)


def says(model: Any, items: Sequence[Row], call: Call | None = None, batch: int = 64) -> list[bool]:
    """Whether greedy decoding of each item's prompt says its whole target."""
    found = []
    with torch.no_grad():
        for start in range(0, len(items), batch):
            chunk = items[start : start + batch]
            best = logits_of(model, chunk, call).argmax(-1).cpu()
            found += [best[i, list(item.reads)].tolist() == list(item.targets) for i, item in enumerate(chunk)]
    return found
