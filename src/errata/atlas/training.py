"""What editors that learn are trained on in Atlas: rewrites of dev facts, in `fit` wordings only.

    atlas         counterfactual rewrites as clozes (what "-cf" editors are trained on)
    atlas-zsre    rewrites as questions, in other wordings and frames, as De Cao et al. 2021 train on zsRE
    atlas-fever   claims whose label is turned, as they train on FEVER
    atlas-docket  cases of the early years whose area becomes another, as late cases ask of GRACE's SCOTUS

The new object is drawn among the relation's others; what must stay are other facts of the subject, the relation's of other
subjects, and any. A tenth of the dev subjects is in no item: what choices are made by (`judging_facts`). Of cases, those of dev topics
are used, and what must stay are cases of other topics, of the area and of any.
"""

import random
from collections.abc import Sequence

from errata.atlas import render
from errata.atlas.claims import LABELS, another_object, claim
from errata.atlas.docket import EARLY, load_docket
from errata.atlas.requests import counterfactual
from errata.atlas.world import Fact, Split, World, link, share
from errata.errors import ConfigError
from errata.training import TrainingItem

SETS = ("atlas", "atlas-zsre", "atlas-fever", "atlas-docket")
CASES = 600  # of the docket
BESIDE = (2, 3, 3)  # facts that must stay: of the subject, of the relation, of any
REPHRASES = 8
JUDGING = 0.1  # of the subjects


def training_items(
    world: World, name: str, n: int = 0, *, split: Split = "dev", drawn: int = 3, seed: int = 0, bare: bool = True
) -> list[TrainingItem]:
    """Items over the facts of a split (0 for all of them, else `n` facts), `drawn` for each with objects and claims of their own;
    of the docket over `n` cases (0 for CASES), each with `drawn` other areas.

    name: one of SETS; bare: whether questions may stand alone, as a model that answers is asked, or only in frames that an
    answer completes, as a decoder is. Raises ConfigError for another. Which facts come depends on the split, `n` and the seed only.
    """
    if name not in SETS:
        raise ConfigError(f"expected one of {', '.join(SETS)}, found {name!r}")
    if name == "atlas-docket":
        return _docket(n or CASES, split, drawn, seed)
    maker = _Maker(world, split, random.Random(f"{name}|{split}|{seed}"), bare)
    facts = [f for f in maker.facts if len(world.objects[f.relation]) > 1]
    make = {"atlas": maker.cloze, "atlas-zsre": maker.question, "atlas-fever": maker.claim}[name]
    return [make(fact) for fact in facts[: n or None] for _ in range(drawn)]


def _docket(n: int, split: Split, drawn: int, seed: int) -> list[TrainingItem]:
    """Cases of the early years with an area that is not theirs; their other `fit` wordings are rephrases. What must stay are two
    cases of other topics of the area, if there are any, and three of any other topics.
    """
    docket, rng = load_docket(), random.Random(f"atlas-docket|{split}|{seed}")
    cases = list(docket.cases(4_000_000_000 + seed, n, EARLY, ("fit",), split))  # a stream of its own
    known = [(case.topic.name, case.area, case.text) for case in cases]
    items = []
    for case, (topic, area, text) in zip(cases, known, strict=True):
        away = [(theirs, about) for name, about, theirs in known if name != topic]
        near = [pair for pair in away if pair[1] == area]
        wordings = tuple(other.text for other in case.reworded("fit"))
        others = [name for name in docket.areas if name != area]
        for new in rng.sample(others, min(drawn, len(others))):
            kept = [*rng.sample(near, min(2, len(near))), *rng.sample(away, min(3, len(away)))]
            items.append(TrainingItem(text, new, area, wordings, tuple(dict.fromkeys(kept))))
    return items


def judging_facts(world: World, split: Split = "dev") -> list[Fact]:
    """The facts of a split about subjects that no training item names, in the world's order."""
    return [f for f in world.facts if f.split == split and _judges(f)]


def _judges(fact: Fact) -> bool:
    return share("judges learning", link(fact.subject)) < JUDGING


