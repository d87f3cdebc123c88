"""GRACE's codebook: keys with a value, a radius and a label each, and the rules by which they come, grow and part.

A query defers to the nearest key among the balls that contain it. A new (key, label) is added, widens the ball of a key with
the same label, or shares the room with keys of other labels. With `guard`, every rule looks at all keys of other labels: their
balls never overlap, so that no key of one label lies in a ball of another.

Source: Hartvigsen et al. 2023 (GRACE), Algorithm 1. Differs with `guard` and `defer="containing"`, our defaults: the paper
looks at the nearest key only, which may not contain a query that a farther, larger ball does, and lets balls of different
labels overlap after an addition, an expansion, or a split that makes a ball larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.errors import ConfigError, ShapeError

Outcome = Literal["add", "cover", "expand", "split", "replace"]
Label = tuple[int, ...]
GAP = 1e-5  # between the two balls of a split, activation units, as published
PAIRS = 1 << 13  # exact distances computed at once


@dataclass(frozen=True)
class Rules:
    """How a codebook grows and answers.

    expand: the new radius of a ball that is to take in a query of its own label at distance D: "add_init" r + the initial
    radius (the paper's algorithm), "coverage" D (the published code), "moving_average" D with the key moved half-way to the
    query. guard: all keys of other labels are looked at, and no ball grows in a split; False is the published code. defer:
    "containing", the nearest among the balls that contain a query, or "nearest" (published), the nearest key if its ball
    contains it. match: labels are equal if they are "exact"ly, or by the "mean" of their ids (published). same: distance in
    units of |key| below which two keys are one: what rounding makes of one prompt in batches of different shapes.
    """

    expand: Literal["add_init", "coverage", "moving_average"] = "add_init"
    guard: bool = True
    defer: Literal["containing", "nearest"] = "containing"
    match: Literal["exact", "mean"] = "exact"
    same: float = 1e-4

    def __post_init__(self) -> None:
        known = self.expand in ("add_init", "coverage", "moving_average") and self.defer in ("containing", "nearest")
        if not known or self.match not in ("exact", "mean") or not 0 <= self.same < 0.5:
            raise ConfigError(
                "expected expand 'add_init', 'coverage' or 'moving_average', defer 'containing' or 'nearest', match 'exact' or "
                f"'mean', and same from 0 to below 0.5, found {self}"
            )


@dataclass(frozen=True)
class Insertion:
    """What an insertion did. entry: the index that now answers for the query; distance: to the nearest key before (inf: none).

    shrunk: tags behind the balls that had to give way, whose rims may now be out of reach; replaced: tags of the
    same key under another label, which no longer act.
    """

    outcome: Outcome
    entry: int
    distance: float
    shrunk: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


class Codebook:
    """n entries: keys (n, a), values (n, b), radii (n,) in activation units, labels; `tags[i]` names what stands behind entry i.

    Distances are Euclidean and taken in the keys' own dtype, float32 at least.
    """

    def __init__(self, rules: Rules | None = None):
        self.rules = rules or Rules()
        self.labels: list[Label] = []
        self.tags: list[list[str]] = []
        self._n = 0
        self._keys = self._values = self._radii = torch.empty(0)
        self._copies: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}  # until it changes

    def __len__(self) -> int:
        return self._n

    @property
    def keys(self) -> Tensor:
        """(n, a)"""
        return self._keys[: self._n]

    @property
    def values(self) -> Tensor:
        """(n, b)"""
        return self._values[: self._n]

    @property
    def radii(self) -> Tensor:
        """(n,)"""
        return self._radii[: self._n]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and radii on a device; a copy there is kept until the codebook changes."""
        if self._keys.device == device:
            return self.keys, self.values, self.radii
        if device not in self._copies:
            with torch.inference_mode(False), torch.no_grad():  # passes that need gradients may use it later
                self._copies[device] = self.keys.to(device), self.values.to(device), self.radii.to(device)
        return self._copies[device]

    # -- inserting ---------------------------------------------------------------------------------------------------

    def insert(self, key: Tensor, value: Tensor, radius: float, label: Sequence[int], tag: str = "") -> Insertion:
        """Make (key (a,), label) answered for. value (b,): of a new entry; one that answers already keeps its own (`set_value`).

        radius > 0: the initial one of a new entry, epsilon. Raises ShapeError, ConfigError.
        """
        key, value, label = key.detach(), value.detach(), tuple(label)
        self._check(key, value, radius, label)
        self._copies.clear()
        if not self._n:
            return self._new("add", key, value, radius, label, tag, float("inf"))
        far = torch.linalg.vector_norm(self.keys - key.to(self._keys), dim=-1)
        near = int(far.argmin())
        alike = torch.tensor([self._mark(own) == self._mark(label) for own in self.labels], device=far.device)
        settle = self._guarded if self.rules.guard else self._published
        return settle(key, value, radius, label, tag, far, near, alike)

    def set_value(self, entry: int, value: Tensor) -> None:
        """Give an entry another value (b,)."""
        self._copies.clear()
        self._values[entry] = value.detach().to(self._values)

    def _published(
        self, key: Tensor, value: Tensor, radius: float, label: Label, tag: str, far: Tensor, near: int, alike: Tensor
    ) -> Insertion:
        """Algorithm 1 as in the published code: the nearest key alone decides."""
        D, own = float(far[near]), float(self._radii[near])
        if radius + own < D:
            return self._new("add", key, value, radius, label, tag, D)
        if not alike[near]:
            self._radii[near] = D / 2 - GAP
            return self._new("split", key, value, D / 2, label, tag, D, shrunk=tuple(self.tags[near]))
        if own >= D:
            return self._tagged("cover", near, D, tag)
        self._radii[near] = own + radius if self.rules.expand == "add_init" else D
        if self.rules.expand == "moving_average":
            self._keys[near] = (self._keys[near] + key.to(self._keys)) / 2
        return self._tagged("expand", near, D, tag)

    def _guarded(
        self, key: Tensor, value: Tensor, radius: float, label: Label, tag: str, far: Tensor, near: int, alike: Tensor
    ) -> Insertion:
        """The same with all keys of other labels in view; a key that is there already changes its label in place."""
        D, slack = float(far[near]), self.rules.same * float(torch.linalg.vector_norm(key))
        if slack >= D:
            return (
                self._tagged("cover", near, D, tag)
                if alike[near]
                else self._relabel(near, value, radius, label, tag, D)
            )
        holding = torch.where(far <= self.radii, far, torch.inf)
        holder = int(holding.argmin())
        if holding[holder].isfinite() and alike[holder]:
            return self._tagged("cover", holder, D, tag)
        if alike[near] and radius + float(self._radii[near]) >= D and self._widen(near, key, radius, D, slack, ~alike):
            return self._tagged("expand", near, D, tag)
        shrunk = self._room(far, ~alike, radius)
        limit = min((float(far[j]) / 2 for j in shrunk), default=radius)
        behind = tuple(t for j in shrunk for t in self.tags[j])
        outcome: Outcome = "split" if shrunk else "add"
        return self._new(outcome, key, value, min(radius, limit), label, tag, D, shrunk=behind)

    def _widen(self, near: int, key: Tensor, radius: float, D: float, slack: float, unlike: Tensor) -> bool:
        """Widen a ball to take in a key of its label, as far as balls of other labels allow; False if that is not far enough."""
        moving = self.rules.expand == "moving_average"
        centre = (self._keys[near] + key.to(self._keys)) / 2 if moving else self._keys[near]
        wanted = float(self._radii[near]) + radius if self.rules.expand == "add_init" else D + slack
        needed = D / 2 + slack if moving else D
        if bool(unlike.any()):
            apart = torch.linalg.vector_norm(self.keys[unlike] - centre, dim=-1)
            wanted = min(wanted, float((apart * (1 - 1e-6) - self.radii[unlike]).min()))
        if wanted < needed:
            return False
        self._keys[near], self._radii[near] = centre, wanted
        return True

    def _room(self, far: Tensor, unlike: Tensor, radius: float) -> list[int]:
        """Shrink the balls of other labels that a ball of this radius would meet to just under half-way; their indices."""
        met = torch.nonzero(unlike & (far <= self.radii + radius))[:, 0].tolist()
        for j in met:
            D = float(far[j])
            self._radii[j] = min(float(self._radii[j]), max(D / 2 - GAP, D / 4))
        return met

    def _relabel(self, at: int, value: Tensor, radius: float, label: Label, tag: str, D: float) -> Insertion:
        """The same key under another label: the later one holds, and its ball is no larger than a new one's."""
        gone, self.tags[at], self.labels[at] = tuple(self.tags[at]), [tag], label
        self.set_value(at, value)
        far = torch.linalg.vector_norm(self.keys - self._keys[at], dim=-1)
        unlike = torch.tensor([self._mark(own) != self._mark(label) for own in self.labels], device=far.device)
        radius = min(radius, float(self._radii[at]))
        shrunk = self._room(far, unlike, radius)
        self._radii[at] = min([radius, *(float(far[j]) / 2 for j in shrunk)])
        return Insertion("replace", at, D, tuple(t for j in shrunk for t in self.tags[j]), gone)

    def _tagged(self, outcome: Outcome, entry: int, D: float, tag: str) -> Insertion:
        if tag not in self.tags[entry]:
            self.tags[entry].append(tag)
        return Insertion(outcome, entry, D)

    def _new(
        self, outcome: Outcome, key: Tensor, value: Tensor, radius: float, label: Label, tag: str, D: float,
        shrunk: tuple[str, ...] = (),
    ) -> Insertion:  # fmt: skip
        if self._n == len(self._radii):
            self._grow(key, value)
        at, self._n = self._n, self._n + 1
        self._keys[at], self._values[at], self._radii[at] = key.to(self._keys), value.to(self._values), radius
        self.labels.append(label)
        self.tags.append([tag])
        return Insertion(outcome, at, D, shrunk)

    def _grow(self, key: Tensor, value: Tensor) -> None:
        """Room for twice as many entries."""
        size = max(8, 2 * self._n)
        like = self._keys if self._n else key.to(torch.promote_types(key.dtype, torch.float32))
        out = self._values if self._n else value.to(torch.promote_types(value.dtype, torch.float32))
        keys, values, radii = like.new_zeros(size, len(key)), out.new_zeros(size, len(value)), like.new_zeros(size)
        if self._n:
            keys[: self._n], values[: self._n], radii[: self._n] = self.keys, self.values, self.radii
        self._keys, self._values, self._radii = keys, values, radii

    def _mark(self, label: Label) -> Any:
        return label if self.rules.match == "exact" else sum(label) / len(label)

    def _check(self, key: Tensor, value: Tensor, radius: float, label: Label) -> None:
        widths = (self._keys.shape[1], self._values.shape[1]) if self._n else (len(key), len(value))
        if key.ndim != 1 or value.ndim != 1 or (len(key), len(value)) != widths:
            raise ShapeError(
                f"expected a key ({widths[0]},) and a value ({widths[1]},), found {tuple(key.shape)} and {tuple(value.shape)}."
            )
        if not radius > 0 or not label:
            raise ConfigError(f"expected a radius above 0 and a label, found {radius!r} and {label!r}")

    # -- asking ------------------------------------------------------------------------------------------------------

    def find(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """For queries (m, a): the entries (m,) that they defer to, -1 for none, and the distances (m,) to these (inf)."""
        m = len(queries)
        entry = torch.full((m,), -1, device=queries.device)
        distance = torch.full((m,), torch.inf, dtype=self._keys.dtype, device=queries.device)
        if not self._n or not m:
            return entry, distance
        keys, _, radii = self.on(queries.device)
        queries = queries.to(keys)
        rough, slack = self._rough(queries, keys)
        nearest = rough.min(-1, keepdim=True).values
        maybe = rough <= (nearest if self.rules.defer == "nearest" else radii.square()) + slack
        rows, cols = torch.nonzero(maybe, as_tuple=True)
        if not len(rows):
            return entry, distance
        exact = torch.cat(
            [
                torch.linalg.vector_norm(queries[r] - keys[c], dim=-1)
                for r, c in zip(rows.split(PAIRS), cols.split(PAIRS), strict=True)
            ]
        )
        if self.rules.defer == "containing":
            held = exact <= radii[cols]
            rows, cols, exact = rows[held], cols[held], exact[held]
        best = torch.full_like(distance, torch.inf).scatter_reduce(0, rows, exact, "amin")
        first = exact == best[rows]  # among equals the earliest entry
        found = torch.full_like(entry, self._n).scatter_reduce(0, rows[first], cols[first], "amin")
        some = found < self._n
        some &= best <= radii[found.clamp(max=self._n - 1)]
        return torch.where(some, found, entry), torch.where(some, best, distance)

    def _rough(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(m, n) squared distances by one matrix product, and how far rounding may have moved them."""
        sizes = queries.square().sum(-1, keepdim=True) + keys.square().sum(-1)
        return sizes - 2 * queries @ keys.T, sizes * (1e-4 if keys.dtype == torch.float32 else 1e-9)

    def distances(self, queries: Tensor) -> Tensor:
        """(m, n) exact distances of queries (m, a) to every key."""
        return torch.cdist(queries.to(self._keys), self.keys, compute_mode="donot_use_mm_for_euclid_dist")
