"""`errata train`: the editors that learn to edit, trained for a model; stopped, they go on when the command is repeated."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli.common import (
    INTERRUPTED,
    ConfigFile,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Preset,
    Seed,
    Settings,
    Threads,
    bar,
    emit,
    err,
    is_atlas,
    load,
    notice,
    out,
)
from errata.cli.fit import make_editor
from errata.errors import ConfigError


def train(
    method: Annotated[str, typer.Argument(help="An editor that learns: `errata methods` says which.")],
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            help="atlas (counterfactual rewrites), atlas-zsre (questions), atlas-fever (claims), atlas-docket (cases), or a file: "
            "CounterFact, KILT, zsRE, SCOTUS, training items as JSONL. Atlas's models have a default."
        ),
    ] = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for artefact and checkpoint; by default fits find it.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps in all (the method's own by default).")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after so long; the same command goes on.")] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Train an editor that learns to edit (KnowledgeEditor, MEND, ...) and write the artefact that `errata fit` loads.

    Atlas's sets hold its dev facts in `fit` wordings; a preset that ends in -cf is trained on counterfactual rewrites. After Ctrl-C
    the same command goes on from the last checkpoint, at most a minute back, and ends in the same weights. With --out, name the
    artefact to the fit: --set artefact=DIR/NAME.safetensors.
    """
    from errata.editors import get_editor
    from errata.editors._learned import default_folder, read_artefact

    if not get_editor(method).learns:
        learned = ", ".join(name for name in _learning())
        raise ConfigError(
            f"{method} edits without being trained; those that learn are {learned}: give one, or run `errata fit`"
        )
    own = [f"steps={steps}"] if steps is not None else []
    editor = make_editor(method, preset, [*(settings or ()), *own], config)
    loaded, tokenizer = load(model, dtype, device_map, threads)
    named = data or default_set(model, loaded, editor.rewrites)
    items = items_of(named, loaded, tokenizer)
    folder = out_path or default_folder(loaded, tokenizer)
    started, figures = time.perf_counter(), dict[str, float]()

    def watch(step: int, found: dict[str, float]) -> None:
        figures.update(found)
        words = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if name != "step")
        err().print(f"step {step}: {words}", markup=False, soft_wrap=True)

    try:
        with bar(f"training {editor.name} on {named}", editor.config.steps) as progress:
            path = editor.train(
                loaded,
                tokenizer,
                items,
                folder,
                seed=seed,
                minutes=minutes,
                progress=lambda n, _: progress(n),
                watch=watch,
            )
    except KeyboardInterrupt:
        notice(f"what was learnt up to the last checkpoint is kept in {folder}; the same command goes on")
        raise typer.Exit(INTERRUPTED) from None
    header, _ = read_artefact(path)
    done, total = header["steps"], editor.config.steps
    if done < total:
        notice(f"{done} of {total} steps are made; the same command goes on")
    seconds = round(time.perf_counter() - started, 1)
    if json_output:
        emit({
            "method": method, "name": editor.name, "model": model, "data": named, "items": len(items), "steps": done, "of": total,
            "figures": figures, "artefact": path, "bytes": path.stat().st_size, "seconds": seconds,
        })  # fmt: skip
        return
    out().print(
        f"{path}\n{editor.name}: {done} steps on {len(items)} items of {named}, {path.stat().st_size:,} bytes, {seconds:.0f} s",
        markup=False,
        soft_wrap=True,
    )


def default_set(model: str, loaded: Any, rewrites: bool) -> str:
    """Atlas's set for a model of its own: claims or cases for a classifier, by its labels, else questions, or counterfactual
    `rewrites` if the editor is made for them.

    Raises ConfigError for any other model.
    """
    from errata.atlas.claims import LABELS
    from errata.atlas.docket import load_docket
    from errata.model.anatomy import anatomy
    from errata.model.labels import label_names

    if is_atlas(model):
        if anatomy(loaded).role != "classifier":
            return "atlas" if rewrites else "atlas-zsre"
        for found, labels in (("atlas-fever", LABELS), ("atlas-docket", load_docket().areas)):
            if sorted(labels) == sorted(label_names(loaded)):
                return found
    raise ConfigError(f"expected --data for {model!r}: a file of training items, or one of Atlas's sets; found none")


def items_of(data: str, loaded: Any, tokenizer: Any) -> Any:
    """The items that --data names. Raises ConfigError, RecordError, RequestError for a label that a classifier has not."""
    from errata.atlas.training import SETS, training_items
    from errata.atlas.world import load_world
    from errata.bench.data.training import load_items, of_classifier
    from errata.model.anatomy import anatomy

    if data in SETS:
        items = training_items(load_world(), data, bare=anatomy(loaded).role != "decoder")
    elif Path(data).expanduser().is_file():
        items = load_items(Path(data).expanduser())
    else:
        raise ConfigError(f"expected --data {', '.join(SETS)} or a file, found {data!r}")
    return of_classifier(loaded, tokenizer, items)


def _learning() -> list[str]:
    from errata.editors import available_editors, get_editor

    return [name for name in sorted(available_editors()) if get_editor(name).learns]
