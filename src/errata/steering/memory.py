"""Memory of earlier positions: what was decided at a prefix, by its content, for the passes that go on from it."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from errata.scope.balls import CLOSED
from errata.steering.edits import Edits
from errata.steering.passes import Pass
from errata.steering.questions import WORDS


class Remembered(NamedTuple):
    """What is kept of a position: by site the edit that is open, the one that the last question was about (none behind another
    question), the last edit that was asked about and its question's last ids; running sums.
    """

    gated: dict[str | int, int]
    meant: dict[str | int, tuple[int, int, list[int]]]
    sums: dict[str | int, Tensor]


class Memory:
    """Decisions at prefixes. owners: a number for each row, or none where all have the same edits; run: the model on ids (B, N)
    without a cache, which remembers where they end.
    """

    SIZE = 8192  # remembered prefixes; forgetting one costs a forward pass, never a wrong answer

    def __init__(self, edits: Edits, owners: Sequence[int], run: Callable[[Tensor], None]):
        self._edits, self._owners, self._run = edits, tuple(owners), run
        self._known: OrderedDict[bytes, Remembered] = OrderedDict()

    def forget(self) -> None:
        """Forget every decision: the states that gates read are other ones from now on."""
        self._known.clear()

    def recall(self, current: Pass, row: int, column: int) -> Remembered:
        """The decision at an earlier position; recomputed without a cache if it was never made or is forgotten."""
        key = self._key(current, row, column)
        if key not in self._known:
            kept = current.prefix(row, column)
            if not len(kept):
                closed: dict[str | int, int] = {part.site: CLOSED for part in self._edits.active}
                sums = {la: torch.zeros(s.shape[-1], device=s.device) for la, s in current.states.items()}
                return Remembered(closed, {site: (CLOSED, CLOSED, [CLOSED] * WORDS) for site in closed}, sums)
            # by rows: all of them, each with its own edits, as a batch must have its rows
            self._run(kept.expand(len(self._owners) or 1, -1))
        return self._known[key]

    def keep(self, done: Pass, sums: dict[str | int, Tensor]) -> None:
        """Remember a pass: where each row ends, and whatever may be asked about again. sums: of its states, by layer."""
        ends = []
        for row in range(done.ids.shape[0]):
            columns = [int(column) for column in done.real(row) if column >= done.start]
            ends += [(row, columns[-1])] if columns else []
            # Behind a gate that opened amid the text each position is asked about again, at every step of an answer.
            if any(
                bool(found[row, : columns[-1] - done.start].ne(CLOSED).any())
                for found in done.gated.values()
                if columns
            ):
                for column in columns[:-1]:
                    if all(bool(asked[row, column - done.start]) for asked in done.asked.values()):
                        self._remember(done, row, column, sums)
        for row, column in ends:  # last, so that nothing pushes them out
            self._remember(done, row, column, sums)

    def _remember(self, done: Pass, row: int, column: int, sums: dict[str | int, Tensor]) -> None:
        here = column - done.start
        gated = {site: int(found[row, here]) for site, found in done.gated.items()}
        meant = {
            site: (int(found.meant[row, here]), int(found.held[row, here]), found.words[row, here].tolist())
            for site, found in done.questions.items()
        }
        key = self._key(done, row, column)
        self._known[key] = Remembered(gated, meant, {layer: s[row, here] for layer, s in sums.items()})
        self._known.move_to_end(key)
        while len(self._known) > max(self.SIZE, len(self._owners)):  # a pass remembers each of its rows
            self._known.popitem(last=False)

    def _key(self, current: Pass, row: int, column: int) -> bytes:
        """Content address of a decision: a row's real ids up to and including a column, and whose edits the row has."""
        owner = self._owners[row].to_bytes(4) if self._owners else b""
        return hashlib.blake2b(owner + current.prefix(row, column).cpu().numpy().tobytes(), digest_size=16).digest()
