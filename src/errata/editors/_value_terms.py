"""The terms of a value search's objective. Each gives one number per edit, in nats, from one look at the model under delta.

A term is a frozen value: `Term.__call__(look)` returns (E,), weight included. New methods add terms, never a new search.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from errata.editors._value_rows import Layout, Position
from errata.errors import ConfigError, ShapeError
from errata.model.anatomy import Site


@dataclass(frozen=True, eq=False)
class Look:
    """What the terms see at one step: E edits in n rows with R reads, the vectors delta (E, d) inside the model.

    step: evaluations before this one; edits (E,): their indices among all jobs; origin (E, d): the site's output on the bare
    prompt; logits (R, V) at the layout's reads that have a target, drifted (E, V) at the essence reads behind them (0, V
    without); base (E, V): log-probabilities of the unedited model there, or None; states: layer -> (n, S, d), S columns from
    the edited token on; losses: the terms before this one, detached.
    """

    step: int
    edits: Tensor
    delta: Tensor
    origin: Tensor
    layout: Layout
    logits: Tensor
    drifted: Tensor
    base: Tensor | None
    states: Mapping[Site, Tensor]
    losses: dict[str, Tensor]

    def per_edit(self, values: Tensor, owner: Tensor) -> Tensor:
        """(E,) sums of values (k,) by the edit that owns each."""
        return values.new_zeros(len(self.delta)).index_add(0, owner.to(values.device), values)


class Term(ABC):
    """One summand of the objective. name: its key in losses; counts: whether it is part of the loss that stops a search."""

    name: ClassVar[str]
    counts: bool

    @abstractmethod
    def __call__(self, look: Look) -> Tensor:
        """(E,) this term's loss, weight included."""

    @property
    def essence(self) -> tuple[str, Position] | None:
        """Template of the row about the subject alone that the term compares, and where it is read."""
        return None

    @property
    def layers(self) -> tuple[Site, ...]:
        """Layers whose states it reads."""
        return ()

    def check(self, n: int) -> None:  # noqa: B027 - most terms fit any number of jobs
        """Raise if the term does not fit n jobs."""


@dataclass(frozen=True)
class NLL(Term):
    """Mean over contexts of the mean over the target's tokens of -log P(token), nats (ROME, Eq. 4)."""

    name: ClassVar[str] = "nll"
    weight: float = 1.0
    counts: bool = True

    def __call__(self, look: Look) -> Tensor:
        layout = look.layout
        said = slice(len(look.logits))
        nll = F.cross_entropy(look.logits.to(look.delta.dtype), layout.target[said], reduction="none")
        weighted = nll * layout.weight[said].to(nll.dtype)
        return self.weight * look.per_edit(weighted, layout.owner[layout.read_row[said]])


@dataclass(frozen=True)
class EssenceKL(Term):
    """KL(P_delta || P_0) of the next token after "subject is a": the edit must not change what the subject is (ROME, Eq. 4).

    read: after the template ("prompt_last", ours) or at the subject's last token ("subject_last", the published code).
    """

    name: ClassVar[str] = "essence"
    weight: float = 0.0625
    read: Position = "prompt_last"
    template: str = "{} is a"
    counts: bool = True

    @property
    def essence(self) -> tuple[str, Position]:
        """Its template and where it is read."""
        return self.template, self.read

    def __call__(self, look: Look) -> Tensor:
        if look.base is None:
            raise ConfigError("expected the unedited model's distribution for the essence term, found none.")
        now = F.log_softmax(look.drifted.to(look.delta.dtype), -1)
        owner = look.layout.owner[look.layout.read_row[len(look.logits) :]]
        return self.weight * look.per_edit((now.exp() * (now - look.base[owner])).sum(-1), owner)


@dataclass(frozen=True)
class NormPenalty(Term):
    """A weight on the size of delta beside the output h that it is added to.

    form: "ratio" (|delta| / |h|)^2, ours; "published" |delta| / |h|^2, the code of ROME and MEMIT; "plain" |delta|^2.
    """

    name: ClassVar[str] = "norm"
    weight: float = 0.5
    form: Literal["ratio", "published", "plain"] = "ratio"
    counts: bool = True

    def __call__(self, look: Look) -> Tensor:
        h2 = look.origin.square().sum(-1)
        if self.form == "published":
            return self.weight * torch.linalg.vector_norm(look.delta, dim=-1) / h2
        size = look.delta.square().sum(-1)
        return self.weight * (size / h2 if self.form == "ratio" else size)


