"""What all commands share: errors as one sentence, options, loading, and output (results to stdout, the rest to stderr)."""

import errno
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from errata.edit import EditRequest, conflicts
from errata.errors import ConfigError, EditError

CHECK_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

Model = Annotated[str, typer.Option("--model", "-m", help="atlas (bundled), a local directory, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option("--seed", help="Equal seeds give equal results.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
DeviceMap = Annotated[str | None, typer.Option("--device-map", help="Passed to transformers: auto, cpu, cuda:0, ...")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all by default.")]
Preset = Annotated[str | None, typer.Option("--preset", help="A named configuration; `errata methods` lists them.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Options that `errata tune` has written.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change an option; repeatable.")
]


class CommandGroup(TyperGroup):
    """Turns the errors that errata raises on purpose, unreadable files and Ctrl-C into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            with _warnings_as_notices():
                return super().invoke(ctx)
        except EditError as error:
            raise _failed(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise _failed(f"cannot read or write {place}{error.strerror or error}") from None
        except KeyboardInterrupt:
            typer.secho("interrupted", err=True, fg=typer.colors.YELLOW)
            raise typer.Exit(INTERRUPTED) from None


def _failed(sentence: str) -> typer.Exit:
    typer.secho(f"error: {' '.join(sentence.split())}", err=True, fg=typer.colors.RED)
    return typer.Exit(BAD_INPUT)


@contextmanager
def _warnings_as_notices() -> Iterator[None]:
    """Inside, errata's own warnings are notices on stderr and other libraries' are silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"errata(\.|$)")
        warnings.showwarning = lambda message, *_, **__: notice(str(message))
        yield


# -- output --------------------------------------------------------------------------------------------------------------


def out() -> Console:
    """Results."""
    return _console(stderr=False)


def err() -> Console:
    """Progress and notices."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:  # a pipe has no width; 80 columns would fold every prompt
        console.width = 140
    return console


def notice(text: str) -> None:
    """One line on stderr."""
    typer.secho(f"note: {' '.join(text.split())}", err=True, fg=typer.colors.YELLOW)


def emit(value: dict[str, Any]) -> None:
    """The one JSON object of a command, strict: what is not a finite number is null."""
    typer.echo(json.dumps(_strict(value), ensure_ascii=False, allow_nan=False, indent=2))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def table(title: str | None, *columns: str, right: Iterable[str] = ()) -> Table:
    """A table whose `right` columns are numbers."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in set(right) else "left", overflow="fold")
    return made


def row(made: Table, *cells: Any, end_section: bool = False) -> None:
    """Add a row; what a user wrote is text, never markup."""
    plain = [cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in cells]
    made.add_row(*plain, end_section=end_section)


def percent(value: float | None) -> str:
    """A fraction as a percentage; a dash for None."""
    return "-" if value is None else f"{value:.1%}"


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; call the yielded function with how many are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = err()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


# -- input ---------------------------------------------------------------------------------------------------------------


def load(name: str, dtype: str | None, device_map: str | None, threads: int | None) -> tuple[Any, Any]:
    """The model and its tokenizer, with a spinner instead of the libraries' own bars and remarks."""
    with err().status(f"loading {name}"):
        import torch
        import transformers

        from errata.model import loading

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        return loading.load(name, dtype=dtype, device_map=device_map)


def is_atlas(name: str) -> bool:
    """Whether a model name means Atlas: the bundled model, or a directory that `errata.atlas.train` exported."""
    from errata.model import loading

    return loading.is_atlas(name)


def atlas_requests(model: str, n: int, seed: int, split: Any = "test", *, probes: bool = False) -> list[EditRequest]:
    """Random counterfactual edits of Atlas's facts, with their probes if wanted. Raises ConfigError for another model."""
    if not is_atlas(model):
        raise ConfigError(
            f"Atlas's counterfactual edits are for Atlas only, and the model is {model!r}; give --requests"
        )
    from errata.atlas.probes import with_probes
    from errata.atlas.requests import counterfactual_requests
    from errata.atlas.world import load_world

    world = load_world()
    made = counterfactual_requests(world, n, split=split, seed=seed)
    return with_probes(world, made, seed) if probes else made


def atlas_texts(n: int, seed: int, sealed: bool = False) -> list[str]:
    """Texts of Atlas's that no edit is about."""
    from errata.atlas.probes import unrelated_texts
    from errata.atlas.world import load_world

    return unrelated_texts(load_world(), n, seed, sealed) if n else []


def writable(path: Path) -> Path:
    """The path, if a file can be written there: said before hours of work, not after. Raises ConfigError.

    The folder (of the folders above it that exist, the nearest) is tried with a file that has no name and leaves none.
    """
    if path.is_dir():
        raise ConfigError(f"expected a file name for the result, found the directory {path}; name a file in it")
    folder = next(p for p in path.absolute().parents if p.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error} ({folder}); name a file in a folder that you may write to"
        ) from None
    return path


def notice_conflicts(requests: Iterable[EditRequest]) -> list[list[str]]:
    """A notice for each two edits about one thing; returns [later, earlier] ids, as `errata ask` does."""
    pairs = conflicts(requests)
    for earlier, later in pairs:
        notice(
            f"edits {earlier.id} ({earlier.text} -> {earlier.target_new}) and {later.id} ({later.text} -> "
            f"{later.target_new}) are about the same subject and relation; attached together, the later one wins where each "
            "edit has a scope or a key of its own or one fit wrote both, and they add up where two patches change weights: keep one "
            "of the two"
        )
    return [[later.id, earlier.id] for earlier, later in pairs]


def data_options(settings: Iterable[str] | None, flag: str, *besides: str) -> dict[str, str]:
    """NAME=VALUE settings of data sets. besides: names that go with every one. Raises ConfigError for what none has."""
    from errata.bench.data.registry import DATASETS

    known = list(dict.fromkeys([*besides, *(name for dataset in DATASETS.values() for name in dataset.options)]))
    found = {}
    for setting in settings or ():
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ConfigError(f"expected {flag} NAME=VALUE, found {setting!r}")
        if name not in known:
            raise ConfigError(f"no data set has an option {name!r}; there are {', '.join(known)}")
        found[name] = value
    return found


def one_of(given: dict[str, Any]) -> None:
    """Raises ConfigError unless exactly one of these options is given."""
    found: Sequence[str] = [name for name, value in given.items() if value is not None]
    if len(found) != 1:
        raise ConfigError(f"expected exactly one of {' and '.join(given)}, found {' and '.join(found) or 'neither'}")
