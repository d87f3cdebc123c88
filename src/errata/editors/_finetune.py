"""What the fine-tuning editors share: parameters by layer, deltas beside frozen weights, steps, and norms that hold."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from errata.editors._items import layer_of, losses_and_says, says
from errata.editors._value_rows import Row
from errata.errors import AnatomyError, ConfigError
from errata.low_rank import map_path
from errata.low_rank_table import base_layer
from errata.model.anatomy import Site, anatomy, submodule

Penalty = Callable[[dict[str, Tensor]], Tensor]
"""Deltas -> a loss to be added, nats."""
SHARE = (
    0.01  # of the weights' own size: what FT-L's published eps come to on the models that they were chosen for, about
)
HELD = 1 - 1e-6  # a projection ends just inside its ball, so that rounding cannot carry it out


@dataclass(frozen=True)
class TrainConfig:
    """How deltas are trained.

    layers: which blocks, from 0 or negative from the end, of an encoder-decoder's encoder as "encoder.0"; "first": block 0, of
    an encoder-decoder the encoder's; "all", of both stacks; or None for the method's own choice. parameters: which of a
    block's: a role of the anatomy ("mlp_out") or a path in the block, for that map's weight and bias; "weights", the matrices
    of all its linear maps (no biases, norms, embeddings); "block", everything. objective: "target_new", teacher forced, or
    "prompt_last" (published), all target tokens at the prompt's last position. steps: epochs; lr, optimizer: "adam" or
    "rmsprop"; batch: requests in a step. stop: nats below which a batch makes no step, and an epoch is the last; until: "loss"
    or "says", to end as soon as the model says the targets. norm, eps: of the change that acts (W + delta, rounded to
    the weight's dtype, less W), held after every step: "linf" max |change| <= eps for each parameter (FT-L), "l2" the Frobenius
    norm over all parameters <= eps (Zhu et al. 2020, both), None; eps None with a norm: `SHARE` of the chosen weights' own,
    their root mean square for "linf" and their Frobenius norm for "l2".
    ending: text that the model is to say behind the new object.
    """

    layers: tuple[Site, ...] | Literal["first", "all"] | None = None
    parameters: str = "mlp_out"
    objective: Literal["target_new", "prompt_last"] = "target_new"
    steps: int = 25
    lr: float = 5e-4
    optimizer: Literal["adam", "rmsprop"] = "adam"
    batch: int = 64
    stop: float = 0.01
    until: Literal["loss", "says"] = "loss"
    norm: Literal["linf", "l2"] | None = None
    eps: float | None = None
    ending: str = ""

    def __post_init__(self) -> None:
        known = (
            self.objective in ("target_new", "prompt_last"), self.optimizer in ("adam", "rmsprop"),
            self.until in ("loss", "says"), self.norm in ("linf", "l2", None),
            not isinstance(self.layers, str) or self.layers in ("first", "all"),
        )  # fmt: skip
        if not all(known) or self.layers == ():
            raise ConfigError(
                "expected layers None, 'first', 'all' or indices, objective 'target_new' or 'prompt_last', optimizer 'adam' or 'rmsprop', "
                f"until 'loss' or 'says' and norm 'linf', 'l2' or None, found {self}"
            )
        if min(self.steps, self.batch, self.lr) <= 0 or self.stop < 0:
            raise ConfigError(f"expected steps, batch and lr above 0 and stop of at least 0, found {self}")
        if self.eps is not None and (self.norm is None or not self.eps > 0):
            raise ConfigError(
                f"expected a norm with an eps above 0, a norm alone, or neither, found norm={self.norm!r} and eps={self.eps!r}"
            )


def parameters_of(model: nn.Module, layers: Iterable[Site], which: str) -> list[str]:
    """Names of the parameters that `which` selects in these blocks (see `TrainConfig`).

    Raises AnatomyError if there are none. Blocks are found by their path, so layer 2 is never taken for 20.
    """
    parts = anatomy(model)
    names: dict[str, None] = {}
    for layer in layers:
        block = parts.site(layer)
        modules = dict(submodule(model, block).named_modules())
        if which == "block":
            names |= {f"{block}.{name}": None for name, _ in submodule(model, block).named_parameters()}
        elif which == "weights":
            names |= {
                f"{block}.{name}.weight": None for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)
            }
        else:
            path = map_path(parts, layer, which)
            whole = submodule(model, path)
            own = base_layer(whole)
            path = path if own is whole else f"{path}.base_layer"
            names |= {f"{path}.{name}": None for name, _ in own.named_parameters(recurse=False)}
    if not names:
        raise AnatomyError(f"expected parameters at {which!r} in the layers {list(layers)}, found none.")
    return list(names)


def layers_of(model: nn.Module, layers: Sequence[Site] | str | None, default: Site) -> list[Site]:
    """Blocks from 0 in the order in which they run, of an encoder-decoder's encoder as "encoder.0".

    layers: see `TrainConfig`. Raises AnatomyError for one that is not there, naming the valid range.
    """
    parts = anatomy(model)
    everything: list[Site] = [f"encoder.{i}" for i in range(parts.encoder.n_layers)] if parts.encoder else []
    everything += range(parts.n_layers)
    if isinstance(layers, str):
        return everything if layers == "all" else everything[:1]
    chosen = {layer_of(model, layer, default) for layer in ([default] if layers is None else layers)}
    return [layer for layer in everything if layer in chosen]


class Tuner:
    """Deltas of some parameters, trained beside the model's own weights, which are never written."""

    def __init__(self, model: Any, names: Sequence[str], config: TrainConfig, start: dict[str, Tensor] | None = None):
        self.model, self.config = model, config
        held = dict(model.named_parameters(remove_duplicate=False))
        self.weights = {name: held[name].detach() for name in names}
        chosen = {id(held[name]) for name in names}
        self._tied = sum(id(parameter) in chosen for parameter in held.values()) > len(chosen)
        self.deltas: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            delta = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            if start is not None and name in start:
                delta += start[name].to(delta)
            self.deltas[name] = delta.requires_grad_()
        self.eps = config.eps if config.eps is not None or config.norm is None else SHARE * self._own_size()
        if start:
            self.project()

    def _own_size(self) -> float:
        """The chosen weights' root mean square ("linf") or Frobenius norm ("l2")."""
        squares = float(sum(weight.double().square().sum().cpu() for weight in self.weights.values()))
        return (squares if self.config.norm == "l2" else squares / sum(w.numel() for w in self.weights.values())) ** 0.5

    def call(self, **inputs: Any) -> Any:
        """The model with its deltas."""
        acting = {name: self._acting(name) for name in self.deltas}
        # To look for tied weights takes a fifth of a step of a small model, and weights of blocks are seldom tied.
        return functional_call(self.model, acting, (), inputs, tie_weights=self._tied)

    def says(self, items: Sequence[Row]) -> list[bool]:
        """Whether the model with its deltas says each item's target."""
        return says(self.model, items, self.call)

    def loss(self, items: Sequence[Row]) -> Tensor:
        """Mean loss of the items, nats."""
        return self.look(items)[0]

    def look(self, items: Sequence[Row]) -> tuple[Tensor, bool]:
        """(mean loss of the items, whether the model with its deltas says all their targets), in one pass."""
        losses, said = losses_and_says(self.model, items, self.call, self.config.objective == "prompt_last")
        return losses.mean(), all(said)

    def gradients(self, items: Sequence[Row]) -> dict[str, Tensor]:
        """The gradient of the mean loss of the items."""
        with torch.enable_grad():
            found = torch.autograd.grad(self.loss(items), list(self.deltas.values()))
        return dict(zip(self.deltas, found, strict=True))

    def train(
        self, items: Sequence[Row], penalty: Penalty | None = None, config: TrainConfig | None = None
    ) -> dict[str, Any]:
        """Optimise on the items with a fresh optimiser; notes for the report: mean loss of each epoch, nats, and the steps made.

        config: of this training, where it is not the tuner's own.
        """
        config, curve, made = config or self.config, list[float](), 0
        values = list(self.deltas.values())
        adam = config.optimizer == "adam"
        stepping: Any = torch.optim.Adam(values, config.lr) if adam else torch.optim.RMSprop(values, config.lr)
        asks = config.until == "says"
        for _ in range(config.steps):
            if asks and curve and len(items) > config.batch and all(self.says(items)):
                break
            total = 0.0
            for start in range(0, len(items), config.batch):
                chunk = items[start : start + config.batch]
                with torch.enable_grad():
                    loss, said = self.look(chunk)
                    if asks and curve and said and len(chunk) == len(items):
                        return {"curve": curve, "steps": made}
                    whole = loss if penalty is None else loss + penalty(self.deltas).to(loss.device)
                total += float(loss.detach()) * len(chunk)
                if float(loss.detach()) < config.stop:
                    continue
                gradients = torch.autograd.grad(whole, list(self.deltas.values()))
                for delta, gradient in zip(self.deltas.values(), gradients, strict=True):
                    delta.grad = gradient
                stepping.step()
                made += 1
                self.project()
            curve.append(round(total / len(items), 4))
            if curve[-1] < config.stop:
                break
        return {"curve": curve, "steps": made}

    @torch.no_grad()
    def project(self) -> None:
        """Bring the deltas back into the ball of the norm constraint, where they are outside."""
        if self.eps is None:
            return
        if self.config.norm == "linf":
            bound = self.eps * HELD
            for name, delta in self.deltas.items():
                down, up = (_reach(self.weights[name], way).to(delta.dtype) for way in (-bound, bound))
                delta.clamp_(down, up)
            return
        less = 1 - HELD
        while (size := self.size()) > self.eps:
            for delta in self.deltas.values():
                delta.mul_((1 - less) * self.eps / size)
            less = min(0.5, 10 * less)  # where rounding W + delta carries it out again

    @torch.no_grad()
    def size(self) -> float:
        """The Frobenius norm of all changes together, weight units."""
        changes = (self._acting(name).double() - self.weights[name].double() for name in self.deltas)
        return float(sum(change.square().sum().cpu() for change in changes) ** 0.5)

    def _acting(self, name: str) -> Tensor:
        """The weight with its delta, as the model runs with it."""
        return (self.weights[name] + self.deltas[name]).to(self.weights[name].dtype)

    def reset(self) -> None:
        """Back to the model's own weights."""
        with torch.no_grad():
            for delta in self.deltas.values():
                delta.zero_()

    def done(self) -> dict[str, Tensor]:
        """The deltas, on the CPU."""
        return {name: delta.detach().cpu().clone() for name, delta in self.deltas.items()}


def _reach(weight: Tensor, bound: float) -> Tensor:
    """The change of each weight to the last number of its dtype that lies at W + bound or before, in float64. bound: of either sign."""
    wide = weight.double()
    there = (wide + bound).to(weight.dtype)
    beyond = (there.double() - wide).abs() > abs(bound)
    return torch.where(beyond, torch.nextafter(there, weight), there).double() - wide
