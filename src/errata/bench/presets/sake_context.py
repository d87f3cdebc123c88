"""Edits behind long contexts: filler, other facts or dialogue, up to all that the model has room for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cases import Case
from errata.bench.makers import CONTEXTS, Pieces, lengths_up_to, long_contexts, with_probes
from errata.bench.preset import Context, Preset
from errata.bench.presets import _common as common
from errata.model.room import room

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 24, 150
UNBOUNDED = 4096  # tokens, where a model's configuration sets no bound
METRICS = {"new object": "context.generate", "own gate open": "context.gate", "neighbours kept": "specificity.generate"}


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits; the prompt, a paraphrase and a neighbour behind contexts of five lengths and three kinds."""
    drawn = common.draw(context, N, published_n=PUBLISHED_N)
    pieces = Pieces.of_atlas() if common.is_atlas(context.model_name) else Pieces.of_cases(drawn)
    lengths = lengths_up_to(room(context.model) or UNBOUNDED)
    return [
        with_probes(
            case,
            long_contexts(case, context.model, context.tokenizer, pieces, lengths=lengths, seed=context.seed),
        )
        for case in drawn
    ]


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """For each kind of context and each method: a line, lengths as columns."""
    from errata.bench.metrics import by_tag
    from errata.bench.tables import Table

    lengths = sorted(common.tag_values(rows, "tokens"), key=int)
    made = []
    for name, metric in METRICS.items():
        lines = []
        for kind in CONTEXTS:
            own = common.tagged_or_untagged(rows, context=kind)
            methods = common.gated(own) if metric.endswith(".gate") else common.labels(own)
            for method in methods:
                found = by_tag(own, metric, method, "tokens")
                lines.append([f"{method}, {kind}", *(found.get(length) for length in lengths)])
        note = "Columns: tokens of the whole row, the answer's included; 0 is the bare prompt, the last one the model's full context."
        made.append(Table(f"Behind long contexts: {name}", ["method, context", *lengths], lines, note))
    return [*made, common.cost_table(run)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """A panel for each kind of context, a line for each method; then the same of gates."""
    from errata.bench.figures import curves

    ticks = sorted(map(int, common.tag_values(rows, "tokens")))
    found = []
    for name, metric in METRICS.items():
        panels: dict[str, Sequence[Any]] = {}
        for kind in CONTEXTS:
            own = common.tagged_or_untagged(rows, context=kind)
            methods = common.gated(own) if metric.endswith(".gate") else common.labels(own)
            if metric == "specificity.generate":
                methods = [m for m in methods if m != common.UNEDITED]
            panels[kind] = [common.by_length(own, metric, method, "tokens") for method in methods]
        if any(series for series in panels.values()):
            path = common.picture(
                run,
                f"sake-context-{name.replace(' ', '-')}",
                curves(panels, "tokens", f"{name}, per cent", ticks=ticks),
            )
            found.append((path, f"{name.capitalize()}, per cent, by tokens before the answer; 95 % bands over edits."))
    return found


PRESET = Preset(
    "sake-context",
    "Edits behind long contexts",
    "ours",
    cases,
    (common.SAKE, common.ROME),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    figures=figures,
)
