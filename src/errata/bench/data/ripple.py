"""RippleEdits: what an edit entails and what it must leave alone, along six axes.

Source: Cohen et al. 2024; fields as in the published files. Two spellings are read that the published files and their reader use
besides: `Relation_Specifity`, and `previous_fact` for `original_fact`.

Differs in the cases made of the records: by our protocol a query with several answers is right with any of them, since a
whole-object answer can be only one (the published runner wants all of them somewhere in its long output, as `.ripple` does);
it is tagged with their number.
"""

import json
import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, model_validator

from errata.bench.cases import Case, Kind, Probe
from errata.bench.data.records import Answer, FieldError, NoEditError, Problem, Row, form_of, load_records
from errata.edit import EditRequest

Id = str | int
Axis = Literal[
    "Relation_Specificity",
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
    "Forgetfulness",
]
KINDS: dict[Axis, Kind] = {
    "Relation_Specificity": "relation_specificity",
    "Logical_Generalization": "logical_generalization",
    "Subject_Aliasing": "subject_aliasing",
    "Compositionality_I": "compositionality_i",
    "Compositionality_II": "compositionality_ii",
    "Forgetfulness": "forgetfulness",
}
IN_FIT, NOT_IN_FIT = "in the fit (another phrasing)", "not in the fit"


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
            subject = data.get("subject_id")  # a list in published entailments about the new object
            if isinstance(subject, list | tuple) and subject:
                single["subject_id"] = subject[0]
            return data | single
        return data

    @model_validator(mode="after")
    def _two_hops_have_two_relations(self) -> "RippleQuery":
        if self.query_type == "two_hop" and (self.second_relation is None or self.second_hop_target_ids is None):
            raise ValueError("a two_hop query needs second_relation and second_hop_target_ids")
        return self

    @property
    def is_answered(self) -> bool:
        """Whether there are answers, each with a name."""
        return bool(self.answers) and all(answer.names for answer in self.answers)


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
    return Field((), validation_alias=names, serialization_alias=axis)


class RippleRecord(Row):
    """One edit of RippleEdits with its tests along six axes, of which a file may lack some (the published facts that are new have
    no Forgetfulness).
    """

    example_type: str
    edit: RippleEdit
    relation_specificity: tuple[RippleTest, ...] = _tests("Relation_Specificity", "Relation_Specifity")
    logical_generalization: tuple[RippleTest, ...] = _tests("Logical_Generalization")
    subject_aliasing: tuple[RippleTest, ...] = _tests("Subject_Aliasing")
    compositionality_i: tuple[RippleTest, ...] = _tests("Compositionality_I")
    compositionality_ii: tuple[RippleTest, ...] = _tests("Compositionality_II")
    forgetfulness: tuple[RippleTest, ...] = _tests("Forgetfulness")

    @model_validator(mode="after")
    def _has_an_axis(self) -> "RippleRecord":
        if self.model_fields_set <= {"example_type", "edit"}:
            raise ValueError(f"expected tests under some of {', '.join(KINDS)}, found none of these fields")
        return self

    @property
    def key(self) -> str:
        """What tells the record from others: subject, relation and new object."""
        return json.dumps([self.edit.subject_id, self.edit.relation, self.edit.target_id], ensure_ascii=False)

    def axis(self, axis: Axis) -> tuple[RippleTest, ...]:
        """The tests of one axis."""
        found: tuple[RippleTest, ...] = getattr(self, axis.lower())
        return found


def load_ripple(path: str | Path, problems: list[Problem] | None = None) -> list[RippleRecord]:
    """The records of a RippleEdits file. Bad rows as in `load_records`."""
    return load_records(path, RippleRecord, problems)


