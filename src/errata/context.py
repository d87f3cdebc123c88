"""Context parts: text that stands before a prompt, for methods that edit by telling the model (ICL).

They act on prompts as text, so the model is never hooked: everything that asks by text asks `errata.model.attached.asked`
what it should really ask, and a model called with token ids is the unedited one. A context has a scope as steering has, and
among the contexts whose scope contains a prompt the nearest edit's stands before it; or it has none, and stands before
every prompt. Scopes are read on the prompt without any context, by the unedited model.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import EditError, UnsupportedPatchError
from errata.model.attached import CONTEXT, Suspendable, without_patches
from errata.scope.balls import CLOSED, groups
from errata.scope.features import gate_features
from errata.scope.gate import Gate
from errata.steering.parts import Decision


@dataclass(frozen=True, eq=False)
class Context:
    """One edit as text before a prompt. gate, centre (k,) and radius as a steering part's; without a gate it is always meant."""

    edit: str
    key: str
    text: str
    gate: Gate | None = None
    centre: Tensor | None = None
    radius: float | None = None

    kind = "context"

    def before(self, prompt: str) -> str:
        """The prompt behind what the edit says to it."""
        return f"{self.text}{prompt}"

    def header(self) -> dict[str, Any]:
        """The part's JSON header."""
        gate = self.gate.digest if self.gate else None
        named = {"edit": self.edit, "key": self.key, "text": self.text, "gate": gate, "radius": self.radius}
        return {"kind": self.kind, **named}

    def tensors(self) -> dict[str, Tensor]:
        """The part's tensors by field name."""
        return {} if self.centre is None else {"centre": self.centre}

    @classmethod
    def of(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], gates: Mapping[str, Gate]) -> "Context":
        """The part of a header, its tensors and the gates of its file."""
        gate = gates[header["gate"]] if header["gate"] else None
        named = {name: header[name] for name in ("edit", "key", "text", "radius")}
        return cls(**named, gate=gate, centre=tensors["centre"] if gate else None)


