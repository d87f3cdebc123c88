"""Records of data sets: rows of JSON arrays or JSONL, validated one by one; a bad row is named, never dropped in silence.

Only shapes are checked here; whether an answer is right, or stands in its own prompt, is the question of `bench.data.faults`.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from errata.bench.cases import Case
from errata.errors import RecordError, RequestError
from errata.files import write_atomically

ProblemKind = Literal["row", "no edit", "conflict", "contradiction", "in prompt", "unasked", "condition"]

_SPACE = re.compile(r"\s*")

# An answer as it stands behind a prompt: published rows of zsRE and KnowEdit have it with the space between.
Stripped = Annotated[str, StringConstraints(strip_whitespace=True)]


class Row(BaseModel):
    """A record or a part of one. Unknown fields are passed over, but one that looks like a misspelt field is refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_misspelt(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {name for field, info in cls.model_fields.items() for name in _spellings(field, info.validation_alias)}
        unknown = [key for key in data if key not in names]
        for key in unknown:
            near = difflib.get_close_matches(str(key), names - set(data), n=1, cutoff=0.85)
            if near:
                raise ValueError(f"there is no field {key!r}; did you mean {near[0]!r}?")
        return data


class Answer(Row):
    """An answer and the other names that count as it. Blank names, with which every text begins, are dropped, and the first that is
    left is the value; the value is empty where none is.
    """

    value: str
    aliases: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _no_name_is_blank(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("aliases", ()), list | tuple) or "value" not in data:
            return data
        names = [n for n in (data["value"], *data.get("aliases", ())) if not (isinstance(n, str) and not n.strip())]
        return data | {"value": names[0] if names else "", "aliases": names[1:]}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, the value first; none of an answer without one."""
        return (self.value, *self.aliases) if self.value else ()


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set. row counts from 1 (in JSONL: the line), 0 where no row is meant; field is a dotted path,
    empty for the whole row. case and unit say which case and which of its tests (or "kind:index" of a probe).
    """

    path: str
    row: int
    field: str
    message: str
    kind: ProblemKind = "row"
    case: str = ""
    unit: str = ""

    @property
    def where(self) -> str:
        """File, row, field, case and unit, as far as they are meant."""
        parts = (
            self.path,
            f"row {self.row}" if self.row else "",
            f"field {self.field}" if self.field else "",
            f"case {self.case}" if self.case else "",
            self.unit,
        )
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class FieldError(RecordError):
    """A record that fits its schema and cannot be made into a case, because of one field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class NoEditError(FieldError):
    """A record that fits its schema and has nothing to write, as published files have some: it is left out, and counted."""


Record = TypeVar("Record", bound=Row)
Numbered = list[tuple[int, Record]]


def read_records(path: str | Path, kind: type[Record], problems: list[Problem]) -> Numbered[Record]:
    """Rows that fit, with their numbers; the others are added to `problems`, each with its first misfit.

    Raises RecordError for a file that cannot be read, or that is no JSON array or JSONL.
    """
    return validated(path, read_rows(Path(path), problems), kind, problems)


def load_records(path: str | Path, kind: type[Record], problems: list[Problem] | None = None) -> list[Record]:
    """The records of a file. Raises RecordError naming file, row and field of the first bad row and the number of others;
    or, if a list of `problems` is given, adds every bad row to it and returns the rest.
    """
    found: list[Problem] = []
    records = [record for _, record in read_records(path, kind, found)]
    settle(found, problems)
    return records


def write_records(path: str | Path, records: Iterable[Row]) -> None:
    """Write records as the loaders read them: JSONL if the path ends so, else a JSON array; whole or not at all."""
    rows = [json.dumps(r.model_dump(mode="json", by_alias=True), ensure_ascii=False) for r in records]
    lines = "".join(f"{row}\n" for row in rows)
    array = "[\n" + ",\n".join(rows) + "\n]\n"
    write_atomically(path, lines if Path(path).suffix == ".jsonl" else array)


def made(
    path: str | Path, rows: Numbered[Record], case: Callable[[Record], Case], problems: list[Problem]
) -> list[tuple[int, Case]]:
    """A numbered case of each record. Records whose edit cannot be meant go to `problems`, those without one as "no edit".

    A record without an id of its own (an empty one) gets its row's number; a second case of one id has it with its row
    behind, as in "z1#2".
    """
    cases: list[tuple[int, Case]] = []
    seen: set[str] = set()
    for row, record in rows:
        try:
            made = case(record)
        except (FieldError, RequestError) as error:
            sort: ProblemKind = "no edit" if isinstance(error, NoEditError) else "row"
            problems.append(Problem(str(path), row, getattr(error, "field", ""), str(error), sort))
            continue
        name = made.id or str(row)
        cases.append((row, replace(made, id=f"{name}#{row}" if name in seen else name)))
        seen.add(name)
    return cases


def settle(found: Sequence[Problem], problems: list[Problem] | None) -> None:
    """Hand problems over, or raise the first as a RecordError if nobody asked for them."""
    if problems is not None:
        problems.extend(found)
    elif found:
        more = f" ({len(found) - 1} more problems)" if len(found) > 1 else ""
        raise RecordError(f"{found[0]}; mend the row{more}.")


def validated(
    path: str | Path, rows: Iterable[tuple[int, Any]], kind: type[Record], problems: list[Problem]
) -> Numbered[Record]:
    """Numbered rows as records; misfits go to `problems`."""
    records = []
    for number, row in rows:
        try:
            records.append((number, kind.model_validate(row)))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            problems.append(Problem(str(path), number, where, _message(problem)))
    return records


def _message(problem: Any) -> str:
    if problem["type"] == "missing":
        return "the field is missing"
    said = str(problem["msg"])
    said = said.removeprefix("Value error, ") if problem["type"] == "value_error" else said[:1].lower() + said[1:]
    return said if problem["type"] == "value_error" else f"{said}, found {problem['input']!r:.60}"


def read_rows(path: Path, problems: list[Problem]) -> list[tuple[int, Any]]:
    """Numbered rows of a JSON array or of JSONL; a line that is no JSON is a problem. Raises RecordError for a bad file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read records from {path}: {getattr(error, 'strerror', None) or error}.") from None
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise RecordError(f"expected a JSON array in {path}, but {error}; is the file whole?") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                problems.append(Problem(str(path), number, "", f"expected one JSON object a line, but {error}"))
    return rows


def streamed_rows(path: Path, problems: list[Problem], size: int = 1 << 22) -> Iterator[tuple[int, Any]]:
    """As `read_rows`, for an array that is too large to be held: `size` characters of it at a time, or as many as a row takes."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(size)
            if text.lstrip().startswith("["):
                yield from _elements(file, text, path, size)
                return
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read records from {path}: {getattr(error, 'strerror', None) or error}.") from None
    yield from read_rows(path, problems)


def _elements(file: TextIO, text: str, path: Path, size: int) -> Iterator[tuple[int, Any]]:
    """The numbered elements of the JSON array that begins in the text and goes on in the file."""
    decoder, number, at, whole = json.JSONDecoder(), 1, text.index("[") + 1, False
    while True:
        begin = _behind_space(text, at)
        if number == 1 and text[begin : begin + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, begin)
            end = _behind_space(text, end)
            if text[end : end + 1] not in (",", "]"):  # what is there of a number may be a number too
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except json.JSONDecodeError as error:
            if whole:
                message = f"expected a JSON array in {path}, but {error.msg} in row {number}; is the file whole?"
                raise RecordError(message) from None
            more = file.read(max(size, len(text) - at))
            text, at, whole = text[at:] + more, 0, not more
            continue
        yield number, value
        if text[end] == "]":
            return
        number, at = number + 1, end + 1


def _behind_space(text: str, at: int) -> int:
    """Where the white space at a place ends."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _spellings(field: str, alias: Any) -> set[str]:
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias] if alias else []
    return {field, *(str(choice) for choice in choices)}


def form_of(prompt: str) -> str:
    """ "question" for a prompt with a question mark, else "cloze"."""
    return "question" if "?" in prompt else "cloze"
