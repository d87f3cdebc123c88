"""Defer: a gate at one layer that hands a query over to a linear map of its own (Hartvigsen et al. 2023, after SERAC).

g(q) = sigmoid(w q + b) and h(q) = A q + c on the input q of one linear map f. Training mixes, g h(q) + (1 - g) f(x) at every
token x that is replaced; afterwards the output there is h(q) where g(q) reaches the threshold, else f(x). The gate only ever
sees what is to be edited, so it drifts towards "always": a weak stand-in for a scope classifier. Emits one routed part.

Differs from the published code by default (preset "published" restores it): each token asks for itself, training ends once the
model says the object, and the threshold is an option.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.codebook import Place, Routed, defer
from errata.editors._adapter import AdapterConfig, AdapterEditor
from errata.errors import ConfigError


@dataclass(frozen=True)
class DeferConfig(AdapterConfig):
    """Settings: see `AdapterConfig`. threshold: of the gate, in [0, 1]."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"expected a threshold from 0 to 1, found {self.threshold}")


class Defer(AdapterEditor[DeferConfig]):
    """A gate and a linear map beside the model's own."""

    method = "defer"
    summary = "a gate at one layer that hands over to a linear map of its own (Hartvigsen et al. 2023)"
    form = "defer"
    scoped = True
    Config = DeferConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"replace": "all", "stop": 0.0, "skip": False},
        "gpt-j-6b": {"replace": "all", "stop": 0.0, "skip": False, "layer": 25, "lr": 7e-5},
        "llama-2-7b": {"replace": "all", "stop": 0.0, "skip": False, "layer": 27, "lr": 7e-5},
        "atlas": {"lr": 1e-4},
        "atlas-llama": {"lr": 1e-3},
        "atlas-t5": {"lr": 1e-4},
        "atlas-docket": {"layer": 1, "lr": 1e-2},
    }

    def blank(self, a: int, b: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Linear maps as drawn for a new layer: U(-1, 1) / sqrt(a)."""

        def drawn(*shape: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=generator) - 1) / a**0.5

        return {"w": drawn(a), "b": drawn(1), "A": drawn(b, a), "c": drawn(b)}

    def answer(self, weights: dict[str, Tensor], q: Tensor, y: Tensor) -> Tensor:
        """The mixture g h(q) + (1 - g) y."""
        gate, answers = defer(weights, q)
        return gate[..., None] * answers + (1 - gate[..., None]) * y

    def part(self, edits: tuple[str, ...], weights: dict[str, Tensor], place: Place) -> Routed:
        """The adapter with the configured threshold."""
        return Routed(edits, self.form, weights, place, self.config.threshold)
