"""A forward pass that begins at a later block, from states that are already known."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from errata.errors import AnatomyError
from errata.model.anatomy import anatomy, submodule
from errata.model.hooks import Hooks, PreHook, with_first_tensor

_ABSENT = object()


@contextmanager
def resumed(model: nn.Module, layer: int, states: Tensor, like: Any) -> Iterator[None]:
    """Inside, a forward pass of `model` runs no block below `layer`: that block reads `states` (n, T, d) instead.

    The model is called as ever, on (n, T) token ids, so masks, positions and rotary embeddings are its own; what it makes
    of the ids' embeddings is dropped. layer: 0 to n_layers; at n_layers only the final norm and the head run.
    like: what any block of this model has returned; the skipped blocks return the same type (tensor, tuple, ...).
    Everything is put back on leaving, also after an exception. Raises AnatomyError for a layer out of range.
    """
    parts = anatomy(model)
    if not 0 <= layer <= parts.n_layers:
        raise AnatomyError(f"expected a layer from 0 to {parts.n_layers} to resume at, found {layer}.")
    reader = parts.blocks[layer] if layer < parts.n_layers else parts.final_norm
    stand_in = with_first_tensor(like, states)
    # Hooks cannot skip a module's own work; an attribute of the instance goes before the forward of its class.
    skipped = [vars(submodule(model, path)) for path in parts.blocks[:layer]]
    before = [attributes.get("forward", _ABSENT) for attributes in skipped]
    try:
        for attributes in skipped:
            attributes["forward"] = lambda *args, **kwargs: stand_in
        # A foreign hook on the last skipped block would act a second time on what it returns: the reader's input is set.
        with Hooks(model, pre={reader: _reading(states)} if reader is not None else {}):
            yield
    finally:
        for attributes, own in zip(skipped, before, strict=True):
            attributes.pop("forward", None)
            if own is not _ABSENT:
                attributes["forward"] = own


def _reading(states: Tensor) -> PreHook:
    """A hook that gives a module `states` as its first argument."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (states.to(args[0].device), *args[1:]), kwargs
        name = next(k for k in ("hidden_states", *kwargs) if isinstance(kwargs.get(k), Tensor))
        return args, kwargs | {name: states.to(kwargs[name].device)}

    return hook
