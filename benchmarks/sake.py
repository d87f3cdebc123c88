"""SAKE on Atlas: the figures of the README.

    python benchmarks/sake.py [--model atlas] [--n 300] [--split test] [--sealed] [--map uniform] [--out results.json]

Counterfactual edits over all relations, fitted one by one and all loaded at once, judged by whole objects under greedy
decoding: on the edit prompt, on `probe` phrasings, on hard negatives, on 2,000 unrelated texts (bits), and on what follows
from the edits; then the shipped updates in the same way. `--sealed` judges by the sealed set as well.
"""

import argparse
import json
import os
import platform
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import errata
import errata.files
from errata.atlas.probes import consequence_prompts, fact_of, unrelated_texts, with_probes
from errata.atlas.requests import counterfactual_requests, update_requests
from errata.atlas.world import load_world
from errata.bench.metrics import by_case, rate
from errata.bench.verify import verify
from errata.model.generate import greedy, says


def consequences(model: Any, tokenizer: Any, patch: errata.Patch) -> dict[str, Any] | None:
    """Share of what follows from the edits through their new objects that the edited model says, probe phrasings."""
    world = load_world()
    asked = []
    for request in patch.requests:
        fact = fact_of(world, request)
        if fact:
            asked += [(request.id, *pair) for pair in consequence_prompts(world, fact, request.target_new)]
    if not asked:
        return None
    prompts = [prompt for _, prompt, _ in asked]
    before = greedy(model, tokenizer, prompts)
    with patch.attach(model, tokenizer):
        after = greedy(model, tokenizer, prompts)
    good = [says(text, answer) for text, (*_, answer) in zip(after, asked, strict=True)]
    changed = [not says(text, answer) for text, (*_, answer) in zip(before, asked, strict=True)]
    cases = [case for case, *_ in asked]
    figure = rate(
        by_case(cases, good).values(), "portability.generate: consequence through the new object, whole object, greedy"
    )
    moved = [(c, g) for c, g, m in zip(cases, good, changed, strict=True) if m]
    hard = rate(
        by_case((c for c, _ in moved), (g for _, g in moved)).values(),
        "the same, on consequences that the unedited model does not say",
    )
    return {"all": figure.json() if figure else None, "changed": hard.json() if hard else None, "n_probes": len(asked)}


def recalled(model: Any, tokenizer: Any, requests: list[errata.EditRequest]) -> dict[str, Any] | None:
    """Share of the paraphrases to which the unedited model gives the old object: what generalization builds on."""
    asked = [(r.id, prompt, r.target_true or "") for r in requests for prompt in r.paraphrase_prompts]
    texts = greedy(model, tokenizer, [prompt for _, prompt, _ in asked])
    good = [says(text, old) for text, (*_, old) in zip(texts, asked, strict=True)]
    figure = rate(
        by_case((c for c, *_ in asked), good).values(), "the unedited model's recall of the old object, greedy"
    )
    return figure.json() if figure else None


def run(
    model: Any, tokenizer: Any, requests: list[errata.EditRequest], args: argparse.Namespace, n_unrelated: int
) -> dict[str, dict[str, Any]]:
    """Fit all, load all, judge all: by the probe phrasings, and by the sealed set if wanted."""
    world = load_world()
    errata.SAKE(map=args.map).fit(model, tokenizer, requests[:1], seed=args.seed)  # the first call is slower
    started = time.perf_counter()
    patch = errata.SAKE(map=args.map).fit(model, tokenizer, requests, seed=args.seed)
    seconds = (time.perf_counter() - started) / len(requests)
    fit = {
        "seconds_fit_per_edit": round(seconds, 3),
        "bytes_per_edit": patch.nbytes // len(patch),
        "unconverged": sum(not r.get("converged", True) for r in patch.report.values()),
        "consequences": consequences(model, tokenizer, patch),
    }
    results = {}
    for sealed in (False, True) if args.sealed else (False,):
        probed = with_probes(world, patch.requests, seed=args.seed, sealed=sealed)
        texts = unrelated_texts(world, n_unrelated, seed=args.seed + 1, sealed=sealed)
        judged = verify(model, tokenizer, patch, texts, requests=probed) | fit
        judged["unedited_recall"] = recalled(model, tokenizer, probed)
        if sealed:
            judged["failures"] = len(judged["failures"])  # a sealed set's texts stay sealed
        results["sealed" if sealed else "probe"] = judged
    return results


def show(name: str, result: dict[str, Any]) -> None:
    """One table for the reader."""
    table = Table("metric", "value", "95 % interval", "n", title=name)
    rows = {k: result[k] for k in ("efficacy", "generalization", "specificity", "locality")}
    if result["unedited_recall"]:
        rows["paraphrases recalled, unedited"] = result["unedited_recall"]
    if result["consequences"]:
        rows |= {
            "consequences": result["consequences"]["all"],
            "consequences that change": result["consequences"]["changed"],
        }
    for key, figure in rows.items():
        if figure and figure["value"] is not None:
            table.add_row(
                key, f"{figure['value']:.2%}", f"{figure['low']:.2%} to {figure['high']:.2%}", str(figure["n"])
            )
    console = Console(stderr=True)
    console.print(table)
    figures = {k: result[k] for k in ("seconds_fit_per_edit", "bytes_per_edit", "restored", "unconverged")}
    console.print(", ".join(f"{k}: {v}" for k, v in figures.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unrelated", type=int, default=2000)
    parser.add_argument("--sealed", action="store_true")
    parser.add_argument("--updates", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--map", default="transport", choices=("transport", "uniform"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    world = load_world()
    model, tokenizer = errata.load(args.model)
    jobs: dict[str, tuple[list[errata.EditRequest], int]] = {}
    if args.n:
        edits = counterfactual_requests(world, args.n, split=args.split, seed=args.seed)
        jobs["counterfactual"] = (edits, args.unrelated)
    if args.updates:
        jobs["updates"] = (update_requests(world), 200)
    results: dict[str, Any] = {}
    for name, (requests, n_unrelated) in jobs.items():
        results[name] = run(model, tokenizer, requests, args, n_unrelated)
        for judge, figures in results[name].items():
            show(f"{figures['n_edits']} {name} edits, judged by the {judge} set", figures)
    results["machine"] = {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
    }
    text = json.dumps(results, indent=1, ensure_ascii=False)
    if args.out:
        errata.files.write_atomically(args.out, text + "\n")
    if args.json:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
