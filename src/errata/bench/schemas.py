"""Records of published data sets, validated row by row: CounterFact with its attribute snippets, and RippleEdits.

Source: Meng et al. 2022 (CounterFact, multi-CounterFact), Cohen et al. 2024 (RippleEdits); fields as in the published
files. Files are JSON arrays or JSONL. Two spellings are read that the published files and their reader use besides:
`Relation_Specifity`, and `previous_fact` for `original_fact`. Ours alone is `portability_prompts`, which CounterFact lacks.
Only shapes are checked here; whether an answer is right, or stands in its own prompt, is another question.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from errata.edit import EditRequest
from errata.errors import RecordError
from errata.files import write_atomically

Id = str | int
Axis = Literal[
    "Relation_Specificity",
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
    "Forgetfulness",
]


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
    """An answer and the other names that count as it."""

    value: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, the value first."""
        return (self.value, *self.aliases)


# -- CounterFact ---------------------------------------------------------------------------------------------------------


class Target(Row):
    """An object: its text, without a leading space, and its id."""

    str_: str = Field(validation_alias=AliasChoices("str", "str_"), serialization_alias="str", min_length=1)
    id: str | None = None


class Rewrite(Row):
    """What a CounterFact record asks to be written. `prompt` has one `{}`, where the subject stands."""

    prompt: str
    relation_id: str
    target_new: Target
    target_true: Target
    subject: str = Field(min_length=1)

    @model_validator(mode="after")
    def _has_one_slot(self) -> "Rewrite":
        if self.prompt.count("{}") != 1:
            raise ValueError(f"expected a prompt with one '{{}}', found {self.prompt!r}")
        return self


class PortabilityPrompt(Row):
    """A prompt whose answer follows from the edit through its new object.

    answer_true: what followed through the old object, None if unknown. relation: the second hop, (new object, relation).
    The condition is a prompt about the new object itself, with the same answer: what the model must know for it to follow.
    """

    prompt: str = Field(min_length=1)
    answer: Answer
    answer_true: Answer | None = None
    relation: str
    form: Literal["cloze", "question"] = "cloze"
    condition_prompt: str = Field(min_length=1)


class CounterFactRecord(Row):
    """One record of CounterFact or multi-CounterFact."""

    case_id: int
    pararel_idx: int | None = None
    requested_rewrite: Rewrite
    paraphrase_prompts: tuple[str, ...]
    neighborhood_prompts: tuple[str, ...]
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...]
    portability_prompts: tuple[PortabilityPrompt, ...] = ()

    def request(self) -> EditRequest:
        """The edit, with its judging prompts and no fit data. Raises RequestError for an edit that changes nothing."""
        return EditRequest.from_counterfact(self.model_dump(mode="json", by_alias=True))


class Snippet(Row):
    """A reference text about one entity. `name` is the entity's."""

    name: str
    text: str = Field(min_length=1)


class SnippetGroup(Row):
    """The reference texts about entities whose `relation_id` is `target_id`: what consistency is measured against."""

    relation_id: str
    target_id: str
    samples: tuple[Snippet, ...] = Field(min_length=1)


# -- RippleEdits ---------------------------------------------------------------------------------------------------------


