"""A block's MLP at some tokens only: what a pass ends in is read at a few positions, and no later layer asks for the others."""

from typing import Any

import torch
from torch import Tensor, nn

from errata.model.anatomy import TABLE, Anatomy, submodule
from errata.model.attached import acts_in
from errata.model.hooks import ForwardHook, Hooks, PreHook


def sparing(model: nn.Module, parts: Anatomy, layer: int, flat: Tensor) -> Hooks:
    """Inside, the MLP of block `layer` sees the tokens `flat` (m,) alone, (1, m, d), and puts out zero for the others.

    flat: row * width + column of a batch's tokens, each once. The block's output is right at these tokens, and nowhere else.
    """
    shapes: list[torch.Size] = []

    def gather(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = args[0]
        shapes.append(states.shape)
        picked = states.reshape(-1, states.shape[-1]).index_select(0, flat.to(states.device))
        return (picked.reshape(*(1,) * (states.ndim - 2), *picked.shape), *args[1:]), kwargs

    def scatter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        shape = shapes[-1]
        rows = output.new_zeros(shape[:-1].numel(), output.shape[-1])
        return rows.index_copy(0, flat.to(output.device), output.reshape(-1, output.shape[-1])).reshape(*shape[:-1], -1)

    before: list[tuple[str, PreHook]] = [(paths[layer], gather) for paths in (parts.mlp_in, parts.mlp_gate) if paths]
    after: list[tuple[str, ForwardHook]] = [(parts.mlp_out[layer], scatter)]
    return Hooks(model, forward=after, pre=before)


def can_spare(model: nn.Module, parts: Anatomy, layer: int) -> bool:
    """Whether the block's MLP is two maps, or three, of a known family, and nobody else's hook would see its tokens apart."""
    known = parts.family in TABLE and bool(parts.mlp_in and parts.mlp_out)
    return known and not acts_in(model, submodule(model, parts.blocks[layer]))
