"""Editors that learn, judged on Atlas's dev facts that no training item names; each edit alone, in `probe` wordings.

    errata train mend --model atlas --preset atlas --data atlas
    python benchmarks/learned.py mend --model atlas --preset atlas --n 100

Success: the model says the new object (label) to the prompt; equivalence: to rephrases, what it says to the prompt; retain:
what it said before, to prompts about other facts. Bare shares with 95 % intervals over edits (Wilson).
"""

import argparse
import json
import random
import time
from typing import Any

import torch

import errata
from errata.atlas.kilt import fact_id, fever_records, zsre_records
from errata.atlas.probes import with_probes
from errata.atlas.requests import counterfactual, request_for
from errata.atlas.training import judging_facts
from errata.atlas.world import World, load_world
from errata.bench.intervals import share
from errata.cli.fit import make_editor
from errata.edit import EditRequest
from errata.editors._learned import LearnedEditor
from errata.model.anatomy import anatomy
from errata.model.generate import greedy_answers

Case = tuple[EditRequest, list[str], list[str]]
"""An edit, its rephrases, and prompts that it must leave alone."""


def cases(world: World, model: Any, n: int, seed: int) -> list[Case]:
    """Counterfactual rewrites, claims whose label is turned, or an encoder-decoder's questions, over the judging facts."""
    facts = judging_facts(world)
    rng = random.Random(seed)
    rng.shuffle(facts)
    role = anatomy(model).role
    if role != "decoder":
        half = sum(f.split == "dev" for f in world.facts) // 2  # the other half is what must stay
        made = (fever_records if role == "classifier" else zsre_records)(world, half, split="dev", seed=seed)
        records = {r.id: r for r in made}
        named = [records[fact_id(f)] for f in facts if fact_id(f) in records and records[fact_id(f)].alternatives][:n]
        return [
            (
                EditRequest(prompt=r.input, target_new=r.alternatives[0], target_true=r.prediction),
                list(r.rephrases),
                [u.input for u in r.unrelated],
            )
            for r in named
        ]
    able = [f for f in facts if len(world.objects[f.relation]) > 1][:n]
    requests = with_probes(world, [request_for(world, f, counterfactual(world, f, rng)) for f in able], seed)
    return [(r, list(r.paraphrase_prompts), list(r.neighborhood_prompts)) for r in requests]


def main() -> None:
    """Fit, ask, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method")
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--preset")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--probes", type=int, default=5, help="rephrases and other prompts for each edit")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = errata.load(args.model)
    editor: LearnedEditor[Any] = make_editor(args.method, args.preset, args.settings)
    judged = cases(load_world(), model, args.n, args.seed)
    started = time.perf_counter()
    patch = editor.fit(model, tokenizer, [request for request, _, _ in judged])
    seconds = time.perf_counter() - started
    kept = [prompts[: args.probes] for _, _, prompts in judged]
    texts = [prompt for prompts in kept for prompt in prompts]
    before = iter(greedy_answers(model, tokenizer, texts))
    found: dict[str, list[float]] = {"success": [], "equivalence": [], "retain": []}
    for (request, rephrases, _), others in zip(judged, kept, strict=True):
        asked = [request.text, *rephrases[: args.probes], *others]
        with patch.only(request.id).attach(model, tokenizer):
            said, *rest = greedy_answers(model, tokenizer, asked)
        same, after = rest[: len(rest) - len(others)], rest[len(rest) - len(others) :]
        found["success"].append(float(said == request.target_new))
        if same:
            found["equivalence"].append(sum(answer == said for answer in same) / len(same))
        if others:
            found["retain"].append(sum(answer == next(before) for answer in after) / len(after))
    _, header, _ = editor.trained(model, tokenizer)
    rounds = [entry.get("rounds", 1) for entry in patch.report.values()]
    print(json.dumps({
        "method": args.method, "model": args.model, "name": header["name"], "steps": header["steps"],
        "training_seconds": header["seconds"], **{name: share(values) for name, values in found.items() if values},
        "rounds_mean": round(sum(rounds) / len(rounds), 3), "seconds_a_fit": round(seconds / len(judged), 4),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
