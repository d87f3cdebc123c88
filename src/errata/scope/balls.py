"""The scopes that compete for a prompt: one ball for each edit, all edits at once or each row of a batch with its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.scope.gate import Gate

CLOSED = -1  # where an index of an edit stands: no edit


class Closest(NamedTuple):
    """For points (B, T): the nearest edit, how far it is (the gate's unit) and in radii below its boundary; the nearest of
    those whose scope contains the point (CLOSED: none does), and that one's depth. Lower is deeper, inf where there is none.
    """

    nearest: Tensor
    distance: Tensor
    depth: Tensor
    winner: Tensor
    winner_depth: Tensor


@dataclass(frozen=True, eq=False)
class Balls:
    """Scopes that share a gate. members (R, m): indices of edits, CLOSED where a row has fewer; centres (R, m, k); radii (R, m).

    R is 1 where all rows of a batch have the same edits, else the number of rows.
    """

    gate: Gate
    members: Tensor
    centres: Tensor
    radii: Tensor

    @classmethod
    def of(cls, gate: Gate, rows: Sequence[Sequence[Any]], index: Mapping[Any, int]) -> "Balls":
        """The scopes of parts (with `centre` and `radius`) of this gate, listed for each row. index: a part's number."""
        known = [[part for part in row if part.gate.digest == gate.digest] for row in rows]
        width = max(map(len, known))
        like = next(part.centre for row in known for part in row).float()
        members = torch.full((len(rows), width), CLOSED)
        centres, radii = like.new_zeros(len(rows), width, len(like)), torch.ones(len(rows), width)
        for r, row in enumerate(known):
            if row:
                members[r, : len(row)] = torch.tensor([index[part] for part in row])
                centres[r, : len(row)] = torch.stack([part.centre.float() for part in row])
                radii[r, : len(row)] = torch.tensor([part.radius for part in row])
        return cls(gate, members, centres, radii)

    def closest(self, points: Tensor) -> Closest:
        """The edits nearest to points (B, T, k), on the points' device."""
        device = points.device
        there = self.members.ge(0).to(device)[:, None]
        members, radii = self.members.to(device)[:, None], self.radii.to(device)[:, None]
        far = self.gate.distances(points, self.centres.to(device))
        depths = (-self.gate.margins(far, radii)).masked_fill(~there, torch.inf)  # comparable over all gates
        order = (depths if self.gate.distance == "linear" else far).masked_fill(~there, torch.inf)
        members = members.expand(order.shape)

        def at(values: Tensor, where: Tensor) -> Tensor:
            return values.gather(-1, where[..., None])[..., 0]

        first = order.argmin(-1)
        within = order.masked_fill(far > radii, torch.inf)
        inner = within.argmin(-1)
        none = ~at(within, inner).isfinite()
        return Closest(
            at(members, first),
            at(far, first),
            at(depths, first),
            at(members, inner).masked_fill(none, CLOSED),
            at(depths, inner).masked_fill(none, torch.inf),
        )


def groups(rows: Sequence[Sequence[Any]], index: Mapping[Any, int]) -> list[Balls]:
    """The parts of all rows by gate, in order of appearance; parts without a gate have no scope."""
    gates = {part.gate.digest: part.gate for row in rows for part in row if part.gate is not None}
    scoped = [[part for part in row if part.gate is not None] for row in rows]
    return [Balls.of(gate, scoped, index) for gate in gates.values()]
