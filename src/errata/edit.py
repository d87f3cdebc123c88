"""The correction itself: what a fact is, what it should become, and the texts that may be used to fit it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from errata.errors import RequestError
from errata.files import write_atomically

JUDGING = frozenset({"paraphrase_prompts", "neighborhood_prompts"})  # what only ever judges an edit


class Implication(BaseModel):
    """A prompt whose answer follows from the edited fact; `answer`, `subject` and `relation` where they are known.

    Implications with one relation and answer are phrasings of one thing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    prompt: str = Field(min_length=1)
    answer: str | None = None
    subject: str | None = None
    relation: str | None = None


class EditRequest(BaseModel):
    """One fact to write: (subject, relation, target_true) becomes (subject, relation, target_new).

    `prompt` has one `{}` where the subject stands (or the subject itself, which is then replaced), and no subject is needed
    for claims and questions without one; methods that need a subject refuse such a request by name. Targets are plain
    strings without a leading space. `fit_prompts` are full prompts that the new object completes and `fit_implications`
    full prompts whose answer follows: both may be used to fit. `paraphrase_prompts` (expected: target_new) and
    `neighborhood_prompts` (expected: the unedited answer) are only ever used to judge.

    Raises RequestError for anything that cannot be meant.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    prompt: str
    target_new: str
    subject: str | None = None
    target_true: str | None = None
    relation: str | None = None
    fit_prompts: tuple[str, ...] = ()
    fit_implications: tuple[Implication, ...] = ()
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    since: str | None = None
    source: str | None = None

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise RequestError(_sentence(error, data)) from None

    @field_validator("fit_implications", mode="before")
    @classmethod
    def _strings_are_prompts(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, (list, tuple)):
            raise ValueError(f"expected a list of prompts or objects, found {value!r}")
        return tuple({"prompt": v} if isinstance(v, str) else v for v in value or ())

    @field_validator("fit_prompts", "paraphrase_prompts", "neighborhood_prompts")
    @classmethod
    def _no_blank_prompts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not v.strip() for v in value):
            raise ValueError("a prompt in the list is empty; remove it")
        return value

    @model_validator(mode="before")
    @classmethod
    def _subject_stands_once(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(prompt := data.get("prompt"), str):
            return data
        subject, slots = data.get("subject"), prompt.count("{}")
        if subject is not None and not isinstance(subject, str):
            return data  # the field's own type check refuses it
        if subject is not None and not str(subject).strip():
            raise ValueError("the subject is empty; leave it out for a prompt without a subject")
        if subject and slots == 0 and prompt.count(subject) == 1:
            return data | {"prompt": prompt.replace(subject, "{}")}
        if subject and slots == 0:
            raise ValueError(
                f"the prompt {prompt!r} has no '{{}}' and does not name the subject {subject!r} exactly once; put one '{{}}' there"
            )
        if slots > 1:
            raise ValueError(f"the prompt {prompt!r} has {slots} '{{}}'; keep the one where the subject stands")
        if slots and not subject:
            raise ValueError(
                f"the prompt {prompt!r} has a '{{}}' but there is no subject to put there; give the subject"
            )
        return data

    @model_validator(mode="after")
    def _targets_differ(self) -> "EditRequest":
        if not self.prompt:
            raise ValueError("the prompt is empty")
        if not self.target_new:
            raise ValueError("target_new is empty; say what the model should answer")
        if self.target_true is not None and not self.target_true:
            raise ValueError("target_true is empty; leave it out to use the model's own answer")
        if self.target_true is not None and self.target_true.casefold() == self.target_new.casefold():
            raise ValueError(f"target_new and target_true are both {self.target_new!r}; there is nothing to edit")
        return self

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject or "")

    @property
    def key(self) -> str:
        """What the edit is about: subject (case and article aside) and relation, or prompt. Two edits with one key conflict.

        Without a subject it is the prompt alone: claims share a relation and are still about different things.
        """
        about = (self.subject or "").casefold().removeprefix("the ")
        relation = self.relation if about else None
        return json.dumps([about, relation or self.prompt.casefold()])

    @property
    def id(self) -> str:
        """Twelve hex digits of the SHA-256 over every field but those that only judge.

        `paraphrase_prompts` and `neighborhood_prompts` do not count: a fit never reads them, so an edit with other probes is
        the same edit.
        """
        return hashlib.sha256(self._json(without=JUDGING).encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """One line of JSON without the fields that are unset."""
        return self._json()

    def _json(self, without: frozenset[str] = frozenset()) -> str:
        values = self.model_dump(mode="json", exclude_defaults=True, exclude=set(without))
        return json.dumps(values, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_counterfact(cls, record: dict[str, Any]) -> "EditRequest":
        """A record of the CounterFact data set: its paraphrases and neighbours become probes, nothing becomes fit data."""
        try:
            rewrite = record["requested_rewrite"]
            return cls(
                subject=rewrite["subject"],
                prompt=rewrite["prompt"],
                relation=rewrite.get("relation_id"),
                target_new=rewrite["target_new"]["str"],
                target_true=rewrite["target_true"]["str"],
                paraphrase_prompts=record.get("paraphrase_prompts", ()),
                neighborhood_prompts=record.get("neighborhood_prompts", ()),
            )
        except (KeyError, TypeError) as error:
            raise RequestError(
                f"expected a CounterFact record, but {error} is missing in case {record.get('case_id', '?')}"
            ) from None


def _sentence(error: ValidationError, data: dict[str, Any]) -> str:
    """The first problem of a validation as one sentence."""
    problem = error.errors()[0]
    where = ".".join(str(p) for p in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        import difflib

        near = difflib.get_close_matches(where, EditRequest.model_fields, n=1)
        message = f"an edit request has no field {where!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        where = ""
    subject = data.get("subject")
    about = f" (request about {subject!r})" if subject else ""
    return f"{where + ': ' if where else ''}{message}{about}"


def read_requests(path: str | Path) -> list[EditRequest]:
    """Edit requests from JSONL (one a line) or a JSON array; rows may be edit requests or CounterFact records.

    Raises RequestError naming the file and the row.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot read the requests in {path}: {reason}") from None
    return [_row(path, number, row) for number, row in _rows(path, text)]


def _rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path} is not valid JSON: {error}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise RequestError(f"{path}, line {number}, is not valid JSON: {error}") from None


def _row(path: Path, number: int, row: Any) -> EditRequest:
    if not isinstance(row, dict):
        raise RequestError(f"{path}, row {number}: expected an object, found {type(row).__name__}")
    try:
        return EditRequest.from_counterfact(row) if "requested_rewrite" in row else EditRequest(**row)
    except RequestError as error:
        raise RequestError(f"{path}, row {number}: {error}") from None


def conflicts(requests: Iterable[EditRequest]) -> list[tuple[EditRequest, EditRequest]]:
    """(earlier, later) for requests about one thing: attached together the later one wins, but for edits of weights, which add up."""
    last: dict[str, EditRequest] = {}
    found = []
    for request in requests:
        if request.key in last:
            found.append((last[request.key], request))
        last[request.key] = request
    return found


def write_requests(path: str | Path, requests: Iterable[EditRequest]) -> None:
    """Write requests as JSONL, whole or not at all."""
    write_atomically(path, "".join(f"{request.to_json()}\n" for request in requests))
