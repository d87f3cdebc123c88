"""zsRE in its two layouts, and the two things that have been made of it: a correction, and a counterfactual edit.

Source: Levy et al. 2017 as augmented by De Cao et al. 2021 (KILT's JSONL with `input`, `output`, `alternatives`) and as an array for
evaluation by Mitchell et al. 2022, used by ROME and MEMIT (`src`, `answers`, `alt`, `loc`).

target: "counterfactual" writes `alt` (or one of `alternatives`) over the true answer, as MEND and EasyEdit do; "correction" writes
the true answer over whatever the model says, as ROME and MEMIT do. Figures of the two do not compare.
"""

import random
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from errata.bench.cases import Case, Kind, Probe
from errata.bench.data.records import FieldError, Numbered, Problem, Row, form_of, read_rows, validated
from errata.edit import EditRequest

Mapping = Literal["counterfactual", "correction"]


class ZsreRow(Row):
    """A row of the evaluation array. `loc` is a question about something else, without its question mark."""

    subject: str = Field(min_length=1)
    src: str = Field(min_length=1)
    pred: str = ""
    rephrase: str = Field(min_length=1)
    alt: str = ""
    answers: tuple[str, ...] = Field(min_length=1)
    loc: str = Field(min_length=1)
    loc_ans: str = Field(min_length=1)
    cond: str = ""


class Provenance(Row):
    """Where an answer was found; `title` is the page about the subject."""

    title: str | None = None


class KiltOutput(Row):
    """An answer; KILT has outputs with a provenance alone."""

    answer: str | None = None
    provenance: tuple[Provenance, ...] = ()


class KiltRow(Row):
    """A line of the KILT layout. prediction: the base model's; alternatives: other answers that one may write."""

    id: str
    input: str = Field(min_length=1)
    output: tuple[KiltOutput, ...] = Field(min_length=1)
    prediction: str | None = None
    alternatives: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    filtered_rephrases: tuple[str, ...] = ()

    @field_validator("output")
    @classmethod
    def _is_answered(cls, value: tuple[KiltOutput, ...]) -> tuple[KiltOutput, ...]:
        if not any(output.answer for output in value):
            raise ValueError("expected an output with an answer, found none")
        return value

    @property
    def answers(self) -> tuple[str, ...]:
        """The true answers."""
        return tuple(dict.fromkeys(output.answer for output in self.output if output.answer))

    @property
    def subject(self) -> str | None:
        """The title of a page that stands once in the question: the layout has no field for the subject."""
        titles = (p.title for output in self.output for p in output.provenance if p.title)
        return next((title for title in titles if self.input.count(title) == 1), None)


def read_zsre(path: str | Path, problems: list[Problem]) -> Numbered[Row]:
    """Numbered records of either layout, told apart by the first row's fields."""
    rows = read_rows(Path(path), problems)
    kilt = bool(rows) and isinstance(rows[0][1], dict) and "input" in rows[0][1]
    if kilt:
        return [*validated(path, rows, KiltRow, problems)]
    return [*validated(path, rows, ZsreRow, problems)]


def zsre_case(record: Any, target: Mapping = "counterfactual", seed: int = 0) -> Case:
    """A case of a row of either layout.

    The evaluation array's `{}` stands where the subject does first. Of several `alternatives` one is drawn by seed and id.
    Raises FieldError for an array's question without its subject, and for a counterfactual edit without another answer.
    """
    return _kilt(record, target, seed) if isinstance(record, KiltRow) else _array(record, target)


def _array(record: ZsreRow, target: Mapping) -> Case:
    at = record.src.casefold().find(record.subject.casefold())
    if at < 0:
        raise FieldError(
            "src", f"the question {record.src!r} does not name its subject {record.subject!r}; name it there"
        )
    end = at + len(record.subject)
    new, old = _targets(record.answers, record.alt, record.pred, target, "alt")
    request = EditRequest(
        subject=record.src[at:end],
        prompt=f"{record.src[:at]}{{}}{record.src[end:]}",
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


def _kilt(record: KiltRow, target: Mapping, seed: int) -> Case:
    others = [a for a in record.alternatives if a and a.casefold() not in {x.casefold() for x in record.answers}]
    alternative = random.Random(f"{seed}|{record.id}|{record.input}").choice(others) if others else ""
    new, old = _targets(record.answers, alternative, record.prediction or "", target, "alternatives")
    subject = record.subject
    prompt = record.input.replace(subject, "{}") if subject else record.input
    request = EditRequest(subject=subject, prompt=prompt, target_new=new[0], target_true=old)
    asked = [p for p in dict.fromkeys(record.filtered_rephrases or record.rephrases) if p.strip() and p != record.input]
    probes = (_probe("edit", record.input, new, old), *(_probe("paraphrase", prompt, new, old) for prompt in asked))
    return Case(record.id, request, probes, tags={"target": target})


def _targets(
    answers: tuple[str, ...], alternative: str, prediction: str, target: Mapping, field: str
) -> tuple[tuple[str, ...], str | None]:
    """(names of the new object, the old one if it is known)."""
    if target == "correction":
        known = prediction if prediction.casefold() not in {a.casefold() for a in answers} else ""
        return answers, known.strip() or None
    if not alternative.strip():
        raise FieldError(field, "there is no other answer to write; ask for target=correction, or leave the row out")
    return (alternative,), answers[0]


def _probe(kind: Kind, prompt: str, expected: tuple[str, ...], alternative: str | None) -> Probe:
    return Probe(kind, prompt, expected, (alternative,) if alternative else (), tags={"form": form_of(prompt)})
