"""Opinions and their areas, as GRACE uses SCOTUS: a classifier's labels that shift over the years.

Source: Hartvigsen et al. 2023: columns `text` and `label` (the number of a topic); the split "train" is what the model was made
for (upstream), "test" the stream of edits, in its order. `year` and `rephrases` are ours: other wordings of the same case.
"""

from pathlib import Path

from pydantic import Field

from errata.bench.cases import Case, Probe
from errata.bench.data.records import Numbered, Problem, Row, read_records
from errata.edit import EditRequest


class ScotusRecord(Row):
    """One opinion and the number of its area."""

    text: str = Field(min_length=1)
    label: int = Field(ge=0)
    year: int | None = None
    rephrases: tuple[str, ...] = ()


def read_scotus(path: str | Path, problems: list[Problem]) -> Numbered[ScotusRecord]:
    """Numbered records of a file."""
    return read_records(path, ScotusRecord, problems)


def scotus_case(record: ScotusRecord) -> Case:
    """The case: its label, by number, is what the model is to say, of other wordings as well."""
    label = str(record.label)
    braces = record.text.replace("{}", "{ }")  # a prompt's place for a subject
    probes = [Probe("edit", braces, (label,)), *(Probe("paraphrase", text, (label,)) for text in record.rephrases)]
    tags = {} if record.year is None else {"year": str(record.year)}
    return Case("", EditRequest(prompt=braces, target_new=label), tuple(probes), tags=tags)
