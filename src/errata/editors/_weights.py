"""What the editors of weights share: jobs for the value search, statistics of layers, keys read while updates act, reports."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from errata.edit import EditRequest
from errata.editor import Editor
from errata.editors._contexts import BARE, FIXED, memit_contexts, rome_contexts
from errata.editors._value_rows import Position, Row, rows_of
from errata.editors._value_search import (
    NLL,
    EssenceKL,
    NormPenalty,
    Rule,
    Term,
    ValueJob,
    ValueResult,
    ValueSearchConfig,
)
from errata.errors import ConfigError, StatisticsError
from errata.low_rank import LowRank
from errata.maths.least_squares import Solver
from errata.model.anatomy import anatomy
from errata.model.attached import unmerged
from errata.model.corpora import named_texts, own_texts
from errata.model.hooks import Capture, ForwardHook, Hooks, first_tensor, with_first_tensor
from errata.model.room import check_room
from errata.model.states import input_device
from errata.model.statistics import KeyStatistics, found_files, found_statistics, key_statistics, load_statistics
from errata.model.tokens import pad, token_ids

TEXTS = 100_000  # of a corpus that is named, as published
KEPT_WIDTH = 4096  # of the widest keys whose factors are kept: 128 MiB each
Statistics = Mapping[int, KeyStatistics | None]


@dataclass(frozen=True)
class WeightConfig:
    """Settings that the editors of weights have in common; which layers they write is their own.

    contexts: what stands before the prompt while keys and values are read: "generated" by the model as published, "fixed"
    sentences, "bare" (none), or templates with one `{}` each, "{}" itself among them. statistics: C = E[k k^T] of each
    layer: "auto" (Atlas's own corpus for Atlas, else what `errata statistics` has gathered on this model), text files, the name
    of a data set (NAME, NAME:CONFIG or NAME:CONFIG:SPLIT), files of gathered statistics, a mapping from layer to
    `KeyStatistics`, or None for C = I; jitter: see `CholeskySolver`.
    steps, lr, clamp, stop, rule: see `ValueSearchConfig`. kl, kl_position, norm, norm_form: weights and forms of the terms (see
    `EssenceKL`, `NormPenalty`), 0 leaves a term out; norm_counts: whether the norm is part of the loss that stops a search.
    ending: text that the model is to say behind the new object, "." for one that would otherwise run on ("5" to "52").
    reuse, batch_tokens: how the search runs, not what it finds.
    """

    contexts: str | tuple[str, ...] = "fixed"
    statistics: Any = "auto"
    jitter: float | None = None
    steps: int = 20
    lr: float = 1.0
    clamp: float | None = 10.0
    stop: float = 0.05
    kl: float = 0.0625
    kl_position: Position = "prompt_last"
    norm: float = 0.01
    norm_form: Literal["ratio", "published", "plain"] = "ratio"
    norm_counts: bool = False
    ending: str = ""
    reuse: bool = True
    batch_tokens: int | None = None
    rule: Rule = "adam"

    def __post_init__(self) -> None:
        if isinstance(self.contexts, str) and self.contexts not in ("generated", "fixed", "bare"):
            raise ConfigError(
                f"expected contexts 'generated', 'fixed', 'bare' or a tuple of templates, found {self.contexts!r}"
            )
        if self.kl < 0 or self.norm < 0:
            raise ConfigError(f"expected weights of at least 0, found kl={self.kl} and norm={self.norm}")
        self.search(0)  # what the search refuses is refused here

    def search(self, layer: int, where: Literal["mlp", "block"] = "mlp") -> ValueSearchConfig:
        """The value search at a layer."""
        return ValueSearchConfig(
            layer, where, self.steps, self.lr, self.clamp, self.stop, self.reuse, self.batch_tokens, rule=self.rule
        )

    def json(self) -> dict[str, Any]:
        """The settings as JSON values; statistics that were handed over as objects by what they are of."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(given := self.statistics, Mapping):
            values["statistics"] = {str(layer): one.identity for layer, one in given.items()}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


C = TypeVar("C", bound=WeightConfig)


class WeightEditor(Editor[C]):
    """An editor that finds values by the search and writes them into MLP output projections in closed form."""

    needs_subject = True
    place = "local modification"
    how = "optimised"

    @abstractmethod
    def layers(self, model: Any) -> list[int]:
        """The edited layers, counted from 0, ascending."""

    def reads(self, model: Any) -> dict[str, Any]:
        """Which key statistics "auto" finds."""
        return {"statistics": statistics_found(self.config, model, self.layers(model))}

    def job(self, request: EditRequest, contexts: Sequence[str]) -> ValueJob:
        """What the value search has the model say for a request."""
        return ValueJob(request.prompt, request.target_new + self.config.ending, request.subject, tuple(contexts))

    def terms(self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], layer: int) -> tuple[Term, ...]:
        """The objective of the value search at a layer (counted from 0), one job per request: what a new method overrides."""
        config = self.config
        found: list[Term] = [NLL()]
        if config.kl:
            found.append(EssenceKL(config.kl, config.kl_position))
        if config.norm:
            found.append(NormPenalty(config.norm, config.norm_form, counts=config.norm_counts))
        return tuple(found)


