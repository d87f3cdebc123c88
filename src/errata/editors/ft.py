"""Fine-tuning: gradient descent on chosen parameters, the baseline of every editing paper.

"joint" training runs epochs over all requests in batches (Meng et al. 2022, FT and FT-L); "stream" takes them one by one, each
until the model says its object, on the weights as the earlier ones left them (Hartvigsen et al. 2023). FT-L (Zhu et al. 2020;
norm="linf") and its Frobenius form (norm="l2") keep the change small. Emits one dense part. Deltas are trained beside the
model's weights, which stay as they are. Presets: "ke-first" and "ke-all" are De Cao et al.'s baselines, until the prediction
flips; "zhu-..." the same within a norm; models' names FT, and with "-l" FT-L, as Meng et al. had them ("gpt-j-6b-block" for FT-W,
whose weight decay was never active). MEND's own fine-tuning (RMSprop at 5e-6 on what MEND edits, gradients clipped, a KL term on
other prompts if wanted) has no preset: there is neither clipping nor such a term here.

Differs from the published code by default (the presets restore it): the target is teacher forced, not scored at one position;
parameters are chosen by path, so layer 2 is not also 20 to 27; the constraint holds whatever number eps is, of the weights as
the model runs with them, in half precision as well.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch

from errata.dense import Dense
from errata.edit import EditRequest
from errata.editor import Editor, Progress, quiet
from errata.editors._finetune import TrainConfig, Tuner, layers_of, parameters_of
from errata.editors._items import ALREADY, Item, items_of, refuse_known, with_contradictions
from errata.editors._models import rome_layer
from errata.editors._value_search import _without_gradients
from errata.errors import ConfigError
from errata.model.fingerprint import base_of
from errata.patch import Patch, check_fits


@dataclass(frozen=True)
class FTConfig(TrainConfig):
    """Settings of fine-tuning: see `TrainConfig`. layers: None for ROME's layer.

    stream: "joint" or "stream", one request after another; skip: in a stream, leave out what the model already says.
    """

    order: Literal["joint", "stream"] = "joint"
    skip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("joint", "stream"):
            raise ConfigError(f"expected order 'joint' or 'stream', found {self.order!r}")


C = TypeVar("C", bound=FTConfig)
Past = dict[str, tuple[str, Item]]
"""Edits that stand, in their order, by id: what each is about, and its item."""
_ROME: dict[str, Any] = {"objective": "prompt_last"}
_KE: dict[str, Any] = {"parameters": "weights", "optimizer": "rmsprop", "lr": 1e-5, "steps": 100, "until": "says"}
_GRACE: dict[str, Any] = {"order": "stream", "lr": 1e-2, "steps": 100, "until": "says"}


def _limited(layer: int, eps: float) -> dict[str, Any]:
    return {**_ROME, "layers": (layer,), "norm": "linf", "eps": eps}


class FineTuner(Editor[C]):
    """What FT and its kin share: a pass over the requests, and what a subclass does before and after each."""

    joint = True
    supports = ("decoder", "encoder-decoder", "classifier")
    place = "global optimisation"
    how = "optimised"
    streams = True

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
        onto: Patch | None = None,
    ) -> Patch:
        """Fine-tune on the requests. onto: a patch of these parameters to go on from; the result holds its edits too.

        Raises RequestError, SubjectNotFoundError, AnatomyError for a layer or parameter that is not there, ConfigError if
        `onto` is of other parameters, BaseMismatchError if it is of another model.
        """
        self.check(requests, model, tokenizer)
        layers = layers_of(model, self.config.layers, rome_layer(model))
        names = parameters_of(model, layers, self.config.parameters)
        before = onto or Patch(self.method, asdict(self.config), (), base_of(model, tokenizer, names), ())
        refuse_known(before, requests)
        start = _start(before, names, model, tokenizer)
        past, made = Past(), 0
        seen = items_of(tokenizer, before.requests, self.config.ending)
        for request, item in zip(before.requests, seen, strict=True):
            past = _uncontradicted(past, request)
            if before.report.get(request.id, {}).get("outcome") != ALREADY:
                past[request.id], made = (request.key, item), made + 1
        items = items_of(tokenizer, requests, self.config.ending)
        report: dict[str, dict[str, Any]] = {}
        with quiet(model), _without_gradients(model):
            tuner = Tuner(model, names, self.config, start)
            if self.config.order == "joint":
                last = {
                    r.key: r.target_new for r in requests
                }  # of requests that contradict each other the later one wins
                asked = [item for r, item in zip(requests, items, strict=True) if r.target_new == last[r.key]]
                report |= dict.fromkeys((r.id for r in requests), tuner.train(asked))
                if progress is not None:
                    for i in range(len(items)):
                        progress(i + 1, len(items))
            else:
                for i, (request, item) in enumerate(zip(requests, items, strict=True)):
                    past = _uncontradicted(past, request)
                    if self.config.skip and tuner.says([item])[0]:
                        report[request.id] = {"outcome": ALREADY}
                    else:
                        made += 1
                        report[request.id] = self.edit(tuner, item, [own for _, own in past.values()], made)
                        past[request.id] = request.key, item
                    if progress is not None:
                        progress(i + 1, len(items))
            said = tuner.says(items)
        about = {"layers": layers, "size": round(tuner.size(), 6)} | ({"eps": tuner.eps} if tuner.eps else {})
        report = {r.id: about | report[r.id] | {"converged": right} for r, right in zip(requests, said, strict=True)}
        everything = before.requests + tuple(requests)
        report = with_contradictions(before.report | report, everything)
        part = Dense(tuple(r.id for r in everything), tuner.done())
        return Patch(self.method, asdict(self.config), everything, before.base, (part,), report)

    def edit(self, tuner: Tuner, item: Item, past: Sequence[Item], number: int) -> dict[str, Any]:
        """One request of a stream: what a subclass changes. past: earlier edits that no later request contradicts; number: of
        this edit among all, from 1. Returns notes for the report."""
        return tuner.train([item])


class FT(FineTuner[FTConfig]):
    """Fine-tuning, with or without a norm constraint."""

    method = "ft"
    summary = "fine-tuning of chosen weights, FT-L with a norm constraint (Zhu et al. 2020; Meng et al. 2022)"
    Config = FTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": {**_ROME, "layers": (1,)},
        "gpt2-xl-attention": {**_limited(33, 1e-3), "parameters": "attn.c_attn", "lr": 1e-3},
        "gpt-j-6b": {**_ROME, "layers": (21,)},
        "llama-2-7b": {**_ROME, "layers": (21,)},
        "llama-3-8b": {**_ROME, "layers": (21,)},
        "gpt2-medium-l": _limited(0, 2e-3),
        "gpt2-large-l": _limited(0, 1e-3),
        "gpt2-xl-l": _limited(0, 5e-4),
        "gpt-j-6b-l": _limited(0, 5e-5),
        "gpt-j-6b-block": {**_ROME, "layers": (21,), "parameters": "block"},
        "ke-first": {**_KE, "layers": "first"},
        "ke-all": {**_KE, "layers": "all"},
        "zhu-first": {**_KE, "layers": "first", "norm": "linf"},
        "zhu-all": {**_KE, "layers": "all", "norm": "linf"},
        "zhu-first-l2": {**_KE, "layers": "first", "norm": "l2"},
        "zhu-all-l2": {**_KE, "layers": "all", "norm": "l2"},
        "atlas": {"layers": (0,)},
        "atlas-l": {"layers": (0,), "norm": "linf", "eps": 4e-3},
        "grace": _GRACE,
        "atlas-grace": {**_GRACE, "lr": 3e-4},
        "atlas-llama-grace": {**_GRACE, "lr": 1e-3},
        "atlas-t5-grace": {**_GRACE, "lr": 1e-4},
        "atlas-docket-grace": {**_GRACE, "lr": 1e-3},
    }


def _uncontradicted(past: Past, request: EditRequest) -> Past:
    """The edits that stand behind a request: without those that are about the same and ask for another object."""
    about = request.key
    return {i: (key, item) for i, (key, item) in past.items() if key != about or item.name == request.target_new}


def _start(patch: Patch, names: Sequence[str], model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """The deltas of a patch to go on from. Raises ConfigError or BaseMismatchError if these parameters cannot."""
    check_fits([patch], model, tokenizer)
    found: dict[str, torch.Tensor] = {}
    for part in patch.parts:
        if not isinstance(part, Dense) or set(part.deltas) != set(names):
            raise ConfigError(
                f"expected a dense patch of {', '.join(names)} to go on from, found one of other parameters; fit with the patch's own "
                "configuration, or without it"
            )
        for name, delta in part.deltas.items():
            found[name] = delta if name not in found else found[name] + delta
    return found
