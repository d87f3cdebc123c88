"""Forward passes of a value search: each token left of the vectors and each layer below them once, the rest at every step.

A vector added at one layer and token changes only that token and those after it, in the layers above. Without a graph, and in
pieces that wait for nothing else:
- contexts that several edits share run once for all (`heads_pass`), and leave keys and values in every layer;
- what stands between a context and the edited token runs behind those, and leaves its own;
- the edited token and what follows run behind both, up to the layer (`prefix_pass`);
and every step then runs the layers above over these last tokens, behind the keys and values of the others (`ReusedPass`), the
MLP of the last layer only where logits are read. `FullPass` runs everything at every step instead: for families whose caches
cannot be used so, and as the other side of the test that both agree.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from errata.editors._value_rows import Layout
from errata.errors import AnatomyError
from errata.model.anatomy import Anatomy, Site, submodule
from errata.model.cache import with_cache
from errata.model.hooks import Capture, Hooks, first_tensor, intervene, with_first_tensor
from errata.model.sparing import sparing
from errata.model.tokens import Batch, pad

States = Mapping[Site, Tensor]
KeysValues = tuple[Tensor | None, Tensor | None]


class _Stop(Exception):
    """Everything asked for has been computed."""


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A hook behind which nothing is run."""
    raise _Stop


@dataclass(frozen=True)
class Place:
    """Where vectors are added: module `path`, an output of block `layer`; `first` is the first layer that is run anew.

    first is layer + 1 if the module's output enters the block's output by plain addition, so that a vector added to the one
    is a vector added to the other; else it is layer, and the block itself runs anew. sparing: whether the last layer's MLP
    runs at the reads alone.
    """

    path: str
    layer: int
    first: int
    sparing: bool = False


class Pass(Protocol):
    """Runs a layout of rows with a vector per edit."""

    layout: Layout

    def __call__(self, delta: Tensor) -> tuple[Tensor, States]:
        """(R, V) logits at the reads, and (n, S, d) states of the layers asked for, from the edited token on."""

    def keep(self, edits: Tensor) -> "Pass":
        """The pass of some edits, in ascending order and renumbered from 0."""