class RippleQuery(Row):
    """A prompt and its answers, every one of which must be given (under any of its names).

    A two-hop query starts at (subject_id, relation) -> target_ids and goes on with second_relation; `answers` are the
    second hop's. `phrase` is the explicit wording, None where the published builder words the prompt by its template.
    """

    prompt: str = Field(min_length=1)
    answers: tuple[Answer, ...]
    query_type: Literal["regular", "two_hop"]
    subject_id: str
    relation: str
    target_ids: tuple[Id, ...]
    phrase: str | None = None
    second_relation: str | None = None
    second_hop_target_ids: tuple[Id, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _single_ids_are_lists(cls, data: Any) -> Any:
        if isinstance(data, dict):
            single = {k: (data[k],) for k in ("target_ids", "second_hop_target_ids") if isinstance(data.get(k), Id)}
            return data | single
        return data

    @model_validator(mode="after")
    def _two_hops_have_two_relations(self) -> "RippleQuery":
        if self.query_type == "two_hop" and (self.second_relation is None or self.second_hop_target_ids is None):
            raise ValueError("a two_hop query needs second_relation and second_hop_target_ids")
        return self


class RippleTest(Row):
    """Queries to the edited model, joined by OR or AND, run only if every condition holds on the unedited one."""

    test_queries: tuple[RippleQuery, ...] = Field(min_length=1)
    test_condition: Literal["OR", "AND"]
    condition_queries: tuple[RippleQuery, ...]


class RippleFact(Row):
    """A fact as a full sentence with its final dot, and as ids."""

    prompt: str = Field(min_length=1)
    subject_id: str
    relation: str
    target_id: Id


class RippleEdit(RippleFact):
    """The fact to be written; original_fact is what held before (None for facts that are new)."""

    original_fact: RippleFact | None = Field(
        None, validation_alias=AliasChoices("original_fact", "previous_fact"), serialization_alias="original_fact"
    )


def _tests(axis: Axis, *other_spellings: str) -> Any:
    names = AliasChoices(axis, axis.lower(), *other_spellings)
    return Field(validation_alias=names, serialization_alias=axis)


class RippleRecord(Row):
    """One edit of RippleEdits with its tests along six axes."""

    example_type: str
    edit: RippleEdit
    relation_specificity: tuple[RippleTest, ...] = _tests("Relation_Specificity", "Relation_Specifity")
    logical_generalization: tuple[RippleTest, ...] = _tests("Logical_Generalization")
    subject_aliasing: tuple[RippleTest, ...] = _tests("Subject_Aliasing")
    compositionality_i: tuple[RippleTest, ...] = _tests("Compositionality_I")
    compositionality_ii: tuple[RippleTest, ...] = _tests("Compositionality_II")
    forgetfulness: tuple[RippleTest, ...] = _tests("Forgetfulness")

    @property
    def key(self) -> str:
        """What tells the record from others: subject, relation and new object."""
        return json.dumps([self.edit.subject_id, self.edit.relation, self.edit.target_id], ensure_ascii=False)

    def axis(self, axis: Axis) -> tuple[RippleTest, ...]:
        """The tests of one axis."""
        found: tuple[RippleTest, ...] = getattr(self, axis.lower())
        return found


# -- files ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A row that does not fit. row counts from 1 (in JSONL: the line); field is a dotted path, empty for the whole row."""

    path: str
    row: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}{', field ' + self.field if self.field else ''}: {self.message}"


Record = TypeVar("Record", bound=Row)


def load_counterfact(path: str | Path, problems: list[Problem] | None = None) -> list[CounterFactRecord]:
    """The records of a CounterFact or multi-CounterFact file.

    Raises RecordError naming file, row and field of the first bad row and the number of others; or, if a list of `problems`
    is given, adds every bad row to it and returns the rest. Two rows with one case_id are a problem of the later.
    """
    path, found = Path(path), list[Problem]()
    rows = _validated(path, CounterFactRecord, found)
    first: dict[int, int] = {}
    records = []
    for number, record in rows:
        seen = first.setdefault(record.case_id, number)
        if seen == number:
            records.append(record)
        else:
            message = f"case_id {record.case_id} already stands in row {seen}; number the cases apart"
            found.append(Problem(str(path), number, "case_id", message))
    _settle(found, problems)
    return records


def load_ripple(path: str | Path, problems: list[Problem] | None = None) -> list[RippleRecord]:
    """The records of a RippleEdits file. Bad rows as in `load_counterfact`."""
    return _load(path, RippleRecord, problems)


def load_snippets(path: str | Path, problems: list[Problem] | None = None) -> list[SnippetGroup]:
    """The groups of an attribute-snippet file. Bad rows as in `load_counterfact`."""
    return _load(path, SnippetGroup, problems)


def write_records(path: str | Path, records: Iterable[Row]) -> None:
    """Write records as the loaders read them: JSONL if the path ends so, else a JSON array; whole or not at all."""
    rows = [json.dumps(r.model_dump(mode="json", by_alias=True), ensure_ascii=False) for r in records]
    lines = "".join(f"{row}\n" for row in rows)
    array = "[\n" + ",\n".join(rows) + "\n]\n"
    write_atomically(path, lines if Path(path).suffix == ".jsonl" else array)


def _load(path: str | Path, kind: type[Record], problems: list[Problem] | None) -> list[Record]:
    found: list[Problem] = []
    records = [record for _, record in _validated(Path(path), kind, found)]
    _settle(found, problems)
    return records


def _settle(found: Sequence[Problem], problems: list[Problem] | None) -> None:
    if problems is not None:
        problems.extend(found)
    elif found:
        more = f" ({len(found) - 1} more problems)" if len(found) > 1 else ""
        raise RecordError(f"{found[0]}; mend the row{more}.")


def _validated(path: Path, kind: type[Record], problems: list[Problem]) -> list[tuple[int, Record]]:
    """Rows that fit, with their numbers; the others are added to `problems`, each with its first misfit."""
    records = []
    for number, row in _rows(path, problems):
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


def _rows(path: Path, problems: list[Problem]) -> list[tuple[int, Any]]:
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


def _spellings(field: str, alias: Any) -> set[str]:
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias] if alias else []
    return {field, *(str(choice) for choice in choices)}
