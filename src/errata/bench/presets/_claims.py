"""What the presets on claims share: claims to turn round, others to leave alone, and the methods of KnowledgeEditor's table."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from errata.bench.cases import Case, Probe
from errata.bench.preset import Context, Method
from errata.bench.presets import _common as common

RETAINED = 50  # other claims that each edit is judged by; the paper's are all of the others
METHODS = (
    Method("ft-first", "ft", "single", "ke-first"),
    Method("ft-all", "ft", "single", "ke-all"),
    Method("zhu-first", "ft", "single", "zhu-first"),
    Method("zhu-all", "ft", "single", "zhu-all"),
    Method("ke-l2", "ke", "single", "ke-l2", {"loop": 1}),
    Method("ke", "ke", "single", "ke-plain", {"loop": 1}),
    Method("ke+loop", "ke", "single", "ke-plain"),
    Method("ke+views", "ke", "single", None, {"loop": 1}),
    Method("ke+views+loop", "ke", "single"),
)
NAMES = {
    "ft-first": "FT (1st layer)", "ft-all": "FT (all layers)", "zhu-first": "Zhu et al. (1st layer)",
    "zhu-all": "Zhu et al. (all layers)", "ke-l2": "KE, C_L2", "ke": "KE", "ke+loop": "KE + loop", "ke+views": "KE + P^x",
    "ke+views+loop": "KE + P^x + loop",
}  # fmt: skip


def cases(context: Context, n: int) -> Sequence[Case]:
    """Claims that the model judges, each to be judged the other way, with rephrases, and others that are to stay as they are.

    Verdicts, and which rephrases count, are this model's own.
    """
    from errata.bench.data.kilt import annotated, claim_case, other_class

    records = annotated(context.model, context.tokenizer, _records(context, n))
    found = []
    for record in records:
        case, rng = claim_case(record), random.Random(f"{context.seed}|{record.id}|retained")
        others = [other for other in records if other.id != record.id]
        kept = rng.sample(others, min(RETAINED, len(others)))
        probes = [
            Probe("locality", other.input, (said,), (other_class(said),), tags={"of": "other claims"})
            for other in kept
            if (said := other.prediction or "")
        ]
        near = [replace(p, tags={"of": "related claims"}) if p.kind == "locality" else p for p in case.probes]
        found.append(replace(case, probes=(*near, *probes)))
    return found


def _records(context: Context, n: int) -> list[Any]:
    from errata.bench.data.kilt import KiltRecord
    from errata.bench.data.records import Problem
    from errata.bench.data.registry import DATASETS, fetch, first_records

    number, options = context.n or n, common.only_bad(context)
    if common.is_atlas(context.model_name) and context.data in (None, "atlas-fever"):
        from errata.atlas.kilt import fever_records
        from errata.atlas.world import load_world

        return fever_records(load_world(), number, split=context.split, seed=context.seed)
    left_out: list[Problem] = []
    if context.data in (None, "fever"):
        path, split = fetch(DATASETS["fever"], context.split), "test"
    else:
        path, split = Path(context.data), context.split
    records = first_records(path, KiltRecord, number, split=split, left_out=left_out, **options)
    common.tell(context, context.data or "fever", left_out)
    return records
