"""The gate: how a prompt becomes a point, and how far points are from each other.

An *activation* gate reads the model's own states on the way: the hidden states of some layers at the position itself, or
their mean over the row so far, so that every position of a sequence has its own decision and caching changes nothing. An
*encoder* gate embeds the text with a sentence-transformers model (the SAKE paper's way). On top, optionally, a linear
projection: with the one of `maths.discriminant` Euclidean distance is Mahalanobis distance under the spread that phrasings
of one fact have.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from errata.errors import BaseMismatchError, ConfigError
from errata.files import write_atomically
from errata.model.anatomy import Site
from errata.model.fingerprint import base_of

Distance = Literal["euclidean", "cosine", "linear"]
Pooling = Literal["last", "mean"]


@dataclass(frozen=True, eq=False)
class Gate:
    """How prompts become points (k,) and how distances are measured.

    layers: blocks whose output is read, or "final" for the final norm's output (what the head reads), concatenated (empty
    for an encoder gate); pooling: `last` (the position's own
    state) or `mean` (mean over the row up to it); encoder: name of a sentence encoder instead of layers; mean (D,) and
    projection (D, k): z = (x − mean) · projection, D = len(layers)·d_model; radius: the calibrated default radius.
    distance: `euclidean`, `cosine` (1 − cosine), or `linear` (−z·centre: the centre is a classifier's weight vector).
    cues (d_model + 1, 3), cue_layer: what tells where a question ends and where an answer is asked for again (`scope.recall`).
    """

    layers: tuple[Site, ...] = ()
    pooling: Pooling = "last"
    distance: Distance = "euclidean"
    encoder: str | None = None
    mean: Tensor | None = None
    projection: Tensor | None = None
    radius: float | None = None
    note: str = ""
    cues: Tensor | None = None
    cue_layer: Site | None = None

    def __post_init__(self) -> None:
        if bool(self.layers) == bool(self.encoder):
            raise ConfigError("expected a gate that reads either layers or an encoder's vectors, found both or neither")
        wrong = [la for la in self.layers if la != "final" and (isinstance(la, bool) or not isinstance(la, int))]
        if wrong:
            raise ConfigError(f"expected a gate's layers to be blocks' indices or 'final', found {wrong[0]!r}")
        if self.distance not in ("euclidean", "cosine", "linear"):
            raise ConfigError(f"expected the distance 'euclidean', 'cosine' or 'linear', found {self.distance!r}")
        if self.pooling not in ("last", "mean"):
            raise ConfigError(f"expected the pooling 'last' or 'mean', found {self.pooling!r}")

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits over everything that the gate does; edits with the same digest share one table."""
        sha = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            sha.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    def header(self) -> dict[str, Any]:
        """The gate's JSON part."""
        return {
            "layers": list(self.layers),
            "pooling": self.pooling,
            "distance": self.distance,
            "encoder": self.encoder,
            "radius": self.radius,
            "note": self.note,
            **({"cue_layer": self.cue_layer} if self.cues is not None else {}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The gate's tensors, on the CPU."""
        named = {"mean": self.mean, "projection": self.projection, "cues": self.cues}
        return {name: t.cpu() for name, t in named.items() if t is not None}

    @classmethod
    def of(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Gate":
        """The gate of a header and its tensors."""
        fields = {**header, "layers": tuple(header["layers"])}
        mean, projection, cues = (tensors.get(name) for name in ("mean", "projection", "cues"))
        return cls(**fields, mean=mean, projection=projection, cues=cues)

    def points(self, x: Tensor) -> Tensor:
        """Raw features (…, D) as points (…, k), float32."""
        x = x.float()
        if self.mean is not None:
            x = x - self.mean.to(x.device, torch.float32)
        if self.projection is not None:
            x = x @ self.projection.to(x.device, torch.float32)
        return torch.nn.functional.normalize(x, dim=-1) if self.distance == "cosine" else x

    def centre(self, points: Tensor) -> Tensor:
        """The centre (k,) of an edit whose in-scope points (n, k) these are."""
        mean = points.mean(0)
        return torch.nn.functional.normalize(mean, dim=0) if self.distance == "cosine" else mean

    def distances(self, points: Tensor, centres: Tensor) -> Tensor:
        """Distances (…, n) of points (…, k) to centres (n, k) or (…, n, k), in the gate's own unit."""
        if self.distance == "euclidean":
            return torch.cdist(points, centres.to(points), compute_mode="donot_use_mm_for_euclid_dist")
        dots = points @ centres.to(points).mT
        return 1 - dots if self.distance == "cosine" else -dots

    def margins(self, distances: Tensor, radii: Tensor) -> Tensor:
        """How deep inside its scope each edit (…, n) has a point: 1 at most, 0 on the boundary, negative outside.

        One scale for all gates, so that among the edits whose scope contains a prompt the largest margin wins, whatever
        their radii and gates. Balls: the depth in radii, 1 − distance/radius (1 at the centre). `linear`: with the
        log-odds m = w·z + b = radius − distance of the edit's own classifier, m/(1 + |m|): monotone in the probability
        that the edit is meant, 1/2 at odds of e, and unlike a probability never rounded to one.
        distances (…, n) and radii (n,) in the gate's unit. margin >= 0 exactly where distance <= radius.
        """
        radii = radii.to(distances)
        if self.distance == "linear":
            depth = radii - distances
            return depth / (1 + depth.abs())
        point = torch.where(distances <= radii, 0.0, -torch.inf)  # a ball of radius 0 holds its centre only
        return torch.where(radii > 0, 1 - distances / radii, point.to(distances))


GATE_FILE = "errata-scope.safetensors"


def save_gate(gate: Gate, path: str | Path, model: Any = None, tokenizer: Any = None) -> None:
    """Write a calibrated gate; in a model's directory under the name `GATE_FILE` it becomes that model's default.

    With a model and its tokenizer the file also says what they are, and is refused for others by `load_gate`. An encoder
    gate reads no model, so its file fits every one.
    """
    tensors = {name: t.contiguous() for name, t in gate.tensors().items()}
    metadata = {"errata.gate": json.dumps(gate.header())}
    if model is not None and tokenizer is not None and not gate.encoder:
        metadata["errata.base"] = json.dumps(base_of(model, tokenizer), sort_keys=True)
    write_atomically(path, save_tensors(tensors, metadata=metadata))


def load_gate(path: str | Path, model: Any = None, tokenizer: Any = None) -> Gate:
    """Read what `save_gate` wrote. Raises ConfigError if the file is missing or something else.

    With a model and its tokenizer: raises BaseMismatchError if the gate was calibrated on others. Files that do not say
    on which (older ones, encoder gates) are taken for any.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            gate = Gate.of(
                json.loads(metadata["errata.gate"]),
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            )
            base = json.loads(metadata.get("errata.base", "null"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"expected a gate file written by `errata calibrate` at {path}, found none that can be read ({error})"
        ) from None
    if base and model is not None and tokenizer is not None:
        _check_base(base, model, tokenizer, path)
    return gate


def gate_for(model: Any, tokenizer: Any) -> Gate | None:
    """The calibrated gate that lies in the model's directory; None if there is none.

    Raises BaseMismatchError if it was calibrated on another model or tokenizer, ConfigError if it cannot be read.
    """
    path = Path(str(getattr(model.config, "_name_or_path", ""))) / GATE_FILE
    return load_gate(path, model, tokenizer) if path.is_file() else None


def _check_base(expected: Mapping[str, Any], model: Any, tokenizer: Any, path: str | Path) -> None:
    """Compare like `errata.model.fingerprint.check_base`; weights only where both have them (quantised ones have none)."""
    hashes: Mapping[str, str] = expected.get("weights") or {}
    found = base_of(model, tokenizer, hashes)
    here = found["weights"]
    different = [
        *(
            key
            for key in ("family", "d_model", "n_layers", "vocab_size", "tokenizer")
            if expected.get(key) != found[key]
        ),
        *(f"weight {name}" for name, hash_ in hashes.items() if name in here and here[name] != hash_),
    ]
    if different:
        raise BaseMismatchError(
            f"the gate {path} was calibrated on another model (different {different[0]}); "
            "calibrate one for this model with `errata calibrate`, or name another gate"
        )
