"""zsRE in its two layouts, and the two things that have been made of it: a correction, and a counterfactual edit.

Source: Levy et al. 2017 as augmented by De Cao et al. 2021 (KILT's JSONL with `input`, `output`, `alternatives`) and as an array for
evaluation by Mitchell et al. 2022, used by ROME and MEMIT (`src`, `answers`, `alt`, `loc`).

target: "counterfactual" writes `alt` (or one of `alternatives`) over the true answer, as MEND and EasyEdit do; "correction" writes
the true answer over whatever the model says, as ROME and MEMIT do. Figures of the two do not compare.
"""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from errata.bench.cases import Case, Kind, Probe
from errata.bench.data.kilt import KiltRecord, Target, question_case, targets_of
from errata.bench.data.records import FieldError, Numbered, Problem, Row, Stripped, form_of, read_rows, validated
from errata.edit import EditRequest


class ZsreRow(Row):
    """A row of the evaluation array. `loc` is a question about something else, without its question mark."""

    subject: str = Field(min_length=1)
    src: str = Field(min_length=1)
    pred: Stripped = ""
    rephrase: str = Field(min_length=1)
    alt: Stripped = ""
    answers: tuple[Stripped, ...] = Field(min_length=1)
    loc: str = Field(min_length=1)
    loc_ans: Stripped = Field(min_length=1)
    cond: str = ""

    @field_validator("answers")
    @classmethod
    def _none_is_blank(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not any(value):
            raise ValueError("expected an answer, found blank ones")
        return tuple(answer for answer in value if answer)


def read_zsre(path: str | Path, problems: list[Problem]) -> Numbered[Row]:
    """Numbered records of either layout, told apart by the first row's fields."""
    rows = read_rows(Path(path), problems)
    kilt = bool(rows) and isinstance(rows[0][1], dict) and "input" in rows[0][1]
    if kilt:
        return [*validated(path, rows, KiltRecord, problems)]
    return [*validated(path, rows, ZsreRow, problems)]


def zsre_case(record: Any, target: Target = "counterfactual", seed: int = 0) -> Case:
    """A case of a row of either layout.

    The evaluation array's `{}` stands where the subject does first. Of several `alternatives` one is drawn by seed and id.
    Raises FieldError for an array's question without its subject, NoEditError for a counterfactual edit without another answer.
    """
    return question_case(record, target, seed) if isinstance(record, KiltRecord) else _array(record, target)


def _array(record: ZsreRow, target: Target) -> Case:
    named = re.search(re.escape(record.subject), record.src, re.IGNORECASE)
    if named is None:
        raise FieldError(
            "src", f"the question {record.src!r} does not name its subject {record.subject!r}; name it there"
        )
    new, old = targets_of(record.answers, record.alt, record.pred, target, "alt")
    request = EditRequest(
        subject=named[0],
        prompt=f"{record.src[: named.start()]}{{}}{record.src[named.end() :]}",
        target_new=new[0],
        target_true=old,
    )
    elsewhere = f"{record.loc.strip().removesuffix('?')}?"
    probes = (
        _probe("edit", record.src, new, old),
        _probe("paraphrase", record.rephrase, new, old),
        Probe("locality", elsewhere, (record.loc_ans,), tags={"form": "question"}),
    )
    return Case("", request, probes, tags={"target": target})


def _probe(kind: Kind, prompt: str, expected: tuple[str, ...], alternative: str | None) -> Probe:
    return Probe(kind, prompt, expected, (alternative,) if alternative else (), tags={"form": form_of(prompt)})
