"""Low-rank parts: an update U Vᵀ of one linear map of the model, each column written by one edit.

A part is a value; how parts act on a model is `errata.low_rank_table` (as hooks) and `errata.merge` (in the weights).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import AnatomyError, ConfigError, ShapeError
from errata.model.anatomy import Anatomy, Site

ROLES = (
    "mlp_out",
    "mlp_in",
    "mlp_gate",
)  # the linear maps that the anatomy names; anything else is a path in the block


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update of one linear map: W becomes W + U Vᵀ, with W as (d_out, d_in) whichever way round the model stores it.

    edits: the id of the edit that wrote each column (a joint write has many edits, an edit may have several columns);
    U (d_out, r), V (d_in, r), r = len(edits); layer: the block, counted from 0 ("encoder.3": of an encoder-decoder's
    encoder); site: a role of the anatomy ("mlp_out")
    or a path inside the block ("self_attn.o_proj"), so that a part fits a model whatever it is wrapped in.
    Raises ShapeError for factors that do not fit, ConfigError for a layer that is no index.
    """

    edits: tuple[str, ...]
    U: Tensor
    V: Tensor
    layer: int | str
    site: str = "mlp_out"

    kind = "low-rank"

    def __post_init__(self) -> None:
        columns = [tuple(t.shape[1:]) for t in (self.U, self.V)]
        if not self.edits or columns != [(len(self.edits),)] * 2:
            raise ShapeError(
                f"expected U (d_out, {len(self.edits)}) and V (d_in, {len(self.edits)}), one column for each of at least "
                f"one edit, found {tuple(self.U.shape)} and {tuple(self.V.shape)} at layer {self.layer}"
            )
        number = self.layer.removeprefix("encoder.") if isinstance(self.layer, str) else self.layer
        if isinstance(self.layer, bool) or not str(number).isdecimal() or number == self.layer != int(number):
            raise ConfigError(
                f"expected a low-rank part's layer to be a number from 0, or one behind 'encoder.', found {self.layer!r}"
            )

    @property
    def rank(self) -> int:
        """The number of columns."""
        return len(self.edits)

    @property
    def norm(self) -> float:
        """Frobenius norm of U Vᵀ, weight units, without forming it."""
        U, V = self.U.double(), self.V.double()
        return float(((U.T @ U) * (V.T @ V)).sum().clamp(min=0).sqrt())

    def only(self, edit: str) -> "LowRank | None":
        """The columns of one edit; None if it has none."""
        return self._of([i for i, e in enumerate(self.edits) if e == edit])

    def without(self, edit: str) -> "LowRank | None":
        """The columns of all other edits; None if there are none. A joint write is not solved again for them."""
        return self._of([i for i, e in enumerate(self.edits) if e != edit])

    def _of(self, columns: list[int]) -> "LowRank | None":
        if len(columns) == self.rank:
            return self
        if not columns:
            return None
        at = torch.tensor(columns, device=self.U.device)
        edits = tuple(self.edits[i] for i in columns)
        return LowRank(edits, self.U[:, at], self.V[:, at.to(self.V.device)], self.layer, self.site)

    def path(self, parts: Anatomy) -> str:
        """The module's path in a model with these parts. Raises AnatomyError if the model has no such layer or map."""
        return map_path(parts, self.layer, self.site)

    # -- the file ----------------------------------------------------------------------------------------------------

    def header(self) -> dict[str, Any]:
        """The part's JSON header."""
        return {"kind": self.kind, "edits": list(self.edits), "layer": self.layer, "site": self.site}

    def tensors(self) -> dict[str, Tensor]:
        """The part's tensors by field name."""
        return {"U": self.U, "V": self.V}

    @classmethod
    def of(cls, header: dict[str, Any], tensors: dict[str, Tensor], gates: object = None) -> "LowRank":
        """The part of a header and its tensors; a low-rank part has no gate."""
        return cls(tuple(header["edits"]), tensors["U"], tensors["V"], header["layer"], header["site"])


def map_path(parts: Anatomy, layer: Site, site: str) -> str:
    """Path of a linear map: of a role of the anatomy, or by its path in the block. Raises AnatomyError if there is none."""
    block = parts.site(layer)
    if site not in ROLES:
        return f"{block}.{site}"
    stack, index = parts.stack_of(layer)
    paths: tuple[str, ...] = getattr(stack, site)
    if not paths:
        raise AnatomyError(f"expected one {site} per layer, found none in this {parts.family!r} model.")
    return paths[int(index)]


def stacked(parts: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """The sum of parts at one module as one pair of factors (U (d_out, r), V (d_in, r)): on CPU, at least float32."""
    dtype = torch.float32
    for tensor in (t for part in parts for t in (part.U, part.V)):
        dtype = torch.promote_types(dtype, tensor.dtype)
    U = torch.cat([part.U.detach().to("cpu", dtype) for part in parts], 1)
    return U, torch.cat([part.V.detach().to("cpu", dtype) for part in parts], 1)
