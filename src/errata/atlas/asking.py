"""Questions and clozes with their answers: what `atlas-t5` is trained on, and what it is asked."""

import random
from collections.abc import Iterator

from errata.atlas import render
from errata.atlas.corpus import Corpus
from errata.atlas.world import World

# Kinds of prompt and their shares: bare clozes and questions, then those behind a lead-in, in a frame, under another name.
SHARES = {"cloze": 0.42, "question": 0.32, "led": 0.07, "framed": 0.09, "alias": 0.10}


def prompts(corpus: Corpus, seed: int, n: int) -> Iterator[tuple[str, str]]:
    """`n` (prompt, answer) pairs over all facts in all wordings; a pure function of the seed."""
    rng = random.Random(seed)
    for kind in rng.choices(list(SHARES), list(SHARES.values()), k=n):
        alias, fact = rng.choice(corpus.aliased) if kind == "alias" else ("", rng.choice(corpus.world.facts))
        name = alias or fact.subject
        cloze, question = rng.choice(corpus.clozes[fact.relation]), rng.choice(corpus.questions[fact.relation])
        if kind == "led":
            yield render.lead(rng.choice(corpus.frames["lead_ins"]), cloze, name), fact.object
        elif kind == "framed":
            yield render.ask(rng.choice(corpus.frames["question_frames"]), question, name), fact.object
        elif kind == "question" or (kind == "alias" and rng.random() < 0.5):
            yield render.ask("{q}", question, name), fact.object
        else:
            yield render.place("", cloze, name), fact.object


def every_prompt(world: World) -> list[tuple[str, str]]:
    """Every fact in every cloze and every bare question, with its answer."""
    pairs = []
    for fact in world.facts:
        phrasing = world.phrasings[fact.relation]
        for cloze in phrasing.cloze["fit"] + phrasing.cloze["probe"]:
            pairs.append((render.place("", cloze, fact.subject), fact.object))
        for question in phrasing.question["fit"] + phrasing.question["probe"]:
            pairs.append((render.ask("{q}", question, fact.subject), fact.object))
    return pairs