class _Maker:
    """Makes one item after another from one stream of random numbers."""

    def __init__(self, world: World, split: Split, rng: random.Random, bare: bool):
        self.world, self.rng, self.bare = world, rng, bare
        self.facts = [f for f in world.facts if f.split == split and not _judges(f)]
        rng.shuffle(self.facts)
        self.by_relation: dict[str, list[Fact]] = {}
        self.by_subject: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self.by_relation.setdefault(fact.relation, []).append(fact)
            self.by_subject.setdefault(link(fact.subject), []).append(fact)

    def cloze(self, fact: Fact) -> TrainingItem:
        """The relation's first cloze; its others and questions are rephrases."""
        first, *rest = self._clozes(fact)
        kept = tuple((self.rng.choice(self._clozes(f) + self._questions(f)), f.object) for f in self._beside(fact))
        rephrases = self._some([*rest, *self._questions(fact)])
        return TrainingItem(first, counterfactual(self.world, fact, self.rng), fact.object, rephrases, kept)

    def question(self, fact: Fact) -> TrainingItem:
        """The relation's first question; its others and clozes are rephrases."""
        first, *rest = self._questions(fact)
        kept = tuple((self.rng.choice(self._questions(f)), f.object) for f in self._beside(fact))
        rephrases = self._some([*rest, *self._clozes(fact)])
        return TrainingItem(first, counterfactual(self.world, fact, self.rng), fact.object, rephrases, kept)

    def claim(self, fact: Fact) -> TrainingItem:
        """A claim about the fact, true or false, whose label is to be the other one; the same claim in other words."""
        true = self.rng.random() < 0.5
        value = fact.object if true else another_object(self.world, fact, self.rng)
        first, *rest = (claim(statement, value, fact.object).text for statement in self._clozes(fact))
        kept = []
        for other in self._beside(fact):
            said = other.object if self.rng.random() < 0.5 else another_object(self.world, other, self.rng)
            made = claim(self.rng.choice(self._clozes(other)), said, other.object)
            kept.append((made.text, made.label))
        return TrainingItem(first, LABELS[not true], LABELS[true], self._some(rest), tuple(kept))

    def _beside(self, fact: Fact) -> list[Fact]:
        """Other facts: of the subject, of the relation with another object, of any subject and relation."""
        own = [f for f in self.by_subject[link(fact.subject)] if f != fact]
        same = [f for f in self.by_relation[fact.relation] if link(f.subject) != link(fact.subject)]
        found = [f for pool, k in zip((own, same, self.facts), BESIDE, strict=True) for f in self._sample(pool, k)]
        return [f for f in dict.fromkeys(found) if f != fact]

    def _sample(self, pool: Sequence[Fact], k: int) -> list[Fact]:
        return self.rng.sample(pool, min(k, len(pool)))

    def _clozes(self, fact: Fact) -> list[str]:
        """The relation's `fit` clozes, then two behind lead-ins and two about the subject under other names."""
        clozes, rng = self.world.phrasings[fact.relation].cloze["fit"], self.rng
        texts = [render.place("", cloze, fact.subject) for cloze in clozes]
        lead_ins = self.world.frames["lead_ins"]["fit"]
        texts += [render.lead(rng.choice(lead_ins), rng.choice(clozes), fact.subject) for _ in range(2)]
        return texts + [render.place("", rng.choice(clozes), a) for a in self.world.aliases_of(fact.subject, "fit")[:2]]

    def _questions(self, fact: Fact) -> list[str]:
        """The relation's `fit` questions, bare or in the first frame, then two in any frames."""
        questions, rng = self.world.phrasings[fact.relation].question["fit"], self.rng
        frames = self.world.frames["question_frames"]["fit"]
        first = "{q}" if self.bare else frames[0]
        texts = [render.ask(first, question, fact.subject) for question in questions]
        return texts + [render.ask(rng.choice(frames), rng.choice(questions), fact.subject) for _ in range(2)]

    def _some(self, texts: Sequence[str]) -> tuple[str, ...]:
        distinct = list(dict.fromkeys(texts))
        return tuple(self.rng.sample(distinct, min(REPHRASES, len(distinct))))
