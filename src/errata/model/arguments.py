"""What a model is called with, by name: a mask counts as much where it is passed by position."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def named(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call of the model by the names in its `forward`; keywords alone come back as they are."""
    if not args:
        return kwargs
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's own forward names nothing
    return {**dict(zip(_names(type(inner)), args, strict=False)), **kwargs}


@cache
def _names(kind: type) -> tuple[str, ...]:
    """The positional parameters of a class's `forward`, without itself; a class's signature is read once."""
    known = inspect.signature(kind.forward).parameters.values()  # type: ignore[attr-defined]
    return tuple(p.name for p in known if p.kind in _POSITIONAL)[1:]
