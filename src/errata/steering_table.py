"""Steering patches at run time: which rows and positions are steered, by which edit, at which step of its object.

All steering edits on a model live in one `SteeringTable`. Position i of a row is steered by edit e at step t when
`ids[i−t+1..i]` are the first t tokens of e's new object and the gate of e is open at position i − t; at step 0 not again
while the gate stays open after the object has been said. Where a gate has cues (`scope.recall`), a position at which an
answer is asked for again opens for the edit that the row's last question was about; its state says nothing about the fact,
so it is replaced by the mean that the map leads to, and behind the object by the mean of states that end it. (Such an opening
is numbered len(active) + the edit's number.)

All of this is a function of the row's ids up to i, so a cached step, a beam, a sampled row, a left-padded row and a whole
uncached sequence agree. At the default site, the final norm's output, steering never reaches later positions' states. Edits
compete within one site; where rows of a batch have patches of their own, each row's edits among themselves and with those
that are loaded for all.

Counterfactual parts (SERAC) are decided in the same way; what they steer are logits, which another model gives. In a classifier
the row as a whole is steered, and its first token is asked.

Which positions are asked: every real position of the forward pass for activation gates. Encoder gates embed text, so they
are asked where a next token is wanted: at each row's last position, and from the prompt's end on inside `prompts(lengths)`.
"""

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.counterfactual import LOGITS, Counterfactual, Expert
from errata.counterfactual import read as read_expert
from errata.errors import ConfigError, EditError
from errata.maths.transport import LinearMap
from errata.model.anatomy import anatomy
from errata.model.attached import STEERED, Suspendable
from errata.model.hooks import first_tensor, with_first_tensor
from errata.model.room import check_room
from errata.model.tokens import Side, last_positions, pad, pad_id, token_ids
from errata.scope.balls import CLOSED, groups
from errata.scope.gate import Gate
from errata.scope.recall import AGAIN, ASKED, kinds
from errata.steering import Decision, Steering

Part = Steering | Counterfactual
WORDS = 4  # last tokens by which a restated question is known
MARKS = 2  # tokens of punctuation that may stand behind a question
BEHIND = 6  # tokens behind a restated question in which no other one can end
NEAR = 1.6  # radii within which a question that ends outside every scope may still be about the nearest edit


@dataclass
class _Pass:
    """One forward pass: all ids and the mask of each row, and where this pass's columns begin."""

    ids: Tensor  # (B, N) every id so far, padding included
    mask: Tensor  # (B, N) bool
    start: int  # first column of this pass
    lengths: Sequence[int] | None
    states: dict[str | int, Tensor] = field(default_factory=dict)
    gated: dict[str | int, Tensor] = field(default_factory=dict)  # site -> (B, T) edit whose gate is open, or CLOSED
    asked: dict[str | int, Tensor] = field(default_factory=dict)  # site -> (B, T) whether every gate was asked
    meant: dict[str | int, Tensor] = field(default_factory=dict)  # site -> (B, T) edit of the last question, or CLOSED
    held: dict[str | int, Tensor] = field(
        default_factory=dict
    )  # site -> (B, T) the last edit that was asked about, or CLOSED
    words: dict[str | int, Tensor] = field(default_factory=dict)  # site -> (B, T, WORDS) the last ids of its question
    points: dict[str, Tensor] = field(default_factory=dict)  # gate's digest -> (B, k), where each row ends
    nearest: Tensor | None = None  # (B, T) index of the nearest edit, open or not
    distance: Tensor | None = None  # (B, T) distance to it
    closest: Tensor | None = None  # (B, T) the same in radii


class _Remembered(NamedTuple):
    """What is kept of a position: by site the edit that is open, the one that the last question was about (none behind another
    question), the last edit that was asked about and its question's last ids; running sums.
    """

    gated: dict[str | int, int]
    meant: dict[str | int, tuple[int, int, list[int]]]
    sums: dict[str | int, Tensor]


