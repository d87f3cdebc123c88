"""The closed-form writes of ROME, MEMIT and EMMET: a low-rank change of a linear map that stores key-value pairs.

Every write is D = U V^T in (out, in) orientation, U (d, r) and V (m, r) in float64, to be added to a weight W (d, m) that
maps keys to values; for a weight stored (in, out) the change is V U^T. Letters: m key width, d value width, B pairs,
K (m, B) keys, R (d, B) residuals (value wanted minus W k), C (m, m) the uncentred second moment E[k k^T] of keys.

A `Solver` is anything that solves with C: `solve(rhs)` returns C^-1 rhs for rhs (m, n), in float64. No inverse is formed.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from errata.errors import ConfigError, ShapeError, UnstableWriteError

Factors = tuple[Tensor, Tensor]


class Solver(Protocol):
    """Solves linear systems with one symmetric positive definite matrix."""

    def solve(self, rhs: Tensor) -> Tensor:
        """C^-1 rhs for rhs (m, n)."""


def rank_one(C_solver: Solver, key_mean: Tensor, key: Tensor, residual: Tensor, *, min_cosine: float = 0.01) -> Factors:
    """D = r u^T / (u^T k) with u = C^-1 key_mean, so that (W + D) k = W k + r: U (d, 1), V (m, 1).

    Source: ROME (Meng et al. 2022), Eq. 2. With key_mean equal to key (r-ROME's averaged key, our default) D is the
    smallest change with D k = r, measured by tr(D C D^T), what it does to other keys. With another key_mean (the
    published code: mean over contexts in u, bare prompt in k) it meets the constraint at a cost 1 / cos^2 times that,
    where cos is the cosine of the two keys in the C^-1 inner product.

    key_mean (m,), key (m,), residual (d,), activation units; min_cosine: the |cos| below which the write is refused.
    The scale of C does not matter. Raises ShapeError; UnstableWriteError when u^T k is too near zero, or a key is.
    """
    if key.ndim != 1 or key.shape != key_mean.shape or residual.ndim != 1:
        raise ShapeError(
            f"expected key_mean (m,), key (m,) and residual (d,), found {tuple(key_mean.shape)}, {tuple(key.shape)} and "
            f"{tuple(residual.shape)}."
        )
    keys = torch.stack([key_mean, key], 1).double()
    solved = C_solver.solve(keys)
    keys = keys.to(solved.device)
    gram = keys.T @ solved
    spread = math.sqrt(max(float(gram[0, 0]) * float(gram[1, 1]), 0.0))
    dot = float(solved[:, 0] @ keys[:, 1])
    if not math.isfinite(dot) or spread <= 0 or abs(dot) < min_cosine * spread:
        found = dot / spread if spread > 0 else math.nan
        raise UnstableWriteError(
            f"expected the key of the prompt and the mean key over contexts to point the same way, found a cosine of "
            f"{found:.2g} (C^-1 metric, at least {min_cosine:g} needed): the write would be {abs(1 / found) if found else math.inf:.2g} "
            f"times too large and break the model; use the mean key for both (key_mode='mean')."
        )
    return residual.double()[:, None].to(solved.device), solved[:, :1] / dot


def memit_write(C: Tensor, K: Tensor, R: Tensor, lam: float, *, solver: Solver | None = None) -> Factors:
    """D = R K^T (lam C + K K^T)^-1, the write of many pairs that spares other keys: U = R (d, B), V (m, B).

    Source: MEMIT (Meng et al. 2023), Eq. 14: the minimum of ||D K - R||^2 + lam tr(D C D^T), the least-squares fit of the
    residuals on top of lam times the association statistics. Few pairs (B < m) go through the Woodbury identity,
    V = Y (I + K^T Y)^-1 with Y = (lam C)^-1 K, which needs only solves with C: pass `solver` to reuse its factor, with the
    jitter that it has; without one C itself is factored. Many pairs: lam C + K K^T is factored, and `solver` is not used.

    C (m, m), K (m, B), R (d, B); lam > 0. Since E[k^T C^-1 k] = m, a pair keeps the share s / (1 + s) of its residual with
    s = k^T C^-1 k / lam, about m / lam. Raises ShapeError, ConfigError; UnstableWriteError for a C that is singular.
    """
    _check(K, R, C)
    if not (math.isfinite(lam) and lam > 0):
        raise ConfigError(f"expected a weight lambda above 0 of the statistics, found {lam}.")
    K, R = _double(K, C), _double(R, C)
    if K.shape[1] >= len(C):
        return R, torch.cholesky_solve(K, _cholesky(lam * C.double() + K @ K.T))
    Y = (solver.solve(K) if solver is not None else torch.cholesky_solve(K, _cholesky(C.double()))) / lam
    Y = Y.to(K.device)
    inner = _symmetric(K.T @ Y)
    inner.diagonal().add_(1.0)
    return R, torch.cholesky_solve(Y.T, _cholesky(inner)).T


def emmet_write(C_solver: Solver, K: Tensor, R: Tensor, lambda_e: float = 0.0, lambda_c: float = 1.0) -> Factors:
    """D = R (K^T Ct^-1 K + lambda_e I)^-1 K^T Ct^-1 with Ct = lambda_c C: U = R (d, B), V (m, B).

    Source: EMMET (Gupta et al. 2024), the batched equality-constrained write: with lambda_e = 0 (default) the smallest
    tr(D C D^T) with D K = R exactly, whatever lambda_c; one pair is ROME's write. Keys that depend on each other (two
    edits of one subject) are met in the least-squares sense, by a pseudo-inverse. With lambda_e > 0 it is MEMIT's write with
    lam = lambda_c * lambda_e.

    K (m, B), R (d, B); lambda_e >= 0, lambda_c > 0. Raises ShapeError, ConfigError.
    """
    _check(K, R)
    if not (math.isfinite(lambda_e) and lambda_e >= 0 and math.isfinite(lambda_c) and lambda_c > 0):
        raise ConfigError(f"expected lambda_e of at least 0 and lambda_c above 0, found {lambda_e} and {lambda_c}.")
    Y = C_solver.solve(K.double()) / lambda_c
    K, R = _double(K, Y), _double(R, Y)
    D = _symmetric(K.T @ Y)
    D.diagonal().add_(lambda_e)
    factor, failed = torch.linalg.cholesky_ex(D)
    pivots = factor.diagonal().square()
    rounding = max(K.shape) * torch.finfo(D.dtype).eps
    if int(failed) or float(pivots.min()) <= rounding * float(pivots.max()):
        return R, Y @ torch.linalg.pinv(D, rtol=rounding, hermitian=True)
    return R, torch.cholesky_solve(Y.T, factor).T


def _check(K: Tensor, R: Tensor, C: Tensor | None = None) -> None:
    fits = K.ndim == 2 and R.ndim == 2 and K.shape[1] == R.shape[1] > 0
    if not fits or (C is not None and C.shape != (K.shape[0], K.shape[0])):
        raise ShapeError(
            f"expected keys (m, B) and residuals (d, B){', with C (m, m),' if C is not None else ''} of at least one pair, "
            f"found {tuple(K.shape)} and {tuple(R.shape)}{'' if C is None else f' with {tuple(C.shape)}'}."
        )


def _double(x: Tensor, like: Tensor) -> Tensor:
    return x.detach().to(like.device).double()


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.T) / 2


def _cholesky(matrix: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise UnstableWriteError(
            f"expected a positive definite matrix ({len(matrix)} x {len(matrix)}) to solve with, found one whose leading "
            f"block {int(failed)} is singular; gather statistics over more tokens, or pass a solver with a jitter."
        )
    return factor
