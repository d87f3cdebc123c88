"""Print the tables of counts that stand in docs/atlas.md, from the tables that ship.

    PYTHONPATH=src python scripts/atlas_counts.py [--write]

`--write` puts them into the page, between its two marks; the tests fail when the page is behind.
"""

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from errata.atlas.corpus import Corpus
from errata.atlas.world import OBJECT_TYPE, World, alias_mark, link, load_world
from generated import Row, Section, table
from merge_fact_passes import REVIEW, merge

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "src" / "errata" / "atlas" / "data"


def counts() -> str:
    """The tables as Markdown."""
    world = load_world()
    parts = [
        table(("what", "number"), totals(world)),
        "By relation (objects: how many different ones):",
        table(
            ("relation", "object is a", "facts", "dev", "test", "objects", "fit + probe clozes", "updates"),
            relations(world),
        ),
        "By table:",
        table(("table", "rows", "cells", "cells dropped by the second pass"), files()),
        "Kinds of document in the corpus, by their weight when one is drawn:",
        table(("kind", "share", "what it is"), kinds(world)),
    ]
    return "\n\n".join(parts)


def totals(world: World) -> Iterator[Row]:
    splits = Counter(f.split for f in world.facts)
    marks = Counter(alias_mark(alias) for _, alias in world.aliases)
    held = sum(c.held_out for c in world.compositions)
    yield "facts", f"{len(world.facts)} ({splits['dev']} dev, {splits['test']} test)"
    yield "relations", len(world.by_relation)
    yield "subjects", len(world.by_subject)
    yield "aliases", f"{len(world.aliases)} ({marks['fit']} fit, {marks['probe']} probe)"
    yield "two-hop compositions", f"{len(world.compositions)} ({held} held out)"
    yield "updates", len(world.updates)
    yield "sentences of filler", len(world.filler)


def relations(world: World) -> Iterator[Row]:
    updates = Counter(u["relation"] for u in world.updates)
    for relation, facts in world.by_relation.items():
        splits = Counter(f.split for f in facts)
        cloze = world.phrasings[relation].cloze
        wordings = f"{len(cloze['fit'])} + {len(cloze['probe'])}"
        objects = len({link(f.object) for f in facts})
        yield (
            relation,
            OBJECT_TYPE[relation],
            len(facts),
            splits["dev"],
            splits["test"],
            objects,
            wordings,
            updates[relation] or "",
        )


def files() -> Iterator[Row]:
    for path in sorted((REVIEW / "first").glob("*.csv")):
        shipped = TABLES / path.name if path.name == "aliases.csv" else TABLES / "facts" / path.name
        with shipped.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        yield path.name, len(rows), sum(bool(cell) for row in rows for cell in row[1:]), len(merge(path.name)[1])
    first, kept = (
        len((folder / "updates.jsonl").read_text(encoding="utf-8").splitlines())
        for folder in (REVIEW / "first", TABLES)
    )
    yield "updates.jsonl", kept, kept, first - kept


def kinds(world: World) -> Iterator[Row]:
    listed = Corpus(world).kinds
    total = sum(weight for _, weight in listed)
    for write, weight in listed:
        yield write.__name__, f"{weight / total:.0%}", (write.__doc__ or "").strip().rstrip(".")


SECTION = Section("atlas.md", "<!-- counts: scripts/atlas_counts.py --write -->", "<!-- end of counts -->", counts)


if __name__ == "__main__":
    sys.exit(SECTION.main(__doc__ or ""))