@dataclass(frozen=True, eq=False)
class Alignment(Term):
    """Pull the residual stream towards anchors: where the model's own knowledge of the object lives (STEAM, L_LA).

    anchors: for each job, in order, (len(at_layers), d) mean states of reference prompts at `at_layers`, or None for a job
    without references (its term is 0). The mean over contexts and layers of 1 - cos(h, anchor), or of the mean squared
    difference. read: the prompt's last token, where the object's first token is produced, or the subject's.
    schedule of lambda: "constant"; "warmup": linear up to weight over `warmup` steps; "balanced": weight times the ratio of
    the NLL to the alignment at this step (a constant to the gradient), so that the term weighs `weight` times the NLL.
    """

    name: ClassVar[str] = "alignment"
    anchors: tuple[Tensor | None, ...]
    at_layers: tuple[Site, ...]
    weight: float = 1.0
    distance: Literal["cosine", "mse"] = "cosine"
    read: Position = "prompt_last"
    schedule: Literal["constant", "warmup", "balanced"] = "constant"
    warmup: int = 5
    counts: bool = True

    @property
    def layers(self) -> tuple[Site, ...]:
        """The aligned layers."""
        return self.at_layers

    def check(self, n: int) -> None:
        """Raise ConfigError or ShapeError if there is not one anchor or None per job, each (layers, d)."""
        if len(self.anchors) != n or not self.at_layers or (self.schedule == "warmup" and self.warmup < 1):
            raise ConfigError(
                f"expected at least one layer, {n} anchors (None for a job without) and a warm-up of at least 1 step, found "
                f"{len(self.at_layers)} layers, {len(self.anchors)} anchors and {self.warmup} steps."
            )
        shapes = {tuple(anchor.shape) for anchor in self.anchors if anchor is not None}
        if any(len(shape) != 2 or shape[0] != len(self.at_layers) for shape in shapes) or len(shapes) > 1:
            raise ShapeError(f"expected anchors of shape ({len(self.at_layers)}, d), found {sorted(shapes)}.")

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor]:
        """(jobs, layers, d) anchors, zero where there is none, and (jobs,) whether there is one."""
        known = torch.tensor([anchor is not None for anchor in self.anchors])
        blank = torch.zeros_like(next((a for a in self.anchors if a is not None), torch.zeros(len(self.at_layers), 1)))
        return torch.stack([blank if anchor is None else anchor.detach().cpu() for anchor in self.anchors]), known

    def __call__(self, look: Look) -> Tensor:
        anchors, known = (x[look.edits.cpu()] for x in self._stacked)
        if not bool(known.any()):
            return look.delta.sum(-1) * 0
        layout = look.layout
        first = torch.cat([layout.read_row.new_ones(1, dtype=torch.bool), layout.read_row[1:] != layout.read_row[:-1]])
        first &= layout.target >= 0
        rows, owner = layout.read_row[first], layout.owner[layout.read_row[first]]
        cols = layout.read_col[first] if self.read == "prompt_last" else torch.zeros_like(rows)
        weight = 1 / torch.bincount(owner, minlength=len(look.delta)).to(look.delta)[owner] / len(self.at_layers)
        total = look.delta.new_zeros(len(look.delta))
        for i, layer in enumerate(self.at_layers):
            states = look.states[layer]
            h = states[rows.to(states.device), cols.to(states.device)].to(look.delta)
            total = total + look.per_edit(weight * self._apart(h, anchors[:, i].to(h)[owner]), owner)
        total = total * known.to(total)
        return self._lambda(look, total) * total

    def _apart(self, h: Tensor, anchor: Tensor) -> Tensor:
        if self.distance == "mse":
            return (h - anchor).square().mean(-1)
        return 1 - F.cosine_similarity(h, anchor, dim=-1)

    def _lambda(self, look: Look, total: Tensor) -> Tensor | float:
        if self.schedule == "warmup":
            return self.weight * min(1.0, (look.step + 1) / self.warmup)
        if self.schedule == "balanced":
            if "nll" not in look.losses:
                raise ConfigError("expected an NLL term before a balanced alignment, found none; list NLL first.")
            return self.weight * look.losses["nll"] / total.detach().clamp(min=1e-6)
        return self.weight
