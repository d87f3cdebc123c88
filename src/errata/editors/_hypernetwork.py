"""What the hypernetwork editors (KnowledgeEditor, MEND) share: the gradient of an edit as factors, and a model run with updates.

Of a linear map W with inputs x_t and output gradients delta_t, the gradient is sum_t delta_t x_t^T; both methods turn these
factors into those of an update, so no matrix of W's size is ever formed and the way in which a weight is stored does not
matter. Many edits go through the model at once: rows of a batch come in equal groups, one edit a group.
"""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from errata.dense import Dense
from errata.edit import EditRequest
from errata.editor import Progress, quiet
from errata.editors._items import later_wins, refuse_known, with_contradictions
from errata.editors._learned import Batches, LearnedConfig, LearnedEditor, Learner
from errata.editors._value_search import _without_gradients
from errata.errors import AnatomyError, ConfigError, UnsupportedPatchError
from errata.low_rank import LowRank
from errata.low_rank_table import base_layer, sizes
from errata.merge import merge
from errata.model.anatomy import Site, anatomy, submodule
from errata.model.fingerprint import base_of
from errata.model.generate import greedy_answers
from errata.model.hooks import Hooks, first_tensor, with_first_tensor
from errata.model.states import input_device
from errata.model.targets import IGNORED, Supervised, supervised
from errata.patch import Part, Patch, check_fits
from errata.training import TrainingItem

GROUP = 16  # requests that are fitted as one batch
TINY = 1e-6  # a column's share of the largest one's size below which it is rounding
Parameters = Literal["weights", "mlp"]


@dataclass(frozen=True)
class HyperConfig(LearnedConfig):
    """Which maps are edited, and what one edit is trained against.

    layers: blocks from 0 or negative from the end ("encoder.2" in an encoder), "all", or None for the method's own.
    parameters: "weights", every linear map of a block, or "mlp", the MLP's (of T5's gated ones wi_0 and wo, as published).
    retain: prompts an edit that must stay as they are; ending: text that is to stand behind a decoder's new object.
    """

    layers: tuple[int | str, ...] | Literal["all"] | None = None
    parameters: Parameters = "weights"
    retain: int = 3
    ending: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters not in ("weights", "mlp") or self.retain < 1 or self.layers in ((), ""):
            raise ConfigError(
                f"expected parameters 'weights' or 'mlp', retain of at least 1 and layers None, 'all' or indices, found {self}"
            )


# -- the maps that are edited --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearMap:
    """One linear map of the model: where it is, its sizes, and whether it has a bias."""

    path: str
    layer: Site
    site: str
    d_out: int
    d_in: int
    biased: bool


def linear_maps(model: nn.Module, layers: Sequence[Site] | str | None, which: Parameters, last: int) -> list[LinearMap]:
    """The maps that `which` selects in these blocks; None: the `last` blocks of each stack, 0 for all.

    Raises AnatomyError for a layer that is not there, and for a model without such maps, naming what is supported.
    """
    parts = anatomy(model)
    stacks = [("encoder.", parts.encoder), ("", parts)] if parts.encoder else [("", parts)]
    if layers is None or layers == "all":
        chosen: list[Site] = []
        for name, stack in stacks:
            first = 0 if layers == "all" or not last else max(0, stack.n_layers - last)
            chosen += [f"{name}{i}" if name else i for i in range(first, stack.n_layers)]
    else:
        chosen = [_counted(parts, layer) for layer in dict.fromkeys(layers)]
    found: list[LinearMap] = []
    for layer in chosen:
        block = parts.site(layer)
        for name, module in submodule(model, block).named_modules():
            size = sizes(base_layer(module))
            if size is None or any(name.startswith(f"{m.site}.") for m in found if m.layer == layer):
                continue
            if which == "weights" or f"{block}.{name}" in _mlp(parts, layer):
                biased = getattr(base_layer(module), "bias", None) is not None
                found.append(LinearMap(f"{block}.{name}", layer, name, *size, biased))
    if not found:
        raise AnatomyError(
            f"expected linear maps ({which}) in the blocks {chosen} of this {parts.family!r} model, found none; KnowledgeEditor and "
            "MEND edit the linear maps of decoders, encoder-decoders and classifiers"
        )
    return found