# -- contexts and rows -----------------------------------------------------------------------------------------------------


def context_types(
    config: WeightConfig, model: Any, tokenizer: Any, seed: int, like: Literal["rome", "memit"]
) -> tuple[tuple[str, ...], ...]:
    """The contexts by type: ROME's are of one type, MEMIT's of two (the bare prompt; prefixes)."""
    if config.contexts == "generated" and like == "memit":
        return memit_contexts(model, tokenizer, seed)
    if config.contexts == "generated":
        return (rome_contexts(model, tokenizer, seed),)
    named = {"fixed": FIXED if like == "rome" else FIXED[:6], "bare": (BARE,)}
    given = named[config.contexts] if isinstance(config.contexts, str) else tuple(config.contexts)
    prefixes = tuple(context for context in given if context != BARE)
    return ((BARE,), prefixes) if like == "memit" and prefixes else (given,)


def check_jobs(model: Any, tokenizer: Any, jobs: Sequence[ValueJob]) -> None:
    """Raise RequestError if a job's prompt with its longest context leaves no room for its target."""
    texts = [max(job.contexts, key=len).replace(BARE, f"{job.text} {job.target}") for job in jobs]
    check_room(model, token_ids(tokenizer, texts), texts)


def subject_rows(tokenizer: Any, jobs: Sequence[ValueJob]) -> list[list[Row]]:
    """The rows of each job, one per context, cut behind the edited token: what comes later changes nothing there."""
    return [
        [Row(r.edit, r.ids[: r.at + 1], r.at, (r.at,), bare=r.bare) for r in own] for own in rows_of(tokenizer, jobs)
    ]


