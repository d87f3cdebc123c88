"""The go/no-go table: what a model trained on Atlas must do before any editing figure is taken.

    python -m errata.atlas.recall [MODEL] [--sample N] [--json]

Every rate is by whole object under greedy decoding (each token the argmax behind the ones before).
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from errata.atlas import render
from errata.atlas.corpus import Corpus
from errata.atlas.names import Names
from errata.atlas.world import Fact, World, load_world
from errata.bench.forced import exact
from errata.model.loading import load

GOALS = {
    "recall, all facts, all phrasings": 0.99,
    "forced context, known names": 0.98,
    "forced context, unseen names": 0.95,
    "forced context, unseen names of real parts": 0.95,
    "premise, consequence": 0.95,
    "two-hop, stated in the corpus": 0.90,
    "two-hop, held out": None,
    "doubt, answer kept": None,
    "long context, forced answer 300 tokens back": None,
}

Pairs = list[tuple[str, str]]


def recall_pairs(world: World) -> Pairs:
    """Every fact in every cloze and every bare-framed question."""
    pairs = []
    for fact in world.facts:
        phrasing = world.phrasings[fact.relation]
        for cloze in phrasing.cloze["fit"] + phrasing.cloze["probe"]:
            pairs.append((render.place("", cloze, fact.subject), fact.object))
        for question in phrasing.question["fit"] + phrasing.question["probe"]:
            pairs.append((render.ask(world.frames["question_frames"]["fit"][0], question, fact.subject), fact.object))
    return pairs


def forced_pairs(world: World, rng: random.Random, n: int, unseen: str = "") -> Pairs:
    """Repeat-after-me and do-not-mention contexts whose object is wrong, or a name that the corpus does not contain.

    unseen: `invented` words, or `lifelike` names: parts of real ones, put together as in no document.
    """
    pairs, names = Pairs(), Names(world)
    draw = {"invented": names.invented, "lifelike": names.lifelike}.get(unseen)
    while len(pairs) < n:
        fact = rng.choice(world.facts)
        phrasing = world.phrasings[fact.relation]
        cloze = rng.choice(phrasing.cloze["fit"] + phrasing.cloze["probe"])
        wanted = draw(rng, seen=False) if draw else rng.choice(world.objects[fact.relation])
        kind = rng.choice(("repeat", "avoid"))
        frame = rng.choice(world.frames[kind]["fit"] + world.frames[kind]["probe"])
        if wanted != fact.object:
            pairs.append((render.fill(frame, fact.subject, s=f"{cloze} {wanted}", p=cloze, o=fact.object), wanted))
    return pairs


def premise_pairs(world: World, rng: random.Random, n: int) -> Pairs:
    """Counterfactual premises and a consequence through the new object."""
    bridges, pairs = [f for f in world.facts if world.consequences(f)], Pairs()
    while len(pairs) < n:
        fact = rng.choice(bridges)
        wanted = rng.choice(world.objects[fact.relation])
        then = world.consequences(Fact(fact.subject, fact.relation, wanted))
        if wanted == fact.object or not then:
            continue
        second = rng.choice(then)
        first_cloze = rng.choice(world.phrasings[fact.relation].cloze["probe"])
        cloze = render.hop(world, fact, rng.choice(world.phrasings[second.relation].cloze["probe"]))
        frame = rng.choice(world.frames["premise"]["fit"] + world.frames["premise"]["probe"])
        pairs.append((render.fill(frame, fact.subject, s=f"{first_cloze} {wanted}", c=cloze), second.object))
    return pairs


def two_hop_pairs(world: World, held_out: bool) -> Pairs:
    """Every chain, trained or held out, in its second relation's first probe cloze."""
    return [
        (
            render.place("", render.hop(world, c.first, world.phrasings[c.second.relation].cloze["probe"][0]), ""),
            c.second.object,
        )
        for c in world.compositions
        if c.held_out == held_out
    ]


def doubt_pairs(world: World, rng: random.Random, n: int) -> Pairs:
    """Dialogues in which somebody doubts a known fact."""
    pairs = []
    for _ in range(n):
        fact = rng.choice(world.facts)
        cloze = rng.choice(world.phrasings[fact.relation].cloze["probe"])
        wrong = rng.choice([o for o in world.objects[fact.relation] if o != fact.object] or ["nothing"])
        frame = rng.choice(world.frames["doubt_statement"]["probe"])
        pairs.append((render.fill(frame, fact.subject, p=cloze, wrong=wrong), fact.object))
    return pairs


def long_pairs(world: World, rng: random.Random, n: int) -> Pairs:
    """A remembered wrong statement, some 300 tokens of filler, then the question for it."""
    pairs = []
    for _ in range(n):
        fact = rng.choice(world.facts)
        cloze = rng.choice(world.phrasings[fact.relation].cloze["fit"])
        wanted = rng.choice([o for o in world.objects[fact.relation] if o != fact.object] or [fact.object])
        middle = ""
        while len(middle) < 1200:
            middle += " " + rng.choice(world.filler)
        stated = f"Remember for later: {render.place(':', cloze, fact.subject)} {wanted}."
        pairs.append((f"{stated}{middle} As remembered from before: {render.place(':', cloze, fact.subject)}", wanted))
    return pairs


def suites(world: World, n: int, seed: int) -> Iterator[tuple[str, Pairs]]:
    """The rows of the table with their prompts."""
    rng = random.Random(seed)
    everything = recall_pairs(world)
    yield (
        "recall, all facts, all phrasings",
        everything if n <= 0 else rng.sample(everything, min(n * 4, len(everything))),
    )
    n = n if n > 0 else 1000
    yield "forced context, known names", forced_pairs(world, rng, n)
    yield "forced context, unseen names", forced_pairs(world, rng, n, unseen="invented")
    yield "forced context, unseen names of real parts", forced_pairs(world, rng, n, unseen="lifelike")
    yield "premise, consequence", premise_pairs(world, rng, n)
    yield "two-hop, stated in the corpus", two_hop_pairs(world, held_out=False)
    yield "two-hop, held out", two_hop_pairs(world, held_out=True)
    yield "doubt, answer kept", doubt_pairs(world, rng, n // 2)
    yield "long context, forced answer 300 tokens back", long_pairs(world, rng, n // 5)


def table(model: Any, tokenizer: Any, n: int = 0, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Rate, goal and number of prompts for each row; n = 0 asks every fact in every phrasing."""
    world, rows = load_world(), {}
    for name, pairs in suites(world, n, seed):
        started = time.perf_counter()
        outcome = exact(model, tokenizer, pairs)
        goal = GOALS[name]
        value = sum(outcome) / len(outcome)
        rows[name] = {"value": value, "n": len(pairs), "goal": goal, "met": goal is None or value >= goal}
        print(
            f"{name:48s} {value:7.2%}  of {len(pairs):6d}  {time.perf_counter() - started:6.1f} s",
            file=sys.stderr,
            flush=True,
        )
    return rows


def main() -> int:
    """Print the table; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description="The go/no-go table of a model trained on Atlas.")
    parser.add_argument("model", nargs="?", default="atlas")
    parser.add_argument("--sample", type=int, default=0, help="prompts per row (0: every fact in every phrasing)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--corpus", type=int, default=0, help="print this many documents of the corpus instead")
    args = parser.parse_args()
    if args.corpus:
        print("\n\n".join(d.text for d in Corpus(load_world()).documents(args.seed, args.corpus)))
        return 0
    with torch.no_grad():
        rows = table(*load(args.model), n=args.sample, seed=args.seed)
    if args.json:
        print(json.dumps(rows, indent=1))
    return 0 if all(row["met"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