class ContextTable(Suspendable):
    """Every context on one model: which of them a prompt gets. It stays on the model as long as one is attached."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self._entries: OrderedDict[object, tuple[Context, ...]] = OrderedDict()
        self._rows: list[tuple[Context, ...]] | None = None
        self._rebuild()

    @classmethod
    def on(cls, model: Any, tokenizer: Any) -> "ContextTable":
        """The model's table; made, and not yet put on the model, if there is none."""
        return vars(model).get(CONTEXT) or cls(model, tokenizer)

    def add(self, owner: object, parts: Sequence[Context]) -> list[tuple[str, str]]:
        """Load contexts under an owner; returns (edit, earlier edit that it overrides) for equal subject and relation.

        Raises UnsupportedPatchError for a second edit of those that stand before every prompt.
        """
        active = {part.key: part.edit for part in _winners(self._loaded())}
        conflicts: dict[tuple[str, str], None] = {}
        for part in parts:
            if active.get(part.key, part.edit) != part.edit:
                conflicts[part.edit, active[part.key]] = None
            active[part.key] = part.edit
        try:
            self._entries[owner] = tuple(parts)
            self._rebuild()
        except BaseException:
            self.remove(owner)
            raise
        return list(conflicts)

    def remove(self, owner: object) -> None:
        """Unload an owner's contexts; harmless if it has none."""
        self._entries.pop(owner, None)
        self._rebuild()

    @contextmanager
    def rows(self, rows: Sequence[Sequence[Context]]) -> Iterator[None]:
        """Inside, prompts are asked len(rows) at a time, and prompt i gets a context of rows[i] or of those loaded for all."""
        try:
            self._rows = [tuple(row) for row in rows]
            self._rebuild()
            yield
        finally:
            self._rows = None
            self._rebuild()

    def asked(self, prompts: Sequence[str]) -> list[str]:
        """The prompts with their contexts."""
        if self._off or not self._parts:
            return list(prompts)
        chosen = self._decide(prompts)[0]
        always = [[part for part in row if part.gate is None] for row in self._of(prompts)]
        found = []
        for prompt, i, standing in zip(prompts, chosen.tolist(), always, strict=True):
            told = [self._parts[i]] if i != CLOSED else []
            for part in (*told, *standing):  # what always stands there stands first
                prompt = part.before(prompt)
            found.append(prompt)
        return found

    def decide(self, prompts: Sequence[str], own: Sequence[str] | None = None) -> list[Decision]:
        """Which edit's context each prompt gets and how far it was; own: an edit for each prompt, asked about besides.

        Contexts without a scope decide nothing.
        """
        winner, nearest, distance, points = self._decide(prompts)
        decisions = []
        for i, row in enumerate(self._of(prompts)):
            found = Decision(None, None, float("inf"), float("nan"))
            if (n := int(nearest[i])) != CLOSED:
                edit = self._parts[int(winner[i])].edit if int(winner[i]) != CLOSED else None
                found = Decision(edit, self._parts[n].edit, float(distance[i]), float(self._parts[n].radius or 0.0))
            mine = next((p for p in row if own and p.edit == own[i] and p.gate and p.centre is not None), None)
            if mine is not None and mine.gate is not None and mine.centre is not None:
                far = mine.gate.distances(points[mine.gate.digest][i][None], mine.centre.float()[None])
                found = Decision(found.edit, found.nearest, found.distance, found.radius, float(far))
            decisions.append(found)
        return decisions

    @property
    def scoped(self) -> bool:
        """Whether some context has a scope."""
        return any(part.gate is not None for part in self._parts)

    def _loaded(self) -> list[Context]:
        return [part for parts in self._entries.values() for part in parts]

    def _rebuild(self) -> None:
        whole = self._loaded()
        self._lists = [_winners([*whole, *row]) for row in ([()] if self._rows is None else self._rows)]
        self._parts = list(dict.fromkeys(part for row in self._lists for part in row))
        self._groups = groups(self._lists, {part: i for i, part in enumerate(self._parts)})
        if self._loaded() or self._rows is not None:
            vars(self.model)[CONTEXT] = self
        else:
            vars(self.model).pop(CONTEXT, None)
        for row in self._lists:
            always = sorted({part.edit for part in row if part.gate is None})
            if len(always) > 1:
                raise UnsupportedPatchError(
                    f"the contexts of edits {always[0]} and {always[1]} would both stand before every prompt; attach one, "
                    "give each row its own with `attach_rows`, or fit with a gate"
                )

    def _of(self, prompts: Sequence[str]) -> list[list[Context]]:
        """The contexts that compete for each prompt."""
        if self._rows is None:
            return self._lists * len(prompts)
        if len(prompts) != len(self._rows):
            raise EditError(
                f"expected {len(self._rows)} prompts, as many as patches were attached by row, found {len(prompts)}"
            )
        return self._lists

    def _decide(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """For each prompt (n,): whose scope contains it, the nearest edit and its distance; and the points by gate."""
        self._of(prompts)
        winner = torch.full((len(prompts),), CLOSED)
        nearest, distance = winner.clone(), torch.full((len(prompts),), torch.inf)
        best, closest, points = distance.clone(), distance.clone(), {}
        for balls in self._groups:
            with without_patches(self.model), torch.no_grad():
                read = balls.gate.points(gate_features(self.model, self.tokenizer, prompts, balls.gate))
            points[balls.gate.digest] = read
            near, far, depth, inner, score = (x[:, 0] for x in balls.closest(read[:, None]))
            nearest, distance = torch.where(depth < closest, near, nearest), torch.where(depth < closest, far, distance)
            winner, closest = torch.where(score < best, inner, winner), torch.minimum(depth, closest)
            best = torch.minimum(score, best)
        return winner, nearest, distance, points


def _winners(parts: Iterable[Context]) -> list[Context]:
    """The contexts that act: a later one overrides an earlier one of its key."""
    return list({part.key: part for part in parts}.values())
