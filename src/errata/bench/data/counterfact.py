"""CounterFact and multi-CounterFact: one rewrite, its paraphrases, and neighbours that must keep the old object.

Source: Meng et al. 2022 (CounterFact), Meng et al. 2023 (multi-CounterFact); fields as in the published files. Ours alone is
`portability_prompts`, which CounterFact lacks.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import AliasChoices, Field, model_validator

from errata.bench.cases import Case, Kind, Probe
from errata.bench.data.records import Answer, Numbered, Problem, Row, form_of, read_records, settle
from errata.bench.data.snippets import References
from errata.edit import EditRequest

if TYPE_CHECKING:
    from errata.bench.fluency import TfIdf


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

    @model_validator(mode="after")
    def _is_answered(self) -> "PortabilityPrompt":
        if not self.answer.names:
            raise ValueError("expected an answer with a name, found blank ones")
        return self


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

    @property
    def about(self) -> tuple[str, str]:
        """The relation and the new object, by their ids: what texts for consistency are about."""
        return self.requested_rewrite.relation_id, self.requested_rewrite.target_new.id or ""

    @property
    def fact(self) -> str:
        """What tells the edited fact from others: its subject and relation."""
        return json.dumps([self.requested_rewrite.subject.casefold(), self.requested_rewrite.relation_id])


def read_counterfact(path: str | Path, problems: list[Problem]) -> Numbered[CounterFactRecord]:
    """Numbered records. Two rows with one case_id are a problem of the later."""
    first: dict[int, int] = {}
    kept = []
    for number, record in read_records(path, CounterFactRecord, problems):
        seen = first.setdefault(record.case_id, number)
        if seen == number:
            kept.append((number, record))
        else:
            message = f"case_id {record.case_id} already stands in row {seen}; number the cases apart"
            problems.append(Problem(str(path), number, "case_id", message))
    return kept


def read_multi_counterfact(path: str | Path, problems: list[Problem]) -> Numbered[CounterFactRecord]:
    """As `read_counterfact`; a row that edits the (subject, relation) of an earlier one is a problem as well."""
    first: dict[str, int] = {}
    kept = []
    for number, record in read_counterfact(path, problems):
        rewrite = record.requested_rewrite
        seen = first.setdefault(record.fact, number)
        if seen == number:
            kept.append((number, record))
        else:
            message = (
                f"({rewrite.subject!r}, {rewrite.relation_id!r}) is edited in row {seen} too; "
                "multi-CounterFact has each subject and relation once"
            )
            problems.append(Problem(str(path), number, "requested_rewrite", message))
    return kept


def load_counterfact(path: str | Path, problems: list[Problem] | None = None) -> list[CounterFactRecord]:
    """The records of a CounterFact or multi-CounterFact file. Bad rows as in `load_records`."""
    found: list[Problem] = []
    rows = read_counterfact(path, found)
    settle(found, problems)
    return [record for _, record in rows]


def counterfact_case(
    record: CounterFactRecord,
    request: EditRequest | None = None,
    references: References | None = None,
    tfidf: "TfIdf | None" = None,
) -> Case:
    """A case of one record. request: the same edit with what may be used to fit it (Atlas's), else the record's own, with nothing.

    references, tfidf: the data set's texts for consistency, and what their words weigh in all of them. Neighbours expect the old
    object, with the new one as the alternative; attribute prompts the other way about.
    """
    rewrite = record.requested_rewrite
    new, old = rewrite.target_new.str_, rewrite.target_true.str_
    edit = request or record.request()
    probes = [_probe("edit", edit.text, new, old)]
    probes += [_probe("paraphrase", prompt, new, old) for prompt in record.paraphrase_prompts]
    probes += [_probe("neighborhood", prompt, old, new) for prompt in record.neighborhood_prompts]
    probes += [_probe("attribute", prompt, new, old) for prompt in record.attribute_prompts]
    probes += [Probe("generation", prompt) for prompt in record.generation_prompts]
    for i, asked in enumerate(record.portability_prompts):
        tags = {"relation": asked.relation, "form": asked.form}
        before = asked.answer_true.names[:1] if asked.answer_true else ()
        test = f"portability:{i}"
        condition = asked.condition_prompt
        probes += [
            Probe("portability", condition, asked.answer.names, test=test, joined="and", condition=True, tags=tags),
            Probe("portability", asked.prompt, asked.answer.names, before, test=test, tags=tags),
        ]
    texts = (references or {}).get(record.about, ())
    return Case(str(record.case_id), edit, tuple(probes), tuple(texts), {"relation": rewrite.relation_id}, tfidf)


def _probe(kind: Kind, prompt: str, expected: str, alternative: str) -> Probe:
    return Probe(kind, prompt, (expected,), (alternative,), tags={"form": form_of(prompt)})
