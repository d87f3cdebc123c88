"""Memory: a linear map's output replaced by attention over learned slots, for every input (Hartvigsen et al. 2023).

out = sum_j softmax(U q + b)_j v_j over the slots, with q the map's input. It always answers, so whatever the map did before is
lost: a baseline that shows what a memory without deferral costs. Emits one routed part.

Differs from the published code by default (preset "published" restores it): each token asks for itself, and training ends once
the model says the object.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.codebook import remember
from errata.editors._adapter import AdapterConfig, AdapterEditor
from errata.errors import ConfigError


@dataclass(frozen=True)
class MemoryConfig(AdapterConfig):
    """Settings: see `AdapterConfig`. slots: learned values."""

    slots: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise ConfigError(f"expected at least 1 slot, found {self.slots}")


class Memory(AdapterEditor[MemoryConfig]):
    """Attention over learned values in the place of a linear map."""

    method = "memory"
    summary = "one layer's output replaced by attention over learned slots (Hartvigsen et al. 2023)"
    form = "memory"
    Config = MemoryConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"replace": "all", "stop": 0.0, "skip": False},
        "atlas": {"lr": 1e-2},
        "atlas-llama": {"lr": 1e-2},
        "atlas-t5": {"lr": 1e-3},
        "atlas-docket": {"layer": 1, "lr": 1e-2},
    }

    def blank(self, a: int, b: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores as drawn for a new layer, U(-1, 1) / sqrt(a); values U[0, 1)."""

        def drawn(*shape: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=generator) - 1) / a**0.5

        n = self.config.slots
        return {"U": drawn(n, a), "b": drawn(n), "V": torch.rand(n, b, generator=generator)}

    def answer(self, weights: dict[str, Tensor], q: Tensor, y: Tensor) -> Tensor:
        """The slots' answer; y is not looked at."""
        return remember(weights, q)
