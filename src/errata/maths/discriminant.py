"""Linear discriminants: a projection that brings classes apart, and a plane between two of them."""

import torch
from torch import Tensor

from errata.errors import ShapeError


def within_class_projection(x: Tensor, labels: Tensor, k: int, shrinkage: float = 0.05) -> tuple[Tensor, Tensor]:
    """Whiten the spread within classes and keep the `k` directions along which class means differ most.

    Source: Fisher's linear discriminant for many classes (Rao 1948); Euclidean distance after the projection is
    Mahalanobis distance under the pooled within-class covariance, restricted to the discriminating directions.
    x (n, D) float; labels (n,) integer; shrinkage in [0, 1): share of the mean variance added to the within-class
    covariance. Returns (mean (D,), projection (D, min(k, D, classes − 1))), float64; z = (x − mean) @ projection, in units
    of within-class standard deviations. Raises ShapeError if labels do not match x or name fewer than two classes.
    """
    if labels.shape != x.shape[:1]:
        raise ShapeError(
            f"expected one label for each of the {len(x)} rows, found labels of shape {tuple(labels.shape)}"
        )
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ShapeError("expected at least two classes to discriminate, found fewer; give prompts of more facts")
    x = x.double()
    means = torch.zeros(len(classes), x.shape[1], dtype=x.dtype).index_add_(0, index, x) / counts[:, None]
    centred = x - means[index]
    within = centred.T @ centred / len(x)
    within = within + shrinkage * within.diagonal().mean() * torch.eye(len(within), dtype=x.dtype)
    mean = means.mean(0)
    between = (means - mean).T @ (means - mean) / len(classes)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors / values.clamp(min=values[-1] * 1e-12).sqrt()
    spread, directions = torch.linalg.eigh(whiten.T @ between @ whiten)
    keep = min(k, len(classes) - 1, x.shape[1])
    order = spread.argsort(descending=True)[:keep]
    return mean, whiten @ directions[:, order]


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
