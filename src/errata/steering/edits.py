"""The edits that compete on a model, numbered: whose scopes they are at each site and in each row, and what each puts there.

An edit that is open because an answer is asked for again, with a state that says nothing about the fact, is numbered
len(active) + the edit's number.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from errata.counterfactual import LOGITS, Counterfactual
from errata.errors import ConfigError
from errata.maths.transport import LinearMap
from errata.scope.balls import CLOSED, Balls, groups
from errata.steering.parts import Steering

Part = Steering | Counterfactual


class Edits:
    """What is loaded in each row, the later of two edits of one key holding. active: the parts that act, in any row.

    rows: all parts of each row in the order in which they were loaded; a single one where every row has the same. by_row:
    whether rows have edits of their own.
    """

    def __init__(self, rows: Sequence[Iterable[Part]], by_row: bool):
        kept = [acting(row) for row in rows]
        self.active: list[Part] = list(dict.fromkeys(part for row in kept for part in row))
        index = {part: i for i, part in enumerate(self.active)}
        self.groups: list[tuple[str | int, Balls]] = [
            (site, balls)
            for site in dict.fromkeys(part.site for part in self.active)
            for balls in groups([[part for part in row if part.site == site] for row in kept], index)
        ]
        self.longest = max((len(p.target_ids) for p in self.active), default=0)  # object, in tokens
        self._by_row = by_row
        self._by_first: list[dict[int, list[Part]]] = []  # by row, as the groups are
        for row in kept:
            first: dict[int, list[Part]] = {}
            for part in row:
                first.setdefault(part.target_ids[0], []).append(part)
            self._by_first.append(first)
        self._placed: dict[tuple[int, int, torch.device], LinearMap] = {}

    def part(self, edit: int) -> Part:
        """The part of a number, of a recalled edit too."""
        return self.active[edit % len(self.active)]

    def recalled(self, edit: int) -> bool:
        """Whether a number says that the edit is recalled."""
        return edit >= len(self.active)

    def same(self, one: int, other: int) -> bool:
        """Whether two openings are for one edit, by its scope or recalled."""
        return one != CLOSED and one % len(self.active) == other % len(self.active)

    def begins(self, row: int, said: tuple[int, ...]) -> bool:
        """Whether some object of a row's edits begins with these tokens."""
        own = self._by_first[row if self._by_row else 0]
        return any(part.target_ids[: len(said)] == said for part in own.get(said[0], ()))

    def map(self, edit: int, step: int, device: torch.device) -> LinearMap:
        """The map of a step of an edit, float32; placed at first use and kept."""
        placed = self._placed.get((edit, step, device))
        if placed is None:
            part = self.part(edit)
            assert isinstance(part, Steering)
            placed = part.maps[step].to(torch.float32, device)
            self._placed[edit, step, device] = placed
        return placed

    def mean(self, edit: int, step: int) -> Tensor:
        """The mean state that a step of a recalled edit leads to; behind its object, where the object has ended."""
        part = self.part(edit)
        assert isinstance(part, Steering)
        mean = part.maps[step].m_t if step < len(part.maps) else part.ending
        assert mean is not None
        return mean


def acting(parts: Iterable[Part]) -> list[Part]:
    """The parts that act: a later one overrides an earlier one of its key, with all that followed from that one's edit."""
    winners: dict[str, Part] = {}
    for part in parts:
        loser = winners.pop(part.key, part)
        if loser.edit != part.edit:
            winners = {key: p for key, p in winners.items() if p.edit != loser.edit}
        winners[part.key] = part
    return list(winners.values())


def refuse_late_gates(parts: Iterable[Part], n: int) -> None:
    """Raise ConfigError for a part of a model of n layers whose gate reads above the layer that it steers."""
    for part in parts:
        if part.site in ("final", LOGITS):
            continue
        late = [la for la in part.gate.layers if la == "final" or int(la) % n > int(part.site) % n]
        if late:
            raise ConfigError(
                f"the edit {part.edit} acts at layer {part.site}, but its gate reads layer {late[0]}, which comes later; "
                "fit it with a gate that reads no layer above the steered one"
            )
