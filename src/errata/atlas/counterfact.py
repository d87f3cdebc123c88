"""`atlas-counterfact`: edits of Atlas facts in the schema of CounterFact, with portability prompts and attribute snippets.

Source: Meng et al. 2022. Everything that judges is worded by `probe` phrasings, lead-ins and question frames; only the
rewrite's prompt is a `fit` one, the first of its relation. Subjects of neighbourhood and attribute prompts are of the edited
fact's own split, so that a gate calibrated on `dev` has not seen those of a `test` edit; no edit of the set changes them.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from errata.atlas import render
from errata.atlas.requests import counterfactual_requests
from errata.atlas.ripple import answer, described, edited_fact, names_in, new_consequences, same, wordings
from errata.atlas.world import Fact, Split, World, link
from errata.bench.data.counterfact import CounterFactRecord, PortabilityPrompt, Rewrite, Target
from errata.bench.data.snippets import Snippet, SnippetGroup
from errata.edit import EditRequest

NEIGHBOURS = 10
GENERATIONS = 10


def counterfact_requests(
    world: World, n: int, *, split: Split = "test", seed: int = 0, neighbours: bool = True, portable: bool = False
) -> list[EditRequest]:
    """`n` random counterfactual edits, spread over relations; fewer where Atlas has fewer.

    neighbours: only of facts whose object other subjects of the split share, as in CounterFact. portable: only those from
    which something follows through the new object.
    """
    holders = Counter((fact.relation, link(fact.object), fact.split) for fact in world.facts)

    def wanted(request: EditRequest) -> bool:
        fact = edited_fact(world, request)
        shared = holders[fact.relation, link(fact.object), split] > 1
        return (shared or not neighbours) and (not portable or bool(new_consequences(world, fact, request.target_new)))

    drawn = counterfactual_requests(world, len(world.facts), split=split, seed=seed)
    return list(islice(filter(wanted, drawn), n))


def counterfact_records(world: World, requests: Sequence[EditRequest], *, seed: int = 0) -> list[CounterFactRecord]:
    """One record for each request, in order, with case ids from 0.

    A record's prompts depend on its request, the seed and on which facts the requests edit, not on their order.
    Where no other subject has the old object, there are no neighbourhood prompts; where there are fewer than ten, the same
    subjects are asked about in other words. Raises RecordError for a request that edits no Atlas fact.
    """
    facts = [edited_fact(world, request) for request in requests]
    maker = CounterFactMaker(world, frozenset(facts), seed)
    pairs = zip(facts, requests, strict=True)
    return [maker.record(i, fact, request) for i, (fact, request) in enumerate(pairs)]


def attribute_snippets(world: World, records: Iterable[CounterFactRecord], *, most: int = 20) -> list[SnippetGroup]:
    """Reference texts for each (relation, new object) of the records: what Atlas says about the entities that have it.

    The texts state all facts of an entity, one sentence each, in the relations' first `probe` clozes. The new object itself
    is among the entities if Atlas knows it. A group that would be empty is left out.
    """
    return _snippets(
        world, ((r.requested_rewrite.relation_id, r.requested_rewrite.target_new.str_) for r in records), most
    )


def all_snippets(world: World, *, most: int = 20) -> list[SnippetGroup]:
    """The same for each (relation, object) of Atlas: what words weigh is found on all of them, whatever the records are."""
    return _snippets(world, ((fact.relation, fact.object) for fact in world.facts), most)


def _snippets(world: World, pairs: Iterable[tuple[str, str]], most: int) -> list[SnippetGroup]:
    groups = []
    for relation, target in dict.fromkeys(pairs):
        holders = [f.subject for f in world.by_relation[relation] if same(f.object, target)][:most]
        itself = [
            f.subject for f in world.by_subject.get(link(target), [])[:1] if answer(world, relation, target).aliases
        ]
        samples = tuple(_snippet(world, name) for name in dict.fromkeys((*holders, *itself)))
        if samples:
            groups.append(SnippetGroup(relation_id=relation, target_id=link(target), samples=samples))
    return groups


def _snippet(world: World, subject: str) -> Snippet:
    sentences = (
        f"{render.place('', world.phrasings[f.relation].cloze['probe'][0], f.subject)} {f.object}."
        for f in world.by_subject[link(subject)]
    )
    return Snippet(name=subject, text=" ".join(sentences))


@dataclass(frozen=True)
class CounterFactMaker:
    """Makes one record. edited: the facts that any edit of the set changes."""

    world: World
    edited: frozenset[Fact]
    seed: int = 0

    def record(self, case_id: int, fact: Fact, request: EditRequest) -> CounterFactRecord:
        """The record of one edit."""
        target = request.target_new
        rng = random.Random("|".join((str(self.seed), link(fact.subject), fact.relation, target)))
        return CounterFactRecord(
            case_id=case_id,
            requested_rewrite=Rewrite(
                prompt=request.prompt,
                relation_id=fact.relation,
                target_new=Target(str_=target, id=link(target)),
                target_true=Target(str_=fact.object, id=link(fact.object)),
                subject=request.subject or fact.subject,
            ),
            paraphrase_prompts=self._paraphrases(fact, rng),
            neighborhood_prompts=self._about_others(fact, fact.object, rng),
            attribute_prompts=self._about_others(fact, target, rng),
            generation_prompts=self._generations(fact, target, rng),
            portability_prompts=tuple(self._portability(fact, target, rng)),
        )

    def _paraphrases(self, fact: Fact, rng: random.Random) -> tuple[str, ...]:
        """A cloze behind a lead-in, two other clozes and a question."""
        clozes = rng.sample(self.world.phrasings[fact.relation].cloze["probe"], 3)
        led = render.lead(rng.choice(self.world.frames["lead_ins"]["probe"]), clozes[0], fact.subject)
        bare = [render.place("", cloze, fact.subject) for cloze in clozes[1:]]
        asked = [w.text for w in wordings(self.world, fact.relation, fact.subject, rng) if w.form == "question"]
        return (led, *bare, asked[0])

    def _about_others(self, fact: Fact, value: str, rng: random.Random) -> tuple[str, ...]:
        """Up to ten prompts about other subjects with that object: one each, then more wordings of the same ones."""
        others = [
            f
            for f in self.world.by_relation[fact.relation]
            if same(f.object, value) and f.subject != fact.subject and f.split == fact.split and f not in self.edited
        ]
        rng.shuffle(others)
        texts = [[w.text for w in wordings(self.world, f.relation, f.subject, rng, led=4)] for f in others[:NEIGHBOURS]]
        rounds = [text for number in range(NEIGHBOURS) for row in texts for text in row[number : number + 1]]
        return tuple(rounds[:NEIGHBOURS])

    def _generations(self, fact: Fact, target: str, rng: random.Random) -> tuple[str, ...]:
        """Ten beginnings of texts that the new object should shape: about the fact, and about what it leads to."""
        edit = Fact(fact.subject, fact.relation, target)
        about = [(fact.relation, fact.subject)]
        about += [(second.relation, described(self.world, edit)) for second in self.world.consequences(edit)]
        texts = [
            [w.text for w in wordings(self.world, relation, subject, rng) if w.form == "cloze"]
            for relation, subject in about
        ]
        rounds = [text for number in range(GENERATIONS) for row in texts for text in row[number : number + 1]]
        while len(rounds) < GENERATIONS:  # repeats are allowed: each is a sample of its own
            rounds += rounds
        return tuple(rounds[:GENERATIONS])

    def _portability(self, fact: Fact, target: str, rng: random.Random) -> list[PortabilityPrompt]:
        """A cloze and a question for each fact about the new object, where the answer was another before the edit."""
        edit, found = Fact(fact.subject, fact.relation, target), []
        for second, before in new_consequences(self.world, fact, target, self.edited):
            new = answer(self.world, second.relation, second.object)
            asked = wordings(self.world, second.relation, described(self.world, edit), rng)
            direct = wordings(self.world, second.relation, second.subject, rng)
            for form in ("cloze", "question"):
                prompt = next((w for w in asked if w.form == form and not names_in(w.text, new)), None)
                condition = next((w for w in direct if w.form == form and not names_in(w.text, new)), None)
                if prompt and condition:
                    found.append(
                        PortabilityPrompt(
                            prompt=prompt.text,
                            answer=new,
                            answer_true=answer(self.world, second.relation, before) if before else None,
                            relation=second.relation,
                            form=prompt.form,
                            condition_prompt=condition.text,
                        )
                    )
        return found
