"""The closed forms against dense oracles in float64: KKT systems, stacked least squares, and each other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.errors import ConfigError, ShapeError, UnstableWriteError
from errata.maths.least_squares import emmet_write, memit_write, rank_one
from errata.model.anatomy import anatomy
from errata.model.hooks import Capture
from errata.model.tokens import encode

Tiny = Callable[..., Any]
M, D = 12, 5


class Dense:
    """Solves with C by elimination, whatever the other code does."""

    def __init__(self, C: Tensor):
        self.C = C

    def solve(self, rhs: Tensor) -> Tensor:
        return torch.linalg.solve(self.C, rhs)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(m: int = M, n: int = 200, seed: int = 1) -> Tensor:
    """An uncentred second moment with a spread of scales and a mean away from zero."""
    x = random(n, m, seed=seed) * torch.linspace(0.1, 3, m, dtype=torch.float64) + random(m, seed=seed + 1)
    return x.T @ x / n


def constrained(C: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """(d, m) the minimum of tr(D C D^T) with D K = R, row by row from the KKT system."""
    m, B = K.shape
    kkt = torch.cat([torch.cat([2 * C, K], 1), torch.cat([K.T, torch.zeros(B, B, dtype=K.dtype)], 1)])
    right = torch.cat([torch.zeros(m, len(R), dtype=K.dtype), R.T])
    return torch.linalg.solve(kkt, right)[:m].T


def stacked(C: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """(d, m) the least-squares solution of [sqrt(lam) C^(1/2); K^T] D^T = [0; R^T]."""
    root = torch.linalg.cholesky(C).T * lam**0.5
    left, right = torch.cat([root, K.T]), torch.cat([torch.zeros(len(C), len(R), dtype=K.dtype), R.T])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


def dense(factors: tuple[Tensor, Tensor]) -> Tensor:
    U, V = factors
    assert U.dtype == V.dtype == torch.float64
    return U @ V.T


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert float((a - b).norm()) <= tolerance * float(b.norm())


def test_rank_one_is_the_constrained_least_squares_write() -> None:
    C, k, r = moment(), random(M), random(D, seed=3)
    U, V = rank_one(Dense(C), k, k, r)
    assert U.shape == (D, 1) and V.shape == (M, 1)
    close(dense((U, V)) @ k, r)
    close(dense((U, V)), constrained(C, k[:, None], r[:, None]))
    other = random(M, seed=9)
    unseen = other - k * float(other @ torch.linalg.solve(C, k)) / float(k @ torch.linalg.solve(C, k))
    assert float((dense((U, V)) @ unseen).norm()) < 1e-9  # x with x^T C^-1 k = 0 is not touched
    close(dense(rank_one(Dense(1e5 * C), k, k, r)), dense((U, V)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_write_gives_the_value_at_the_mean_key_of_a_real_projection(
    family: str, tiny: Tiny, tokenizer: Any
) -> None:
    model = tiny(family).double()
    parts = anatomy(model)
    path = parts.mlp_site(1)
    texts = [
        "The capital of France",
        "Once more. The capital of France",
        "The highest point on Earth is Mount Everest.",
    ]
    keys = []
    for text in texts:
        with torch.no_grad(), Capture(model, [path], of="input") as seen:
            model(**encode(tokenizer, [text]).inputs(model))
        keys.append(seen[path][0])
    mean = (keys[0][-1] + keys[1][-1]) / 2
    samples = torch.cat(keys + [random(80, len(mean))])
    value = random(32, seed=5)
    module = parts.module(model, path)
    with torch.no_grad():
        r = value - module(mean)
        change = dense(rank_one(Dense(samples.T @ samples / len(samples)), mean, mean, r))
        module.weight += change.T if parts.mlp_out_transposed else change
        close(module(mean), value)


def test_the_published_mixed_key_meets_its_constraint_at_a_cost() -> None:
    C, k, r = moment(), random(M), random(D, seed=3)
    mean = k + 0.5 * random(M, seed=4)
    change, best = dense(rank_one(Dense(C), mean, k, r)), constrained(C, k[:, None], r[:, None])
    close(change @ k, r)
    inner = lambda a, b: float(a @ torch.linalg.solve(C, b))  # noqa: E731
    cosine = inner(mean, k) / (inner(mean, mean) * inner(k, k)) ** 0.5
    cost, least = (float(torch.trace(x @ C @ x.T)) for x in (change, best))
    assert cost > least and cost == pytest.approx(least / cosine**2, rel=1e-9)


def test_rank_one_refuses_keys_at_right_angles() -> None:
    C, k, r = moment(), random(M), random(D, seed=3)
    other = random(M, seed=9)
    dual = torch.linalg.solve(C, k)
    across = other - k * float(other @ dual) / float(k @ dual)
    for mean in (across, across + 1e-4 * k):
        with pytest.raises(UnstableWriteError, match="cosine"):
            rank_one(Dense(C), mean, k, r)
    rank_one(Dense(C), -k, k, r)  # opposite is fine: the sign cancels
    rank_one(Dense(C), across + k, k, r)
    with pytest.raises(UnstableWriteError):
        rank_one(Dense(C), torch.zeros(M, dtype=torch.float64), k, r)
    with pytest.raises(ShapeError, match=r"\(12,\), \(11,\)"):
        rank_one(Dense(C), k, k[1:], r)


@pytest.mark.parametrize("lam", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("B", [1, 4, M, 30])
def test_memit_is_stacked_least_squares(B: int, lam: float) -> None:
    C, K, R = moment(), random(M, B), random(D, B, seed=7)
    U, V = memit_write(C, K, R, lam)
    assert U.shape == (D, B) and V.shape == (M, B)
    close(dense((U, V)), stacked(C, K, R, lam), 1e-8)
    close(dense(memit_write(C, K, R, lam, solver=Dense(C))), dense((U, V)), 1e-8)


def test_one_pair_of_memit_is_a_share_of_rome() -> None:
    C, k, r, lam = moment(), random(M), random(D, seed=3), 2.5
    s = float(k @ torch.linalg.solve(lam * C, k))
    close(dense(memit_write(C, k[:, None], r[:, None], lam)), s / (1 + s) * dense(rank_one(Dense(C), k, k, r)))


def test_the_average_key_keeps_the_share_that_the_docstring_says() -> None:
    x = random(500, M, seed=2)
    C = x.T @ x / len(x)
    assert float((x @ torch.linalg.solve(C, x.T)).diagonal().mean()) == pytest.approx(M, rel=1e-9)


def test_memit_between_an_exact_fit_and_nothing() -> None:
    C, K, R = moment(), random(M, 4), random(D, 4, seed=7)
    close(dense(memit_write(C, K, R, 1e-10)) @ K, R, 1e-6)
    close(dense(memit_write(C, K, R, 1e-10)), constrained(C, K, R), 1e-6)
    assert float(dense(memit_write(C, K, R, 1e10)).norm()) < 1e-7


def test_emmet_is_the_constrained_write_whatever_lambda_c() -> None:
    C, K, R = moment(), random(M, 4), random(D, 4, seed=7)
    change = dense(emmet_write(Dense(C), K, R))
    close(change @ K, R)
    close(change, constrained(C, K, R))
    close(dense(emmet_write(Dense(C), K, R, 0.0, 1e4)), change)
    close(dense(emmet_write(Dense(C), K[:, :1], R[:, :1])), dense(rank_one(Dense(C), K[:, 0], K[:, 0], R[:, 0])))


@pytest.mark.parametrize("B", [1, 4, 20])
def test_emmet_with_lambda_e_is_memit(B: int) -> None:
    C, K, R = moment(), random(M, B), random(D, B, seed=7)
    close(dense(emmet_write(Dense(C), K, R, 0.1, 30.0)), dense(memit_write(C, K, R, 3.0)), 1e-8)


def test_emmet_meets_keys_that_repeat_in_the_mean() -> None:
    C, K, R = moment(), random(M, 3), random(D, 3, seed=7)
    twice, wants = torch.cat([K, K[:, :1]], 1), torch.cat([R, R[:, :1] + 1], 1)
    mean = torch.cat([R[:, :1] + 0.5, R[:, 1:]], 1)
    close(dense(emmet_write(Dense(C), twice, wants)), constrained(C, K, mean), 1e-6)


def test_bad_input_is_named() -> None:
    C, K, R = moment(), random(M, 4), random(D, 4, seed=7)
    with pytest.raises(ConfigError, match="above 0"):
        memit_write(C, K, R, 0.0)
    with pytest.raises(ShapeError, match=r"\(12, 4\) and \(5, 3\)"):
        memit_write(C, K, R[:, 1:], 1.0)
    with pytest.raises(ShapeError, match=r"\(11, 11\)"):
        memit_write(C[1:, 1:], K, R, 1.0)
    with pytest.raises(ConfigError, match="lambda_e"):
        emmet_write(Dense(C), K, R, -1.0)
    flat = torch.ones(M, M, dtype=torch.float64)
    with pytest.raises(UnstableWriteError, match="statistics"):
        memit_write(flat - 2 * torch.eye(M, dtype=torch.float64), K, R, 1.0)


def test_inputs_in_single_precision_are_solved_in_double_and_left_alone() -> None:
    C, K, R = moment(), random(M, 4).float(), random(D, 4, seed=7).float()
    copies = C.clone(), K.clone(), R.clone()
    close(dense(memit_write(C, K, R, 1.0)), stacked(C, K.double(), R.double(), 1.0), 1e-9)
    dense(emmet_write(Dense(C), K, R))
    assert all(torch.equal(a, b) for a, b in zip((C, K, R), copies, strict=True))
