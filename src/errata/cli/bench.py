"""`errata bench`: a preset run on a model, resumed, listed, reported; the papers' tables from one command."""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from errata.cli.bench_rows import rows as show_rows
from errata.cli.common import (
    CHECK_FAILED,
    INTERRUPTED,
    CommandGroup,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Seed,
    Threads,
    data_options,
    emit,
    err,
    load,
    notice,
    out,
    row,
    table,
)
from errata.errors import ConfigError, EditError

EVERY = "all"
SMALL = 200_000_000  # parameters of a model that every process may have its own of
FEW = 16  # cases
MOST = 8  # processes that are started unasked


class BenchGroup(CommandGroup):
    """Its commands, and any other first word as the preset that `run` is given."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words name."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


class Engine(StrEnum):
    """Who does the work."""

    local = "local"
    ray = "ray"


class Split(StrEnum):
    """Which of Atlas's facts are edited."""

    dev = "dev"
    test = "test"


Methods = Annotated[
    str | None,
    typer.Option("--methods", help="Labels of the preset, or any editors, with commas (default: the preset's)."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")]
EngineOption = Annotated[Engine, typer.Option("--engine", help="This process, or a Ray cluster.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Of a running Ray cluster (default: one on this machine).")
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Processes, of this machine or of the cluster, each with its own model and --threads cores (default: as many as "
        "fit on a cluster; here one for each core if the model is small).",
    ),
]

app = typer.Typer(
    name="bench",
    cls=BenchGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Run a benchmark: **errata bench PRESET --model M --out RUN**, with a preset of **errata bench list**, or **all**.

Every answer is kept as a row; a run that was stopped, at any moment, goes on with **errata bench resume RUN**, and fits are
kept in the user's cache directory (ERRATA_CACHE) for other runs.""",
)


@app.command("list")
def list_presets(json_output: Json = False) -> None:
    """The presets: what they are after, their methods and sizes."""
    from errata.bench.preset import available_presets, get_preset

    presets = [get_preset(name) for name in available_presets()]
    if json_output:
        emit(
            {
                "presets": [
                    {
                        "name": p.name,
                        "title": p.title,
                        "source": p.source,
                        "n": p.n,
                        "published_n": p.published_n,
                        "methods": [{"label": m.label, "editor": m.editor, "setting": m.setting} for m in p.methods],
                    }
                    for p in presets
                ]
            }
        )
        return
    made = table(None, "preset", "what", "source", "cases", "methods", right=("cases",))
    for p in presets:
        row(made, p.name, p.title, p.source, p.n, ", ".join(m.label for m in p.methods))
    out().print(made)


@app.command("run")
def run(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="`errata bench list` lists them; or `all`.")],
    model: Model,
    out_path: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="RUN", help="The run's directory; of `all`, one for each preset in it."),
    ],
    methods: Methods = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Cases (default: the preset's own number).")] = None,
    seed: Seed = 0,
    data: Annotated[str | None, typer.Option("--data", help="A data set instead of the preset's own.")] = None,
    data_option: Annotated[
        list[str] | None,
        typer.Option(
            "--data-option",
            metavar="NAME=VALUE",
            help="flagged=drop: without the tests that `errata data check` finds fault with; bad=skip: without bad rows; or an "
            "option of the data set (`errata data list`). Repeatable.",
        ),
    ] = None,
    split: Annotated[Split, typer.Option("--split", help="Which of Atlas's facts are edited.")] = Split.test,
    engine: EngineOption = Engine.local,
    address: Address = None,
    workers: Workers = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    report: Annotated[bool, typer.Option(help="Write report.html and report.md into the run.")] = True,
    json_output: Json = False,
) -> None:
    """Run a preset, or all of them, on a model; an interrupted run with the same command goes on."""
    from errata.bench.data.registry import CHOICES
    from errata.bench.preset import available_presets, get_preset, pick_methods, unfit
    from errata.bench.runner import Plan

    options = data_options(data_option, "--data-option", *CHOICES)
    every = preset == EVERY
    presets = [get_preset(name) for name in (available_presets() if every else [preset])]
    names = [name.strip() for name in methods.split(",") if name.strip()] if methods else []
    picked = [pick_methods(p, names) if names else p.methods for p in presets]
    _check_engine(engine, address, workers, threads)
    loaded, tokenizer = load(model, dtype, device_map, threads)
    command = shlex.join(["errata", *sys.argv[1:]])
    found: list[dict[str, Any]] = []
    lost: list[str] = []
    answers: dict[Any, dict[str, Any]] = {}
    with _engine(engine, address, workers, threads, loaded, n) as chosen:
        for one, own in zip(presets, picked, strict=True):
            if every and (why := unfit(one, loaded)) is not None:
                notice(f"left out: {why}")
                continue
            plan = Plan(one, model, own, n, seed, data, split.value, dtype, device_map, options)
            where = out_path / one.name if every else out_path
            try:
                found.append(_run(plan, where, loaded, tokenizer, chosen, command, report, json_output, answers))
            except EditError as error:
                if not every:
                    raise
                lost.append(one.name)  # the others are worth having without it
                notice(f"{one.name} was not finished: {error}")
    if json_output:
        emit({"runs": found, "unfinished": lost})
    if lost:
        raise typer.Exit(CHECK_FAILED)


