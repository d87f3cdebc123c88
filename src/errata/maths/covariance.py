"""The uncentred second moment of keys, C = E[k k^T], gathered as a stream, and solves with it.

ROME (section 3.1, Eq. 2) and EMMET need C^-1 k, MEMIT (Eq. 14, 15) needs lambda C. Not a covariance about the mean: keys are
not centred. What is solved is stated: `jitter` is added to the diagonal, and an inverse is never formed.
"""

import hashlib

import torch
from torch import Tensor

from errata.errors import ConfigError, ShapeError, StatisticsError

DEFAULT_JITTER = 1e-6  # of the mean diagonal entry
_BLOCK = 1024  # keys per product
_TILES = 8  # C is symmetric: products of column tiles with what is right of them cost (1 + 1/8) / 2 of the whole


class SecondMoment:
    """Sum of k k^T over keys k (m,), and how many there were; C = sum / count has the unit of squared activations.

    The sum is float64. product: the dtype in which up to 1,024 keys at a time are multiplied. "float64" is exact to
    rounding (relative error of an entry below 1e-12 of E|k_i k_j|). "float32" is twice as fast on a CPU and errs by at
    most 6.2e-5 of E|k_i k_j|, in practice by about 1e-7, which swamps eigenvalues smaller than that part of the
    largest; it presumes torch's float32 products at full precision (no TF32).
    device: where the sum is kept; None means with the keys, or on the CPU where their device has no float64 (MPS).
    """

    def __init__(self, width: int, *, product: str = "float64", device: torch.device | str | None = None):
        if width < 1:
            raise ConfigError(f"expected keys of a width of at least 1, found {width}.")
        if product not in ("float64", "float32"):
            raise ConfigError(f"expected product 'float64' or 'float32', found {product!r}.")
        self.count = 0
        self.product = product
        self._device = device
        # What lies below the diagonal tiles is never read.
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, total: Tensor, count: int, *, product: str = "float64") -> "SecondMoment":
        """From a sum (m, m) float64, as `total` gives it, of `count` keys.

        It is copied: a product added to memory of another alignment, such as a mapped file's, rounds differently, and a
        resumed sum would not be the uninterrupted one bit for bit.
        """
        if total.ndim != 2 or total.shape[0] != total.shape[1] or total.dtype != torch.float64 or count < 0:
            raise ShapeError(
                f"expected a square float64 sum of at least 0 keys, found {total.dtype} {tuple(total.shape)} of {count}."
            )
        moment = cls(1, product=product)
        moment.count, moment._sum = count, total.clone()
        return moment

    @property
    def width(self) -> int:
        """m, the length of a key."""
        return int(self._sum.shape[0])

    @property
    def total(self) -> Tensor:
        """(m, m) float64, a copy: the sum of k k^T, exactly symmetric."""
        upper = self._sum.triu()
        return upper.add_(upper.triu(1).T)

    @property
    def matrix(self) -> Tensor:
        """(m, m) float64: C = E[k k^T], exactly symmetric. Raises StatisticsError before the first key."""
        if not self.count:
            raise StatisticsError("expected at least one key for a second moment, found none; give texts.")
        return self.total.div_(self.count)

    @property
    def digest(self) -> str:
        """ "sha256:…" of the sum and the count."""
        sha = hashlib.sha256(f"{self.count} {self.width}".encode())
        sha.update(self.total.cpu().numpy().tobytes())
        return f"sha256:{sha.hexdigest()}"

    def update(self, keys: Tensor) -> None:
        """Add keys (n, m) of any float dtype and device; n may be 0.

        Raises ShapeError for another width, StatisticsError for numbers that are not finite; nothing is added then.
        """
        if keys.ndim != 2 or keys.shape[1] != self.width:
            raise ShapeError(f"expected keys of shape (n, {self.width}), found {tuple(keys.shape)}.")
        keys = keys.detach()
        if not bool(torch.isfinite(keys).all()):
            raise StatisticsError(
                "expected finite keys, found NaN or infinity among them; run the model in float32 or bfloat16."
            )
        self._go_to(keys.device)
        for block in torch.split(keys, _BLOCK):
            self._add(block)
        self.count += len(keys)

    def merge(self, other: "SecondMoment") -> None:
        """Add all that `other` has seen. Raises ShapeError for another width."""
        if other.width != self.width:
            raise ShapeError(f"expected a second moment of width {self.width} to merge, found {other.width}.")
        self._sum += other.total.to(self._sum.device)
        self.count += other.count

    def to(self, device: torch.device | str) -> "SecondMoment":
        """The same sum kept on another device, or itself if it is there already."""
        if self._sum.device == torch.device(device):
            return self
        return SecondMoment.of(self.total.to(device), self.count, product=self.product)

    def require_full_rank(self) -> None:
        """Raises StatisticsError when there are fewer keys than m, which no jitter can make up for."""
        if self.count < self.width:
            raise StatisticsError(
                f"expected at least {self.width:,} tokens for keys of width {self.width:,}, found {self.count:,}; with "
                f"fewer the second moment cannot be inverted: gather more texts, or longer ones."
            )

    def solver(self, jitter: float | None = None, device: torch.device | str | None = None) -> "CholeskySolver":
        """Solves with C on a device that has float64, by default where the sum is.

        Raises as `require_full_rank` and as `CholeskySolver`.
        """
        self.require_full_rank()
        return CholeskySolver(self.matrix.to(device or self._sum.device), jitter=jitter)

    def _go_to(self, device: torch.device) -> None:
        if self._device is None and self._sum.device != device:
            self._sum = self._sum.to("cpu" if device.type == "mps" else device)

    def _add(self, block: Tensor) -> None:
        """Keys (n, m), n <= 1,024, onto and right of the diagonal tiles of the sum."""
        tile = max(128, -(-self.width // _TILES))
        exact = self.product == "float64"
        block = block.to(self._sum.device).double() if exact else block.float()
        for at in range(0, self.width, tile):
            here, left, right = self._sum[at : at + tile, at:], block[:, at : at + tile].T, block[:, at:]
            if exact:
                here.addmm_(left, right)
            else:
                here += (left @ right).to(here.device)


class CholeskySolver:
    """x = (C + jitter I)^-1 b by the Cholesky factor of C + jitter I; float64, on the device of C.

    matrix: C (m, m), symmetric. jitter: in units of C's mean diagonal entry. None adds 1e-6, which steadies a solve and
    must not invent an answer: C itself has to be positive definite to rounding (its smallest eigenvalue above
    m * 2.2e-16 * its Frobenius norm). 0 solves with C as it is, under the same condition. A positive jitter that is
    asked for is taken at its word, also when C is singular.
    The attribute `jitter` is what was added, in the unit of C; `factor` the lower triangle L, L L^T = C + jitter I.
    Raises StatisticsError naming the smallest eigenvalue of a C that is singular; ShapeError if C is not square.
    """

    def __init__(self, matrix: Tensor, *, jitter: float | None = None):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise ShapeError(f"expected a square matrix to solve with, found {tuple(matrix.shape)}.")
        if jitter is not None and not 0 <= jitter < float("inf"):
            raise ConfigError(f"expected a finite jitter of at least 0, found {jitter}; 1e-6 is usual.")
        if not bool(torch.isfinite(matrix).all()):
            raise StatisticsError("expected a matrix of finite numbers to solve with, found NaN or infinity in it.")
        C = matrix.detach().double()
        self.jitter = float(C.diagonal().mean()) * (DEFAULT_JITTER if jitter is None else jitter)
        self.factor = _factor(C, 0.0) if not jitter else _factor(C, self.jitter)
        if not jitter:
            _require_definite(C, self.factor)
            if self.jitter:
                self.factor = _factor(C, self.jitter)

    @property
    def width(self) -> int:
        """m."""
        return int(self.factor.shape[0])

    def solve(self, rhs: Tensor) -> Tensor:
        """(C + jitter I)^-1 rhs for rhs (m,) or (m, n); float64 of the same shape, on the device of C.

        Raises ShapeError for another height.
        """
        if rhs.ndim not in (1, 2) or rhs.shape[0] != self.width:
            raise ShapeError(
                f"expected a right-hand side of shape ({self.width},) or ({self.width}, n), found {tuple(rhs.shape)}."
            )
        columns = rhs.to(self.factor.device).double()
        solved: Tensor = torch.cholesky_solve(columns.reshape(self.width, -1), self.factor)
        return solved.reshape(rhs.shape)


def _factor(C: Tensor, jitter: float) -> Tensor:
    shifted = C.clone()
    shifted.diagonal().add_(jitter)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        raise _singular(C, jitter)
    return factor


def _require_definite(C: Tensor, factor: Tensor) -> None:
    """A factorisation may survive a singular C by luck of rounding: inverse iteration finds its smallest eigenvalue.

    The Ritz value of a few vectors is never below the smallest eigenvalue and falls onto it fast if it is far below
    the others, which is when it matters.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(C), min(4, len(C)), dtype=C.dtype, generator=generator).to(C.device)
    for _ in range(6):
        x = torch.linalg.qr(torch.cholesky_solve(x, factor)).Q
    ritz = torch.linalg.eigvalsh(x.T @ C @ x)
    rounding = len(C) * torch.finfo(C.dtype).eps * float(torch.linalg.matrix_norm(C))
    if not bool(torch.isfinite(ritz).all()) or float(ritz[0]) <= rounding:
        raise _singular(C, 0.0)


def _singular(C: Tensor, jitter: float) -> StatisticsError:
    eigenvalues = torch.linalg.eigvalsh(C)
    silent = int((C.diagonal() <= 0).sum())
    return StatisticsError(
        f"expected a positive definite matrix{f' with a jitter of {jitter:.3g}' if jitter else ''}, found a smallest "
        f"eigenvalue of {float(eigenvalues[0]):.3g} beside a largest of {float(eigenvalues[-1]):.3g}"
        f"{f' ({silent} of {len(C)} keys are never active)' if silent else ''}; gather more varied texts, or ask for a "
        f"jitter (such as jitter=1e-4 of the mean diagonal entry) and accept what it does."
    )
