"""Codebooks and routed adapters at run time: whose output is replaced, for the whole batch or row by row.

All such parts on a model live in one `OutputTable`. A forward hook on each linear map that they name asks with the map's input
and replaces its output where there is an answer; every other output keeps its bits. The codebook entries at one map act as one
codebook, whichever patches they came from: the later of two edits of one key holds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.codebook import CodebookEntry, Place, Routed, defer, remember
from errata.errors import AnatomyError, ConfigError, EditError, RequestError, ShapeError
from errata.low_rank_table import base_layer, forget_decisions, sizes
from errata.maths.codebook import Codebook
from errata.model import arguments
from errata.model.anatomy import anatomy, submodule
from errata.model.attached import OUTPUTS, Suspendable
from errata.model.cache import cache_given, cache_in, cached_tokens
from errata.model.hooks import first_tensor, with_first_tensor

OutputPart = CodebookEntry | Routed
Reply = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Queries (m, a) -> (m,) who has an answer, (m, b) the answers; or, where one query answers for its row, (m, T, b) by column."""


# -- one place -------------------------------------------------------------------------------------------------------------


def book_reply(book: Codebook, values: Tensor | None = None) -> Reply:
    """Answers of a codebook. values (n, b): in place of its own, for a search that needs their gradient."""

    def reply(queries: Tensor) -> tuple[Tensor, Tensor]:
        entry, _ = book.find(queries)
        answers = book.on(queries.device)[1] if values is None else values.to(queries.device)
        return entry >= 0, answers[entry.clamp(min=0)]

    return reply


def routed_reply(part: Routed) -> Reply:
    """Answers of a routed adapter, whose weights are kept where queries come from, in their dtype."""
    copies: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def reply(queries: Tensor) -> tuple[Tensor, Tensor]:
        kind = queries.device, queries.dtype
        if kind not in copies:
            with torch.inference_mode(False), torch.no_grad():  # passes that need gradients may use them later
                copies[kind] = {name: t.to(*kind) for name, t in part.weights.items()}
        weights = copies[kind]
        if part.form == "memory":
            return torch.ones(len(queries), dtype=torch.bool, device=queries.device), remember(weights, queries)
        gate, answers = defer(weights, queries)
        return gate >= part.threshold, answers

    return reply


