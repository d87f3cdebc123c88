"""Facts to trace, as data: a prompt that a model completes, its subject, and the answer it should give."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errata.errors import RequestError
from errata.model.tokens import subject_span


@dataclass(frozen=True)
class KnownFact:
    """One fact: `prompt` names `subject` (the last occurrence counts) and ends where the answer begins.

    A `{}` in the prompt is replaced by the subject. attribute: the answer; without one the model's own is traced.
    Raises RequestError for an empty field, more than one `{}`, or a subject that comes again after the `{}`;
    SubjectNotFoundError if the prompt does not name the subject.
    """

    prompt: str
    subject: str
    attribute: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if (value is not None or name != "attribute") and (not isinstance(value, str) or not value.strip()):
                raise RequestError(
                    f"expected {name} to be a text, found {value!r}; every fact needs prompt and subject."
                )
        before, *after = self.prompt.split("{}")
        if len(after) > 1:
            raise RequestError(f"expected at most one '{{}}' in the prompt, found {len(after)} in {self.prompt!r}.")
        object.__setattr__(self, "prompt", self.prompt.replace("{}", self.subject))
        span = subject_span(self.prompt, self.subject)
        if after and span != (len(before), len(before) + len(self.subject)):
            raise RequestError(
                f"expected the subject {self.subject!r} once from the '{{}}' on, found it again in {self.prompt!r}; "
                "the last occurrence is the one that is traced."
            )

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "KnownFact":
        """A row with `prompt`, `subject` and perhaps `attribute`; other keys (known_1000 has some) do not count."""
        return cls(row.get("prompt", ""), row.get("subject", ""), row.get("attribute"))


def read_facts(path: str | Path) -> list[KnownFact]:
    """Facts from JSONL (one a line) or a JSON array of {prompt, subject, attribute?}, such as known_1000.

    Raises RequestError naming the file and the row.
    """
    facts = [_fact(path, number, row) for number, row in read_rows(path)]
    if not facts:
        raise RequestError(f"expected facts in {path}, found none; write one {{prompt, subject, attribute}} a line.")
    return facts


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, object) for each object of a JSONL file or a JSON array. Raises RequestError naming file and row."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the facts in {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, row in _rows(path, text):
        if not isinstance(row, dict):
            raise RequestError(f"{path}, row {number}: expected an object, found {type(row).__name__}.")
        yield number, row


def _rows(path: str | Path, text: str) -> Iterator[tuple[int, Any]]:
    whole = text.lstrip().startswith("[")
    lines = [(1, text)] if whole else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path}, {f'line {number}, ' if not whole else ''}is not valid JSON: {error}") from None
        yield from enumerate(value, 1) if whole else [(number, value)]


def _fact(path: str | Path, number: int, row: dict[str, Any]) -> KnownFact:
    try:
        return KnownFact.of(row)
    except ValueError as error:  # RequestError and SubjectNotFoundError
        raise RequestError(f"{path}, row {number}: {error}") from None
