"""MEMIT: many facts at once, spread over the MLPs of several layers (Meng et al. 2023).

For each edit a state z of the last of these layers at the subject's last token is found by gradient descent, with which the
model says the new object (Eq. 16). Then, layer by layer from below, keys and what is still missing of z are measured on the model
with the lower layers' updates in place, and a share of it is written by regularised least squares (Eq. 14, 20). Emits one
low-rank part for each layer, a column for each edit. A batch sees the batches before it; an edit that is taken out of a patch
takes its columns with it, and the others are not solved again.

Differs from the published code by default (preset "published" restores it): lambda is scaled to the width of the keys;
keys are averaged over all contexts alike; contexts and the value search are as in ROME's file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.edit import EditRequest, conflicts
from errata.editor import Progress, quiet
from errata.editors._contexts import type_weights
from errata.editors._models import memit_layers, memit_presets
from errata.editors._value_search import ValueJob, ValueResult, search_values
from errata.editors._weights import (
    Statistics,
    WeightConfig,
    WeightEditor,
    adding,
    check_jobs,
    context_types,
    entry,
    layer_index,
    origin_of,
    parameters_of,
    part,
    read_at_subject,
    says_target,
    solver_of,
    statistics_of,
    subject_rows,
)
from errata.errors import ConfigError, RequestError
from errata.maths.least_squares import Factors, Solver, memit_write
from errata.model.fingerprint import base_of
from errata.model.statistics import KeyStatistics
from errata.patch import Patch


@dataclass(frozen=True)
class MEMITConfig(WeightConfig):
    """Settings of MEMIT.

    layers: the edited ones, ascending; None for those that `_models` names. lam: the paper's
    lambda, the weight of C beside the edits' keys; None for m / s0, with which a key as long as the average one (k^T C^-1 k = m,
    the width of keys) keeps s0 / (1 + s0) of its residual. key_average: over contexts, "uniform", or "by type" (published: the
    bare prompt counts as much as all prefixes). spread: what is missing is "measured" again at each layer, or a "fixed" share
    of what was missing at first is written to each. batch_size: edits written together; None for all.
    """

    layers: tuple[int, ...] | None = None
    lam: float | None = None
    s0: float = 1.0
    key_average: Literal["uniform", "by type"] = "uniform"
    spread: Literal["measured", "fixed"] = "measured"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ConfigError(f"expected layers, each once, found {self.layers!r}")
        if any(not (math.isfinite(x) and x > 0) for x in (self.s0, self.lam if self.lam is not None else 1.0)):
            raise ConfigError(f"expected lam and s0 above 0, found lam={self.lam} and s0={self.s0}")
        if self.key_average not in ("uniform", "by type") or self.spread not in ("measured", "fixed"):
            raise ConfigError(
                f"expected key_average 'uniform' or 'by type' and spread 'measured' or 'fixed', found {self.key_average!r} "
                f"and {self.spread!r}"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"expected a batch_size of at least 1, found {self.batch_size}")


@dataclass
class Pairs:
    """What a batch writes: a job for each pair, and the id of the edit that it belongs to; notes for the report by edit."""

    jobs: list[ValueJob]
    edits: list[str]
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


class MEMIT(WeightEditor[MEMITConfig]):
    """Mass-editing memory in a transformer."""

    method = "memit"
    summary = "many edits at once, spread over the MLPs of several layers (Meng et al. 2023)"
    joint = True
    Config = MEMITConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = memit_presets()

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Fit all requests together, or batch after batch. progress counts requests whose values are found.

        Raises RequestError, also for two requests of one batch that give one fact different objects; SubjectNotFoundError,
        AnatomyError for a layer out of range, StatisticsError.
        """
        self.check(requests, model, tokenizer)
        size = self.config.batch_size or len(requests)
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        for batch in batches:
            refuse_contradictions(batch)
        layers = self.layers(model)
        edits: list[str] = []
        report: dict[str, dict[str, Any]] = {}
        with quiet(model):
            statistics = statistics_of(self.config, model, tokenizer, layers)
            solvers = {layer: solver_of(one, self.config.jitter) for layer, one in statistics.items()}
            write = _Write(self, model, tokenizer, statistics, solvers, seed)
            for number, batch in enumerate(batches):
                pairs = self.pairs(model, tokenizer, batch, write.contexts)
                report |= write(batch, pairs, _shifted(progress, number * size, len(batch), len(requests)))
                edits += pairs.edits
        about = {"layers": list(layers), "statistics": origin_of(statistics)}
        return Patch(
            self.method,
            self.config.json(),
            tuple(requests),
            base_of(model, tokenizer, parameters_of(model, layers)),
            tuple(part(model, edits, *write.done[layer], layer) for layer in layers),
            {r.id: about | report[r.id] for r in requests},
        )

    def layers(self, model: Any) -> list[int]:
        """The edited layers, counted from 0, ascending."""
        if self.config.layers is not None:
            return sorted({layer_index(model, layer) for layer in self.config.layers})
        return list(memit_layers(model))

    def pairs(self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], contexts: Sequence[str]) -> Pairs:
        """What is written for a batch: one pair per request."""
        return Pairs([self.job(request, contexts) for request in requests], [request.id for request in requests])

    def solve(self, statistics: KeyStatistics | None, solver: Solver, K: Tensor, R: Tensor) -> Factors:
        """The write of one layer, U V^T for keys K (m, B) and residuals R (d, B) (Eq. 14)."""
        if statistics is None and self.config.lam is None:
            raise ConfigError(
                "expected lam with statistics=None, found none: without C there is nothing to scale it to"
            )
        C = torch.eye(len(K), dtype=torch.float64) if statistics is None else statistics.matrix
        lam = self.config.lam if self.config.lam is not None else len(K) / self.config.s0
        return memit_write(C, K, R, lam, solver=solver)


