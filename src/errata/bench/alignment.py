"""Where edited facts live: their states beside the anchors of their new objects, for STEAM's two figures (Jeong et al. 2025).

Atlas only: anchors and references come of its own facts. What judges is worded as no fit is.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.atlas.references import references
from errata.atlas.requests import request_for
from errata.atlas.world import World, link
from errata.bench.singles import alone
from errata.edit import EditRequest
from errata.editor import Editor
from errata.locate.anchors import Wanted, anchors_for
from errata.locate.semantics import cosines, last_states_by_layer
from errata.model.anatomy import anatomy

OBJECTS = (("citizenship", "Russia"), ("citizenship", "Argentina"), ("mother_tongue", "Arabic"))
EDITS_PER_OBJECT, REFERENCES_PER_OBJECT = 12, 60
UNEDITED, TRUE, REFERENCES = "unedited", "true facts", "references"


def anchor_cosines(
    model: Any,
    tokenizer: Any,
    world: World,
    requests: Sequence[EditRequest],
    editors: Mapping[str, Editor[Any]],
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """{who: raw and centred cosines (n, layers)} of the requests' states with the anchors of their new objects, for all layers.

    Who: the unedited model, each editor by its name, and true facts with the same objects. A request whose object no fact has
    is left out; empty if that leaves none.
    """
    layers = range(anatomy(model).n_layers)
    wanted = [Wanted(request.target_new, request.relation) for request in requests]
    goals = [a.states for a in anchors_for(model, tokenizer, wanted, references(world, mark="probe"), layers)]
    kept = [request for request, goal in zip(requests, goals, strict=True) if goal is not None]
    if not kept:
        return {}
    anchors = torch.stack([goal for goal in goals if goal is not None])
    true = {link(r.object): r.prompt for r in reversed(list(references(world)))}
    states = edited_states(model, tokenizer, kept, layers, editors, seed)
    states[TRUE] = last_states_by_layer(model, tokenizer, [true[link(r.target_new)] for r in kept], layers)
    centre = anchors.mean(0)
    return {name: (cosines(own, anchors), cosines(own, anchors, centre)) for name, own in states.items()}


def object_states(
    model: Any, tokenizer: Any, world: World, layer: int, editors: Mapping[str, Editor[Any]], split: str, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """{object: {who: (n, d)}} at a layer: references with a few objects, and facts of this split that are edited to have them."""
    held, found = list(references(world, mark="probe")), {}
    for relation, target in OBJECTS:
        facts = [f for f in world.by_relation[relation] if f.split == split and link(f.object) != target]
        picked = random.Random(seed).sample(facts, min(len(facts), EDITS_PER_OBJECT))
        edits = [request_for(world, fact, target) for fact in picked]
        of = [r.prompt for r in held if r.object == target]
        some = random.Random(0).sample(of, min(len(of), REFERENCES_PER_OBJECT))
        states = {REFERENCES: last_states_by_layer(model, tokenizer, some, [layer])}
        states |= edited_states(model, tokenizer, edits, [layer], editors, seed)
        found[f"{target} ({relation})"] = {who: own[:, 0] for who, own in states.items()}
    return found


def edited_states(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    editors: Mapping[str, Editor[Any]],
    seed: int,
) -> dict[str, Tensor]:
    """{who: (n, layers, d)} states at the last token of each request's prompt: unedited, and each edit alone."""
    found = {UNEDITED: last_states_by_layer(model, tokenizer, [request.text for request in requests], layers)}
    for name, editor in editors.items():
        rows = []
        for request, patch in zip(requests, alone(editor.fit(model, tokenizer, requests, seed=seed)), strict=True):
            with patch.attach(model, tokenizer):
                rows.append(last_states_by_layer(model, tokenizer, [request.text], layers))
        found[name] = torch.cat(rows)
    return found