def _counted(parts: Any, layer: Site) -> Site:
    """The layer counted from 0. Raises AnatomyError if there is none."""
    stack, index = parts.stack_of(layer)
    at = stack.blocks.index(stack.site(index))
    return at if stack is parts else f"encoder.{at}"


def _mlp(parts: Any, layer: Site) -> set[str]:
    stack, index = parts.stack_of(layer)
    gated = bool(stack.mlp_gate)
    roles = ("mlp_gate", "mlp_out") if gated and parts.encoder else ("mlp_in", "mlp_gate", "mlp_out")
    return {paths[index] for role in roles if (paths := getattr(stack, role))}


# -- gradients as factors, updates as factors ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signal:
    """What one map says about edits: x (n, T, d_in), its inputs, delta (n, T, d_out), the gradient at its outputs, nats a unit."""

    x: Tensor
    delta: Tensor


@dataclass(frozen=True)
class Update:
    """n edits of one map: W becomes W + U V^T, U (n, d_out, r), V (n, d_in, r); its bias b + bias (n, d_out)."""

    U: Tensor
    V: Tensor
    bias: Tensor | None = None

    def __add__(self, other: "Update") -> "Update":
        biases = [b for b in (self.bias, other.bias) if b is not None]
        bias = torch.stack(biases).sum(0) if biases else None
        return Update(torch.cat([self.U, other.U], 2), torch.cat([self.V, other.V], 2), bias)

    def of(self, at: Sequence[int]) -> "Update":
        """The updates of some of the edits."""
        rows = list(at)
        return Update(self.U[rows], self.V[rows], None if self.bias is None else self.bias[rows])

    @classmethod
    def stacked(cls, single: Sequence["Update"]) -> "Update":
        """Updates of one edit each as one of many; columns of zeros fill up lower ranks."""
        rank = max(u.U.shape[2] for u in single)
        U, V = (
            torch.cat([F.pad(t, (0, rank - t.shape[2])) for t in side])
            for side in zip(*((u.U, u.V) for u in single), strict=True)
        )
        biases = [u.bias for u in single if u.bias is not None]
        return cls(U, V, torch.cat(biases) if biases else None)

    def squared(self) -> Tensor:
        """(n,) squared Frobenius norms of U V^T, without forming it; differentiable."""
        return ((self.U.mT @ self.U) * (self.V.mT @ self.V)).sum((1, 2))


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def logits_of(model: Any, asked: Supervised, rows: Sequence[int] | None = None) -> Tensor:
    """Logits of all rows, or of some of them in the same padding."""
    inputs = asked.inputs if rows is None else {name: t[list(rows)] for name, t in asked.inputs.items()}
    cached = {} if asked.labels.ndim == 1 else {"use_cache": False}
    found: Tensor = model(**inputs, **cached).logits
    return found


