"""`errata export`: a low-rank patch as a PEFT adapter, or as a whole checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from errata.cli.common import DeviceMap, Dtype, Json, Model, Threads, emit, load, notice, out
from errata.errors import UnsupportedPatchError


class Format(StrEnum):
    """What can be written."""

    peft = "peft"
    merged = "merged"


class Server(StrEnum):
    """Servers whose limits are known."""

    vllm = "vllm"


def export(
    patch: Annotated[Path, typer.Argument(help="A patch file of low-rank edits (ROME, MEMIT, EMMET, STEAM).")],
    model: Model,
    out_path: Annotated[Path, typer.Option("--out", "-o", help="The directory to make.")],
    format: Annotated[
        Format, typer.Option("--format", help="peft: a LoRA adapter; merged: the edited model as a checkpoint.")
    ] = Format.peft,
    server: Annotated[
        Server | None, typer.Option("--for", help="Refuse an adapter that this server would not load.")
    ] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Write a patch of weight edits in a format that other software loads.

    An adapter is loaded by `peft.PeftModel.from_pretrained`, and for Llama-like models by vLLM; a merged checkpoint by
    anything that loads the model. Weights keep the dtype in which they are stored, unless --dtype says otherwise.
    """
    from errata.export import adapter_rank, export_merged, export_peft, vllm_command
    from errata.merge import refuse_unwritable
    from errata.patch import check_fits, load_patch

    found = load_patch(patch)
    refuse_unwritable(found, "exported")  # before a model is loaded for nothing
    loaded, tokenizer = load(model, dtype or "auto", device_map, threads)
    value = {"out": str(out_path), "format": format.value, "patch": found.id, "model": model, "n_edits": len(found)}
    rank, command, reason = None, None, None
    if format is Format.merged:
        export_merged(found, loaded, tokenizer, out_path)
    else:
        check_fits([found], loaded, tokenizer)
        try:
            command = vllm_command(loaded, adapter_rank(found, loaded), out_path)
        except UnsupportedPatchError as error:
            if server is Server.vllm:
                raise
            reason = str(error)
        rank = export_peft(found, loaded, out_path)
    if json_output:
        emit(value | {"rank": rank, "serve": command, "serve_refused": reason})
        return
    what = f"a LoRA adapter of rank {rank}" if rank else "the edited model"
    out().print(f"{out_path}: {what}, {len(found)} edits", markup=False, soft_wrap=True)
    if command:
        out().print(f"serve it with: {command}", markup=False, soft_wrap=True)
    elif reason:
        notice(reason)
