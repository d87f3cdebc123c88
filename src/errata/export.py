"""Export: a low-rank patch in the formats that other software loads, as a PEFT LoRA adapter or as a whole checkpoint.

LoRA adds (alpha / r) B A to a weight; with alpha = r, B = U and A = Vᵀ it is the patch, whichever way round the module stores
its weight. An adapter has one rank, so modules with fewer columns get zeros behind theirs.
"""

import json
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from errata.errors import ConfigError, UnsupportedPatchError
from errata.low_rank import LowRank, stacked
from errata.low_rank_table import base_layer, places
from errata.merge import merge, refuse_unwritable
from errata.model.anatomy import submodule
from errata.patch import Patch

# What vLLM's --max-lora-rank may be (its LoRAConfig; releases before 0.12 lack 1), and the families of our anatomy table
# whose adapters it loads (the LoRA column of its list of supported models).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
VLLM_FAMILIES = ("gemma", "gemma2", "llama", "mistral", "opt", "phi", "phi3", "qwen2", "qwen3")


def export_peft(patch: Patch, model: Any, out: str | Path) -> int:
    """Write the patch as a PEFT LoRA adapter into the new directory `out`; returns its rank.

    `peft.PeftModel.from_pretrained(model, out)` loads it; PEFT itself is not needed here. The rank is the largest number of
    columns at one module: of edits, for methods that write one column each. Raises UnsupportedPatchError for steering
    parts, a patch without updates, and modules that cannot take LoRA; ConfigError if something stands at `out`.
    """
    modules = _by_module(patch, model)
    rank = max(sum(part.rank for part in parts) for parts in modules.values())
    tensors = {}
    for path, parts in modules.items():
        U, V = (nn.functional.pad(t.float(), (0, rank - t.shape[1])) for t in stacked(parts))
        tensors[f"base_model.model.{path}.lora_A.weight"] = V.T.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = U.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", "") or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(base_layer(submodule(model, path)), Conv1D) for path in modules),
        "target_modules": list(modules),
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    with new_directory(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", "errata.patch": patch.id})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return rank


def export_merged(patch: Patch, model: Any, tokenizer: Any, out: str | Path) -> None:
    """Write the edited model and its tokenizer as a plain Hugging Face checkpoint into the new directory `out`.

    The model given is left as it was, bit for bit. Raises what `merge` raises; ConfigError if something stands at `out`.
    """
    _refuse_empty(patch)
    with new_directory(out) as folder, merge(patch, model, tokenizer):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def vllm_command(model: Any, rank: int, out: str | Path, name: str = "errata") -> str:
    """The command that serves the model with the adapter at `out` in vLLM, where clients ask for the model `name`.

    Raises UnsupportedPatchError for a family whose adapters vLLM does not load, and for a rank above its largest.
    """
    family = model.config.model_type
    if family not in VLLM_FAMILIES:
        raise UnsupportedPatchError(
            f"vLLM loads no LoRA adapters for {family!r} models (it does for {', '.join(VLLM_FAMILIES)}); export with "
            "--format merged to serve the edited model in it"
        )
    if rank > VLLM_RANKS[-1]:
        raise UnsupportedPatchError(
            f"the adapter's rank is {rank}, and vLLM takes at most {VLLM_RANKS[-1]}; export with --format merged, or fit "
            "fewer edits at once"
        )
    allowed = next(r for r in VLLM_RANKS if r >= rank)
    base = shlex.quote(getattr(model, "name_or_path", "") or "MODEL")
    adapter = shlex.quote(f"{name}={out}")
    return f"vllm serve {base} --enable-lora --max-lora-rank {allowed} --lora-modules {adapter}"


def adapter_rank(patch: Patch, model: Any) -> int:
    """The rank that `export_peft` would write. Raises what it raises."""
    return max(sum(part.rank for part in parts) for parts in _by_module(patch, model).values())


def _by_module(patch: Patch, model: Any) -> dict[str, list[LowRank]]:
    """Parts by module path, refusing what an adapter cannot say."""
    _refuse_empty(patch)
    modules: dict[str, list[LowRank]] = {}
    for path, part in places(model, patch.low_rank):
        module = base_layer(submodule(model, path))
        if not isinstance(module, nn.Linear | Conv1D):
            raise UnsupportedPatchError(
                f"the module {path!r} is a {type(module).__name__}, which cannot take LoRA (nn.Linear and Conv1D can); "
                "export with --format merged, or from the unquantised model"
            )
        modules.setdefault(path, []).append(part)
    return modules


def _refuse_empty(patch: Patch) -> None:
    refuse_unwritable(patch, "exported")
    if not patch.low_rank:
        raise UnsupportedPatchError(
            "the patch holds no weight update, so there is nothing to export; fit an edit first"
        )


@contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its name if all goes well and is removed if not.

    Raises ConfigError if `out` exists and is not an empty directory.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"expected a new directory for the export, found something at {out}; name another, or remove it"
        )
    folder = out.with_name(f".{out.name}.{secrets.token_hex(6)}")
    folder.mkdir(parents=True)
    try:
        yield folder
        _readable(folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _readable(folder: Path) -> None:
    """Give every file the mode that the umask allows: safetensors writes its files for their owner's eyes only."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