def signals(model: Any, maps: Sequence[LinearMap], asked: Supervised) -> tuple[list[Signal], Tensor]:
    """(one Signal a map, the logits) of each row's own negative log-likelihood; weights need no gradient and get none.

    All signals are where the model takes its token ids, also when layers are spread over several devices.
    """
    device = input_device(model)
    n, xs, zeros = len(asked.labels), dict[str, Tensor](), dict[str, Tensor]()

    def probe(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            y = first_tensor(output)
            xs[path] = first_tensor((*args, *kwargs.values())).detach()
            zeros[path] = torch.zeros_like(y).requires_grad_()
            return with_first_tensor(output, y + zeros[path])

        return hook

    with torch.enable_grad(), Hooks(model, forward=[(m.path, probe(m.path)) for m in maps]):
        logits = logits_of(model, asked)
        found = torch.autograd.grad(asked.nll(logits).sum(), [zeros[m.path] for m in maps])
    rows = [(wide(xs[m.path]).to(device), wide(g).to(device)) for m, g in zip(maps, found, strict=True)]
    return [Signal(x.reshape(n, -1, x.shape[-1]), g.reshape(n, -1, g.shape[-1])) for x, g in rows], logits.detach()


def edited(model: Any, maps: Sequence[LinearMap], updates: Sequence[Update]) -> Hooks:
    """Context manager in which the rows of every batch, in as many equal groups as there are edits, run under their own edit."""

    def run(update: Update) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
            n, total = len(update.U), wide(y)
            U, V = update.U.to(total), update.V.to(total)
            added = (x.to(total).reshape(n, -1, x.shape[-1]) @ V) @ U.mT
            if update.bias is not None:
                added = added + update.bias.to(total)[:, None]
            return with_first_tensor(output, (total + added.reshape(y.shape)).to(y.dtype))

        return hook

    return Hooks(model, forward=[(m.path, run(update)) for m, update in zip(maps, updates, strict=True)])


# -- losses ------------------------------------------------------------------------------------------------------------------


def divergence(before: Tensor, after: Tensor, where: Tensor) -> Tensor:
    """(n,) nats: KL(before || after) of each row, mean over the positions in `where` (n, T); of a classifier without T."""
    p, q = (F.log_softmax(wide(t), -1) for t in (before, after))
    kl = (p.exp() * (p - q)).sum(-1)
    return kl if kl.ndim == 1 else (kl * where).sum(1) / where.sum(1).clamp(min=1)


# -- training ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Practice:
    """What n edits are judged by, as one batch of n groups: `positives` rows that say the new object, then `retained` rows.

    before: the unedited logits of the retained rows, group by group; where: the positions at which they are compared.
    """

    asked: Supervised
    positives: int
    retained: int
    before: Tensor
    where: Tensor

    def parted(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(n, positives, ...) and (n * retained, ...) of values by row."""
        grouped = values.reshape(-1, self.positives + self.retained, *values.shape[1:])
        return grouped[:, : self.positives], grouped[:, self.positives :].flatten(0, 1)


H = TypeVar("H", bound=HyperConfig)


class HyperLearner(Learner):
    """Trains a hypernetwork: its updates of a batch of items, and the loss of what the model says under them.

    everywhere: whether retained prompts are compared at every token, and not only where their answer stands.
    """

    everywhere = False

    def __init__(
        self, config: HyperConfig, model: Any, tokenizer: Any, items: Sequence[TrainingItem],
        held_out: Sequence[TrainingItem], network: nn.Module, maps: Sequence[LinearMap], seed: int,
    ):  # fmt: skip
        self.model, self.tokenizer, self.maps, self.module = model, tokenizer, maps, network
        self.items, self.held_out, self.base_config = items, held_out, config
        self.batches = Batches(len(items), config.batch, seed)
        self._said: dict[str, str] = {}
        self._decoder = anatomy(model).role == "decoder"

    @abstractmethod
    def updates(self, items: Sequence[TrainingItem]) -> list[Update]:
        """The network's update of each map for each item; differentiable in the network's weights alone."""

    def target(self, item: TrainingItem) -> str:
        """The new object and what is to stand behind it."""
        return item.target_new + (self.base_config.ending if self._decoder else "")

    def prediction(self, prompts: Sequence[str], known: Sequence[str | None]) -> list[str]:
        """What the model says to each prompt, asked where it is not known."""
        unknown = [p for p, k in zip(prompts, known, strict=True) if k is None and p not in self._said]
        if unknown := list(dict.fromkeys(unknown)):
            self._said |= dict(zip(unknown, greedy_answers(self.model, self.tokenizer, unknown), strict=True))
        return [self._said[p] if k is None else k for p, k in zip(prompts, known, strict=True)]

    def inner(self, items: Sequence[TrainingItem]) -> list[Signal]:
        """The signals of the items' own prompts and new objects."""
        asked = supervised(self.model, self.tokenizer, [i.prompt for i in items], [self.target(i) for i in items])
        return signals(self.model, self.maps, asked)[0]

    def practice(self, items: Sequence[TrainingItem], outers: Sequence[Sequence[str]], draws: Any) -> Practice:
        """What the items' edits are judged by: the prompts of `outers`, equally many each, and retained ones that are drawn."""
        prompts, known, count = list[str](), list[str | None](), self.base_config.retain
        for item, outer in zip(items, outers, strict=True):
            others = item.locality or self._others(item, count, draws)
            kept = draws.sample(others, count) if len(others) >= count else draws.choices(others, k=count)
            prompts += [*outer, *(prompt for prompt, _ in kept)]
            known += [*(self.target(item) for _ in outer), *(answer for _, answer in kept)]
        targets = [said or "." for said in self.prediction(prompts, known)]
        asked = supervised(self.model, self.tokenizer, prompts, targets)
        positives = len(prompts) // len(items) - count
        rows = [i for i in range(len(prompts)) if i % (positives + count) >= positives]
        with torch.no_grad():
            before = logits_of(self.model, asked, rows)
        if asked.labels.ndim == 1:
            where = torch.ones(len(rows), device=before.device)
        else:
            labels = asked.labels[rows] != IGNORED
            where = asked.inputs["attention_mask"][rows].bool() if self.everywhere and self._decoder else labels
        return Practice(asked, positives, count, before, where)

    def _others(self, item: TrainingItem, count: int, draws: Any) -> list[tuple[str, str | None]]:
        """Prompts of other items, as of a batch in KnowledgeEditor's code, with their answers; not the item's own in any wording."""
        own = {item.prompt, *item.rephrases}
        drawn = draws.sample(self.items, min(len(self.items), 4 * count))
        others = [i for i in drawn if i.prompt not in own][:count]
        return [(i.prompt, i.target_true) for i in others or [item]]

    def run(self, updates: Sequence[Update], practice: Practice) -> Tensor:
        """Logits of the practice's rows under the updates."""
        with edited(self.model, self.maps, updates):
            return logits_of(self.model, practice.asked)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On the items held out, each under its own edit: success on the prompt, on rephrases, retained answers, and KL, nats."""
        if not self.held_out:
            return {}
        draws = self.batches.draws(-1)
        found: dict[str, list[float]] = {"success": [], "generalization": [], "retain": [], "kl": []}
        self.module.eval()
        for start in range(0, len(self.held_out), self.base_config.batch):
            items = self.held_out[start : start + self.base_config.batch]
            outers = [(item.prompt, draws.choice(item.rephrases or (item.prompt,))) for item in items]
            practice = self.practice(items, outers, draws)
            after = self.run(self.updates(items), practice)
            said, _ = practice.parted(practice.asked.said(after))
            _, kept = practice.parted(after)
            same = kept.argmax(-1) == practice.before.argmax(-1)
            _, labels = practice.parted(practice.asked.labels)
            same = same if same.ndim == 1 else (same | (labels == IGNORED)).all(1)
            found["success"] += said[:, 0].float().tolist()
            found["generalization"] += said[:, 1].float().tolist()
            found["retain"] += same.float().tolist()
            found["kl"] += divergence(practice.before, kept, practice.where).tolist()
        self.module.train()
        return {name: round(sum(values) / len(values), 6) for name, values in found.items()}


# -- fitting -----------------------------------------------------------------------------------------------------------------


class HyperEditor(LearnedEditor[H]):
    """An editor whose network turns the signals of a request into updates of linear maps, in one go."""

    place: ClassVar[str] = "global optimisation"
    how: ClassVar[str] = "direct"
    supports = ("decoder", "encoder-decoder", "classifier")
    batch = GROUP

    @abstractmethod
    def maps(self, model: Any, config: H) -> list[LinearMap]:
        """The maps that are edited."""

    def edited_weights(self, model: Any, config: H) -> list[str]:
        """The maps' weights."""
        return [f"{m.path}.weight" for m in self.maps(model, config)]

    @abstractmethod
    def network(self, model: Any, maps: Sequence[LinearMap], config: H) -> nn.Module:
        """The hypernetwork, untrained, on the model's device."""

    @abstractmethod
    def propose(self, config: H, network: Any, fitting: "Fitting") -> tuple[list[Update], list[dict[str, Any]]]:
        """(the update of each map, notes for the report) for a batch of requests."""

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
        """The trained network's updates for the requests, each from the unedited model.

        onto: a patch of this network's that they come on top of: each is then from the model with it merged, and the result holds
        its edits too. Raises ConfigError that names `errata train` where there is no artefact, or if `onto` is another's,
        BaseMismatchError for another model's, UnsupportedPatchError if `onto` cannot be merged, and RequestError,
        SubjectNotFoundError as every editor does. The report says of each edit alone whether it took; of two requests that
        contradict each other the later is kept, and both are reported.
        """
        self.check(requests, model, tokenizer)
        config, header, tensors = self.trained(model, tokenizer)
        about, maps = self.recorded(model, tokenizer), self.maps(model, config)
        base = base_of(model, tokenizer, self.edited_weights(model, config))
        if onto is not None:
            refuse_known(onto, requests)
            _check_onto(onto, self.method, about, model, tokenizer)
        columns: list[list[tuple[str, Tensor, Tensor]]] = [[] for _ in maps]
        biases, report = list[Part](), dict[str, dict[str, Any]]()
        past = merge(onto, model, tokenizer) if onto is not None else nullcontext()
        with past, quiet(model), _without_gradients(model), torch.random.fork_rng(devices=[]):
            network = self.network(model, maps, config)
            network.load_state_dict(tensors)
            network.eval().requires_grad_(False)
            for start in range(0, len(requests), GROUP):
                chunk = requests[start : start + GROUP]
                fitting = Fitting(model, tokenizer, chunk, maps, config.ending)
                updates, notes = self.propose(config, network, fitting)
                said = fitting.said(updates)
                for i, request in enumerate(chunk):
                    for kept, update in zip(columns, updates, strict=True):
                        U, V = update.U[i], update.V[i]
                        size = torch.linalg.vector_norm(U, dim=0) * torch.linalg.vector_norm(V, dim=0)
                        at = size > TINY * size.max()  # not padding, nor tokens that nothing depends on but by rounding
                        kept.append((request.id, U[:, at].cpu(), V[:, at].cpu()))
                    deltas = {
                        f"{m.path}.bias": u.bias[i].cpu()
                        for m, u in zip(maps, updates, strict=True)
                        if u.bias is not None
                    }
                    biases += [Dense((request.id,), deltas)] if deltas else []
                    norm = float(sum(float(u.squared()[i]) for u in updates) ** 0.5)
                    report[request.id] = {
                        "converged": said[i],
                        "norm": round(norm, 6),
                        "trained": header["content"][:12],
                    }
                    report[request.id] |= notes[i]
                    if progress is not None:
                        progress(start + i + 1, len(requests))
        parts: list[Part] = []
        for m, kept in zip(maps, columns, strict=True):
            edits = tuple(edit for edit, U, _ in kept for _ in range(U.shape[1]))
            if edits:
                U, V = torch.cat([U for _, U, _ in kept], 1), torch.cat([V for _, _, V in kept], 1)
                parts.append(LowRank(edits, U, V, m.layer, m.site))
        made = later_wins(Patch(self.method, about, tuple(requests), base, (*parts, *biases), report))
        if onto is None:
            return made
        both = replace(onto, requests=onto.requests + made.requests, parts=onto.parts + made.parts)
        return replace(both, report=with_contradictions(onto.report | made.report, both.requests))


def _check_onto(patch: Patch, method: str, about: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """Raise BaseMismatchError, ConfigError or UnsupportedPatchError if these edits cannot come on top of the patch's."""
    check_fits([patch], model, tokenizer)
    if (patch.method, patch.config) != (method, about):
        raise ConfigError(
            f"expected a {method} patch of the same network and options to go on from, found a {patch.method} patch of others; fit "
            "without it, or with the artefact that it was fitted with"
        )
    if patch.dense:
        raise UnsupportedPatchError(
            f"a {method} patch that edits biases is not merged, so no edits can be fitted on top of it; fit them apart and join the "
            "patches"
        )


class Fitting:
    """A batch of requests on the model that they are fitted for."""

    def __init__(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], maps: Sequence[LinearMap], ending: str
    ):
        self.model, self.tokenizer, self.requests, self.maps = model, tokenizer, requests, maps
        ending = ending if anatomy(model).role == "decoder" else ""
        self.prompts, self.targets = [r.text for r in requests], [r.target_new + ending for r in requests]

    def asked(self, at: Sequence[int] | None = None) -> Supervised:
        """The requests' prompts with their new objects, or those of some of them."""
        rows = range(len(self.requests)) if at is None else at
        return supervised(self.model, self.tokenizer, [self.prompts[i] for i in rows], [self.targets[i] for i in rows])

    def at(self, i: int, prompt: str) -> Supervised:
        """Another prompt with the new object of request `i`."""
        return supervised(self.model, self.tokenizer, [prompt], [self.targets[i]])

    def said(self, updates: Sequence[Update], asked: Supervised | None = None) -> list[bool]:
        """Whether each request's new object is said under its own update; asked: other prompts, one each."""
        judged = asked or self.asked()
        with torch.no_grad(), edited(self.model, self.maps, updates):
            found: list[bool] = judged.said(logits_of(self.model, judged)).tolist()
        return found
