"""STEAM on Atlas: the sweep that chose its settings, what it gains over its bases, and its figures.

    python benchmarks/steam.py --sweep --n 40                  dev edits, a row for each setting
    python benchmarks/steam.py --split dev --n 150             the chosen setting against ROME (one edit at a time) and MEMIT (all)
    python benchmarks/steam.py --figures docs/figures --n 60   cosines to held-out anchors, 2-D projection; dev edits

Counterfactual edits from which something follows through the new object, judged by whole objects under greedy decoding on `probe`
phrasings. Portability is what follows (`bench.portability`); gains are paired differences over edits. With --out, results go
into that JSON file beside what it has already. Every choice is made on dev; `--split test` is for the final figures.
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from errata.bench.alignment import anchor_cosines, object_states
from errata.bench.data.counterfact import CounterFactRecord
from errata.bench.fluency import PROTOCOL_CONSISTENCY, PROTOCOL_FLUENCY, TfIdf, consistency, fluency, sample
from errata.bench.forced import exact
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
from errata.edit import EditRequest
from errata.editors._contexts import FIXED
from errata.editors.memit import MEMIT
from errata.editors.rome import ROME
from errata.editors.steam import STEAM
from errata.locate.anchors import Reference
from errata.locate.figures import save_figure
from errata.locate.semantics import cosine_figure, projection_figure
from errata.model.generate import greedy_answers
from errata.patch import Patch

# The bases' settings in the sweep that chose STEAM's: in fewer contexts than `_models` names for Atlas.
ROME_OPTIONS: dict[str, Any] = {**STEAM.presets["atlas"], "contexts": FIXED[:5]}
MEMIT_OPTIONS: dict[str, Any] = {**MEMIT.presets["atlas"], "contexts": FIXED[:5]}
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


def chance(own: Sequence[Case], found: Sequence[Judged]) -> dict[str, float]:
    """Mean probability of what follows, for each edit from which something does."""
    pairs = [(case.request.id, one.outcomes) for case, one in zip(own, found, strict=True) if one.outcomes]
    return {edit: float(np.mean([np.exp(-o.nll_after) for o in outcomes])) for edit, outcomes in pairs}


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
    chances = chance(own, found)
    rows["portability, probability"] = rate(chances.values(), "portability_target.prob: mean over edits")
    if base is not None:
        gain = paired_difference(chances, chance(own, base), "portability_target.prob")
        rows["portability, probability: gain"] = gain
    return {name: row.json() for name, row in rows.items() if row is not None}


def by_group(
    own: Sequence[Case], found: Sequence[Judged], base: Sequence[Judged], groups: Sequence[str]
) -> dict[str, Any]:
    """Portability's gain over the base in each group of edits."""
    ours, theirs = ported(own, found, False), ported(own, base, False)
    rows = {}
    for group in sorted(set(groups)):
        ids = [case.request.id for case, g in zip(own, groups, strict=True) if g == group and case.request.id in ours]
        if not ids:
            continue
        gain = paired_difference({i: ours[i] for i in ids}, {i: theirs[i] for i in ids}, "portability.generate")
        rows[group] = gain.json()
    return rows


def anchor_group(note: Mapping[str, Any]) -> str:
    """How many references an edit's anchor is the mean of, in classes."""
    used, forced = note["used"], note["forced"]
    if forced:
        return "with forced contexts"
    return next(f"{low:2d} to {high}" for low, high in ((0, 4), (5, 8), (9, 15), (16, 10**6)) if used <= high)


# -- runs ------------------------------------------------------------------------------------------------------------------


CENTRE: dict[str, Any] = {"weight": 5.0, "aligned": (3, 6), "counts": True}
AROUND: tuple[dict[str, Any], ...] = (
    {},
    *({"weight": weight} for weight in (1.0, 2.0, 10.0, 20.0)),
    *({"aligned": layers} for layers in ((3, 4), (5, 6), (3, 7))),
    {"counts": False},
    {"read": "subject_last"},
    {"read": "subject_last", "strata": "matched"},
    {"strata": "matched"},
    {"schedule": "warmup"},
    {"schedule": "balanced", "weight": 1.0},
    {"distance": "mse", "weight": 0.1},
    {"count": 4},
    {"count": 64},
    *({"weight": weight} for weight in (50.0, 100.0)),
    {"weight": 20.0, "aligned": (3, 7)},
    {"weight": 20.0, "strata": "matched"},
    *({"weight": weight, "counts": False} for weight in (20.0, 50.0)),
)


