"""Knowledge neurons: the units that carry a fact, found by integrated gradients, get another word to say (Dai et al. 2022).

Neuron (l, j) is coordinate j of what the MLP output projection of layer l reads, at the token whose next word is asked for (the
first token of a classifier). Its attribution is the integral of the gradient of P(old object) along the straight path from no
activation to the measured one (Eq. 4 and 5); summed over a layer this is what P loses with the layer's neurons off. Coarse
neurons exceed a share of the largest attribution; those that many prompts of the fact share are kept, and their value slots, columns
of the output projection, become w - lambda_1 e(old) + lambda_2 e(new). Emits for each edit one low-rank part a layer.

Differs from the published code by default (presets restore it): the integral is taken by the midpoint rule, not with both ends;
neurons are read behind the activation (the product, where the MLP is gated); lambdas are the paper's 1 and 8; each token of an
object is scored behind the ones before it, and an object counts as the mean of its tokens; neurons are refined over prompts; what
is erased is the old object, not the one token that the model says now. No preset takes objects without the space before them.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.edit import EditRequest
from errata.editor import Editor, Progress, quiet
from errata.editors._items import later_wins
from errata.editors._value_search import _without_gradients
from errata.editors._weights import adding, parameters_of
from errata.errors import AnatomyError, ConfigError
from errata.low_rank import LowRank
from errata.low_rank_table import base_layer, sizes
from errata.model.anatomy import anatomy, submodule
from errata.model.cache import cache_in, with_cache
from errata.model.fingerprint import base_of
from errata.model.hooks import Capture, ForwardHook, Hooks, PreHook, first_tensor, with_first_tensor
from errata.model.labels import label_id
from errata.model.room import check_room
from errata.model.states import input_device
from errata.model.targets import all_said, answer_ids
from errata.model.tokens import continuation_ids, start_id, token_ids
from errata.patch import Patch
from errata.prompts import contexts


@dataclass(frozen=True)
class KNConfig:
    """Settings of KN.

    steps, rule: of the integral, at (n + 1/2) / steps ("midpoint") or both ends included ("linspace"). neuron: "output", what the
    output projection reads, or "input", before the activation (of a gated MLP its gate). threshold: t, share of the largest
    attribution above which a neuron is coarse; refine: keep those that more than `share` (p) of the prompts have, else those of the
    edit's own prompt; prompts: how many at most, its own, `fit_prompts`, and for decoders these behind lead-ins. erase, update:
    lambda_1 and lambda_2; old: what is erased, the "target" (`target_true`) or the token or label that is "predicted". tokens: of the
    old object each is scored "each" in its own place, or all "at_prompt"; count: an object's direction is the "mean" or the "sum" of
    its tokens'. embedding: whose word vectors are written, the head's ("output") or those that the model reads ("input"). batch:
    rows of a pass.
    """

    steps: int = 20
    rule: Literal["midpoint", "linspace"] = "midpoint"
    neuron: Literal["output", "input"] = "output"
    threshold: float = 0.2
    share: float = 0.4
    refine: bool = True
    prompts: int = 5
    erase: float = 1.0
    update: float = 8.0
    old: Literal["target", "predicted"] = "target"
    tokens: Literal["each", "at_prompt"] = "each"
    count: Literal["mean", "sum"] = "mean"
    embedding: Literal["output", "input"] = "output"
    batch: int = 64

    def __post_init__(self) -> None:
        named = (self.rule, self.neuron, self.old, self.tokens, self.count, self.embedding)
        known = (
            ("midpoint", "linspace"),
            ("output", "input"),
            ("target", "predicted"),
            ("each", "at_prompt"),
            ("mean", "sum"),
            ("output", "input"),
        )
        if any(name not in names for name, names in zip(named, known, strict=True)):
            raise ConfigError(
                "expected rule 'midpoint' or 'linspace', neuron 'output' or 'input', old 'target' or 'predicted', tokens 'each' or "
                f"'at_prompt', count 'mean' or 'sum' and embedding 'output' or 'input', found {self}"
            )
        if min(self.steps, self.prompts, self.batch) < 1 or min(self.erase, self.update) < 0:
            raise ConfigError(
                f"expected steps, prompts and batch of at least 1, and erase and update of at least 0, found {self}"
            )
        if not 0 <= self.threshold < 1 or not 0 <= self.share < 1:
            raise ConfigError(f"expected threshold and share from 0 to below 1, found {self.threshold}, {self.share}")


_CODE: dict[str, Any] = {
    "rule": "linspace", "neuron": "input", "refine": False, "erase": 2.0, "update": 1.0, "old": "predicted",
    "tokens": "at_prompt", "count": "sum", "embedding": "input", "batch": 20,
}  # fmt: skip


class KN(Editor[KNConfig]):
    """Knowledge neurons, erased and updated."""

    method = "kn"
    summary = "value slots of a fact's neurons rewritten, found by integrated gradients (Dai et al. 2022)"
    place = "local modification"
    how = "direct"
    supports = ("decoder", "encoder-decoder", "classifier")
    Config = KNConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": _CODE,
        "gpt-j-6b": {**_CODE, "threshold": 0.1},
        "llama-2-7b": {**_CODE, "steps": 1, "batch": 1},
        "bert-base": {**_CODE, "neuron": "output", "update": 2.0},
    }

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Find and rewrite each request's neurons, on the model without any patch. Of two requests that contradict each other the
        later is kept, and both are reported.

        Raises RequestError, AnatomyError for MLPs whose neurons cannot be told apart.
        """
        self.check(requests, model, tokenizer)
        parts: list[LowRank] = []
        report: dict[str, dict[str, Any]] = {}
        with quiet(model), _without_gradients(model):
            for number, request in enumerate(requests, 1):
                own, report[request.id] = self._edit(model, tokenizer, request, seed)
                parts += own
                if progress is not None:
                    progress(number, len(requests))
        base = base_of(model, tokenizer, parameters_of(model, range(anatomy(model).n_layers)))
        return later_wins(Patch(self.method, asdict(self.config), tuple(requests), base, tuple(parts), report))

    def _edit(
        self, model: Any, tokenizer: Any, request: EditRequest, seed: int
    ) -> tuple[list[LowRank], dict[str, Any]]:
        config = self.config
        given = list(dict.fromkeys((request.text, *request.fit_prompts)))
        more = config.refine and anatomy(model).role == "decoder"
        prompts = contexts.lead_ins(given, config.prompts, seed) if more else given[: config.prompts]
        if not config.refine:
            prompts = [request.text]
        found = [self._attributions(model, tokenizer, prompt, request) for prompt in prompts]
        coarse = torch.stack(
            [a > config.threshold * a.max() if a.max() > 0 else torch.zeros_like(a) > 0 for a in found]
        )
        times = coarse.sum(0)
        least = min(config.share * len(prompts), float(times.max()) - 0.5)  # where no neuron is common, the commonest
        kept = times > max(0.0, least)
        delta = self._direction(model, tokenizer, request, request.target_new) * config.update
        old = request.target_true if config.old == "target" else None
        delta = delta - self._direction(model, tokenizer, request, old) * config.erase
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        parts = [
            LowRank((request.id,), delta[:, None].to(dtype, copy=True), slots[:, None].to(dtype), layer)
            for layer, slots in enumerate(kept)
            if bool(slots.any())
        ]
        with adding(model, {int(part.layer): (part.U, part.V) for part in parts}):
            [said] = all_said(model, tokenizer, [(request.text, request.target_new)])
        notes = {
            "prompts": len(prompts),
            "coarse": [int(own.sum()) for own in coarse],
            "neurons": [[layer, j] for layer, j in kept.nonzero().tolist()],
            "common": bool(float(times.max()) > config.share * len(prompts)),
            "converged": said,
        }
        return parts, notes

    def _attributions(self, model: Any, tokenizer: Any, prompt: str, request: EditRequest) -> Tensor:
        """(L, m) the mean over the old object's tokens."""
        asks = asks_of(model, tokenizer, prompt, request.target_true, self.config.tokens)
        return torch.stack([attributions(model, ask, self.config) for ask in asks]).mean(0)

    def _direction(self, model: Any, tokenizer: Any, request: EditRequest, target: str | None) -> Tensor:
        """(d,) what is written for a target (None: what the model says now), on the CPU."""
        if anatomy(model).role == "classifier":
            [ask] = asks_of(model, tokenizer, request.text, target)
            return label_direction(model, ask)
        ids = [ask.wanted for ask in asks_of(model, tokenizer, request.text, target)]
        own = model.get_input_embeddings() if self.config.embedding == "input" else model.get_output_embeddings()
        vectors = own.weight.detach()[ids].to("cpu", torch.promote_types(own.weight.dtype, torch.float32))
        return vectors.mean(0) if self.config.count == "mean" else vectors.sum(0)


