"""Metrics: what counts as a match, and rates with intervals. Every metric's name ends in its protocol."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

PROTOCOL_EFFICACY = "efficacy.generate: whole new object, greedy, on the edit prompt"
PROTOCOL_GENERALIZATION = "generalization.generate: whole new object, greedy, on paraphrase prompts; mean over edits"
PROTOCOL_SPECIFICITY = "specificity.generate: unedited greedy answer kept on neighbouring prompts; mean over edits"
PROTOCOL_LOCALITY = "locality.bits: logits of unrelated texts bit-identical to the same batch without the patch"


@dataclass(frozen=True)
class Rate:
    """A fraction with its 95 % interval. n: edits (or texts) behind it; protocol: how it was measured."""

    value: float
    low: float
    high: float
    n: int
    protocol: str

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def rate(outcomes: Iterable[float], protocol: str) -> Rate | None:
    """Mean of per-case outcomes in [0, 1] with a Wilson score interval over cases (sensible at 0 and 1); None without cases.

    Source: Wilson 1927. Cases, not probes, are the independent units, so n is the number of cases.
    """
    values = np.asarray(list(outcomes), dtype=float)
    n = len(values)
    if not n:
        return None
    p, z = float(values.mean()), 1.959964
    middle, spread = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return Rate(
        p, max(0.0, min(p, low)), min(1.0, max(p, high)), n, protocol
    )  # rounding must not leave the value outside


def by_case(cases: Iterable[str], outcomes: Iterable[bool]) -> Mapping[str, float]:
    """Mean outcome of each case."""
    found: dict[str, list[bool]] = {}
    for case, outcome in zip(cases, outcomes, strict=True):
        found.setdefault(case, []).append(outcome)
    return {case: float(np.mean(o)) for case, o in found.items()}
