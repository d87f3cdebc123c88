"""Low-rank patches at run time: what is added to which linear map, for the whole batch or for single rows of it.

All low-rank parts on a model live in one `LowRankTable`. A forward hook on each edited module adds (x V) Uᵀ to its output,
so weights are never touched and it does not matter how they are stored (quantised, transposed, on which device). The sum is
taken in float32 (float64 where the module computes in float64) and rounded once to the dtype of the module's output.

Parts at one module act as one pair of factors, ordered by their edits' ids: the bits do not depend on the order in which
patches came and went.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from errata.errors import AnatomyError, ConfigError, EditError, RequestError, ShapeError
from errata.low_rank import LowRank, stacked
from errata.model.anatomy import anatomy, submodule
from errata.model.attached import ATTACHED, MERGED, STEERED, Suspendable
from errata.model.hooks import first_tensor, with_first_tensor

# -- modules -------------------------------------------------------------------------------------------------------------


def base_layer(module: nn.Module) -> nn.Module:
    """The module itself, or what an adapter library has wrapped in it."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear map, quantised or not; None for anything else."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    found = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (int(found[0]), int(found[1])) if isinstance(found[0], int) and isinstance(found[1], int) else None


def places(model: nn.Module, parts: Iterable[LowRank]) -> list[tuple[str, LowRank]]:
    """(module path, part) for each part. Raises AnatomyError where there is no linear map, ShapeError for another size."""
    found, known = [], anatomy(model)
    for part in parts:
        path = part.path(known)
        here = sizes(base_layer(submodule(model, path)))
        if here is None:
            kind = type(base_layer(submodule(model, path))).__name__
            raise AnatomyError(f"expected a linear map at {path!r} for the edit {part.edits[0]}, found a {kind}.")
        if here != (len(part.U), len(part.V)):
            raise ShapeError(
                f"expected an update of {here[0]} x {here[1]} (d_out x d_in) at {path!r}, found {len(part.U)} x "
                f"{len(part.V)} (edit {part.edits[0]}); attach the patch to the model that it was fitted on"
            )
        found.append((path, part))
    return found


def refuse_present(model: nn.Module, edits: Iterable[str]) -> None:
    """Raise RequestError if one of these edits is in the model already: an update that is added twice is another edit."""
    wanted = set(edits)
    for name, there, undo in ((ATTACHED, "attached to", "detach"), (MERGED, "merged into", "unmerge")):
        table = vars(model).get(name)
        if table is not None and (twice := wanted & table.edits):
            raise RequestError(f"the edit {min(twice)} is {there} this model already; {undo} that patch first")


def forget_decisions(model: nn.Module) -> None:
    """The weights act differently from now on, so gates must look again at what they have decided before."""
    if (steering := vars(model).get(STEERED)) is not None:
        steering.forget()


# -- one module's update -------------------------------------------------------------------------------------------------


class _Update:
    """What is added at one module for the whole batch: its parts' factors, placed at first use and kept."""

    def __init__(self, parts: Sequence[LowRank]):
        self._parts = sorted(parts, key=lambda part: part.edits)
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _stacked(self) -> tuple[Tensor, Tensor]:
        return stacked(self._parts)

    def _factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(V, Uᵀ) on the device and in the dtype of `like`."""
        key = (like.device, like.dtype)
        if key not in self._placed:
            with torch.inference_mode(False):  # what a pass without gradients placed must serve a later one with them
                U, V = (t.to(like.device, like.dtype) for t in self._stacked())
                self._placed[key] = V, U.transpose(-1, -2).contiguous()
        return self._placed[key]

    def added(self, x: Tensor, total: Tensor) -> Tensor:
        """`total` (..., d_out) plus the update of x (..., d_in), in the dtype of `total`."""
        V, Ut = self._factors(total)
        return total + (x @ V) @ Ut


class _RowUpdate(_Update):
    """What is added at one module for each row of the batch: factors (m, d, r) of the m rows that have any parts there."""

    def __init__(self, rows: Sequence[Sequence[LowRank]]):
        super().__init__(())
        self._rows = rows
        self._edited = torch.tensor([i for i, parts in enumerate(rows) if parts])

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Rows of lower rank have zero columns behind their own."""
        pairs = [stacked(parts) for parts in self._rows if parts]
        rank = max(U.shape[1] for U, _ in pairs)
        U, V = (
            torch.stack([nn.functional.pad(pair[side], (0, rank - pair[side].shape[1])) for pair in pairs])
            for side in (0, 1)
        )
        return U, V

    def added(self, x: Tensor, total: Tensor) -> Tensor:
        """As for the whole batch; other rows keep their bits."""
        V, Ut = self._factors(total)
        keys, sums = (t.reshape(len(self._rows), -1, t.shape[-1]) for t in (x, total))  # OPT's MLP runs on (n * T, d)
        at = self._edited.to(total.device)
        return sums.index_add(0, at, (keys[at] @ V) @ Ut).reshape(total.shape)


@dataclass
class _Load:
    """What one owner has loaded: parts at their modules, and what each of its edits is about."""

    parts: list[tuple[str, LowRank]]
    keys: Mapping[str, str] = field(default_factory=dict)