def ripple_case(record: RippleRecord, request: EditRequest | None = None) -> Case:
    """A case of one record. request: the same edit with what may be used to fit it (Atlas's), else `ripple_request`'s.

    Each test is its conditions and its queries under one name. With a `request`, compositions and subject aliasing are tagged with
    their stratum: whether the request's implications hold the composition, or the alias (in whatever words). A query without an
    answer, or with one that has no name, cannot be asked; its test is left out and named in the case's tag "unasked".
    """
    edit = request or ripple_request(record)
    old = (edit.target_true,) if edit.target_true else ()
    probes = [Probe("edit", edit.text, (edit.target_new,), old, tags={"form": form_of(edit.text)})]
    unasked = []
    for axis, kind in KINDS.items():
        for i, test in enumerate(record.axis(axis)):
            name = f"{kind}:{i}"
            if not all(query.is_answered for query in (*test.test_queries, *test.condition_queries)):
                unasked.append(name)
                continue
            before = old if kind == "subject_aliasing" else ()
            probes += [_probe(kind, name, query, edit, condition=True) for query in test.condition_queries]
            joined: Literal["and", "or"] = "or" if test.test_condition == "OR" else "and"
            probes += [
                _probe(kind, name, query, edit, before, joined, strata=request is not None)
                for query in test.test_queries
            ]
    tags = {"relation": record.edit.relation} | ({"unasked": " ".join(unasked)} if unasked else {})
    return Case(record.key, edit, tuple(probes), tags=tags)


def _probe(
    kind: Kind,
    test: str,
    query: RippleQuery,
    edit: EditRequest,
    alternatives: tuple[str, ...] = (),
    joined: Literal["and", "or"] = "and",
    condition: bool = False,
    strata: bool = False,
) -> Probe:
    names = tuple(dict.fromkeys(name for answer in query.answers for name in answer.names))
    tags = {"relation": query.second_relation or query.relation, "form": form_of(query.prompt)}
    if len(query.answers) > 1:
        tags["answers"] = str(len(query.answers))
    if strata and kind in ("compositionality_i", "compositionality_ii"):
        tags["stratum"] = IN_FIT if _in_fit(query, edit) else NOT_IN_FIT
    if strata and kind == "subject_aliasing":
        tags["stratum"] = IN_FIT if _named_in_fit(query, edit) else NOT_IN_FIT
    answers = tuple(answer.names for answer in query.answers) if len(query.answers) > 1 else ()
    return Probe(kind, query.prompt, names, alternatives, test, joined, condition, tags, answers)


def _in_fit(query: RippleQuery, edit: EditRequest) -> bool:
    """Whether the chain from the query's subject through both relations is among the edit's implications."""
    chain = f"{query.second_relation} of {query.relation}"
    return any(i.relation == chain and _bare(i.subject) == _bare(query.subject_id) for i in edit.fit_implications)


def _named_in_fit(query: RippleQuery, edit: EditRequest) -> bool:
    """Whether the query calls the subject by a name under which the edit's implications state the relation."""
    names = {i.subject for i in edit.fit_implications if i.subject and i.relation == f"{query.relation} of {i.subject}"}
    return any(re.search(rf"(?<!\w){re.escape(_bare(name))}(?!\w)", query.prompt.casefold()) for name in names)


def _bare(name: str | None) -> str:
    return (name or "").casefold().removeprefix("the ")


# -- the edit of a published record --------------------------------------------------------------------------------------

# Where a statement of the published builder ends and its object begins.
_COPULA = re.compile(r"\b(is followed by|follows|is|are)\b")
_FRAME = frozenset(
    (
        "a",
        "an",
        "and",
        "are",
        "associated",
        "by",
        "does",
        "follows",
        "has",
        "in",
        "is",
        "name",
        "names",
        "of",
        "part",
        "that",
    )
    + ("the", "was", "which", "with", "won")
)


