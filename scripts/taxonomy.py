"""Print the tables of docs/taxonomy.md, from what the editors say about themselves.

    PYTHONPATH=src python scripts/taxonomy.py [--write]

`--write` puts them into the page, between its two marks; the tests fail when the page is behind.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from errata.editors import available_editors, get_editor

PAGE = Path(__file__).resolve().parent.parent / "docs" / "taxonomy.md"
BEGIN, END = "<!-- methods: scripts/taxonomy.py --write -->", "<!-- end of methods -->"
PLACES, HOWS = ("external memory", "global optimisation", "local modification"), ("optimised", "direct")
ROLES = {"decoder": "decoder", "encoder-decoder": "encoder-decoder", "classifier": "encoder"}

Row = tuple[object, ...]


def methods() -> list[dict[str, Any]]:
    """The traits of the bundled editors, by name."""
    own = sorted(name for name, module in available_editors().items() if module.startswith("errata.editors."))
    return [get_editor(name).traits() for name in own]


def tables() -> str:
    """The tables as Markdown."""
    return "\n\n".join(
        [
            table(("", *HOWS), map_of(methods())),
            table(
                ("method", "what it is", "place", "how", "streams", "learns", "keeps out", *ROLES.values()),
                rows(methods()),
            ),
        ]
    )


def table(head: Row, body: Iterable[Row]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *body))


def map_of(found: list[dict[str, Any]]) -> Iterator[Row]:
    for place in PLACES:
        cells = ([m["method"] for m in found if (m["place"], m["how"]) == (place, how)] for how in HOWS)
        yield (f"**{place}**", *(", ".join(f"`{name}`" for name in cell) for cell in cells))


def rows(found: list[dict[str, Any]]) -> Iterator[Row]:
    for m in sorted(found, key=lambda m: (PLACES.index(m["place"]), HOWS.index(m["how"]), m["method"])):
        traits = ("yes" if m[name] else "" for name in ("streams", "learns", "scoped"))
        roles = ("yes" if role in m["supports"] else "" for role in ROLES)
        yield (f"`{m['method']}`", m["summary"], m["place"], m["how"], *traits, *roles)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/taxonomy.md")
    if not parser.parse_args().write:
        print(tables())
        return 0
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
