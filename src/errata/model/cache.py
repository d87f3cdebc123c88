"""A model's key-value cache, by whichever name it goes: `cache` from transformers 5.24 on, `past_key_values` before."""

import inspect
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """What a call of the model is given so that it goes on behind `cache` (None: so that it begins one)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's own forward names nothing
    known = inspect.signature(inner.forward).parameters
    return {next((name for name in NAMES if name in known), NAMES[-1]): cache, "use_cache": True}


def cache_given(kwargs: Mapping[str, Any]) -> Any:
    """The cache that a model was called with, None if with none."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def cache_in(output: Any) -> Any:
    """The cache in a model's output, None if there is none."""
    name = next((name for name in NAMES if hasattr(output, name)), None)  # the old name is there too, and warns
    return getattr(output, name) if name else None


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds; none for no cache, and for one that does not say."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
