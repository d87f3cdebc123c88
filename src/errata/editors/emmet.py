"""EMMET: many facts at once under equality constraints (Gupta et al. 2024).

Keys and values are MEMIT's, at one layer by default; the write is the smallest change of the weight that maps every key to
its value, where MEMIT's trades the one for the other. With one edit it is ROME's write; with lambda_e > 0 the constraint is
softened and it is MEMIT's single-layer write with lambda = lambda_c * lambda_e.

Differs from the published code by default (preset "published" restores it): lambda_e = 0, so that values are met exactly.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from errata.editors._weights import third
from errata.editors.memit import MEMIT, MEMITConfig
from errata.errors import ConfigError
from errata.maths.least_squares import Factors, Solver, emmet_write
from errata.model.statistics import KeyStatistics


@dataclass(frozen=True)
class EMMETConfig(MEMITConfig):
    """Settings of EMMET: MEMIT's, of which lam and s0 have no meaning here.

    layers: None for the one a third of the way up. lambda_e: 0 for equality; lambda_c: weight of C, of no effect then.
    """

    lambda_e: float = 0.0
    lambda_c: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lambda_e >= 0 and self.lambda_c > 0):
            raise ConfigError(
                f"expected lambda_e of at least 0 and lambda_c above 0, found {self.lambda_e} and {self.lambda_c}"
            )


class EMMET(MEMIT):
    """Equality-constrained mass model editing."""

    method = "emmet"
    summary = "many edits at once, each met exactly, in the MLP of one layer (Gupta et al. 2024)"
    Config = EMMETConfig
    config: EMMETConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {name: value for name, value in MEMIT.presets["published"].items() if name != "lam"}
        | {"lambda_e": 0.1},
    }

    def layers(self, model: Any) -> list[int]:
        """The edited layers, counted from 0, ascending."""
        return super().layers(model) if self.config.layers is not None else [third(model)]

    def solve(self, statistics: KeyStatistics | None, solver: Solver, K: Tensor, R: Tensor) -> Factors:
        """The write of one layer, U V^T for keys K (m, B) and residuals R (d, B)."""
        return emmet_write(solver, K, R, self.config.lambda_e, self.config.lambda_c)
