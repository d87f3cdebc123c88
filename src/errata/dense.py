"""Dense parts: parameters of the model plus a delta each, as fine-tuning leaves them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from errata.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Dense:
    """Parameters become W + delta: {name in `model.named_parameters()`: delta, of the parameter's shape as it is stored}.

    edits: the ids of the edits that wrote it, all together: none of them can be taken out alone.
    """

    edits: tuple[str, ...]
    deltas: dict[str, Tensor]

    kind = "dense"

    def __post_init__(self) -> None:
        if not self.edits or not self.deltas:
            raise ConfigError(
                f"expected a dense part of at least one edit and parameter, found {len(self.edits)} and {len(self.deltas)}"
            )

    def header(self) -> dict[str, Any]:
        """The part's JSON header."""
        return {"kind": self.kind, "edits": list(self.edits), "parameters": list(self.deltas)}

    def tensors(self) -> dict[str, Tensor]:
        """The part's tensors, named by their parameters' numbers."""
        return {f"deltas.{i}": delta for i, delta in enumerate(self.deltas.values())}

    @classmethod
    def of(cls, header: dict[str, Any], tensors: dict[str, Tensor], gates: object = None) -> "Dense":
        """The part of a header and its tensors; weights have no gate."""
        deltas = {name: tensors[f"deltas.{i}"] for i, name in enumerate(header["parameters"])}
        return cls(tuple(header["edits"]), deltas)