# -- what is asked -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One token (or label) whose probability is attributed.

    ids: the row that is fed, of an encoder-decoder the decoder's; encoder: its encoder's; at: the position whose neurons count
    and, but in a classifier, whose logits are read; wanted: the id of the token or label.
    """

    ids: tuple[int, ...]
    at: int
    wanted: int = -1
    encoder: tuple[int, ...] | None = None


def asks_of(
    model: Any, tokenizer: Any, prompt: str, target: str | None, tokens: Literal["each", "at_prompt"] = "each"
) -> list[Ask]:
    """What is asked about a target behind a prompt, one for each of its tokens; None: the one token or label that the model says.

    tokens: each is scored behind the prompt and the tokens before it, or all behind the prompt alone. Raises RequestError for a
    text that is too long, or a target that is no label.
    """
    [ids] = token_ids(tokenizer, [prompt])
    check_room(model, [ids], [prompt])
    role, encoder = anatomy(model).role, None
    if role == "classifier":
        bare = Ask(tuple(ids), 0)  # what an encoder's head reads
        wanted = [label_id(model, target)] if target is not None else []
    elif role == "encoder-decoder":
        encoder, ids = tuple(ids), [start_id(model)]
        bare = Ask(tuple(ids), 0, encoder=encoder)
        wanted = answer_ids(tokenizer, [target])[0] if target is not None else []
        wanted = wanted[:-1] if len(wanted) > 1 and wanted[-1] == tokenizer.eos_token_id else wanted
    else:
        bare = Ask(tuple(ids), len(ids) - 1)
        wanted = continuation_ids(tokenizer, prompt, target) if target is not None else []
    if target is None:
        with torch.no_grad():
            wanted = [int(_Pass(model, bare).logits(1)[0].argmax())]
    found = []
    for t, token in enumerate(wanted):
        row = (*ids, *wanted[:t]) if tokens == "each" else tuple(ids)
        found.append(Ask(row, bare.at if role == "classifier" else len(row) - 1, token, encoder))
    return found


class _Pass:
    """Forward passes of one ask, many rows of it at once; what does not depend on the row is computed once."""

    def __init__(self, model: Any, ask: Ask):
        self.model, self.ask, self.device = model, ask, input_device(model)
        self.role = anatomy(model).role
        self.cache: Any = None
        self.encoded: Any = None
        with torch.no_grad():
            if ask.encoder is not None:
                ids = torch.tensor([ask.encoder], device=self.device)
                self.encoded = model.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids))
            elif self.role == "decoder" and len(ask.ids) > 1:
                ids = torch.tensor([ask.ids[:-1]], device=self.device)
                self.cache = cache_in(model(input_ids=ids, use_cache=True))

    @property
    def column(self) -> int:
        """Where the ask's position is among those that a pass computes."""
        return 0 if self.cache is not None else self.ask.at

    def logits(self, rows: int) -> Tensor:
        """(rows, V or labels) at the ask's position, of so many equal rows."""
        ids = torch.tensor([self.ask.ids], device=self.device).expand(rows, -1)
        if self.role == "classifier":
            found: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            return found
        if self.encoded is not None:
            states = self.encoded.last_hidden_state.expand(rows, -1, -1)
            inputs = {"decoder_input_ids": ids, "attention_mask": torch.ones(states.shape[:2], device=self.device)}
            return self.model(encoder_outputs=(states,), **inputs, use_cache=False).logits[:, self.ask.at]
        if self.cache is None:
            return self.model(input_ids=ids, use_cache=False).logits[:, -1]
        cache = copy.deepcopy(self.cache)  # a pass writes into it
        cache.batch_repeat_interleave(rows)
        return self.model(input_ids=ids[:, -1:], **with_cache(self.model, cache)).logits[:, -1]


