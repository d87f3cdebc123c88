"""`atlas-ripple`: what an edit of an Atlas fact entails and what it must leave alone, in the schema of RippleEdits.

Source: Cohen et al. 2024. Test prompts are worded by `probe` phrasings, lead-ins and question frames only; the edit itself
is stated in the relation's first `fit` phrasing, which is the prompt of the edit request. Atlas has no Wikidata ids: an
entity's id is its name without the article (`world.link`), a relation's id is Atlas's, and `target_id` of the edit is the
new object as it stands in the request.

Differs from the published builder:
- the condition of Subject_Aliasing asks, under the alias, for the *old* object (the builder asks for the new one, which no
  unedited model gives; methods, section E.3);
- no answer stands in its own prompt, and no test is passed by what was true before the edit;
- a test does not rest on a fact that another edit of the same set changes, so that all edits may be active at once;
- compositions are those that Atlas could state (`world.SECOND_HOPS`).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, cycle
from typing import Literal, NamedTuple

from errata.atlas import render
from errata.atlas.probes import fact_of, normal
from errata.atlas.requests import counterfactual_requests, request_for
from errata.atlas.world import OBJECT_TYPE, SECOND_HOPS, Fact, Split, World, link
from errata.bench.data.records import Answer
from errata.bench.data.ripple import RippleEdit, RippleFact, RippleQuery, RippleRecord, RippleTest
from errata.edit import EditRequest, Implication
from errata.errors import RecordError

# Other relations of the subject that an edit makes doubtful: not asked about as if they had to stay.
IMPACTED = {
    "occupation": {"field", "team"},
    "field": {"occupation"},
    "team": {"occupation"},
    "creator": {"original_language"},
}
# Relations that hold from the object to the subject as well.
SYMMETRIC = frozenset({"spouse"})
# Relations of which a subject may have several objects, so that a new one does not end the old one.
SEVERAL = frozenset({"child", "citizenship", "founder", "official_language"})


class Wording(NamedTuple):
    """A prompt, and whether it is a cloze or a question."""

    text: str
    form: Literal["cloze", "question"]


def wordings(world: World, relation: str, about: str, rng: random.Random, led: int = 1) -> list[Wording]:
    """Every probe wording of (about, relation) in random order: clozes, `led` of them behind lead-ins as well, questions.

    about: a subject, or a description of one, as it stands in the middle of a sentence.
    """
    phrasing, frames = world.phrasings[relation], world.frames
    clozes = phrasing.cloze["probe"]
    texts = [Wording(render.place("", cloze, about), "cloze") for cloze in clozes]
    texts += [
        Wording(render.lead(rng.choice(frames["lead_ins"]["probe"]), cloze, about), "cloze")
        for cloze in rng.sample(clozes, min(led, len(clozes)))
    ]
    texts += [
        Wording(render.ask(rng.choice(frames["question_frames"]["probe"]), question, about), "question")
        for question in phrasing.question["probe"]
    ]
    rng.shuffle(texts)
    return texts


def described(world: World, fact: Fact) -> str:
    """The fact's object, described through its subject: "the capital of France"."""
    return render.hop(world, fact, "{}")


def answer(world: World, relation: str, value: str) -> Answer:
    """An object of the relation, with the other names that Atlas has for it."""
    hops = SECOND_HOPS.get(OBJECT_TYPE[relation], ())
    known = any((link(value), hop) in world.by_key for hop in hops)  # or else only the spelling is the same
    names = subject_answer(world, link(value)).names if known else ()
    return Answer(value=value, aliases=tuple(n for n in dict.fromkeys(names) if n != value))


def subject_answer(world: World, subject: str) -> Answer:
    """A subject of Atlas as an answer, with its other names; `subject` with or without its article."""
    spelled = world.by_subject[link(subject)][0].subject
    names = dict.fromkeys((link(spelled), *world.aliases_of(spelled)))
    return Answer(value=spelled, aliases=tuple(n for n in names if n != spelled))


def object_of(world: World, entity: str, relation: str) -> str | None:
    """What Atlas says about (entity, relation); the country of a capital, which no table states, through `capital`."""
    fact = world.by_key.get((link(entity), relation))
    if fact is None and relation == "city_country":
        return next((f.subject for f in world.by_relation["capital"] if link(f.object) == link(entity)), None)
    return fact.object if fact else None


