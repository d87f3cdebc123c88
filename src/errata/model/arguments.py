"""What a model is called with, by name: a mask counts as much where it is passed by position."""

import inspect
from collections.abc import Mapping
from typing import Any

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMES: dict[type, tuple[str, ...]] = {}


def named(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call of the model by the names in its `forward`; keywords alone come back as they are."""
    if not args:
        return kwargs
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's own forward names nothing
    return {**dict(zip(_positional(type(inner)), args, strict=False)), **kwargs}


def _positional(kind: Any) -> tuple[str, ...]:
    """The positional parameters of a class's `forward`, without itself; a class's signature is read once."""
    if kind not in _NAMES:
        known = inspect.signature(kind.forward).parameters.values()
        _NAMES[kind] = tuple(p.name for p in known if p.kind in _POSITIONAL)[1:]
    return _NAMES[kind]
