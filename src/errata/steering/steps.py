"""Following an object: where a gate that opened says its new object's first token, and where the tokens after it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from errata.scope.balls import CLOSED
from errata.steering.edits import Edits
from errata.steering.memory import Memory
from errata.steering.parts import Steering
from errata.steering.passes import Pass


def steps(current: Pass, site: str | int, edits: Edits, memory: Memory) -> list[tuple[int, int, int, int]]:
    """(row, column of this pass, edit, step) for everything to be steered; an object under way goes before a new one."""
    gated = current.gated[site]
    chosen = []
    open_columns: dict[int, list[tuple[int, int]]] = {}
    for row, column in gated.ne(CLOSED).nonzero().tolist():
        open_columns.setdefault(row, []).append((column + current.start, int(gated[row, column])))
    for number in range(current.ids.shape[0]):
        opened = open_columns.get(number, [])
        if not opened and not current.start:
            continue
        ids, real = current.ids[number].tolist(), current.real(number).tolist()
        row = _Row(current, site, edits, memory, number, ids, real)
        for column, edit, step in row.walk(row.opened_before() + opened):
            if column >= current.start and (step or not row.said(column, edit)):
                chosen.append((number, column - current.start, edit, step))
    return chosen


def rows_open(current: Pass, site: str | int) -> list[tuple[int, int, int, int]]:
    """The same of rows that are steered as a whole (a classifier's): where each is asked, step 0, if an edit is open there."""
    ends, gated = current.ends(), current.gated[site]
    opened = gated[torch.arange(len(gated), device=gated.device), ends.clamp(min=0)].tolist()
    return [(row, int(ends[row]), edit, 0) for row, edit in enumerate(opened) if edit != CLOSED]


@dataclass(frozen=True)
class _Row:
    """One row at one site. ids: all of its columns'; real: the columns that hold a token."""

    current: Pass
    site: str | int
    edits: Edits
    memory: Memory
    number: int
    ids: Sequence[int]
    real: Sequence[int]

    def walk(self, opened: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """(column, edit, step), following each open gate (column, edit) along the tokens of its object."""
        place = {column: i for i, column in enumerate(self.real)}
        steps: dict[int, tuple[int, int]] = {}  # column -> (step, edit); the longest under way wins
        for column, edit in opened:
            part = self.edits.part(edit)
            target, steered = part.target_ids, part.steps
            if self.edits.recalled(edit) and isinstance(part, Steering) and part.ending is not None:
                steered = max(steered, len(target) + 1)
            for t, here in enumerate(self.real[place[column] : place[column] + len(target) + 1]):
                if t and self.ids[here] != target[t - 1]:
                    break
                if t < steered and (here not in steps or steps[here][0] < t):
                    steps[here] = (t, edit)
        return [(column, edit, t) for column, (t, edit) in steps.items()]

    def said(self, column: int, edit: int) -> bool:
        """Whether the edit's object has been said and its gate has stayed open since, so that it is not to be said again."""
        target = self.edits.part(edit).target_ids
        n, end = len(target), self.real.index(column)
        said = tuple(self.ids[c] for c in self.real[: end + 1])
        complete = [j for j in range(n, end + 1) if said[j - n + 1 : j + 1] == target]
        for j in range(end, min(complete, default=end + 1) - 1, -1):
            if not self.edits.same(self._edit_at(self.real[j]), edit):
                return False
            if j in complete and self.edits.same(self._edit_at(self.real[j - n]), edit):
                return True
        return False

    def opened_before(self) -> list[tuple[int, int]]:
        """Gates that opened at cached positions and whose object may still be under way: (column, edit)."""
        start = self.current.start
        past = [column for column in self.real if column < start]
        now = [column for column in self.real if column >= start]
        found = []
        if not now:  # nothing but padding
            return []
        for i in range(max(0, len(past) - self.edits.longest), len(past)):
            said = tuple(self.ids[column] for column in past[i + 1 :] + now[:1])
            if self.edits.begins(self.number, said):
                edit = self._edit_at(past[i])
                if edit != CLOSED:
                    found.append((past[i], edit))
        return found

    def _edit_at(self, column: int) -> int:
        """The edit whose gate is open at a position of this pass or an earlier one."""
        here = column - self.current.start
        if here >= 0 and self.current.asked[self.site][self.number, here]:
            return int(self.current.gated[self.site][self.number, here])
        return self.memory.recall(self.current, self.number, column).gated[self.site]
