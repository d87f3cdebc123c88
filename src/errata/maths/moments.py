"""Running mean and standard deviation of vectors, and what is z-scored by them."""

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """(x - mean) / (std + 1e-7), coordinate by coordinate, over all rows seen in training mode.

    Source: Welford 1962, in the form for batches (Chan et al. 1979); as MEND z-scores. Until two rows have been seen x passes as it
    is.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take rows x (N, width) into account."""
        new = x.detach().to(self.mean)
        if not len(new):
            return
        total = self.count + len(new)
        mean = new.mean(0)
        apart = mean - self.mean
        self.squares += (new - mean).square().sum(0) + apart.square() * self.count * len(new) / total
        self.mean += apart * len(new) / total
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        """(width,) the sample standard deviation of what was seen."""
        return (self.squares / (self.count - 1).clamp(min=1)).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """x (N, width) z-scored, in its own dtype; in training mode its rows count as well."""
        if self.training:
            self.add(x)
        if self.count < 2:
            return x
        return (x - self.mean.to(x)) / (self.std.to(x) + 1e-7)
