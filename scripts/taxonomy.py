"""Print the tables of docs/taxonomy.md, from what the editors say about themselves.

    PYTHONPATH=src python scripts/taxonomy.py [--write]

`--write` puts them into the page, between its two marks; the tests fail when the page is behind.
"""

import sys
from collections.abc import Iterator
from typing import Any

from errata.editors import available_editors, get_editor
from generated import Row, Section, table

PLACES, HOWS = ("external memory", "global optimisation", "local modification"), ("optimised", "direct")
ROLES = {"decoder": "decoder", "encoder-decoder": "encoder-decoder", "classifier": "encoder"}


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


def map_of(found: list[dict[str, Any]]) -> Iterator[Row]:
    for place in PLACES:
        cells = ([m["method"] for m in found if (m["place"], m["how"]) == (place, how)] for how in HOWS)
        yield (f"**{place}**", *(", ".join(f"`{name}`" for name in cell) for cell in cells))


def rows(found: list[dict[str, Any]]) -> Iterator[Row]:
    for m in sorted(found, key=lambda m: (PLACES.index(m["place"]), HOWS.index(m["how"]), m["method"])):
        traits = ("yes" if m[name] else "" for name in ("streams", "learns", "scoped"))
        roles = ("yes" if role in m["supports"] else "" for role in ROLES)
        yield (f"`{m['method']}`", m["summary"], m["place"], m["how"], *traits, *roles)


SECTION = Section("taxonomy.md", "<!-- methods: scripts/taxonomy.py --write -->", "<!-- end of methods -->", tables)


if __name__ == "__main__":
    sys.exit(SECTION.main(__doc__ or ""))
