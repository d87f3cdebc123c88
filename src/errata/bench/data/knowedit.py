"""KnowEdit: facts with portability and locality questions, biographies to rewrite, and answers to take out.

Source: Zhang et al. 2024 (EasyEdit's KnowEdit). Read are wiki_recent, wiki_counterfact and zsRE (one layout), WikiBio, and
Sanitation. ConvSent is not: it edits how something is spoken of, and no answer of it is right or wrong.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, field_validator

from errata.bench.cases import Case, Kind, Probe
from errata.bench.data.records import Numbered, Problem, Row, Stripped, form_of, read_rows, validated
from errata.edit import EditRequest
from errata.errors import RecordError

Truth = str | tuple[str | tuple[str, ...], ...]


class Question(Row):
    """A prompt and its answer: a name, a list of names of one answer, or a list of answers with their names."""

    prompt: str = Field(min_length=1)
    ground_truth: Truth

    @property
    def answers(self) -> tuple[tuple[str, ...], ...]:
        """The names of each answer, without empty ones."""
        truth = self.ground_truth
        if isinstance(truth, str):
            groups: tuple[tuple[str, ...], ...] = ((truth,),)
        elif all(isinstance(name, str) for name in truth):
            groups = (tuple(str(name) for name in truth),)
        else:
            groups = tuple((name,) if isinstance(name, str) else name for name in truth)
        named = (tuple(name.strip() for name in group if name.strip()) for group in groups)
        return tuple(group for group in named if group)


class FactRow(Row):
    """An edit of wiki_recent, wiki_counterfact or zsRE. The keys of portability and locality say what is asked."""

    subject: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    target_new: Stripped = Field(min_length=1)
    ground_truth: Truth | None = None
    rephrase_prompt: str | tuple[str, ...] | None = Field(
        None, validation_alias=AliasChoices("rephrase_prompt", "rephrase")
    )
    portability: dict[str, tuple[Question, ...]] = {}
    locality: dict[str, tuple[Question, ...]] = {}

    @field_validator("portability", "locality", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


class BiographyRow(Row):
    """A beginning of a biography and the sentence that should follow it."""

    concept: str = Field(min_length=1)
    text: str = Field(min_length=1)
    labels: str = Field(min_length=1)
    locality: dict[str, tuple[Question, ...]] = {}


class SecretQuestion(Row):
    """A question, what the model says, and what it should say."""

    question: str = Field(min_length=1)
    ground_truth: Truth | None = None
    target_new: str | None = None


class SanitationRow(Row):
    """An answer to take out, and the questions whose answers must stay."""

    success: SecretQuestion
    locality: tuple[SecretQuestion, ...] = ()


def read_knowedit(path: str | Path, problems: list[Problem]) -> Numbered[Row]:
    """Numbered records of whichever layout the file has."""
    whole = _object(Path(path))
    if whole is not None and "success" in whole:
        return [*validated(path, _sanitation(Path(path), whole), SanitationRow, problems)]
    rows = read_rows(Path(path), problems)
    first = rows[0][1] if rows and isinstance(rows[0][1], dict) else {}
    if "concept" in first and "labels" in first:
        return [*validated(path, rows, BiographyRow, problems)]
    return [*validated(path, rows, FactRow, problems)]


def knowedit_case(record: Any) -> Case:
    """A case of a row of any layout.

    Portability and locality probes are tagged with their `axis`. Locality expects what the unedited model says where the file has
    no answer; a portability question without one cannot be asked, is left out, and is named in the case's tag "unasked".
    """
    if isinstance(record, SanitationRow):
        return _secret(record)
    if isinstance(record, BiographyRow):
        return _biography(record)
    old = Question(prompt=record.prompt, ground_truth=record.ground_truth).answers if record.ground_truth else ()
    others = tuple(names[0] for names in old if names[0].casefold() != record.target_new.casefold())
    request = _request(record.subject, record.prompt, record.target_new, others[0] if others else None)
    rephrased = (record.rephrase_prompt,) if isinstance(record.rephrase_prompt, str) else record.rephrase_prompt or ()
    probes = [_probe("edit", record.prompt, (record.target_new,), others)]
    probes += [_probe("paraphrase", prompt, (record.target_new,), others) for prompt in rephrased if prompt.strip()]
    unasked = []
    for axis, questions in record.portability.items():
        for i, question in enumerate(questions):
            if question.answers:
                probes.append(_asked("portability", question, axis))
            else:
                unasked.append(f"{axis}:{i}")
    probes += [_asked("locality", q, axis) for axis, questions in record.locality.items() for q in questions]
    return Case("", request, tuple(probes), tags={"unasked": " ".join(unasked)} if unasked else {})


def _biography(record: BiographyRow) -> Case:
    subject = record.concept if record.text.count(record.concept) == 1 else None
    request = _request(subject, record.text, record.labels.strip(), None)
    stays = (_asked("locality", q, axis) for axis, questions in record.locality.items() for q in questions)
    return Case("", request, (_probe("edit", record.text, (record.labels.strip(),), ()), *stays))


def _secret(record: SanitationRow) -> Case:
    asked = record.success
    truth = Question(prompt=asked.question, ground_truth=asked.ground_truth).answers if asked.ground_truth else ()
    request = _request(None, asked.question, asked.target_new or "", truth[0][0] if truth else None)
    probes = [_probe("edit", asked.question, (request.target_new,), tuple(names[0] for names in truth))]
    for other in record.locality:
        answers = Question(prompt=other.question, ground_truth=other.ground_truth).answers if other.ground_truth else ()
        probes.append(_probe("locality", other.question, answers[0] if answers else (), ()))
    return Case("", request, tuple(probes))


def _request(subject: str | None, prompt: str, new: str, old: str | None) -> EditRequest:
    """The edit; a prompt that does not hold its subject exactly once is one without a subject."""
    if subject and prompt.count(subject) == 1:
        return EditRequest(subject=subject, prompt=prompt.replace(subject, "{}"), target_new=new, target_true=old)
    return EditRequest(prompt=prompt, target_new=new, target_true=old)


def _asked(kind: Literal["portability", "locality"], question: Question, axis: str) -> Probe:
    found = question.answers
    tags = {"form": form_of(question.prompt), "axis": axis} | ({"answers": str(len(found))} if len(found) > 1 else {})
    return Probe(kind, question.prompt, tuple(dict.fromkeys(n for names in found for n in names)), tags=tags)


def _probe(kind: Kind, prompt: str, expected: tuple[str, ...], alternatives: tuple[str, ...]) -> Probe:
    return Probe(kind, prompt, expected, alternatives, tags={"form": form_of(prompt)})


def _object(path: Path) -> dict[str, Any] | None:
    """The file's one JSON object, None if it is something else."""
    try:
        text = path.read_text(encoding="utf-8")
        whole = json.loads(text) if text.lstrip().startswith("{") else None
    except (OSError, ValueError):  # JSONL, or what `read_rows` will say is no file of rows
        return None
    return whole if isinstance(whole, dict) else None


def _sanitation(path: Path, whole: dict[str, Any]) -> list[tuple[int, Any]]:
    """One row for each answer to take out; the questions that must stay go to the rows in turn."""
    edits, stays = whole["success"], whole.get("locality") or []
    if not isinstance(edits, list) or not isinstance(stays, list) or not edits:
        raise RecordError(f"expected lists under 'success' and 'locality' in {path}; is the file whole?")
    return [(row, {"success": edit, "locality": stays[row - 1 :: len(edits)]}) for row, edit in enumerate(edits, 1)]
