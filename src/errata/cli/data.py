"""`errata data`: which data sets there are, whether they are here, and what is wrong with them."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli.common import (
    CHECK_FAILED,
    DeviceMap,
    Dtype,
    Json,
    Seed,
    Threads,
    data_options,
    emit,
    err,
    load,
    out,
    row,
    table,
)

SHOWN = 20

app = typer.Typer(help="Data sets: list them, check them.", no_args_is_help=True, rich_markup_mode="markdown")


@app.command("list")
def list_sets(json_output: Json = False) -> None:
    """What each data set is, where it comes from, its options, how many records it has, and whether its file is here.

    Without a path, files are looked for in the data folder and in the hub's cache.
    """
    from errata.bench.data.registry import DATASETS, data_folder

    sets = [_described(dataset) for dataset in DATASETS.values()]
    if json_output:
        emit({"folder": data_folder(), "datasets": sets})
        return
    made = table(None, "name", "what it is", "its file", "options", "records", "here", right=("records",))
    for one in sets:
        size = "any" if one["made"] else f"{one['records']:,}" if one["records"] else ""
        options = "; ".join(f"{name}={'|'.join(values) or 'PATH'}" for name, values in one["options"].items())
        row(made, one["name"], f"{one['about']} ({one['source']})", _from(one), options, size, _here(one))
    out().print(made)
    out().print(f"Files are looked for in {data_folder()}; `path` gives another place.", markup=False, soft_wrap=True)


@app.command("check")
def check(
    name: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A data set, or a file in the layout of one.")],
    path: Annotated[Path | None, typer.Option("--path", help="The file of a named set, or its folder.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Only the first records, or so many of Atlas's.")] = None,
    split: Annotated[str, typer.Option("--split", help="test, dev (Atlas) or train (KnowEdit).")] = "test",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the data set; repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Ask this model the conditions as well.")] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """List rows that do not fit, edits of one fact, contradictory answers, answers in their own prompts, and with --model the
    conditions that fail. Exit code 1 if there are any.
    """
    from errata.bench.data.registry import check as problems_of

    loaded = load(model, dtype, device_map, threads) if model else None
    with err().status(f"checking {name}"):
        options = data_options(settings, "--set")
        problems = problems_of(name, n=n, seed=seed, split=split, path=path, model_data=loaded, **options)
    counts = Counter(problem.kind for problem in problems)
    if json_output:
        emit({"name": name, "counts": counts, "problems": [vars(problem) for problem in problems]})
    else:
        for problem in problems[:SHOWN]:
            out().print(f"[{problem.kind}] {problem}", markup=False, soft_wrap=True)
        if len(problems) > SHOWN:
            out().print(f"... {len(problems) - SHOWN} more; --json has them all", markup=False)
        said = ", ".join(f"{number} x {kind}" for kind, number in counts.most_common())
        out().print(f"{name}: {said or 'nothing found'}", markup=False)
    if problems:
        raise typer.Exit(CHECK_FAILED)


def _described(dataset: Any) -> dict[str, Any]:
    from errata.bench.data.registry import find

    made = dataset.layout == "atlas"
    splits = ["test"] if isinstance(dataset.file, str) else list(dataset.file)
    files = {} if made else {split: find(dataset, split) for split in splits}
    here = [file for file in files.values() if file]
    return {
        "name": dataset.name,
        "about": dataset.about,
        "source": dataset.source,
        "records": dataset.size,
        "made": made,
        "here": made or len(here) == len(files),
        "files": here,
        "bytes": sum(file.stat().st_size for file in here),
        "hub": dataset.hub.repository if dataset.hub else None,
        "where": dataset.where,
        "names": [] if made else [dataset.file] if isinstance(dataset.file, str) else list(dataset.file.values()),
        "options": dataset.options,
    }


def _from(one: dict[str, Any]) -> str:
    """The file's name and where it is to be had."""
    places = [f"the hub ({one['hub']})"] if one["hub"] else []
    return f"{', '.join(one['names'])}: {'; '.join([*places, one['where']])}" if one["names"] else ""


def _here(one: dict[str, Any]) -> str:
    if one["made"]:
        return "made on the spot"
    if one["files"]:
        return f"{'yes' if one['here'] else 'in part'}, {one['bytes'] / 1e6:.1f} MB"
    return "no; fetched from the hub" if one["hub"] else "no; give a path"
