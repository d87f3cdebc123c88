"""Training Atlas: the optimiser against PyTorch's."""

import pytest
import torch

from errata.atlas.muon import Muon, orthogonal


def test_muon_is_that_of_pytorch() -> None:
    """Over five steps on matrices of two shapes, up to its bfloat16."""
    torch.manual_seed(0)
    start = [torch.randn(6, 10), torch.randn(10, 6), torch.randn(6, 10)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    one = Muon(ours, lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()


def test_orthogonal_moves_singular_values_to_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 8, 20, dtype=torch.float64)))
    assert values.min() > 0.6 and values.max() < 1.3
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    assert orthogonal(x).mT == pytest.approx(orthogonal(x.mT))
