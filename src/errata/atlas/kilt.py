"""`atlas-fever` and `atlas-zsre`: claims and questions about Atlas in the KILT form that KnowledgeEditor, MEND and GRACE read.

Source: De Cao et al. 2021 (FEVER and zsRE with rephrases, predictions and alternatives), Petroni et al. 2021 (KILT). An input is
worded by a `fit` wording; its `rephrases` are worded by those of one mark: "fit" for what an editor may learn from, "probe" for
what judges it. `unrelated` is ours: inputs with their answers that an edit of the record must leave alone.

Differs from the published files: the rephrases are the tables' own wordings, not back-translations; the alternatives of a
question are other objects of its relation, not hypotheses of a beam. What a model says to a record is filled in by
`bench.data.kilt.annotated`.
"""

import random
from collections.abc import Sequence
from typing import Any, Literal

from errata.atlas import render
from errata.atlas.claims import LABELS, another_object, claim, hard_objects, same_name
from errata.atlas.world import Fact, Split, World, link
from errata.bench.data.kilt import KiltMeta, KiltOutput, KiltRecord, Provenance, Unrelated

Rephrasings = Literal["fit", "probe"]
UNRELATED = 6
ALTERNATIVES = 4


def fever_records(
    world: World, n: int, *, split: Split = "test", mark: Rephrasings = "probe", seed: int = 0
) -> list[KiltRecord]:
    """`n` claims about facts of the split, half of them true, each fact at most once; fewer where there are fewer facts.

    Every second false claim names a hard object where there is one. Predictions are taken to be right.
    """
    maker = _Maker(world, split, mark, random.Random(f"fever|{split}|{seed}"))
    maker.take(n)
    return [maker.claim(fact, i % 2 == 0) for i, fact in enumerate(maker.asked)]


def zsre_records(
    world: World, n: int, *, split: Split = "test", mark: Rephrasings = "probe", seed: int = 0
) -> list[KiltRecord]:
    """`n` questions about facts of the split, each fact at most once. Predictions are taken to be right."""
    maker = _Maker(world, split, mark, random.Random(f"zsre|{split}|{seed}"))
    maker.take(n)
    return [maker.question(fact) for fact in maker.asked]


def upstream_questions(
    world: World, n: int, *, without: Sequence[KiltRecord] = (), split: Split = "test", seed: int = 0
) -> dict[str, list[Any]]:
    """Questions that no edit concerns and their answers, {"questions": [...], "answers": [[...], ...]} as the NQ file has them."""
    rng, taken = random.Random(f"nq|{split}|{seed}"), {record.id for record in without}
    facts = [f for f in world.facts if f.split == split and fact_id(f) not in taken]
    rng.shuffle(facts)
    facts = facts[:n]
    questions = [render.ask("{q}", rng.choice(world.phrasings[f.relation].question["fit"]), f.subject) for f in facts]
    return {"questions": questions, "answers": [[f.object] for f in facts]}


def fact_id(fact: Fact) -> str:
    """The id of the record about a fact: its relation and its subject without the article."""
    return f"{fact.relation}|{link(fact.subject)}"


# -- records -------------------------------------------------------------------------------------------------------------


