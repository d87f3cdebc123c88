"""Methods as a model has them: strengths that were chosen for it, and references from its own world.

Presets of benchmarks name methods for any model. `preset="model"` stands for the options that `editors._models` has for the
very model, and for the editor's defaults where it has none; STEAM takes those that its strength was chosen with, and on Atlas
references from Atlas's facts, which it gets as a file, as any user would give them.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from errata.bench.preset import Method
from errata.editors import get_editor
from errata.errors import ConfigError, UnknownEditorError, UnsupportedModelError
from errata.files import cache_directory, write_atomically
from errata.model.anatomy import anatomy
from errata.model.loading import is_atlas

MODEL = "model"
STEAMS = "model-steam"  # ROME's options that STEAM has for the model: what it is compared with
DEMONSTRATED = 400  # dev facts, over all relations
LIMITED = "model-l"  # fine-tuning's norm-constrained options for the model
EPS = 2e-3  # of a model that has none: the published one of the smallest model


def resolved(method: Method, model: Any, model_name: str) -> Method:
    """The method with `preset="model"` replaced by the name of the model's preset, by none, or by STEAM's options.

    `preset="model-l"` is fine-tuning's with a limit on the weights, "model-steam" ROME's as STEAM has them. Any other stays, or
    becomes the model's own of that name ("grace" that of "atlas-grace").

    STEAM's change "depth", a first and a last share of the layers, becomes the aligned layers of this model.
    """
    from errata.editors._models import for_model

    row = for_model(model)
    name = row.name if row else model_name
    if method.preset == STEAMS:
        return replace(method, preset=None, changes={**get_editor("steam").presets.get(name, {}), **method.changes})
    if method.preset not in (MODEL, LIMITED):
        own = f"{name}-{method.preset}"
        return replace(method, preset=own) if own in get_editor(method.editor).presets else method
    if method.preset == LIMITED:
        there = f"{name}-l" in get_editor(method.editor).presets
        small = {} if there else {"norm": "linf", "eps": EPS}
        return replace(method, preset=f"{name}-l" if there else None, changes={**small, **method.changes})
    if method.editor == "steam":
        changes: dict[str, Any] = dict(method.changes)
        base = changes.get("base", "rome")
        options = dict(get_editor("memit" if base == "memit" else "steam").presets.get(name, {}))
        if is_atlas(model_name):
            options["references"] = str(atlas_references())
        if (depth := changes.pop("depth", None)) is not None:
            n = anatomy(model).n_layers
            first = min(n - 1, round(depth[0] * n))
            options["aligned"] = (first, min(n - 1, max(first, round(depth[1] * n) - 1)))
        return replace(method, preset=None, changes={**options, **changes})
    if method.editor == "ike" and is_atlas(model_name):
        return replace(
            method, preset="atlas", changes={"demonstrations": str(atlas_demonstrations()), **method.changes}
        )
    return replace(method, preset=name if name in get_editor(method.editor).presets else None)


def inapplicable(method: Method, model: Any, tokenizer: Any) -> str | None:
    """Why a method cannot be run on this model, None if it can: no such editor, another architecture, or not yet trained."""
    try:
        kind = get_editor(method.editor)
        kind.check_model(model)
        if kind.learns:
            from errata.bench.worker import editor_of

            editor: Any = editor_of(method)
            if not editor.artefact_path(model, tokenizer).is_file():
                editor.trained(model, tokenizer)  # raises, naming the command
    except (UnknownEditorError, UnsupportedModelError, ConfigError) as error:
        return str(error.args[0] if error.args else error)
    return None


def atlas_demonstrations() -> Path:
    """Rewrites of Atlas's dev facts for IKE to choose demonstrations from, in a JSONL file of the user's cache, named by its content."""
    from errata.atlas.training import training_items
    from errata.atlas.world import load_world
    from errata.training import digest, write_items

    items = training_items(load_world(), "atlas", DEMONSTRATED, drawn=1)
    path = cache_directory("demonstrations") / f"atlas-{digest(items)}.jsonl"
    if not path.is_file():
        write_items(path, items)
    return path


def atlas_references() -> Path:
    """Atlas's facts as reference triples in a JSONL file of the user's cache, named by its content."""
    from errata.atlas.references import references
    from errata.atlas.world import load_world

    lines = [
        json.dumps(
            {"subject": r.subject, "relation": r.relation, "object": r.object, "prompt": r.prompt}, ensure_ascii=False
        )
        for r in references(load_world())
    ]
    text = "".join(f"{line}\n" for line in lines)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = cache_directory("references") / f"atlas-{digest}.jsonl"
    if not path.is_file():
        write_atomically(path, text)
    return path
