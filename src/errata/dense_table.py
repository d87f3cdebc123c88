"""Dense patches at run time: parameters are exchanged for W + delta while a module of theirs runs, and only then.

Outside a forward pass every module holds the tensors that it was given, so nothing can be left behind: detaching is the end
of the exchange. The sum is taken in float32 (float64 for float64 weights), rounded once to the parameter's dtype, and kept
until the weight changes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.dense import Dense
from errata.errors import AnatomyError, RequestError, ShapeError, UnsupportedPatchError
from errata.low_rank_table import forget_decisions
from errata.model.attached import DENSE, Suspendable


class DenseTable(Suspendable):
    """Every dense part on one model; the modules' hooks come with the first part that touches them and leave with the last."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._loads: dict[object, tuple[Sequence[Dense], dict[str, str]]] = {}
        self._deltas: dict[int, list[Tensor]] = {}  # by the parameter's identity: tied weights have one
        self._sums: dict[int, tuple[int, nn.Parameter]] = {}
        self._held: dict[nn.Module, list[dict[str, nn.Parameter]]] = {}  # what each module was given, a pass each
        self._hooks: list[RemovableHandle] = []

    @classmethod
    def on(cls, model: nn.Module) -> "DenseTable":
        """The model's table; a new one if there is none, which the model keeps once something is loaded."""
        return vars(model).get(DENSE) or cls(model)

    @property
    def edits(self) -> set[str]:
        """Ids of the loaded edits."""
        return {edit for parts, _ in self._loads.values() for part in parts for edit in part.edits}

    def add(self, owner: object, parts: Sequence[Dense], keys: dict[str, str]) -> list[tuple[str, str]]:
        """Load parts under an owner; keys: edit id -> what it is about. Returns (edit, earlier edit) for what is about the same thing.

        Raises RequestError for an edit that is loaded already, AnatomyError for a parameter that is not there, ShapeError for
        one of another shape, UnsupportedPatchError for one that is not stored as plain numbers.
        """
        if twice := self.edits & {edit for part in parts for edit in part.edits}:
            raise RequestError(f"the edit {min(twice)} is attached to this model already; detach that patch first")
        held = dict(self.model.named_parameters(remove_duplicate=False))
        for part in parts:
            for name, delta in part.deltas.items():
                _check(held.get(name), name, delta)
        about = {key: edit for _, known in self._loads.values() for edit, key in known.items()}
        conflicts = [(edit, about[key]) for edit, key in keys.items() if about.get(key, edit) != edit]
        self._loads[owner] = parts, keys
        self._changed()
        return conflicts

    def remove(self, owner: object) -> None:
        """Unload an owner's parts; harmless if it has none."""
        if self._loads.pop(owner, None) is not None:
            self._changed()

    def _changed(self) -> None:
        """Bring sums and hooks in line with what is loaded."""
        for hook in self._hooks:
            hook.remove()
        for module, stack in self._held.items():  # an interrupt skips the hooks that come after a forward pass
            if stack:
                module._parameters.update(stack[0])
        self._held = {}
        self._hooks, self._sums, self._deltas = [], {}, {}
        held = dict(self.model.named_parameters(remove_duplicate=False))
        parts = sorted((part for own, _ in self._loads.values() for part in own), key=lambda part: part.edits)
        for part in parts:
            for name, delta in part.deltas.items():
                self._deltas.setdefault(id(held[name]), []).append(delta)
        for module in self.model.modules():
            names = [name for name, p in module._parameters.items() if p is not None and id(p) in self._deltas]
            if names:
                self._hooks.append(module.register_forward_pre_hook(self._exchange(names)))
                self._hooks.append(module.register_forward_hook(self._restore, always_call=True))
        if self._loads:
            vars(self.model)[DENSE] = self
        else:
            vars(self.model).pop(DENSE, None)
        forget_decisions(self.model)

    def _exchange(self, names: Sequence[str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._off:
                return
            stack = self._held.setdefault(module, [])
            # A stack is there within a pass of the module's own, or behind one that was interrupted.
            own = stack[0] if stack else {name: module._parameters[name] for name in names}
            stack.append({name: weight for name, weight in own.items() if weight is not None})
            module._parameters.update({name: self._sum(weight) for name, weight in stack[-1].items()})

        return hook

    def _restore(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if stack := self._held.get(module):
            module._parameters.update(stack.pop())

    def _sum(self, weight: nn.Parameter) -> nn.Parameter:
        """The weight plus its deltas, as they were added when the weight was last looked at."""
        known = self._sums.get(id(weight))
        if (
            known is None
            or known[0] != weight._version
            or (known[1].device, known[1].dtype) != (weight.device, weight.dtype)
        ):
            wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
            with torch.inference_mode(False), torch.no_grad():
                total = weight.detach().to(wide, copy=True)
                for delta in self._deltas[id(weight)]:
                    total += delta.to(total)
                known = weight._version, nn.Parameter(total.to(weight.dtype), requires_grad=False)
            self._sums[id(weight)] = known
        return known[1]


def _check(weight: nn.Parameter | None, name: str, delta: Tensor) -> None:
    if weight is None:
        raise AnatomyError(
            f"expected a parameter {name!r}, found none; attach the patch to the model that it was fitted on."
        )
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.is_meta:
        raise UnsupportedPatchError(
            f"the parameter {name!r} is quantised or offloaded, and a dense delta cannot be added to it; load the model whole and "
            "unquantised"
        )
    if weight.shape != delta.shape:
        raise ShapeError(
            f"expected a delta of {tuple(weight.shape)} for {name!r}, found {tuple(delta.shape)}; attach the patch to the model that "
            "it was fitted on"
        )
