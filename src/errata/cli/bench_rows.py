"""`errata bench rows`: every single answer behind a run's numbers."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli.common import Json, emit, notice, out, row, table
from errata.errors import ConfigError

SHOWN = ("method", "edits", "case", "kind", "prompt", "expected", "generated", "unedited", "passed")
SHOWN_FITS = ("method", "case", "seconds", "nbytes", "error")


class What(StrEnum):
    """Which of a run's two kinds of rows."""

    rows = "rows"
    fits = "fits"


def rows(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    where: Annotated[
        str | None,
        typer.Option(
            "--where",
            help="Tests joined by `and`: `kind = edit and passed = false`, `tags.tokens = 256`, `generated contains Paris`; "
            "= != < <= > >= contains, `in (a, b)`, `is null`.",
        ),
    ] = None,
    columns: Annotated[str | None, typer.Option("--columns", help="Names with commas between; `all` for every one.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="At most so many rows; 0 for all.")] = 20,
    what: Annotated[What, typer.Option("--of", help="Answers to probes, or fits.")] = What.rows,
    json_output: Json = False,
    csv_output: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
) -> None:  # fmt: skip
    """Show the rows behind a run's tables: what was asked, what was expected, what the model said."""
    from errata.bench.rows import FITS, SCHEMA, count, read

    if json_output and csv_output:
        raise ConfigError("expected at most one of --json and --csv, found both")
    schema, folder, usual = (SCHEMA, "units", SHOWN) if what is What.rows else (FITS, "fits", SHOWN_FITS)
    chosen = [name.strip() for name in columns.split(",")] if columns else list(usual)
    if chosen == ["all"]:
        chosen = list(schema.names)
    found = read(run / folder, schema, where, chosen, limit or None)
    total = count(run / folder, schema, where)
    values = [{name: _plain(value) for name, value in line.items()} for line in found.to_dict("records")]
    if json_output:
        emit({"run": str(run), "where": where, "total": total, "rows": values})
        return
    if csv_output:
        found.to_csv(sys.stdout, index=False)
    else:
        numbers = tuple(name for name in chosen if found[name].dtype.kind in "if")
        made = table(None, *chosen, right=numbers)
        for line in values:
            row(made, *(_shown(line[name]) for name in chosen))
        out().print(made)
    if len(values) < total:
        notice(f"{len(values)} of {total} rows; --limit 0 shows all")


def _plain(value: Any) -> Any:
    """As JSON has it: what is missing is None."""
    if isinstance(value, (tuple, dict)):
        return list(value) if isinstance(value, tuple) else value
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or value != value else value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(part if isinstance(part, str) else " or ".join(part) for part in value)
    if isinstance(value, dict):
        return " ".join(f"{name}={part}" for name, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
