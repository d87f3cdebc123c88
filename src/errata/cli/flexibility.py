"""`errata flexibility`: what is left of edits that are taken back, by the inverse edit and by detaching."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli.common import (
    CHECK_FAILED,
    ConfigFile,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Preset,
    Seed,
    Settings,
    Threads,
    atlas_requests,
    atlas_texts,
    bar,
    emit,
    is_atlas,
    load,
    notice,
    out,
    percent,
    row,
    table,
)
from errata.cli.fit import make_editor
from errata.edit import read_requests

UNRELATED = 200


def flexibility(
    model: Model,
    method: Annotated[str, typer.Option("--method", help="A method that edits weights.")] = "rome",
    requests: Annotated[
        Path | None, typer.Option("--requests", help="Edits with their old objects and probes (default: Atlas's).")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="At most so many edits, all in the model together.")] = 50,
    preset: Preset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Take edits back in two ways and compare: by the inverse edit (the old object fitted on the edited model), by detaching.

    For the edited model and for both ways back: how far the logits are from the unedited model's, how many other facts are
    answered otherwise, and whether the old answers are back.
    """
    from errata.bench.flexibility import flexibility as measure
    from errata.bench.flexibility import inverse

    editor = make_editor(method, preset, settings, config)
    asked = read_requests(requests)[:n] if requests else atlas_requests(model, n, seed, probes=True)
    editor.check(asked)
    editor.check([inverse(request) for request in asked])
    loaded, tokenizer = load(model, dtype, device_map, threads)
    editor.check(asked, loaded, tokenizer)
    started = time.perf_counter()
    with bar(f"fitting with {method}", len(asked)) as progress:
        found = measure(
            loaded,
            tokenizer,
            editor,
            asked,
            atlas_texts(UNRELATED, seed) if is_atlas(model) else [],
            seed=seed,
            progress=lambda done, _: progress(done),
        )
    value = {"model": model, **found, "seed": seed, "seconds": round(time.perf_counter() - started, 1)}
    if json_output:
        emit(value)
    else:
        _print(value)
    if not found["restored"]:
        notice("check failed: after detaching, the logits are not what they were")
        raise typer.Exit(CHECK_FAILED)


def _print(value: dict[str, Any]) -> None:
    names = {
        "old_answers.generate": "old answers",
        "old_answers_paraphrased.generate": "paraphrased",
        "new_objects.generate": "new objects",
        "facts_changed.generate": "facts changed",
    }
    made = table(
        None, "model", *names.values(), "KL, nats", "logits moved", right=(*names.values(), "KL, nats", "logits moved")
    )
    for state in ("edited", "inverse", "detached"):
        figures = value[state]
        shares = (percent(figures[name]["value"]) for name in names)
        row(made, state, *shares, f"{figures['kl.prob']:.4f}", f"{figures['distance.logits']:.4f}")
    out().print(made)
    after = "restored bit for bit" if value["restored"] else "NOT restored"
    out().print(
        f"{value['n_edits']} edits at once by {value['method']}; detached: {after}", markup=False, soft_wrap=True
    )
