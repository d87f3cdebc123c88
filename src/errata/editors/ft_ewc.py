"""Fine-tuning on a stream, tied to the weights that earlier edits need (elastic weight consolidation, Kirkpatrick et al. 2017).

Loss of the current request plus lambda sum_i F_i (theta_i - theta*_i)^2: F is the diagonal of the Fisher information, the mean
over the latest edits of the squared gradient of each one's own loss; theta* and F are taken after the last edit. As a baseline
of Hartvigsen et al. 2023.

Differs from the released code, which cannot run (it iterates over a parameter's name) and, if it could, would count the
current request as past, square gradients accumulated over requests, and divide by the memory's size even while it is not full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.editors._finetune import Tuner
from errata.editors._items import Item
from errata.editors.ft import FineTuner, FTConfig
from errata.errors import ConfigError


@dataclass(frozen=True)
class FTEWCConfig(FTConfig):
    """Settings: see `FTConfig`; always a stream. lam: lambda; memory: how many of the latest edits F is the mean over."""

    lr: float = 1e-2
    steps: int = 100
    until: Literal["loss", "says"] = "says"
    order: Literal["joint", "stream"] = "stream"
    lam: float = 0.1
    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order != "stream" or self.lam < 0 or self.memory < 1:
            raise ConfigError(f"expected order 'stream', lam of at least 0 and a memory of at least 1, found {self}")


class FTEWC(FineTuner[FTEWCConfig]):
    """Fine-tuning with elastic weight consolidation."""

    method = "ft_ewc"
    summary = "streaming fine-tuning tied to what earlier edits need (EWC, Kirkpatrick et al. 2017)"
    Config = FTEWCConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "atlas": {"lr": 3e-4},
        "atlas-llama": {"lr": 1e-3},
        "atlas-t5": {"lr": 1e-4},
        "atlas-docket": {"lr": 1e-3},
    }

    def edit(self, tuner: Tuner, item: Item, past: Sequence[Item], number: int) -> dict[str, Any]:
        """One request, with the penalty of the latest edits before it."""
        latest = past[-self.config.memory :]
        if not latest or not self.config.lam:
            return tuner.train([item])
        weights = fisher(tuner, latest)
        anchor = {name: delta.detach().clone() for name, delta in tuner.deltas.items()}

        def penalty(deltas: dict[str, Tensor]) -> Tensor:
            pulls = [(weights[name] * (delta - anchor[name]).square()).sum() for name, delta in deltas.items()]
            return self.config.lam * torch.stack([pull.to(pulls[0].device) for pull in pulls]).sum()

        return tuner.train([item], penalty)


def fisher(tuner: Tuner, items: Sequence[Item]) -> dict[str, Tensor]:
    """The diagonal of the Fisher information at the tuner's weights: the mean over items of the squared gradient of each item's loss."""
    total = {name: torch.zeros_like(delta, requires_grad=False) for name, delta in tuner.deltas.items()}
    for item in items:
        for name, gradient in tuner.gradients([item]).items():
            total[name] += gradient.square() / len(items)
    return total
