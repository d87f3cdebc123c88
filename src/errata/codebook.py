"""Codebook parts: what one edit asks of the codebook at a layer, and adapters in the place of a codebook.

A codebook at run time is what its edits, inserted in their order, make of it (`errata.maths.codebook`); so patches join by
listing their parts, and an edit that is taken out takes its keys along, with all that they did to balls. Values are not trained
again: one that several edits share was trained for all of them, and keeps the influence of one that is gone. How parts act on a
model is `errata.output_table`.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.errors import AnatomyError, ConfigError
from errata.low_rank import map_path
from errata.maths.codebook import Codebook, Rules
from errata.model.anatomy import Anatomy, Site

Replace = Literal["each", "last", "all", "prompt"]
Ask = Literal["last", "first"]


@dataclass(frozen=True)
class Place:
    """Where outputs are replaced, and who asks.

    layer: the block, from 0, or "encoder.3" of an encoder-decoder's encoder; site: the linear map whose input asks and
    whose output is replaced (see `LowRank`). replace: "each" token asks for itself and is itself replaced, so that it does
    not matter how a text is fed (cached, padded, at once). As published one token asks for its row in each forward pass:
    the prompt's end where `handle.prompts` gives it, else the row's "last" real token (ask="first": its first, BERT's CLS;
    in a decoder behind an encoder always the start token, whose answer holds for all passes behind its cache); replaced are
    the "last" (the one that asks), "all", or those before it ("prompt").
    """

    layer: Site
    site: str = "mlp_out"
    replace: Replace = "each"
    ask: Ask = "last"

    def __post_init__(self) -> None:
        number = self.layer.removeprefix("encoder.") if isinstance(self.layer, str) else str(self.layer)
        if isinstance(self.layer, bool) or not number.isdecimal() or number == self.layer:
            raise ConfigError(f"expected a layer from 0, or one of an encoder as 'encoder.3', found {self.layer!r}")
        if self.replace not in ("each", "last", "all", "prompt") or self.ask not in ("last", "first"):
            raise ConfigError(
                f"expected replace 'each', 'last', 'all' or 'prompt' and ask 'last' or 'first', found {self.replace!r} and "
                f"{self.ask!r}"
            )

    def path(self, parts: Anatomy) -> str:
        """The module's path in a model with these parts. Raises AnatomyError if the model has no such layer or map."""
        if self.site != "mlp":
            return map_path(parts, self.layer, self.site)
        found = mlp_of(parts, self.layer)
        if found is None:
            raise AnatomyError(
                f"expected an MLP in a module of its own, found none in this {parts.family!r} model; take 'mlp_in'."
            )
        return found


def mlp_of(parts: Anatomy, layer: Site) -> str | None:
    """The path of a block's MLP; None where its maps stand in the block itself or in modules of their own (OPT, BERT)."""
    block, (first, last) = parts.site(layer), (map_path(parts, layer, site) for site in ("mlp_in", "mlp_out"))
    parent = last.rsplit(".", 1)[0]
    return parent if parent != block and first.startswith(f"{parent}.") else None


@dataclass(frozen=True, eq=False)
class CodebookEntry:
    """One edit of a codebook: (key, label) is to be answered with value.

    key (a,) and value (b,): input and output of the place's linear map, activation units; radius: the initial one; label: what
    is answered, ids of the target's tokens or a class; rules: those of the codebook, the same for all its edits; covered_by:
    edits that answer it already, while which are all there it is left out of the codebook.
    """

    edit: str
    key: Tensor
    value: Tensor
    radius: float
    label: tuple[int, ...]
    place: Place
    rules: Rules
    covered_by: tuple[str, ...] = ()

    kind = "codebook"

    @property
    def width(self) -> tuple[int, int]:
        """(b, a) of the linear map that it fits."""
        return len(self.value), len(self.key)

    def insert_into(self, book: Codebook) -> None:
        """Insert it, with its value whether its entry is new or not, unless those that it is covered by are all there."""
        if self.covered_by and {tag for tags in book.tags for tag in tags}.issuperset(self.covered_by):
            return
        done = book.insert(self.key, self.value, self.radius, self.label, self.edit)
        book.set_value(done.entry, self.value)

    def header(self) -> dict[str, Any]:
        """The part's JSON header."""
        return {
            "kind": self.kind,
            "edit": self.edit,
            "radius": self.radius,
            "label": list(self.label),
            "place": asdict(self.place),
            "rules": asdict(self.rules),
            **({"covered_by": list(self.covered_by)} if self.covered_by else {}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The part's tensors by field name."""
        return {"key": self.key, "value": self.value}

    @classmethod
    def of(cls, header: dict[str, Any], tensors: dict[str, Tensor], gates: object = None) -> "CodebookEntry":
        """The part of a header and its tensors; a codebook has no gate."""
        return cls(
            header["edit"], tensors["key"], tensors["value"], header["radius"], tuple(header["label"]),
            Place(**header["place"]), Rules(**header["rules"]), tuple(header.get("covered_by", ())),
        )  # fmt: skip


FORMS = {"defer": ("w", "b", "A", "c"), "memory": ("U", "b", "V")}


@dataclass(frozen=True, eq=False)
class Routed:
    """A small model in the place of a linear map's output, written by many edits together.

    form "defer": w (a,), b (1,), A (b, a), c (b,): where sigmoid(w q + b) reaches `threshold` the output is A q + c. form
    "memory": U (n, a), b (n,), V (n, b): the output is softmax(U q + b) V, always.
    """

    edits: tuple[str, ...]
    form: Literal["defer", "memory"]
    weights: dict[str, Tensor]
    place: Place
    threshold: float = 0.5

    kind = "routed"

    def __post_init__(self) -> None:
        if self.form not in FORMS or tuple(self.weights) != FORMS[self.form]:
            raise ConfigError(
                f"expected form 'defer' with weights w, b, A, c or 'memory' with U, b, V, found {self.form!r} with "
                f"{', '.join(self.weights)}"
            )

    @property
    def width(self) -> tuple[int, int]:
        """(b, a) of the linear map that it fits."""
        if self.form == "defer":
            return len(self.weights["A"]), self.weights["A"].shape[1]
        return self.weights["V"].shape[1], self.weights["U"].shape[1]

    def header(self) -> dict[str, Any]:
        """The part's JSON header."""
        about = {"kind": self.kind, "edits": list(self.edits), "form": self.form, "threshold": self.threshold}
        return about | {"place": asdict(self.place)}

    def tensors(self) -> dict[str, Tensor]:
        """The part's tensors by field name."""
        return self.weights

    @classmethod
    def of(cls, header: dict[str, Any], tensors: dict[str, Tensor], gates: object = None) -> "Routed":
        """The part of a header and its tensors; what routes is in these."""
        weights = {name: tensors[name] for name in FORMS[header["form"]]}
        return cls(tuple(header["edits"]), header["form"], weights, Place(**header["place"]), header["threshold"])


def defer(weights: dict[str, Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    """Defer's gate g(q) (...) in [0, 1] and its answer h(q) (..., b) for queries (..., a)."""
    return torch.sigmoid(q @ weights["w"] + weights["b"]), q @ weights["A"].T + weights["c"]


def remember(weights: dict[str, Tensor], q: Tensor) -> Tensor:
    """Memory's answer (..., b) for queries (..., a): values weighted by attention over the slots."""
    return torch.softmax(q @ weights["U"].T + weights["b"], -1) @ weights["V"]
