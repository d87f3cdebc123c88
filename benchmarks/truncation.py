"""How small can a SAKE edit be? The smallest truncated, half-precision maps at which no Atlas answer changes.

    python benchmarks/truncation.py [--n 60] [--split dev] [--tolerances 0 0.02 0.1 0.4 0.6 0.8]

Edits are fitted once with exact maps in single precision; then each map is truncated (directions ranked by their effect on
real states) and stored in half precision, and every probe is asked again: the edit prompts, the probe phrasings and the
hard negatives. A form counts as lossless if no greedy answer differs from the exact one's.
"""

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import errata
from errata.atlas.probes import with_probes
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import load_world
from errata.bench.probes import probes_of
from errata.model.generate import greedy_answers


def measure(model: Any, tokenizer: Any, patch: errata.Patch, probes: list[Any]) -> list[str]:
    """Every probe's answer under the patch."""
    with patch.attach(model, tokenizer):
        return greedy_answers(model, tokenizer, [q.probe.prompt for q in probes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.0, 0.02, 0.1, 0.4, 0.6, 0.8])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, tokenizer = errata.load(args.model)
    world = load_world()
    requests = counterfactual_requests(world, args.n, split=args.split, seed=args.seed)
    exact = errata.SAKE(tolerance=0.0, half=False).fit(model, tokenizer, requests, seed=args.seed)
    probes = list(probes_of(with_probes(world, exact.requests, seed=args.seed)))
    wanted = measure(model, tokenizer, exact, probes)
    gates = {
        p.gate.digest: sum(t.numel() * t.element_size() for t in p.gate.tensors().values()) for p in exact.steering
    }
    rows = []
    for tolerance in args.tolerances:
        fitted = errata.SAKE(tolerance=tolerance, half=True).fit(model, tokenizer, requests, seed=args.seed)
        got = measure(model, tokenizer, fitted, probes)
        ranks = [step.rank for part in fitted.steering for step in part.maps]
        rows.append(
            {
                "tolerance": tolerance,
                "mean_rank": sum(ranks) / len(ranks),
                "bytes_per_edit": (fitted.nbytes - sum(gates.values())) // len(fitted),
                "exact_bytes_per_edit": (exact.nbytes - sum(gates.values())) // len(exact),
                "changed": sum(a != b for a, b in zip(wanted, got, strict=True)),
                "n_probes": len(probes),
            }
        )
    table = Table(
        "tolerance",
        "mean rank",
        "bytes per edit",
        "answers changed",
        title=f"{args.n} edits, exact: {rows[0]['exact_bytes_per_edit']} bytes per edit",
    )
    for row in rows:
        table.add_row(
            f"{row['tolerance']}",
            f"{row['mean_rank']:.1f}",
            str(row["bytes_per_edit"]),
            f"{row['changed']} of {row['n_probes']}",
        )
    Console(stderr=True).print(table)
    if args.json:
        print(
            json.dumps(
                {"model": args.model, "threads": torch.get_num_threads(), "split": args.split, "rows": rows}, indent=1
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
