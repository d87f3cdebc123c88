"""The go/no-go table: what a model trained on Atlas must do before any editing figure is taken.

    python -m errata.atlas.recall [MODEL] [--sample N] [--json]

Every rate is by whole object under greedy decoding (each token the argmax behind the ones before); of a classifier, by label.
The rows are those of the model's kind: `atlas` follows contexts, `atlas-t5` answers, `atlas-bert` judges claims, and the
docket's classifier is to know its early years and to err on the late ones.
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
from errata.atlas.asking import every_prompt, prompts
from errata.atlas.claims import LABELS, claims, every_claim
from errata.atlas.corpus import Corpus
from errata.atlas.docket import edit_stream, upstream
from errata.atlas.names import Names
from errata.atlas.world import Fact, World, load_world
from errata.bench.forced import exact
from errata.model.anatomy import anatomy
from errata.model.labels import label_names
from errata.model.loading import load
from errata.model.targets import all_said

GOALS: dict[str, float | tuple[float, float] | None] = {
    "recall, all facts, all phrasings": 0.99,
    "forced context, known names": 0.98,
    "forced context, unseen names": 0.95,
    "forced context, unseen names of real parts": 0.95,
    "premise, consequence": 0.95,
    "two-hop, stated in the corpus": 0.90,
    "two-hop, held out": None,
    "doubt, answer kept": None,
    "long context, forced answer 300 tokens back": None,
    "answers, all facts, all clozes and questions": 0.98,
    "answers, led, framed, under other names": 0.98,
    "claims, true, all facts, all clozes": 0.98,
    "claims, false, all facts, all clozes": 0.98,
    "claims, led, under other names": 0.98,
    "docket, early years": 0.95,
    "docket, late years": (0.4, 0.8),  # fixed before any editor ran
}

UNSEEN_SEED = 4_000_000_000  # beyond the seed of any shard

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


def answering_suites(world: World, n: int, seed: int) -> Iterator[tuple[str, Pairs]]:
    """The rows for `atlas-t5`."""
    yield "answers, all facts, all clozes and questions", _some(every_prompt(world), n * 4, seed)
    drawn = list(prompts(Corpus(world), UNSEEN_SEED + seed, 4 * (n or 1000)))
    yield "answers, led, framed, under other names", drawn


def claim_suites(world: World, n: int, seed: int) -> Iterator[tuple[str, Pairs]]:
    """The rows for `atlas-bert`."""
    found = every_claim(world, seed)
    for true in (True, False):
        pairs = [(c.text, c.label) for c in found if c.true is true]
        yield f"claims, {str(true).lower()}, all facts, all clozes", _some(pairs, n * 2, seed)
    drawn = claims(Corpus(world), UNSEEN_SEED + seed, 4 * (n or 1000))
    yield "claims, led, under other names", [(c.text, c.label) for c in drawn]


def docket_suites(n: int, seed: int) -> Iterator[tuple[str, Pairs]]:
    """The rows for the docket's classifier."""
    yield "docket, early years", [(c.text, c.area) for c in upstream(n or 2000, seed=seed)]
    yield "docket, late years", [(c.text, c.area) for c in edit_stream(n or 2000, seed=seed)]


def suites_for(model: Any, world: World, n: int, seed: int) -> Iterator[tuple[str, Pairs]]:
    """The rows for a model of this kind."""
    role = anatomy(model).role
    if role == "classifier":
        return claim_suites(world, n, seed) if label_names(model) == list(LABELS) else docket_suites(n, seed)
    return answering_suites(world, n, seed) if role == "encoder-decoder" else suites(world, n, seed)


def _some(pairs: Pairs, n: int, seed: int) -> Pairs:
    return random.Random(seed).sample(pairs, min(n, len(pairs))) if n > 0 else pairs


def _met(value: float, goal: float | tuple[float, float] | None) -> bool:
    if isinstance(goal, tuple):
        return goal[0] <= value <= goal[1]
    return goal is None or value >= goal


def table(model: Any, tokenizer: Any, n: int = 0, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Rate, goal and number of prompts for each row; n = 0 asks every fact in every phrasing."""
    world, rows = load_world(), {}
    judge = exact if anatomy(model).role == "decoder" else all_said
    for name, pairs in suites_for(model, world, n, seed):
        started = time.perf_counter()
        outcome = judge(model, tokenizer, pairs)
        goal = GOALS[name]
        value = sum(outcome) / len(outcome)
        rows[name] = {"value": value, "n": len(pairs), "goal": goal, "met": _met(value, goal)}
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
