"""What a training is made of: a recipe, and a task that builds the model and draws its batches."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Recipe:
    """What every training has; a task's own recipe adds the rest. A copy is stored beside the weights.

    Learning rates are peaks (Muon for hidden matrices, AdamW for everything else). Warm-up and steps in optimiser steps;
    the last `decay_share` of the steps falls linearly to zero.
    """

    architecture: str
    steps: int
    tokens_per_step: int
    layers: int
    width: int
    heads: int
    lr_matrices: float = 3e-3
    lr_rest: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay_share: float = 0.55
    seed: int = 20160101

    @property
    def total_steps(self) -> int:
        """All steps, those after the decay included."""
        return self.steps

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step: warm-up, plateau, linear decay."""
        return min(1.0, (step + 1) / self.warmup, max(0.0, (self.steps - step) / (self.steps * self.decay_share)))


R = TypeVar("R", bound=Recipe)


class Task(ABC, Generic[R]):
    """A model to train and its data. Batches are pure functions of (seed, shard) or (seed, step): a run can be resumed."""

    figure: ClassVar[str]  # what `loss` gives beside the loss, as the log calls it
    compiled: ClassVar[bool] = False  # whether batches come in few shapes, so that compiling the loss pays

    def __init__(self, recipe: R):
        self.recipe = recipe

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """A fresh model, in float32."""

    @abstractmethod
    def train_tokenizer(self, out: Path) -> PreTrainedTokenizerFast:
        """The tokenizer, trained on the task's own texts and saved under `out`."""

    @abstractmethod
    def batches(self, tokenizer: PreTrainedTokenizerFast, shard: int) -> Iterator[Batch]:
        """The batches of one shard in a fixed random order."""

    def batch_instead(self, tokenizer: PreTrainedTokenizerFast, step: int) -> Batch | None:
        """A batch that takes the place of the shard's at this step; None for none."""
        return None

    @abstractmethod
    def loss(self, model: PreTrainedModel, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch in nats, and the figure that is logged."""

    def aside(self) -> torch.nn.Module | None:
        """Layers that are trained with the model and not exported; None for none."""
        return None

    def describe(self, step: int) -> str:
        """The recipe as JSON, with the steps that were taken."""
        return json.dumps(asdict(self.recipe) | {"step": step}, indent=1) + "\n"


def batches_of_like(lengths: Sequence[tuple[int, ...]], tokens: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices of rows of like length, in random order: batches of some `tokens` tokens by the last of a row's lengths.

    lengths: what the rows are sorted by, the last one being the row's tokens.
    """
    order = sorted(rng.permutation(len(lengths)).tolist(), key=lambda i: lengths[i])
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        longest = max(lengths[order[start]][-1], lengths[order[end - 1]][-1])
        if end == len(order) or (end - start + 1) * longest > tokens:
            batches.append(np.array(order[start:end]))
            start = end
    for i in rng.permutation(len(batches)):
        yield batches[i]


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids as one tensor, padded with 0."""
    out = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    for i, ids in enumerate(rows):
        out[i, : len(ids)] = torch.tensor(ids)
    return out


def byte_level_bpe(
    texts: Iterable[str], vocabulary: int, special: Sequence[str], *, prefix_space: bool
) -> ByteLevelBPETokenizer:
    """Byte-level BPE trained on texts: any UTF-8 text has tokens. The special tokens take the first ids."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=prefix_space)
    bpe.train_from_iterator(
        texts, vocab_size=vocabulary, min_frequency=2, special_tokens=list(special), show_progress=False
    )
    return bpe


def framed(bpe: ByteLevelBPETokenizer, template: str, special: Sequence[str]) -> None:
    """Let the tokenizer put special tokens around each text: "[CLS] $A [SEP]"."""
    known = [(token, int(bpe.token_to_id(token))) for token in special if token in template.split()]
    backend = bpe._tokenizer
    around = processors.TemplateProcessing(single=template, special_tokens=known)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), around])


def backend(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The tokenizer's own fast tokenizer, which encodes batches with offsets."""
    return tokenizer._tokenizer
