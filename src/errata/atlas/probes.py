"""What judges edits over Atlas: `probe` phrasings, hard negatives, unrelated texts; and the prompts that calibrate a gate."""

import random
import re
from collections.abc import Sequence
from typing import Literal

from errata.atlas import render
from errata.atlas.corpus import sealed_alias_mark
from errata.atlas.names import Names
from errata.atlas.world import Fact, Split, World, link, read_json
from errata.edit import EditRequest
from errata.scope.calibrate import ScopeExample

PARAPHRASES = 10
NEIGHBOURS = 6


def fact_of(world: World, request: EditRequest) -> Fact | None:
    """The Atlas fact that a request edits, found by subject and relation."""
    return world.by_key.get((link((request.subject or "").removeprefix("The ")), request.relation or ""))


def paraphrases(world: World, fact: Fact, rng: random.Random, sealed: bool = False, aliases: bool = True) -> list[str]:
    """Probe prompts for one fact: every probe cloze bare, some behind probe lead-ins, questions, probe aliases.

    `sealed` takes the sealed set's phrasings, lead-ins, frames and aliases instead (final figures only).
    """
    if sealed:
        return _sealed_paraphrases(world, fact, rng, aliases)
    phrasing = world.phrasings[fact.relation]
    clozes, questions = phrasing.cloze["probe"], phrasing.question["probe"]
    prompts = [render.place("", cloze, fact.subject) for cloze in clozes]
    prompts += [
        render.lead(rng.choice(world.frames["lead_ins"]["probe"]), cloze, fact.subject)
        for cloze in rng.sample(clozes, 2)
    ]
    prompts += [
        render.ask(rng.choice(world.frames["question_frames"]["probe"]), question, fact.subject)
        for question in questions
    ]
    names = world.aliases_of(fact.subject, "probe")[:2] if aliases else []
    return prompts + [render.place("", rng.choice(clozes), alias) for alias in names]


def _sealed_paraphrases(world: World, fact: Fact, rng: random.Random, aliases: bool, mark: str = "known") -> list[str]:
    """The sealed set's prompts for one fact, without those wordings that a `fit` or `probe` one happens to equal."""
    sealed = read_json("sealed.json")
    known = {normal(w) for w in own_wordings(world, fact.relation)}
    phrasing = sealed["phrasings"][fact.relation]
    clozes = [c for c in phrasing["cloze"][mark] if normal(c) not in known]
    questions = [q for q in phrasing["question"][mark] if normal(q) not in known]
    names = {normal(alias) for _, alias in world.aliases}
    about = [
        row["alias"]
        for row in sealed["aliases"]
        if aliases
        and link(row["subject"]) == link(fact.subject)
        and not any(f" {name} " in f" {normal(row['alias'])} " for name in names)
    ]
    prompts = [render.place("", cloze, fact.subject) for cloze in clozes]
    prompts += [render.ask(rng.choice(sealed["question_frames"]), question, fact.subject) for question in questions]
    if clozes:
        prompts.append(render.lead(rng.choice(sealed["lead_ins"]), rng.choice(clozes), fact.subject))
        prompts += [render.place("", rng.choice(clozes), alias) for alias in about if sealed_alias_mark(alias) == mark]
    return prompts


def own_wordings(world: World, relation: str) -> list[str]:
    """Every cloze and question of a relation that is marked `fit` or `probe`."""
    phrasing = world.phrasings[relation]
    return [w for marks in (phrasing.cloze, phrasing.question) for words in marks.values() for w in words]


def normal(wording: str) -> str:
    """A wording for comparison: case, punctuation and spacing aside."""
    return " ".join(re.sub(r"[^\w{}]+", " ", wording.casefold()).split())


