"""The command line. Each file of this package holds one group of commands; here they are put together."""

from typing import Annotated

import typer

from errata import __version__
from errata.cli import (
    bench,
    data,
    demo,
    export,
    fit,
    flexibility,
    inspect,
    scope,
    statistics,
    trace,
    train,
    tune,
    verify,
)
from errata.cli.common import CommandGroup

HELP = """Correct facts inside language models, check that the correction took, and take it back at any time.

Begin with **errata demo**; then **updates** (real changes to try), **fit**, **ask**, **verify** and **show**; **methods**
lists the editing methods and their options, **calibrate** learns a model's scope test, **bench** makes the papers' tables.

With **--json** a command prints exactly one JSON object on standard output;
progress, notices and errors go to standard error.

Exit codes: 0 all went well; 1 the command worked, but a check failed (verify --min-..., or logits that detaching did
not restore); 2 wrong usage or input, with one sentence that says what; 130 interrupted (a fit keeps its finished edits, a
benchmark its finished units, and both go on when repeated).
"""

app = typer.Typer(
    name="errata",
    cls=CommandGroup,
    help=HELP,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"errata {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("ask")(inspect.ask)
app.command("fit")(fit.fit)
app.command("show")(inspect.show)
app.command("verify")(verify.verify)
app.command("export")(export.export)
app.command("methods")(inspect.methods)
app.command("calibrate")(scope.calibrate)
app.command("statistics")(statistics.statistics)
app.command("updates")(inspect.updates)
app.command("trace")(trace.trace)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("flexibility")(flexibility.flexibility)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")


def main() -> None:
    """The console script."""
    app(prog_name="errata")
