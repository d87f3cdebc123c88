"""Claims: sentences about Atlas's facts that are true or false, what `atlas-bert` is trained on and asked.

A claim is a cloze with an object behind it. False ones name another object of the relation, drawn so that no object betrays
itself: as often as it is true of others, evenly over all objects, or a hard one, which the subject leads to in another way (its
largest city for its capital) or which shares a word with the true object.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from errata.atlas import render
from errata.atlas.corpus import Corpus
from errata.atlas.world import OBJECT_TYPE, Fact, World, link

LABELS = ("REFUTES", "SUPPORTS")  # by id, as FEVER calls them

# How false objects are drawn, and how claims are worded.
FALSE = {"frequent": 0.5, "any": 0.2, "hard": 0.3}
WORDED = {"bare": 0.82, "led": 0.08, "alias": 0.10}


@dataclass(frozen=True)
class Claim:
    """A sentence, whether it is true, where its object stands (characters [start, end)), and the object that is true."""

    text: str
    true: bool
    object: tuple[int, int]
    truth: str

    @property
    def label(self) -> str:
        """SUPPORTS or REFUTES."""
        return LABELS[self.true]


def claim(statement: str, value: str, truth: str) -> Claim:
    """A rendered cloze with an object behind it, which is true or not."""
    end = len(statement) + 1 + len(value)
    text = f"{statement} {value}" + ("" if value.endswith(".") else ".")
    return Claim(text, value == truth, (len(statement) + 1, end), truth)


def another_object(world: World, fact: Fact, rng: random.Random) -> str:
    """An object that is false of the fact's subject."""
    while True:
        kind = rng.choices(list(FALSE), list(FALSE.values()))[0]
        if kind == "hard" and (near := hard_objects(world, fact)):
            found = rng.choice(near)
        elif kind == "any":
            found = rng.choice(world.objects[fact.relation])
        else:
            found = rng.choice(world.by_relation[fact.relation]).object
        if not same_name(found, fact.object):
            return found


def hard_objects(world: World, fact: Fact) -> list[str]:
    """False objects near the true one: of the subject's other facts of the same type, and those that share a name with it."""
    kind = OBJECT_TYPE[fact.relation]
    near = [
        f.object
        for f in world.by_subject[link(fact.subject)]
        if f.relation != fact.relation and OBJECT_TYPE[f.relation] == kind
    ]
    words = {word for word in fact.object.split() if word[:1].isupper()}
    near += [o for o in world.objects[fact.relation] if not words.isdisjoint(o.split())]
    return [o for o in dict.fromkeys(near) if not same_name(o, fact.object)]


def claims(corpus: Corpus, seed: int, n: int) -> Iterator[Claim]:
    """`n` claims over all facts in all wordings, half of them true; a pure function of the seed."""
    rng = random.Random(seed)
    for kind in rng.choices(list(WORDED), list(WORDED.values()), k=n):
        alias, fact = rng.choice(corpus.aliased) if kind == "alias" else ("", rng.choice(corpus.world.facts))
        lead_in = rng.choice(corpus.frames["lead_ins"]) if kind == "led" else ""
        statement = render.lead(lead_in, rng.choice(corpus.clozes[fact.relation]), alias or fact.subject)
        true = rng.random() < 0.5
        yield claim(statement, fact.object if true else another_object(corpus.world, fact, rng), fact.object)


def every_claim(world: World, seed: int = 0) -> list[Claim]:
    """Every fact in every `fit` and `probe` cloze, once true and once false."""
    rng, found = random.Random(seed), []
    for fact in world.facts:
        phrasing = world.phrasings[fact.relation]
        for cloze in phrasing.cloze["fit"] + phrasing.cloze["probe"]:
            statement = render.place("", cloze, fact.subject)
            found += [claim(statement, value, fact.object) for value in (fact.object, another_object(world, fact, rng))]
    return found


def same_name(a: str, b: str) -> bool:
    """Whether two names are one, article and case aside."""
    return link(a).casefold() == link(b).casefold()
