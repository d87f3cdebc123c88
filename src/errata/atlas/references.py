"""Atlas's facts as reference triples, for editors that ask where a model keeps an object (STEAM)."""

import random
from collections.abc import Container

from errata.atlas import render
from errata.atlas.world import Fact, World
from errata.locate.anchors import Reference

WORDINGS = 4


def references(
    world: World, *, mark: str = "fit", wordings: int = WORDINGS, without: Container[Fact] = (), seed: int = 0
) -> list[Reference]:
    """Every fact of Atlas, `wordings` clozes of it each: the first of its relation, others at random.

    mark: `fit` for what an edit may be fitted with, `probe` for what only judges. without: facts to leave out.
    """
    found = []
    for fact in world.facts:
        if fact in without:
            continue
        rng = random.Random("|".join((str(seed), mark, fact.subject, fact.relation)))
        first, *others = world.phrasings[fact.relation].cloze[mark]
        for cloze in [first, *rng.sample(others, min(len(others), wordings - 1))]:
            prompt = render.place("", cloze, fact.subject)
            subject = fact.subject if fact.subject in prompt else render.capital(fact.subject)
            found.append(Reference(subject, fact.relation, fact.object, prompt))
    return found
