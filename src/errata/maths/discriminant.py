"""Linear discriminants: a projection that brings classes apart, and a plane between two of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from errata.errors import ShapeError


def within_class_projection(
    x: Tensor,
    labels: Tensor,
    k: int,
    shrinkage: float = 0.05,
    *,
    limit: int = 4096,
    rank: int = 2048,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Whiten the spread within classes and keep the `k` directions along which class means differ most.

    Source: Fisher's linear discriminant for many classes (Rao 1948); Euclidean distance after the projection is
    Mahalanobis distance under the pooled within-class covariance, restricted to the discriminating directions.
    x (n, D) float; labels (n,) integer; shrinkage in [0, 1): share of the mean variance added to the within-class
    covariance. Returns (mean (D,), projection (D, min(k, D, classes − 1))), float64; z = (x − mean) @ projection, in units
    of within-class standard deviations. Raises ShapeError if labels do not match x or name fewer than two classes.

    Up to D = `limit` the covariances are dense, O(D²) memory. Beyond it the discriminant is found inside the span of the
    centred rows, which is exact for shrinkage > 0: across that span classes do not differ. With n > `rank` the span is
    narrowed to about the `rank` strongest principal directions by a randomised range finder (Halko et al. 2011) seeded
    with `seed`. Memory beside x is then at most 8·(6·n·r + 10·r² + 4·n·1024) bytes, r = min(n, `rank`), and twice the
    result: it grows with D only by the result.
    """
    if labels.shape != x.shape[:1]:
        raise ShapeError(
            f"expected one label for each of the {len(x)} rows, found labels of shape {tuple(labels.shape)}"
        )
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ShapeError("expected at least two classes to discriminate, found fewer; give prompts of more facts")
    if x.shape[1] <= limit:
        return _fisher(x.double(), index, counts, k, shrinkage)
    return _fisher_in_span(x, index, counts, k, shrinkage, rank, seed)


def _fisher(
    x: Tensor, index: Tensor, counts: Tensor, k: int, shrinkage: float, ridge: float | None = None
) -> tuple[Tensor, Tensor]:
    """The discriminant by dense covariances; ridge: what to add to the within-class one instead of a share of its mean."""
    means = torch.zeros(len(counts), x.shape[1], dtype=x.dtype).index_add_(0, index, x) / counts[:, None]
    centred = x - means[index]
    within = centred.T @ centred / len(x)
    added = shrinkage * within.diagonal().mean() if ridge is None else ridge
    within = within + added * torch.eye(len(within), dtype=x.dtype)
    mean = means.mean(0)
    between = (means - mean).T @ (means - mean) / len(counts)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors / values.clamp(min=values[-1] * 1e-12).sqrt()
    spread, directions = torch.linalg.eigh(whiten.T @ between @ whiten)
    keep = min(k, len(counts) - 1, x.shape[1])
    order = spread.argsort(descending=True)[:keep]
    return mean, whiten @ directions[:, order]


_BLOCK = 1024  # columns of x that are held in double precision at once
_POWERS = 2  # passes that turn the random subspace towards the strong directions


def _fisher_in_span(
    x: Tensor, index: Tensor, counts: Tensor, k: int, shrinkage: float, rank: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The discriminant among combinations of the centred rows, without a D × D or D × n array in double precision."""
    share = 1 / (len(counts) * counts[index].double())  # the mean of class means as a weighted mean of rows
    mean = torch.cat([share @ part.double() for part in x.split(_BLOCK, 1)])
    spread = 0.0  # trace of the within-class covariance
    for block in _blocks(x, mean):
        means = torch.zeros(len(counts), block.shape[1], dtype=block.dtype).index_add_(0, index, block)
        spread += float((block - (means / counts[:, None])[index]).square().sum()) / len(x)
    coordinates, rows = _span(x, mean, rank, seed)
    ridge = shrinkage * spread / x.shape[1]
    _, directions = _fisher(coordinates, index, counts, k, shrinkage, ridge)
    combined = rows @ directions  # (n, k): each direction as a combination of centred rows
    return mean, torch.cat([block.T @ combined for block in _blocks(x, mean)])


def _span(x: Tensor, mean: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Principal coordinates (n, r) of the centred rows, and weights (n, r): the r basis vectors are (x − mean)ᵀ weights."""

    def times(q: Tensor, identity: bool = False) -> Tensor:  # the Gram matrix of the centred rows times q
        total = torch.zeros_like(q)
        for block in _blocks(x, mean):
            total += block @ (block.T if identity else block.T @ q)
        return total

    n = len(x)
    if n <= rank:
        basis = torch.eye(n, dtype=torch.float64)
    else:
        basis = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(_POWERS):
            basis = torch.linalg.qr(times(basis)).Q
    image = times(basis, identity=n <= rank)
    values, vectors = torch.linalg.eigh(basis.T @ image)
    kept = values > values[-1] * 1e-12
    vectors = vectors[:, kept] / values[kept].sqrt()
    return image @ vectors, basis @ vectors


def _blocks(x: Tensor, mean: Tensor) -> Iterator[Tensor]:
    """The centred rows, some columns at a time, float64."""
    for part, centre in zip(x.split(_BLOCK, 1), mean.split(_BLOCK), strict=True):
        yield part.double() - centre


def logistic_plane(inside: Tensor, outside: Tensor, ridge: float = 1.0) -> tuple[Tensor, float]:
    """The plane of a balanced logistic regression between two samples: w·z + b >= 0 says "inside".

    Minimises the sum of n/(2 n_class) · log(1 + exp(∓(w·z + b))) plus ridge/2 · ‖w‖² (b is not penalised) by L-BFGS,
    the convention of scikit-learn's `LogisticRegression(class_weight="balanced", C=1/ridge)`.
    inside (n, k), outside (m, k) float. Returns (w (k,) float64, b). Raises ShapeError for an empty sample or other widths.
    """
    if not len(inside) or not len(outside) or inside.shape[1] != outside.shape[1]:
        raise ShapeError(
            f"expected two samples of one width, found {tuple(inside.shape)} and {tuple(outside.shape)}; give prompts of both kinds"
        )
    z = torch.cat([inside, outside]).double()
    sign = torch.cat([torch.ones(len(inside)), -torch.ones(len(outside))]).double()
    n = len(z)
    weight = torch.where(sign > 0, n / (2 * len(inside)), n / (2 * len(outside)))
    plane = torch.zeros(z.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [plane], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        margin = sign * (z @ plane[:-1] + plane[-1])
        value = (weight * torch.nn.functional.softplus(-margin)).sum() + ridge / 2 * plane[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    plane = plane.detach()
    return plane[:-1], float(plane[-1])