# -- integrated gradients --------------------------------------------------------------------------------------------------


def attributions(model: Any, ask: Ask, config: KNConfig) -> Tensor:
    """(L, m) on the CPU: Attr(l, j) = a_lj mean_n dP(wanted) / da_lj at a_l = alpha_n a_l, all other layers as they come.

    Source: Dai et al. 2022, Eq. 5. The model must require no gradients and be in evaluation mode.
    """
    neurons, run = _paths(model, config.neuron), _Pass(model, ask)
    of: Literal["input", "output"] = "input" if config.neuron == "output" else "output"
    with Capture(model, neurons, of=of) as seen, torch.no_grad():
        run.logits(1)
    activation = torch.stack([_rows(seen[path], 1)[0, run.column].cpu() for path in neurons])
    activation = activation.to(torch.promote_types(activation.dtype, torch.float32))
    n = config.steps
    alphas = (torch.arange(n) + 0.5) / n if config.rule == "midpoint" else torch.linspace(0, 1, n)
    layers = torch.arange(len(neurons)).repeat_interleave(n)
    total = torch.zeros_like(activation)
    for chunk, share in zip(layers.split(config.batch), alphas.repeat(len(neurons)).split(config.batch), strict=True):
        leaf = (share[:, None].to(activation) * activation[chunk]).requires_grad_()
        with torch.enable_grad(), _in_place(model, neurons, of, chunk, leaf, run.column):
            logits = run.logits(len(chunk))
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logp = wide.log_softmax(-1)[:, ask.wanted]
            (slope,) = torch.autograd.grad(logp.sum(), [leaf])
        # dP = P d log P: where P is tiny its own gradient would be lost in half precision.
        slope = slope * logp.detach().exp()[:, None].to(slope)
        total.index_add_(0, chunk, slope * activation[chunk] / n)
    return total


