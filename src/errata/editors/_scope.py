"""The scope of an edit whose prompts are known: which gate, and which ball of its points. What steering and contexts share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.context import Context
from errata.edit import EditRequest
from errata.maths.discriminant import logistic_plane
from errata.model.anatomy import anatomy
from errata.prompts import contexts
from errata.scope.features import gate_features
from errata.scope.gate import Gate, gate_for, load_gate
from errata.scope.radius import others, radius_from_prompts


def gate_named(name: str, model: Any, tokenizer: Any, layer: str | int = "final") -> Gate:
    """The gate that a configuration names: `auto`, `classifier`, `final`, `encoder:NAME` or a gate file.

    layer: what the edit acts at; without a calibrated gate the states of mid-depth are read, or of that layer if it is earlier.
    """
    n_layers = anatomy(model).n_layers
    if name.startswith("encoder:"):
        return Gate(encoder=name.removeprefix("encoder:"))
    if name == "final":
        return Gate(layers=("final",))
    if name not in ("auto", "classifier"):
        return load_gate(name, model, tokenizer)
    gate = gate_for(model, tokenizer) if layer == "final" else None
    if gate is None:
        steered = n_layers - 1 if layer == "final" else int(layer) % n_layers
        gate = Gate(layers=(min(round(n_layers * 0.6), n_layers - 1, steered),))  # it decides before it is needed
    return gate if name == "auto" else replace(gate, distance="linear", radius=None)


@dataclass(frozen=True)
class Scope:
    """How balls are made. radius: given, in the gate's unit; reach: where wordings tell how far apart they lie, a
    calibrated radius is cut to this many times the distance of the farthest (None: it is not); token: which one of a prompt is read.
    """

    model: Any
    tokenizer: Any
    gate: Gate
    radius: float | None = None
    reach: float | None = 1.5
    wrap: Callable[[str], str] = str
    token: int = -1

    def points(self, prompts: Sequence[str]) -> Tensor:
        """(n, k) the gate's points of the prompts."""
        texts = [self.wrap(prompt) for prompt in prompts]
        return self.gate.points(gate_features(self.model, self.tokenizer, texts, self.gate, self.token))

    def ball(
        self, request: EditRequest, points: Tensor, own: Tensor, spread: bool, note: dict[str, Any]
    ) -> tuple[Tensor, float]:
        """Centre (k,) and radius of an edit's scope: given, calibrated, learned, or from its own prompts and stock texts.

        points (n, k) of its prompts; spread: whether they tell how far apart wordings lie: then a calibrated radius, made for
        the widest relation, is cut by `reach`. A few odd fit_prompts must not pull the centre away from what the edit is about:
        where its own prompt (`own`, (k,)) would lie farther out than half the radius, the centre moves towards it.
        """
        gate = self.gate
        if gate.distance == "linear":
            weight, radius = logistic_plane(points, self.points(others(request)))
            return weight.float(), radius
        centre = gate.centre(points)
        given = self.radius if self.radius is not None else gate.radius
        if given is not None:
            for share in torch.linspace(0, 1, 21).tolist():
                moved = gate.centre(torch.stack([(1 - share) * centre, share * own]) * 2) if share else centre
                if gate.distances(own[None], moved[None]).item() <= given / 2:
                    break
            note |= {"centre_moved": share} if share else {}
            if self.radius is None and spread:
                note["farthest_wording"] = float(gate.distances(points, moved[None]).max())
                if self.reach is not None:
                    given = min(given, self.reach * note["farthest_wording"])
            return moved, given
        note["radius_from"] = "own prompts against stock texts (`errata calibrate` makes a calibrated gate)"
        return centre, radius_from_prompts(
            self.model, self.tokenizer, gate, points, centre, request, self.wrap, self.token
        )


def context_part(
    request: EditRequest, text: str, scope: Scope | None, prompts: int, seed: int, note: dict[str, Any]
) -> Context:
    """An edit as a context, with a ball around so many of its prompts, or with no scope; the report's note says how many."""
    if scope is None:
        return Context(request.id, request.key, text)
    given = list(dict.fromkeys((*request.fit_prompts, request.text)))
    inside = contexts.lead_ins(given, prompts, seed)
    points = scope.points([request.text, *inside])
    centre, radius = scope.ball(request, points[1:], points[0], False, note)
    note["prompts"] = len(inside)
    return Context(request.id, request.key, text, scope.gate, centre, float(radius))