def with_probes(
    world: World, requests: Sequence[EditRequest], seed: int = 0, sealed: bool = False
) -> list[EditRequest]:
    """The same requests (same ids) with paraphrase and neighbourhood prompts, for those that edit an Atlas fact.

    Neighbours are hard negatives: the same relation of other subjects, and other relations of the same subject, on facts
    that no request edits; subjects are of the `test` split, so `calibrate` has never seen them (for an edit of a `dev`
    fact, of the `dev` split). A subject that an edited fact names as its object is asked about under its own name only: a
    description ("the head of state of Poland") may mean somebody else after the edit.
    """
    rng = random.Random(seed)
    edited = {fact for fact in (fact_of(world, r) for r in requests) if fact}
    moved = {link(fact.object) for fact in edited}

    def asked(fact: Fact) -> list[str]:
        return paraphrases(world, fact, rng, sealed, aliases=link(fact.subject) not in moved)

    filled = []
    for request in requests:
        fact = fact_of(world, request)
        if fact is None:
            filled.append(request)
            continue
        free = [
            f
            for f in world.by_relation[fact.relation]
            if f not in edited and f.split == fact.split and f.subject != fact.subject
        ]
        beside = [f for f in world.by_subject[link(fact.subject)] if f not in edited and f.relation != fact.relation]
        other = rng.sample(beside, min(len(beside), NEIGHBOURS // 2))
        same = rng.sample(free, min(len(free), NEIGHBOURS - len(other)))
        neighbours = [rng.choice(asked(f)) for f in same + other]
        update = {
            "paraphrase_prompts": request.paraphrase_prompts or tuple(asked(fact)),
            "neighborhood_prompts": request.neighborhood_prompts or tuple(neighbours),
        }
        filled.append(request.model_copy(update=update))
    return filled


def consequence_prompts(world: World, fact: Fact, target_new: str) -> list[tuple[str, str]]:
    """(prompt, answer) for what follows from the edit through its new object, in `probe` phrasings."""
    return [
        (render.place("", render.hop(world, fact, cloze), ""), second.object)
        for second in world.consequences(Fact(fact.subject, fact.relation, target_new))
        for cloze in world.phrasings[second.relation].cloze["probe"][:1]
    ]


def unrelated_texts(world: World, n: int, seed: int = 0, sealed: bool = False) -> list[str]:
    """`n` texts that state no fact of Atlas: ordinary sentences, and notes about names that exist nowhere.

    `sealed` begins with the sealed set's texts.
    """
    rng = random.Random(seed)
    names = Names(world)
    texts: list[str] = list(read_json("sealed.json")["unrelated"]) if sealed else []
    while len(texts) < n:
        parts = [rng.choice(world.filler) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.4:
            name, other = (names.invented(rng, seen=False) for _ in range(2))
            parts.insert(
                rng.randrange(len(parts) + 1),
                rng.choice((f"{name} met {other} at the gate.", f"A letter for {name} lay on the table.")),
            )
        texts.append(" ".join(parts))
    return texts[:n]


def scope_examples(world: World, split: Split = "dev", n: int | None = None, seed: int = 0) -> list[ScopeExample]:
    """Facts with `fit` wordings only, what calibrates a gate; `probe` wordings stay unseen.

    Held out of each fact's prompts are a third of its clozes, a question, and every fourth lead-in and question frame (the
    same for all facts): a gate must let in wordings and openings that nothing was fitted on.
    """
    rng = random.Random(seed)
    facts = [f for f in world.facts if f.split == split]
    rng.shuffle(facts)
    leads, frames = world.frames["lead_ins"]["fit"], world.frames["question_frames"]["fit"]
    held_leads, held_frames = leads[3::4], frames[3::4]
    leads, frames = [x for x in leads if x not in held_leads], [x for x in frames if x not in held_frames]
    examples = []
    for fact in facts[:n]:
        phrasing, subject = world.phrasings[fact.relation], fact.subject
        clozes, questions = phrasing.cloze["fit"][:], phrasing.question["fit"][:]
        rng.shuffle(clozes)
        rng.shuffle(questions)
        held_clozes, clozes = clozes[: len(clozes) // 3], clozes[len(clozes) // 3 :]
        fit = [render.place("", c, subject) for c in clozes]
        fit += [render.lead(rng.choice(leads), rng.choice(clozes), subject) for _ in range(6)]
        fit += [render.ask(rng.choice(frames), rng.choice(questions[1:] or questions), subject) for _ in range(4)]
        fit += [render.place("", rng.choice(clozes), alias) for alias in world.aliases_of(subject, "fit")[:2]]
        held = [render.place("", c, subject) for c in held_clozes[:2]]
        held.append(render.lead(rng.choice(held_leads), rng.choice(held_clozes), subject))
        held.append(render.ask(rng.choice(held_frames), questions[0], subject))
        examples.append(ScopeExample(tuple(fit), tuple(held), fact.object))
    return examples


def context_pieces(world: World, mark: Literal["fit", "probe"], n: int = 2000, seed: int = 0) -> dict[str, list[str]]:
    """Sentences that long contexts are made of, by kind, each ready to stand before another text: ordinary sentences (half of
    them for either mark), facts, and questions with their answers, in wordings of this mark.
    """
    rng = random.Random(seed)
    facts = rng.sample(list(world.facts), min(n, len(world.facts)))
    made: dict[str, list[str]] = {"filler": [f"{text} " for text in world.filler[mark == "probe" :: 2]]}
    made["facts"], made["dialogue"] = [], []
    for fact in facts:
        phrasing = world.phrasings[fact.relation]
        cloze, question = rng.choice(phrasing.cloze[mark]), rng.choice(phrasing.question[mark])
        made["facts"].append(f"{render.place('', cloze, fact.subject)} {fact.object}. ")
        made["dialogue"].append(f"User: {render.place('', question, fact.subject)} Assistant: {fact.object}.\n")
    return made