@dataclass(frozen=True, eq=False)
class Heads:
    """Keys and values of contexts in every layer: (U, heads, W, d_head) each; `index` gives the number of a context's ids."""

    index: Mapping[tuple[int, ...], int]
    cached: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the unedited rows leave behind.

    outputs (n, d): the site's output at the edited token; keys (n, m): the site's input there, for the MLP's projection.
    If states are reused, start (n, S, d): those at the last layer that is not run anew; cached: keys and values
    (n, heads, lead, d_head) per layer from `first` on; shape: a block's output, for its type.
    """

    outputs: Tensor
    keys: Tensor | None
    start: Tensor | None = None
    cached: tuple[KeysValues, ...] = ()
    shape: Any = None

    def take(self, rows: Tensor) -> "Prefix":
        """That of the rows (k,)."""
        cached = tuple((_at(keys, rows), _at(values, rows)) for keys, values in self.cached)
        return Prefix(self.outputs[rows], _at(self.keys, rows), _at(self.start, rows), cached, self.shape)


class FullPass:
    """All layers over all tokens at every step; the graph begins at the site."""

    def __init__(self, model: Any, parts: Anatomy, place: Place, layout: Layout, layers: Sequence[Site] = ()):
        self._model, self._parts, self._place, self._layers = model, parts, place, tuple(layers)
        self.layout = layout

    def __call__(self, delta: Tensor) -> tuple[Tensor, States]:
        """As `Pass`."""
        layout, paths = self.layout, _paths(self._parts, self._layers)
        with ExitStack() as stack:
            add = _adding(delta[layout.owner], layout.at)
            stack.enter_context(intervene(self._model, {self._place.path: add}))
            stack.enter_context(
                _reading(self._model, self._parts, layout.read_row, layout.read_col + _per_read(layout))
            )
            seen = stack.enter_context(Capture(self._model, paths.values(), detach=False))
            output = self._model(**layout.batch.inputs(self._model), use_cache=False)
        return _logits(output, layout), {layer: layout.after(seen[path]) for layer, path in paths.items()}

    def keep(self, edits: Tensor) -> "FullPass":
        """As `Pass`."""
        return FullPass(self._model, self._parts, self._place, self.layout.keep(edits)[0], self._layers)


class ReusedPass:
    """The layers from `place.first` on over the tokens from the edited one on."""

    def __init__(
        self, model: Any, parts: Anatomy, place: Place, layout: Layout, prefix: Prefix, layers: Sequence[Site] = ()
    ):
        self._model, self._parts, self._place, self._layers = model, parts, place, tuple(layers)
        self._prefix, self.layout, self._inputs = prefix, layout, layout.suffix().inputs(model)

    def __call__(self, delta: Tensor) -> tuple[Tensor, States]:
        """As `Pass`."""
        layout, place, prefix = self.layout, self._place, self._prefix
        paths, added = _paths(self._parts, self._layers), delta[layout.owner]
        start = prefix.start
        with ExitStack() as stack:
            if place.first > place.layer:
                assert start is not None, "a block below was to be bypassed, but its states were not kept"
                start = torch.cat([start[:, :1] + added[:, None].to(start), start[:, 1:]], 1)
            else:
                stack.enter_context(intervene(self._model, {place.path: _adding(added, torch.zeros_like(layout.at))}))
            if start is not None:
                output = with_first_tensor(prefix.shape, start)
                stack.enter_context(_bypassed(self._model, self._parts.blocks[: place.first], output))
            if place.sparing:
                flat = layout.read_row * layout.span + layout.read_col
                stack.enter_context(sparing(self._model, self._parts, -1, flat))
            stack.enter_context(_reading(self._model, self._parts, layout.read_row, layout.read_col))
            seen = stack.enter_context(Capture(self._model, paths.values(), detach=False))
            cache = _cache(layout.lead, layout.device, place.first, prefix.cached)
            output = self._model(**self._inputs, **with_cache(self._model, cache))
        return _logits(output, layout), {layer: seen[path] for layer, path in paths.items()}

    def keep(self, edits: Tensor) -> "ReusedPass":
        """As `Pass`."""
        layout, rows = self.layout.keep(edits)
        return ReusedPass(self._model, self._parts, self._place, layout, self._prefix.take(rows), self._layers)


def heads_pass(
    model: Any, parts: Anatomy, index: Mapping[tuple[int, ...], int], device: torch.device, rows: int
) -> Heads:
    """Run contexts by themselves, `rows` at a time, without a graph."""
    ids, width = list(index), max(map(len, index), default=0)
    cached: list[list[tuple[Tensor, ...]]] = [[] for _ in range(parts.n_layers)]
    with torch.no_grad():
        for at in range(0, len(ids), max(1, rows)):
            found = _fresh(model, parts, pad(ids[at : at + max(1, rows)], 0, device), 0, ())
            for layer, both in zip(cached, found, strict=True):
                layer.append(tuple(F.pad(x, (0, 0, 0, width - x.shape[2])) for x in both))
    if not ids:
        return Heads(index)
    return Heads(index, tuple((torch.cat([k for k, _ in own]), torch.cat([v for _, v in own])) for own in cached))


def prefix_pass(
    model: Any, parts: Anatomy, place: Place, layout: Layout, heads: Heads | None, *, keys: bool, rows: int
) -> Prefix:
    """What the unedited rows leave behind, `rows` at a time, without a graph; states are kept if `heads` are given."""
    with torch.no_grad():
        found = [
            _prefix(model, parts, place, layout.take(part), heads, keys)
            for part in torch.arange(layout.n, device=layout.device).split(max(1, rows))
        ]
    if len(found) == 1:
        return found[0]
    return Prefix(
        torch.cat([p.outputs for p in found]),
        _joined([p.keys for p in found]),
        _joined([p.start for p in found]),
        tuple(
            (_joined([p.cached[i][0] for p in found]), _joined([p.cached[i][1] for p in found]))
            for i in range(len(found[0].cached))
        ),
        found[0].shape,
    )


def _prefix(model: Any, parts: Anatomy, place: Place, layout: Layout, heads: Heads | None, keys: bool) -> Prefix:
    inputs, behind, at = layout.batch, {"use_cache": False}, layout.at
    cached: tuple[KeysValues, ...] = ()
    if heads is not None:
        cached = _left(model, parts, layout, heads)
        cache = _cache(layout.lead, layout.device, 0, cached)
        inputs, behind, at = layout.suffix(), with_cache(model, cache), torch.zeros_like(layout.at)
    below = parts.blocks[place.first - 1] if heads is not None and place.first > 0 else None
    kept: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kept["below"] = output

    with ExitStack() as stack:
        stack.enter_context(suppress(_Stop))
        out = stack.enter_context(Capture(model, [place.path]))
        into = stack.enter_context(Capture(model, [place.path] if keys else [], of="input"))
        last = [*([(below, keep)] if below is not None else []), (parts.blocks[place.layer], _stop)]
        stack.enter_context(Hooks(model, forward=last))
        model(**inputs.inputs(model), **behind)
    return Prefix(
        _one(out[place.path], at),
        _one(into[place.path], at) if keys else None,
        None if below is None else first_tensor(kept["below"]),
        cached[place.first :],
        None if below is None else with_first_tensor(kept["below"], torch.empty(0)),
    )


def _left(model: Any, parts: Anatomy, layout: Layout, heads: Heads) -> tuple[KeysValues, ...]:
    """Keys and values of what is left of the edited tokens, in every layer; runs only what the heads do not have."""
    fresh: tuple[KeysValues, ...] = ((None, None),) * parts.n_layers
    cached: Sequence[KeysValues] = heads.cached or fresh
    # With no head at all, rows without a token on the left still need something of the right shape to be masked.
    if bool((layout.at > layout.head).any()) or (layout.lead and not heads.cached):
        lead = replace(layout, at=layout.head, lead=int(layout.head.max()), head=layout.head)
        behind = [(lead.before(keys, None), lead.before(values, None)) for keys, values in cached]
        fresh = _fresh(model, parts, layout.stretch(layout.head, layout.at), lead.lead, behind)
    return tuple(
        (layout.before(keys, new_keys), layout.before(values, new_values))
        for (keys, values), (new_keys, new_values) in zip(cached, fresh, strict=True)
    )


def _fresh(
    model: Any, parts: Anatomy, batch: Batch, lead: int, behind: Sequence[KeysValues]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values, in every layer, of the tokens of a batch behind a cache of `lead` tokens."""
    cache = _cache(lead, batch.ids.device, 0, behind or ((None, None),) * parts.n_layers)
    nothing = torch.zeros(1, dtype=torch.long, device=batch.ids.device)
    # The last layer's keys and values are there when its attention is done; the cache does not need what follows.
    with (
        suppress(_Stop),
        _reading(model, parts, nothing, nothing),
        Hooks(model, [(p, _stop) for p in parts.attention[-1:]]),
    ):
        model(**batch.inputs(model), **with_cache(model, cache))
    layers: Sequence[Any] = cache.layers
    return tuple(layer.fresh for layer in layers)


