"""STEAM on Atlas: the sweep that chose lambda and the layers, and what it gains over its bases.

    python benchmarks/steam.py --sweep [--n 100] [--out sweep.json]       on dev edits: one row per setting
    python benchmarks/steam.py --split dev|test [--n 300] [--out FILE]    the chosen setting against ROME and MEMIT
    python benchmarks/steam.py --figures docs/figures [--n 60]            cosines to held-out anchors, 2-D projection

Counterfactual edits from which something follows through the new object, each judged alone: whole objects by greedy decoding on
`probe` phrasings. Portability is what follows (`bench.portability`); differences are paired over edits.
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import errata
import errata.files
from errata.atlas.counterfact import attribute_snippets, counterfact_records, counterfact_requests
from errata.atlas.references import references
from errata.atlas.ripple import edited_fact, wordings
from errata.atlas.world import World, link, load_world
from errata.bench.fluency import Fluency, fluency
from errata.bench.metrics import Rate, by_case, rate
from errata.bench.portability import (
    Outcome,
    PortabilityProbe,
    case_scores,
    conditions_hold,
    counterfact_probes,
    measure,
    paired_difference,
)
from errata.bench.probes import exact
from errata.bench.schemas import CounterFactRecord
from errata.edit import EditRequest
from errata.editors.memit import MEMIT
from errata.editors.rome import ROME
from errata.editors.steam import STEAM
from errata.model.generate import greedy_answers
from errata.patch import Patch

METRICS = ("efficacy", "generalization", "other subjects", "same subject")
NEIGHBOURS = 4


@dataclass(frozen=True)
class Case:
    """One edit and what judges it: {metric: (prompt, answer)}, its consequences, and which of these the model could know."""

    request: EditRequest
    record: CounterFactRecord
    asked: Mapping[str, tuple[tuple[str, str], ...]]
    probes: tuple[PortabilityProbe, ...]
    known: tuple[bool, ...]


@dataclass(frozen=True)
class Judged:
    """Scores of one edit: share of prompts answered as they should be, for each metric that has any; portability's outcomes."""

    scores: Mapping[str, float]
    outcomes: tuple[Outcome, ...]


def cases(model: Any, tokenizer: Any, world: World, n: int, split: Any, seed: int) -> list[Case]:
    """`n` edits with probes; what should stay is what the unedited model says."""
    requests = counterfact_requests(world, n, split=split, seed=seed, neighbours=False, portable=True)
    records = counterfact_records(world, requests, seed=seed)
    probes = counterfact_probes(records, [request.id for request in requests])
    known = conditions_hold(model, tokenizer, probes)
    rng = random.Random(seed)
    beside = [neighbours(world, request, rng) for request in requests]
    flat = [prompt for both in beside for prompts in both for prompt in prompts]
    said = dict(zip(flat, greedy_answers(model, tokenizer, flat), strict=True))
    made = []
    for request, record, (others, same) in zip(requests, records, beside, strict=True):
        asked = {
            "efficacy": ((request.text, request.target_new),),
            "generalization": tuple((prompt, request.target_new) for prompt in record.paraphrase_prompts),
            "other subjects": tuple((prompt, said[prompt]) for prompt in others if said[prompt]),
            "same subject": tuple((prompt, said[prompt]) for prompt in same if said[prompt]),
        }
        mine = [i for i, probe in enumerate(probes) if probe.case == request.id]
        made.append(Case(request, record, asked, tuple(probes[i] for i in mine), tuple(known[i] for i in mine)))
    return made


def neighbours(world: World, request: EditRequest, rng: random.Random) -> tuple[list[str], list[str]]:
    """Prompts about the same relation of other subjects, and about other relations of the same subject."""
    fact = edited_fact(world, request)
    others = [f for f in world.by_relation[fact.relation] if f.subject != fact.subject and f.split == fact.split]
    same = [f for f in world.by_subject[link(fact.subject)] if f.relation != fact.relation]
    picked = (rng.sample(own, min(len(own), NEIGHBOURS)) for own in (others, same))
    first, second = ([wordings(world, f.relation, f.subject, rng)[0].text for f in own] for own in picked)
    return first, second


def singles(patch: Patch) -> list[Patch]:
    """Each edit of independent edits as a patch of its own."""
    return [
        replace(
            patch,
            requests=(request,),
            parts=tuple(own for part in patch.low_rank if (own := part.only(request.id)) is not None),
            report={request.id: patch.report[request.id]},
        )
        for request in patch.requests
    ]


def judge(model: Any, tokenizer: Any, case: Case) -> Judged:
    """One edit's scores on the model as it is, with whatever is attached."""
    pairs = [(name, pair) for name in METRICS for pair in case.asked[name]]
    good = exact(model, tokenizer, [pair for _, pair in pairs])
    scores = by_case((name for name, _ in pairs), good)
    return Judged(scores, tuple(measure(model, tokenizer, case.probes)))


def judged(model: Any, tokenizer: Any, own: Sequence[Case], patches: Sequence[Patch]) -> list[Judged]:
    """Each edit alone on the model."""
    found = []
    for case, patch in zip(own, patches, strict=True):
        with patch.attach(model, tokenizer):
            found.append(judge(model, tokenizer, case))
    return found


def ported(own: Sequence[Case], found: Sequence[Judged], known: bool) -> Mapping[str, float]:
    """Portability of each edit, over all of its probes or over those whose condition the unedited model meets."""
    kept = [
        o for c, j in zip(own, found, strict=True) for o, k in zip(j.outcomes, c.known, strict=True) if k or not known
    ]
    return case_scores(kept)


def summary(own: Sequence[Case], found: Sequence[Judged], base: Sequence[Judged] | None = None) -> dict[str, Any]:
    """Every metric with its interval; against a base, portability's paired difference as well."""
    rows: dict[str, Rate | None] = {}
    for name in METRICS:
        rows[name] = rate((j.scores[name] for j in found if name in j.scores), f"{name}.generate: mean over edits")
    for known in (False, True):
        name = "portability, known" if known else "portability"
        ours = ported(own, found, known)
        rows[name] = rate(ours.values(), f"{name}.generate: mean over edits")
        if base is not None:
            rows[f"{name}: gain"] = paired_difference(ours, ported(own, base, known), f"{name}.generate")
    chances = [float(np.mean([np.exp(-o.nll_after) for o in j.outcomes])) for j in found]
    rows["portability, probability"] = rate(chances, "portability_target.prob: mean over edits")
    if base is not None:
        before = [float(np.mean([np.exp(-o.nll_after) for o in j.outcomes])) for j in base]
        ids = [case.request.id for case in own]
        rows["portability, probability: gain"] = paired_difference(
            dict(zip(ids, chances, strict=True)), dict(zip(ids, before, strict=True)), "portability_target.prob"
        )
    return {name: row.json() for name, row in rows.items() if row is not None}
