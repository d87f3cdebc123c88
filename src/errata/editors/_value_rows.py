"""Edits as rows of token ids, and rows packed for two kinds of passes.

Whole rows are padded on the right, so that no token has nothing to attend to. Without what is left of the edited token, rows
are aligned at it: what comes before is a cache that ends there, what comes after is padded on the right, no row has a gap,
and the edited token of every row is in one column. Nothing depends on the tokenizer's padding side.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from errata.edit import EditRequest
from errata.errors import RequestError, SubjectNotFoundError
from errata.model.tokens import Batch, _offsets, continuation_ids, pad, token_ids

Position = Literal["prompt_last", "subject_last"]
BARE = "{}"


@dataclass(frozen=True)
class ValueJob:
    """One edit for the search: what the model is to say after `prompt`, in each of `contexts`.

    prompt: with one `{}` where the subject stands; without a subject it is taken as it is, and the edited position is its last
    token. contexts: templates with one `{}` for the whole prompt, among them "{}" itself (the bare prompt).
    Raises RequestError for anything else.
    """

    prompt: str
    target: str
    subject: str | None = None
    contexts: tuple[str, ...] = (BARE,)

    def __post_init__(self) -> None:
        if self.subject is not None and (self.prompt.count(BARE) != 1 or not self.subject.strip()):
            raise RequestError(
                f"expected a prompt with one '{{}}' and a subject to put there, found {self.prompt!r} and {self.subject!r}."
            )
        if self.contexts.count(BARE) != 1 or any(context.count(BARE) != 1 for context in self.contexts):
            raise RequestError(
                f"expected contexts with one '{{}}' each, and '{{}}' alone once among them, found {self.contexts!r} "
                f"(prompt {self.prompt!r})."
            )

    @classmethod
    def of(cls, request: EditRequest, contexts: Sequence[str] = (BARE,)) -> "ValueJob":
        """The job of an edit request, the same as all jobs' but for its own contexts."""
        return cls(request.prompt, request.target_new, request.subject, tuple(contexts))

    @property
    def text(self) -> str:
        """The bare prompt with its subject."""
        return self.prompt if self.subject is None else self.prompt.replace(BARE, self.subject)


@dataclass(frozen=True)
class Row:
    """One text of an edit: its ids, the edited token, and the tokens (at or after it) whose next-token logits are read.

    targets: what should follow each of `reads`; empty for a row that is compared with the unedited model. weight: of each
    read in the mean over its edit's reads. head: how many tokens at the start belong to the context alone, and are the same
    whatever prompt follows.
    """

    edit: int
    ids: tuple[int, ...]
    at: int
    reads: tuple[int, ...]
    targets: tuple[int, ...] = ()
    weight: float = 1.0
    bare: bool = False
    head: int = 0


def rows_of(
    tokenizer: Any, jobs: Sequence[ValueJob], essence: str | None = None, read: Position = "prompt_last"
) -> list[list[Row]]:
    """The rows of each job: one per context with the target teacher forced, then one for `essence` if given.

    The target's tokens are those it has after the bare prompt. essence: a template with one `{}` for the subject, read after
    its last token or at the subject's. Raises SubjectNotFoundError, RequestError naming the job.
    """
    texts = [[context.replace(BARE, job.text) for context in job.contexts] for job in jobs]
    encoded = iter(token_ids(tokenizer, [text for own in texts for text in own]))
    rows = []
    for number, (job, own) in enumerate(zip(jobs, texts, strict=True)):
        target = tuple(continuation_ids(tokenizer, job.text, job.target))
        weight = 1 / (len(own) * len(target))
        made = []
        for context, text in zip(job.contexts, own, strict=True):
            ids, before = tuple(next(encoded)), context.split(BARE)[0]
            at, head = _places(tokenizer, text, before, job)
            reads = tuple(range(len(ids) - 1, len(ids) - 1 + len(target)))
            made.append(Row(number, ids + target[:-1], at, reads, target, weight, context == BARE, head))
        if essence is not None:
            made.append(_essence_row(tokenizer, number, job, essence, read))
        rows.append(made)
    return rows