def _paths(model: Any, neuron: str) -> tuple[str, ...]:
    """The module of each layer whose input ("output" neurons) or output ("input" neurons) the neurons are."""
    parts = anatomy(model)
    paths = parts.mlp_out if neuron == "output" else parts.mlp_gate or parts.mlp_in
    if not parts.mlp_out or not paths:
        raise AnatomyError(f"expected an MLP in each layer, found none in this {parts.family!r} model.")
    if neuron == "input":
        wide, slots = (sizes(base_layer(submodule(model, path))) for path in (paths[0], parts.mlp_out[0]))
        if wide is None or slots is None or wide[0] != slots[1]:
            raise AnatomyError(
                f"expected as many neurons before the activation as behind it, found {wide} at {paths[0]!r} of this {parts.family!r} "
                "model, which stores gate and values as one; use neuron='output'"
            )
    return paths


def _rows(x: Tensor, rows: int) -> Tensor:
    return x.reshape(rows, -1, x.shape[-1])  # OPT's MLP runs on (n * T, m)


def _in_place(
    model: Any, paths: Sequence[str], of: Literal["input", "output"], layers: Tensor, values: Tensor, column: int
) -> Hooks:
    """Inside, row r of a batch has values[r] for its neurons of layer layers[r], at a column."""

    def changed(x: Tensor, own: Tensor) -> Tensor:
        whole = _rows(x, len(layers)).clone()
        whole[own.to(x.device), column] = values[own].to(x)
        return whole.reshape(x.shape)

    def before(own: Tensor) -> PreHook:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (changed(args[0], own), *args[1:]), kwargs

        return hook

    def behind(own: Tensor) -> ForwardHook:
        return lambda module, args, kwargs, output: with_first_tensor(output, changed(first_tensor(output), own))

    owners = {path: own for layer, path in enumerate(paths) if len(own := (layers == layer).nonzero()[:, 0])}
    if of == "input":
        return Hooks(model, pre={path: before(own) for path, own in owners.items()})
    return Hooks(model, forward={path: behind(own) for path, own in owners.items()})


def label_direction(model: Any, ask: Ask) -> Tensor:
    """(d,) on the CPU: the direction of the last block's output at the first token in which the label's logit rises.

    A classifier has no vector of a label in the residual stream; this is the gradient there, made as long as a word embedding is
    in the mean.
    """
    site, leaves = anatomy(model).site(-1), list[Tensor]()

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        leaves.append(first_tensor(output).detach().requires_grad_())
        return with_first_tensor(output, leaves[-1])

    with torch.enable_grad(), Hooks(model, forward=[(site, hook)]):
        logits = _Pass(model, ask).logits(1)
        (slope,) = torch.autograd.grad(logits[0, ask.wanted], leaves)
    slope = slope[0, ask.at].to("cpu", torch.promote_types(slope.dtype, torch.float32))
    size = torch.linalg.vector_norm(model.get_input_embeddings().weight.detach().to(slope.dtype), dim=-1).mean().cpu()
    return slope / torch.linalg.vector_norm(slope).clamp(min=torch.finfo(slope.dtype).tiny) * size