@app.command("resume")
def resume(
    run_path: Run,
    engine: EngineOption = Engine.local,
    address: Address = None,
    workers: Workers = None,
    threads: Threads = None,
    report: Annotated[bool, typer.Option(help="Write report.html and report.md into the run.")] = True,
    json_output: Json = False,
) -> None:
    """Go on with a run that was stopped, as it was asked for; units that are there are not done again."""
    from errata.bench.preset import get_preset
    from errata.bench.runner import Plan, methods_of
    from errata.bench.store import RunDirectory

    kept = RunDirectory(run_path).read()
    spec = kept["spec"]
    plan = Plan(
        get_preset(spec["preset"]), spec["model"], methods_of(spec), spec["asked_n"], spec["seed"], spec["data"],
        spec["split"], spec["dtype"], spec["device_map"], spec.get("data_options") or {},
    )  # fmt: skip
    _check_engine(engine, address, workers, threads)
    loaded, tokenizer = load(plan.model_name, plan.dtype, plan.device_map, threads or kept["threads"])
    command = shlex.join(["errata", *sys.argv[1:]])
    with _engine(engine, address, workers, threads, loaded, spec["n"]) as chosen:
        value = _run(plan, run_path, loaded, tokenizer, chosen, command, report, json_output)
    if json_output:
        emit(value)


app.command("rows")(show_rows)


@app.command("table")
def show_table(run_path: Run, json_output: Json = False) -> None:
    """The tables of a run, ours beside what the papers print."""
    from errata.bench.intervals import Rate
    from errata.bench.report import tables_of

    tables = tables_of(run_path)
    if json_output:
        cells = [[[c.json() if isinstance(c, Rate) else c for c in line] for line in t.rows] for t in tables]
        named = zip(tables, cells, strict=True)
        emit({"tables": [{"title": t.title, "columns": t.columns, "rows": c, "note": t.note} for t, c in named]})
        return
    for one in tables:
        out().print(one.rich(_width()))


@app.command("report")
def write_report(
    run_path: Run,
    out_path: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write (default: the run).")] = None,
    json_output: Json = False,
) -> None:
    """Write a run's tables, figures and examples as one HTML page and as Markdown."""
    from errata.bench import report as reports

    reports.write_report(run_path, out_path or run_path)
    if json_output:
        emit({"run": str(run_path), "out": str(out_path or run_path)})


def _check_engine(engine: Engine, address: str | None, workers: int | None, threads: int | None) -> None:
    """Raises ConfigError for options that do not go together and for a cluster that is not there, before a model is loaded."""
    from errata.bench.engines import RayEngine

    if engine is Engine.ray:
        RayEngine(address, workers, threads or 1).check()
    elif address:
        raise ConfigError("--address belongs to --engine ray; add it, or leave the address out")