# -- the table -----------------------------------------------------------------------------------------------------------


class LowRankTable(Suspendable):
    """Every low-rank part on one model; a module's hook comes with its first part and leaves with the last."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._loads: dict[object, _Load] = {}
        self._rows: list[list[tuple[str, LowRank]]] | None = None
        self._updates: dict[str, list[_Update]] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._batch_hooks: list[RemovableHandle] = []
        self._batch: int | None = None

    @classmethod
    def on(cls, model: nn.Module) -> "LowRankTable":
        """The model's table; a new one if there is none, which the model keeps once something is loaded."""
        return vars(model).get(ATTACHED) or cls(model)

    @property
    def edits(self) -> set[str]:
        """Ids of the loaded edits, those of single rows included."""
        placed = [p for load in self._loads.values() for p in load.parts]
        placed += [p for row in self._rows or () for p in row]
        return {edit for _, part in placed for edit in part.edits}

    @property
    def by_row(self) -> bool:
        """Whether single rows have patches of their own."""
        return self._rows is not None

    def add(self, owner: object, parts: Sequence[LowRank], keys: Mapping[str, str]) -> list[tuple[str, str]]:
        """Load parts under an owner; keys: edit id -> what it is about (`EditRequest.key`).

        Returns (edit, earlier edit) for what is about the same thing: both act, and their sum may say neither object.
        Raises RequestError for an edit that is loaded already, AnatomyError and ShapeError as `places` does.
        """
        refuse_present(self.model, (edit for part in parts for edit in part.edits))
        placed = places(self.model, parts)
        about = {key: edit for load in self._loads.values() for edit, key in load.keys.items()}
        conflicts = []
        for edit, key in keys.items():
            if about.get(key, edit) != edit:
                conflicts.append((edit, about[key]))
            about[key] = edit
        self._loads[owner] = _Load(placed, keys)
        self._changed(path for path, _ in placed)
        return conflicts

    def remove(self, owner: object) -> None:
        """Unload an owner's parts; harmless if it has none."""
        if (load := self._loads.pop(owner, None)) is not None:
            self._changed(path for path, _ in load.parts)

    @contextmanager
    def rows(self, rows: Sequence[Sequence[LowRank]]) -> Iterator[None]:
        """Inside, every batch has len(rows) rows and row i is edited by rows[i], on top of what is loaded for all.

        Raises ConfigError if rows have their patches already, or there are none.
        """
        if self._rows is not None or not rows:
            found = (
                "patches by row that are attached already; leave that block first" if rows else "none; list one a row"
            )
            raise ConfigError(f"expected one patch for each row of the batches to come, found {found}")
        refuse_present(self.model, (edit for row in rows for part in row for edit in part.edits))
        placed = iter(places(self.model, [part for row in rows for part in row]))
        self._rows = [list(islice(placed, len(row))) for row in rows]
        paths = {path for row in self._rows for path, _ in row}
        try:
            self._batch_hooks = [
                self.model.register_forward_pre_hook(self._before, with_kwargs=True),
                self.model.register_forward_hook(self._after, always_call=True),
            ]
            self._changed(paths)
            yield
        finally:
            for hook in self._batch_hooks:
                hook.remove()
            self._rows, self._batch_hooks, self._batch = None, [], None
            self._changed(paths)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _changed(self, paths: Iterable[str]) -> None:
        """Bring these modules' updates and hooks in line with what is loaded."""
        for path in set(paths):
            whole = [part for load in self._loads.values() for p, part in load.parts if p == path]
            rows = [[part for p, part in row if p == path] for row in self._rows or ()]
            self._updates[path] = [_Update(whole)] if whole else []
            self._updates[path] += [_RowUpdate(rows)] if any(rows) else []
            if self._updates[path] and path not in self._hooks:
                module = submodule(self.model, path)
                self._hooks[path] = module.register_forward_hook(self._hook(path), with_kwargs=True)
            elif not self._updates[path] and path in self._hooks:
                self._hooks.pop(path).remove()
        if self._loads or self._rows is not None:
            vars(self.model)[ATTACHED] = self
        else:
            vars(self.model).pop(ATTACHED, None)
        forget_decisions(self.model)

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._off:
                return None
            x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
            if self._rows is not None:
                self._check(self._batch if self._batch is not None else len(x) if x.dim() > 2 else None)
            wide = torch.float64 if y.dtype is torch.float64 else torch.float32
            with torch.autocast(y.device.type, enabled=False):
                x, total = x.to(y.device, wide), y.to(wide)
                for update in self._updates[path]:
                    total = update.added(x, total)
            return with_first_tensor(output, total.to(y.dtype))

        return hook

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (kwargs.get("input_ids"), *args[:1], kwargs.get("inputs_embeds"))
        self._batch = next((len(t) for t in given if isinstance(t, Tensor)), None)
        if not self._off and self._batch is not None:
            self._check(self._batch)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._batch = None

    def _check(self, found: int | None) -> None:
        n = len(self._rows or ())
        if found != n:
            raise EditError(
                f"expected batches of {n} rows, as many as patches were attached by row, found "
                f"{'an unknown number' if found is None else found}; where generation repeats rows (beams, num_return_sequences), "
                "list each patch as often, one after another"
            )
