"""Flexibility on Atlas: dev edits taken back by the inverse edit and by detaching.

    python benchmarks/flexibility.py [--method rome memit] [--n 10 50] [--unrelated 200] [--seed 0] [--out FILE]

For each method and number of edits at once: counterfactual edits of dev facts that the model knows, in the model together.
Runs of fewer edits are prefixes of the longer ones. Figures: `errata.bench.flexibility`.
"""

import argparse
import json
import platform
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import errata
from errata.atlas.probes import unrelated_texts, with_probes
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import load_world
from errata.bench.flexibility import flexibility
from errata.bench.verify import environment
from errata.files import write_atomically
from errata.model.generate import greedy, says

PARAPHRASES = 4
STATES = ("edited", "inverse", "detached")


def known_requests(model: Any, tokenizer: Any, n: int, seed: int) -> list[errata.EditRequest]:
    """`n` edits of dev facts that the model states on the edit prompt."""
    world = load_world()
    asked = counterfactual_requests(world, 3 * n, split="dev", seed=seed)
    texts = greedy(model, tokenizer, [r.text for r in asked])
    known = [r for r, text in zip(asked, texts, strict=True) if says(text, r.target_true or "")]
    probed = with_probes(world, known[:n], seed)
    return [r.model_copy(update={"paraphrase_prompts": r.paraphrase_prompts[:PARAPHRASES]}) for r in probed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", default=["rome", "memit"])
    parser.add_argument("--n", nargs="+", type=int, default=[10, 50])
    parser.add_argument("--unrelated", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", help="write all figures as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = errata.load("atlas")
    requests = known_requests(model, tokenizer, max(args.n), args.seed)
    texts = unrelated_texts(load_world(), args.unrelated, args.seed)
    made = Table("method", "edits", "state", "old answers", "paraphrased", "facts changed", "KL, nats", "logits moved")
    runs = []
    for method in args.method:
        for n in args.n:
            began = time.perf_counter()
            editor = errata.get_editor(method).preset("atlas")
            found = flexibility(model, tokenizer, editor, requests[:n], texts, seed=args.seed)
            runs.append(found | {"seconds": round(time.perf_counter() - began, 1)})
            for state in STATES:
                f = found[state]
                shares = ("old_answers.generate", "old_answers_paraphrased.generate", "facts_changed.generate")
                cells = [f"{f[name]['value']:.1%}" for name in shares]
                made.add_row(method, str(n), state, *cells, f"{f['kl.prob']:.4f}", f"{f['distance.logits']:.4f}")
    Console(width=140).print(made)
    about = environment(model) | {"machine": platform.machine(), "split": "dev", "seed": args.seed}
    if args.out:
        write_atomically(args.out, json.dumps(about | {"runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
