"""MEND: networks that turn the factors of an edit's gradient into those of an update (Mitchell et al. 2022).

The gradient of a linear map is sum_t delta_t x_t^T over tokens. Inputs x and output gradients delta are z-scored with running
statistics, put end to end, passed through two low-rank residual layers that begin as the identity, and parted again:
W <- W - alpha sum_t delta~_t x~_t^T. Maps of one shape share a network, with a scale and an offset for each in its layers. It
is trained so that other wordings say the new object and KL keeps everything else. Each token of each request is a column of
its own, so requests of one call add up. Emits low-rank parts.

Differs from the released code by default (preset "paper" restores it): the update is subtracted, as a step down the gradient
is; the step sizes alpha have an optimiser that acts (in the code they get the networks' learning rate); the last layer may
lower a coordinate as well as raise it; first layers are drawn at 1/sqrt(width), so that small learning rates are not needed; the
new object is asked for at the prompt and a rephrase; ranks scale with the width. In a call of n requests each has its own
mean loss; the code takes the mean over all, which shrinks every delta by n.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from errata.editors._hypernetwork import (
    Fitting,
    HyperConfig,
    HyperEditor,
    HyperLearner,
    LinearMap,
    Parameters,
    Practice,
    Signal,
    Update,
    divergence,
    linear_maps,
    signals,
)
from errata.errors import ConfigError
from errata.maths.moments import Standardise
from errata.model.anatomy import anatomy
from errata.model.states import input_device
from errata.training import TrainingItem


@dataclass(frozen=True)
class MENDConfig(HyperConfig):
    """Settings of MEND; see `HyperConfig` for layers (None: the last three blocks, two of each stack of an encoder-decoder).

    rank: of the residual layers, None for a quarter of their width; normalise: z-score x and delta; spread: standard deviation of
    the first layers' random weights, None for 1 / sqrt(width); last: whether the last layer's residual is "linear" or, as
    the first's, clamped from below ("clamp"); sign: "minus" is down the gradient. rate: alpha's first value; rate_lr: Adam's for
    alpha, None to train it with the networks (the paper's 1e-4 never acts in its code; one step of it would double alpha). edit,
    locality: weights of the two losses; outer: where the new object is asked for, at the "prompt", a "rephrase" or "both".
    clip: of the gradient's norm.
    """

    parameters: Parameters = "mlp"
    lr: float = 1e-4
    rank: int | None = None
    normalise: bool = True
    spread: float | None = None
    last: Literal["linear", "clamp"] = "linear"
    sign: Literal["minus", "plus"] = "minus"
    rate: float = 1e-4
    rate_lr: float | None = 1e-5
    edit: float = 0.1
    locality: float = 1.0
    outer: Literal["both", "rephrase", "prompt"] = "both"
    clip: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (
            self.last in ("linear", "clamp"), self.sign in ("minus", "plus"), self.outer in ("both", "rephrase", "prompt"),
        )  # fmt: skip
        positive = (self.rate, self.clip, *(v for v in (self.rank, self.spread, self.rate_lr) if v is not None))
        if not all(known) or min(positive) <= 0 or min(self.edit, self.locality) < 0:
            raise ConfigError(
                "expected last 'linear' or 'clamp', sign 'minus' or 'plus', outer 'both', 'rephrase' or 'prompt', rank, spread, rate, "
                f"rate_lr and clip above 0, and edit and locality of at least 0, found {self}"
            )


_PAPER: dict[str, Any] = {
    "rank": 1920, "spread": 1.0, "last": "clamp", "sign": "plus", "rate_lr": None, "outer": "rephrase", "lr": 1e-6,
    "batch": 10, "retain": 1, "steps": 100_000, "every": 500, "held_out": 500,
}  # fmt: skip
# Chosen on Atlas's dev facts, whose statements end behind the object.
_ATLAS: dict[str, Any] = {"layers": "all", "ending": ".", "batch": 4, "retain": 2, "steps": 1000, "every": 100}


class MEND(HyperEditor[MENDConfig]):
    """Model editor networks with gradient decomposition."""

    method = "mend"
    summary = "networks that turn an edit's gradient into a low-rank update (Mitchell et al. 2022)"
    Config = MENDConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": _PAPER,
        "mend-cf": {"name": "mend-cf"},
        "atlas": _ATLAS,
        "atlas-cf": {**_ATLAS, "name": "mend-cf"},
        "atlas-t5": {**_ATLAS, "ending": "", "steps": 3000},  # an answer is closed by its end token
        "atlas-docket": {**_ATLAS, "ending": "", "edit": 1.0, "lr": 1e-3, "steps": 2000},
    }

    def maps(self, model: Any, config: MENDConfig) -> list[LinearMap]:
        """The MLPs' linear maps of the last blocks."""
        last = 2 if anatomy(model).role == "encoder-decoder" else 3
        return linear_maps(model, config.layers, config.parameters, last)

    def network(self, model: Any, maps: Sequence[LinearMap], config: MENDConfig) -> "EditNetworks":
        """A network for each shape among the maps."""
        dtype = torch.promote_types(model.dtype, torch.float32)
        return EditNetworks(maps, config).to(input_device(model), dtype)

    def learner(
        self, model: Any, tokenizer: Any, items: Sequence[TrainingItem], held_out: Sequence[TrainingItem], seed: int
    ) -> "MENDLearner":
        """The networks with their optimisers."""
        maps = self.maps(model, self.config)
        network = self.network(model, maps, self.config)
        return MENDLearner(self.config, model, tokenizer, items, held_out, network, maps, seed)

    def propose(
        self, config: MENDConfig, network: "EditNetworks", fitting: Fitting
    ) -> tuple[list[Update], list[dict[str, Any]]]:
        """One step of the networks from the unedited model."""
        found = network(signals(fitting.model, fitting.maps, fitting.asked())[0])
        return found, [{} for _ in fitting.requests]


# -- the networks ------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """z + f(s_l * (U V z + b) + o_l) of (..., width); f clamps from below, or is linear. U, b, o are zero at first, s is one."""

    def __init__(self, width: int, rank: int, modes: int, spread: float, clamped: bool):
        super().__init__()
        self.V = nn.Parameter(spread * torch.randn(rank, width))
        self.U = nn.Parameter(torch.zeros(width, rank))
        self.b = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.offset = nn.Parameter(torch.zeros(modes, width))
        self.clamped = clamped

    def forward(self, z: Tensor, mode: int) -> Tensor:
        """z (..., width) of the map `mode`."""
        added = self.scale[mode] * (z @ self.V.mT @ self.U.mT + self.b) + self.offset[mode]
        # relu has no gradient at zero, where every coordinate begins, and would never be trained; clamp has.
        return z + (added.clamp(min=0) if self.clamped else added)


class EditNetwork(nn.Module):
    """What maps of one shape share: the statistics of x and delta, and two residual layers."""

    def __init__(self, d_in: int, d_out: int, modes: int, config: MENDConfig):
        super().__init__()
        width = d_in + d_out
        rank = min(config.rank or max(1, width // 4), width)
        spread = config.spread if config.spread is not None else width**-0.5
        self.x, self.delta = (Standardise(d) if config.normalise else None for d in (d_in, d_out))
        self.layers = nn.ModuleList(
            [
                Residual(width, rank, modes, spread, True),
                Residual(width, rank, modes, spread, config.last == "clamp"),
            ]
        )

    def forward(self, x: Tensor, delta: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        """x (N, d_in) and delta (N, d_out) of N tokens, as they are to be multiplied."""
        if self.x is not None and self.delta is not None:
            x, delta = self.x(x), self.delta(delta)
        z = torch.cat([x, delta], -1)
        for layer in self.layers:
            z = layer(z, mode)
        return z[:, : x.shape[-1]], z[:, x.shape[-1] :]


class EditNetworks(nn.Module):
    """The networks of all maps, and each map's step size alpha."""

    def __init__(self, maps: Sequence[LinearMap], config: MENDConfig):
        super().__init__()
        shapes: dict[str, list[LinearMap]] = {}
        for m in maps:
            shapes.setdefault(f"{m.d_out}x{m.d_in}", []).append(m)
        self.networks = nn.ModuleDict(
            {shape: EditNetwork(own[0].d_in, own[0].d_out, len(own), config) for shape, own in shapes.items()}
        )
        self.rates = nn.Parameter(torch.full((len(maps),), config.rate))
        self._at = [(shape, shapes[shape].index(m)) for m in maps for shape in [f"{m.d_out}x{m.d_in}"]]
        self._sign = -1.0 if config.sign == "minus" else 1.0

    def forward(self, found: Sequence[Signal]) -> list[Update]:
        """The update of each map, for the n edits whose signals these are; tokens that say nothing have zero columns."""
        updates = []
        for signal, (shape, mode), rate in zip(found, self._at, self.rates, strict=True):
            dtype = self.rates.dtype
            there = signal.x.abs().amax(-1).bool() & signal.delta.abs().amax(-1).bool()
            x, delta = self.networks[shape](signal.x[there].to(dtype), signal.delta[there].to(dtype), mode)
            V, U = (torch.zeros_like(t, dtype=dtype) for t in (signal.x, signal.delta))
            V[there], U[there] = x, self._sign * rate * delta
            updates.append(Update(U.mT, V.mT))
        return updates


class MENDLearner(HyperLearner):
    """L = c_edit NLL(new object | outer prompts) + c_loc KL(before || after), mean over the edits of a batch."""

    everywhere = True
    module: EditNetworks

    def __init__(self, config: MENDConfig, *args: Any):
        super().__init__(config, *args)
        self.config = config
        networks, rates = list(self.module.networks.parameters()), [self.module.rates]
        if config.rate_lr is None:
            self.optimisers = {"all": torch.optim.Adam([*networks, *rates], config.lr)}
        else:
            self.optimisers = {
                "networks": torch.optim.Adam(networks, config.lr),
                "rates": torch.optim.Adam(rates, config.rate_lr),
            }

    def updates(self, items: Sequence[TrainingItem]) -> list[Update]:
        """The networks' updates."""
        found: list[Update] = self.module(self.inner(items))
        return found

    def outers(self, items: Sequence[TrainingItem], draws: Any) -> list[list[str]]:
        """Where each item's new object is asked for."""
        rephrases = [draws.choice(item.rephrases or (item.prompt,)) for item in items]
        pairs = [[item.prompt, rephrase] for item, rephrase in zip(items, rephrases, strict=True)]
        chosen = {"both": slice(0, 2), "prompt": slice(0, 1), "rephrase": slice(1, 2)}[self.config.outer]
        return [pair[chosen] for pair in pairs]

    def loss(self, practice: Practice, after: Tensor) -> Tensor:
        """Nats, of the logits under the edits."""
        said, _ = practice.parted(practice.asked.nll(after))
        _, kept = practice.parted(after)
        kept_apart = divergence(practice.before, kept, practice.where).mean()
        return self.config.edit * said.mean() + self.config.locality * kept_apart

    def step(self, number: int) -> float:
        """One step on a batch of items."""
        items, draws = [self.items[i] for i in self.batches.at(number)], self.batches.draws(number)
        self.module.train()
        practice = self.practice(items, self.outers(items, draws), draws)
        loss = self.loss(practice, self.run(self.updates(items), practice))
        parameters = list(self.module.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        for optimiser in self.optimisers.values():
            optimiser.step()
        return float(loss.detach())
