"""What a patch was fitted on: enough of a model and its tokenizer to refuse another one."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errata.errors import BaseMismatchError
from errata.model.anatomy import Anatomy, anatomy
from errata.model.labels import label_names
from errata.model.tokens import token_ids

# What float16 cannot hold as finely as bfloat16 counts as zero. The limit lies in [2^-17, 2^-16), where both formats
# have the same numbers, so that rounding never carries a weight across it.
_TINY = 1.5 * 2.0**-17
_CHUNK = 1 << 24
# Texts whose ids stand for the rules around the vocabulary: spaces, case, accents, digits, line breaks, bytes.
_PROBES = (" The Café's 1,234 naïve\tUsers\n\n  wrote:  “Ångström” 東京 🙂", "x", "Hello world!")
# Of each tokenizer what it was when it was last hashed, and the hash.
_HASHED: "WeakKeyDictionary[Any, tuple[tuple[str, dict[str, int | None]], str]]" = WeakKeyDictionary()


def base_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parameters: Iterable[str] = ()
) -> dict[str, Any]:
    """What identifies the model and the tokenizer, JSON-ready.

    `family`, `d_model`, `n_layers`, `vocab_size`, `quantised`; `encoder_layers` of an encoder-decoder, `labels` of a
    classifier; `tokenizer`, see `tokenizer_hash`; `weights`, a mapping from parameter name to `tensor_hash`, for the final
    norm, the embedding, a classifier's head, the MLP output projections of the first, middle and last layer (of each stack),
    and `parameters`, names of further ones (those a patch touches). Quantised models have none.
    """
    parts = anatomy(model)
    quantised = _quantised(model)
    names = () if quantised else (*_landmarks(model, parts), *parameters)
    return {
        **_config(model, parts),
        "quantised": quantised,
        "tokenizer": tokenizer_hash(tokenizer),
        "weights": {name: tensor_hash(weight) for name, weight in _weights(model, names).items()},
    }


def check_base(expected: Mapping[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare `expected`, a result of `base_of`, with this model and tokenizer; cheap properties first.

    If either is a quantised form its weights say nothing: config and tokenizer are compared, and a warning says so.
    Raises BaseMismatchError naming the first thing that differs.
    """
    for key, found in _config(model, anatomy(model)).items():
        _same(key, expected.get(key), found)
    _same("tokenizer", expected.get("tokenizer"), tokenizer_hash(tokenizer))
    if _quantised(model) or expected.get("quantised"):
        warnings.warn(
            "the model or the one the patch was fitted on is quantised, so they are matched on config and tokenizer "
            "only; make sure that it is the same base.",
            stacklevel=2,
        )
        return
    hashes: Mapping[str, str] = expected.get("weights") or {}
    here = _weights(model, hashes)
    for name, hash_ in hashes.items():
        if name not in here and _is_offloaded(model, name):
            continue
        _same(f"weight {name}", hash_, tensor_hash(here[name]) if name in here else None)


def tensor_hash(tensor: Tensor) -> str:
    """ "sha256:…" of the shape and of the values rounded to bfloat16, with those below 1.14e-5 as zero.

    Equal for weights stored in float16 or bfloat16 whichever of float16, bfloat16 or float32 they were loaded in, and
    for weights stored in float32 loaded in float32 or bfloat16.
    """
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    for chunk in torch.split(tensor.detach().reshape(-1), _CHUNK):
        rounded = chunk.to(torch.bfloat16)
        rounded = torch.where(rounded.abs() > _TINY, rounded, torch.zeros_like(rounded))
        digest.update(rounded.view(torch.int16).cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def weights_hash(model: PreTrainedModel) -> str:
    """ "sha256:…" of every parameter and buffer that is in memory, bit for bit, with their names, dtypes and shapes.

    What tells a checkpoint from one that was trained a little further, where `tensor_hash` means to be the same for one that
    was loaded in another dtype. Of a quantised model only names count.
    """
    digest, quantised = hashlib.sha256(), _quantised(model)
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers()), key=lambda named: named[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not (quantised or tensor.is_meta):
            flat = tensor.detach().contiguous().reshape(-1)
            for chunk in torch.split(flat, _CHUNK):
                digest.update(chunk.view(torch.uint8).cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """ "sha256:…" of what the tokenizer does: vocabulary, merges, added and special tokens, and the ids of probe texts.

    Padding and truncation, which callers change, do not count, nor does the pad token. The backend's normaliser and
    splitting rules count by the ids that they give to the probe texts, not by their JSON, which differs between
    releases of transformers for one and the same tokenizer.
    """
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
    # Fits and attachments ask again and again; the backend's own text, which is quick to get, tells whether anything has changed.
    stands = (getattr(tokenizer, "backend_tokenizer").to_str(), special) if tokenizer.is_fast else None  # noqa: B009
    known = _HASHED.get(tokenizer)
    if known is not None and known[0] == stands:
        return known[1]
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "model": _model_table(stands[0]) if stands else {},
        "special": special,
        "probes": [token_ids(tokenizer, _PROBES, special=framed) for framed in (True, False)],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    found = f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
    if stands is not None:
        _HASHED[tokenizer] = (stands, found)
    return found


def _model_table(backend: str) -> dict[str, Any]:
    """Merges (BPE) or scored pieces (Unigram) of a backend, of which this is the text."""
    model = json.loads(backend)["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    return {"merges": merges, "pieces": model["vocab"] if isinstance(model.get("vocab"), list) else []}


def _config(model: PreTrainedModel, parts: Anatomy) -> dict[str, Any]:
    vocabulary = int(model.config.get_text_config().vocab_size)
    found = {"family": parts.family, "d_model": parts.d_model, "n_layers": parts.n_layers, "vocab_size": vocabulary}
    if parts.encoder:
        found["encoder_layers"] = parts.encoder.n_layers
    if parts.role == "classifier":
        found["labels"] = label_names(model)
    return found


def _landmarks(model: PreTrainedModel, parts: Anatomy) -> list[str]:
    paths = [parts.head] if parts.role == "classifier" else []
    for stack in (parts, parts.encoder) if parts.encoder else (parts,):
        layers = sorted({0, stack.n_layers // 2, stack.n_layers - 1})
        paths += [stack.final_norm, stack.embed, *(stack.mlp_out[i] for i in layers if stack.mlp_out)]
    return [f"{path}.weight" for path in dict.fromkeys(paths) if path is not None]


def _weights(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters of these names that exist and are in memory."""
    held = dict(model.named_parameters(remove_duplicate=False))
    return {name: held[name] for name in names if name in held and not held[name].is_meta}


def _is_offloaded(model: PreTrainedModel, name: str) -> bool:
    weight = dict(model.named_parameters(remove_duplicate=False)).get(name)
    return weight is not None and weight.is_meta


def _quantised(model: PreTrainedModel) -> bool:
    """By its config, or because a weight is no plain tensor (quantised in place, which leaves the config as it was)."""
    config = getattr(model.config, "quantization_config", None)
    declared = config is not None or bool(getattr(model, "is_quantized", False))
    return declared or any(type(weight.data) is not Tensor for weight in model.parameters())


def _same(what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise BaseMismatchError(
            f"expected a model with {what} {expected!r}, on which the patch was fitted, found {found!r}; "
            f"load that model, or fit the patch again on this one."
        )