def replaced(reply: Reply, place: Place, x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """y (n, T, b) with the answers to x (n, T, a) in it. at (n,): the column that asks for its row."""
    if place.replace == "each":
        hit, answer = reply(x.reshape(-1, x.shape[-1]))
        hit, answer = hit.reshape(x.shape[:2]), answer.reshape(y.shape)
    else:
        hit, answer = reply(x[torch.arange(len(x), device=x.device), at])
        steps, at = torch.arange(x.shape[1], device=x.device), at[:, None]
        where = {"last": steps == at, "all": (steps >= 0).expand(len(x), -1), "prompt": steps < at}[place.replace]
        hit, answer = hit[:, None] & where, answer if answer.dim() == 3 else answer[:, None]
    return torch.where(hit[..., None].to(y.device), answer.to(y), y) if bool(hit.any()) else y


class Site:
    """What acts at one linear map: its codebook, if any, and its adapters, in the order in which they were loaded."""

    def __init__(self, parts: Sequence[OutputPart]):
        self.replies: list[tuple[Reply, Place]] = []
        self.book: Codebook | None = None
        for part in parts:
            if isinstance(part, Routed):
                self.replies.append((routed_reply(part), part.place))
                continue
            if self.book is None:
                self.book = Codebook(part.rules)
                self.replies.append((book_reply(self.book), part.place))
            part.insert_into(self.book)

    def __call__(
        self, x: Tensor, y: Tensor, at: Callable[[Place], Tensor], now: "_Pass | None" = None, row: int = -1
    ) -> Tensor:
        """y (n, T, b) with all answers to x (n, T, a) in it. at: which column asks for each row, by place; now: in which pass;
        row: the only one of its batch that x is of, -1 for all of them."""
        for reply, place in self.replies:
            heard = reply if now is None else now.heard(reply, place, len(x), row)
            y = y if heard is None else replaced(heard, place, x, y, at(place))
        return y


def check_alike(parts: Iterable[OutputPart]) -> None:
    """Raise ConfigError if codebook entries at one map are not of one codebook."""
    first: CodebookEntry | None = None
    for part in parts:
        if isinstance(part, CodebookEntry):
            first = first or part
            if (part.place, part.rules) != (first.place, first.rules):
                raise ConfigError(
                    f"the edits {first.edit} and {part.edit} are of codebooks at one layer ({part.place.layer}) with different rules "
                    f"({first.place.replace}, {first.rules} and {part.place.replace}, {part.rules}); fit both with one configuration"
                )


# -- the table -------------------------------------------------------------------------------------------------------------


Answers = dict[tuple[Reply, int], tuple[Tensor, Tensor]]
"""What start tokens were answered, by who answered and the row (-1: all)."""


@dataclass
class _Pass:
    """One forward pass: the mask of its columns (n, T), and how many columns the cache holds before them."""

    mask: Tensor
    past: int
    ends: Tensor | None  # (n,) the column in which each row's prompt ends, from this pass's first one
    answering: bool  # in a decoder behind an encoder
    answers: Answers = field(default_factory=dict)
    cache: Any = None  # the one that the pass was given

    def heard(self, reply: Reply, place: Place, n: int, row: int) -> Reply | None:
        """Who is asked in this pass, None for nobody.

        In a decoder behind an encoder the start token asks for all that follow: with a cache once, in the pass that begins it.
        Beams may change places behind it, but only with those of the same text, whose start tokens are alike. Raises EditError
        where its answer is wanted and was not given.
        """
        if not self.answering or place.replace == "each":
            return reply
        if self.past and place.replace != "all":
            return None

        def first(queries: Tensor) -> tuple[Tensor, Tensor]:
            return self.answers.setdefault((reply, row), reply(queries))

        if not self.past:
            return first
        hit, answer = self.answers.get((reply, row), (None, None))
        if hit is None or answer is None or len(hit) != n:
            raise EditError(
                f"a patch that replaces the outputs of all tokens at layer {place.layer} needs the answer to the start token behind a "
                f"key-value cache, and that of these {n} rows was never asked; attach the patch before the start token is fed, or "
                "use model.generate"
            )
        return lambda _: (hit, answer)


class OutputTable(Suspendable):
    """Every codebook entry and routed adapter on one model; hooks come with the first part and leave with the last."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._loads: dict[object, list[tuple[str, OutputPart]]] = {}
        self._abouts: dict[object, dict[str, str]] = {}
        self._rows: list[list[tuple[str, OutputPart]]] | None = None
        self._sites: dict[str, tuple[Site, dict[int, Site]]] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._passes: list[_Pass] = []
        self._answers: WeakKeyDictionary[Any, Answers] = WeakKeyDictionary()  # to the start tokens, by cache
        self._lengths: Sequence[int] | None = None

    @classmethod
    def on(cls, model: nn.Module) -> "OutputTable":
        """The model's table; a new one if there is none, which the model keeps once something is loaded."""
        return vars(model).get(OUTPUTS) or cls(model)

    def add(self, owner: object, parts: Sequence[OutputPart], keys: dict[str, str]) -> list[tuple[str, str]]:
        """Load parts under an owner; keys: edit id -> what it is about (`EditRequest.key`).

        Returns (edit, earlier edit) for what is about the same thing. Raises RequestError for an adapter that is loaded
        already, AnatomyError and ShapeError for a map that is not there or of another size, ConfigError for codebooks that do
        not go together.
        """
        placed = self._placed(parts)
        loaded = {edit for _, part in self._whole() if isinstance(part, Routed) for edit in part.edits}
        if twice := loaded & {edit for part in parts if isinstance(part, Routed) for edit in part.edits}:
            raise RequestError(
                f"the adapter of the edit {min(twice)} is attached to this model already; detach it first"
            )
        self._check_together([*self._whole(), *placed])
        about = {key: edit for known in self._abouts.values() for edit, key in known.items()}
        conflicts = [(edit, about[key]) for edit, key in keys.items() if about.get(key, edit) != edit]
        self._loads[owner], self._abouts[owner] = placed, keys
        self._changed()
        return conflicts

    def remove(self, owner: object) -> None:
        """Unload an owner's parts; harmless if it has none."""
        if self._loads.pop(owner, None) is not None:
            self._abouts.pop(owner)
            self._changed()

    @contextmanager
    def rows(self, rows: Sequence[Sequence[OutputPart]]) -> Iterator[None]:
        """Inside, every batch has len(rows) rows and row i has rows[i], inserted behind what is loaded for all."""
        placed = [self._placed(own) for own in rows]
        for own in placed:
            self._check_together([*self._whole(), *own])
        self._rows = placed if any(placed) else None
        try:
            self._changed()
            yield
        finally:
            self._rows = None
            self._changed()

    @contextmanager
    def prompts(self, lengths: Sequence[int]) -> Iterator[None]:
        """Inside, rows are a prompt of so many real tokens and a completion."""
        before, self._lengths = self._lengths, lengths
        try:
            yield
        finally:
            self._lengths = before

    # -- what is loaded ----------------------------------------------------------------------------------------------

    def _whole(self) -> list[tuple[str, OutputPart]]:
        return [placed for load in self._loads.values() for placed in load]

    def _placed(self, parts: Sequence[OutputPart]) -> list[tuple[str, OutputPart]]:
        found, known, checked = [], anatomy(self.model), set()
        for part in parts:
            path = part.place.path(known)
            if (path, part.width) not in checked:
                module = base_layer(submodule(self.model, path))
                here = (known.d_model, known.d_model) if part.place.site == "mlp" else sizes(module)
                if here is None:
                    raise AnatomyError(f"expected a linear map at {path!r}, found a {type(module).__name__}.")
                if here != part.width:
                    raise ShapeError(
                        f"expected a {part.kind} part of {here[0]} x {here[1]} (d_out x d_in) at {path!r}, found {part.width[0]} x "
                        f"{part.width[1]}; attach the patch to the model and layer that it was fitted on"
                    )
                checked.add((path, part.width))
            found.append((path, part))
        return found

    def _check_together(self, placed: Sequence[tuple[str, OutputPart]]) -> None:
        for path in {path for path, _ in placed}:
            check_alike(part for p, part in placed if p == path)

    def _changed(self) -> None:
        """Bring sites and hooks in line with what is loaded."""
        whole, rows = self._whole(), self._rows or []
        paths = dict.fromkeys([path for path, _ in whole] + [path for own in rows for path, _ in own])
        self._sites = {}
        for path in paths:
            shared = [part for p, part in whole if p == path]
            each = {i: [part for p, part in own if p == path] for i, own in enumerate(rows)}
            self._sites[path] = Site(shared), {i: Site([*shared, *own]) for i, own in each.items() if own}
        for path in [path for path in self._hooks if path and path not in paths]:
            self._hooks.pop(path).remove()
        for path in paths:
            if path not in self._hooks:
                module = submodule(self.model, path)
                self._hooks[path] = module.register_forward_hook(self._hook(path), with_kwargs=True)
        self._passes.clear()
        self._answers.clear()
        self._watch(bool(paths))
        forget_decisions(self.model)

    def _watch(self, wanted: bool) -> None:
        """The model's own hooks, which see masks, and its pointer to this table: there while anything is."""
        if wanted:
            vars(self.model)[OUTPUTS] = self
        elif vars(self.model).get(OUTPUTS) is self:
            del vars(self.model)[OUTPUTS]
        if wanted and not hasattr(self, "_watching"):
            self._watching = [
                hook
                for module, answering in _passing(self.model)
                for hook in (
                    module.register_forward_pre_hook(self._before(answering), with_kwargs=True),
                    module.register_forward_hook(self._after, always_call=True),
                )
            ]
        elif not wanted and hasattr(self, "_watching"):
            for hook in self._watching:
                hook.remove()
            del self._watching

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._off:
                return None
            x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
            now = self._passes[-1] if self._passes else None
            shape = y.shape
            if x.dim() == 2:  # OPT's MLP runs on (n * T, a)
                n = len(now.mask) if now is not None else 1
                x, y = x.reshape(n, -1, x.shape[-1]), y.reshape(n, -1, shape[-1])
            wide = torch.promote_types(x.dtype, torch.float32)
            with torch.autocast(y.device.type, enabled=False):
                new = self._act(path, x.to(y.device, wide), y, now)
            return None if new is y else with_first_tensor(output, new.reshape(shape))

        return hook

    def _act(self, path: str, x: Tensor, y: Tensor, now: _Pass | None) -> Tensor:
        shared, each = self._sites[path]
        if self._rows is None:
            return shared(x, y, lambda place: asking(place, x, now), now)
        if len(x) != len(self._rows):
            raise EditError(
                f"expected batches of {len(self._rows)} rows, as many as patches were attached by row, found {len(x)}; where "
                "generation repeats rows (beams, num_return_sequences), list each patch as often, one after another"
            )
        new = []
        for i in range(len(x)):
            own = slice(i, i + 1)

            def at(place: Place, own: slice = own) -> Tensor:
                return asking(place, x, now)[own]

            new.append(each.get(i, shared)(x[own], y[own], at, now, i))
        return torch.cat(new)

    def _before(self, answering: bool) -> Any:
        """The hook before a pass. answering: of a decoder behind an encoder, whose prompt is its start token."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = arguments.named(module, args, kwargs)
            given = (named.get("input_ids"), *args[:1], named.get("inputs_embeds"))
            ids = next((t for t in given if isinstance(t, Tensor)), None)
            if ids is None:
                return
            cache, mask = cache_given(named), named.get("attention_mask")
            past = cached_tokens(cache)
            n, T = ids.shape[:2]
            if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != (n, past + T):
                mask = torch.ones(n, past + T, dtype=torch.bool, device=ids.device)
            ends = None
            if answering:
                ends = torch.full((n,), -past, device=ids.device)
            elif self._lengths is not None and len(self._lengths) == n:
                counts = mask.bool().cumsum(1)
                wanted = torch.tensor(list(self._lengths), device=counts.device)[:, None]
                ends = (counts < wanted).sum(1) - past
            answers = self._answers.get(cache, {}) if answering and past else {}
            self._passes.append(_Pass(mask[:, past:].bool(), past, ends, answering, answers, cache))

        return hook

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._passes:
            return
        done, cache = self._passes.pop(), cache_in(output)
        cache = done.cache if cache is None else cache
        if done.answers and not done.past and cache is not None:
            self._answers[cache] = done.answers


def _passing(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """The modules whose forward sees ids and their mask, and whether it is a decoder behind an encoder.

    The model itself; of an encoder-decoder its two stacks, since generation runs the encoder alone.
    """
    parts = anatomy(model)
    if parts.encoder is None:
        return [(model, False)]
    encoder, decoder = (submodule(model, one.blocks[0].rsplit(".", 2)[0]) for one in (parts.encoder, parts))
    return [(encoder, False), (decoder, True)]


def asking(place: Place, x: Tensor, now: _Pass | None) -> Tensor:
    """(n,) the column of x (n, T, a) that asks for its row."""
    n, T = x.shape[:2]
    if now is None or now.mask.shape != (n, T):
        return torch.full((n,), 0 if place.ask == "first" else T - 1, device=x.device)
    mask = now.mask.to(x.device)
    if place.ask == "first":
        return mask.long().argmax(1)
    last = (mask.long() * torch.arange(T, device=x.device)).amax(1)
    if now.ends is None:
        return last
    ends = now.ends.to(x.device)
    return torch.where((ends >= 0) & (ends < T), ends, last)