def sweep(
    model: Any,
    tokenizer: Any,
    own: Sequence[Case],
    known: Sequence[Reference],
    seed: int,
    keep: Callable[[Any], None],
    rows: dict[str, Any],
) -> None:
    """ROME, ROME without its early stop, and STEAM on ROME around one setting, an option at a time.

    `keep` gets the rows, old and new; a setting that is among `rows` is not run again.
    """
    requests = [case.request for case in own]
    editors: dict[str, Any] = {"rome": ROME(**ROME_OPTIONS), "rome, every step taken": ROME(**ROME_OPTIONS, stop=1e-9)}
    editors |= {
        json.dumps(CENTRE | changes): STEAM(references=known, **ROME_OPTIONS, **(CENTRE | changes))
        for changes in AROUND
    }
    base: list[Judged] | None = None
    for name, editor in editors.items():
        if base is not None and name in rows:
            continue
        started = time.perf_counter()
        patch = editor.fit(model, tokenizer, requests, seed=seed)
        seconds = (time.perf_counter() - started) / len(requests)
        found = judged(model, tokenizer, own, singles(patch))
        rows[name] = summary(own, found, base) | {"seconds_fit_per_edit": round(seconds, 3)}
        base = base or found
        show(name, rows[name])
        keep(rows)


def show(name: str, row: Mapping[str, Any]) -> None:
    """One line on stderr."""
    shown = {k: v for k, v in row.items() if isinstance(v, dict) and "value" in v}
    parts = [
        f"{k} {v['value']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}]" if "gain" in k else f"{k} {v['value']:.3f}"
        for k, v in shown.items()
    ]
    print(f"{name}: {'; '.join(parts)}", file=sys.stderr, flush=True)


def compare(
    model: Any,
    tokenizer: Any,
    world: World,
    own: Sequence[Case],
    known: Sequence[Reference],
    args: argparse.Namespace,
    keep: Callable[[Any], None],
) -> None:
    """ROME and STEAM on it one edit at a time, MEMIT and STEAM on it all edits at once; gains are over each one's base."""
    requests = [case.request for case in own]
    rows: dict[str, Any] = {"unedited": summary(own, [judge(model, tokenizer, case) for case in own])}
    show("unedited", rows["unedited"])
    for base, options in (("rome", ROME_OPTIONS), ("memit", MEMIT_OPTIONS)):
        before: list[Judged] | None = None
        for name, editor in (
            (base, {"rome": ROME, "memit": MEMIT}[base](**options)),
            (f"steam on {base}", STEAM(base=base, references=known, **options)),
        ):
            started = time.perf_counter()
            patch = editor.fit(model, tokenizer, requests, seed=args.seed)
            seconds = (time.perf_counter() - started) / len(requests)
            if base == "rome":
                found = judged(model, tokenizer, own, singles(patch))
            else:
                with patch.attach(model, tokenizer):
                    found = [judge(model, tokenizer, case) for case in own]
            rows[name] = summary(own, found, before) | {"seconds_fit_per_edit": round(seconds, 3)}
            if base == "rome":
                some = own[: args.texts]
                rows[name] |= free_texts(model, tokenizer, world, some, singles(patch)[: args.texts], args.seed)
            if before is not None:
                notes = [patch.report[case.request.id]["anchor"] for case in own]
                relations = [case.request.relation or "" for case in own]
                rows[name]["gain by relation"] = by_group(own, found, before, relations)
                rows[name]["gain by references"] = by_group(own, found, before, [anchor_group(note) for note in notes])
            before = before or found
            show(name, rows[name])
            keep(rows)
    rows["unedited"] |= free_texts(model, tokenizer, world, own[: args.texts], [None] * args.texts, args.seed)
    keep(rows)
    table(rows)


