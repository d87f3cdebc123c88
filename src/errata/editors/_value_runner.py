"""What a value search runs on one model: which pieces can be reused, checked once, and the passes of a batch of edits."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.editors._value_pass import (
    FullPass,
    Heads,
    Pass,
    Place,
    Prefix,
    ReusedPass,
    added_plainly,
    can_spare,
    heads_pass,
    prefix_pass,
)
from errata.editors._value_rows import Layout, Row, heads_of, pack
from errata.model.anatomy import Anatomy, Site
from errata.model.states import input_device

CPU_TOKENS, OTHER_TOKENS = 512, 16384  # a step's padded tokens: on a CPU its activations should fit the caches
FREE = 2  # times as many where there is no graph, which keeps every layer's


@dataclass(frozen=True, eq=False)
class Opened:
    """A batch of edits ready to be run: base (E, V) log-probabilities of the unedited model at the essence reads, or None."""

    layout: Layout
    prefix: Prefix
    run: Pass
    base: Tensor | None


class Runner:
    """Passes at one place of one model, which is held still meanwhile. layers: those whose states are wanted."""

    def __init__(
        self, model: Any, parts: Anatomy, place: Place, layers: Sequence[Site], *, keys: bool, batch_tokens: int | None
    ):
        self.reuse = False
        self.device = input_device(model)
        self._model, self._parts, self._place, self._layers = model, parts, place, tuple(layers)
        self._keys, self._heads = keys, Heads({})
        self._budget = batch_tokens or (CPU_TOKENS if self.device.type == "cpu" else OTHER_TOKENS)

    def fits(self, width: int) -> int:
        """How many rows of some width go into a pass."""
        return max(1, self._budget // max(1, width))

    def settle(self, rows: Sequence[Sequence[Row]]) -> None:
        """Reuse what can be, having made sure on one edit that it says what the full pass says; else warn.

        Contexts that edits share are run here, once for all.
        """
        place, reason = self._place, ""
        tried = _few(max(rows, key=lambda own: max(row.at for row in own)))
        layout = pack([tried], self.device)
        try:
            self.reuse = True
            if self._keys:  # the MLP's output; a block's own output needs no trying
                plain = added_plainly(self._model, self._parts, place.path, place.layer, layout)
                self._place = replace(place, first=place.layer + int(plain))
            for sparing in (True, False) if can_spare(self._parts, place, self._layers) else (False,):
                self._place = replace(self._place, sparing=sparing)
                if not (reason := self._difference(tried)):
                    break
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        if not reason:
            self._heads = self._run_heads(heads_of(rows))
            return
        self.reuse, self._place = False, place
        warnings.warn(
            f"the value search cannot reuse states of this {self._parts.family!r} model ({reason}) and runs every layer at "
            f"every step; pass reuse=False to say so yourself.",
            stacklevel=2,
        )

    def open(self, rows: Sequence[Sequence[Row]]) -> Opened:
        """Run a batch of edits unedited, and make its pass."""
        layout = pack(rows, self.device, self._heads.index)
        prefix = self._prefix(layout)
        base = None
        if bool(layout.essence.any()):
            essence = torch.nonzero(layout.essence)[:, 0]
            with torch.no_grad():
                nothing = torch.zeros(len(rows), prefix.outputs.shape[1], device=self.device)
                logits, _ = self._pass(layout.take(essence), prefix.take(essence))(nothing)
            base = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        return Opened(layout, prefix, self._pass(layout, prefix), base)

    def _difference(self, rows: Sequence[Row]) -> str:
        """By how much the logits under some vector differ from those of the full pass, if it is more than rounding."""
        heads = dict.fromkeys(row.ids[: row.head] for row in rows if row.head)
        self._heads = self._run_heads({ids: i for i, ids in enumerate(heads)})
        layout = pack([rows], self.device, self._heads.index)
        prefix = self._prefix(layout)
        probe = prefix.outputs[layout.bare] / 4
        with torch.no_grad():
            reused, _ = self._pass(layout, prefix)(probe)
            full, _ = FullPass(self._model, self._parts, self._place, layout)(probe)
        wrong, size = float((reused - full).abs().max()), float(full.abs().max())
        return (
            ""
            if wrong <= torch.finfo(full.dtype).eps ** 0.5 * size
            else f"its logits differ by {wrong:.2g} of {size:.2g}"
        )

    def _run_heads(self, index: dict[tuple[int, ...], int]) -> Heads:
        return heads_pass(
            self._model, self._parts, index, self.device, FREE * self.fits(max(map(len, index), default=1))
        )

    def _prefix(self, layout: Layout) -> Prefix:
        heads, width = (self._heads, layout.widest) if self.reuse else (None, layout.batch.ids.shape[1])
        rows = FREE * self.fits(width)
        return prefix_pass(self._model, self._parts, self._place, layout, heads, keys=self._keys, rows=rows)

    def _pass(self, layout: Layout, prefix: Prefix) -> Pass:
        if self.reuse:
            return ReusedPass(self._model, self._parts, self._place, layout, prefix, self._layers)
        return FullPass(self._model, self._parts, self._place, layout, self._layers)


def _few(rows: Sequence[Row]) -> list[Row]:
    """An edit's bare row, those where most and least stands before the edited token, and its essence row."""
    others = sorted((row for row in rows if row.targets and not row.bare), key=lambda row: row.at)
    return [row for row in rows if row.bare or not row.targets or row in (*others[:1], *others[-1:])]
