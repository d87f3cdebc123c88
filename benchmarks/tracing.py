"""Causal tracing in batches against the loop over cells: wall time, FLOPs and peak memory, on the same facts.

    python benchmarks/tracing.py [--model atlas] [--facts FILE] [--n 5] [--kind hidden mlp attention] [--json]

The loop is the published procedure: for every (token, layer) cell one pass over the clean prompt and its S corrupted
copies, all layers. The batched trace runs the cells of a layer together, from the first layer that they change. Each runs in a
process of its own, once for wall time and once under PyTorch's FLOP counter; their effects are compared.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import errata
from errata.cli.trace import atlas_facts
from errata.locate.facts import KnownFact, read_facts
from errata.locate.noise import Noise, noise_for
from errata.locate.tracing import TracingConfig, scaled_window, trace, window_of
from errata.model.anatomy import anatomy
from errata.model.hooks import intervene
from errata.model.states import evaluating
from errata.model.tokens import subject_tokens, token_ids

MEBIBYTE = 2**20


def batched(model: Any, tokenizer: Any, fact: KnownFact, noise: Noise, config: TracingConfig) -> Tensor:
    """(T, L) restored probabilities."""
    return trace(model, tokenizer, fact, noise, config).restored


def by_cells(model: Any, tokenizer: Any, fact: KnownFact, noise: Noise, config: TracingConfig) -> Tensor:
    """(T, L) restored probabilities, one cell and one full pass at a time."""
    parts = anatomy(model)
    first, last = subject_tokens(tokenizer, fact.prompt, fact.subject)
    [row] = token_ids(tokenizer, [fact.prompt])
    ids = torch.tensor([row] * (1 + config.samples))
    width = config.window or scaled_window(parts.n_layers)
    paths = parts.mlp_out if config.kind == "mlp" else parts.attention

    def corrupt(states: Tensor) -> Tensor:
        drawn = noise.draw((config.samples, last + 1 - first, states.shape[-1]), config.seed)
        states = states.clone()
        states[1:, first : last + 1] += torch.from_numpy(drawn).to(states)
        return states

    def restoring(token: int) -> Callable[[Tensor], Tensor]:
        def change(states: Tensor) -> Tensor:
            states = states.clone()
            states[1:, token] = states[0, token]
            return states

        return change

    def probabilities(changes: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        with torch.no_grad(), intervene(model, {parts.embed: corrupt, **changes}):
            logits: Tensor = model(ids, use_cache=False).logits
            return logits[:, -1].softmax(-1).double()

    answer = int(probabilities({})[0].argmax())
    found = torch.empty(len(row), parts.n_layers, dtype=torch.float64)
    with evaluating(model):
        for token in range(len(row)):
            for layer in range(parts.n_layers):
                at = [parts.blocks[layer]]
                if config.kind != "hidden":
                    at = [paths[i] for i in window_of(layer, width, parts.n_layers)]
                found[token, layer] = probabilities(dict.fromkeys(at, restoring(token)))[1:, answer].mean()
    return found


WAYS = {"batched": batched, "loop": by_cells}


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds, FLOPs, peak memory and the effects of one way, in this process."""
    model, tokenizer = errata.load(args.model, dtype=args.dtype)
    facts = read_facts(args.facts)[: args.n] if args.facts else atlas_facts(args.model, args.n, seed=1)
    noise = noise_for(model, tokenizer, "s3", subjects=[fact.subject for fact in facts])
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds = {}
    for kind in args.kind:
        config = TracingConfig(kind=kind, samples=args.samples)
        WAYS[way](model, tokenizer, facts[0], noise, config)  # warm
        started = time.perf_counter()
        found = [WAYS[way](model, tokenizer, fact, noise, config) for fact in facts]
        seconds = time.perf_counter() - started
        with FlopCounterMode(display=False) as counter:
            WAYS[way](model, tokenizer, facts[0], noise, config)
        kinds[kind] = {
            "seconds_per_fact": seconds / len(facts),
            "gflops_first_fact": counter.get_total_flops() / 1e9,
            "restored": [t.tolist() for t in found],
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cells = [len(token_ids(tokenizer, [fact.prompt])[0]) * anatomy(model).n_layers for fact in facts]
    return {"kinds": kinds, "mebibytes": (peak - loaded) * 1024 / MEBIBYTE, "cells_per_fact": sum(cells) / len(cells)}


def in_a_process_of_its_own(way: str, argv: list[str]) -> dict[str, Any]:
    """`measure`, where no other way has touched memory."""
    done = subprocess.run([sys.executable, __file__, *argv, "--only", way], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--facts", help="JSONL of {prompt, subject}; Atlas's dev facts by default")
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--kind", nargs="+", default=["hidden", "mlp", "attention"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return 0
    argv = [a for a in sys.argv[1:] if a != "--json"]
    ways = {way: in_a_process_of_its_own(way, argv) for way in WAYS}
    rows = []
    for kind in args.kind:
        fast, slow = (ways[way]["kinds"][kind] for way in WAYS)
        pairs = zip(fast["restored"], slow["restored"], strict=True)
        rows.append(
            {
                "kind": kind,
                "seconds": {way: ways[way]["kinds"][kind]["seconds_per_fact"] for way in WAYS},
                "gflops": {way: ways[way]["kinds"][kind]["gflops_first_fact"] for way in WAYS},
                "speedup": slow["seconds_per_fact"] / fast["seconds_per_fact"],
                "fewer_flops": slow["gflops_first_fact"] / fast["gflops_first_fact"],
                "largest_difference": max(
                    float((torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)).abs().max())
                    for a, b in pairs
                ),
            }
        )
    memory = {way: ways[way]["mebibytes"] for way in WAYS}
    cells = ways["batched"]["cells_per_fact"]
    title = (
        f"{args.model}, {args.dtype}, {args.n} facts of {cells:.0f} cells, {torch.get_num_threads()} threads; per fact"
    )
    made = Table(
        "restored", "batched", "loop", "faster", "batched GFLOP", "loop GFLOP", "fewer", "differ by", title=title
    )
    for r in rows:
        seconds, flops = r["seconds"], r["gflops"]
        made.add_row(
            r["kind"],
            *(f"{seconds[way]:.3f} s" for way in WAYS),
            f"{r['speedup']:.1f}x",
            *(f"{flops[way]:.2f}" for way in WAYS),
            f"{r['fewer_flops']:.1f}x",
            f"{r['largest_difference']:.1e}",
        )
    Console(stderr=True, width=140).print(made)
    Console(stderr=True).print(
        f"peak memory above the loaded model: {memory['batched']:.0f} and {memory['loop']:.0f} MiB"
    )
    if args.json:
        about = {"model": args.model, "dtype": args.dtype, "n": args.n, "samples": args.samples}
        about |= {"threads": torch.get_num_threads(), "cells_per_fact": cells, "mebibytes": memory}
        print(json.dumps(about | {"rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
