"""Merging: a low-rank patch written into the weights, for export or for a model that is to run without hooks.

The original of every weight that is written is kept, and unmerging puts it back: subtracting the update would leave other
bits in about one float32 entry of seven. With several patches merged, a weight is always its original plus the sum of what
is merged at the time, so they may leave in any order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from errata.errors import UnsupportedPatchError
from errata.low_rank import LowRank, stacked
from errata.low_rank_table import base_layer, forget_decisions, places, refuse_present
from errata.model.anatomy import submodule
from errata.model.attached import MERGED
from errata.patch import Patch, check_fits

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def merge(patch: Patch, model: Any, tokenizer: Any) -> "Merged":
    """Write the patch's updates into the model's weights; the handle is a context manager, and `unmerge` undoes it exactly.

    The update is added in float32 (float64 to float64 weights) and the sum rounded once to the weight's dtype. Raises
    UnsupportedPatchError for steering parts and for weights that cannot take an update (quantised, offloaded, shared),
    RequestError if one of its edits is attached or merged already, BaseMismatchError if it was fitted on another model.
    Nothing is written unless everything can be.
    """
    refuse_unwritable(patch, "merged into weights")
    refuse_present(model, (edit for part in patch.low_rank for edit in part.edits))
    check_fits([patch], model, tokenizer)
    return Merged(patch, model)


def refuse_unwritable(patch: Patch, what: str) -> None:
    """Raise UnsupportedPatchError if the patch has parts that no weights say. what: "merged into weights", "exported"."""
    if patch.context:
        raise UnsupportedPatchError(
            f"a {patch.method} patch cannot be {what}: it is text that stands before prompts, and no weights say that; "
            "attach it instead"
        )
    if patch.steering:
        raise UnsupportedPatchError(
            f"a {patch.method} patch cannot be {what}: its steering parts map hidden states within their scope, and no "
            "weights say that; attach it instead"
        )


class Merged:
    """One merged patch. `with merge(...)` or `merged.unmerge()`; unmerging twice is harmless."""

    def __init__(self, patch: Patch, model: Any):
        self.patch, self.model = patch, model
        self._weights: _Weights = vars(model).get(MERGED) or _Weights(model)
        self._weights.add(self, patch.low_rank)

    def __enter__(self) -> "Merged":
        return self

    def __exit__(self, *_: object) -> None:
        self.unmerge()

    def unmerge(self) -> None:
        """Take this patch out of the weights; the last one leaves every bit as it was before the first."""
        self._weights.remove(self)


class _Weights:
    """All merged weights of one model: their originals, and what is merged into each."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._originals: dict[str, Tensor] = {}
        self._loads: dict[object, list[tuple[str, LowRank]]] = {}

    @property
    def edits(self) -> set[str]:
        """Ids of the merged edits."""
        return {edit for load in self._loads.values() for _, part in load for edit in part.edits}

    def add(self, owner: object, parts: Sequence[LowRank]) -> None:
        placed = places(self.model, parts)
        paths = list(dict.fromkeys(path for path, _ in placed))
        _refuse_unwritable_weights(self.model, paths)  # every refusal comes before the first write
        self._loads[owner] = placed
        try:
            for path in paths:
                if path not in self._originals:
                    self._originals[path] = _weight(self.model, path).detach().clone()
            self._write(paths)
        except BaseException:
            self.remove(owner)
            raise

    def remove(self, owner: object) -> None:
        if (load := self._loads.pop(owner, None)) is not None:
            self._write(dict.fromkeys(path for path, _ in load))

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside, the weights are the originals. Nothing may be merged or unmerged in there."""
        weights = {path: _weight(self.model, path) for path in self._originals}
        with torch.no_grad():
            written = {path: weight.detach().clone() for path, weight in weights.items()}
        try:
            with torch.no_grad():
                for path, weight in weights.items():
                    weight.copy_(self._originals[path])
            yield
        finally:
            with torch.no_grad():
                for path, weight in weights.items():
                    weight.copy_(written[path])
            forget_decisions(self.model)

    def _write(self, paths: Any) -> None:
        """Bring these weights in line with what is merged; forget the originals of those that are restored."""
        for path in paths:
            if path not in self._originals:
                continue
            parts = [part for load in self._loads.values() for p, part in load if p == path]
            original = self._originals[path]
            turned = isinstance(base_layer(submodule(self.model, path)), Conv1D)
            with torch.no_grad():
                _weight(self.model, path).copy_(_sum(original, parts, turned) if parts else original)
            if not parts:
                del self._originals[path]
        if self._loads:
            vars(self.model)[MERGED] = self
        else:
            vars(self.model).pop(MERGED, None)
        forget_decisions(self.model)


def _sum(weight: Tensor, parts: Sequence[LowRank], turned: bool) -> Tensor:
    """The weight plus U Vᵀ, in the weight's dtype; turned: it is stored as (d_in, d_out)."""
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    U, V = (t.to(weight.device, wide) for t in stacked(sorted(parts, key=lambda part: part.edits)))
    update = V @ U.T if turned else U @ V.T
    return update.add_(weight.to(wide)).to(weight.dtype)


def _weight(model: nn.Module, path: str) -> nn.Parameter:
    weight = base_layer(submodule(model, path)).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _refuse_unwritable_weights(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise UnsupportedPatchError if an update cannot be written into the weight of one of these linear maps."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path in paths:
        weight = getattr(base_layer(submodule(model, path)), "weight", None)
        if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor or weight.dtype not in FLOATS:
            kind = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
            raise UnsupportedPatchError(
                f"the weight of {path!r} is stored as a {kind}, not as plain floating-point numbers, and an update cannot be "
                "written into quantised weights; attach the patch, or merge it into the unquantised model"
            )
        if weight.is_meta:
            raise UnsupportedPatchError(f"the weight of {path!r} is offloaded; load the model whole to merge a patch")
        if len(own := names[id(weight)]) > 1:
            raise UnsupportedPatchError(
                f"the weight of {path!r} also serves as {next(n for n in own if not n.startswith(path))!r}, where the patch "
                "does not mean it; attach the patch instead"
            )
