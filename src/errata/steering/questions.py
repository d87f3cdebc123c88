"""The last question of a row: which edit it was about, and where its answer is asked for again without it.

Such a position opens for that edit. Another question in between closes it. That it is another one is told by its distance,
and by its words: a question that is restated amid other text may lie far from its scope, and what stands just behind it is
no other question.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from errata.scope.balls import CLOSED
from errata.scope.recall import AGAIN, ASKED

WORDS = 4  # last tokens by which a restated question is known
MARKS = 2  # tokens of punctuation that may stand behind a question
BEHIND = 6  # tokens behind a restated question in which no other one can end
NEAR = 1.6  # radii within which a question that ends outside every scope may still be about the nearest edit


class Questions(NamedTuple):
    """What is known of questions at positions (...)."""

    meant: Tensor  # (...) edit of the last question, or CLOSED
    held: Tensor  # (...) the last edit that was asked about, or CLOSED
    words: Tensor  # (..., WORDS) the last ids of its question

    @classmethod
    def none(cls, like: Tensor) -> "Questions":
        """Of as many positions as `like` has, before any question."""
        meant = torch.full_like(like, CLOSED)
        return cls(meant, meant.clone(), meant[..., None].expand(*like.shape, WORDS).clone())


def endings(ids: Tensor, start: int) -> Tensor:
    """(B, BEHIND + T, WORDS): the last ids at each column of (B, N) ids from `start` on, and at the BEHIND columns before it."""
    return torch.nn.functional.pad(ids, (WORDS - 1 + BEHIND, 0), value=CLOSED).unfold(1, WORDS, 1)[:, start:]


def followed(
    gated: Tensor, real: Tensor, kind: Tensor, nearest: Tensor, radii: Tensor, tails: Tensor, before: Questions
) -> tuple[Questions, Tensor]:
    """The questions (B, T) of a pass, and where in it the answer to the last one is asked for again, (B, T) bool.

    All (B, T): gated, the edit whose scope contains the position, or CLOSED; real, whether a token stands there; kind, of
    `scope.recall`; nearest, the nearest edit, and radii, how far it is beyond its boundary. tails: `endings` of the ids;
    before: the questions (B,) at the position before the pass.
    """
    found, recalled = Questions.none(gated), torch.zeros_like(real)
    last, held, about = before
    for column in range(gated.shape[1]):
        here = gated[:, column]
        near = (nearest[:, column] == last) & (radii[:, column] < NEAR - 1)
        same = (tails[:, column : column + BEHIND + 1] == about[:, None]).all(-1) & held.ne(CLOSED)[:, None]
        behind, restated = same.any(-1), same[:, BEHIND - MARKS :].any(-1)
        asked = (kind[:, column] == ASKED) & real[:, column]
        again = real[:, column] & (kind[:, column] == AGAIN) | asked & behind & ~restated
        about = torch.where((here.ge(0) & here.ne(last))[:, None], tails[:, column + BEHIND], about)
        last = torch.where(asked & ~near & ~behind, CLOSED, torch.where(restated, held, last))
        last = torch.where(here.ge(0), here, last)
        held = torch.where(here.ge(0), here, held)
        found.meant[:, column], found.held[:, column], found.words[:, column] = last, held, about
        recalled[:, column] = again & here.eq(CLOSED) & last.ne(CLOSED)
    return found, recalled
