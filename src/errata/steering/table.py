"""Steering patches at run time: which rows and positions are steered, by which edit, at which step of its object.

All steering edits on a model live in one `SteeringTable`. Position i of a row is steered by edit e at step t when
`ids[i−t+1..i]` are the first t tokens of e's new object and the gate of e is open at position i − t; at step 0 not again
while the gate stays open after the object has been said. Where a gate has cues (`scope.recall`), a position at which an
answer is asked for again opens for the edit that the row's last question was about; its state says nothing about the fact,
so it is replaced by the mean that the map leads to, and behind the object by the mean of states that end it.

All of this is a function of the row's ids up to i, so a cached step, a beam, a sampled row, a left-padded row and a whole
uncached sequence agree. At the default site, the final norm's output, steering never reaches later positions' states. Edits
compete within one site; where rows of a batch have patches of their own, each row's edits among themselves and with those
that are loaded for all.

Counterfactual parts (SERAC) are decided in the same way; what they steer are logits, which another model gives. In a classifier
the row as a whole is steered, and its first token is asked.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from errata.counterfactual import LOGITS
from errata.model.anatomy import anatomy
from errata.model.arguments import named
from errata.model.attached import STEERED, Suspendable
from errata.model.cache import cache_in
from errata.model.hooks import first_tensor, with_first_tensor
from errata.model.room import check_room
from errata.model.tokens import Side, pad, pad_id, token_ids
from errata.steering.actions import Experts, steered
from errata.steering.decisions import decide, decision_at
from errata.steering.edits import Edits, Part, acting, refuse_late_gates
from errata.steering.memory import Memory
from errata.steering.parts import Decision
from errata.steering.passes import Pass, SeenIds
from errata.steering.points import Points
from errata.steering.steps import rows_open, steps


class SteeringTable(Suspendable):
    """Every steering edit on one model; installs its hooks with the first edit and removes them with the last."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.anatomy = anatomy(model)
        self._entries: OrderedDict[object, tuple[Part, ...]] = OrderedDict()
        self._rows: list[tuple[Part, ...]] | None = None
        self._owners: tuple[int, ...] = ()
        self._hooks: list[Any] = []
        self._passes: list[Pass] = []
        self._last: Pass | None = None
        self._nested = False
        self._lengths: Sequence[int] | None = None
        self._seen = SeenIds()
        self._experts = Experts(model)
        self._whole_rows = self.anatomy.role == "classifier"
        self._rebuild()

    # -- what is loaded ----------------------------------------------------------------------------------------------

    @classmethod
    def on(cls, model: Any, tokenizer: Any) -> "SteeringTable":
        """The model's table; made if there is none."""
        table = vars(model).get(STEERED)
        if table is None:
            table = cls(model, tokenizer)
            vars(model)[STEERED] = table
        return table

    def add(self, owner: object, parts: Sequence[Part]) -> list[tuple[str, str]]:
        """Load edits under an owner; returns (edit, earlier edit that it overrides) for equal subject and relation."""
        active = {part.key: part.edit for part in acting(self._loaded())}
        conflicts: dict[tuple[str, str], None] = {}
        for part in parts:
            if active.get(part.key, part.edit) != part.edit:
                conflicts[part.edit, active[part.key]] = None
            active[part.key] = part.edit
        self._entries[owner] = tuple(parts)
        try:
            refuse_late_gates(parts, self.anatomy.n_layers)
            self._rebuild()
            self._install()
        except BaseException:
            self.remove(owner)
            raise
        return list(conflicts)

    def remove(self, owner: object) -> None:
        """Unload an owner's edits; the last one takes the hooks along."""
        self._entries.pop(owner, None)
        self._rebuild()
        self._install()
        self._leave()

    def _leave(self) -> None:
        if not self._entries and self._rows is None:
            vars(self.model).pop(STEERED, None)

    @contextmanager
    def rows(self, rows: Sequence[Sequence[Part]], owners: Sequence[int]) -> Iterator[None]:
        """Inside, every batch has len(rows) rows, and in row i the edits rows[i] compete beside those loaded for all.

        owners: a number for each row, equal where rows have the same patch, weights' updates included: decisions are
        remembered by it. Raises ConfigError for a gate that reads above the layer that is steered.
        """
        try:
            self._rows, self._owners = [tuple(row) for row in rows], tuple(owners)
            refuse_late_gates([part for row in rows for part in row], self.anatomy.n_layers)
            self._rebuild()
            self._install()
            yield
        finally:
            self._rows, self._owners = None, ()
            self._rebuild()
            self._install()
            self._leave()

    @property
    def scoped(self) -> bool:
        """Whether an edit is loaded; all of them have a scope."""
        return bool(self.active)

    @property
    def active(self) -> list[Part]:
        """The parts that act, in any row."""
        return self._edits.active

    def _loaded(self) -> list[Part]:
        return [part for parts in self._entries.values() for part in parts]

    def _rebuild(self) -> None:
        """Number the edits anew; nothing that was decided before holds."""
        whole = self._loaded()
        rows = [whole] if self._rows is None else [[*whole, *row] for row in self._rows]
        self._edits = Edits(rows, by_row=self._rows is not None)
        self._memory = Memory(self._edits, self._owners, self._run)
        self._points = Points(self._edits, self._memory, self.tokenizer)

    def _install(self) -> None:
        """Hooks exactly for the layers and sites that the loaded edits use."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._seen.release(self.model)
        if not self.active:
            return
        gates = [balls.gate for _, balls in self._edits.groups]
        layers = dict.fromkeys(layer for gate in gates for layer in gate.layers)
        layers |= dict.fromkeys(gate.cue_layer for gate in gates if gate.cue_layer is not None)
        sites = {part.site for part in self.active}
        module = self.anatomy.module
        self._hooks.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        for layer in layers:
            self._hooks.append(module(self.model, self.anatomy.site(layer)).register_forward_hook(self._read(layer)))
        for site in sites:
            path = (self.anatomy.head or "") if site == LOGITS else self.anatomy.site(site)
            self._hooks.append(module(self.model, path).register_forward_hook(self._act(site)))
        self._hooks.append(self.model.register_forward_hook(self._after, always_call=True))
        self._seen.listen(self.model)

    @contextmanager
    def prompts(self, lengths: Sequence[int]) -> Iterator[None]:
        """Inside, rows are prompt + completion with these prompt lengths in real tokens (what encoder gates need to know)."""
        before, self._lengths = self._lengths, lengths
        try:
            yield
        finally:
            self._lengths = before

    def follow(self, cache: Any, of: Any) -> None:
        """A copy of a key-value cache holds the ids that the cache holds."""
        self._seen.follow(cache, of)

    def forget(self) -> None:
        """Forget every decision: the states that gates read are other ones from now on."""
        self._memory.forget()

    # -- the forward pass --------------------------------------------------------------------------------------------

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._nested:
            self._passes.clear()  # an interrupt may have left one
        if self._off:
            return
        self._passes.append(self._seen.begin(named(model, args, kwargs), self._lengths, self._whole_rows))

    def _after(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self._passes:
            return
        done = self._last = self._passes.pop()
        self._seen.keep(cache_in(output), done.ids)
        if not done.gated or output is None:  # an exception ended the pass early
            return
        self._memory.keep(done, self._points.sums(done))

    def _run(self, ids: Tensor) -> None:
        """The model on ids (B, N) without a cache, amid another pass."""
        outside = self._seen.announced, self._lengths, self._nested
        self._seen.announced, self._lengths, self._nested = None, None, True
        try:
            with torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        finally:
            self._seen.announced, self._lengths, self._nested = outside

    def _read(self, layer: str | int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self._passes:
                self._passes[-1].states[layer] = first_tensor(output).detach()

        return hook

    def _act(self, site: str | int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if not self._passes:
                return None
            current, found = self._passes[-1], first_tensor(output)
            decide(current, site, self._edits, self._points, self._memory)
            whole = self._whole_rows and site == LOGITS
            chosen = rows_open(current, site) if whole else steps(current, site, self._edits, self._memory)
            if site == LOGITS:
                new = self._experts.answered(found, current, chosen, self._edits, self._points)
            else:
                new = steered(found, chosen, self._edits)
            return None if new is found else with_first_tensor(output, new)

        return hook

    # -- what was decided --------------------------------------------------------------------------------------------

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """What the table says about each prompt, read at its last token; where rows have patches, one prompt for each row."""
        if not self.active:
            return [Decision(edit=None, nearest=None, distance=float("inf"), radius=float("nan")) for _ in prompts]
        ids = token_ids(self.tokenizer, prompts)
        check_room(self.model, ids, prompts)
        found = []
        for rows in [ids] if self._rows is not None else [[row] for row in ids]:
            side: Side = "right" if self._whole_rows else "left"
            batch = pad(rows, pad_id(self.tokenizer), self.model.device, side)
            options = {} if self._whole_rows else {"use_cache": False}
            with torch.no_grad():
                self.model(**batch.inputs(self.model), **options)
            found += self.decided()
        return found

    def decided(self, own: Sequence[str] | None = None) -> list[Decision]:
        """What was decided in the latest forward pass at each row's last real token. own: an edit for each row, whose own
        scope's distance is wanted.
        """
        done = self._last
        assert done is not None
        ends = done.ends().tolist()
        return [
            decision_at(done, row, column, self._edits, own[row] if own else None) for row, column in enumerate(ends)
        ]
