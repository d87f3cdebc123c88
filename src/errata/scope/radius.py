"""A radius for a gate that nobody calibrated: from the edit's own prompts against stock texts."""

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from errata.edit import EditRequest
from errata.scope.features import gate_features
from errata.scope.gate import Gate


def radius_from_prompts(
    model: Any,
    tokenizer: Any,
    gate: Gate,
    points: Tensor,
    centre: Tensor,
    request: EditRequest,
    wrap: Callable[[str], str],
    token: int = -1,
) -> float:
    """Half-way between the edit's farthest own prompts (95 % quantile) and the nearest text that is not meant.

    points (n, k): the edit's in-scope points, read at `token`. What is not meant: the same prompt about stock subjects, other statements
    about the subject, and unrelated sentences. Returns a distance in the gate's unit; never less than the 95 % quantile
    unless stock texts lie within it.
    """
    inside = gate.distances(points, centre[None])[:, 0]
    outside = gate_features(model, tokenizer, [wrap(t) for t in others(request)], gate, token)
    nearest = float(gate.distances(gate.points(outside), centre[None]).min())
    reach = float(torch.quantile(inside, 0.95))
    return (reach + nearest) / 2 if nearest > reach else nearest - 0.02 * abs(nearest)


def others(request: EditRequest) -> list[str]:
    """Hard negatives that need no data: other subjects in the prompt, other predicates of the subject, plain sentences."""
    stock: dict[str, Sequence[str]] = json.loads((files("errata.scope") / "stock.json").read_text(encoding="utf-8"))
    texts = list(stock["texts"])
    if request.subject:
        texts += [
            request.prompt.replace("{}", name)
            for name in stock["subjects"]
            if name.casefold() != request.subject.casefold()
        ]
        texts += [predicate.replace("{}", request.subject) for predicate in stock["predicates"]]
    return texts
