"""ROME: a fact is one key-value pair of one MLP, written by a rank-one update (Meng et al. 2022).

The key is the input of an MLP's output projection at the subject's last token; the value, found by gradient descent, makes
the model say the new object (Eq. 4); the update is the smallest change of the weight with (W + D) k = v (Eq. 2). Emits one
low-rank part, a column for each edit. All edits are searched as one batch on the unedited model and are independent of each
other, so any of them may be taken alone; the published code applies several one after another, each search seeing the last.

Differs from the published code by default (preset "published" restores it): the mean key over contexts stands on both sides
of the constraint; contexts are fixed sentences; the essence KL is read after "subject is a"; the norm penalty is
(|delta| / |h|)^2, small, and does not hold up the early stop; steps and ball are wider (chosen on Atlas's dev facts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.edit import EditRequest
from errata.editor import Progress, quiet
from errata.editors._items import later_wins
from errata.editors._models import rome_layer, rome_presets
from errata.editors._value_search import ValueJob, ValueResult, search_values
from errata.editors._weights import (
    WeightConfig,
    WeightEditor,
    check_jobs,
    context_types,
    entry,
    layer_index,
    origin_of,
    parameters_of,
    part,
    says_target,
    solver_of,
    statistics_of,
)
from errata.errors import ConfigError, UnstableWriteError
from errata.maths.least_squares import Factors, Solver, rank_one
from errata.model.fingerprint import base_of
from errata.patch import Patch


@dataclass(frozen=True)
class ROMEConfig(WeightConfig):
    """Settings of ROME.

    layer: the edited one, negative from the end; None for the one that `_models` names. key_mode: whose keys the update is made of:
    "mean" over contexts throughout (r-ROME), "prompt" the bare prompt's throughout (p-ROME), "mixed" the mean in
    C^-1 k and the prompt's in the constraint (published); min_cosine: of the two below which "mixed" is refused.
    """

    layer: int | None = None
    key_mode: Literal["mean", "prompt", "mixed"] = "mean"
    min_cosine: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_mode not in ("mean", "prompt", "mixed"):
            raise ConfigError(f"expected key_mode 'mean', 'prompt' or 'mixed', found {self.key_mode!r}")


class ROME(WeightEditor[ROMEConfig]):
    """Rank-one model editing."""

    method = "rome"
    summary = "rank-one update of one MLP at the subject's last token (Meng et al. 2022)"
    batch = 64
    Config = ROMEConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = rome_presets()

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Fit all requests as one batch, each on the model without any patch. Of two requests that contradict each other the
        later is kept, and both are reported.

        Raises RequestError, SubjectNotFoundError, AnatomyError for a layer out of range, StatisticsError, and
        UnstableWriteError naming the edit whose keys point apart.
        """
        self.check(requests, model, tokenizer)
        [layer] = self.layers(model)
        with quiet(model):
            statistics = statistics_of(self.config, model, tokenizer, [layer])
            solver = solver_of(statistics[layer], self.config.jitter)
            [contexts] = context_types(self.config, model, tokenizer, seed, like="rome")
            jobs = [self.job(request, contexts) for request in requests]
            check_jobs(model, tokenizer, jobs)
            terms = self.terms(model, tokenizer, requests, layer)
            found = search_values(model, tokenizer, jobs, self.config.search(layer), terms, progress)
            pairs = [self._write(solver, found, i, job) for i, job in enumerate(jobs)]
            said = says_target(model, tokenizer, jobs, pairs, layer)
        U, V = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
        about = {"layer": layer, "statistics": origin_of(statistics)}
        return later_wins(
            Patch(
                self.method,
                self.config.json(),
                tuple(requests),
                base_of(model, tokenizer, parameters_of(model, [layer])),
                (part(model, [request.id for request in requests], U, V, layer),),
                {r.id: about | entry(found, i) | {"converged": said[i]} for i, r in enumerate(requests)},
            )
        )

    def layers(self, model: Any) -> list[int]:
        """The edited layer, counted from 0."""
        return [layer_index(model, self.config.layer, rome_layer(model))]

    def _write(self, solver: Solver, found: ValueResult, i: int, job: ValueJob) -> Factors:
        """Eq. 2 for one edit: U (d, 1) and V (m, 1) with (W + U V^T) k = h + delta (bias included in neither side)."""
        assert found.keys is not None, "a search at an MLP's output keeps its keys"
        keys, outputs, bare = found.keys[i], found.outputs[i], job.contexts.index("{}")
        mean, own = keys.mean(0), keys[bare]
        key_mean, key, output = {
            "mean": (mean, mean, outputs.mean(0)),
            "prompt": (own, own, outputs[bare]),
            "mixed": (mean, own, outputs[bare]),
        }[self.config.key_mode]
        residual: Tensor = found.value[i] - output
        try:
            return rank_one(solver, key_mean, key, residual, min_cosine=self.config.min_cosine)
        except UnstableWriteError as error:
            raise UnstableWriteError(f"{error} The edit is {job.text!r} -> {job.target!r}.") from None
