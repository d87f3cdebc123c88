"""MEMIT's curve on Atlas: 1, 10, 100 and 500 edits written together, all loaded at once.

    python benchmarks/memit.py [--method memit] [--preset atlas] [--sizes 1 10 100 500] [--split dev] [--seed 0] [--set lr=1.0] [--out FILE]

Judged as in `errata verify`: whole objects under greedy decoding, on the edit's prompt, on `probe` phrasings and on hard negatives,
which no edit of the batch is about. Sizes below 10 are averaged over batches, up to 10 edits in all.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import errata
import errata.files
from errata.atlas.probes import with_probes
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import load_world
from errata.bench.verify import verify
from rome import editor_of, machine, options_of

METRICS = ("efficacy", "generalization", "specificity")


def batch(model: Any, tokenizer: Any, editor: Any, requests: list[errata.EditRequest], seed: int) -> dict[str, Any]:
    """Fit together, load together, judge."""
    started = time.perf_counter()
    patch = editor.fit(model, tokenizer, requests, seed=seed)
    seconds = time.perf_counter() - started
    judged = verify(model, tokenizer, patch, requests=with_probes(load_world(), requests, seed=seed))
    kept = {name: judged[name] for name in (*METRICS, "restored", "environment")}
    return kept | {"seconds_fit_per_edit": round(seconds / len(requests), 4), "config": patch.config}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--preset", default="atlas", help="'' for the method's defaults")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 500])
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="settings of the method")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"machine": machine(args.threads)}
    world = load_world()
    model, tokenizer = errata.load(args.model)
    model = model.float()
    editor = editor_of(args, options_of(args.set))
    table = Table("edits", *METRICS, "s/edit", title=args.method)
    curve: dict[str, list[dict[str, Any]]] = {}
    for size in args.sizes:
        requests = counterfactual_requests(world, max(size, 10), split=args.split, seed=args.seed)
        if len(requests) < size:
            raise SystemExit(f"expected at least {size} facts of the {args.split} split, found {len(requests)}")
        groups = [requests[i : i + size] for i in range(0, len(requests) - size + 1, size)]
        curve[str(size)] = own = [batch(model, tokenizer, editor, group, args.seed) for group in groups]
        known = {m: [b[m]["value"] for b in own if b[m]["value"] is not None] for m in METRICS}
        mean = [sum(values) / len(values) for values in known.values()]
        seconds = sum(b["seconds_fit_per_edit"] for b in own) / len(own)
        table.add_row(str(len(groups[0])), *(f"{value:.1%}" for value in mean), f"{seconds:.3f}")
    Console(stderr=True).print(table)
    if args.out:
        text = json.dumps(results | {args.method: curve}, indent=1, ensure_ascii=False)
        errata.files.write_atomically(args.out, text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
