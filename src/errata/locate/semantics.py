"""Does an edited fact live where true facts with the same object live? Cosines to anchors by layer, and a projection.

Source: Jeong et al. 2025 (STEAM), the layer-wise cosine of edited facts with their objects' anchors and the 2-D projection of
residual streams. Raw cosines share a large common direction (a few coordinates are large whatever the text), so centred ones
stand beside them: of states and anchors minus the mean of all anchors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from errata.errors import RequestError, ShapeError
from errata.locate.figures import LINES, new_figure
from errata.model.anatomy import Site
from errata.model.states import states_at
from errata.model.tokens import token_ids


def last_states_by_layer(model: Any, tokenizer: Any, prompts: Sequence[str], layers: Sequence[Site]) -> Tensor:
    """(n, layers, d) float32 on the CPU: states of each prompt's last token, with what is attached to the model."""
    rows = token_ids(tokenizer, prompts)
    found = states_at(model, rows, [[-1]] * len(rows), list(layers))
    return torch.stack([torch.cat(found[layer]) for layer in layers], 1)


def cosines(states: Tensor, anchors: Tensor, centre: Tensor | None = None) -> Tensor:
    """(n, layers) cosine of each state with its anchor, both (n, layers, d), raw or after taking `centre` (layers, d) off.

    Raises ShapeError.
    """
    if states.shape != anchors.shape or states.ndim != 3 or (centre is not None and centre.shape != states.shape[1:]):
        raise ShapeError(
            f"expected states and anchors of one shape (n, layers, d) and a centre (layers, d), found {tuple(states.shape)}, "
            f"{tuple(anchors.shape)} and {None if centre is None else tuple(centre.shape)}."
        )
    if centre is not None:
        states, anchors = states - centre, anchors - centre
    return F.cosine_similarity(states, anchors, dim=-1)


def principal_plane(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean (d,), axes (2, d), shares (2,)): the plane of largest variance of states (n, d), by SVD (PCA).

    shares: of the variance along each axis; each axis's largest coordinate is positive. Raises ShapeError for fewer than 3.
    """
    if states.ndim != 2 or len(states) < 3:
        raise ShapeError(f"expected at least 3 states (n, d) to project, found {tuple(states.shape)}.")
    x = states.double()
    mean = x.mean(0)
    _, values, rows = torch.linalg.svd(x - mean, full_matrices=False)
    axes = rows[:2]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return mean, axes * signs, values[:2].square() / values.square().sum()


def cosine_figure(
    curves: Mapping[str, tuple[Tensor, Tensor]], edited: Sequence[int] = (), aligned: Sequence[int] = ()
) -> Figure:
    """Raw and centred cosines (n, L) by layer, a line with its 95 % band for each name.

    edited: layers that were edited, marked by a line; aligned: first and last aligned layer, shaded.
    Raises RequestError without curves.
    """
    if not curves:
        raise RequestError("expected cosines to draw, found none.")
    figure = new_figure(6.6, 3.0)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    for side, (axes, title) in enumerate(zip(panels, ("raw", "centred"), strict=True)):
        for (name, both), colour in zip(curves.items(), LINES[2:] + LINES[:2], strict=False):
            values = both[side].double().numpy()
            mean, half = values.mean(0), 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
            layers = np.arange(len(mean))
            axes.plot(layers, mean, color=colour, label=name, linewidth=1.6, marker="o", markersize=3)
            axes.fill_between(layers, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
        for layer in edited:
            axes.axvline(layer, color="black", linewidth=0.8, linestyle=":")
        if aligned:
            axes.axvspan(aligned[0] - 0.5, aligned[-1] + 0.5, color="black", alpha=0.06, linewidth=0)
        axes.set_title(f"{title} cosine with the anchor", fontsize=9)
        axes.set_xlabel("layer", fontsize=8)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("mean over edits, 95 % band", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def projection_figure(objects: Mapping[str, Mapping[str, Tensor]], fitted_on: str, title: str = "") -> Figure:
    """States of a few objects in the principal plane of those of kind `fitted_on`: {object: {kind: (n, d)}}.

    A panel for each object; kinds keep their colours. Raises RequestError without objects, ShapeError for too few states.
    """
    if not objects:
        raise RequestError("expected states of at least one object to draw, found none.")
    mean, axes_, shares = principal_plane(torch.cat([kinds[fitted_on] for kinds in objects.values()]))
    columns = min(3, len(objects))
    rows = -(-len(objects) // columns)
    figure = new_figure(2.9 * columns + 0.4, 2.7 * rows + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (name, kinds) in zip(panels, objects.items(), strict=False):
        for (kind, states), colour in zip(kinds.items(), ("#BBBBBB", *LINES[2:]), strict=False):
            x, y = ((states.double() - mean) @ axes_.T).T.numpy()
            axes.scatter(x, y, s=16, color=colour, label=kind, alpha=0.85, linewidth=0)
        axes.set_title(name, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=7)
    for axes in panels[len(objects) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(objects) - columns) : len(objects)]:
        axes.set_xlabel(f"first component ({float(shares[0]):.0%} of variance)", fontsize=8)
    for axes in panels[::columns]:
        axes.set_ylabel(f"second component ({float(shares[1]):.0%})", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
