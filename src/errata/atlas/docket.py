"""The docket: invented case summaries by issue area, over years in which the areas' definitions shift.

In the manner of GRACE's use of SCOTUS: a classifier learns the early years, and late years bring cases of topics that have
moved to another area since. `data/docket.json` holds ten areas and sixty topics; half of the topics move,
in some year between 1990 and 2000. A case is a heading with invented parties and the year, its matter in one of the topic's
wordings, what happened below, and the holding; only the matter says which topic it is, and only topic and year make the area.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from errata.atlas.names import ENDINGS, SYLLABLES
from errata.atlas.world import Mark, Split, read_json, share
from errata.bench.data.scotus import ScotusRecord

EARLY, LATE = range(1950, 1990), range(1990, 2020)  # years: upstream, edit stream
MARKS: tuple[Mark, ...] = ("fit", "probe")


@dataclass(frozen=True)
class Topic:
    """What a case may be about. history: (first year, area), oldest first. matter: wordings by mark, with `{a}` and `{b}`."""

    name: str
    history: tuple[tuple[int, str], ...]
    matter: dict[str, list[str]]

    def area(self, year: int) -> str:
        """The area that the topic belongs to in a year."""
        return [area for since, area in self.history if since <= year][-1]

    @property
    def split(self) -> Split:
        """`dev` for choices, `test` for figures; by topic."""
        return "dev" if share("docket", self.name) < 0.45 else "test"


@dataclass(frozen=True)
class Docket:
    """Areas, topics, and the frames that all cases share."""

    areas: tuple[str, ...]
    topics: tuple[Topic, ...]
    frames: dict[str, list[str]]

    def cases(
        self, seed: int, n: int, years: range = EARLY, marks: Sequence[str] = MARKS, split: Split | None = None
    ) -> Iterator["DocketCase"]:
        """`n` cases of random topics and years, worded by wordings of these marks; a pure function of the arguments."""
        rng = random.Random(seed)
        topics = [t for t in self.topics if split in (None, t.split)]
        for _ in range(n):
            topic, year = rng.choice(topics), rng.choice(years)
            mark = rng.choice([m for m in marks for _ in topic.matter[m]])
            a, b = party(rng), party(rng)
            heading, matter = rng.choice(self.frames["heading"]), rng.choice(topic.matter[mark])
            rest = [rng.choice(self.frames[name]) for name in ("below", "holding") if rng.random() < 0.8]
            names = {"a": a, "b": b, "year": str(year), "n": str(rng.randint(1, 900))}
            yield DocketCase((heading, matter, *rest), names, year, topic, mark, self)


@dataclass(frozen=True)
class DocketCase:
    """One case. parts: the heading, the matter, what may follow, as templates; names: what stands in them; mark: the matter's."""

    parts: tuple[str, ...]
    names: Mapping[str, str]
    year: int
    topic: Topic
    mark: str
    docket: Docket

    @property
    def text(self) -> str:
        """The case as it is read."""
        return " ".join(part.format(**self.names) for part in self.parts)

    def reworded(self, mark: Mark) -> list["DocketCase"]:
        """The same case with its matter in each other wording of a mark."""
        heading, own, *rest = self.parts
        others = (matter for matter in self.topic.matter[mark] if matter != own)
        return [replace(self, parts=(heading, matter, *rest), mark=mark) for matter in others]

    @property
    def area(self) -> str:
        """The right label: the topic's area in the case's year."""
        return self.topic.area(self.year)

    @property
    def label(self) -> int:
        """Number of the area."""
        return self.docket.areas.index(self.area)

    def record(self, rephrased: Mark | None = None) -> ScotusRecord:
        """The case in the published schema; with its wordings of a mark as rephrases."""
        others = tuple(case.text for case in self.reworded(rephrased)) if rephrased else ()
        return ScotusRecord(text=self.text, label=self.label, year=self.year, rephrases=others)


def party(rng: random.Random) -> str:
    """An invented name."""
    return "".join([*rng.choices(SYLLABLES, k=rng.choice((1, 2))), rng.choice(ENDINGS)]).capitalize()


@lru_cache(maxsize=1)
def load_docket() -> Docket:
    """Read the docket (cached: it is a constant of the package)."""
    data: dict[str, Any] = read_json("docket.json")
    topics = (Topic(t["topic"], tuple((y, area) for y, area in t["history"]), t["matter"]) for t in data["topics"])
    return Docket(tuple(data["areas"]), tuple(topics), data["frames"])


def upstream(n: int = 1000, *, seed: int = 0) -> list[DocketCase]:
    """Cases of the early years that no training saw: what a model must go on knowing (TRR)."""
    return list(load_docket().cases(2_000_000_000 + seed, n))


def edit_stream(n: int = 1000, *, split: Split | None = None, seed: int = 0, mark: Mark = "fit") -> list[DocketCase]:
    """Cases of the late years in their order: what a streaming editor is given. mark: `probe` for what judges past edits."""
    cases = load_docket().cases(3_000_000_000 + seed, n, LATE, (mark,), split)
    return sorted(cases, key=lambda case: case.year)
