"""Linear discriminants: a projection in which points of one class lie close and classes lie apart."""

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
