"""`errata bench`: a preset run on a model, resumed, listed, reported; the papers' tables from one command."""

import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
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
from errata.files import write_atomically

EVERY = "all"
ASKED = "all.json"  # in the folder of `all`: what was asked for
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
    from errata.bench.preset import available_presets, get_preset

    every = preset == EVERY
    names = [name.strip() for name in methods.split(",") if name.strip()] if methods else []
    asked = {
        "model": model, "methods": names, "n": n, "seed": seed, "data": data, "split": split.value, "dtype": dtype,
        "device_map": device_map, "data_options": data_options(data_option, "--data-option", *CHOICES),
    }  # fmt: skip
    plans = [_plan(get_preset(name), asked) for name in (available_presets() if every else [preset])]
    _check_engine(engine, address, workers, threads)
    loaded, tokenizer = load(model, dtype, device_map, threads)
    with _engine(engine, address, workers, threads, loaded, n) as chosen:
        if every:
            _begin_all(out_path, asked)
            _run_all(plans, out_path, loaded, tokenizer, chosen, report, json_output)
        else:
            value = _run(plans[0], out_path, loaded, tokenizer, chosen, report, json_output)
            if json_output:
                emit({"runs": [value], "unfinished": []})


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
    """Go on with a run that was stopped, or with the folder of `all`, as it was asked for; units that are there are not done again."""
    from errata.bench.preset import available_presets, get_preset
    from errata.bench.runner import Plan, methods_of
    from errata.bench.store import RunDirectory

    if (run_path / ASKED).is_file():
        asked = _read_asked(run_path)
        plans = [_plan(get_preset(name), asked) for name in available_presets()]
        _check_engine(engine, address, workers, threads)
        loaded, tokenizer = load(asked["model"], asked["dtype"], asked["device_map"], threads)
        with _engine(engine, address, workers, threads, loaded, asked["n"]) as chosen:
            _run_all(plans, run_path, loaded, tokenizer, chosen, report, json_output)
        return
    kept = RunDirectory(run_path).read()
    spec = kept["spec"]
    plan = Plan(
        get_preset(spec["preset"]), spec["model"], methods_of(spec), spec["asked_n"], spec["seed"], spec["data"],
        spec["split"], spec["dtype"], spec["device_map"], spec.get("data_options") or {},
    )  # fmt: skip
    _check_engine(engine, address, workers, threads)
    loaded, tokenizer = load(plan.model_name, plan.dtype, plan.device_map, threads or kept["threads"])
    with _engine(engine, address, workers, threads, loaded, spec["n"]) as chosen:
        value = _run(plan, run_path, loaded, tokenizer, chosen, report, json_output)
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
    """Write a run's tables, figures and examples as one HTML page and as Markdown; of the folder of `all` every run's, and an overview."""
    from errata.bench import report as reports

    write = reports.write_reports if (run_path / ASKED).is_file() else reports.write_report
    write(run_path, out_path or run_path)
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


def _plan(preset: Any, asked: Mapping[str, Any]) -> Any:
    """A preset as it was asked for."""
    from errata.bench.preset import pick_methods
    from errata.bench.runner import Plan

    methods = pick_methods(preset, asked["methods"]) if asked["methods"] else preset.methods
    return Plan(
        preset, asked["model"], methods, asked["n"], asked["seed"], asked["data"], asked["split"], asked["dtype"],
        asked["device_map"], asked["data_options"],
    )  # fmt: skip


def _begin_all(folder: Path, asked: Mapping[str, Any]) -> None:
    """Keep what `all` is asked for, or find that it was asked for before. Raises ConfigError naming the first difference."""
    from errata.bench.store import difference

    if (folder / ASKED).is_file():
        if (found := difference(_read_asked(folder), dict(asked))) is not None:
            raise ConfigError(f"{folder} holds other runs ({found}); name another directory, or repeat their command")
        return
    write_atomically(folder / ASKED, json.dumps(asked, indent=1) + "\n")


def _read_asked(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / ASKED} is damaged ({error}); remove it and repeat the command") from None
    return found


def _run_all(
    plans: list[Any], folder: Path, model: Any, tokenizer: Any, engine: Any, report: bool, json_output: bool
) -> None:
    """Run the plans that are for the model, each in a folder of its own. What ends one of them is said, and the others go on."""
    from errata.bench.preset import unfit
    from errata.bench.report import write_overview

    found: list[dict[str, Any]] = []
    lost: list[str] = []
    answers: dict[Any, dict[str, Any]] = {}
    for plan in plans:
        name = plan.preset.name
        if (why := unfit(plan.preset, model, plan.data)) is not None:
            notice(f"left out: {why}")
            continue
        trace = folder / f"{name}.error.txt"
        try:
            found.append(_run(plan, folder / name, model, tokenizer, engine, report, json_output, answers, folder))
            trace.unlink(missing_ok=True)
        except EditError as error:
            lost.append(name)  # the others are worth having without it
            notice(f"{name} was not finished: {error}")
        except (typer.Exit, BrokenPipeError):
            raise
        except Exception as error:
            lost.append(name)
            write_atomically(trace, traceback.format_exc())
            notice(f"{name} was not finished: {type(error).__name__}: {error} (where it happened is in {trace})")
    if report and found:
        write_overview([Path(one["run"]) for one in found], folder)
    if json_output:
        emit({"runs": found, "unfinished": lost})
    if lost:
        raise typer.Exit(CHECK_FAILED)


def _run(
    plan: Any,
    path: Path,
    model: Any,
    tokenizer: Any,
    engine: Any,
    report: bool,
    quiet: bool,
    answers: dict[Any, dict[str, Any]] | None = None,
    whole: Path | None = None,
) -> dict[str, Any]:
    """Run a plan with its progress on stderr; the summary as JSON values. whole: the folder of `all` that it belongs to."""
    from errata.bench import report as reports
    from errata.bench.runner import run as do

    started, command = time.perf_counter(), shlex.join(["errata", *sys.argv[1:]])
    try:
        # Beside processes that take the cores this one has a thread.
        with _threads(1 if engine.elsewhere else None), _progress(plan.preset.name) as progress:
            do(plan, path, model, tokenizer, engine=engine, command=command, answers=answers, progress=progress)
    except KeyboardInterrupt:
        begun = whole is not None or (path / "run.json").exists()
        go_on = f"finished units are kept; `errata bench resume {shlex.quote(str(whole or path))}` goes on"
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
