"""Prompts with what should be said, as inputs and labels of any architecture: what a loss or a teacher-forced judgement needs.

A decoder is fed the prompt and the target behind it; an encoder-decoder the prompt, and the target on its decoder's side,
closed by the end token; a classifier the prompt alone, the target being the name of a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import ConfigError, ShapeError
from errata.model.anatomy import anatomy
from errata.model.labels import label_id
from errata.model.room import check_room
from errata.model.states import input_device
from errata.model.tokens import continuation_ids, pad, pad_id, start_id, token_ids

IGNORED = -100  # in labels: nothing is asked here


@dataclass(frozen=True)
class Supervised:
    """A batch of n prompts with targets. inputs: keyword arguments of the model, `use_cache` aside.

    labels: (n, T) ids aligned with the logits (the label at t is what the logits at t should say), IGNORED elsewhere; of a
    classifier (n,) label ids.
    """

    inputs: dict[str, Tensor]
    labels: Tensor

    def nll(self, logits: Tensor, smoothing: float = 0.0) -> Tensor:
        """(n,) nats: the mean over each target's tokens of their negative log-likelihood; differentiable.

        smoothing: the weight that the target leaves to all tokens alike.
        """
        labels = self.labels if self.labels.ndim == 2 else self.labels[:, None]
        scores = logits if logits.ndim == 3 else logits[:, None]
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        losses = nn.functional.cross_entropy(
            wide.mT, labels, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing
        )
        return losses.sum(1) / (labels != IGNORED).sum(1)

    def said(self, logits: Tensor) -> Tensor:
        """(n,) booleans: whether every token of the target (the label) is the likeliest behind the ones before."""
        right = logits.argmax(-1) == self.labels
        return right if right.ndim == 1 else (right | (self.labels == IGNORED)).all(1)


def supervised(model: Any, tokenizer: Any, prompts: Sequence[str], targets: Sequence[str]) -> Supervised:
    """Inputs and labels for `model`, right-padded, on the device of its embedding.

    Raises RequestError for a text without tokens, a prompt that is too long, or a target that is no label of a classifier;
    ShapeError if there are not as many targets as prompts, ConfigError for a model that says nothing (a bare encoder).
    """
    if len(prompts) != len(targets):
        raise ShapeError(f"expected one target per prompt, found {len(targets)} for {len(prompts)} prompts.")
    role, device, fill = anatomy(model).role, input_device(model), pad_id(tokenizer)
    rows = token_ids(tokenizer, prompts)
    if role == "decoder":
        ends = [continuation_ids(tokenizer, p, t) for p, t in zip(prompts, targets, strict=True)]
        whole = [[*row, *end] for row, end in zip(rows, ends, strict=True)]
        check_room(model, whole, prompts)
        said = [[IGNORED] * (len(row) - 1) + end for row, end in zip(rows, ends, strict=True)]
        batch = pad(whole, fill, device)
        return Supervised(batch.inputs(model), _labels(said, device, batch.ids.shape[1]))
    check_room(model, rows, prompts)
    inputs = pad(rows, fill, device).inputs(model)
    if role == "classifier":
        return Supervised(inputs, torch.tensor([label_id(model, t) for t in targets], device=device))
    if role != "encoder-decoder":
        raise ConfigError(
            f"expected a model that answers, found {type(model).__name__} ({role}); load it with its head."
        )
    ends = answer_ids(tokenizer, targets)
    fed = pad([[start_id(model), *end[:-1]] for end in ends], fill, device)
    return Supervised(inputs | {"decoder_input_ids": fed.ids}, _labels(ends, device, fed.ids.shape[1]))


def answer_ids(tokenizer: Any, targets: Sequence[str]) -> list[list[int]]:
    """What an encoder-decoder should say for each target: its ids with the tokenizer's special tokens, closed by the end token."""
    end = tokenizer.eos_token_id
    rows = token_ids(tokenizer, targets)
    return [row if end is None or row[-1] == end else [*row, end] for row in rows]


def all_said(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch: int = 256) -> list[bool]:
    """Whether greedy decoding of each prompt says the whole target, in one forward pass a batch, for any architecture.

    A target spelled in other tokens counts as wrong; an encoder-decoder must end where the target ends.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    found = [False] * len(pairs)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        asked = supervised(model, tokenizer, [pairs[i][0] for i in chosen], [pairs[i][1] for i in chosen])
        with torch.no_grad():
            right = asked.said(model(**asked.inputs).logits).tolist()
        for i, ok in zip(chosen, right, strict=True):
            found[i] = ok
    return found


def _labels(rows: Sequence[Sequence[int]], device: torch.device, width: int) -> Tensor:
    labels = torch.full((len(rows), width), IGNORED, device=device)
    for i, row in enumerate(rows):
        labels[i, : len(row)] = torch.tensor(row, device=device)
    return labels
