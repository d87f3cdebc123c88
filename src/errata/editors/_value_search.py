"""One value search for every method: a vector at one layer and token that makes the model say the target.

ROME's v* (Meng et al. 2022, Eq. 4), MEMIT's z (Meng et al. 2023, Eq. 16), STEAM's z and GRACE's value are this search with
other places and terms. It runs over a batch of edits; each has its own targets, contexts, norm ball and early stop, and
leaves the batch when it stops. Adam on delta, from zero; after each update |delta| <= clamp * |h|, with h the site's output at
the edited token of the bare prompt. As in the published code the last evaluation is followed by no update.

Differs: whole terms are options (see `_value_terms`), and so is a step rule that needs fewer evaluations than Adam; a search
whose loss is not finite ends there instead of spreading NaN.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.editor import Progress, quiet
from errata.editors._value_pass import Pass, Place
from errata.editors._value_rows import Position, Row, ValueJob, rows_of
from errata.editors._value_runner import Opened, Runner
from errata.editors._value_terms import NLL, Alignment, EssenceKL, Look, NormPenalty, Term
from errata.errors import ConfigError, ShapeError
from errata.model.anatomy import Anatomy, anatomy

__all__ = [
    "NLL",
    "Alignment",
    "EssenceKL",
    "Look",
    "NormPenalty",
    "Rule",
    "Term",
    "ValueJob",
    "ValueResult",
    "ValueSearchConfig",
    "evaluate_values",
    "search_values",
]

Rule = Literal["adam", "newton"]
ROME_TERMS: tuple[Term, ...] = (NLL(), EssenceKL(), NormPenalty())


@dataclass(frozen=True)
class ValueSearchConfig:
    """Where and how to search. layer: negative counts from the end; where: "mlp" the MLP's output, "block" the block's.

    steps: evaluations of the loss, each but the last followed by an update; rule: "adam", or "newton" along the gradient on
    the logarithm of the loss; lr: Adam's, activation units, or Newton's longest step in units of |h|; clamp: radius of
    the norm ball in units of |h|, None for no ball; stop: an edit is done when its loss (nats, terms that count) is below.
    reuse: run only the layers above and the tokens from the edited one on; checked on one edit, with a warning and the
    full pass where the family does not allow it. batch_tokens: padded tokens a step runs, by default what suits the device (a
    pass without a graph runs twice as many);
    batch_logits: logits a step makes.
    Raises ConfigError out of range.
    """

    layer: int
    where: Literal["mlp", "block"] = "mlp"
    steps: int = 20
    lr: float = 0.5
    clamp: float | None = 4.0
    stop: float = 0.05
    reuse: bool = True
    batch_tokens: int | None = None
    batch_logits: int = 2**26
    rule: Rule = "adam"

    def __post_init__(self) -> None:
        positive = self.lr > 0 and (self.clamp is None or self.clamp > 0)
        counts = (self.steps, self.batch_logits, 1 if self.batch_tokens is None else self.batch_tokens)
        if not positive or min(counts) < 1 or self.where not in ("mlp", "block"):
            raise ConfigError(
                f"expected where 'mlp' or 'block', steps and batches of at least 1, lr and clamp above 0, found {self}."
            )
        if self.rule not in ("adam", "newton") or (self.rule == "newton" and not self.stop > 0):
            raise ConfigError(f"expected rule 'adam', or 'newton' with stop above 0, which it aims at, found {self}.")


@dataclass(frozen=True, eq=False)
class ValueResult:
    """What a search found for n jobs, on the CPU, float32 (float64 for a float64 model).

    delta (n, d); origin (n, d): h, the site's output on the bare prompt; losses: term name -> (n,) at the last evaluation, at
    `delta`; curves: the total at each evaluation of each job; stopped (n,): whether the loss fell below the threshold.
    outputs, keys: per job (contexts, d) and (contexts, m), the site's output and (for the MLP) input at the edited token in
    each context of the unedited model. reused: whether the suffix alone was run.
    """

    delta: Tensor
    origin: Tensor
    losses: dict[str, Tensor]
    curves: tuple[tuple[float, ...], ...]
    stopped: Tensor
    outputs: tuple[Tensor, ...]
    keys: tuple[Tensor, ...] | None
    reused: bool

    @property
    def value(self) -> Tensor:
        """(n, d) h + delta: what the site should put out on the bare prompt."""
        return self.origin + self.delta


def search_values(
    model: Any,
    tokenizer: Any,
    jobs: Sequence[ValueJob],
    config: ValueSearchConfig,
    terms: Sequence[Term] = ROME_TERMS,
    progress: Progress | None = None,
) -> ValueResult:
    """Search a vector for every job. progress(done, total) counts jobs.

    Weights, modes, gradient flags and random state of the model are as found afterwards; attached patches do not act.
    Raises ConfigError, RequestError, SubjectNotFoundError, AnatomyError for a bad layer or a model without a head.
    """
    with _Search.opened(model, tokenizer, jobs, config, terms) as search:
        found: list[_Found | None] = [None] * len(jobs)
        done = 0
        for chunk in search.chunks():
            for number, result in search.run(chunk):
                found[number] = result
                done += 1
                if progress is not None:
                    progress(done, len(jobs))
        return _collect([result for result in found if result is not None], search.runner.reuse)


def evaluate_values(
    model: Any,
    tokenizer: Any,
    jobs: Sequence[ValueJob],
    config: ValueSearchConfig,
    delta: Tensor,
    terms: Sequence[Term] = ROME_TERMS,
    step: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """The objective at given vectors delta (n, d), all jobs at once: {term: (n,)}, and the gradient (n, d) of its sum.

    step: evaluations before this one, for terms with a schedule. Raises as `search_values`, ShapeError for another delta.
    """
    with _Search.opened(model, tokenizer, jobs, config, terms) as search:
        chunk = list(range(len(jobs)))
        state, _ = search.prepare(chunk)
        if delta.shape != state.origin.shape:
            raise ShapeError(f"expected delta of shape {tuple(state.origin.shape)}, found {tuple(delta.shape)}.")
        losses, total, leaf = search.look(state, delta.to(state.origin), step)
        (gradient,) = torch.autograd.grad(total, leaf, torch.ones_like(total))
        return {name: loss.detach().cpu() for name, loss in losses.items()}, gradient.cpu()


@dataclass
class _State:
    """The edits of a chunk that still run: E of them."""

    edits: Tensor  # (E,) their job numbers
    run: Pass
    origin: Tensor  # (E, d)
    base: Tensor | None  # (E, V)
    delta: Tensor  # (E, d)
    mean: Tensor  # (E, d) Adam's first moment
    square: Tensor  # (E, d) and its second

    def keep(self, kept: Tensor) -> "_State":
        base = None if self.base is None else self.base[kept]
        moving = (x[kept] for x in (self.delta, self.mean, self.square))
        return _State(self.edits[kept.cpu()], self.run.keep(kept), self.origin[kept], base, *moving)


@dataclass(frozen=True, eq=False)
class _Found:
    delta: Tensor
    origin: Tensor
    losses: dict[str, float]
    curve: tuple[float, ...]
    stopped: bool
    outputs: Tensor
    keys: Tensor | None


@dataclass(frozen=True)
class _Search:
    """A search on a model that is held still, over rows that are already made."""

    config: ValueSearchConfig
    terms: tuple[Term, ...]
    rows: list[list[Row]]
    vocabulary: int
    runner: Runner

    @classmethod
    @contextmanager
    def opened(
        cls, model: Any, tokenizer: Any, jobs: Sequence[ValueJob], config: ValueSearchConfig, terms: Sequence[Term]
    ) -> Iterator["_Search"]:
        """The search, inside of which the model is in evaluation mode and no parameter requires a gradient."""
        parts = anatomy(model)
        path = parts.mlp_site(config.layer) if config.where == "mlp" else parts.site(config.layer)
        layer, keys = config.layer % parts.n_layers, config.where == "mlp"
        essence = _check(parts, layer, jobs, terms)
        rows = rows_of(tokenizer, jobs, *essence) if essence else rows_of(tokenizer, jobs)
        layers = tuple(dict.fromkeys(site for term in terms for site in term.layers))
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        with quiet(model), _without_gradients(model):
            place = Place(path, layer, layer + 1)
            runner = Runner(model, parts, place, layers, keys=keys, batch_tokens=config.batch_tokens)
            if config.reuse:
                runner.settle(rows)
            yield cls(config, tuple(terms), rows, vocabulary, runner)

    def chunks(self) -> Iterator[list[int]]:
        """Job numbers in ascending width, as many at a time as fit when padded to the widest; one alone may be larger.

        A wider job begins a new chunk where the last is at least half full: padding costs more than a smaller batch.
        """
        most = max(1, self.config.batch_logits // self.vocabulary)
        chunk: list[int] = []
        rows = reads = 0
        for number in sorted(range(len(self.rows)), key=self._widths):
            own, width = self.rows[number], self._widths(number)[0]
            new = len(own), sum(len(row.reads) for row in own)
            fits = self.runner.fits(width)
            wider = bool(chunk) and width > self._widths(chunk[-1])[0] and rows > fits // 2
            if chunk and (wider or rows + new[0] > fits or reads + new[1] > most):
                yield chunk
                chunk, rows, reads = [], 0, 0
            chunk.append(number)
            rows, reads = rows + new[0], reads + new[1]
        if chunk:
            yield chunk

    def _widths(self, number: int) -> tuple[int, int]:
        """(tokens that a step runs in the widest row of a job, tokens before them in the row where these are most)."""
        own = self.rows[number]
        lead = max(row.at for row in own) if self.runner.reuse else 0
        return max(len(row.ids) - (row.at if self.runner.reuse else 0) for row in own), lead

    def prepare(self, chunk: Sequence[int]) -> tuple[_State, Opened]:
        """The state before the first step, at delta = 0, and what the unedited rows left behind."""
        batch = self.runner.open([self.rows[i] for i in chunk])
        outputs = batch.prefix.outputs[batch.layout.bare]
        origin = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        zero = torch.zeros_like(origin)
        return _State(torch.tensor(chunk), batch.run, origin, batch.base, zero, zero, zero), batch

    def look(self, state: _State, delta: Tensor, step: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """{term: (E,)}, their sum (E,), and the leaf that it is to be differentiated by."""
        leaf = delta.detach().clone().requires_grad_()
        losses: dict[str, Tensor] = {}
        with torch.enable_grad():
            layout = state.run.layout
            logits, states = state.run(leaf)
            n = int(layout.essence[layout.read_row].sum())
            # One gradient of the logits, not one of each term; and no copy of it where there is nothing to split.
            said, drifted = logits.split((len(logits) - n, n)) if n else (logits, logits[:0])
            for term in self.terms:
                before = {name: loss.detach() for name, loss in losses.items()}
                look = Look(step, state.edits, leaf, state.origin, layout, said, drifted, state.base, states, before)
                losses[term.name] = term(look)
            total = torch.stack(list(losses.values())).sum(0)
        return losses, total, leaf

    def run(self, chunk: Sequence[int]) -> Iterator[tuple[int, _Found]]:
        """(job number, what was found) of each edit of the chunk, as it ends."""
        state, batch = self.prepare(chunk)
        layout, prefix = batch.layout, batch.prefix
        local = {number: i for i, number in enumerate(chunk)}
        curves: dict[int, list[float]] = {number: [] for number in chunk}
        for step in range(self.config.steps):
            losses, total, leaf = self.look(state, state.delta, step)
            counted = torch.stack([losses[term.name].detach() for term in self.terms if term.counts]).sum(0)
            stopped = counted < self.config.stop
            last = step == self.config.steps - 1
            ended = (stopped | ~torch.isfinite(total)).cpu() | last
            for number, loss in zip(state.edits.tolist(), total.tolist(), strict=True):
                curves[number].append(loss)
            for i in torch.nonzero(ended)[:, 0].tolist():
                number = int(state.edits[i])
                rows = (layout.owner == local[number]) & ~layout.essence
                yield (
                    number,
                    _Found(
                        state.delta[i].cpu(),
                        state.origin[i].cpu(),
                        {name: float(loss[i]) for name, loss in losses.items()},
                        tuple(curves[number]),
                        bool(stopped[i]),
                        prefix.outputs[rows].to(state.origin.dtype).cpu(),
                        None if prefix.keys is None else prefix.keys[rows].to(state.origin.dtype).cpu(),
                    ),
                )
            if bool(ended.all()):
                return
            (gradient,) = torch.autograd.grad(total, leaf, torch.ones_like(total))
            if bool(ended.any()):
                going = torch.nonzero(~ended)[:, 0].to(gradient.device)
                state, gradient, counted = state.keep(going), gradient[going], counted[going]
            self._update(state, gradient, counted, step + 1)

    def _update(self, state: _State, gradient: Tensor, counted: Tensor, t: int) -> None:
        """The t-th update of the rule, then the projection onto the ball. counted (E,): the loss that stops a search."""
        step = (
            self._newton(state, gradient, counted) if self.config.rule == "newton" else self._adam(state, gradient, t)
        )
        delta = state.delta - step
        if self.config.clamp is not None:
            radius = self.config.clamp * torch.linalg.vector_norm(state.origin, dim=-1, keepdim=True)
            length = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
            delta = torch.where(length > radius, delta * (radius / length), delta)
        state.delta = delta

    def _adam(self, state: _State, gradient: Tensor, t: int) -> Tensor:
        """(E, d) Adam's t-th step (Kingma and Ba 2015, algorithm 1; its usual constants)."""
        state.mean = 0.9 * state.mean + 0.1 * gradient
        state.square = 0.999 * state.square + 0.001 * gradient.square()
        scale = (state.square / (1 - 0.999**t)).sqrt() + 1e-8
        return self.config.lr / (1 - 0.9**t) * state.mean / scale

    def _newton(self, state: _State, gradient: Tensor, counted: Tensor) -> Tensor:
        """(E, d) the step along the gradient after which log(loss), were it linear, would be that of half the threshold.

        A cross-entropy falls about exponentially once its target leads, so its logarithm is nearly linear where the loss is
        not, and Newton's steps on it neither creep nor overshoot. No step is longer than lr * |h|.
        """
        loss, slope = counted[:, None], torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).clamp(min=1e-30)
        length = loss * (2 * loss / self.config.stop).log() / slope
        longest = self.config.lr * torch.linalg.vector_norm(state.origin, dim=-1, keepdim=True)
        return gradient / slope * torch.minimum(length, longest)


