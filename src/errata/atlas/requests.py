"""Edit requests over Atlas: an edit's `fit` phrasings, its probes, counterfactual edits and the shipped updates."""

import random
from typing import Any

from errata.atlas import render
from errata.atlas.world import Fact, Split, World, link
from errata.edit import EditRequest, Implication


def request_for(world: World, fact: Fact, target_new: str, **fields: Any) -> EditRequest:
    """The request that turns `fact` into `target_new`: the relation's `fit` phrasings, questions, implications, `fit` aliases."""
    phrasing = world.phrasings[fact.relation]
    canonical = phrasing.cloze["fit"][0]
    prompts = [render.place("", cloze, fact.subject) for cloze in phrasing.cloze["fit"]]
    questions, frames = phrasing.question["fit"], world.frames["question_frames"]["fit"]
    for i, question in enumerate(questions):
        prompts += [render.ask(frame, question, fact.subject) for frame in frames[i :: len(questions)]]
    subject = render.capital(fact.subject) if canonical.startswith("{}") else fact.subject
    return EditRequest(
        subject=subject,
        relation=fact.relation,
        prompt=canonical,
        target_true=fact.object,
        target_new=target_new,
        fit_prompts=tuple(dict.fromkeys(prompts)),
        fit_implications=(
            *implications(world, fact, target_new),
            *under_other_names(world, fact, target_new, world.aliases_of(fact.subject, "fit")),
        ),
        **fields,
    )


def implications(world: World, fact: Fact, target_new: str) -> tuple[Implication, ...]:
    """What follows from the edit through its new object, in `fit` phrasings, as far as Atlas knows it."""
    return tuple(
        Implication(
            prompt=render.place("", render.hop(world, fact, cloze), ""),
            answer=second.object,
            subject=fact.subject,
            relation=f"{second.relation} of {fact.relation}",
        )
        for second in world.consequences(Fact(fact.subject, fact.relation, target_new))
        for cloze in world.phrasings[second.relation].cloze["fit"][:2]
    )


def under_other_names(world: World, fact: Fact, target_new: str, names: list[str]) -> tuple[Implication, ...]:
    """The new object under other names of the subject, in `fit` phrasings.

    What a model knows of a name it did not learn from the others, and its states differ: each name is a consequence of its own.
    """
    phrasing, frames = world.phrasings[fact.relation], world.frames["question_frames"]["fit"]
    made = []
    for name in names:
        prompts = [render.place("", cloze, name) for cloze in phrasing.cloze["fit"][:6]]
        prompts += [render.ask(frames[0], question, name) for question in phrasing.question["fit"][:2]]
        made += [
            Implication(prompt=prompt, answer=target_new, subject=name, relation=f"{fact.relation} of {name}")
            for prompt in prompts
        ]
    return tuple(made)


def counterfactual(world: World, fact: Fact, rng: random.Random) -> str:
    """Another object that the relation takes, at random."""
    return rng.choice([o for o in world.objects[fact.relation] if link(o) != link(fact.object)])


def counterfactual_requests(world: World, n: int, *, split: Split = "test", seed: int = 0) -> list[EditRequest]:
    """`n` random counterfactual edits over all relations, spread evenly (round-robin over shuffled relations).

    Every (subject, relation) at most once. The order and the objects depend on `seed` only.
    """
    rng = random.Random(seed)
    pools = []
    for relation in sorted(world.by_relation):
        pool = [f for f in world.by_relation[relation] if f.split == split and len(world.objects[relation]) > 1]
        rng.shuffle(pool)
        pools.append(pool)
    rng.shuffle(pools)
    picked: list[Fact] = []
    while len(picked) < n and any(pools):
        for pool in pools:
            if pool and len(picked) < n:
                picked.append(pool.pop())
    return [request_for(world, fact, counterfactual(world, fact, rng)) for fact in picked]


def update_requests(world: World) -> list[EditRequest]:
    """The shipped changes since 2016."""
    return [EditRequest(**row) for row in world.updates]
