"""Fine-tuning on a stream that comes back to its past: every so many edits it is trained on all of them again.

A retraining is epochs over the past edits, a step for each, right or wrong by then. As a baseline of Hartvigsen et al. 2023.
Differs from the released code, which stops at the first retraining for want of an argument: what it ignores, the memory's size
and starting again from the model's own weights, are options here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from errata.editors._finetune import Tuner
from errata.editors._items import Item
from errata.editors.ft import FineTuner, FTConfig
from errata.errors import ConfigError


@dataclass(frozen=True)
class FTRetrainConfig(FTConfig):
    """Settings: see `FTConfig`; always a stream. every: edits between two retrainings; epochs of each; memory: on how many of
    the latest edits that no later request contradicts, None for all; reset: from the model's own weights, else from where the
    stream stands.
    """

    lr: float = 1e-2
    steps: int = 100
    until: Literal["loss", "says"] = "says"
    order: Literal["joint", "stream"] = "stream"
    every: int = 50
    epochs: int = 5
    memory: int | None = None
    reset: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order != "stream" or min(self.every, self.epochs, self.memory or 1) < 1:
            raise ConfigError(f"expected order 'stream', and every, epochs and memory of at least 1, found {self}")


class FTRetrain(FineTuner[FTRetrainConfig]):
    """Fine-tuning with periodic retraining."""

    method = "ft_retrain"
    summary = "streaming fine-tuning with periodic retraining on all edits so far (Hartvigsen et al. 2023)"
    Config = FTRetrainConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        **{name: {"lr": 1e-3} for name in ("atlas", "atlas-llama", "atlas-docket")},
        "atlas-t5": {"lr": 3e-4},
    }

    def edit(self, tuner: Tuner, item: Item, past: Sequence[Item], number: int) -> dict[str, Any]:
        """One request, and after every so many the past as well."""
        notes = tuner.train([item])
        if number % self.config.every == 0:
            if self.config.reset:
                tuner.reset()
            history = [*past, item][-(self.config.memory or number) :]
            passes = replace(self.config, steps=self.config.epochs, batch=1, until="loss", stop=0.0)
            notes["retrained"] = tuner.train(history, config=passes)
        return notes
