"""GRACE's stream of cases whose areas have shifted: a classifier of early years is edited on what late ones show it to get wrong
(Hartvigsen et al. 2023, SCOTUS on BERT).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench import streams
from errata.bench.cases import Case, Probe
from errata.bench.preset import Context, Preset
from errata.bench.presets import _common as common
from errata.bench.presets import _streams as shared
from errata.edit import EditRequest

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, UPSTREAM = 1000, 500


def cases(context: Context) -> Sequence[Case]:
    """The late cases in their order."""
    drawn = common.draw(context, N, atlas="atlas-docket", published="scotus", old_objects=False)
    return [shared.few_wordings(fitting(context, case)) for case in drawn]


def fitting(context: Context, case: Case) -> Case:
    """The case as the model takes it: its label by the model's name, its texts cut at the end to what there is room for."""
    from errata.model.labels import label_id, label_names

    name = label_names(context.model)[label_id(context.model, case.request.target_new)]
    cut = _Cut(context)
    probes = tuple(replace(probe, prompt=cut(probe.prompt), expected=(name,)) for probe in case.probes)
    return replace(case, request=EditRequest(prompt=cut(case.request.prompt), target_new=name), probes=probes)


def world(context: Context) -> Sequence[Probe]:
    """Cases of the early years, with their right areas."""
    from errata.bench.data.registry import fetch
    from errata.bench.data.scotus import ScotusRecord, scotus_case
    from errata.model.labels import label_names

    if common.is_atlas(context.model_name) and context.data in (None, "atlas-docket"):
        from errata.atlas.docket import upstream

        records = [case.record() for case in upstream(UPSTREAM, seed=context.seed)]
    else:
        from errata.bench.data.registry import DATASETS, first_records

        records = first_records(fetch(DATASETS["scotus"], "train"), ScotusRecord, UPSTREAM)
    names, cut = label_names(context.model), _Cut(context)
    found = [(record, scotus_case(record).request) for record in records]
    return shared.upstream([(cut(request.prompt), names[record.label]) for record, request in found])


class _Cut:
    """Texts cut at the end to the model's positions: opinions are longer than any BERT."""

    def __init__(self, context: Context):
        from errata.model.room import room

        self.tokenizer: Any = context.tokenizer
        self.room = room(context.model)

    def __call__(self, text: str) -> str:
        from errata.model.tokens import token_ids

        rows = token_ids(self.tokenizer, [text])
        if self.room is None or len(rows[0]) <= self.room:
            return text
        low, high = 1, len(text)  # the longest beginning that fits
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(token_ids(self.tokenizer, [text[:middle]])[0]) <= self.room
            low, high = (middle, high) if fits else (low, middle - 1)
        return text[:low].rstrip()


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """Accuracy, as in the paper; cost."""
    title = "A stream of cases whose areas have shifted, accuracy"
    return [
        streams.stream_table(rows, run, "grace-scotus", "generate", title, shared.NAMES),
        common.cost_table(run),
    ]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """The same along the stream."""
    figure = streams.stream_figure(rows, "generate")
    return (
        [(common.picture(run, "grace-scotus", figure), "Accuracy along the stream, with 95 % bands.")] if figure else []
    )


PRESET = Preset(
    "grace-scotus",
    "A stream of cases whose areas have shifted",
    "Hartvigsen et al. 2023, table of SCOTUS on BERT",
    cases,
    shared.methods(),
    tables,
    n=N,
    world=world,
    figures=figures,
    roles=("classifier",),
    labels=("9",),  # areas of law; a model of claims has two labels
)