def added_plainly(model: Any, parts: Anatomy, path: str, layer: int, layout: Layout) -> bool:
    """Whether a vector added to the output of `path` at the edited token is added to the output of block `layer` as it is.

    So it is in a pre-norm block; not where a norm follows the MLP (Gemma 2). Found by trying it on the first row.
    """
    row = layout.take(torch.zeros(1, dtype=torch.long, device=layout.device))
    block = parts.blocks[layer]
    with torch.no_grad(), Capture(model, [block, path]) as seen:
        model(**row.batch.inputs(model), use_cache=False)
        before, output = _one(seen[block], row.at)[0].double(), _one(seen[path], row.at)[0]
        probe = torch.cos(torch.arange(len(output), device=output.device, dtype=output.dtype))
        probe = probe * (torch.linalg.vector_norm(output) / torch.linalg.vector_norm(probe)).clamp(min=1e-3)
        with intervene(model, {path: _adding(probe[None], row.at)}), Capture(model, [block]) as moved:
            model(**row.batch.inputs(model), use_cache=False)
        after = _one(moved[block], row.at)[0].double()
    error = float((after - before - probe.double()).norm() / probe.double().norm())
    return error < torch.finfo(output.dtype).eps ** 0.5


def can_spare(parts: Anatomy, place: Place, layers: Sequence[Site]) -> bool:
    """Whether the last layer's MLP may run at the reads alone: it runs anew, is not edited, and no term reads its states."""
    last = parts.n_layers - 1
    read = any(layer == "final" or (isinstance(layer, int) and layer % parts.n_layers == last) for layer in layers)
    return place.layer < last and not read and bool(parts.mlp_in and parts.mlp_out)


