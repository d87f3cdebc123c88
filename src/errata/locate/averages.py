"""Average effects of many traces by class of token, with 95 % bands.

Source: Meng et al. 2022 (ROME), section 2.2 (ATE, AIE). Every fact counts once in each class that it has: the mean over
its tokens of that class is one observation, because facts, not tokens, are independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.locate.tracing import Kind, Trace

CLASSES = ("first subject", "middle subject", "last subject", "first subsequent", "further", "last")


@dataclass(frozen=True, eq=False)
class Mean:
    """mean, and half the width of its 95 % band, 1.96 std / sqrt(n); NaN for fewer than two observations.

    Both () or (L,) float64; n: facts behind them.
    """

    mean: Tensor = field(repr=False)
    half: Tensor = field(repr=False)
    n: int

    @classmethod
    def over(cls, values: Sequence[Tensor]) -> "Mean":
        """Over observations of one shape, at least one."""
        stacked = torch.stack(list(values))
        n = len(stacked)
        spread = stacked.std(0) if n > 1 else torch.full_like(stacked[0], torch.nan)
        return cls(stacked.mean(0), 1.96 * spread / sqrt(n), n)

    def json(self) -> dict[str, Any]:
        """As JSON values, but that the band may be NaN."""
        low, high = self.mean - self.half, self.mean + self.half
        return {"mean": self.mean.tolist(), "low": low.tolist(), "high": high.tolist(), "n": self.n}


@dataclass(frozen=True, eq=False)
class Averages:
    """ATE and AIE of n facts. effects: per class that occurs, in the order of CLASSES, a Mean over (L,) effects."""

    kind: Kind
    window: int
    sever: tuple[Kind, ...]
    n: int
    clean: Mean
    corrupted: Mean
    total_effect: Mean
    effects: dict[str, Mean]

    @property
    def n_layers(self) -> int:
        """L."""
        return len(next(iter(self.effects.values())).mean)

    @property
    def peak(self) -> tuple[str, int, float]:
        """(class, layer, AIE) of the largest average indirect effect."""
        found = {name: effect.mean.max(0) for name, effect in self.effects.items()}
        name = max(found, key=lambda name: float(found[name].values))
        return name, int(found[name].indices), float(found[name].values)

    def json(self) -> dict[str, Any]:
        """As JSON values, but that bands may be NaN."""
        name, layer, value = self.peak
        return {
            "kind": self.kind,
            "window": self.window,
            "sever": list(self.sever),
            "n": self.n,
            "clean": self.clean.json(),
            "corrupted": self.corrupted.json(),
            "total_effect": self.total_effect.json(),
            "indirect_effects": {c: effect.json() for c, effect in self.effects.items()},
            "peak": {"class": name, "layer": layer, "value": value},
        }


def token_classes(n_tokens: int, first: int, last: int, *, overlapping: bool = False) -> dict[str, list[int]]:
    """Token indices by class, for a subject from `first` to `last`, inclusive; tokens before the subject have none.

    Every token has one class: a subject's only token is its last one, a subject that ends the prompt has no "last" behind
    it, the prompt's last token is no "first subsequent". overlapping: as published, these count in both classes.
    """
    end = n_tokens - 1
    if overlapping:
        found = [[first], range(first + 1, last), [last], range(last + 1, n_tokens)[:1], range(last + 2, end), [end]]
    else:
        behind = range(last + 1, end)
        subject = [range(first, last)[:1], range(first + 1, last), [last]]
        found = [*subject, behind[:1], behind[1:], [end] if end > last else []]
    return {name: list(tokens) for name, tokens in zip(CLASSES, found, strict=True)}


def average(traces: Sequence[Trace], *, overlapping: bool = False) -> Averages:
    """Means over traces of one kind; `overlapping` as in `token_classes`.

    Raises RequestError without traces, or for traces of several kinds, windows or depths.
    """
    if not traces:
        raise RequestError("expected at least one traced fact, found none; the model knows none of the facts given.")
    kinds = {(t.kind, t.window, t.sever, t.restored.shape[1]) for t in traces}
    if len(kinds) > 1:
        raise RequestError(
            f"expected traces of one kind, window and depth, found {len(kinds)} sorts; average each alone."
        )
    observed: dict[str, list[Tensor]] = {name: [] for name in CLASSES}
    for t in traces:
        classes = token_classes(len(t.tokens), t.first, t.last, overlapping=overlapping)
        for name, tokens in classes.items():
            if tokens:
                observed[name].append(t.indirect_effects[tokens].mean(0))

    def scalar(values: list[float]) -> Mean:
        return Mean.over([torch.tensor(value, dtype=torch.float64) for value in values])

    return Averages(
        kind=traces[0].kind,
        window=traces[0].window,
        sever=traces[0].sever,
        n=len(traces),
        clean=scalar([t.clean for t in traces]),
        corrupted=scalar([t.corrupted for t in traces]),
        total_effect=scalar([t.total_effect for t in traces]),
        effects={name: Mean.over(values) for name, values in observed.items() if values},
    )
