"""Where key statistics are kept between runs, and under which key: everything that changes the numbers.

One safetensors file per layer: the float64 sum, and as metadata the count and the identity in full, which reading
compares, so that a renamed file is not taken for another. A partial file has the same form and says how far it got.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

import errata.files
from errata.errors import StatisticsError
from errata.files import write_atomically
from errata.maths.covariance import SecondMoment
from errata.model.anatomy import Anatomy, anatomy
from errata.model.fingerprint import tensor_hash

FORMAT, FORMAT_VERSION = "errata.key-statistics", 1
# What transformers writes into a config without changing a key: where it came from, and in what form it was loaded.
_NOT_IN_CONFIG = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")


def cache_directory() -> Path:
    """Where statistics are kept: `statistics` in the user's cache directory."""
    return errata.files.cache_directory("statistics")


def weights_up_to(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, str]:
    """{layer: "sha256:…"} of everything in the model that the keys of `layer` (counted from 0) depend on.

    Left out are later blocks, the layer's own MLP output projection (a key is its input), the final norm and the head;
    in are the configuration and every other parameter and buffer, by `tensor_hash`, so that a model is the same in half
    and in single precision. Raises StatisticsError for weights that are not in memory.
    """
    parts = anatomy(model)
    tensors = _tensors(model)
    hashes: dict[str, str] = {}
    found = {}
    for layer in layers:
        sha = hashlib.sha256(_config(model).encode())
        for name in sorted(name for name in tensors if not _above(parts, layer, name)):
            if name not in hashes:
                hashes[name] = _content_hash(name, tensors[name])
            sha.update(f"{name} {hashes[name]}\n".encode())
        found[layer] = f"sha256:{sha.hexdigest()}"
    return found


def _above(parts: Anatomy, layer: int, name: str) -> bool:
    later = [*parts.blocks[layer + 1 :], parts.mlp_out[layer], parts.final_norm, parts.head]
    return any(name.startswith(f"{path}.") for path in later if path)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by name, also buffers that are not saved and weights packed by a quantised backend."""
    found: dict[str, Tensor] = dict(model.named_buffers())
    for name, value in model.state_dict(keep_vars=True).items():
        packed = value if isinstance(value, tuple | list) else (value,)
        found |= {f"{name}.{i}" if i else name: v for i, v in enumerate(packed) if isinstance(v, Tensor)}
    return found


def _content_hash(name: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        raise StatisticsError(
            f"expected the weights in memory to tell what model this is, found {name!r} offloaded; load the model "
            f"without offloading."
        )
    plain = tensor.detach()
    if plain.is_quantized or type(tensor) not in (Tensor, torch.nn.Parameter):
        plain = plain.dequantize()
    if plain.is_floating_point():
        return tensor_hash(plain)
    data = plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode() + data).hexdigest()


def _config(model: PreTrainedModel) -> str:
    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): kept(v) for name, v in value.items() if name not in _NOT_IN_CONFIG}
        return value

    return json.dumps(kept(model.config.to_dict()), sort_keys=True, default=str)


@dataclass
class Gathered:
    """The sum of one layer. identity: what it is of; groups: how many groups of texts are in it; finished: all."""

    identity: Mapping[str, Any]
    moment: SecondMoment
    groups: int = 0
    finished: bool = False


class Store:
    """A folder of statistics; None is `cache_directory()`, False keeps and finds nothing.

    A folder that cannot be written costs a warning, not the statistics.
    """

    def __init__(self, folder: str | os.PathLike[str] | bool | None):
        if isinstance(folder, str | os.PathLike):
            self._folder: Path | None = Path(folder)
        else:
            self._folder = None if folder is False else cache_directory()

    def path(self, identity: Mapping[str, Any]) -> Path | None:
        """Where finished statistics of this identity are kept."""
        text = json.dumps(identity, sort_keys=True)
        name = f"layer-{identity['layer']}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        return self._folder / name if self._folder else None

    def find(self, identity: Mapping[str, Any], *, partial: bool = False) -> Gathered | None:
        """What is kept under this identity, or None; a damaged file is nothing, and a warning says so."""
        path = self._file(identity, partial)
        if path is None or not path.exists():
            return None
        try:
            found = read(path)
        except StatisticsError as error:
            warnings.warn(f"{error} It is gathered anew.", stacklevel=3)
            return None
        return found if found.identity == identity and found.finished is not partial else None

    def of_weights(self, layer: int, weights: str) -> Path | None:
        """The file of the finished statistics of these weights with the most tokens, over whatever corpus; None if there is none."""
        best: tuple[int, str, Path] | None = None
        for path in self._folder.glob(f"layer-{layer}-*.safetensors") if self._folder else ():
            try:
                header = _header(path)
            except (OSError, StatisticsError):
                continue  # what cannot be read is not what was asked for
            if header["identity"].get("weights") == weights and header["finished"]:
                best = max(best or (0, "", path), (int(header["count"]), path.name, path))
        return best[2] if best else None

    def keep(self, gathered: Sequence[Gathered]) -> None:
        """Write each, whole or not at all; a finished one takes the place of its partial."""
        for one in gathered:
            path = self._file(one.identity, not one.finished)
            if path is None:
                continue
            try:
                write_atomically(path, to_bytes(one))
                if one.finished and (begun := self._file(one.identity, True)):
                    begun.unlink(missing_ok=True)
            except OSError as error:
                warnings.warn(f"cannot keep statistics in {path}: {error}; set ERRATA_CACHE.", stacklevel=3)

    def _file(self, identity: Mapping[str, Any], partial: bool) -> Path | None:
        path = self.path(identity)
        return path.with_name(f"{path.name}.partial") if path and partial else path


def to_bytes(gathered: Gathered) -> bytes:
    """A safetensors file."""
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "identity": gathered.identity,
        "count": gathered.moment.count,
        "groups": gathered.groups,
        "finished": gathered.finished,
    }
    return save({"sum": gathered.moment.total.cpu()}, {"errata": json.dumps(header, sort_keys=True)})


def read(path: str | os.PathLike[str]) -> Gathered:
    """Statistics from a file that `to_bytes` made. Raises StatisticsError for another or a damaged one, OSError."""
    path, header = Path(path), _header(path)
    try:
        with safe_open(path, framework="pt") as file:
            identity = dict(header["identity"])
            moment = SecondMoment.of(file.get_tensor("sum"), int(header["count"]), product=str(identity["product"]))
            return Gathered(identity, moment, int(header["groups"]), bool(header["finished"]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from None


def _header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A statistics file's header, without its tensor. Raises as `read`."""
    with open(path, "rb"):
        pass  # for the usual OSError: safetensors has errors of its own
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("errata", "null"))
    except (SafetensorError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StatisticsError(f"{path} is a safetensors file but holds no key statistics.")
    if header.get("format_version") != FORMAT_VERSION:
        raise StatisticsError(f"{path} has format version {header.get('format_version')!r}, not {FORMAT_VERSION}.")
    if not isinstance(header.get("identity"), dict) or not {"count", "groups", "finished"} <= set(header):
        raise _unreadable(path, "its header lacks fields")
    return header


def _unreadable(path: str | os.PathLike[str], why: object) -> StatisticsError:
    return StatisticsError(f"{path} is not a readable statistics file (truncated or damaged): {why}.")