class _Write:
    """The writes of all batches so far: `done`, factors by layer; called for each batch in turn, inside `quiet`."""

    def __init__(
        self, editor: MEMIT, model: Any, tokenizer: Any, statistics: Statistics, solvers: dict[int, Solver], seed: int
    ):
        self.editor, self.model, self.tokenizer = editor, model, tokenizer
        self.statistics, self.solvers, self.layers = statistics, solvers, sorted(statistics)
        types = context_types(editor.config, model, tokenizer, seed, like="memit")
        self.contexts = tuple(context for own in types for context in own)
        by_type = editor.config.key_average == "by type"
        self.weights = type_weights(types if by_type else [self.contexts])
        self.done: dict[int, Factors] = {}

    def __call__(
        self, requests: Sequence[EditRequest], pairs: Pairs, progress: Progress | None
    ) -> dict[str, dict[str, Any]]:
        """Write a batch, and report it by edit."""
        check_jobs(self.model, self.tokenizer, pairs.jobs)
        with adding(self.model, self.done):
            found = self._search(requests, pairs.jobs, progress)
        missing = self._spread(pairs.jobs, [f.value[i] for f, i in found])
        with adding(self.model, self.done):
            said = says_target(self.model, self.tokenizer, pairs.jobs)
        report: dict[str, dict[str, Any]] = {}
        for i, (edit, (values, at)) in enumerate(zip(pairs.edits, found, strict=True)):
            if edit not in report:  # its first pair is the edit's own prompt
                own = {"missing": round(float(missing[i]), 4), "converged": said[i]}
                report[edit] = entry(values, at) | own | pairs.notes.get(edit, {})
        return report

    def _search(
        self, requests: Sequence[EditRequest], jobs: Sequence[ValueJob], progress: Progress | None
    ) -> list[tuple[ValueResult, int]]:
        """For each job, a result and its index there: z at the last layer. Jobs without a subject have no essence to keep."""
        top = self.layers[-1]
        terms = self.editor.terms(self.model, self.tokenizer, requests, top)
        found: dict[int, tuple[ValueResult, int]] = {}
        for about in (True, False):
            chosen = [i for i, job in enumerate(jobs) if (job.subject is not None) is about]
            if not chosen:
                continue
            own = [term for term in terms if about or term.essence is None]
            start = len(found)
            values = search_values(
                self.model, self.tokenizer, [jobs[i] for i in chosen], self.editor.config.search(top, "block"), own,
                _counted(progress, start, len(jobs)),
            )  # fmt: skip
            found |= {i: (values, at) for at, i in enumerate(chosen)}
        return [found[i] for i in range(len(jobs))]

    def _spread(self, jobs: Sequence[ValueJob], z: Sequence[Tensor]) -> Tensor:
        """Write what is missing of z (B of (d,)) layer by layer onto `done`; (B,) the share of it that still is, at the end."""
        rows = subject_rows(self.tokenizer, jobs)
        flat, Z = [row for own in rows for row in own], torch.stack(list(z), 1)
        with adding(self.model, self.done):
            first = Z - self._states(rows)
        residual, new = first, dict[int, Factors]()
        for j, layer in enumerate(self.layers):
            with adding(self.model, self.done | new):
                keys = read_at_subject(self.model, flat, layer, "key").reshape(len(jobs), len(self.contexts), -1)
                if j and self.editor.config.spread == "measured":
                    residual = Z - self._states(rows)
            K = (keys.double() * self.weights[:, None]).sum(1).T
            shares = len(self.layers) - (j if self.editor.config.spread == "measured" else 0)
            U, V = self.editor.solve(self.statistics[layer], self.solvers[layer], K, residual.double() / shares)
            before = self.done.get(layer)
            new[layer] = (U, V) if before is None else (torch.cat([before[0], U], 1), torch.cat([before[1], V], 1))
        self.done = self.done | new
        with adding(self.model, self.done):
            left = Z - self._states(rows)
        return left.norm(dim=0) / first.norm(dim=0).clamp(min=torch.finfo(first.dtype).tiny)

    def _states(self, rows: Sequence[Sequence[Any]]) -> Tensor:
        """(d, B) the last layer's output at the subjects of the bare prompts."""
        bare = [next(row for row in own if row.bare) for own in rows]
        return read_at_subject(self.model, bare, self.layers[-1], "block").T


def refuse_contradictions(requests: Sequence[EditRequest]) -> None:
    """Raise RequestError if two requests give one subject and relation different objects."""
    for first, second in conflicts(requests):
        if first.target_new.casefold() != second.target_new.casefold():
            raise RequestError(
                f"two requests of one batch contradict each other: {first.text!r} -> {first.target_new!r} ({first.id}) and "
                f"{second.text!r} -> {second.target_new!r} ({second.id}) are about the same subject and relation; keep one"
            )


def _counted(progress: Progress | None, start: int, total: int) -> Progress | None:
    """Progress of a part of `total` jobs, behind `start` others."""
    return progress and (lambda done, _: progress(start + done, total))


def _shifted(progress: Progress | None, start: int, of: int, total: int) -> Progress | None:
    """Progress in requests, from that in the jobs of a batch of `of` requests that begins at `start`."""

    def shifted(done: int, jobs: int) -> None:
        if progress is not None and (now := done * of // jobs) > (done - 1) * of // jobs:
            progress(start + now, total)

    return shifted