class SteeringTable(Suspendable):
    """Every steering edit on one model; installs its hooks with the first edit and removes them with the last."""

    MEMORY = 8192  # remembered prefixes; forgetting one costs a forward pass, never a wrong answer

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.anatomy = anatomy(model)
        self._entries: OrderedDict[object, tuple[Part, ...]] = OrderedDict()
        self._rows: list[tuple[Part, ...]] | None = None
        self._owners: tuple[int, ...] = ()
        self._hooks: list[Any] = []
        self._prepare: Any = None
        self._own_prepare: Any = None
        self._passes: list[_Pass] = []
        self._last: _Pass | None = None
        self._nested = False
        self._pending: Tensor | None = None
        self._lengths: Sequence[int] | None = None
        self._caches: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        self._memory: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._encoders: dict[str, Any] = {}
        self._experts: dict[str, Any] = {}
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
        active = {part.key: part.edit for part in _winners(self._loaded())}
        conflicts: dict[tuple[str, str], None] = {}
        for part in parts:
            if active.get(part.key, part.edit) != part.edit:
                conflicts[part.edit, active[part.key]] = None
            active[part.key] = part.edit
        self._entries[owner] = tuple(parts)
        try:
            self._refuse_late_gates(parts)
            self._rebuild()
            self._install()
        except BaseException:
            self.remove(owner)
            raise
        return list(conflicts)

    def _refuse_late_gates(self, parts: Sequence[Part]) -> None:
        n = self.anatomy.n_layers
        for part in parts:
            if part.site in ("final", LOGITS):
                continue
            late = [la for la in part.gate.layers if la == "final" or int(la) % n > int(part.site) % n]
            if late:
                raise ConfigError(
                    f"the edit {part.edit} acts at layer {part.site}, but its gate reads layer {late[0]}, which comes later; "
                    "fit it with a gate that reads no layer above the steered one"
                )

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
            self._refuse_late_gates([part for row in rows for part in row])
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

    def _loaded(self) -> list[Part]:
        return [part for parts in self._entries.values() for part in parts]

    def _rebuild(self) -> None:
        whole = self._loaded()
        rows = [_winners(whole)] if self._rows is None else [_winners([*whole, *row]) for row in self._rows]
        self.active: list[Part] = list(dict.fromkeys(part for row in rows for part in row))
        index = {part: i for i, part in enumerate(self.active)}
        self._groups = [
            (site, balls)
            for site in dict.fromkeys(part.site for part in self.active)
            for balls in groups([[part for part in row if part.site == site] for row in rows], index)
        ]
        self._by_first: list[dict[int, list[Part]]] = []  # by row, as the groups are
        for row in rows:
            first: dict[int, list[Part]] = {}
            for part in row:
                first.setdefault(part.target_ids[0], []).append(part)
            self._by_first.append(first)
        self._longest = max((len(p.target_ids) for p in self.active), default=0)
        self._memory.clear()
        self._placed: dict[tuple[int, int, torch.device], LinearMap] = {}

    def _install(self) -> None:
        """Hooks exactly for the layers and sites that the loaded edits use."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._release()
        if not self.active:
            return
        gates = [balls.gate for _, balls in self._groups]
        layers = dict.fromkeys(layer for gate in gates for layer in gate.layers)
        layers |= dict.fromkeys(gate.cue_layer for gate in gates if gate.cue_layer is not None)
        sites = {part.site for part in self.active}
        module = self.anatomy.module
        self._hooks.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        for layer in layers:
            self._hooks.append(module(self.model, self.anatomy.site(layer)).register_forward_hook(self._read(layer)))
        for site in sites:
            path = (self.anatomy.head or "") if site == LOGITS else self.anatomy.site(site)
            act = self._answer if site == LOGITS else self._steer(site)
            self._hooks.append(module(self.model, path).register_forward_hook(act))
        self._hooks.append(self.model.register_forward_hook(self._after, always_call=True))
        self._own_prepare = self.model.__dict__.get("prepare_inputs_for_generation")
        if not hasattr(self.model, "prepare_inputs_for_generation"):  # a classifier
            return
        original = self.model.prepare_inputs_for_generation

        @wraps(original)
        def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._pending = input_ids
            return original(input_ids, *args, **kwargs)

        self.model.__dict__["prepare_inputs_for_generation"] = self._prepare = prepare

    def _release(self) -> None:
        """Give `prepare_inputs_for_generation` back as it was found."""
        if self.model.__dict__.get("prepare_inputs_for_generation") is not self._prepare or self._prepare is None:
            return
        if self._own_prepare is None:
            del self.model.__dict__["prepare_inputs_for_generation"]
        else:
            self.model.__dict__["prepare_inputs_for_generation"] = self._own_prepare
        self._prepare = None

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
        if of in self._caches:
            self._caches[cache] = self._caches[of]

    # -- the forward pass --------------------------------------------------------------------------------------------

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._nested:
            self._passes.clear()  # an interrupt may have left one
        if self._off:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise EditError(
                "a steering patch reads the token ids, but the model was called without input_ids; pass input_ids instead of inputs_embeds"
            )
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        full = self._full_ids(ids, cache, past)
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(full) if mask is None or mask.dim() != 2 else mask
        if mask.shape != full.shape:
            raise EditError(
                f"expected an attention mask of shape {tuple(full.shape)} over all ids, found {tuple(mask.shape)}; pass it whole"
            )
        if cache is not None:
            self._caches[cache] = full
        self._passes.append(_Pass(full, mask.bool(), past, self._lengths))

    def _full_ids(self, ids: Tensor, cache: Any, past: int) -> Tensor:
        pending, self._pending = self._pending, None
        if not past:
            return ids
        wanted = past + ids.shape[1]
        if pending is not None and pending.shape[0] == ids.shape[0] and pending.shape[1] >= wanted:
            candidate = pending[:, :wanted]
            if torch.equal(candidate[:, past:], ids):
                return candidate
        known = self._caches.get(cache)
        if known is not None and known.shape[0] == ids.shape[0] and known.shape[1] >= past:
            return torch.cat([known[:, :past], ids], 1)
        raise EditError(
            f"a steering patch needs the ids behind a key-value cache, and those of the {past} cached tokens were never seen; "
            "attach the patch before the prompt is fed, or use model.generate"
        )

    def _after(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self._passes:
            return
        done = self._last = self._passes.pop()
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._caches[cache] = done.ids
        if not done.gated or output is None:  # an exception ended the pass early
            return
        sums = self._sums(done)
        ends = []
        for row in range(done.ids.shape[0]):
            columns = [int(column) for column in done.mask[row].nonzero()[:, 0] if column >= done.start]
            ends += [(row, columns[-1])] if columns else []
            # Behind a gate that opened amid the text each position is asked about again, at every step of an answer.
            if any(
                bool(found[row, : columns[-1] - done.start].ne(CLOSED).any())
                for found in done.gated.values()
                if columns
            ):
                for column in columns[:-1]:
                    if all(bool(asked[row, column - done.start]) for asked in done.asked.values()):
                        self._remember_position(done, row, column, sums)
        for row, column in ends:  # last, so that nothing pushes them out
            self._remember_position(done, row, column, sums)

    def _remember_position(self, done: _Pass, row: int, column: int, sums: dict[str | int, Tensor]) -> None:
        here = column - done.start
        gated = {site: int(found[row, here]) for site, found in done.gated.items()}
        meant = {
            site: (int(found[row, here]), int(done.held[site][row, here]), done.words[site][row, here].tolist())
            for site, found in done.meant.items()
        }
        total = {layer: s[row, here] for layer, s in sums.items()}
        self._remember(self._key(done, row, column), _Remembered(gated, meant, total))

    def _read(self, layer: str | int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self._passes:
                self._passes[-1].states[layer] = first_tensor(output).detach()

        return hook

    def _steer(self, site: str | int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if not self._passes:
                return None
            current = self._passes[-1]
            hidden = first_tensor(output)
            self._decide(current, site)
            chosen = self._steps(current, site)
            if not chosen:
                return None
            hidden = hidden.clone()
            groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for row, column, edit, step in chosen:
                groups.setdefault((edit, step), []).append((row, column))
            for (edit, step), places in groups.items():
                rows, columns = (torch.tensor(x, device=hidden.device) for x in zip(*places, strict=True))
                if edit >= len(self.active):
                    hidden[rows, columns] = self._mean(edit, step).to(hidden)
                else:
                    hidden[rows, columns] = self._map(edit, step, hidden.device)(hidden[rows, columns])
            return with_first_tensor(output, hidden)

        return hook

    def _answer(self, module: Any, args: Any, output: Any) -> Any:
        """The hook of the head: logits (B, T, V), T perhaps only the last columns, or a classifier's (B, labels)."""
        if not self._passes:
            return None
        current, logits = self._passes[-1], first_tensor(output)
        self._decide(current, LOGITS)
        if self._whole_rows:
            asked, gated = self._asked_columns(current), current.gated[LOGITS]
            opened = gated[torch.arange(len(gated), device=gated.device), asked.clamp(min=0)].tolist()
            places = [(i, int(asked[i]), edit) for i, edit in enumerate(opened) if edit != CLOSED]
        else:
            hidden = current.ids.shape[1] - current.start - logits.shape[1]  # columns whose logits nobody wants
            steps = self._steps(current, LOGITS)
            places = [(row, column, edit) for row, column, edit, _ in steps if column >= hidden]
        if not places:
            return None
        logits = logits.clone()
        by_row: dict[tuple[int, int], list[int]] = {}
        for row, column, edit in places:
            by_row.setdefault((row, edit), []).append(column)
        real = [current.mask[row].nonzero()[:, 0].tolist() for row in range(len(current.ids))]
        for digest in dict.fromkeys(self._record(edit).expert.digest for _, edit in by_row):
            own = [(row, edit) for row, edit in by_row if self._record(edit).expert.digest == digest]
            asked_of = [(self._record(edit).record, current.ids[row][real[row]].tolist()) for row, edit in own]
            with torch.no_grad():
                found = read_expert(self._expert(self._record(own[0][1]).expert), asked_of)
            for (row, edit), theirs in zip(own, found, strict=True):
                columns, part = by_row[row, edit], self._record(edit)
                if self._whole_rows:
                    far = self._far(current, row, columns, part)
                    logits[row] = part.answer(logits[row : row + 1], theirs, far)[0]
                    continue
                at = [real[row].index(column + current.start) for column in columns]
                where = torch.tensor([column - hidden for column in columns], device=logits.device)
                far = self._far(current, row, columns, part)
                logits[row, where] = part.answer(logits[row, where], theirs[at], far)
        return with_first_tensor(output, logits)

    def _record(self, edit: int) -> Counterfactual:
        part = self._part(edit)
        assert isinstance(part, Counterfactual)
        return part

    def _expert(self, expert: Expert) -> Any:
        """The expert as a model; made once."""
        if expert.digest not in self._experts:
            self._experts[expert.digest] = expert.model(self.model.device)
        return self._experts[expert.digest]

    def _far(self, current: _Pass, row: int, columns: Sequence[int], part: Counterfactual) -> Tensor:
        """(len(columns),) distances of a row's positions from the part's centre; not needed, hence zero, where nothing is mixed."""
        points = self._points(current, part.gate)[0] if part.mix == "soft" else None
        if points is None:
            return torch.zeros(len(columns))
        return part.gate.distances(points[row, list(columns)], part.centre.float()[None])[:, 0]

    def _asked_columns(self, current: _Pass) -> Tensor:
        """(B,) the column of this pass at which each row is asked: its last real token, of a classifier the first."""
        if self._whole_rows:
            return current.mask.long().argmax(1)
        return last_positions(current.mask) - current.start

    def _map(self, edit: int, step: int, device: torch.device) -> LinearMap:
        placed = self._placed.get((edit, step, device))
        if placed is None:
            part = self._part(edit)
            assert isinstance(part, Steering)
            placed = part.maps[step].to(torch.float32, device)
            self._placed[edit, step, device] = placed
        return placed

    def _mean(self, edit: int, step: int) -> Tensor:
        """The mean state that a step of a recalled edit leads to; behind its object, where the object has ended."""
        part = self._part(edit)
        assert isinstance(part, Steering)
        mean = part.maps[step].m_t if step < len(part.maps) else part.ending
        assert mean is not None
        return mean

    def _part(self, edit: int) -> Part:
        return self.active[edit % len(self.active)]

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _decide(self, current: _Pass, site: str | int) -> None:
        """Decide for every column of the pass among the edits at one site, which read layers up to it."""
        rows, columns = current.ids.shape[0], current.ids.shape[1] - current.start
        device = current.ids.device
        gated = torch.full((rows, columns), CLOSED, device=device)
        best = torch.full((rows, columns), float("inf"), device=device)  # distance of the winner, in radii
        if current.nearest is None or current.distance is None or current.closest is None:
            current.nearest, current.distance, current.closest = gated.clone(), best.clone(), best.clone()
        everywhere = torch.ones_like(gated, dtype=torch.bool)
        for where_used, balls in self._groups:
            if where_used != site:
                continue
            points, asked = self._points(current, balls.gate)
            if points is None:
                continue
            everywhere = everywhere & asked
            ends = self._asked_columns(current).clamp(min=0).to(points.device)
            current.points[balls.gate.digest] = points[torch.arange(rows, device=points.device), ends]
            found = balls.closest(points)
            near, distance, depth, winner, score = (x.to(device) for x in found)
            nearer = asked & (depth < current.closest)
            current.closest = torch.where(nearer, depth, current.closest)
            current.nearest = torch.where(nearer, near, current.nearest)
            current.distance = torch.where(nearer, distance, current.distance)
            wins = asked & (score < best)
            best = torch.where(wins, score, best)
            gated = torch.where(wins, winner, gated)
        current.asked[site] = everywhere
        real = current.mask[:, current.start :]
        current.gated[site] = torch.where(real, gated, CLOSED)
        self._recalled(current, site, real)

    def _recalled(self, current: _Pass, site: str | int, real: Tensor) -> None:
        """Where an answer is asked for again, open for the edit that the last question was about.

        Another question in between closes it. That it is another one is told by its distance, and by its words: a question
        that is restated amid other text may lie far from its scope, and what stands just behind it is no other question.
        """
        gated = current.gated[site]
        balls = next((b for at, b in self._groups if at == site and b.gate.cues is not None), None)
        current.meant[site] = torch.full_like(gated, CLOSED)
        current.held[site] = current.meant[site].clone()
        current.words[site] = current.meant[site][..., None].expand(*gated.shape, WORDS).clone()
        if balls is None or balls.gate.cue_layer not in current.states or current.nearest is None:
            return
        assert balls.gate.cues is not None and balls.gate.cue_layer is not None and current.closest is not None
        ids = torch.where(current.mask, current.ids, CLOSED)
        tails = torch.nn.functional.pad(ids, (WORDS - 1 + BEHIND, 0), value=CLOSED).unfold(1, WORDS, 1)[
            :, current.start :
        ]
        kind = kinds(current.states[balls.gate.cue_layer], balls.gate.cues).to(gated.device)
        last, held, about = gated[:, 0] * 0 + CLOSED, gated[:, 0] * 0 + CLOSED, torch.full_like(tails[:, 0], CLOSED)
        if current.start:
            before = [self._recall(current, row, current.start - 1).meant[site] for row in range(len(gated))]
            last, held = (torch.tensor([found[i] for found in before], device=gated.device) for i in (0, 1))
            about = torch.tensor([found[2] for found in before], device=gated.device)
        for column in range(gated.shape[1]):
            here = gated[:, column]
            near = (current.nearest[:, column] == last) & (current.closest[:, column] < NEAR - 1)
            same = (tails[:, column : column + BEHIND + 1] == about[:, None]).all(-1) & held.ne(CLOSED)[:, None]
            behind, restated = same.any(-1), same[:, BEHIND - MARKS :].any(-1)
            asked = (kind[:, column] == ASKED) & real[:, column]
            again = real[:, column] & (kind[:, column] == AGAIN) | asked & behind & ~restated
            about = torch.where((here.ge(0) & here.ne(last))[:, None], tails[:, column + BEHIND], about)
            last = torch.where(asked & ~near & ~behind, CLOSED, torch.where(restated, held, last))
            last = torch.where(here.ge(0), here, last)
            held = torch.where(here.ge(0), here, held)
            current.meant[site][:, column], current.held[site][:, column] = last, held
            current.words[site][:, column] = about
            recalled = again & here.eq(CLOSED) & last.ne(CLOSED)
            current.gated[site][:, column] = torch.where(recalled, last + len(self.active), here)

    def _points(self, current: _Pass, gate: Gate) -> tuple[Tensor | None, Tensor]:
        """The gate's points (B, T, k) and which columns were asked (B, T)."""
        asked = current.mask[:, current.start :]
        if gate.encoder:
            return self._encoded(current, gate)
        if any(layer not in current.states for layer in gate.layers):
            return None, asked
        features = []
        for layer in gate.layers:
            states = current.states[layer].float()
            if gate.pooling == "mean":
                total = self._sums(current, layer)[layer]
                count = current.mask.cumsum(1)[:, current.start :].clamp(min=1)
                states = total / count[..., None].to(total.device)
            features.append(states)
        return gate.points(torch.cat([f.to(features[0].device) for f in features], -1)), asked

    def _sums(self, current: _Pass, only: str | int | None = None) -> dict[str | int, Tensor]:
        """Running sums (B, T, d) of the layers that a mean-pooling gate reads, the cached positions included."""
        layers = {la for _, b in self._groups if b.gate.pooling == "mean" for la in b.gate.layers}
        sums = {}
        for layer in layers if only is None else {only}:
            states = current.states[layer].float()
            total = (states * current.mask[:, current.start :, None].to(states)).cumsum(1)
            if current.start:
                before = torch.stack(
                    [self._recall(current, row, current.start - 1).sums[layer] for row in range(len(total))]
                )
                total = total + before[:, None].to(total)
            sums[layer] = total
        return sums

    def _encoded(self, current: _Pass, gate: Gate) -> tuple[Tensor, Tensor]:
        """Embed the text of each asked prefix."""
        rows, width = current.ids.shape[0], current.ids.shape[1] - current.start
        asked = torch.zeros((rows, width), dtype=torch.bool, device=current.ids.device)
        places, texts = [], []
        for row in range(rows):
            real = current.mask[row].nonzero()[:, 0]
            first = len(real) - 1 if current.lengths is None else max(0, int(current.lengths[row]) - 1)
            said = current.ids[row][real].tolist()
            wanted = set(range(max(0, first), len(real)))
            for i in list(wanted):  # where an object that may be under way there would have begun
                steps = range(1, min(i, self._longest) + 1)
                wanted |= {i - t for t in steps if self._begins(row, tuple(said[i - t + 1 : i + 1]))}
            for column in real[sorted(wanted)].tolist():
                if column >= current.start:
                    places.append((row, column - current.start))
                    texts.append(self._text(current, row, column))
        vectors = self._encoder(gate.encoder or "").encode(texts)
        points = torch.zeros((rows, width, vectors.shape[-1]))
        for (row, column), vector in zip(places, vectors, strict=True):
            points[row, column], asked[row, column] = vector, True
        return gate.points(points), asked

    def _text(self, current: _Pass, row: int, column: int) -> str:
        kept = current.ids[row, : column + 1][current.mask[row, : column + 1]]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def _encoder(self, name: str) -> Any:
        from errata.scope.encoder import load_encoder

        if name not in self._encoders:
            self._encoders[name] = load_encoder(name)
        return self._encoders[name]

    def _steps(self, current: _Pass, site: str | int) -> list[tuple[int, int, int, int]]:
        """(row, column of this pass, edit, step) for everything to be steered; an object under way goes before a new one."""
        gated = current.gated[site]
        chosen = []
        open_columns: dict[int, list[tuple[int, int]]] = {}
        for row, column in gated.ne(CLOSED).nonzero().tolist():
            open_columns.setdefault(row, []).append((column + current.start, int(gated[row, column])))
        for row in range(current.ids.shape[0]):
            opened = open_columns.get(row, [])
            if not opened and not current.start:
                continue
            real = current.mask[row].nonzero()[:, 0].tolist()
            ids = [int(token) for token in current.ids[row].tolist()]
            opened = self._opened_before(current, site, row, ids, real) + opened
            for column, edit, step in self._walk(opened, ids, real):
                if column >= current.start and (step or not self._said(current, site, row, column, edit, ids, real)):
                    chosen.append((row, column - current.start, edit, step))
        return chosen

    def _walk(self, opened: list[tuple[int, int]], ids: list[int], real: list[int]) -> list[tuple[int, int, int]]:
        """(column, edit, step) of one row, following each open gate (column, edit) along the tokens of its object."""
        place = {column: i for i, column in enumerate(real)}
        steps: dict[int, tuple[int, int]] = {}  # column -> (step, edit); the longest under way wins
        for column, edit in opened:
            part = self._part(edit)
            target, steered = part.target_ids, part.steps
            if edit >= len(self.active) and isinstance(part, Steering) and part.ending is not None:
                steered = max(steered, len(target) + 1)
            for t, here in enumerate(real[place[column] : place[column] + len(target) + 1]):
                if t and ids[here] != target[t - 1]:
                    break
                if t < steered and (here not in steps or steps[here][0] < t):
                    steps[here] = (t, edit)
        return [(column, edit, t) for column, (t, edit) in steps.items()]

    def _said(
        self, current: _Pass, site: str | int, row: int, column: int, edit: int, ids: list[int], real: list[int]
    ) -> bool:
        """Whether the edit's object has been said and its gate has stayed open since, so that it is not to be said again."""
        target = self._part(edit).target_ids
        n, end = len(target), real.index(column)
        said = tuple(ids[c] for c in real[: end + 1])
        complete = [j for j in range(n, end + 1) if said[j - n + 1 : j + 1] == target]
        for j in range(end, min(complete, default=end + 1) - 1, -1):
            if not self._same(self._edit_at(current, site, row, real[j]), edit):
                return False
            if j in complete and self._same(self._edit_at(current, site, row, real[j - n]), edit):
                return True
        return False

    def _same(self, one: int, other: int) -> bool:
        """Whether two openings are for one edit, by its scope or recalled."""
        return one != CLOSED and one % len(self.active) == other % len(self.active)

    def _edit_at(self, current: _Pass, site: str | int, row: int, column: int) -> int:
        """The edit whose gate is open at a position of this pass or an earlier one."""
        here = column - current.start
        if here >= 0 and current.asked[site][row, here]:
            return int(current.gated[site][row, here])
        return self._recall(current, row, column).gated[site]

    def _opened_before(
        self, current: _Pass, site: str | int, row: int, ids: list[int], real: list[int]
    ) -> list[tuple[int, int]]:
        """Gates that opened at cached positions and whose object may still be under way."""
        past = [column for column in real if column < current.start]
        now = [column for column in real if column >= current.start]
        found = []
        if not now:  # nothing but padding
            return []
        for i in range(max(0, len(past) - self._longest), len(past)):
            said = tuple(ids[column] for column in past[i + 1 :] + now[:1])
            if self._begins(row, said):
                edit = self._recall(current, row, past[i]).gated[site]
                if edit != CLOSED:
                    found.append((past[i], edit))
        return found

    def _begins(self, row: int, said: tuple[int, ...]) -> bool:
        """Whether some object of a row's edits begins with these tokens."""
        own = self._by_first[row if self._rows is not None else 0]
        return any(part.target_ids[: len(said)] == said for part in own.get(said[0], ()))

    # -- memory of earlier positions ---------------------------------------------------------------------------------

    def forget(self) -> None:
        """Forget every decision: the states that gates read are other ones from now on."""
        self._memory.clear()

    def _key(self, current: _Pass, row: int, column: int) -> bytes:
        """Content address of a decision: a row's real ids up to and including a column, and whose edits the row has."""
        kept = current.ids[row, : column + 1][current.mask[row, : column + 1]]
        owner = self._owners[row].to_bytes(4) if self._owners else b""
        return hashlib.blake2b(owner + kept.cpu().numpy().tobytes(), digest_size=16).digest()

    def _remember(self, key: bytes, found: _Remembered) -> None:
        self._memory[key] = found
        self._memory.move_to_end(key)
        while len(self._memory) > max(self.MEMORY, len(self._owners)):  # a pass remembers each of its rows
            self._memory.popitem(last=False)

    def _recall(self, current: _Pass, row: int, column: int) -> _Remembered:
        """The decision at an earlier position; recomputed without a cache if it was never made or is forgotten."""
        key = self._key(current, row, column)
        if key not in self._memory:
            kept = current.ids[row, : column + 1][current.mask[row, : column + 1]]
            if not len(kept):
                closed: dict[str | int, int] = {part.site: CLOSED for part in self.active}
                sums = {la: torch.zeros(s.shape[-1], device=s.device) for la, s in current.states.items()}
                return _Remembered(closed, {site: (CLOSED, CLOSED, [CLOSED] * WORDS) for site in closed}, sums)
            outside = self._pending, self._lengths, self._nested
            self._pending, self._lengths, self._nested = None, None, True
            try:
                with torch.no_grad():  # by rows: all of them, each with its own edits, as a batch must have its rows
                    self.model(input_ids=kept.expand(len(self._owners) or 1, -1), use_cache=False)
            finally:
                self._pending, self._lengths, self._nested = outside
        return self._memory[key]

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
        assert done is not None and done.nearest is not None and done.distance is not None
        decisions = []
        for row, column in enumerate(self._asked_columns(done).tolist()):
            near = int(done.nearest[row, column])
            found = {int(gated[row, column]) for gated in done.gated.values()} - {CLOSED}
            opened = {edit % len(self.active) for edit in found}
            edit = near if near in opened else min(opened, default=CLOSED)
            decisions.append(
                Decision(
                    edit=self.active[edit].edit if edit != CLOSED else None,
                    nearest=self.active[near].edit if near != CLOSED else None,
                    distance=float(done.distance[row, column]),
                    radius=self.active[near].radius if near != CLOSED else float("nan"),
                    own=self._distance(done, row, own[row]) if own else None,
                )
            )
        return decisions

    def _distance(self, done: _Pass, row: int, edit: str) -> float | None:
        """How far the end of a row is from the scope of an edit itself, which is the first of its parts; None if it is not here."""
        part = next((p for p in self.active if p.edit == edit), None)
        points = done.points.get(part.gate.digest) if part else None
        if part is None or points is None:
            return None
        return float(part.gate.distances(points[row][None], part.centre.float()[None]))


def _winners(parts: Iterable[Part]) -> list[Part]:
    """The parts that act: a later one overrides an earlier one of its key, with all that followed from that one's edit."""
    winners: dict[str, Part] = {}
    for part in parts:
        loser = winners.pop(part.key, part)
        if loser.edit != part.edit:
            winners = {key: p for key, p in winners.items() if p.edit != loser.edit}
        winners[part.key] = part
    return list(winners.values())