@contextmanager
def _engine(
    engine: Engine, address: str | None, workers: int | None, threads: int | None, model: Any, n: int | None
) -> Iterator[Any]:
    """The engine; of this machine as many processes as are wanted, or else one for each core if the model is small."""
    from errata.bench.engines import LocalEngine, ProcessEngine, RayEngine

    if engine is Engine.ray:
        yield RayEngine(address, workers, threads or 1)
        return
    count = workers or _processes(model, threads, n)
    if count == 1:
        yield LocalEngine()
        return
    with ProcessEngine(count, threads or 1) as processes:
        yield processes


def _processes(model: Any, threads: int | None, n: int | None) -> int:
    """One for a model on an accelerator, a large one (each process holds its own) or a few cases, which are done before
    processes have started; otherwise one for each core.
    """
    small = sum(p.numel() for p in model.parameters()) <= SMALL
    if not small or next(model.parameters()).device.type != "cpu" or (n is not None and n < FEW):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores // (threads or 1)))


def _run(
    plan: Any,
    path: Path,
    model: Any,
    tokenizer: Any,
    engine: Any,
    command: str,
    report: bool,
    quiet: bool,
    answers: dict[Any, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run a plan with its progress on stderr; the summary as JSON values."""
    from errata.bench import report as reports
    from errata.bench.runner import run as do

    started = time.perf_counter()
    try:
        # Beside processes that take the cores this one has a thread; a preset that asks nothing has none, and takes all.
        spread = bool(plan.methods) and engine.elsewhere
        with _threads(1 if spread else None), _progress(plan.preset.name) as progress:
            do(plan, path, model, tokenizer, engine=engine, command=command, answers=answers, progress=progress)
    except KeyboardInterrupt:
        begun = (path / "run.json").exists()
        go_on = f"finished units are kept; `errata bench resume {shlex.quote(str(path))}` goes on"
        notice(f"interrupted; {go_on if begun else 'nothing was finished yet'}")
        raise typer.Exit(INTERRUPTED) from None
    value = _summary(path, time.perf_counter() - started)
    if report or not quiet:
        rows = reports.rows_of(path)
        tables = plan.preset.tables(rows, path)
        if report:
            reports.write_report(path, path, rows, tables)
        if not quiet:
            _print(value, tables)
    return value


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """So many torch threads inside; None for as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summary(path: Path, seconds: float) -> dict[str, Any]:
    import json

    kept = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    methods = kept["methods"]
    failed = {label: m["failed"] for label, m in methods.items() if m["failed"]}
    about = {"methods": methods, "failed": failed, "left_out": kept["left_out"]}
    return {"run": str(path), "seconds": round(seconds, 1), **about}


def _print(value: dict[str, Any], tables: Any) -> None:
    for one in tables:
        out().print(one.rich(_width()))
    for label, cases in value["failed"].items():
        first, why = next(iter(cases.items()))
        names = ", ".join(list(cases)[:5]) + (", ..." if len(cases) > 5 else "")
        notice(f"{label}: {len(cases)} fits failed (cases {names}); the first, {first}: {why}")
    if left_out := value["left_out"]:
        names = "; ".join(f"{where}: {why}" for where, why in list(left_out.items())[:5])
        notice(f"{len(left_out)} left out of the data; {names}" + ("; ..." if len(left_out) > 5 else ""))
    out().print(f"{value['run']}: {value['seconds']:.0f} s", markup=False, soft_wrap=True)


def _width() -> int:
    """Characters for a table: the terminal's, and a readable number where there is none."""
    console = out()
    return console.width if console.is_terminal else 110


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    """A bar with the time that is left; where stderr is no terminal, a line now and then."""
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(name, total=None, left="")
        last = time.perf_counter()

        def tell(progress: Any) -> None:
            nonlocal last
            left = "" if progress.left is None else f"about {_duration(progress.left)} left"
            doing = f"{name}: {progress.job.method}"
            shown.update(task, description=doing, completed=progress.done, total=progress.total, left=left)
            if not console.is_terminal and (progress.done == progress.total or time.perf_counter() - last > 10):
                last = time.perf_counter()
                console.print(f"{doing}, {progress.done} of {progress.total} units, {left}", markup=False)

        yield tell


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
