"""One forward pass: all ids of each row, those behind a key-value cache included, and what is decided of its columns.

With a cache a model is given the last ids only. The earlier ones come from `generate`, which hands all of them to
`prepare_inputs_for_generation`, or are those that were fed into that cache before.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from errata.errors import EditError
from errata.model.cache import cache_given, cached_tokens
from errata.model.tokens import last_positions
from errata.steering.questions import Questions


@dataclass
class Pass:
    """One forward pass: all ids and the mask of each row, and where this pass's columns begin."""

    ids: Tensor  # (B, N) every id so far, padding included
    mask: Tensor  # (B, N) bool
    start: int  # first column of this pass
    lengths: Sequence[int] | None  # of the prompts, in real tokens
    whole_rows: bool  # a classifier's, steered as a whole
    states: dict[str | int, Tensor] = field(default_factory=dict)
    gated: dict[str | int, Tensor] = field(default_factory=dict)  # site -> (B, T) edit whose gate is open, or CLOSED
    asked: dict[str | int, Tensor] = field(default_factory=dict)  # site -> (B, T) whether every gate was asked
    questions: dict[str | int, Questions] = field(default_factory=dict)  # site -> (B, T)
    points: dict[str, Tensor] = field(default_factory=dict)  # gate's digest -> (B, k), where each row ends
    nearest: Tensor | None = None  # (B, T) index of the nearest edit, open or not
    distance: Tensor | None = None  # (B, T) distance to it
    closest: Tensor | None = None  # (B, T) the same in radii

    @property
    def width(self) -> int:
        """The number T of this pass's columns."""
        return self.ids.shape[1] - self.start

    def real(self, row: int) -> Tensor:
        """The columns of a row, of all N, that hold a token."""
        return self.mask[row].nonzero()[:, 0]

    def prefix(self, row: int, column: int) -> Tensor:
        """A row's real ids up to and including a column."""
        return self.ids[row, : column + 1][self.mask[row, : column + 1]]

    def ends(self) -> Tensor:
        """(B,) the column of this pass at which each row is asked: its last real token, of a classifier the first."""
        if self.whole_rows:
            return self.mask.long().argmax(1)
        return last_positions(self.mask) - self.start


class SeenIds:
    """The ids behind key-value caches. announced (B, >= N): what `generate` has given for the next pass."""

    def __init__(self) -> None:
        self.announced: Tensor | None = None
        self._caches: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        self._prepare: Any = None
        self._own_prepare: Any = None

    def listen(self, model: Any) -> None:
        """Hear what `generate` hands to `prepare_inputs_for_generation`."""
        self._own_prepare = model.__dict__.get("prepare_inputs_for_generation")
        if not hasattr(model, "prepare_inputs_for_generation"):  # a classifier
            return
        original = model.prepare_inputs_for_generation

        @wraps(original)
        def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.announced = input_ids
            return original(input_ids, *args, **kwargs)

        model.__dict__["prepare_inputs_for_generation"] = self._prepare = prepare

    def release(self, model: Any) -> None:
        """Give `prepare_inputs_for_generation` back as it was found."""
        if model.__dict__.get("prepare_inputs_for_generation") is not self._prepare or self._prepare is None:
            return
        if self._own_prepare is None:
            del model.__dict__["prepare_inputs_for_generation"]
        else:
            model.__dict__["prepare_inputs_for_generation"] = self._own_prepare
        self._prepare = None

    def keep(self, cache: Any, ids: Tensor) -> None:
        """These ids (B, N) are in a cache now."""
        if cache is not None:
            self._caches[cache] = ids

    def follow(self, cache: Any, of: Any) -> None:
        """A copy of a key-value cache holds the ids that the cache holds."""
        if of in self._caches:
            self._caches[cache] = self._caches[of]

    def begin(self, given: Mapping[str, Any], lengths: Sequence[int] | None, whole_rows: bool) -> Pass:
        """The pass that a model called with these arguments (by name) begins.

        Raises EditError where ids are missing, or the mask is not over all of them.
        """
        ids = given.get("input_ids")
        if ids is None:
            raise EditError(
                "a steering patch reads the token ids, but the model was called without input_ids; pass input_ids instead of inputs_embeds"
            )
        cache = cache_given(given)
        past = cached_tokens(cache)
        full = self._full_ids(ids, cache, past)
        mask = given.get("attention_mask")
        mask = torch.ones_like(full) if mask is None or mask.dim() != 2 else mask
        if mask.shape != full.shape:
            raise EditError(
                f"expected an attention mask of shape {tuple(full.shape)} over all ids, found {tuple(mask.shape)}; pass it whole"
            )
        self.keep(cache, full)
        return Pass(full, mask.bool(), past, lengths, whole_rows)

    def _full_ids(self, ids: Tensor, cache: Any, past: int) -> Tensor:
        announced, self.announced = self.announced, None
        if not past:
            return ids
        wanted = past + ids.shape[1]
        if announced is not None and announced.shape[0] == ids.shape[0] and announced.shape[1] >= wanted:
            candidate = announced[:, :wanted]
            if torch.equal(candidate[:, past:], ids):
                return candidate
        known = self._caches.get(cache)
        if known is not None and known.shape[0] == ids.shape[0] and known.shape[1] >= past:
            return torch.cat([known[:, :past], ids], 1)
        raise EditError(
            f"a steering patch needs the ids behind a key-value cache, and those of the {past} cached tokens were never seen; "
            "attach the patch before the prompt is fed, or use model.generate"
        )
