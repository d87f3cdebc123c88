"""Tables that the docs take from the code: a part of a page between two marks."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"

Row = tuple[object, ...]


def table(head: Row, body: Iterable[Row]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *body))


@dataclass(frozen=True)
class Section:
    """What stands between the marks `begin` and `end` of docs/`page`, and what is to stand there."""

    page: str
    begin: str
    end: str
    made: Callable[[], str]

    def shown(self) -> str:
        """What the page shows."""
        return (DOCS / self.page).read_text(encoding="utf-8").split(self.begin)[1].split(self.end)[0].strip()

    def main(self, about: str) -> int:
        """The command line of a script: print the section, or with --write put it into the page."""
        parser = argparse.ArgumentParser(description=about.splitlines()[0])
        parser.add_argument("--write", action="store_true", help=f"put the tables into docs/{self.page}")
        if not parser.parse_args().write:
            print(self.made())
            return 0
        path = DOCS / self.page
        before, rest = path.read_text(encoding="utf-8").split(self.begin)
        path.write_text(
            f"{before}{self.begin}\n\n{self.made()}\n\n{self.end}{rest.split(self.end)[1]}", encoding="utf-8"
        )
        return 0
