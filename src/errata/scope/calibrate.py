"""Choose a gate and its radius on data: the highest in-scope rate at a given false-positive rate.

Examples are facts with their prompts, `fit` ones and held-out ones. Two thirds of the facts teach the projection; of the
others, half play the loaded edits and half the world outside. A gate is judged on held-out prompts only: an in-scope prompt
must lie within the radius of its own edit and nearest to it; every prompt of an unloaded fact is a hard negative (same
relation and other subject, or same subject and other relation), and every position of every unrelated text a further one.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.maths.discriminant import within_class_projection
from errata.model.anatomy import anatomy
from errata.scope.features import features
from errata.scope.gate import Distance, Gate, Pooling


@dataclass(frozen=True)
class ScopeExample:
    """One fact's prompts: those an edit would be fitted on, and held-out ones."""

    fit: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A gate to be tried; `projected` puts the learned projection of width `k` before the distance."""

    layers: tuple[int, ...]
    pooling: Pooling = "last"
    distance: Distance = "euclidean"
    projected: bool = False
    k: int = 128


@dataclass(frozen=True)
class Outcome:
    """How a candidate did: rates on held-out prompts (fractions), and the radius in the gate's unit.

    radii: what the radius would be at other false-positive rates, to try on dev edits (`benchmarks/scope.py`).
    """

    gate: Gate
    in_scope_rate: float
    false_positive_rate: float
    unrelated_rate: float
    n_in_scope: int
    n_out_of_scope: int
    n_unrelated: int
    radii: dict[float, float]


RATES = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02)


def default_candidates(n_layers: int) -> list[Candidate]:
    """Single layers with plain distances, and learned projections of one or many layers, last-token or mean pooled."""
    some = sorted({min(round(n_layers * share), n_layers - 1) for share in (0.5, 0.75)})
    upper = tuple(range(n_layers // 4, n_layers))
    return [
        *(Candidate((layer,), distance=d) for layer in some for d in ("euclidean", "cosine")),
        *(Candidate((layer,), projected=True) for layer in some),
        *(Candidate(upper, projected=True, k=k) for k in (64, 128, 256)),
        Candidate(upper, projected=True, distance="cosine"),
        Candidate(upper, pooling="mean", projected=True),
    ]


def calibrate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[ScopeExample],
    unrelated: Sequence[str] = (),
    *,
    candidates: Iterable[Candidate] | None = None,
    target_false_positive_rate: float = 0.01,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Outcomes of all candidates, best first; the first one's gate is the calibrated gate.

    Raises RequestError for fewer than 12 examples, or examples without fit or held-out prompts.
    """
    if len(examples) < 12 or any(not e.fit or not e.held_out for e in examples):
        raise RequestError(
            "calibration needs at least 12 facts, each with prompts to fit and held-out prompts; give more fit_prompts"
        )
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    cut, half = len(order) * 2 // 3, len(order) * 5 // 6
    teach, loaded, outside = order[:cut], order[cut:half], order[half:]
    texts = [p for e in examples for p in e.fit] + [p for e in examples for p in e.held_out]
    fit_label = torch.tensor([i for i, e in enumerate(examples) for _ in e.fit])
    held_label = torch.tensor([i for i, e in enumerate(examples) for _ in e.held_out])
    tried = list(candidates or default_candidates(anatomy(model).n_layers))
    outcomes = []
    for pooling in dict.fromkeys(c.pooling for c in tried):
        layers = sorted({layer for c in tried if c.pooling == pooling for layer in c.layers})
        progress(f"reading {len(texts)} prompts, {pooling} states of {len(layers)} layers")
        everything = features(model, tokenizer, texts, layers, pooling)
        noise = features(model, tokenizer, unrelated, layers, pooling, every=True) if unrelated else None
        width = everything.shape[1] // len(layers)
        for candidate in (c for c in tried if c.pooling == pooling):
            progress(
                f"{pooling} of layers {list(candidate.layers)}, {candidate.distance}, projected: {candidate.projected}"
            )
            columns = torch.cat([torch.arange(width) + width * layers.index(layer) for layer in candidate.layers])
            x, quiet = everything[:, columns], noise[:, columns] if noise is not None else None
            fit, held = x[: len(fit_label)], x[len(fit_label) :]
            gate = Gate(candidate.layers, candidate.pooling, candidate.distance)
            if candidate.projected:
                taught = torch.isin(fit_label, torch.tensor(teach))
                mean, projection = within_class_projection(fit[taught], fit_label[taught], candidate.k)
                gate = replace(gate, mean=mean.half(), projection=projection.half())
            outcomes.append(
                _judge(gate, fit, fit_label, held, held_label, loaded, outside, quiet, target_false_positive_rate)
            )
    return sorted(outcomes, key=lambda o: -o.in_scope_rate)


def below(distance: float) -> float:
    """A radius that keeps a point at this distance outside, with a margin of two per cent."""
    return distance - 0.02 * abs(distance)


def _judge(
    gate: Gate, fit: Tensor, fit_label: Tensor, held: Tensor, held_label: Tensor,
    loaded: list[int], outside: list[int], noise: Tensor | None, target: float,
) -> Outcome:  # fmt: skip
    centres = torch.stack([gate.centre(gate.points(fit[fit_label == i])) for i in loaded])
    inside = torch.isin(held_label, torch.tensor(loaded))
    without = torch.isin(held_label, torch.tensor(outside))
    far = gate.distances(gate.points(held[inside]), centres)
    own = torch.tensor([loaded.index(int(i)) for i in held_label[inside]])
    nearest = far.min(1)
    negatives = gate.distances(gate.points(held[without]), centres).min(1).values
    ordered, ceiling = negatives.sort().values, float("inf")
    if noise is not None:
        quiet = torch.cat([gate.distances(gate.points(part), centres).min(1).values for part in noise.split(4096)])
        ceiling = below(float(quiet.min()))

    def radius_at(rate: float) -> float:
        return min(below(float(ordered[min(int(rate * len(ordered)), len(ordered) - 1)])), ceiling)

    radius = radius_at(target)
    hits = (nearest.indices == own) & (nearest.values <= radius)
    return Outcome(
        gate=replace(gate, radius=radius, note=f"calibrated for a false-positive rate of {target}"),
        in_scope_rate=float(hits.double().mean()),
        false_positive_rate=float((negatives <= radius).double().mean()),
        unrelated_rate=float((quiet <= radius).double().mean()) if noise is not None else 0.0,
        n_in_scope=len(hits),
        n_out_of_scope=len(negatives),
        n_unrelated=len(noise) if noise is not None else 0,
        radii={rate: radius_at(rate) for rate in RATES},
    )
