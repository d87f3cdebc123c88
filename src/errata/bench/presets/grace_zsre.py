"""GRACE's stream of questions: each is edited if the model errs on it by then (Hartvigsen et al. 2023, zsRE on T5).

Atlas's questions ask for other objects than the true ones, so that there is something to edit in a model that knows all its
facts; zsRE's for an alternative. The paper's stream takes every rephrase for an edit of its own; here they are held out and
judge the edit of their question.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench import streams
from errata.bench.cases import Case, Probe
from errata.bench.preset import Context, Preset
from errata.bench.presets import _common as common
from errata.bench.presets import _streams as shared
from errata.errors import ConfigError

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N, UPSTREAM = 1000, 5000, 500
EVERY = 200  # edits between two looks, at each of which all edits so far are asked


def cases(context: Context) -> Sequence[Case]:
    """Questions with another answer to give, and other wordings."""
    drawn = common.draw(context, N, atlas="atlas-zsre", published="zsre", published_n=PUBLISHED_N)
    return [shared.few_wordings(case) for case in drawn]


def world(context: Context) -> Sequence[Probe]:
    """Questions that no edit concerns: Atlas's, or those of the NQ file beside zsRE's (`{"questions": [...], "answers": [...]}`)."""
    if common.is_atlas(context.model_name) and context.data in (None, "atlas-zsre"):
        from errata.atlas.kilt import upstream_questions, zsre_records
        from errata.atlas.world import load_world

        atlas = load_world()
        edits = zsre_records(atlas, context.n or N, split=context.split, seed=context.seed)
        most = min(UPSTREAM, 2 * len(edits))
        found = upstream_questions(atlas, most, without=edits, split=context.split, seed=context.seed)
        return shared.upstream(
            [(q, answers[0]) for q, answers in zip(found["questions"], found["answers"], strict=True)]
        )
    from errata.bench.data.registry import data_folder

    path = data_folder() / "nq_train.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pairs = [
            (q, a if isinstance(a, str) else a[0]) for q, a in zip(found["questions"], found["answers"], strict=True)
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"expected Natural Questions as {{'questions': [...], 'answers': [[...], ...]}} in {path}, but {error}; take the file "
            "from the data page of the MEND project"
        ) from None
    return shared.upstream(pairs[:UPSTREAM])


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """By F1, as in the paper; by whole answers; by ROME's token accuracy on zsRE; cost."""
    from errata.bench.glossary import FORCED

    by_f1 = streams.stream_table(
        rows, run, "grace-zsre", "f1", "A stream of questions, F1", shared.NAMES, faulty="f1_set"
    )
    whole = streams.stream_table(rows, run, "", "generate", "The same, whole answers", {})
    tokens = streams.stream_table(
        rows, run, "", "teacher_forced_token", "The same, token accuracy as ROME and MEMIT measure zsRE", {},
        about=f"Fault of this protocol: {FORCED}.",
    )  # fmt: skip
    return [by_f1, whole, tokens, common.cost_table(run)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """The same along the stream."""
    figure = streams.stream_figure(rows, "f1")
    return [(common.picture(run, "grace-zsre", figure), "F1 along the stream, with 95 % bands.")] if figure else []


PRESET = Preset(
    "grace-zsre",
    "A stream of questions",
    "Hartvigsen et al. 2023, table of zsRE on T5",
    cases,
    shared.methods(),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    every=EVERY,
    world=world,
    figures=figures,
    roles=("decoder", "encoder-decoder"),
)