def _places(tokenizer: Any, text: str, before: str, job: ValueJob) -> tuple[int, int]:
    """(index of the edited token, number of tokens in `before`) in a text that is `before`, the job's prompt, and more.

    The edited token is the last one of the subject where the prompt puts it, whatever else names it, or the text's last.
    Raises SubjectNotFoundError if the tokenizer drops the subject.
    """
    offsets = _offsets(tokenizer, text)
    head = next((i for i, (_, end) in enumerate(offsets) if end > len(before)), 0)
    if job.subject is None:
        return len(offsets) - 1, min(head, len(offsets) - 1)
    start = len(before) + len(job.prompt.split(BARE)[0])
    end = start + len(job.subject)
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if not inside:
        raise SubjectNotFoundError(
            f"expected tokens for the subject {job.subject!r} in the prompt {text!r}, found none: "
            f"{type(tokenizer).__name__} drops these characters; name the subject otherwise."
        )
    return inside[-1], min(head, inside[-1])


def _essence_row(tokenizer: Any, number: int, job: ValueJob, essence: str, read: Position) -> Row:
    if job.subject is None:
        raise RequestError(
            f"expected a subject for {essence!r}, found none for edit {number + 1} ({job.prompt!r}); "
            f"give its subject, or leave the essence term out."
        )
    text = essence.replace(BARE, job.subject)
    ids = tuple(token_ids(tokenizer, [text])[0])
    at, head = _places(tokenizer, text, "", replace(job, prompt=essence))
    return Row(number, ids, at, (len(ids) - 1 if read == "prompt_last" else at,), head=head)


def heads_of(rows: Sequence[Sequence[Row]]) -> dict[tuple[int, ...], int]:
    """The token ids of the contexts that more than one edit has, numbered: what is worth running once for all."""
    users: dict[tuple[int, ...], set[int]] = {}
    for row in (row for own in rows for row in own if row.head):
        users.setdefault(row.ids[: row.head], set()).add(row.edit)
    return {ids: i for i, ids in enumerate(ids for ids, edits in users.items() if len(edits) > 1)}


