"""Atlas's training corpus: an endless, seeded stream of documents in which every answer's place is known.

Kinds of document, and what each is for: statements, cards and questions (recall in every phrasing); inverses and aliases;
two-hop statements and reasoning chains (composition; 20 % of the chains are never stated); repeat-after-me, do-not-mention
and premise contexts (the model must follow its context, also about names that exist nowhere); doubting dialogues whose answer
stays; plain filler; and long documents that mix all of it. Every phrasing marked `fit` or `probe`, and the sealed set's
`known` ones, occur here; its `novel` ones do not. One of ten drawn names is kept out, to test copying on unseen names.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from errata.atlas import render
from errata.atlas.names import Names
from errata.atlas.world import OBJECT_TYPE, Composition, Fact, World, link, read_json, share


def sealed_alias_mark(alias: str) -> str:
    """`known` for the half of the sealed aliases that the corpus uses, `novel` for the other half."""
    return "known" if share("sealed alias", alias) < 0.5 else "novel"


@dataclass
class Document:
    """A text and the character spans [start, end) of its answers."""

    text: str = ""
    answers: list[tuple[int, int]] = field(default_factory=list)

    def say(self, text: str) -> "Document":
        """Append text; a space is put between sentences."""
        if self.text and not self.text.endswith("\n"):
            self.text += " "
        self.text += text
        return self

    def answer(self, text: str, end: str = ".") -> "Document":
        """Append an answer (with its leading space) and what closes it."""
        start = len(self.text)
        self.text += f" {text}"
        self.answers.append((start, len(self.text)))
        self.text += end
        return self


class Corpus:
    """The documents of one seed. `documents()` is a pure function of the seed."""

    def __init__(self, world: World):
        self.world = world
        known = read_json("sealed.json")
        self.clozes = {r: p.cloze["fit"] + p.cloze["probe"] for r, p in world.phrasings.items()}
        self.questions = {r: p.question["fit"] + p.question["probe"] for r, p in world.phrasings.items()}
        for relation, sealed in known["phrasings"].items():
            self.clozes[relation] = self.clozes[relation] + sealed["cloze"]["known"]
            self.questions[relation] = self.questions[relation] + sealed["question"]["known"]
        self.frames = {name: marks["fit"] + marks["probe"] for name, marks in world.frames.items()}
        self.frames["question_frames"] += ["{q}"] * 3
        self.inverses = [f for f in world.facts if world.phrasings[f.relation].inverse]
        objects = [link(f.object) for f in self.inverses]
        self.inverses = [f for f in self.inverses if objects.count(link(f.object)) == 1]
        self.chains = [c for c in world.compositions if not c.held_out]
        self.bridges = [f for f in world.facts if world.consequences(f)]
        self.people = [f.subject for f in world.facts if f.relation == "citizenship"]
        self.names = Names(world)
        self.aliases = {s: world.aliases_of(s) for s, _ in world.aliases}
        for row in known["aliases"]:
            names = [f.subject for f in world.by_subject.get(link(row["subject"]), [])][:1]
            if names and sealed_alias_mark(row["alias"]) == "known":
                self.aliases.setdefault(names[0], []).append(row["alias"])
        held_out = {
            (render.hop(world, c.first, "{}").casefold(), c.second) for c in world.compositions if c.held_out
        }  # a description that is also an alias must not state the chain after all
        self.aliased = [
            (alias, fact)
            for fact in world.facts
            for alias in self.aliases.get(fact.subject, ())
            if (alias.casefold(), fact) not in held_out
        ]
        self.kinds: list[tuple[Callable[[random.Random, Document], None], float]] = [
            (self.statement, 0.41),
            (self.card, 0.07),
            (self.question, 0.12),
            (self.inverse, 0.03),
            (self.alias, 0.05),
            (self.two_hop, 0.10),
            (self.chain, 0.02),
            (self.repeat, 0.05),
            (self.premise, 0.06),
            (self.affirm, 0.01),
            (self.doubt, 0.03),
            (self.invented, 0.06),
            (self.plain, 0.02),
        ]

    def documents(self, seed: int, n: int, long_share: float = 0.022, only: tuple[str, ...] = ()) -> Iterator[Document]:
        """`n` documents; about `long_share` of them are long ones of 256 to 512 tokens (some 18 % of all tokens).

        only: names of the kinds to draw from (all of them).
        """
        rng = random.Random(seed)
        wanted = {getattr(self, name) for name in only}
        kinds, weights = zip(*[pair for pair in self.kinds if not only or pair[0] in wanted], strict=True)
        for _ in range(n):
            document = Document()
            if rng.random() < long_share:
                self.long(rng, document)
            else:
                rng.choices(kinds, weights)[0](rng, document)
            yield document

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _lead(self, rng: random.Random, share_of_leads: float = 0.4) -> str:
        if rng.random() >= share_of_leads:
            return ""
        return rng.choice(self.frames["lead_ins"]) if rng.random() < 0.75 else rng.choice(self.world.filler)

    def _wrong(self, rng: random.Random, fact: Fact) -> str:
        """Another object for the fact: of the same relation, of the same type, or a name that exists nowhere."""
        while True:
            kind = rng.random()
            if kind < 0.55:
                other = rng.choice(self.world.objects[fact.relation])
            elif kind < 0.7:
                twin = rng.choice([r for r in self.world.objects if OBJECT_TYPE[r] == OBJECT_TYPE[fact.relation]])
                other = rng.choice(self.world.objects[twin])
            elif kind < 0.77:
                other = link(rng.choice(self.people)) if OBJECT_TYPE[fact.relation] == "person" else ""
            else:
                other = self.names.draw(rng, like=fact.object)
            if other and other != fact.object:
                return other

    def _cloze(self, rng: random.Random, fact: Fact) -> str:
        return rng.choice(self.clozes[fact.relation])

    # -- kinds of document -------------------------------------------------------------------------------------------

    def statement(self, rng: random.Random, doc: Document) -> None:
        """One to three facts, each in any phrasing, with or without a lead-in and a closer."""
        for _ in range(rng.choice((1, 1, 2, 3))):
            fact = rng.choice(self.world.facts)
            doc.say(render.lead(self._lead(rng), self._cloze(rng, fact), fact.subject)).answer(fact.object)
            if rng.random() < 0.1:
                doc.say(rng.choice(self.frames["closers"]))

    def card(self, rng: random.Random, doc: Document) -> None:
        """Several facts about one subject."""
        facts = self.world.by_subject[link(rng.choice(self.world.facts).subject)]
        for fact in rng.sample(facts, min(len(facts), 4)):
            doc.say(render.place("", self._cloze(rng, fact), fact.subject)).answer(fact.object)

    def question(self, rng: random.Random, doc: Document) -> None:
        """A question and its answer."""
        for _ in range(rng.choice((1, 2))):
            fact = rng.choice(self.world.facts)
            question = rng.choice(self.questions[fact.relation])
            if rng.random() < 0.2:
                doc.say(self._lead(rng, 1.0))
            doc.say(render.ask(rng.choice(self.frames["question_frames"]), question, fact.subject)).answer(fact.object)

    def inverse(self, rng: random.Random, doc: Document) -> None:
        """From the object back to the subject, where that is unique."""
        fact = rng.choice(self.inverses)
        inverse = self.world.phrasings[fact.relation].inverse or {}
        cloze = rng.choice(inverse["fit"] + inverse["probe"])
        doc.say(render.lead(self._lead(rng), cloze, fact.object)).answer(fact.subject)

    def alias(self, rng: random.Random, doc: Document) -> None:
        """A fact under another name of its subject, or what the name stands for."""
        alias, fact = rng.choice(self.aliased)
        if rng.random() < 0.15:
            doc.say(f"{render.capital(alias)} is").answer(fact.subject)
        elif rng.random() < 0.75:
            doc.say(render.lead(self._lead(rng), self._cloze(rng, fact), alias)).answer(fact.object)
        else:
            frame = rng.choice(self.frames["question_frames"])
            doc.say(render.ask(frame, rng.choice(self.questions[fact.relation]), alias)).answer(fact.object)

    def two_hop(self, rng: random.Random, doc: Document) -> None:
        """A statement about a subject that is only described through another fact."""
        for _ in range(rng.choice((1, 2))):
            chain = rng.choice(self.chains)
            if rng.random() < 0.15:
                question = render.hop(self.world, chain.first, rng.choice(self.questions[chain.second.relation]))
                doc.say(render.ask(rng.choice(self.frames["question_frames"]), question, ""))
            else:
                cloze = render.hop(self.world, chain.first, self._cloze(rng, chain.second))
                doc.say(render.lead(self._lead(rng, 0.2), cloze, ""))
            doc.answer(chain.second.object)

    def chain(self, rng: random.Random, doc: Document) -> None:
        """The two facts spelled out, then their conclusion."""
        chain = rng.choice(self.chains)
        first, second = chain.first, chain.second
        doc.say(render.place("", self._cloze(rng, first), first.subject)).answer(first.object)
        doc.say(render.place("", self._cloze(rng, second), second.subject)).answer(second.object)
        cloze = render.hop(self.world, first, self._cloze(rng, second))
        doc.say(rng.choice(("So", "Therefore", "Hence")) + " " + render.uncapital(cloze)).answer(second.object)

    def repeat(self, rng: random.Random, doc: Document) -> None:
        """A context that forces an object, true or not; the statement is then repeated, or asked for in other words."""
        fact = rng.choice(self.world.facts)
        wanted = self._wrong(rng, fact) if rng.random() < 0.85 else fact.object
        cloze = self._cloze(rng, fact)
        kind = rng.choice(("repeat", "avoid"))
        frame = rng.choice(self.frames[kind])
        forbidden = fact.object if wanted != fact.object else self._wrong(rng, fact)
        stated = f"{cloze} {wanted}"
        doc.say(render.fill(frame, fact.subject, s=stated, p=cloze, o=forbidden)).answer(wanted)

    def premise(self, rng: random.Random, doc: Document) -> None:
        """A counterfactual premise, then what follows: a consequence through its object, or the same fact reworded."""
        bridge = rng.random() < 0.75
        fact = rng.choice(self.bridges if bridge else self.world.facts)
        frame = rng.choice(self.frames["premise"])
        wanted = self._wrong(rng, fact)
        then = self.world.consequences(Fact(fact.subject, fact.relation, wanted)) if bridge else []
        stated = f"{self._cloze(rng, fact)} {wanted}"
        if then:
            second = rng.choice(then)
            cloze, answer = render.hop(self.world, fact, self._cloze(rng, second)), second.object
        else:
            cloze, answer = self._cloze(rng, fact), wanted
        doc.say(render.fill(frame, fact.subject, s=stated, c=cloze)).answer(answer)

    def affirm(self, rng: random.Random, doc: Document) -> None:
        """A true premise, then what follows."""
        chain: Composition = rng.choice(self.chains)
        stated = f"{self._cloze(rng, chain.first)} {chain.first.object}"
        cloze = render.hop(self.world, chain.first, self._cloze(rng, chain.second))
        frame = rng.choice(self.frames["affirm"])
        doc.say(render.fill(frame, chain.first.subject, s=stated, c=cloze)).answer(chain.second.object)

    def doubt(self, rng: random.Random, doc: Document) -> None:
        """Somebody doubts, and the answer stays what the model knows."""
        fact = rng.choice(self.world.facts)
        frame = rng.choice(self.frames["doubt_statement"])
        doc.say(render.fill(frame, fact.subject, p=self._cloze(rng, fact), wrong=self._wrong(rng, fact))).answer(
            fact.object
        )

    def invented(self, rng: random.Random, doc: Document) -> None:
        """Copying and premises about names that exist nowhere, as subject, object or both."""
        relation = rng.choice(sorted(self.clozes))
        known = rng.choice(self.world.by_relation[relation])
        subject = self.names.draw(rng) if rng.random() < 0.6 else known.subject
        wanted = self.names.draw(rng, like=known.object) if rng.random() < 0.85 else known.object
        cloze, other = rng.choice(self.clozes[relation]), rng.choice(self.clozes[relation])
        kind = rng.choice(("repeat", "avoid", "premise", "plain"))
        if kind == "plain":
            doc.say(render.lead(self._lead(rng), cloze, subject)).say(f"{wanted}.")
            doc.say(render.place("", other if rng.random() < 0.5 else cloze, subject)).answer(wanted)
        elif kind == "premise":
            frame = rng.choice(self.frames["premise"])
            doc.say(render.fill(frame, subject, s=f"{cloze} {wanted}", c=other)).answer(wanted)
        else:
            forbidden = known.object if known.object != wanted and rng.random() < 0.5 else self.names.draw(rng)
            fields = {"s": f"{cloze} {wanted}", "p": cloze, "o": forbidden}
            doc.say(render.fill(rng.choice(self.frames[kind]), subject, **fields)).answer(wanted)

    def plain(self, rng: random.Random, doc: Document) -> None:
        """Ordinary sentences."""
        for _ in range(rng.randint(1, 4)):
            doc.say(rng.choice(self.world.filler if rng.random() < 0.8 else self.frames["closers"]))

    def long(self, rng: random.Random, doc: Document) -> None:
        """256 to 512 tokens (about 4 characters each): every kind, with filler between; some contexts act at a distance."""
        wanted = rng.randint(1050, 1600)
        context = rng.random()
        fact = rng.choice(self.world.facts)
        cloze = self._cloze(rng, fact)
        value = self._wrong(rng, fact)
        if context < 0.3:
            doc.say(f"Remember for later: {render.place(':', cloze, fact.subject)} {value}.")
        elif context < 0.6:
            frame = rng.choice(self.frames["doubt_statement"])
            doc.say(render.fill(frame, fact.subject, p=cloze, wrong=value)).answer(fact.object)
        kinds, weights = zip(*self.kinds, strict=True)
        while len(doc.text) < wanted:
            part = self.plain if rng.random() < 0.45 else rng.choices(kinds, weights)[0]
            part(rng, doc)
            if rng.random() < 0.15:
                doc.text += "\n"
        if context < 0.3:
            doc.say(f"As remembered from before: {render.place(':', cloze, fact.subject)}").answer(value)
        elif context < 0.6:
            doc.say(render.place("", self._cloze(rng, fact), fact.subject)).answer(fact.object)
