"""Where to edit which model, and how hard: the papers' settings for the models that they edit.

A model is recognised by its family and shape, whatever it is called: a fine-tuned Llama-3-8B is one too. An editor without
layers of its own takes those of the model's row; its preset of that name takes the row's strengths and the published behaviours as
well. For any other model layers follow from the depth, and `errata tune` chooses better ones.

Sources: methods by Meng et al. 2022 (ROME) and 2023 (MEMIT) with their released settings, EasyEdit's for Llama-2, AlphaEdit's
for Llama-3. No settings of MEMIT are published for GPT-2 medium and large: there it writes the five layers that end at
ROME's, as it does in GPT-2 XL, and lambda is 20,000 times m / 6,400, which leaves m / lambda, hence the share of a residual that
is written, what it is in GPT-2 XL.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from errata.errors import AnatomyError
from errata.low_rank_table import base_layer, sizes
from errata.model.anatomy import anatomy, submodule

_PUBLISHED: Mapping[str, Any] = {
    "contexts": "generated",
    "kl_position": "subject_last",
    "norm_form": "published",
    "norm_counts": True,
    "lr": 0.5,
    "kl": 0.0625,
    "norm": 0.5,
}
ROME_PUBLISHED: Mapping[str, Any] = {**_PUBLISHED, "key_mode": "mixed", "clamp": 4.0}
MEMIT_PUBLISHED: Mapping[str, Any] = {**_PUBLISHED, "key_average": "by type", "clamp": 0.75, "lam": 15_000.0}


@dataclass(frozen=True)
class Setting:
    """One method on one model: the layers that are written, from 0, and the options that are not the method's defaults."""

    layers: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRow:
    """A model: its name in the papers, and its shape, L layers of width d with keys of width m."""

    name: str
    family: str
    n_layers: int
    d_model: int
    d_key: int
    rome: Setting
    memit: Setting

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """What a model is recognised by."""
        return self.family, self.n_layers, self.d_model, self.d_key


def _rome(layer: int, **options: Any) -> Setting:
    return Setting((layer,), {**ROME_PUBLISHED, "steps": 20, **options})


def _memit(first: int, last: int, **options: Any) -> Setting:
    return Setting(tuple(range(first, last + 1)), {**MEMIT_PUBLISHED, "steps": 20, **options})


# statistics=None: the released files for Llama switch the key statistics off (C = I).
# Atlas's strengths were chosen on its dev facts, on either model; its statements end behind the object.
_ATLAS: Mapping[str, Any] = {"clamp": None, "kl": 0.0, "ending": "."}
_ATLAS_ONE: Mapping[str, Any] = {**_ATLAS, "rule": "newton", "lr": 2.0}
_ATLAS_MANY: Mapping[str, Any] = {**_ATLAS, "lr": 0.7, "norm": 0.1, "s0": 3.0}
_ATLAS_STEAM: Mapping[str, Any] = {"lr": 1.0, "clamp": 8.0, "norm": 0.03}
TABLE: tuple[ModelRow, ...] = (
    ModelRow("atlas", "gpt2", 8, 256, 1024, Setting((2,), _ATLAS_ONE), Setting((0, 1, 2), _ATLAS_MANY)),
    ModelRow(
        "atlas-llama", "llama", 6, 256, 672, Setting((1,), _ATLAS_ONE), Setting((1, 2), {**_ATLAS, "s0": 3.0})
    ),
    ModelRow("gpt2-medium", "gpt2", 24, 1024, 4096, _rome(8, clamp=3.0), _memit(4, 8, lam=12_800.0)),
    ModelRow("gpt2-large", "gpt2", 36, 1280, 5120, _rome(12), _memit(8, 12, lam=16_000.0)),
    ModelRow("gpt2-xl", "gpt2", 48, 1600, 6400, _rome(17), _memit(13, 17, lam=20_000.0)),
    ModelRow("gpt-j-6b", "gptj", 28, 4096, 16384, _rome(5), _memit(3, 8, steps=25)),
    ModelRow(
        "llama-2-7b", "llama", 32, 4096, 11008,
        _rome(5, steps=25, norm=1e-3, statistics=None),
        _memit(4, 8, steps=25, norm=1e-3, clamp=4.0),
    ),
    ModelRow(
        "llama-3-8b", "llama", 32, 4096, 14336,
        _rome(5, steps=25, norm=1e-3, statistics=None),
        _memit(4, 8, steps=25, lr=0.1),
    ),
)  # fmt: skip


def for_model(model: nn.Module) -> ModelRow | None:
    """The row of the model's family and shape; None for a model that the table does not have."""
    try:
        parts = anatomy(model)
        size = sizes(base_layer(submodule(model, parts.mlp_site(0))))
    except AnatomyError:
        return None
    shape = (parts.family, parts.n_layers, parts.d_model, size[1] if size else None)
    return next((row for row in TABLE if row.shape == shape), None)


def rome_layer(model: nn.Module) -> int:
    """The layer of the model's row, else a third of the depth: near where tracing finds facts in GPT-2 XL (layer 17 of 48).

    Never the last: what it puts out at the subject reaches no later token.
    """
    row = for_model(model)
    n_layers = anatomy(model).n_layers
    return row.rome.layers[0] if row else max(0, min(round(n_layers / 3), n_layers - 2))


def late_layer(model: nn.Module) -> int:
    """A layer near three quarters of the depth, where a query tells what is asked (35 of GPT-2 XL's 48), never the last."""
    return late(anatomy(model).n_layers)


def late(n_layers: int) -> int:
    """The same of a stack of so many layers."""
    return max(0, min(round(0.75 * n_layers), n_layers - 2))


def memit_layers(model: nn.Module) -> tuple[int, ...]:
    """The layers of the model's row, else a tenth of the depth (2 at least) that ends a third of the way up."""
    row = for_model(model)
    if row:
        return row.memit.layers
    top, depth = rome_layer(model), anatomy(model).n_layers
    return tuple(range(max(0, top + 1 - max(2, round(depth / 10))), top + 1))


def rome_presets() -> dict[str, dict[str, Any]]:
    """ROME's presets: "published", behaviours and strengths without a layer, and each row under its name."""
    rows = {row.name: {"layer": row.rome.layers[0], **row.rome.options} for row in TABLE}
    return {"published": dict(ROME_PUBLISHED), **rows}


def steam_presets() -> dict[str, dict[str, Any]]:
    """STEAM's presets on ROME: ROME's own, but on Atlas what its strength was chosen with (on `atlas`)."""
    own = {"atlas": {"layer": 2, **_ATLAS_STEAM}, "atlas-llama": {"layer": 1, **_ATLAS_STEAM}}
    return {name: dict(own.get(name, options)) for name, options in rome_presets().items() if name != "published"}


def memit_presets() -> dict[str, dict[str, Any]]:
    """MEMIT's presets, as ROME's."""
    rows = {row.name: {"layers": row.memit.layers, **row.memit.options} for row in TABLE}
    return {"published": dict(MEMIT_PUBLISHED), **rows}


def emmet_presets() -> dict[str, dict[str, Any]]:
    """EMMET's presets: MEMIT's strengths at ROME's layer, without MEMIT's lambda; "published" softens the constraint."""

    def strengths(options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name not in ("lam", "s0")}

    rows = {row.name: {"layers": row.rome.layers, **strengths(row.memit.options)} for row in TABLE}
    return {"published": {**strengths(MEMIT_PUBLISHED), "lambda_e": 0.1}, **rows}
