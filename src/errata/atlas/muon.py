"""Muon in a precision of one's own: momentum, orthogonalised by Newton-Schulz steps (Jordan et al. 2024, Liu et al. 2025).

As `torch.optim.Muon` with `match_rms_adamw`, which always orthogonalises in bfloat16: on processors without it that takes
longer than everything else together. Matrices of one shape go through the steps in one batch.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the quintic: steep at zero, bounded to about [0.7, 1.2] in the end
STEPS = 5


class Muon(torch.optim.Optimizer):
    """For matrices (out, in). lr: as of AdamW, since updates have its root mean square; half: orthogonalise in bfloat16."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95, half: bool = False
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.half = half

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update with Nesterov momentum; decay is by lr * weight_decay."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in (p for p in group["params"] if p.grad is not None):
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                made = orthogonal(updates.bfloat16() if self.half else updates).to(updates.dtype)
                for parameter, update in zip(parameters, made, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        assert parameter.grad is not None
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonal(x: Tensor) -> Tensor:
    """(n, a, b) matrices with their singular values moved to about 1, by Newton-Schulz steps."""
    a, b, c = COEFFICIENTS
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.mT
