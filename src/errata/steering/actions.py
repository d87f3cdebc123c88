"""What acts where edits are open: maps and means in the place of hidden states, experts' answers in the place of logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.counterfactual import Counterfactual, Expert, read
from errata.steering.edits import Edits
from errata.steering.passes import Pass
from errata.steering.points import Points


def steered(hidden: Tensor, chosen: Sequence[tuple[int, int, int, int]], edits: Edits) -> Tensor:
    """hidden (B, T, d) with the states at chosen places, (row, column, edit, step), moved by their maps or set to their means.

    The same tensor where nothing is chosen.
    """
    if not chosen:
        return hidden
    hidden = hidden.clone()
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, column, edit, step in chosen:
        groups.setdefault((edit, step), []).append((row, column))
    for (edit, step), places in groups.items():
        rows, columns = (torch.tensor(x, device=hidden.device) for x in zip(*places, strict=True))
        if edits.recalled(edit):
            hidden[rows, columns] = edits.mean(edit, step).to(hidden)
        else:
            hidden[rows, columns] = edits.map(edit, step, hidden.device)(hidden[rows, columns])
    return hidden


class Experts:
    """Counterfactual experts that answer in the place of a model (SERAC); each is made once."""

    def __init__(self, model: Any):
        self._model = model
        self._made: dict[str, Any] = {}

    def answered(
        self, logits: Tensor, current: Pass, chosen: Sequence[tuple[int, int, int, int]], edits: Edits, points: Points
    ) -> Tensor:
        """The logits with the experts' answers at chosen places, (row, column of the pass, edit, step), in them.

        logits: (B, T, V), T perhaps only the last columns, or a classifier's (B, labels). The same tensor where none is chosen.
        """
        hidden = 0 if current.whole_rows else current.width - logits.shape[1]  # columns whose logits nobody wants
        by_row: dict[tuple[int, int], list[int]] = {}
        for row, column, edit, _ in chosen:
            if column >= hidden:
                by_row.setdefault((row, edit), []).append(column)
        if not by_row:
            return logits
        logits = logits.clone()
        parts = {edit: _counterfactual(edits, edit) for _, edit in by_row}
        real = [current.real(row).tolist() for row in range(len(current.ids))]
        for digest in dict.fromkeys(part.expert.digest for part in parts.values()):
            own = [(row, edit) for row, edit in by_row if parts[edit].expert.digest == digest]
            asked = [(parts[edit].record, current.ids[row][real[row]].tolist()) for row, edit in own]
            with torch.no_grad():
                found = read(self._of(parts[own[0][1]].expert), asked)
            for (row, edit), theirs in zip(own, found, strict=True):
                columns, part = by_row[row, edit], parts[edit]
                far = _far(current, row, columns, part, points)
                if current.whole_rows:
                    logits[row] = part.answer(logits[row : row + 1], theirs, far)[0]
                    continue
                at = [real[row].index(column + current.start) for column in columns]
                where = torch.tensor([column - hidden for column in columns], device=logits.device)
                logits[row, where] = part.answer(logits[row, where], theirs[at], far)
        return logits

    def _of(self, expert: Expert) -> Any:
        """The expert as a model; made once."""
        if expert.digest not in self._made:
            self._made[expert.digest] = expert.model(self._model.device)
        return self._made[expert.digest]


def _counterfactual(edits: Edits, edit: int) -> Counterfactual:
    part = edits.part(edit)
    assert isinstance(part, Counterfactual)
    return part


def _far(current: Pass, row: int, columns: Sequence[int], part: Counterfactual, points: Points) -> Tensor:
    """(len(columns),) distances of a row's positions from the part's centre; not needed, hence zero, where nothing is mixed."""
    at = points.of(current, part.gate)[0] if part.mix == "soft" else None
    if at is None:
        return torch.zeros(len(columns))
    return part.gate.distances(at[row, list(columns)], part.centre.float()[None])[:, 0]