def _check(parts: Anatomy, layer: int, jobs: Sequence[ValueJob], terms: Sequence[Term]) -> tuple[str, Position] | None:
    """The essence row that the terms want, if any."""
    names = [term.name for term in terms]
    if not jobs or not any(term.counts for term in terms) or len(set(names)) < len(names):
        raise ConfigError(
            f"expected at least one job, and terms of different names of which one counts, found {len(jobs)} jobs and {names}."
        )
    for term in terms:
        term.check(len(jobs))
        for site in term.layers:
            parts.site(site)
            if isinstance(site, int) and site % parts.n_layers < layer:
                raise ConfigError(
                    f"expected layers from the edited one ({layer}) on in the term {term.name!r}, found {site}: "
                    f"what is below does not move."
                )
    wanted = {term.essence for term in terms if term.essence is not None}
    if len(wanted) > 1:
        raise ConfigError(f"expected one essence template among the terms, found {sorted(map(str, wanted))}.")
    return next(iter(wanted), None)


def _collect(found: Sequence[_Found], reused: bool) -> ValueResult:
    return ValueResult(
        delta=torch.stack([f.delta for f in found]),
        origin=torch.stack([f.origin for f in found]),
        losses={name: torch.tensor([f.losses[name] for f in found], dtype=torch.float64) for name in found[0].losses},
        curves=tuple(f.curve for f in found),
        stopped=torch.tensor([f.stopped for f in found]),
        outputs=tuple(f.outputs for f in found),
        keys=None if found[0].keys is None else tuple(f.keys for f in found if f.keys is not None),
        reused=reused,
    )


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires a gradient; each does as before afterwards."""
    live = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in live:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_(True)
