"""How wide should an edit's scope be? Radii on 300 `dev` edits, all loaded at once, where every choice is made.

    errata calibrate --model atlas --out scope.safetensors --json > calibration.json
    python benchmarks/scope.py calibration.json [--rates 0.003 0.005 0.01] [--gate scope.safetensors]

For each false-positive rate: the radius that `calibrate` gives it, and what the edits then do on `probe` wordings of `dev`
facts. The rate with the best specificity that keeps generalization is the one to calibrate with.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import errata
from errata.atlas.probes import unrelated_texts, with_probes
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import load_world
from errata.bench.verify import verify


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration", type=Path, nargs="?", help="what `errata calibrate --json` printed")
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--gate", default="auto", help="the gate file that belongs to it (default: the model's own)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.005, 0.01])
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world = load_world()
    model, tokenizer = errata.load(args.model)
    requests = with_probes(world, counterfactual_requests(world, args.n, split="dev", seed=args.seed), seed=args.seed)
    patch = errata.SAKE(gate=args.gate).fit(model, tokenizer, requests, seed=args.seed)
    radii = {"as fitted": patch.steering[0].radius}
    if args.calibration:
        known = json.loads(args.calibration.read_text())["chosen"]["radius_at_false_positive_rate"]
        radii |= {f"{rate:.2%}": known[str(rate)] for rate in args.rates}
    table = Table(
        "false-positive rate", "radius", "efficacy", "generalization", "specificity", title=f"{args.n} dev edits"
    )
    texts = unrelated_texts(world, 50, seed=args.seed + 1)
    for name, radius in radii.items():
        wider = replace(patch, parts=tuple(replace(part, radius=radius) for part in patch.steering))
        found = verify(model, tokenizer, wider, texts, requests=requests)
        values = {metric: found[metric]["value"] for metric in ("efficacy", "generalization", "specificity")}
        table.add_row(name, f"{radius:.4f}", *(f"{value:.2%}" for value in values.values()))
        print(json.dumps({"rate": name, "radius": radius} | values), flush=True)
    Console(stderr=True).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