class _Maker:
    """Makes the records of one set. asked: the facts that they are about."""

    def __init__(self, world: World, split: Split, mark: Rephrasings, rng: random.Random):
        self.world, self.mark, self.rng = world, mark, rng
        self.facts = [f for f in world.facts if f.split == split]
        rng.shuffle(self.facts)

    def take(self, n: int) -> None:
        """Choose the first `n` facts; the others of each relation and subject stay free."""
        self.asked, free = self.facts[:n], self.facts[n:]
        self.by_relation: dict[str, list[Fact]] = {fact.relation: [] for fact in self.facts}
        self.by_subject: dict[str, list[Fact]] = {link(fact.subject): [] for fact in self.facts}
        for fact in free:
            self.by_relation[fact.relation].append(fact)
            self.by_subject[link(fact.subject)].append(fact)

    def claim(self, fact: Fact, true: bool) -> KiltRecord:
        rng, near = self.rng, hard_objects(self.world, fact)
        hard = bool(near) and rng.random() < 0.5
        value = fact.object if true else rng.choice(near) if hard else another_object(self.world, fact, rng)
        first, *others = self._clozes(fact)
        label, rephrases = LABELS[true], tuple(claim(statement, value, fact.object).text for statement in others)
        return KiltRecord(
            id=fact_id(fact),
            input=claim(first, value, fact.object).text,
            output=(KiltOutput(answer=label),),
            rephrases=rephrases,
            prediction=label,
            alternatives=(LABELS[not true],),
            filtered_rephrases=rephrases,
            unrelated=tuple(self._unrelated_claim(other) for other in self._beside(fact)),
        )

    def _unrelated_claim(self, fact: Fact) -> Unrelated:
        value = fact.object if self.rng.random() < 0.5 else another_object(self.world, fact, self.rng)
        made = claim(self.rng.choice(self._clozes(fact)), value, fact.object)
        return Unrelated(input=made.text, answer=made.label)

    def question(self, fact: Fact) -> KiltRecord:
        rng = self.rng
        first, *others = self._questions(fact)
        rephrases = tuple(dict.fromkeys([*others, *self._clozes(fact)[1:]]))
        different = [o for o in self.world.objects[fact.relation] if not same_name(o, fact.object)]
        near = [o for o in hard_objects(self.world, fact) if o in different][:1]
        rng.shuffle(different)
        alternatives = dict.fromkeys([*different[: ALTERNATIVES - len(near)], *near])
        return KiltRecord(
            id=fact_id(fact),
            input=first,
            output=(KiltOutput(answer=fact.object, provenance=(Provenance(title=fact.subject),)),),
            meta=KiltMeta(template_questions=(first,)),
            rephrases=rephrases,
            prediction=fact.object,
            alternatives=tuple(alternatives),
            filtered_rephrases=rephrases,
            unrelated=tuple(
                Unrelated(input=rng.choice(self._questions(other)), answer=other.object) for other in self._beside(fact)
            ),
        )

    def _beside(self, fact: Fact) -> list[Fact]:
        """Facts that no record is about: other relations of the subject, and the relation of other subjects of the split."""
        own = self.by_subject[link(fact.subject)]
        own = self.rng.sample(own, min(len(own), UNRELATED // 2))
        same = self.by_relation[fact.relation]
        return [*own, *self.rng.sample(same, min(len(same), UNRELATED - len(own)))]

    def _clozes(self, fact: Fact) -> list[str]:
        """The relation's first `fit` cloze, then the others of the mark, two behind lead-ins, and two under other names."""
        world, mark, rng, subject = self.world, self.mark, self.rng, fact.subject
        first, *rest = world.phrasings[fact.relation].cloze["fit"]
        others = rest if mark == "fit" else world.phrasings[fact.relation].cloze["probe"]
        texts = [render.place("", cloze, subject) for cloze in (first, *others)]
        texts += [render.lead(rng.choice(world.frames["lead_ins"][mark]), c, subject) for c in rng.sample(others, 2)]
        return texts + [render.place("", rng.choice(others), name) for name in world.aliases_of(subject, mark)[:2]]

    def _questions(self, fact: Fact) -> list[str]:
        """The relation's first `fit` question, then the others of the mark, each also in frames, and under other names."""
        world, mark, rng, subject = self.world, self.mark, self.rng, fact.subject
        first, *rest = world.phrasings[fact.relation].question["fit"]
        others = rest if mark == "fit" else world.phrasings[fact.relation].question["probe"]
        frames = world.frames["question_frames"][mark]
        texts = [render.ask("{q}", question, subject) for question in (first, *others)]
        texts += [render.ask(f, q, subject) for q in others for f in rng.sample(frames, min(2, len(frames)))]
        return texts + [render.ask("{q}", rng.choice(others), name) for name in world.aliases_of(subject, mark)[:2]]