class _Still(DynamicLayer):
    """A layer of a cache that hands out its tokens before the new ones, and keeps the new ones apart, as `fresh`."""

    _layer_type = None

    def __init__(self, keys: Tensor | None, values: Tensor | None):
        super().__init__()
        self.fresh: tuple[Tensor, Tensor] | None = None
        if keys is not None and values is not None:
            # By hand: the arguments of `lazy_initialization` changed between versions 4 and 5.
            self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Old and new together; the old stay as they are, so every step starts from the same cache."""
        self.fresh = key_states.detach(), value_states.detach()
        if self.keys is None or self.values is None:
            return key_states, value_states
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def _cache(lead: int, device: Any, first: int, cached: Sequence[KeysValues]) -> DynamicCache:
    """A cache of `lead` tokens; below `first`, where nothing runs, only its length counts."""
    blank = torch.empty(1, 1, lead, 1, device=device)
    cache = DynamicCache()
    cache.layers = [*(_Still(blank, blank) for _ in range(first)), *(_Still(k, v) for k, v in cached)]
    return cache


@contextmanager
def _bypassed(model: nn.Module, paths: Sequence[str], output: Any) -> Iterator[None]:
    """Inside, the modules compute nothing and return `output`; their own forward comes back afterwards."""
    blocks = [submodule(model, path) for path in paths]
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = lambda *args, **kwargs: output
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _adding(vectors: Tensor, at: Tensor) -> Callable[[Tensor], Tensor]:
    """Adds a vector per row (n, d) at one token of each in an output (n, T, d), or (n * T, d) as OPT's MLP has it."""

    def change(output: Tensor) -> Tensor:
        rows = output.reshape(len(at), -1, output.shape[-1])
        where = (torch.arange(len(at), device=rows.device), at.to(rows.device))
        return torch.index_put(rows, where, vectors.to(rows), accumulate=True).reshape(output.shape)

    return change


def _one(tensor: Tensor, at: Tensor) -> Tensor:
    """(n, d) what stands at one token of each row in a module's input or output, on the device of `at`."""
    rows = tensor.reshape(len(at), -1, tensor.shape[-1])
    return rows[torch.arange(len(at), device=rows.device), at.to(rows.device)].to(at.device)


def _at(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.index_select(0, rows.to(tensor.device))


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None


def _per_read(layout: Layout) -> Tensor:
    return layout.at[layout.read_row]


def _reading(model: Any, parts: Anatomy, rows: Tensor, columns: Tensor) -> Hooks:
    """Inside, the head sees the states of some tokens only, (1, R, d); what comes after it is elementwise."""
    if parts.head is None:
        raise AnatomyError(
            f"expected a model with a head that says the next token, found none in this {parts.family!r}."
        )

    def gather(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = args[0]
        flat = (rows * states.shape[1] + columns).to(states.device)
        return (states.reshape(-1, states.shape[-1]).index_select(0, flat)[None], *args[1:]), kwargs

    return Hooks(model, pre=[(parts.head, gather)])


def _logits(output: Any, layout: Layout) -> Tensor:
    """(R, V) on the layout's device, a view: an index would cost a copy of them all on the way back."""
    return first_tensor(output).flatten(0, 1).to(layout.device)


def _paths(parts: Anatomy, layers: Sequence[Site]) -> dict[Site, str]:
    return {layer: parts.site(layer) for layer in layers}
