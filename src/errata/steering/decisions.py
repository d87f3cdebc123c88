"""The decisions at each position of a pass: which edit is open there, by its scope or recalled, and which one is nearest."""

import torch
from torch import Tensor

from errata.scope.balls import CLOSED
from errata.scope.recall import kinds
from errata.steering.edits import Edits
from errata.steering.memory import Memory
from errata.steering.parts import Decision
from errata.steering.passes import Pass
from errata.steering.points import Points
from errata.steering.questions import Questions, endings, followed


def decide(current: Pass, site: str | int, edits: Edits, points: Points, memory: Memory) -> None:
    """Decide for every column of the pass among the edits at one site, which read layers up to it."""
    rows, device = current.ids.shape[0], current.ids.device
    gated = torch.full((rows, current.width), CLOSED, device=device)
    best = torch.full((rows, current.width), float("inf"), device=device)  # distance of the winner, in radii
    if current.nearest is None or current.distance is None or current.closest is None:
        current.nearest, current.distance, current.closest = gated.clone(), best.clone(), best.clone()
    everywhere = torch.ones_like(gated, dtype=torch.bool)
    for where_used, balls in edits.groups:
        if where_used != site:
            continue
        at, asked = points.of(current, balls.gate)
        if at is None:
            continue
        everywhere = everywhere & asked
        ends = current.ends().clamp(min=0).to(at.device)
        current.points[balls.gate.digest] = at[torch.arange(rows, device=at.device), ends]
        near, distance, depth, winner, score = (x.to(device) for x in balls.closest(at))
        nearer = asked & (depth < current.closest)
        current.closest = torch.where(nearer, depth, current.closest)
        current.nearest = torch.where(nearer, near, current.nearest)
        current.distance = torch.where(nearer, distance, current.distance)
        wins = asked & (score < best)
        best = torch.where(wins, score, best)
        gated = torch.where(wins, winner, gated)
    current.asked[site] = everywhere
    real = current.mask[:, current.start :]
    current.gated[site] = torch.where(real, gated, CLOSED)
    _recall(current, site, real, edits, memory)


def _recall(current: Pass, site: str | int, real: Tensor, edits: Edits, memory: Memory) -> None:
    """Where an answer is asked for again, open for the edit that the last question was about."""
    gated = current.gated[site]
    gate = next((b.gate for at, b in edits.groups if at == site and b.gate.cues is not None), None)
    current.questions[site] = Questions.none(gated)
    if gate is None or gate.cue_layer not in current.states:
        return
    assert gate.cues is not None and gate.cue_layer is not None
    assert current.nearest is not None and current.closest is not None
    kind = kinds(current.states[gate.cue_layer], gate.cues).to(gated.device)
    tails = endings(torch.where(current.mask, current.ids, CLOSED), current.start)
    before = Questions.none(gated[:, 0])
    if current.start:
        said = [memory.recall(current, row, current.start - 1).meant[site] for row in range(len(gated))]
        before = Questions(*(torch.tensor(list(of), device=gated.device) for of in zip(*said, strict=True)))
    found, recalled = followed(gated, real, kind, current.nearest, current.closest, tails, before)
    current.questions[site] = found
    current.gated[site] = torch.where(recalled, found.meant + len(edits.active), gated)


def decision_at(done: Pass, row: int, column: int, edits: Edits, own: str | None) -> Decision:
    """What was decided at a column of a pass. own: the edit whose own scope's distance is wanted, if any."""
    assert done.nearest is not None and done.distance is not None
    near = int(done.nearest[row, column])
    found = {int(gated[row, column]) for gated in done.gated.values()} - {CLOSED}
    opened = {edit % len(edits.active) for edit in found}
    edit = near if near in opened else min(opened, default=CLOSED)
    return Decision(
        edit=edits.active[edit].edit if edit != CLOSED else None,
        nearest=edits.active[near].edit if near != CLOSED else None,
        distance=float(done.distance[row, column]),
        radius=edits.active[near].radius if near != CLOSED else float("nan"),
        own=_distance(done, row, own, edits) if own is not None else None,
    )


def _distance(done: Pass, row: int, edit: str, edits: Edits) -> float | None:
    """How far the end of a row is from the scope of an edit itself, which is the first of its parts; None if it is not here."""
    part = next((p for p in edits.active if p.edit == edit), None)
    points = done.points.get(part.gate.digest) if part else None
    if part is None or points is None:
        return None
    return float(part.gate.distances(points[row][None], part.centre.float()[None]))