@dataclass(frozen=True, eq=False)
class Layout:
    """Packed rows of E edits, as whole texts padded on the right, and as stretches of tokens behind an aligned cache.

    batch: ids, mask, position_ids (n, T); at (n,): the edited token of each row; lead, span: the most tokens before it, and
    from it on, in any row. head (n,): tokens at the start that were run before, as number `which` (n,) of the heads.
    owner (n,): the edit of each row, 0 .. E - 1; bare, essence (n,): what kind of row it is.
    Rows of an edit's essence come after all others, in the order of their edits.
    Reads, ordered by row: read_row (R,), read_col (R,) counted from the edited token, target (R,) with -1 in essence rows,
    weight (R,) float64.
    """

    batch: Batch
    at: Tensor
    lead: int
    span: int
    head: Tensor
    which: Tensor
    owner: Tensor
    bare: Tensor
    essence: Tensor
    read_row: Tensor
    read_col: Tensor
    target: Tensor
    weight: Tensor

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.owner)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.owner.device

    @property
    def widest(self) -> int:
        """The most tokens that a pass behind what was run before has in a row: up to the edited one, or from it on."""
        return max(self.span, int((self.at - self.head).max()))

    def take(self, rows: Tensor) -> "Layout":
        """The layout of the rows (k,), in ascending order; owners and widths stay."""
        new = torch.full_like(self.owner, -1)
        new[rows] = torch.arange(len(rows), device=rows.device)
        reads = new[self.read_row] >= 0
        return replace(
            self,
            batch=Batch(*(getattr(self.batch, name)[rows] for name in ("ids", "mask", "position_ids", "lengths"))),
            **{name: getattr(self, name)[rows] for name in ("at", "head", "which", "owner", "bare", "essence")},
            read_row=new[self.read_row[reads]],
            **{name: getattr(self, name)[reads] for name in ("read_col", "target", "weight")},
        )

    def keep(self, edits: Tensor) -> tuple["Layout", Tensor]:
        """The layout of some edits (k,), in ascending order and renumbered from 0, and the rows that it took."""
        new = self.owner.new_full((int(self.owner.max()) + 1,), -1)
        new[edits] = torch.arange(len(edits), device=edits.device)
        rows = torch.nonzero(new[self.owner] >= 0)[:, 0]
        taken = self.take(rows)
        return replace(taken, owner=new[taken.owner]), rows

    def after(self, states: Tensor) -> Tensor:
        """(n, span, ...) of states (n, T, ...): from each row's edited token on. Past a row's end its last one repeats."""
        cols = torch.minimum(self.at[:, None] + self._steps(self.span), self.batch.lengths[:, None] - 1)
        return states[torch.arange(self.n, device=states.device)[:, None], cols.to(states.device)]

    def before(self, heads: Tensor | None, fresh: Tensor | None) -> Tensor | None:
        """(n, h, lead, d_head) keys or values of what is left of each row's edited token, up against it; None if nothing is.

        heads (U, h, W, d_head): those of the heads; fresh (n, h, S, d_head): those of the tokens from each row's head on.
        Where a row has fewer than lead tokens on its left some other one stands in, and the mask hides it.
        """
        known = [x for x in (None if heads is None else heads[self.which.to(heads.device)], fresh) if x is not None]
        if not self.lead or not known:
            return None
        t = self.at[:, None] - self.lead + self._steps(self.lead)
        width = 0 if heads is None else heads.shape[2]
        cols = torch.where(t < self.head[:, None], t, width + t - self.head[:, None]).clamp(min=0)
        both, cols = torch.cat(known, 2), cols.to(known[0].device)
        return both[torch.arange(self.n, device=both.device)[:, None], :, cols].transpose(1, 2)

    def stretch(self, start: Tensor, stop: Tensor) -> Batch:
        """Tokens start (n,) to stop (n,) of each row, padded on the right, and the mask with what the cache holds before."""
        lead, span = int(start.max()), max(1, int((stop - start).max()))
        cols = start[:, None] + self._steps(span)
        real = cols < stop[:, None]
        real[:, 0] = True  # a row with no token here still attends to something; what comes of it is never used
        mask = torch.cat([start[:, None] >= lead - self._steps(lead), real], 1).to(self.batch.mask.dtype)
        cols = torch.minimum(cols, self.batch.lengths[:, None] - 1)
        ids, positions = (x.gather(1, cols) for x in (self.batch.ids, self.batch.position_ids))
        return Batch(ids, mask, positions, self.batch.lengths)

    def suffix(self) -> Batch:
        """The tokens from each row's edited one on."""
        batch = self.stretch(self.at, self.batch.lengths)
        # Widths stay those of the whole layout when rows leave, like the cache's and the states'.
        left, right = self.lead - int(self.at.max()), self.span - batch.ids.shape[1]
        ids, positions = (F.pad(x, (0, right)) for x in (batch.ids, batch.position_ids))
        return Batch(ids, F.pad(batch.mask, (left, right)), positions, batch.lengths)

    def _steps(self, n: int) -> Tensor:
        return torch.arange(n, device=self.device)


def pack(
    rows: Sequence[Sequence[Row]],
    device: torch.device | str = "cpu",
    heads: Mapping[tuple[int, ...], int] | None = None,
) -> Layout:
    """The layout of some edits' rows; edit i of the layout is rows[i], whatever number it had. heads: those that were run."""
    flat = [(edit, row) for edit, own in enumerate(rows) for row in own]
    flat.sort(key=lambda pair: not pair[1].targets)  # essence rows last: logits fall into two slices
    reads = [
        (i, t - row.at, row.targets[k] if row.targets else -1, row.weight)
        for i, (_, row) in enumerate(flat)
        for k, t in enumerate(row.reads)
    ]
    read_row, read_col, target, weight = zip(*reads, strict=True)
    which = [(heads or {}).get(row.ids[: row.head], -1) for _, row in flat]
    head = [row.head if number >= 0 else 0 for (_, row), number in zip(flat, which, strict=True)]

    def ints(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), device=device)

    return Layout(
        batch=pad([row.ids for _, row in flat], 0, device),
        at=ints(row.at for _, row in flat),
        lead=max(row.at for _, row in flat),
        span=max(len(row.ids) - row.at for _, row in flat),
        head=ints(head),
        which=ints(max(number, 0) for number in which),
        owner=ints(edit for edit, _ in flat),
        bare=ints(row.bare for _, row in flat),
        essence=ints(not row.targets for _, row in flat),
        read_row=ints(read_row),
        read_col=ints(read_col),
        target=ints(target),
        weight=torch.tensor(weight, dtype=torch.float64).to(device),
    )