def read_at_subject(
    model: Any, rows: Sequence[Row], layer: int, of: Literal["key", "block"], batch_tokens: int = 4096
) -> Tensor:
    """(n, m) keys of the layer's MLP output projection, or (n, d) outputs of its block, at the rows' last tokens.

    On the CPU, float32 (float64 for a float64 model); the pass ends with the layer.
    """
    parts = anatomy(model)
    path = parts.mlp_site(layer) if of == "key" else parts.site(layer)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    while order:
        chunk = order[: max(1, batch_tokens // len(rows[order[0]].ids))]
        while len(chunk) > 1 and len(chunk) * len(rows[chunk[-1]].ids) > batch_tokens:
            chunk.pop()
        order = order[len(chunk) :]
        batch = pad([rows[i].ids for i in chunk], 0, input_device(model))
        with Capture(model, [path], of="input" if of == "key" else "output") as seen, _ending(model, parts.site(layer)):
            model(**batch.inputs(model), use_cache=False)
        states = seen[path].reshape(len(chunk), batch.ids.shape[1], -1)
        at = torch.tensor([rows[i].at for i in chunk], device=states.device)
        picked = states[torch.arange(len(chunk), device=states.device), at]
        for i, state in zip(chunk, picked.to(torch.promote_types(picked.dtype, torch.float32)).cpu(), strict=True):
            found[i] = state
    return torch.stack(found)


def says_target(
    model: Any, tokenizer: Any, jobs: Sequence[ValueJob], updates: Sequence[tuple[Tensor, Tensor]] = (), layer: int = 0
) -> list[bool]:
    """Whether greedy decoding of each bare prompt says the whole target.

    updates: for each job alone (U (d, 1), V (m, 1)) at `layer`; none if all act already.
    """
    rows = [own[0] for own in rows_of(tokenizer, [ValueJob(j.prompt, j.target, j.subject) for j in jobs])]
    found = []
    for start in range(0, len(rows), 64):
        chunk = rows[start : start + 64]
        batch = pad([row.ids for row in chunk], 0, input_device(model))
        own = updates[start : start + 64]
        each = {layer: (torch.stack([U for U, _ in own]), torch.stack([V for _, V in own]))} if own else {}
        with adding(model, each):
            best = model(**batch.inputs(model), use_cache=False).logits.argmax(-1).cpu()
        found += [best[i, list(row.reads)].tolist() == list(row.targets) for i, row in enumerate(chunk)]
    return found


class _Stop(Exception):
    """Everything asked for has been computed."""


@contextmanager
def _ending(model: nn.Module, path: str) -> Iterator[None]:
    """Inside, a forward pass ends with the module at `path`, and so does the block."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        raise _Stop

    with Hooks(model, forward=[(path, stop)]):
        try:
            yield
        except _Stop:
            return


# -- updates that act while others are fitted ------------------------------------------------------------------------------


@contextmanager
def adding(model: Any, updates: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, U V^T acts on top of the MLP output projection of each layer, also where attached patches do not (`quiet`).

    {layer: (U (d, r), V (m, r))}, or (U (n, d, r), V (n, m, r)) with a pair for each of a batch's n rows.
    """
    parts = anatomy(model)
    with Hooks(model, forward=[(parts.mlp_site(layer), _adder(U, V)) for layer, (U, V) in updates.items()]):
        yield


def _adder(U: Tensor, V: Tensor) -> ForwardHook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
        wide = torch.promote_types(y.dtype, torch.float32)
        keys, total = x.to(wide), y.to(wide)
        if U.dim() == 3:  # OPT's MLP runs on (n * T, d)
            keys, total = (t.reshape(len(U), -1, t.shape[-1]) for t in (keys, total))
        added = (keys @ V.to(y.device, wide)) @ U.to(y.device, wide).mT
        return with_first_tensor(output, (total + added).reshape(y.shape).to(y.dtype))

    return hook


# -- statistics ------------------------------------------------------------------------------------------------------------


class Identity:
    """Solves with C = I."""

    def solve(self, rhs: Tensor) -> Tensor:
        """rhs, in float64."""
        return rhs.double()


def statistics_of(config: WeightConfig, model: Any, tokenizer: Any, layers: Sequence[int]) -> Statistics:
    """{layer: its key statistics} as the configuration names them, None for C = I; layers counted from 0.

    They are the model's without what is merged into its weights: C is not gathered anew after an edit (Meng et al. 2022).
    Raises StatisticsError for statistics of another model or layer, or where there are none; ConfigError.
    """
    with unmerged(model):
        return _statistics_of(config.statistics, model, tokenizer, layers)


def statistics_found(config: WeightConfig, model: Any, layers: Sequence[int]) -> Any:
    """What "auto" stands for on this model: its corpus by name and digest, or a file for each layer, None where there is none.

    None for statistics that the configuration names.
    """
    if config.statistics not in ("auto", ("auto",), ["auto"]):
        return None
    if texts := own_texts(model):
        return {"corpus": texts.name, "revision": texts.revision}
    with unmerged(model):
        files = found_files(model, layers)
    return {str(layer): path and path.name for layer, path in files.items()}


def _statistics_of(source: Any, model: Any, tokenizer: Any, layers: Sequence[int]) -> Statistics:
    if source is None:
        return dict.fromkeys(layers)
    if isinstance(source, Mapping):
        if missing := [layer for layer in layers if layer not in source]:
            raise StatisticsError(
                f"expected key statistics of layer {missing[0]}, found those of {', '.join(map(str, source)) or 'none'}; "
                "gather them with `errata statistics` or `key_statistics`."
            )
        for layer in layers:
            source[layer].check(model, layer)
        return {layer: source[layer] for layer in layers}
    names = [source] if isinstance(source, str) else list(source)
    if names == ["auto"]:
        texts = own_texts(model)
        return key_statistics(model, tokenizer, texts, layers) if texts else found_statistics(model, layers)
    if all(name.endswith(".safetensors") for name in names):
        files = dict(zip(layers, names, strict=False))
        if len(names) != len(layers):
            raise ConfigError(
                f"expected one file of statistics for each of the layers {', '.join(map(str, layers))}, in this order, found "
                f"{len(names)}"
            )
        return {layer: load_statistics(path, model, layer) for layer, path in files.items()}
    return key_statistics(model, tokenizer, named_texts(names), layers, n_texts=TEXTS)


def solver_of(statistics: KeyStatistics | None, jitter: float | None) -> Solver:
    """Solves with C. Raises StatisticsError naming the smallest eigenvalue of a singular C."""
    if statistics is None:
        return Identity()
    try:
        if statistics.width > KEPT_WIDTH:
            return statistics.solver(jitter)
        return _factored(_Known(statistics.moment.digest, statistics), jitter)
    except StatisticsError as error:
        raise StatisticsError(f"layer {statistics.layer}: {error}") from None


@dataclass(frozen=True)
class _Known:
    """Statistics that compare by their numbers."""

    digest: str
    statistics: KeyStatistics = field(compare=False)


@lru_cache(maxsize=3)
def _factored(known: _Known, jitter: float | None) -> Solver:
    """The factors of the last few matrices: edits that are fitted one by one solve with the same C."""
    return known.statistics.solver(jitter)


# -- layers, parts and reports ---------------------------------------------------------------------------------------------


def layer_index(model: Any, layer: int | None, default: int = 0) -> int:
    """A layer counted from 0, given from either end; None is the default. Raises AnatomyError naming the valid range."""
    parts = anatomy(model)
    return parts.mlp_out.index(parts.mlp_site(default if layer is None else layer))


def part(model: Any, edits: Sequence[str], U: Tensor, V: Tensor, layer: int) -> LowRank:
    """The factors as a part of a patch: on the CPU, in float32 (float64 for a float64 model)."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    return LowRank(tuple(edits), U.detach().to("cpu", dtype), V.detach().to("cpu", dtype), layer)


def parameters_of(model: Any, layers: Sequence[int]) -> list[str]:
    """Names of the weights that are edited."""
    parts = anatomy(model)
    return [f"{parts.mlp_site(layer)}.weight" for layer in layers]


def entry(found: ValueResult, i: int) -> dict[str, Any]:
    """What a patch's report says of the value search of one job.

    losses: nats, at the last evaluation; curve: the total at each; stopped: whether the search ended below its threshold;
    shift: |delta| / |h|.
    """
    shift = torch.linalg.vector_norm(found.delta[i]) / torch.linalg.vector_norm(found.origin[i])
    return {
        "losses": {name: round(float(loss[i]), 6) for name, loss in found.losses.items()},
        "curve": [round(value, 4) for value in found.curves[i]],
        "steps": len(found.curves[i]),
        "stopped": bool(found.stopped[i]),
        "shift": round(float(shift), 4),
    }


def origin_of(statistics: Statistics) -> Any:
    """What a report says of the statistics: corpus and tokens, None for C = I."""
    known = [one for one in statistics.values() if one is not None]
    return {"corpus": known[0].identity["corpus"]["name"], "tokens": known[0].count} if known else None
