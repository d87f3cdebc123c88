"""A model and its tokenizer by name: bundled, a local directory, or a hub id, through one code path."""

import difflib
import os
import socket
import urllib.parse
import urllib.request
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from errata.errors import ConfigError, UnknownModelError

_CONNECT_SECONDS = 5.0


def bundled() -> dict[str, Path]:
    """The models shipped with the package: name -> directory."""
    weights = Path(str(resources.files("errata.atlas"))) / "weights"
    return {p.name: p for p in sorted(weights.iterdir()) if p.is_dir()} if weights.is_dir() else {}


def is_atlas(name: str) -> bool:
    """Whether a model's name means Atlas: bundled, or a directory that `errata.atlas.train` exported."""
    return name in bundled() or (Path(name).expanduser() / "recipe.json").is_file()


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model called `name` in eval mode with its head, and its tokenizer.

    A language model, an encoder-decoder, a classifier or a masked language model, as its config says.
    name: a bundled model ("atlas", "atlas-t5"), else a local directory, else a hub id. dtype: a torch dtype or its name
    ("bfloat16"), "auto" for what is stored; None is float32 on CPU, "auto" with a device map. device_map, revision and
    trust_remote_code are passed through.
    Raises UnknownModelError naming near matches and what was tried; ConfigError for a dtype that is none, or a device
    map without the accelerate package.
    """
    wanted = _dtype(dtype, device_map)
    source, tried, options = _source(os.fspath(name))
    options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        head = _head(AutoConfig.from_pretrained(source, **options))
        model = head.from_pretrained(source, dtype=wanted, device_map=device_map, **options)
    except ImportError as error:
        if "accelerate" not in str(error):
            raise
        raise ConfigError(
            f"expected the accelerate package for device_map={device_map!r}, found none; pip install accelerate."
        ) from error
    except (OSError, ValueError) as error:
        if "accelerate" in str(error):
            raise ConfigError(f"expected the accelerate package for device_map={device_map!r}: {error}") from error
        raise UnknownModelError(_unknown(os.fspath(name), tried, error)) from error
    model.train(False)
    return model, tokenizer


def _head(config: Any) -> Any:
    """The auto class that loads the model with the head that its config names; a causal language model if it names none."""
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    if architecture.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    return AutoModelForMaskedLM if architecture.endswith("ForMaskedLM") else AutoModelForCausalLM


def _dtype(dtype: str | torch.dtype | None, device_map: Any) -> str | torch.dtype:
    if dtype is None:
        on_cpu = device_map is None and torch.get_default_device().type == "cpu"
        return torch.float32 if on_cpu else "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return "auto"
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise ConfigError(f"expected dtype 'float32', 'bfloat16', 'float16', 'float64' or 'auto', found {dtype!r}.")


def _source(name: str) -> tuple[str, str, dict[str, Any]]:
    """(what transformers is given, what it is in words, options)."""
    models = bundled()
    if name in models:
        return str(models[name]), "the bundled model", {"local_files_only": True}
    if name and Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), "the local directory", {"local_files_only": True}
    if hub_reachable():
        return name, "the hub", {}
    return name, "the hub's local cache (the hub itself is not reachable)", {"local_files_only": True}


def hub_reachable() -> bool:
    """Whether it is worth asking the hub: its client retries for most of a minute before it gives up."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    url = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if urllib.request.getproxies().get(url.scheme) or urllib.request.getproxies().get("all"):
        return True  # only the proxy can tell
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _unknown(name: str, tried: str, error: Exception) -> str:
    names = list(bundled())
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    reason = "" if "cache" in tried else f" ({' '.join(str(error).split())[:300].rstrip('.')})"
    return (
        f"expected a bundled model ({', '.join(names) or 'none in this installation'}), a local directory or a hub id, "
        f"found {name!r}, which {tried} does not give as a language model or classifier with its tokenizer{reason}{hint}"
    )
