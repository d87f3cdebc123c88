"""Atlas's facts and phrasings as data: a small encyclopedia frozen on 1 January 2016.

The tables under `data/` are the whole truth: wide CSV tables of facts, aliases, phrasings and frames. This module reads
them, links objects to the subjects they name, and splits everything by hash: facts (by subject) into `dev` and `test`,
two-hop compositions into trained and held-out, aliases into `fit` and `probe`.
"""

import csv
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any, Literal

from errata.prompts.contexts import FRAMES

DATA = files("errata.atlas") / "data"
Split = Literal["dev", "test"]
Mark = Literal["fit", "probe", "sealed", "novel"]

# What an object names, so that counterfactual objects can be drawn from the right kind of thing.
OBJECT_TYPE = {
    "capital": "city",
    "continent": "continent",
    "currency": "currency",
    "official_language": "language",
    "head_of_state": "person",
    "largest_city": "city",
    "official_name": "official name",
    "highest_point": "mountain",
    "city_country": "country",
    "landmark_city": "city",
    "citizenship": "country",
    "birthplace": "city",
    "occupation": "occupation",
    "mother_tongue": "language",
    "spouse": "person",
    "child": "person",
    "team": "team",
    "field": "field",
    "headquarters": "city",
    "founder": "person",
    "chief_executive": "person",
    "industry": "industry",
    "creator": "person",
    "original_language": "language",
    "genre": "genre",
    "maker": "company",
    "stadium": "stadium",
    "league": "league",
    "symbol": "symbol",
    "count": "number",
    "boiling_point": "temperature",
    "unit": "unit",
}

# Second hops worth stating, by what the first hop's object names.
SECOND_HOPS = {
    "country": ("capital", "continent", "currency", "official_language", "head_of_state"),
    "city": ("city_country",),
    "person": ("birthplace", "citizenship", "mother_tongue", "occupation"),
    "company": ("headquarters", "industry", "chief_executive"),
    "team": ("stadium", "league"),
}


@dataclass(frozen=True, order=True)
class Fact:
    """One row's cell: a subject as it stands in the middle of a sentence, a relation id, and the object."""

    subject: str
    relation: str
    object: str

    @property
    def split(self) -> Split:
        """`dev` for every choice, `test` for figures only; by subject, so that no subject is in both."""
        return "dev" if share("split", link(self.subject)) < 0.45 else "test"


@dataclass(frozen=True, order=True)
class Composition:
    """Two facts chained: (subject, first) names the bridge, and (bridge, second) is the answer."""

    first: Fact
    second: Fact

    @property
    def held_out(self) -> bool:
        """Whether the chained statement is kept out of the corpus (20 %)."""
        return share("two-hop", self.first.subject, self.first.relation, self.second.relation) < 0.2


@dataclass(frozen=True)
class Phrasing:
    """The ways one relation is put into words, by mark; each has one `{}` (see `data/phrasings.json`)."""

    relation: str
    noun: str
    cloze: dict[str, list[str]]
    question: dict[str, list[str]]
    inverse: dict[str, list[str]] | None


def share(*parts: str) -> float:
    """A fixed number in [0, 1) for a tuple of strings: the one way anything is split."""
    digest = hashlib.sha256("|".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def link(name: str) -> str:
    """A name without its leading article, so that the object `United States` finds the subject `the United States`."""
    return name.removeprefix("the ").removeprefix("The ")


def read_json(name: str) -> Any:
    """One of Atlas's JSON files, by name under `data/`."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class World:
    """Everything Atlas knows, in a fixed order."""

    facts: tuple[Fact, ...]
    aliases: tuple[tuple[str, str], ...]  # (subject, alias)
    phrasings: dict[str, Phrasing]
    frames: dict[str, dict[str, list[str]]]
    filler: tuple[str, ...]
    updates: tuple[dict[str, str], ...] = field(repr=False)

    @cached_property
    def by_key(self) -> dict[tuple[str, str], Fact]:
        """Facts by (subject without article, relation)."""
        return {(link(f.subject), f.relation): f for f in self.facts}

    @cached_property
    def by_subject(self) -> dict[str, list[Fact]]:
        """Facts by subject without its article."""
        table: dict[str, list[Fact]] = {}
        for fact in self.facts:
            table.setdefault(link(fact.subject), []).append(fact)
        return table

    @cached_property
    def by_relation(self) -> dict[str, list[Fact]]:
        """Facts by relation."""
        table: dict[str, list[Fact]] = {}
        for fact in self.facts:
            table.setdefault(fact.relation, []).append(fact)
        return table

    @cached_property
    def objects(self) -> dict[str, list[str]]:
        """The distinct objects of each relation, sorted: what a counterfactual edit draws from."""
        return {r: sorted({f.object for f in fs}) for r, fs in self.by_relation.items()}

    @cached_property
    def compositions(self) -> tuple[Composition, ...]:
        """Every two-hop chain that Atlas states or holds out; a fixed half of those through a country."""
        return tuple(
            Composition(fact, second)
            for fact in self.facts
            for second in self.consequences(fact)
            if OBJECT_TYPE[fact.relation] != "country"
            or share("chain", fact.subject, fact.relation, second.relation) < 0.5
        )

    def consequences(self, fact: Fact) -> list[Fact]:
        """The facts that hang on this fact's object, one for each second hop that resolves."""
        hops = SECOND_HOPS.get(OBJECT_TYPE[fact.relation], ())
        found = (self.by_key.get((link(fact.object), hop)) for hop in hops)
        return [f for f in found if f is not None and link(f.object) != link(fact.subject)]

    def aliases_of(self, subject: str, mark: str | None = None) -> list[str]:
        """Other names of a subject; `mark` is `fit`, `probe` or None for both."""
        return [a for s, a in self.aliases if s == subject and mark in (None, alias_mark(a))]


def alias_mark(alias: str) -> str:
    """`fit` or `probe`, by hash."""
    return "fit" if share("alias", alias) < 0.6 else "probe"


@lru_cache(maxsize=1)
def load_world() -> World:
    """Read every table (cached: the tables are constants of the package)."""
    facts = []
    for table in sorted((DATA / "facts").iterdir(), key=lambda p: p.name):
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                subject = row.pop("subject")
                facts += [Fact(subject, relation, value) for relation, value in row.items() if value]
    phrasings = {
        relation: Phrasing(relation, p["noun"], p["cloze"], p["question"], p["inverse"])
        for relation, p in read_json("phrasings.json").items()
    }
    frames = read_json("frames.json")
    filler = tuple(frames.pop("filler"))
    frames = {name: {"fit": FRAMES[name], **marks} if name in FRAMES else marks for name, marks in frames.items()}
    with (DATA / "aliases.csv").open(encoding="utf-8", newline="") as file:
        aliases = tuple((row["subject"], row["alias"]) for row in csv.DictReader(file))
    updates = tuple(json.loads(line) for line in (DATA / "updates.jsonl").read_text(encoding="utf-8").splitlines())
    return World(tuple(sorted(facts)), aliases, phrasings, frames, filler, updates)