def names_in(prompt: str, found: Answer) -> bool:
    """Whether any name of the answer stands in the prompt, as whole words in any case."""
    text = f" {normal(prompt)} "
    return any(f" {normal(name)} " in text for name in found.names if normal(name))


def leaks(query: RippleQuery) -> bool:
    """Whether an answer stands in the query's own prompt."""
    return any(names_in(query.prompt, found) for found in query.answers)


def same(a: str | None, b: str) -> bool:
    """Whether two names are one, article and case aside."""
    return a is not None and link(a).casefold() == link(b).casefold()


def new_consequences(
    world: World, fact: Fact, target: str, edited: frozenset[Fact] = frozenset()
) -> list[tuple[Fact, str | None]]:
    """(fact about the new object, what the old object's was) for each second hop whose answer the edit changes.

    Without facts that are edited themselves. None: Atlas does not say what it was.
    """
    found = []
    for second in world.consequences(Fact(fact.subject, fact.relation, target)):
        before = object_of(world, fact.object, second.relation)
        if second not in edited and not same(before, second.object):
            found.append((second, before))
    return found


def ripple_requests(world: World, n: int, *, split: Split = "test", seed: int = 0) -> list[EditRequest]:
    """`n` random counterfactual edits from which compositions follow; fewer where Atlas has fewer.

    Of every ten, five are of facts about a subject that other facts name as their object, three lead through their new object to
    another answer (of these, subjects that have other names come first), and two are of subjects that have other names: so that
    both kinds of composition and aliases come often enough to be told apart by stratum.
    """
    drawn = counterfactual_requests(world, len(world.facts), split=split, seed=seed)
    maker = RippleMaker(world, frozenset())
    chained, bridged, named = [], [], []
    for request in drawn:
        fact = edited_fact(world, request)
        if world.aliases_of(fact.subject):
            named.append(request)
        if maker.bridges.get(fact):
            bridged.append(request)
        elif new_consequences(world, fact, request.target_new):
            chained.append(request)
    picked: dict[str, EditRequest] = {}
    aliased = {request.id for request in named}
    pools = [iter(pool) for pool in (bridged, sorted(chained, key=lambda request: request.id not in aliased), named)]
    others = iter(drawn)
    for which in cycle((0, 1, 0, 2, 0, 1, 0, 1, 0, 2)):
        free = (request for request in chain(pools[which], others) if request.id not in picked)
        found = next(free, None)
        if found is None or len(picked) == n:
            break
        picked[found.id] = found
    return list(picked.values())


def bridge_implications(world: World, record: RippleRecord) -> tuple[Implication, ...]:
    """What a record's Compositionality_II tests ask, as implications in `fit` phrasings: the chains that lead to the subject.

    `requests.implications` has those that go on from the new object.
    """
    found = []
    for query in (query for test in record.compositionality_ii for query in test.test_queries):
        first, relation = world.by_key[query.subject_id, query.relation], query.second_relation or ""
        found += [
            Implication(
                prompt=render.place("", render.hop(world, first, cloze), ""),
                answer=str(record.edit.target_id),
                subject=first.subject,
                relation=f"{relation} of {first.relation}",
            )
            for cloze in world.phrasings[relation].cloze["fit"][:2]
        ]
    return tuple(found)


def ripple_records(
    world: World, requests: Sequence[EditRequest], *, seed: int = 0, limit: int = 4, example_type: str = "atlas"
) -> list[RippleRecord]:
    """One record for each request, in order. `limit`: tests on one axis of one record, drawn at random.

    A record depends on its request, the seed and on which facts the requests edit, not on the order of the requests.
    Raises RecordError for a request that edits no Atlas fact, or to what the fact already says.
    """
    edits = [(edited_fact(world, request), request.target_new) for request in requests]
    maker = RippleMaker(world, frozenset(fact for fact, _ in edits), seed, limit)
    return [maker.record(fact, target, example_type) for fact, target in edits]


