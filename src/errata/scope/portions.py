"""Raw features of many texts on models whose features do not fit in memory all at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.model.anatomy import Site, anatomy
from errata.model.tokens import token_ids
from errata.scope.features import features
from errata.scope.gate import Pooling

BUDGET = 2**31  # bytes of raw features to be held by `gather`


class Portions:
    """Reads the features of some layers, a portion of the texts at a time.

    A portion holds at most BUDGET/4 bytes of states (or one text), and three copies of them exist while it is read.
    """

    def __init__(self, model: Any, tokenizer: Any, layers: Sequence[Site], pooling: Pooling):
        self.model, self.tokenizer, self.layers, self.pooling = model, tokenizer, list(layers), pooling
        self.width = anatomy(model).d_model
        self.rows = max(1, BUDGET // (4 * self.width * len(self.layers)))  # positions within BUDGET, as float32

    def read(self, texts: Sequence[str], *, every: bool = False) -> Iterator[Tensor]:
        """Raw features (m, D) of one portion after another, in the texts' order; see `features`."""
        for part in self._parts(list(texts), every or self.pooling == "mean"):
            yield features(self.model, self.tokenizer, part, self.layers, self.pooling, every=every)

    def gather(self, texts: Sequence[str]) -> Tensor:
        """Raw features (n, D) of all texts; the caller keeps n within `rows`."""
        found, start = torch.empty(len(texts), self.width * len(self.layers)), 0
        for raw in self.read(texts):
            found[start : start + len(raw)] = raw
            start += len(raw)
        return found

    def columns(self, layers: Sequence[Site]) -> slice | Tensor:
        """Where the features of these layers stand; a slice, which copies nothing, if they stand side by side."""
        places = [self.layers.index(layer) for layer in layers]
        if places == list(range(places[0], places[0] + len(places))):
            return slice(places[0] * self.width, (places[-1] + 1) * self.width)
        return torch.cat([torch.arange(self.width) + self.width * place for place in places])

    def _parts(self, texts: list[str], whole: bool) -> Iterator[list[str]]:
        room = max(1, self.rows // 4)
        part: list[str] = []
        held = 0
        for text in texts:
            size = len(token_ids(self.tokenizer, [text])[0]) if whole else 1
            if part and held + size > room:
                yield part
                part, held = [], 0
            part.append(text)
            held += size
        if part:
            yield part
