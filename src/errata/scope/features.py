"""What a gate sees of a text: hidden states of some layers, or a sentence encoder's vector."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.model.anatomy import Site
from errata.model.room import check_room
from errata.model.states import states_at
from errata.model.tokens import token_ids
from errata.scope.encoder import load_encoder
from errata.scope.gate import Gate, Pooling

CHUNK = 512  # texts whose states are held at once


def features(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[Site],
    pooling: Pooling,
    *,
    token: int = -1,
    every: bool = False,
) -> Tensor:
    """Raw features (n, len(layers)·d_model), float32, at each text's `token` (from the end); `every`: at all positions of all texts.

    layers: blocks' indices, or "final" for the final norm's output (what the head reads).
    `mean` pooling is the mean over a row's positions so far, so that it is a function of the position's prefix.
    """
    rows = []
    for start in range(0, len(texts), CHUNK):
        ids = token_ids(tokenizer, texts[start : start + CHUNK])
        check_room(model, ids, texts[start : start + CHUNK])
        whole = every or pooling == "mean"
        places = [list(range(len(i))) if whole else [token] for i in ids]
        found = states_at(model, ids, places, list(layers))
        for row in range(len(ids)):
            x = torch.cat([found[site][row].float().cpu() for site in layers], -1)
            if pooling == "mean":
                x = x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]
            rows.append(x if every else x[[token]] if whole else x)
    return torch.cat(rows)


def gate_features(
    model: Any, tokenizer: Any, texts: Sequence[str], gate: Gate, token: int = -1, every: bool = False
) -> Tensor:
    """Raw features of the texts for this gate, (n, D)."""
    if gate.encoder:
        return load_encoder(gate.encoder).encode(texts)
    return features(model, tokenizer, texts, gate.layers, gate.pooling, token=token, every=every)