def free_texts(
    model: Any, tokenizer: Any, world: World, own: Sequence[Case], patches: Sequence[Patch | None], seed: int
) -> dict[str, Any]:
    """Fluency and consistency of free texts, each edit alone (None: unedited): means with 1.96 standard errors."""
    groups = attribute_snippets(world, [case.record for case in own])
    snippets = {(group.relation_id, group.target_id): [s.text for s in group.samples] for group in groups}
    tfidf = TfIdf.of(text for texts in snippets.values() for text in texts)
    scores: dict[str, list[float]] = {"fluency": [], "consistency": []}
    for case, patch in zip(own, patches, strict=False):
        with patch.attach(model, tokenizer) if patch is not None else nullcontext():
            texts = sample(model, tokenizer, case.record.generation_prompts, seed=seed)
        scores["fluency"].append(fluency(texts))
        rewrite = case.record.requested_rewrite
        about = snippets.get((rewrite.relation_id, link(rewrite.target_new.str_)))
        if about:
            scores["consistency"].append(consistency(texts, about, tfidf))
    protocols = {"fluency": PROTOCOL_FLUENCY, "consistency": PROTOCOL_CONSISTENCY}
    rows = {}
    for name, values in scores.items():
        mean, error = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
        rows[name] = Rate(mean, mean - error, mean + error, len(values), protocols[name]).json()
    return rows


def table(rows: Mapping[str, Any]) -> None:
    """Metrics by method, for the reader."""
    names = list(
        dict.fromkeys(k for row in rows.values() for k, v in row.items() if isinstance(v, dict) and "value" in v)
    )
    made = Table("metric", *rows)
    for name in names:
        figures = [row.get(name) for row in rows.values()]
        made.add_row(
            name, *("" if f is None else f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figures)
        )
    Console(stderr=True, width=150).print(made)


# -- figures ---------------------------------------------------------------------------------------------------------------


def draw(model: Any, tokenizer: Any, world: World, known: Sequence[Reference], args: argparse.Namespace) -> None:
    """Both figures, from dev edits; anchors and references are of wordings that no fit saw."""
    folder = Path(args.figures)
    requests = counterfact_requests(world, args.n, split="dev", seed=args.seed, neighbours=False, portable=True)
    steam = STEAM(references=known, **ROME_OPTIONS)
    editors: dict[str, Any] = {"ROME": ROME(**ROME_OPTIONS), "STEAM": steam}
    curves = anchor_cosines(model, tokenizer, world, requests, editors)
    for name, (raw, centred) in curves.items():
        print(f"{name}: raw {raw.mean(0).tolist()}; centred {centred.mean(0).tolist()}", file=sys.stderr)
    aligned = steam.aligned_layers(model)
    save_figure(cosine_figure(curves, [ROME_OPTIONS["layer"]], aligned), folder / "steam-cosines.png")
    objects = object_states(model, tokenizer, world, aligned[-1], editors, "dev", args.seed)
    title = f"Residual stream before the object, layer {aligned[-1]}"
    save_figure(projection_figure(objects, "references", title), folder / "steam-projection.png")


def load_results(path: str | None) -> dict[str, Any]:
    """What a result file has already."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if path and Path(path).exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--n", type=int, default=150)
    parser.add_argument("--texts", type=int, default=40, help="edits whose free texts are judged")
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--figures", metavar="DIR")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.split == "test" and (args.sweep or args.figures):
        parser.error("choices are made on dev: --sweep and --figures take no --split test")
    world = load_world()
    model, tokenizer = errata.load(args.model)
    known = references(world)

    def keep(key: str) -> Callable[[Any], None]:
        def write(found: Any) -> None:
            if args.out:
                results = load_results(args.out)
                results[key] = {"n": args.n, "seed": args.seed, "machine": machine(), "rows": found}
                errata.files.write_atomically(args.out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")

        return write

    if args.figures:
        draw(model, tokenizer, world, known, args)
    elif args.sweep:
        own = cases(model, tokenizer, world, args.n, "dev", args.seed)
        before = load_results(args.out).get("sweep", {})
        rows = before["rows"] if (before.get("n"), before.get("seed")) == (args.n, args.seed) else {}
        sweep(model, tokenizer, own, known, args.seed, keep("sweep"), rows)
    else:
        own = cases(model, tokenizer, world, args.n, args.split, args.seed)
        compare(model, tokenizer, world, own, known, args, keep(args.split))
    return 0


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    sys.exit(main())
