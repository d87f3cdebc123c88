"""Rates and their 95 % intervals: the bootstrap over cases, and Wilson's where the bootstrap says nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Unit = Literal["fraction", "difference", "points", "nats", "seconds", "bytes"]
Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
TINY = 20  # cases below which a bootstrap of a fraction is too narrow
DRAWS = 2000


@dataclass(frozen=True)
class Rate:
    """A figure with its 95 % interval. n: cases (edits, or texts) behind it; protocol: how it was measured, in full.

    interval: how low and high were found, where the protocol does not say it. failed: cases whose fit failed; they count as the
    unedited model answers. unit: a fraction in [0, 1], a difference of such, points as published, or nats.
    """

    value: float
    low: float
    high: float
    n: int
    protocol: str
    interval: str = ""
    failed: tuple[str, ...] = ()
    unit: Unit = "fraction"

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"failed": list(self.failed)}


def wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share p of n, sensible at 0 and 1. Source: Wilson 1927."""
    middle, spread = p + Z * Z / (2 * n), Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return max(0.0, min(p, low)), min(1.0, max(p, high))  # rounding must not leave p outside


def share(passed: Sequence[float]) -> dict[str, Any]:
    """The mean of shares, one or more, with Wilson's interval, to four places, as JSON values."""
    value = sum(passed) / len(passed)
    low, high = wilson(value, len(passed))
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4), "n": len(passed)}


def means(sums: Array, counts: Array) -> Array:
    """Ratio of totals over the last axis; NaN where nothing was counted. For means of cases, counts are 0 or 1."""
    total = counts.sum(-1)
    return np.divide(sums.sum(-1), total, out=np.full(np.shape(total), np.nan), where=total > 0)


def bootstrap(
    n: int, statistic: Callable[[NDArray[np.int64]], Array], seed: int, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of cases drawn with replacement.

    Source: Efron 1979. statistic: of indices (draws, n) into the cases, values (draws,); NaN where it has none, left out.
    """
    found = np.concatenate([statistic(index) for index in _drawn(n, seed, draws)])
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def _drawn(n: int, seed: int, draws: int) -> Iterator[NDArray[np.int64]]:
    """Indices in blocks, so that many cases do not fill the memory."""
    rng, block = np.random.default_rng(seed), max(1, 4_000_000 // n)
    for start in range(0, draws, block):
        yield rng.integers(0, n, (min(block, draws - start), n))
