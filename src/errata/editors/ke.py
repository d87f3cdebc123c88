"""KnowledgeEditor: a network that reads the edit and gates its gradient (De Cao et al. 2021).

The text `prediction >> new object || prompt` goes through a bidirectional LSTM (the embedding starts as the model's own) to a
condition vector; for each matrix a small head makes vectors a, b, c, d and a number eta of it, and with the gradient of the
edit's loss dW = s sigma(eta) (grad W * softmax(a) b^T + softmax(c) d^T). With grad W = sum_t delta_t x_t^T this is low-rank: one
column a token and one more. Training: the least loss of the new object such that the model stays within a margin of itself
elsewhere, in Kullback-Leibler divergence ("kl") or in the size of dW ("lp"), by a Lagrangian whose multipliers climb while the
constraint is violated; the margin shrinks as soon as most edits succeed. "+P^x" (views) asks for the new object at a rephrase
as well; "+loop" applies the editor again while the model does not say it. Emits low-rank parts, and dense ones for biases.

Differs from the released code by default (preset "paper" restores sizes and strengths): the gate of the gradient averages one
over the rows of W (its softmax alone sums to one), and training starts from a step down the gradient, not from noise, which
takes hours off it; sizes follow the model's width; a step takes several edits, each with retained prompts of its own; the loop
takes the gradient anew each round, for any model (the code's sequence models add the same update again, and stop by a
rephrase: loop_recompute=False, loop_stop="rephrase").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from errata.editors._hypernetwork import (
    Fitting,
    HyperConfig,
    HyperEditor,
    HyperLearner,
    LinearMap,
    Practice,
    Signal,
    Update,
    divergence,
    edited,
    linear_maps,
    signals,
)
from errata.errors import ConfigError
from errata.model.anatomy import anatomy
from errata.model.generate import greedy_answers
from errata.model.states import input_device
from errata.model.targets import supervised
from errata.model.tokens import pad, token_ids
from errata.training import TrainingItem

ROUNDS = 5  # at most, of the loop
POLYAK = 16  # items by which the first step's size is chosen


@dataclass(frozen=True)
class KEConfig(HyperConfig):
    """Settings of KnowledgeEditor; see `HyperConfig` for layers (None: all). Sizes of None follow the model's width d.

    hidden: of the LSTM, each way (d / 6); condition: of the condition vector (4 d / 3); bottleneck: of each head (d / 6);
    tokens: of the condition text, cut at its end. scale: s; start: the size of a step down the gradient, with which training
    begins and in which gradients are counted (0: neither, as published; None: Polyak's, loss / |gradient|^2); gate: whether the
    softmax that gates the gradient has "mean" one or "sum" one; biases: edit the maps' biases too. objective: "lagrangian", or
    "penalty", edit x loss + 1 x KL with no constraint (as retrained by Mitchell et al. 2022). variant: what is constrained;
    margins in nats and weight units, the first and the least (None: by the model's kind, as published); margin_factor,
    margin_when: m becomes max(factor m, least) at a validation whose success is above `when`; lp: mean over matrices of rms(dW),
    in whose units the published margins are, or "all" as one (the paper's formula). multiplier_lr: of the multipliers. smoothing:
    of labels (None: 0.1, 0 for a classifier); views: +P^x. optimizer; warmup: steps to the full lr, which then falls linearly to 0.
    loop: rounds at most (1: none); loop_recompute, loop_stop: see above; loop_bound: a later round's gradient counts for no more
    than the first one's, since it is largest near the verge, and the network has only seen gradients of the unedited model.
    """

    hidden: int | None = None
    condition: int | None = None
    bottleneck: int | None = None
    tokens: int = 64
    scale: float = 1.0
    start: float | None = None
    gate: Literal["mean", "sum"] = "mean"
    biases: bool = False
    objective: Literal["lagrangian", "penalty"] = "lagrangian"
    edit: float = 0.1
    variant: Literal["kl", "lp", "both"] = "kl"
    margin_kl: float | None = None
    margin_kl_min: float | None = None
    margin_lp: float | None = None
    margin_lp_min: float | None = None
    margin_factor: float = 0.8
    margin_when: float = 0.9
    lp: Literal["mean", "all"] = "mean"
    multiplier_lr: float = 0.1
    smoothing: float | None = None
    views: bool = True
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    warmup: int = 100
    loop: int = ROUNDS
    loop_recompute: bool = True
    loop_stop: Literal["prompt", "rephrase"] = "prompt"
    loop_bound: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (
            self.gate in ("mean", "sum"), self.objective in ("lagrangian", "penalty"), self.variant in ("kl", "lp", "both"),
            self.lp in ("mean", "all"), self.optimizer in ("rmsprop", "adam"), self.loop_stop in ("prompt", "rephrase"),
        )  # fmt: skip
        if not all(known):
            raise ConfigError(
                "expected gate 'mean' or 'sum', objective 'lagrangian' or 'penalty', variant 'kl', 'lp' or 'both', lp 'mean' or "
                f"'all', optimizer 'rmsprop' or 'adam' and loop_stop 'prompt' or 'rephrase', found {self}"
            )
        sizes = (
            self.hidden, self.condition, self.bottleneck, self.margin_kl, self.margin_lp, self.margin_kl_min, self.margin_lp_min,
        )  # fmt: skip
        positive = (self.tokens, self.scale, self.loop, self.multiplier_lr, *(v for v in sizes if v is not None))
        if (
            min(positive) <= 0
            or not 0 < self.margin_factor <= 1
            or not 0 <= (self.smoothing or 0) < 1
            or self.warmup < 0
        ):
            raise ConfigError(
                "expected sizes, margins, tokens, scale, loop and multiplier_lr above 0, margin_factor in (0, 1], smoothing in [0, 1) and "
                f"warmup of at least 0, found {self}"
            )


_PAPER: dict[str, Any] = {
    "hidden": 128, "condition": 1024, "bottleneck": 128, "tokens": 32, "start": 0.0, "gate": "sum", "lr": 3e-4, "warmup": 1000,
    "steps": 200_000, "every": 1000, "batch": 64, "retain": 1, "loop_bound": False,
}  # fmt: skip
# Rows of the paper's table that are trainings of their own: without +P^x, and so with the L2 constraint.
_PLAIN: dict[str, Any] = {"name": "ke-plain", "views": False}
_L2: dict[str, Any] = {"name": "ke-l2", "views": False, "variant": "lp"}
# KnowledgeEditor as it was retrained beside MEND ("EFK"), the "KE" of ROME's tables: no Lagrangian, MEND's maps and loss.
_MEND_CODE: dict[str, Any] = {
    "name": "ke-mend-code", "hidden": 512, "condition": 768, "bottleneck": 512, "start": 0.0, "gate": "sum",
    "objective": "penalty", "optimizer": "adam", "lr": 1e-5, "warmup": 0, "views": False, "loop": 1, "smoothing": 0.0,
    "parameters": "mlp", "batch": 10, "retain": 1, "steps": 100_000, "every": 500, "held_out": 500,
}  # fmt: skip
# Chosen on Atlas's dev facts, whose statements end behind the object.
_ATLAS: dict[str, Any] = {
    "parameters": "mlp", "ending": ".", "bottleneck": 64, "batch": 4, "retain": 2, "steps": 1500, "every": 100, "warmup": 20,
    "lr": 1e-2, "margin_kl": 0.05, "margin_kl_min": 0.01,
}  # fmt: skip
# Of the model's size, in an hour; the gate and the start as above, without which nothing is learnt in so few steps.
_ATLAS_MEND_CODE: dict[str, Any] = {
    **_MEND_CODE, "hidden": None, "condition": None, "bottleneck": 64, "start": None, "gate": "mean", "ending": ".", "lr": 1e-3,
    "batch": 4, "retain": 2, "steps": 1000, "every": 100, "held_out": 64,
}  # fmt: skip
_ATLAS_BERT: dict[str, Any] = {
    "parameters": "mlp", "bottleneck": 64, "batch": 8, "retain": 3, "steps": 2400, "every": 100, "warmup": 20, "lr": 3e-3,
    "margin_kl": 0.3, "margin_kl_min": 0.04,
}  # fmt: skip


class KnowledgeEditor(HyperEditor[KEConfig]):
    """KnowledgeEditor, a conditioned hypernetwork trained under a constraint."""

    method = "ke"
    summary = "a network that reads the edit and gates its gradient, trained under a constraint (De Cao et al. 2021)"
    Config = KEConfig
    fit_only = ("artefact", "loop", "loop_recompute", "loop_stop", "loop_bound")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": _PAPER,
        "ke-cf": {"name": "ke-cf"},
        "ke-plain": _PLAIN,
        "ke-l2": _L2,
        "mend-code": _MEND_CODE,
        "mend-code-cf": {**_MEND_CODE, "name": "ke-mend-code-cf"},
        "atlas": _ATLAS,
        "atlas-cf": {**_ATLAS, "name": "ke-cf"},
        "atlas-mend-code": _ATLAS_MEND_CODE,
        "atlas-mend-code-cf": {**_ATLAS_MEND_CODE, "name": "ke-mend-code-cf"},
        "atlas-t5": {**_ATLAS, "ending": ""},  # an answer is closed by its end token
        "atlas-bert": _ATLAS_BERT,
        "atlas-bert-plain": {**_ATLAS_BERT, **_PLAIN},
        "atlas-bert-l2": {**_ATLAS_BERT, **_L2},
    }

    def maps(self, model: Any, config: KEConfig) -> list[LinearMap]:
        """All linear maps of all blocks, unless the config says otherwise; retrained beside MEND, MEND's."""
        beside_mend = config.objective == "penalty"
        last = (2 if anatomy(model).role == "encoder-decoder" else 3) if beside_mend else 0
        return linear_maps(model, config.layers, config.parameters, last)

    def network(self, model: Any, maps: Sequence[LinearMap], config: KEConfig) -> "Hypernetwork":
        """The hypernetwork with the model's embedding."""
        dtype = torch.promote_types(model.dtype, torch.float32)
        embedding = model.get_input_embeddings().weight.detach().to(dtype)
        return Hypernetwork(embedding, maps, config, anatomy(model).d_model).to(input_device(model), dtype)

    def learner(
        self, model: Any, tokenizer: Any, items: Sequence[TrainingItem], held_out: Sequence[TrainingItem], seed: int
    ) -> "KELearner":
        """The hypernetwork with its multipliers and optimisers."""
        maps = self.maps(model, self.config)
        network = self.network(model, maps, self.config)
        learner = KELearner(self.config, model, tokenizer, items, held_out, network, maps, seed)
        if self.config.start != 0:
            network.begin(self.config.start or learner.natural_step(items[:POLYAK]))
        return learner

    def propose(
        self, config: KEConfig, network: "Hypernetwork", fitting: Fitting
    ) -> tuple[list[Update], list[dict[str, Any]]]:
        """The editor's updates, applied again where the model does not say the new object yet."""
        requests, model = fitting.requests, fitting.model
        unknown = [i for i, r in enumerate(requests) if r.target_true is None]
        said = greedy_answers(model, fitting.tokenizer, [fitting.prompts[i] for i in unknown]) if unknown else []
        predicted = dict(zip(unknown, said, strict=True))
        texts = [
            condition(r.target_true or predicted[i], r.target_new, fitting.prompts[i]) for i, r in enumerate(requests)
        ]
        conditions = network.read(fitting.tokenizer, texts)
        plain = signals(model, fitting.maps, fitting.asked())[0]
        first, sizes = network.updates(conditions, plain), gradient_norms(plain)
        total = [[update.of([i]) for update in first] for i in range(len(requests))]
        rounds = [1] * len(requests)
        for i, request in enumerate(requests):
            prompts = list(request.fit_prompts[:1]) if self.config.loop_stop == "rephrase" else []
            judged = fitting.at(i, prompts[0]) if prompts else fitting.asked([i])
            while rounds[i] < self.config.loop and not fitting.said(total[i], judged)[0]:
                again = [update.of([i]) for update in first]
                if self.config.loop_recompute:
                    with edited(model, fitting.maps, total[i]):
                        found = signals(model, fitting.maps, fitting.asked([i]))[0]
                    found = _no_larger(found, sizes[i]) if self.config.loop_bound else found
                    again = network.updates(conditions[i : i + 1], found)
                total[i] = [a + b for a, b in zip(total[i], again, strict=True)]
                rounds[i] += 1
        return [Update.stacked([own[m] for own in total]) for m in range(len(fitting.maps))], [
            {"rounds": n} for n in rounds
        ]


def gradient_norms(found: Sequence[Signal]) -> Tensor:
    """(n,) Frobenius norm of each edit's gradient over all maps, nats a unit of weight."""
    return torch.stack([(s.delta.mT @ s.x).square().sum((1, 2)) for s in found]).sum(0).sqrt()


def _no_larger(found: Sequence[Signal], most: Tensor) -> list[Signal]:
    """What maps say of one edit, its gradient scaled down to a norm of `most` where it is larger."""
    less = (most / gradient_norms(found)[0].clamp(min=torch.finfo(most.dtype).tiny)).clamp(max=1)
    return [Signal(signal.x, less * signal.delta) for signal in found]


def condition(prediction: str, target: str, prompt: str) -> str:
    """What the hypernetwork reads of an edit."""
    return f"{prediction} >> {target} || {prompt}"


# -- the network -------------------------------------------------------------------------------------------------------------


class Hypernetwork(nn.Module):
    """Condition text -> condition vector -> for each map the vectors of its update. unit: what gradients are counted in."""

    unit: Tensor

    def __init__(self, embedding: Tensor, maps: Sequence[LinearMap], config: KEConfig, d: int):
        super().__init__()
        hidden = config.hidden or max(8, round(d / 6))
        size = config.condition or max(32, round(4 * d / 3))
        neck = config.bottleneck or max(8, round(d / 6))
        self.config, self.maps = config, list(maps)
        self.embedding = nn.Embedding.from_pretrained(embedding.clone(), freeze=False)
        self.lstm = nn.LSTM(embedding.shape[1], hidden, batch_first=True, bidirectional=True)
        self.condition = nn.Linear(2 * hidden, size)

        def head(width: int) -> nn.Module:
            return nn.Sequential(weight_norm(nn.Linear(size, neck)), nn.Tanh(), weight_norm(nn.Linear(neck, width)))

        self.heads = nn.ModuleList([head(2 * (m.d_in + m.d_out) + 1) for m in maps])
        biased = [m.d_out if config.biases and m.biased else 0 for m in maps]
        self.bias_heads = nn.ModuleList([head(2 * d_out + 1) if d_out else nn.Identity() for d_out in biased])
        self.register_buffer("unit", torch.ones(()))
        self.multipliers = nn.ParameterDict({name: torch.ones(()) for name in constrained(config)})

    @torch.no_grad()
    def begin(self, step: float) -> None:
        """Count the gradient in units of `step`, and begin with the update -step grad W, but for the heads' noise."""
        self.unit.fill_(step)
        heads: Any = self.heads
        for m, head in zip(self.maps, heads, strict=True):
            head[-1].bias[: m.d_in] -= 2 / self.config.scale  # sigma(eta) is a half

    def read(self, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        """(n, condition) of n texts."""
        device = self.embedding.weight.device
        rows = [row[: self.config.tokens] for row in token_ids(tokenizer, texts)]
        batch = pad(rows, 0, device)
        packed = pack_padded_sequence(
            self.embedding(batch.ids), batch.lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (last, _) = self.lstm(packed)
        found: Tensor = torch.tanh(self.condition(torch.cat([last[0], last[1]], -1)))
        return found

    def updates(self, conditions: Tensor, found: Sequence[Signal]) -> list[Update]:
        """The update of each map for n edits: conditions (n, condition), their signals."""
        return [self._update(conditions, signal, i) for i, signal in enumerate(found)]

    def _update(self, conditions: Tensor, signal: Signal, i: int) -> Update:
        m, s = self.maps[i], self.config.scale
        widths = [m.d_in, m.d_out, m.d_in, m.d_out, 1]
        col_a, row_a, col_b, row_b, eta = self.heads[i](conditions).split(widths, -1)
        step = s * torch.sigmoid(eta)
        gate = step * self.unit * row_a.softmax(-1) * (m.d_out if self.config.gate == "mean" else 1)
        x, delta = signal.x.to(conditions.dtype), signal.delta.to(conditions.dtype)
        U = torch.cat([gate[:, None] * delta, (step * row_b.softmax(-1))[:, None]], 1).mT
        V = torch.cat([col_a[:, None] * x, col_b[:, None]], 1).mT
        bias = None
        if self.config.biases and m.biased:
            a, b, eta = self.bias_heads[i](conditions).split([m.d_out, m.d_out, 1], -1)
            bias = s * torch.sigmoid(eta) * (delta.sum(1) * a + b)
        return Update(U, V, bias)


def constrained(config: KEConfig) -> tuple[str, ...]:
    """What has a multiplier: "kl", "lp", both, or nothing."""
    if config.objective == "penalty":
        return ()
    return ("kl", "lp") if config.variant == "both" else (config.variant,)


# -- training ----------------------------------------------------------------------------------------------------------------


class KELearner(HyperLearner):
    """min over the network, max over the multipliers >= 0: CE(new object) + sum of multiplier * (C - margin)."""

    module: Hypernetwork

    def __init__(self, config: KEConfig, *args: Any):
        super().__init__(config, *args)
        self.config = config
        classifier = anatomy(self.model).role == "classifier"
        self.smoothing = config.smoothing if config.smoothing is not None else 0.0 if classifier else 0.1
        self.everywhere = config.objective == "penalty"
        kl, lp = ((1e-1, 1e-3), (1e-6, 1e-9)) if classifier else ((1e-3, 1e-5), (1e-3, 1e-7))
        self.least = {"kl": config.margin_kl_min or kl[1], "lp": config.margin_lp_min or lp[1]}
        self.notes = {"kl": config.margin_kl or kl[0], "lp": config.margin_lp or lp[0]}
        self.network = [p for n, p in self.module.named_parameters() if not n.startswith("multipliers.")]
        self.multipliers = list(self.module.multipliers.values())
        chosen: Any = torch.optim.Adam if config.optimizer == "adam" else _centred
        self.optimisers = {"network": chosen(self.network, config.lr)}
        if self.multipliers:
            self.optimisers["multipliers"] = _centred(self.multipliers, config.multiplier_lr, maximize=True)

    def natural_step(self, items: Sequence[TrainingItem]) -> float:
        """Polyak's step, loss / |gradient|^2, at the median item: where a line down the gradient reaches zero loss."""
        asked = supervised(self.model, self.tokenizer, [i.prompt for i in items], [self.target(i) for i in items])
        found, logits = signals(self.model, self.maps, asked)
        squared = torch.stack([Update(s.delta.mT, s.x.mT).squared() for s in found]).sum(0)
        return float((asked.nll(logits) / squared.clamp(min=1e-12)).median())

    def updates(self, items: Sequence[TrainingItem]) -> list[Update]:
        """The hypernetwork's updates, of the unedited model."""
        predicted = self.prediction([i.prompt for i in items], [i.target_true for i in items])
        texts = [condition(said, i.target_new, i.prompt) for said, i in zip(predicted, items, strict=True)]
        return self.module.updates(self.module.read(self.tokenizer, texts), self.inner(items))

    def outers(self, items: Sequence[TrainingItem], draws: Any) -> list[list[str]]:
        """The prompt, and with views a rephrase; of the objective "penalty" the rephrase alone, as MEND's."""
        if self.config.objective == "penalty":
            return [[draws.choice(item.rephrases or (item.prompt,))] for item in items]
        if not self.config.views:
            return [[item.prompt] for item in items]
        return [[item.prompt, draws.choice(item.rephrases or (item.prompt,))] for item in items]

    def constraints(self, practice: Practice, after: Tensor, updates: Sequence[Update]) -> dict[str, Tensor]:
        """What is held below its margin: the mean KL of retained prompts, nats, and the size of the updates, weight units."""
        _, kept = practice.parted(after)
        kl = divergence(practice.before, kept, practice.where).mean()
        squared, count = [u.squared() for u in updates], [u.U.shape[1] * u.V.shape[1] for u in updates]
        if self.config.lp == "mean":
            size = torch.stack([(s / c + 1e-20).sqrt() for s, c in zip(squared, count, strict=True)]).mean()
        else:
            size = (torch.stack(squared).sum(0) + 1e-20).sqrt().mean()
        return {"kl": kl, "lp": size}

    def step(self, number: int) -> float:
        """Descend in the network, ascend in the multipliers."""
        items, draws = [self.items[i] for i in self.batches.at(number)], self.batches.draws(number)
        self.module.train()
        practice = self.practice(items, self.outers(items, draws), draws)
        updates = self.updates(items)
        after = self.run(updates, practice)
        edit = practice.parted(practice.asked.nll(after, self.smoothing))[0].mean()
        found = self.constraints(practice, after, updates)
        if self.config.objective == "penalty":
            loss = self.config.edit * edit + found["kl"]
        else:
            pairs = self.module.multipliers.items()
            loss = edit + sum(
                (value * (found[name] - self.notes[name]) for name, value in pairs), torch.zeros_like(edit)
            )
        parameters = [*self.network, *self.multipliers]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimisers["network"].param_groups[0]["lr"] = self.config.lr * self.pace(number)
        for optimiser in self.optimisers.values():
            optimiser.step()
        with torch.no_grad():
            for value in self.multipliers:
                value.clamp_(min=0)
        return float(edit.detach())

    def pace(self, number: int) -> float:
        """The share of the learning rate in a step: up to 1 in `warmup` steps, then down to 0 at the last."""
        warm, total = self.config.warmup, self.config.steps
        if number < warm:
            return (number + 1) / (warm + 1)
        return max(0.0, (total - number) / max(1, total - warm))

    def validate(self) -> dict[str, float]:
        """The figures; the margins shrink where most edits succeed."""
        found = super().validate()
        if found.get("success", 0.0) > self.config.margin_when:
            self.notes = {n: max(self.config.margin_factor * m, self.least[n]) for n, m in self.notes.items()}
        found |= {f"margin_{name}": self.notes[name] for name in constrained(self.config)}
        return found | {f"multiplier_{n}": round(float(v.detach()), 6) for n, v in self.module.multipliers.items()}


def _centred(parameters: Sequence[Tensor], lr: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr, centered=True, **options)
