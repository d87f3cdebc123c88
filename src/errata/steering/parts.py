"""Steering parts: one edit as a scope and a map for each token of its new object.

A part is a value; how parts act on a model is `errata.steering.table`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch import Tensor

from errata.maths.transport import LinearMap
from errata.scope.gate import Gate


@dataclass(frozen=True, eq=False)
class Steering:
    """One edit as a steering part: scope (gate, centre, radius) and one map for each token of the new object.

    centre (k,): the gate's point of the edit; radius in the gate's unit; target_ids: the new object's tokens as they follow
    the prompt; maps: the map of step t, all at `site` (`final`, the final norm's output, or a block's index); one more map
    than tokens closes an object that would otherwise run on ("5" becoming "52"); ending (d,): the mean state at `site` behind
    the object where the model ends it, None where it never does.
    """

    edit: str
    key: str
    gate: Gate
    centre: Tensor
    radius: float
    target_ids: tuple[int, ...]
    maps: tuple[LinearMap, ...]
    site: str | int = "final"
    ending: Tensor | None = None

    kind = "steering"

    @property
    def steps(self) -> int:
        """For how many tokens the edit is followed: its object's, and one if that is closed."""
        return len(self.maps)

    def header(self) -> dict[str, Any]:
        """The part's JSON header."""
        return {
            "kind": self.kind,
            "edit": self.edit,
            "key": self.key,
            "gate": self.gate.digest,
            "radius": self.radius,
            "target_ids": list(self.target_ids),
            "steps": len(self.maps),
            "errors": [step.error for step in self.maps],
            "site": self.site,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The part's tensors by field name."""
        named = {"centre": self.centre} | ({} if self.ending is None else {"ending": self.ending})
        for t, step in enumerate(self.maps):
            named |= {f"maps.{t}.{n}": getattr(step, n) for n in ("m_s", "m_t", "P", "lam")}
        return named

    @classmethod
    def of(cls, header: dict[str, Any], tensors: dict[str, Tensor], gates: dict[str, Gate]) -> "Steering":
        """The part of a header, its tensors and the gates of its file."""
        n = header["steps"]
        errors = header.get("errors", [0.0] * n)  # files of errata 0.1 before maps stated theirs
        maps = tuple(
            LinearMap(
                m_s=tensors[f"maps.{t}.m_s"], m_t=tensors[f"maps.{t}.m_t"], P=tensors[f"maps.{t}.P"],
                lam=tensors[f"maps.{t}.lam"], error=errors[t],
            )
            for t in range(n)
        )  # fmt: skip
        return cls(
            edit=header["edit"],
            key=header["key"],
            gate=gates[header["gate"]],
            centre=tensors["centre"],
            radius=header["radius"],
            target_ids=tuple(header["target_ids"]),
            maps=maps,
            site=header["site"],
            ending=tensors.get("ending"),
        )


@dataclass(frozen=True)
class Decision:
    """What the table says about one prompt: the edit that it concerns (None: no edit), the nearest edit and how far it was.

    distance and radius are the nearest edit's; own: the distance to an edit that was asked about. All in the gate's unit.
    """

    edit: str | None
    nearest: str | None
    distance: float
    radius: float
    own: float | None = None

    @property
    def depth(self) -> tuple[bool, float]:
        """What decisions are ordered by: those inside a scope first, then by distance in radii."""
        far = self.distance / self.radius if self.radius and isfinite(self.distance) else float("inf")
        return self.edit is None, far


def together(*made: Sequence[Decision] | None) -> list[Decision] | None:
    """Of decisions about the same prompts, the deepest about each; None if there are none."""
    found = [decisions for decisions in made if decisions is not None]
    return [min(same, key=lambda d: d.depth) for same in zip(*found, strict=True)] if found else None