def ripple_request(record: RippleRecord) -> EditRequest:
    """The edit that a record states as a sentence and ids: "The name of the spouse of Ada Quill is Bo Reed.".

    Prompt and object are parted at the copula; where the object may hold one too, by what the sentence shares with the
    original fact's, or by a name that the aliasing tests expect. The subject is what the prompt shares with prompts about other
    relations of it, or what stands where the published statements have it; else the request has no subject, and methods that need
    one refuse it.
    Raises FieldError for a sentence without a copula, NoEditError for an object that was the original one's already.
    """
    edit = record.edit
    prompt, new = _parted(record)
    old = None
    if edit.original_fact:
        said = edit.original_fact.prompt.rstrip().removesuffix(".")
        old = said[len(prompt) :].strip() if said.startswith(prompt) else None
        if old and old.casefold() == new.casefold():
            raise NoEditError(
                "edit.original_fact", f"the object is {new!r} before and after, so there is nothing to write"
            )
    subject = _subject(record, prompt)
    return EditRequest(
        subject=subject,
        relation=edit.relation,
        prompt=prompt.replace(subject, "{}", 1) if subject else prompt,
        target_new=new,
        target_true=old or None,
    )


def _parted(record: RippleRecord) -> tuple[str, str]:
    """(prompt, new object) of the edit's sentence."""
    said = record.edit.prompt.strip().removesuffix(".")
    aliasing = (query for test in record.subject_aliasing for query in test.test_queries)
    for name in sorted({n for q in aliasing for a in q.answers for n in a.names}, key=len, reverse=True):
        if said.endswith(f" {name}"):
            return said[: -len(name)].rstrip(), name
    shared = said
    if record.edit.original_fact:
        old = record.edit.original_fact.prompt.strip().removesuffix(".")
        words = SequenceMatcher(None, said.split(" "), old.split(" "), autojunk=False).find_longest_match()
        if words.a == words.b == 0 and words.size:
            shared = " ".join(said.split(" ")[: words.size])
    found = [match.end() for match in _COPULA.finditer(shared) if said[match.end() :].strip()]
    if not found:
        message = f"expected a statement such as '... is X.', found {record.edit.prompt!r}; put the object behind 'is'"
        raise FieldError("edit.prompt", message)
    return said[: found[-1]], said[found[-1] :].strip()


def _subject(record: RippleRecord, prompt: str) -> str | None:
    """What prompts about the same subject have in common with this one, without the words that frame it."""
    edit, words = record.edit, prompt.split(" ")
    found = set()
    for test in (t for axis in KINDS for t in record.axis(axis)):
        for query in (*test.test_queries, *test.condition_queries):
            if query.subject_id != edit.subject_id or query.relation == edit.relation:
                continue
            frame = _FRAME | {w for r in (edit.relation, query.relation) for w in r.casefold().split("_")}
            others = query.prompt.split(" ")
            for block in SequenceMatcher(None, words, others, autojunk=False).get_matching_blocks():
                run = words[block.a : block.a + block.size]
                if block.a == block.b == 0 and run[:1] == ["The"]:
                    del run[0]  # of the sentence; the subject's own where it stands inside the other prompt
                while run and run[0] in frame:
                    run.pop(0)
                while run and run[-1] in frame:
                    run.pop()
                text = " ".join(run)
                if text not in ("", "The"):
                    found.add(text)
    named = [text for text in found if any(c.isupper() or c.isdigit() for c in text)] or list(found)
    return max(named, key=lambda text: (len(text), text), default=_stated(edit.relation, prompt))


def _stated(relation: str, prompt: str) -> str | None:
    """The subject as the published statements name it: "X follows", or behind "of" where only the relation's words come before."""
    if relation in ("FOLLOWS", "FOLLOWED_BY"):
        match = re.fullmatch(r"(.+?) (?:is followed by|follows)", prompt)
        return match[1] if match else None
    match = re.fullmatch(r"The ([a-z ]+) of ((?:the )?[A-Z0-9].*) (?:is|are)", prompt)
    own = {form for word in relation.casefold().split("_") for form in (word, f"{word}s")}
    return match[2] if match and set(match[1].split()) <= _FRAME | own else None
