"""GRACE's stream of cases whose areas have shifted: a classifier of early years is edited on what late ones show it to get wrong
(Hartvigsen et al. 2023, SCOTUS on BERT).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

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
    from errata.model.room import cut

    name = label_names(context.model)[label_id(context.model, case.request.target_new)]
    texts = [case.request.prompt, *(probe.prompt for probe in case.probes)]
    prompt, *asked = cut(context.model, context.tokenizer, texts)
    probes = tuple(replace(p, prompt=text, expected=(name,)) for p, text in zip(case.probes, asked, strict=True))
    return replace(case, request=EditRequest(prompt=prompt, target_new=name), probes=probes)


def world(context: Context) -> Sequence[Probe]:
    """Cases of the early years, with their right areas."""
    from errata.bench.data.registry import fetch
    from errata.bench.data.scotus import ScotusRecord, scotus_case
    from errata.model.labels import label_names
    from errata.model.room import cut

    if common.is_atlas(context.model_name) and context.data in (None, "atlas-docket"):
        from errata.atlas.docket import upstream

        records = [case.record() for case in upstream(UPSTREAM, seed=context.seed)]
    else:
        from errata.bench.data.registry import DATASETS, first_records

        records = first_records(fetch(DATASETS["scotus"], "train"), ScotusRecord, UPSTREAM)
    names = label_names(context.model)
    prompts = cut(context.model, context.tokenizer, [scotus_case(record).request.prompt for record in records])
    return shared.upstream([(text, names[record.label]) for record, text in zip(records, prompts, strict=True)])


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