def ripple_request(world: World, record: RippleRecord) -> EditRequest:
    """The edit request of a record that `ripple_records` wrote. Raises RecordError if Atlas has no such fact."""
    edit = record.edit
    fact = world.by_key.get((edit.subject_id, edit.relation))
    if fact is None:
        raise RecordError(f"Atlas has no fact ({edit.subject_id!r}, {edit.relation!r}); use a record made from Atlas.")
    return request_for(world, fact, str(edit.target_id))


def edited_fact(world: World, request: EditRequest) -> Fact:
    """The Atlas fact that a request edits. Raises RecordError if there is none."""
    fact = fact_of(world, request)
    if fact is None:
        about = f"({request.subject!r}, {request.relation!r})"
        raise RecordError(f"expected an edit of an Atlas fact, found {about} in request {request.id}; leave it out.")
    return fact


@dataclass(frozen=True)
class RippleMaker:
    """Makes the tests of one edit. edited: the facts that any edit of the set changes; limit: tests on an axis."""

    world: World
    edited: frozenset[Fact]
    seed: int = 0
    limit: int = 4

    @cached_property
    def bridges(self) -> dict[Fact, list[Fact]]:
        """For each fact, those whose object is its subject: the first halves of Atlas's compositions."""
        found: dict[Fact, list[Fact]] = {}
        for pair in self.world.compositions:
            found.setdefault(pair.second, []).append(pair.first)
        return found

    def record(self, fact: Fact, target_new: str, example_type: str = "atlas") -> RippleRecord:
        """The record of one edit."""
        if same(target_new, fact.object):
            raise RecordError(f"{fact} already says {target_new!r}; choose another object.")
        rng = random.Random("|".join((str(self.seed), link(fact.subject), fact.relation, target_new)))

        def chosen(tests: Iterator[RippleTest]) -> tuple[RippleTest, ...]:
            found = [test for test in tests if not any(map(leaks, (*test.test_queries, *test.condition_queries)))]
            return tuple(found if len(found) <= self.limit else rng.sample(found, self.limit))

        original = self._stated(fact, fact.object)
        return RippleRecord(
            example_type=example_type,
            edit=RippleEdit(**self._stated(fact, target_new).model_dump(), original_fact=original),
            relation_specificity=chosen(self._relation_specificity(fact, rng)),
            logical_generalization=chosen(self._logical_generalization(fact, target_new, rng)),
            subject_aliasing=chosen(self._subject_aliasing(fact, target_new, rng)),
            compositionality_i=chosen(self._compositionality_i(fact, target_new, rng)),
            compositionality_ii=chosen(self._compositionality_ii(fact, target_new, rng)),
            forgetfulness=chosen(self._forgetfulness(fact, target_new, rng)),
        )

    def _stated(self, fact: Fact, target: str) -> RippleFact:
        cloze = self.world.phrasings[fact.relation].cloze["fit"][0]
        prompt = f"{render.place('', cloze, fact.subject)} {target}."
        return RippleFact(prompt=prompt, subject_id=link(fact.subject), relation=fact.relation, target_id=target)

    def _ask(self, relation: str, about: str, rng: random.Random) -> str:
        return wordings(self.world, relation, about, rng)[0].text

    def _known(self, fact: Fact, rng: random.Random) -> RippleQuery:
        """The query for a fact that Atlas states."""
        prompt = self._ask(fact.relation, fact.subject, rng)
        return _query(prompt, answer(self.world, fact.relation, fact.object), fact)

    # -- axes ------------------------------------------------------------------------------------------------------------

    def _relation_specificity(self, fact: Fact, rng: random.Random) -> Iterator[RippleTest]:
        """Other relations of the subject stay. Condition: the same query."""
        for other in self.world.by_subject[link(fact.subject)]:
            query = self._known(other, rng)
            if other != fact and other not in self.edited and other.relation not in IMPACTED.get(fact.relation, ()):
                yield _test(query, query)

    def _logical_generalization(self, fact: Fact, target: str, rng: random.Random) -> Iterator[RippleTest]:
        """The inverse leads from the new object to the subject. Condition: from the old object, where it is nobody else's."""
        found, relation = subject_answer(self.world, fact.subject), fact.relation
        inverse = (self.world.phrasings[relation].inverse or {}).get("probe", [])
        leads = ["", rng.choice(self.world.frames["lead_ins"]["probe"])]
        unique = sum(same(f.object, fact.object) for f in self.world.by_relation[relation]) == 1
        for cloze in inverse:
            before = rng.choice(leads)
            new, old = (
                _query(render.lead(before, cloze, o), found, Fact(o, f"inverse of {relation}", link(fact.subject)))
                for o in (target, fact.object)
            )
            yield _test(new, *([old] if unique and not leaks(old) else []))
        if relation in SYMMETRIC:
            back = self.world.by_key.get((link(fact.object), relation))
            holds = back is not None and same(back.object, fact.subject) and back not in self.edited
            new, old = (
                _query(self._ask(relation, o, rng), found, Fact(o, relation, link(fact.subject)))
                for o in (target, fact.object)
            )
            yield _test(new, *([old] if holds else []))

    def _subject_aliasing(self, fact: Fact, target: str, rng: random.Random) -> Iterator[RippleTest]:
        """The new object under the subject's other names. Condition: the old object under the alias."""
        old = answer(self.world, fact.relation, fact.object)
        edited = {described(self.world, f).casefold() for f in self.edited}  # such aliases name somebody else now
        for alias in self.world.aliases_of(fact.subject):
            prompt = self._ask(fact.relation, alias, rng)
            if not names_in(alias, old) and alias.casefold() not in edited:
                new = Fact(fact.subject, fact.relation, target)
                test = _query(prompt, answer(self.world, fact.relation, target), new, phrase=prompt)
                yield _test(test, _query(prompt, old, fact, phrase=prompt))

    def _compositionality_i(self, fact: Fact, target: str, rng: random.Random) -> Iterator[RippleTest]:
        """A second hop through the new object. Condition: (new object, second relation)."""
        first = Fact(fact.subject, fact.relation, target)
        for second, _ in new_consequences(self.world, fact, target, self.edited):
            found = answer(self.world, second.relation, second.object)
            prompt = self._ask(second.relation, described(self.world, first), rng)
            yield _test(_query(prompt, found, first, second=second), self._known(second, rng))

    def _compositionality_ii(self, fact: Fact, target: str, rng: random.Random) -> Iterator[RippleTest]:
        """The subject, described through a fact whose object it is. Condition: that fact."""
        new, found = Fact(fact.subject, fact.relation, target), answer(self.world, fact.relation, target)
        for first in self.bridges.get(fact, ()):
            # Through its own old or new object, the subject is not described apart from the edit.
            if first in self.edited or same(first.subject, fact.object) or same(first.subject, target):
                continue
            prompt = self._ask(fact.relation, described(self.world, first), rng)
            yield _test(_query(prompt, found, first, second=new), self._known(first, rng))

    def _forgetfulness(self, fact: Fact, target: str, rng: random.Random) -> Iterator[RippleTest]:
        """Where several objects may hold, the old one stays beside the new one. Condition: the same query."""
        if fact.relation in SEVERAL:
            cloze = rng.choice(self.world.phrasings[fact.relation].cloze["probe"])
            names = answer(self.world, fact.relation, target).names
            spelled = next((n for n in names if n == f"the {target}"), target)
            prompt = render.lead(f"Apart from {spelled},", cloze, fact.subject)
            query = _query(prompt, answer(self.world, fact.relation, fact.object), fact, phrase=prompt)
            yield _test(query, query)


def _query(
    prompt: str, found: Answer, fact: Fact, *, second: Fact | None = None, phrase: str | None = None
) -> RippleQuery:
    """A regular query for `fact`, or a two-hop query along `fact` and `second`."""
    if second is None:
        return RippleQuery(
            prompt=prompt,
            answers=(found,),
            query_type="regular",
            subject_id=link(fact.subject),
            relation=fact.relation,
            target_ids=(link(fact.object),),
            phrase=phrase,
        )
    return RippleQuery(
        prompt=prompt,
        answers=(found,),
        query_type="two_hop",
        subject_id=link(fact.subject),
        relation=fact.relation,
        target_ids=(link(fact.object),),
        phrase=prompt,
        second_relation=second.relation,
        second_hop_target_ids=(link(second.object),),
    )


def _test(query: RippleQuery, *conditions: RippleQuery) -> RippleTest:
    return RippleTest(test_queries=(query,), test_condition="OR", condition_queries=conditions)
