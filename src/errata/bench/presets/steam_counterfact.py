"""STEAM against its bases: does pulling an edit to where its object lives carry it further (Jeong et al. 2025)?"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from errata.bench.cases import Case
from errata.bench.methods import STEAMS, resolved
from errata.bench.preset import Context, Extra, Method, Preset
from errata.bench.presets import _common as common
from errata.editors._contexts import FIXED
from errata.files import write_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 50, 2000
METRICS = {
    "efficacy": "efficacy.generate",
    "paraphrase": "generalization.generate",
    "neighborhood": "specificity.generate",
    "portability": "portability.generate",
    "of these, condition known": "portability.generate_known",
    "fluency": "fluency.entropy",
    "consistency": "consistency.tfidf",
}
PROB = {"efficacy": "efficacy.prob", "paraphrase": "generalization.prob", "neighborhood": "specificity.prob"}
# Base and STEAM alike in the five contexts in which STEAM's strength was chosen, and in every other option. MEMIT's and STEAM's on
# it are the model's; ROME's own were chosen for another search, and stand in a row of their own.
FEW = {"contexts": FIXED[:5]}
BASE = Method("rome-base", "rome", "single", STEAMS, FEW)
STEAM = Method("steam", "steam", "single", common.MODEL, {"base": "rome", **FEW})
METHODS = (
    common.ROME,
    BASE,
    STEAM,
    Method("memit", "memit", "all", common.MODEL, FEW),
    Method("steam-memit", "steam", "all", common.MODEL, {"base": "memit", **FEW}),
)

SHOWN = 24  # edits whose cosines are drawn
COSINES, PROJECTION = "steam-cosines", "steam-projection"
CAPTIONS = {
    COSINES: "Cosine of edited facts' states with the anchors of their new objects, by layer, ROME being rome-base: mean over edits "
    "with 95 % bands. Dotted: the edited layer; shaded: the aligned ones. Anchors are of wordings that no fit saw.",
    PROJECTION: "States before the object on two principal components of those of true facts (references), three objects.",
}
PAIRS = [("steam", "rome-base"), ("steam-memit", "memit")]
BASE_NOTE = (
    "rome-base: ROME with every option that steam has but the alignment, what steam is compared with. rome: as tuned for the model, "
    "by itself; for Atlas by another search, with other strengths. memit has steam-memit's options."
)


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits from which something follows through the new object."""
    drawn = common.draw(context, N, published_n=PUBLISHED_N, references=True, portable="yes")
    most = {"generation": 3, "neighborhood": 4} if common.is_atlas(context.model_name) else {}
    return common.only(drawn, "edit", "paraphrase", "neighborhood", "portability", "generation", most=most)


def states(context: Context, cases: Sequence[Case], methods: Sequence[Method]) -> Extra:
    """Cosines with the anchors by layer, and states around a few objects in a plane; of both two figures and `alignment.json`.

    They need facts to take anchors from, which only Atlas brings; `benchmarks/steam.py` draws them of its dev edits.
    """
    if not common.is_atlas(context.model_name):
        return Extra({}, lambda made, run: None)

    from errata.atlas.world import load_world
    from errata.bench.alignment import anchor_cosines, object_states
    from errata.bench.worker import editor_of
    from errata.locate.figures import save_figure
    from errata.locate.semantics import cosine_figure, projection_figure

    model, tokenizer, world, seed = context.model, context.tokenizer, load_world(), context.seed
    base, steam = (cast(Any, editor_of(resolved(m, model, context.model_name))) for m in (BASE, STEAM))
    editors, requests = {"ROME": base, "STEAM": steam}, [case.request for case in cases[:SHOWN]]
    aligned, edited = steam.aligned_layers(model), base.layers(model)

    def near() -> dict[str, list[Any]]:
        found = anchor_cosines(model, tokenizer, world, requests, editors, seed)
        return {who: [x.tolist() for x in both] for who, both in found.items()}

    def placed() -> dict[str, dict[str, Any]]:
        found = object_states(model, tokenizer, world, aligned[-1], editors, context.split, seed)
        return {name: {who: x.tolist() for who, x in own.items()} for name, own in found.items()}

    def combine(made: Mapping[str, Any], run: Path) -> None:
        if not made[COSINES]:
            return
        found = {who: (torch.tensor(raw), torch.tensor(centred)) for who, (raw, centred) in made[COSINES].items()}
        save_figure(cosine_figure(found, edited, aligned), run / "figures" / f"{COSINES}.png")
        around = {name: {who: torch.tensor(x) for who, x in own.items()} for name, own in made[PROJECTION].items()}
        title = f"Residual stream before the object, layer {aligned[-1]}"
        save_figure(projection_figure(around, "references", title), run / "figures" / f"{PROJECTION}.png")
        means = {
            who: {name: x.mean(0).tolist() for name, x in zip(("raw", "centred"), both, strict=True)}
            for who, both in found.items()
        }
        about = {"edits": len(found["STEAM"][0]), "aligned": aligned, "edited": edited, "cosines": means}
        write_atomically(run / "alignment.json", json.dumps(about, indent=1) + "\n")

    return Extra({COSINES: near, PROJECTION: placed}, combine)


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """Every metric, gains over the base paired over edits, scores by probabilities, cost."""
    from errata.bench.published import REMARKS
    from errata.bench.tables import difference_table, metric_table

    remarks = "\n".join((common.PROTOCOL_NOTE, BASE_NOTE, *REMARKS["steam-counterfact"]))
    pairs = [pair for pair in PAIRS if set(pair) <= set(rows["method"])]
    return [
        metric_table(rows, "STEAM and its bases", METRICS, note=remarks),
        *([difference_table(rows, "Gain over the base, paired over edits", METRICS, pairs)] if pairs else []),
        metric_table(rows, "By probabilities, as published", PROB),
        common.cost_table(run),
    ]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """The shares as dots with intervals; where edited facts live, if that was measured."""
    shares = {name: metric for name, metric in METRICS.items() if metric.endswith(".generate")}
    path = common.dot_figure(rows, run, "steam-counterfact", shares)
    found = [
        (path, "STEAM and its bases, whole objects by greedy generation, per cent, with 95 % intervals over edits.")
    ]
    if (run / "alignment.json").is_file():
        found += [(run / "figures" / f"{name}.png", caption) for name, caption in CAPTIONS.items()]
    return found


PRESET = Preset(
    "steam-counterfact",
    "STEAM on CounterFact",
    "Jeong et al. 2025, single and batch editing",
    cases,
    METHODS,
    tables,
    n=N,
    published_n=PUBLISHED_N,
    extra=states,
    figures=figures,
)
