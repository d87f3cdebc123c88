"""known_1000: facts that a model knows, for causal tracing. They are no edits, so they become facts and not cases.

Source: Meng et al. 2022 (ROME), the published `known_1000.json`.
"""

from pathlib import Path

from pydantic import Field

from errata.bench.data.records import Problem, Row, read_records
from errata.errors import RequestError, SubjectNotFoundError
from errata.locate.facts import KnownFact


class KnownRow(Row):
    """A fact. prompt: full, ending where `attribute` begins; the other published fields are not read."""

    known_id: int | None = None
    subject: str = Field(min_length=1)
    attribute: str = Field(min_length=1)
    prompt: str = Field(min_length=1)


def known_facts(path: str | Path, problems: list[Problem]) -> list[tuple[int, KnownFact]]:
    """The facts of a file with their rows; rows that are none, a prompt without its subject among them, go to `problems`."""
    facts = []
    for row, record in read_records(path, KnownRow, problems):
        try:
            facts.append((row, KnownFact(record.prompt, record.subject, record.attribute)))
        except (RequestError, SubjectNotFoundError) as error:
            problems.append(Problem(str(path), row, "prompt", str(error)))
    return facts
