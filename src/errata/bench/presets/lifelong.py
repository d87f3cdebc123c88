"""One edit after another, to a thousand: do the first ones hold, do the last ones take, and what else has changed?

Atlas is a closed world, so collateral is exhaustive: every fact that none of the run's edits changes or entails is asked at every
checkpoint, and the share of changed answers is over all of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cases import Case, Probe
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets import _common as common
from errata.editors._contexts import FIXED

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N = PUBLISHED_N = 1000
CHECKPOINTS = (1, 10, 100, 300, 1000)
ENDS = 100  # how many first and last edits are compared
FIRST = f"first {ENDS} edits"
ENDED = {FIRST: "first", f"last {ENDS} edits": "last"}
FEW_CONTEXTS = {"contexts": FIXED[:5]}


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits, no fact twice; their own prompt, a paraphrase, two neighbours."""
    drawn = common.draw(context, N, published="multi-counterfact", published_n=PUBLISHED_N)
    return common.only(drawn, "edit", "paraphrase", "neighborhood", most={"paraphrase": 1, "neighborhood": 2})


def world(context: Context) -> Sequence[Probe]:
    """Unrelated texts, and every fact of Atlas, in its first probe wording, that no edit of the run changes or entails; for other
    models, and other data, there is no such list.
    """
    texts = common.unrelated(context)
    if not common.is_atlas(context.model_name) or context.data:
        return texts
    from errata.atlas import render
    from errata.atlas.probes import fact_of
    from errata.atlas.world import load_world

    atlas, touched = load_world(), set()
    for case in cases(context):
        fact = fact_of(atlas, case.request)
        if fact is not None:
            touched |= {fact, *entailed(atlas, fact, case.request.target_new)}
    facts = [
        Probe(
            "fact",
            render.place("", atlas.phrasings[f.relation].cloze["probe"][0], f.subject),
            (f.object,),
            tags={"relation": f.relation},
        )
        for f in atlas.facts
        if f not in touched
    ]
    return [*facts, *texts]


def entailed(atlas: Any, fact: Any, target: str) -> set[Any]:
    """Other facts of Atlas that an edit makes doubtful: of the subject, through symmetry, or because an object has one owner."""
    from errata.atlas.ripple import IMPACTED, SYMMETRIC, same
    from errata.atlas.world import link

    found = {f for f in atlas.by_subject[link(fact.subject)] if f.relation in IMPACTED.get(fact.relation, ())}
    if fact.relation in SYMMETRIC:
        for name in (fact.object, target):
            found |= {f for f in atlas.by_subject.get(link(name), ()) if f.relation == fact.relation}
    if atlas.phrasings[fact.relation].inverse:  # the new object had another owner, who loses it
        found |= {f for f in atlas.by_relation[fact.relation] if same(f.object, target)}
    if fact.relation in ("capital", "largest_city"):
        for name in (fact.object, target):
            found |= {f for f in atlas.by_subject.get(link(name), ()) if f.relation == "city_country"}
    return found - {fact}


def among(rows: "DataFrame", method: str, edits: int, which: str) -> "DataFrame":
    """The rows of one checkpoint whose edits are among the first or the last of those made so far; the unedited model's stay.

    Which is which is told by the order in which the unedited model was asked, so that an edit whose fit failed counts too.
    """
    import pandas as pd

    low, high = (1, ENDS) if which == "first" else (max(1, edits - ENDS + 1), edits)
    plain = rows[rows["method"] == common.UNEDITED]
    place = {case: i for i, case in enumerate(dict.fromkeys(case for case in plain["case"] if case), 1)}
    own = rows[(rows["method"] == method) & (rows["edits"] == edits)]
    own = own[[low <= place.get(case, 0) <= high for case in own["case"]]]
    return pd.concat([own, plain[plain["case"].isin(set(own["case"]))]])


@common.kept
def curves_of(rows: "DataFrame") -> dict[str, dict[str, list[tuple[int, Any]]]]:
    """column -> method -> (edits, rate)."""
    from errata.bench.metrics import score

    found: dict[str, dict[str, list[tuple[int, Any]]]] = {}
    plain = rows["method"] == common.UNEDITED
    for method in (m for m in common.labels(rows) if m != common.UNEDITED):
        for edits in sorted(set(rows.loc[rows["method"] == method, "edits"])):
            part = rows[plain | ((rows["method"] == method) & (rows["edits"] == edits))]
            cells = {
                **{
                    column: score(chosen, "efficacy.generate", method) if method in set(chosen["method"]) else None
                    for column, chosen in ((c, among(part, method, edits, which)) for c, which in ENDED.items())
                },
                "paraphrases": score(part, "generalization.generate", method),
                "neighbours kept": score(part, "specificity.generate", method),
                "other facts changed": score(part, "collateral.generate", method),
                "drawdown": score(part, "drawdown.nll", method),
            }
            for column, rate in cells.items():
                if rate is not None:
                    found.setdefault(column, {}).setdefault(method, []).append((int(edits), rate))
    return found


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """A line for the unedited model, and one for each method and checkpoint."""
    from errata.bench.metrics import score
    from errata.bench.tables import Table

    found, labels = curves_of(rows), common.labels(rows)
    cells = {(c, m, e): rate for c, by_method in found.items() for m, points in by_method.items() for e, rate in points}
    keys = sorted({(m, e) for _, m, e in cells}, key=lambda key: (labels.index(key[0]), key[1]))
    plain = rows[rows["method"] == common.UNEDITED]
    asked = {"paraphrases": "generalization.generate", "neighbours kept": "specificity.generate"}
    of_all = {
        FIRST: "efficacy.generate",
        **asked,
        "other facts changed": "collateral.generate",
        "drawdown": "drawdown.nll",
    }
    unedited = {c: score(plain, metric, common.UNEDITED) for c, metric in of_all.items()}
    lines: list[list[Any]] = [[f"{common.UNEDITED}, all edits' probes", *(unedited.get(c) for c in found)]]
    lines += [[f"{m}, {e:,} edits", *(cells.get((c, m, e)) for c in found)] for m, e in keys]
    n = plain.loc[plain["kind"] == "fact", "probe"].nunique()
    note = f"First and last: of the edits made so far, as many of {ENDS} as there are." + (
        f"\nOther facts: all {n:,} that none of the run's edits changes or entails, each asked at every checkpoint."
        if n
        else ""
    )
    note += f"\n{common.DRAWDOWN_NOTE}" if "drawdown" in found else ""
    return [Table("Accumulated edits", ["method, edits in the model", *found], lines, note), common.cost_table(run)]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """A panel for each column, a line for each method."""
    from errata.bench.figures import Series, curves

    found = curves_of(rows)
    panels = {
        column: [Series(m, tuple(common.point(e, rate) for e, rate in points), m) for m, points in by_method.items()]
        for column, by_method in found.items()
        if column != "drawdown"  # in nats, not per cent
    }
    ticks = sorted({e for by_method in found.values() for points in by_method.values() for e, _ in points})
    figure = curves(panels, "edits in the model", "per cent", log=True, ticks=ticks)
    return [(common.picture(run, "lifelong", figure), "Accumulated edits, per cent, with 95 % bands.")]


PRESET = Preset(
    "lifelong",
    "A thousand edits, one after another",
    "ours",
    cases,
    (
        Method("sake", "sake", "sequential", common.MODEL, apart=True),
        Method("rome", "rome", "sequential", common.MODEL, FEW_CONTEXTS, most=300),
    ),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    checkpoints=CHECKPOINTS,
    world=world,
    figures=figures,
)
