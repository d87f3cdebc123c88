"""Linear transport between two samples of hidden states, exactly and without d x d matrices.

Source: SAKE's linear map, the Monge map between two Gaussians (Knott and Smith 1984; Peyre and Cuturi 2018).
With `rho * I` added to both covariances the linear part is the identity outside the span of the centred samples, so the
whole computation happens in an orthonormal basis of that span (r <= n_s + n_t directions) and the map is stored as

    x -> m_t + (x - m_s) + P diag(lam) P^T (x - m_s),      P (d, r) orthonormal, lam (r,) > -1

which costs O(d n^2) time and d r numbers instead of O(d^3) and d^2. It equals POT's `LinearTransport` to rounding.

Differs from the published code: rho is relative to the source's variance unless `relative=False` (the code: 1e-2,
absolute). Outside the span only the *linear* part is the identity; the shift m_t - m_s always stays.

Letters: n states of width d, r directions. Everything is computed in float64 on the device of the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from errata.errors import ConfigError, EditError, ShapeError


@dataclass(frozen=True, eq=False)
class LinearMap:
    """The affine map x -> m_t + (x - m_s) + P diag(lam) P^T (x - m_s) of a hidden state.

    m_s (d,), m_t (d,): source and target mean, activation units. P (d, r): orthonormal columns. lam (r,): eigenvalues
    of A - I, each above -1 (A is positive definite). Rank 0 is a pure shift (uniform steering).
    error: fraction, the relative RMS error that `truncate` stated when it made this map; 0 for an exact one.
    Raises ShapeError if the shapes do not fit together.
    """

    m_s: Tensor
    m_t: Tensor
    P: Tensor
    lam: Tensor
    error: float = 0.0

    def __post_init__(self) -> None:
        if self.P.ndim != 2:
            raise ShapeError(f"Expected P of shape (d, r) in a LinearMap, found {tuple(self.P.shape)}.")
        d, r = self.P.shape
        for name, want in (("m_s", (d,)), ("m_t", (d,)), ("lam", (r,))):
            found = tuple(getattr(self, name).shape)
            if found != want:
                raise ShapeError(
                    f"Expected {name} of shape {want} in a LinearMap whose P is {(d, r)}, found {found}; "
                    "pass all four tensors of one map."
                )

    @property
    def d(self) -> int:
        """Width of the states it maps."""
        return self.P.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions r in which the linear part differs from the identity."""
        return self.P.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the four stored tensors."""
        return sum(t.nbytes for t in (self.m_s, self.m_t, self.P, self.lam))

    def __call__(self, x: Tensor) -> Tensor:
        """Map states x (..., d); returns the same shape and dtype.

        Computed in the widest of float32, the map's dtype and that of x. Raises ShapeError if the last axis is not d.
        """
        self._check_width(x)
        dtype = self._working_dtype(x.dtype)
        m_s, m_t, P, lam = self._tensors(dtype)
        centred = x.to(dtype) - m_s
        moved = m_t + centred
        if self.rank:
            moved = moved + ((centred @ P) * lam) @ P.T
        return moved.to(x.dtype)

    def dense(self) -> tuple[Tensor, Tensor]:
        """The same map as a matrix: A (d, d), symmetric, and b (d,) with h' = h A + b. At least float32."""
        m_s, m_t, P, lam = self._tensors(self._working_dtype())
        A = torch.eye(self.d, dtype=P.dtype, device=P.device) + (P * lam) @ P.T
        return A, m_t - m_s @ A

    def inverse(self) -> LinearMap:
        """The mathematical undo, x -> m_s + A^-1 (x - m_t), of the same rank.

        Exact up to rounding, never bit for bit (undo an edit by detaching it), and as good as P is orthonormal: after a
        cast of P to half precision it undoes to about that precision. Raises ShapeError if a lam is not above -1.
        """
        lam = self.lam.to(self._working_dtype())
        if bool((lam <= -1).any()):
            raise ShapeError(
                f"Expected every lam above -1 to invert a LinearMap, found {float(lam.min()):.6g}; "
                "such a map flattens a direction and has no inverse."
            )
        return LinearMap(m_s=self.m_t, m_t=self.m_s, P=self.P, lam=-lam / (1 + lam), error=self.error)

    def contributions(self, states: Tensor) -> Tensor:
        """What each direction does to real states: s_i = |lam_i| rms(p_i^T (x - m_s)), activation units.

        states (n, d): the states over which the root mean square is taken. Returns (r,) float64.
        Raises ShapeError on an empty sample or another width.
        """
        self._check_width(states)
        x = _sample(states, "states")
        m_s, _, P, lam = self._tensors(torch.float64)
        return lam.abs() * ((x - m_s) @ P).square().mean(dim=0).sqrt()

    def truncate(self, states: Tensor, tolerance: float | None = None, rank: int | None = None) -> LinearMap:
        """The same map with the fewest directions that real states need; its `error` states what that costs.

        Directions are kept in falling order of `contributions`, not of |lam_i|: a strong direction in which no state
        varies moves nothing. With f the full and g the truncated map, the stated error over the n `states` is

            rms_x |f(x) - g(x)|  /  rms_x |f(x) - x - (m_t - m_s)|

        (Euclidean norms): the error relative to what the full map does beyond the mean shift. As P is orthonormal it
        equals sqrt(sum of dropped s_i^2 / sum of all s_i^2), so no other choice of as many directions errs less. If the
        full map does nothing beyond the shift, `tolerance` keeps nothing, and the error is 0.

        states (n, d); give exactly one of tolerance, the largest allowed error (fraction in [0, 1]), and rank, the
        number of directions to keep (more than there are keeps all). Truncate before casting P to half precision.
        Raises ConfigError on a tolerance or rank out of range, ShapeError on states that do not fit.
        """
        if (tolerance is None) == (rank is None):
            raise ConfigError("Expected exactly one of tolerance and rank for truncate; give one of them.")
        power, order = self.contributions(states).square().sort(descending=True, stable=True)
        # dropped[k]: relative error when the first k directions stay; summed from the small end to keep its digits
        tail = torch.cat([power.flip(0).cumsum(0).flip(0), power.new_zeros(1)])
        dropped = (tail / tail[0]).sqrt() if float(tail[0]) > 0 else torch.zeros_like(tail)
        if tolerance is not None:
            if not 0 <= tolerance <= 1:
                raise ConfigError(f"Expected a tolerance in [0, 1] for truncate, found {tolerance}.")
            keep = int((dropped > tolerance).sum())  # dropped never grows, so this is the first that meets it
        else:
            assert rank is not None
            if rank < 0:
                raise ConfigError(f"Expected a rank of at least 0 for truncate, found {rank}.")
            keep = min(rank, self.rank)
        kept = order[:keep]
        return replace(self, P=self.P[:, kept].contiguous(), lam=self.lam[kept], error=float(dropped[keep]))

    def to(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        means: torch.dtype | None = None,
    ) -> LinearMap:
        """Store P in another dtype, or all of it on another device.

        The vectors m_s, m_t and lam go to `dtype` too but to no less than float32: they are 2d + r numbers beside d r,
        a rounded mean moves every state, and a lam near -1 must not round to -1. `means` overrides that for m_s, m_t.
        """
        vectors = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return replace(
            self,
            m_s=self.m_s.to(device=device, dtype=means or vectors),
            m_t=self.m_t.to(device=device, dtype=means or vectors),
            P=self.P.to(device=device, dtype=dtype),
            lam=self.lam.to(device=device, dtype=vectors),
        )

    def _tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.m_s.to(dtype), self.m_t.to(dtype), self.P.to(dtype), self.lam.to(dtype)

    def _working_dtype(self, *others: torch.dtype) -> torch.dtype:
        own = (self.m_s.dtype, self.m_t.dtype, self.P.dtype, self.lam.dtype)
        return reduce(torch.promote_types, (*own, *others), torch.float32)

    def _check_width(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.d:
            raise ShapeError(
                f"Expected states of width {self.d} for this map, found shape {tuple(x.shape)}; "
                "it was fitted on another layer or model."
            )


def gaussian_transport(x_s: Tensor, x_t: Tensor, *, reg: float = 1e-2, relative: bool = True) -> LinearMap:
    """Linear Monge map from the Gaussian of one sample to that of another, in exact low-rank form.

    Source: SAKE, linear transport; A = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2 with S = Cov(x_s) + rho I and
    T = Cov(x_t) + rho I (1/n covariances). What is matched exactly is A S A = T, the regularised covariances.
    x_s (n_s, d), x_t (n_t, d): states, any float dtype; no pairing is used. reg > 0: rho = reg * (mean source variance
    per dimension) if `relative`, else rho = reg as in the paper, in squared activation units.
    Returns a float64 LinearMap; directions with |lam| below rounding are left out, so x_s = x_t gives the identity.
    A sample without variance (one state, or identical ones) says nothing of a covariance: the map is then `mean_shift`.
    Raises ShapeError on empty samples or different widths, ConfigError on reg <= 0, EditError on states that are not
    finite.
    """
    x_s, x_t = _pair(x_s, x_t)
    _check_reg(reg)
    m_s, m_t = x_s.mean(dim=0), x_t.mean(dim=0)
    c_s, c_t = x_s - m_s, x_t - m_t
    if _is_constant(x_s, c_s) or _is_constant(x_t, c_t):
        return _shift(m_s, m_t)
    rho = _ridge(c_s, reg, relative)
    basis, z_s, z_t = _joint_span(c_s, c_t)
    lam, directions = torch.linalg.eigh(_monge(_factor(z_s, rho), _factor(z_t, rho)))
    kept = lam.abs() > _ROUNDING * (1 + float(c_s.square().sum()) / (len(c_s) * rho))  # bounds S's condition number
    directions = directions[:, kept]
    P = directions if basis is None else basis @ directions
    return LinearMap(m_s, m_t, P.contiguous(), lam[kept])


def mean_shift(x_s: Tensor, x_t: Tensor) -> LinearMap:
    """Uniform steering, x -> x + (m_t - m_s): the map of rank 0 between the means of x_s (n_s, d) and x_t (n_t, d).

    Source: SAKE section 4.4.2. Returns float64. Raises ShapeError on empty samples or different widths, EditError on
    states that are not finite.
    """
    x_s, x_t = _pair(x_s, x_t)
    return _shift(x_s.mean(dim=0), x_t.mean(dim=0))


def spread(x: Tensor) -> float:
    """Root mean square deviation of states x (n, d) from their mean, per dimension, activation units.

    Its square is the mean variance that a relative `reg` multiplies, and it is the unit of a relative noise. 0 for one
    state. Raises as `mean_shift`.
    """
    x = _sample(x, "states")
    return math.sqrt(_ridge(x - x.mean(dim=0), 1.0, relative=True))


def noisy_neighbours(x: Tensor, noise: float, *, copies: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """States x (n, d), then `copies` noisy neighbours x + N(0, noise^2 I) of each: (n * (1 + copies), d), float64.

    Source: SAKE, random neighbours of the implications' activations (published code: 4 copies, noise 0.1 absolute).
    noise >= 0 in activation units; `0.1 * spread(source)` makes it relative. The drawn noise adds noise^2 * copies /
    (1 + copies) to every variance in expectation: on a whole sample it is a random form of a larger reg.
    Raises ConfigError on negative noise or copies, and as `mean_shift`.
    """
    if not 0 <= noise < float("inf") or copies < 0:
        raise ConfigError(f"Expected noise and copies of at least 0 for noisy neighbours, found {noise} and {copies}.")
    x = _sample(x, "states")
    drawn = torch.randn((copies * len(x), x.shape[1]), dtype=x.dtype, device=x.device, generator=generator)
    return torch.cat([x, x.repeat(copies, 1) + noise * drawn])


def gaussian_distance(x: Tensor, reference: Tensor, *, reg: float = 1e-2, relative: bool = True) -> Tensor:
    """How far states lie from the Gaussian of a reference sample: 1 is as far as a further state of it would lie.

    The Mahalanobis distance sqrt((x - m)^T (Cov + rho I)^-1 (x - m)) of each row, divided by the root mean square over
    the reference states of the same distance, each from the Gaussian of the *other* reference states (closed form,
    rank-one downdate). That unit holds for any d, m and reg; sqrt(d) would not, since with m < d a further state mostly
    differs in directions that the reference does not span. Rows of the reference itself come out below 1.

    x (n, d); reference (m, d), m >= 2 for a meaningful unit; reg and relative as in `gaussian_transport`, with the
    reference as the source. Returns (n,) float64, dimensionless. If the reference has no variance there is no unit: 0
    for rows equal to it, infinity for others. Raises as `gaussian_transport`.
    """
    reference, x = _pair(reference, x)
    _check_reg(reg)
    mean = reference.mean(dim=0)
    centred, y = reference - mean, x - mean
    if _is_constant(reference, centred):
        same = (x - reference[0]).abs().amax(dim=1) <= _FLAT * reference.abs().max()
        return torch.where(same, 0.0, torch.inf).to(y)
    rho, n = _ridge(centred, reg, relative), len(reference)
    _, scale, rows = torch.linalg.svd(centred, full_matrices=False)
    return _squared_form(y, rows, scale.square() / n + rho, rho).div(_held_out(centred, rows, scale, rho)).sqrt()


# Relative sizes below which a number is rounding: eigenvalues of A - I, per unit of the condition number of the
# source's covariance, and deviations of equal rows from their mean.
_ROUNDING = 2.0**-52
_FLAT = 1e-13


def _sample(x: Tensor, name: str) -> Tensor:
    if x.ndim != 2 or 0 in x.shape:
        raise ShapeError(f"Expected {name} of shape (n, d) with at least one state, found {tuple(x.shape)}.")
    x = x.detach().to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise EditError(
            f"Expected finite numbers in {name}, found {int((~torch.isfinite(x)).sum())} that are NaN or infinite; "
            "run the model in float32 or bfloat16."
        )
    return x


def _pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _sample(first, "the source (or reference) states"), _sample(second, "the other states")
    if first.shape[1] != second.shape[1]:
        raise ShapeError(
            f"Expected both samples to have one width, found {first.shape[1]} and {second.shape[1]}; "
            "take both from the same layer of the same model."
        )
    return first, second


def _check_reg(reg: float) -> None:
    if not 0 < reg < float("inf"):
        raise ConfigError(f"Expected reg above 0 and finite, found {reg}; the paper's value is 0.01.")


def _is_constant(x: Tensor, centred: Tensor) -> bool:
    return float(centred.abs().max()) <= _FLAT * float(x.abs().max())


def _ridge(centred: Tensor, reg: float, relative: bool) -> float:
    return reg * float(centred.square().mean()) if relative else reg


def _shift(m_s: Tensor, m_t: Tensor) -> LinearMap:
    return LinearMap(m_s, m_t, m_s.new_zeros((len(m_s), 0)), m_s.new_zeros(0))


def _joint_span(c_s: Tensor, c_t: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Orthonormal basis Q (d, r) of both centred samples' span and their coordinates; None for Q = I if r >= d.

    Householder QR stays orthonormal when the span is smaller than r; the surplus directions come out with lam = 0.
    """
    n_s, (n_t, d) = len(c_s), c_t.shape
    if n_s + n_t >= d:
        return None, c_s, c_t
    basis, coordinates = torch.linalg.qr(torch.cat([c_s, c_t]).T)
    return basis, coordinates[:, :n_s].T, coordinates[:, n_s:].T


def _factor(z: Tensor, rho: float) -> Tensor:
    """Lower triangular L (r, r) with L L^T = Cov(z) + rho I, by QR of the sample: the covariance is never formed.

    So rounding is relative to the spread of the states, not to its square, and no rho > 0 is too small to factorise.
    """
    ridge = torch.eye(z.shape[1], dtype=z.dtype, device=z.device) * rho**0.5
    upper: Tensor = torch.linalg.qr(torch.cat([z / len(z) ** 0.5, ridge]), mode="r").R
    return upper.T


def _monge(L: Tensor, K: Tensor) -> Tensor:
    """A - I for the symmetric positive definite A with A S A = T, where S = L L^T and T = K K^T, all (r, r).

    A = L^-T (M M^T)^1/2 L^-1 with M = L^T K, the textbook form's unique solution. The root comes from the singular
    values of M: from the eigenvalues of M M^T it would lose the directions whose variance is small beside the largest.
    """
    vectors, scale, _ = torch.linalg.svd(L.T @ K)
    half: Tensor = torch.linalg.solve_triangular(L.T, vectors * scale.sqrt(), upper=True)
    A = half @ half.T  # a product with its own transpose is exactly symmetric
    A.diagonal().sub_(1)
    return A


def _squared_form(y: Tensor, rows: Tensor, inside: Tensor, outside: float) -> Tensor:
    """y^T M^-1 y per row of y (n, d); M has eigenvalues `inside` (k,) along `rows` (k, d) and `outside` elsewhere."""
    coordinates = y @ rows.T
    rest = y - coordinates @ rows
    return coordinates.square() @ inside.reciprocal() + rest.square().sum(dim=1) / outside


def _held_out(centred: Tensor, rows: Tensor, scale: Tensor, rho: float) -> Tensor:
    """Mean over the reference states of the squared distance of each from the Gaussian of the others, rho held fixed.

    Leaving out row c changes the scatter by -n/(n-1) c c^T and the mean by -c/(n-1); Sherman-Morrison gives the rest.
    """
    n = len(centred)
    leverage = _squared_form(centred, rows, scale.square() + (n - 1) * rho, (n - 1) * rho)
    return (n**2 / (n - 1) * leverage / (1 - n / (n - 1) * leverage)).mean()
