"""Teacher forcing: how probable each token of an answer is behind the ones before, many prompts and answers at once."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from errata.errors import ConfigError
from errata.model.attached import asked, by_row
from errata.model.room import check_room
from errata.model.states import input_device
from errata.model.tokens import continuation_ids, pad, pad_id, token_ids
from errata.patch import Patch, attach_rows, check_fits


@dataclass(frozen=True)
class Forced:
    """One answer. logp: natural log of each token's probability; hits: whether it is the likeliest."""

    logp: tuple[float, ...]
    hits: tuple[bool, ...]

    @property
    def nll(self) -> float:
        """Mean negative log probability, nats per token."""
        return -sum(self.logp) / len(self.logp)

    @property
    def whole(self) -> bool:
        """Whether greedy decoding says the whole answer, in these very tokens."""
        return all(self.hits)


def forced(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, patches: Sequence[Patch | None] | None = None,
    batch: int = 256, batch_tokens: int = 8192,
) -> list[Forced]:  # fmt: skip
    """Each (prompt, answer) in one pass with others of like length. patches: one for each pair, which acts on its row alone.

    Tokens as in the joint string (one space between); right-padded; log-softmax in float32 (float64 of a float64 model).
    Attached contexts stand before the prompts. Raises RequestError for a row that is longer than the model's positions.
    """
    if by_row(model):
        raise ConfigError(
            "rows have patches of their own here; leave the block of `attach_rows`, and pass the patches instead"
        )
    if patches is not None:
        check_fits([patch for patch in patches if patch is not None], model, tokenizer)
        prompts = [prompt for prompt, _ in pairs]
    else:
        prompts = asked(model, [prompt for prompt, _ in pairs])
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]) + len(pairs[i][1]))
    found: dict[int, Forced] = {}
    while order:
        chosen, order = order[:batch], order[batch:]
        own = [patches[i] for i in chosen] if patches is not None else None
        with attach_rows(model, tokenizer, own, check=False) if own is not None else nullcontext():
            said = [prompts[i] for i in chosen] if own is None else asked(model, [prompts[i] for i in chosen])
            heads = token_ids(tokenizer, said)
            tails = [continuation_ids(tokenizer, text, pairs[i][1]) for text, i in zip(said, chosen, strict=True)]
            rows = [[*head, *tail] for head, tail in zip(heads, tails, strict=True)]
            check_room(model, rows, said)
            step = len(rows) if own is not None else max(1, batch_tokens // max(map(len, rows)))
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                each = _passed(model, tokenizer, heads[part], tails[part])
                found |= dict(zip(chosen[part], each, strict=True))
    return [found[i] for i in range(len(pairs))]


def _passed(model: Any, tokenizer: Any, heads: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> list[Forced]:
    rows = pad([[*h, *t] for h, t in zip(heads, tails, strict=True)], pad_id(tokenizer), input_device(model))
    with torch.no_grad():
        logits = model(**rows.inputs(model), use_cache=False).logits
    found = []
    for own, head, tail in zip(logits, heads, tails, strict=True):
        scores = own[len(head) - 1 : len(head) - 1 + len(tail)]
        scores = (scores if scores.dtype is torch.float64 else scores.float()).log_softmax(-1)
        wanted = torch.tensor(tail, device=scores.device)
        logp = scores.gather(1, wanted[:, None])[:, 0]
        found.append(Forced(tuple(logp.tolist()), tuple(scores.argmax(-1).eq(wanted).tolist())))
    return found


def exact(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether greedy decoding of each prompt says the whole object: equal to generating, at the cost of one pass.

    A generated object spelled in other tokens counts as wrong.
    """
    return [answer.whole for answer in forced(model, tokenizer, pairs)]


def target_nll(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_tokens: int = 4096) -> list[float]:
    """Mean negative log probability, in nats per token, of each target behind its prompt.

    Source: Meng et al. 2022, section 3.4; exp(-nll) is the geometric mean of the target's token probabilities.
    """
    return [answer.nll for answer in forced(model, tokenizer, pairs, batch_tokens=batch_tokens)]
