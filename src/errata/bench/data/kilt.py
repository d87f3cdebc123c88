"""FEVER and zsRE in the KILT form that KnowledgeEditor, MEND and GRACE read: one claim or question a line, with rephrases.

Source: Petroni et al. 2021 (KILT), augmented by De Cao et al. 2021 with what a base model says (`prediction`, `logit`), other
answers (`alternatives`) and back-translations (`rephrases`; `filtered_rephrases` are those that the base model answers as it
answers the input). What another model says is filled in by `annotated`.

Differs from the published use: of several `alternatives` one is drawn by seed and id; an edit's own input is no rephrase of it.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from errata.bench.cases import Case, Probe
from errata.bench.data.records import FieldError, NoEditError, Numbered, Problem, Row, Stripped, form_of, read_records
from errata.edit import EditRequest

FEVER_LABELS = ("REFUTES", "SUPPORTS")
Target = Literal["counterfactual", "correction"]


class Provenance(Row):
    """Where an answer was found; `title` is the page about the subject."""

    title: str | None = None


class KiltOutput(Row):
    """A right answer; of a claim SUPPORTS or REFUTES. KILT has outputs with a provenance alone."""

    answer: Stripped | None = None
    provenance: tuple[Provenance, ...] = ()


class KiltMeta(Row):
    """The questions that a record was made from."""

    template_questions: tuple[str, ...] = ()


class Unrelated(Row):
    """An input that an edit of the record must leave alone, and its right answer (ours; published files have none)."""

    input: str
    answer: Stripped


class KiltRecord(Row):
    """One claim or question.

    prediction: what the unedited model says. alternatives: what an edit may make of it (the other class of a claim).
    filtered_rephrases: those of `rephrases` that the unedited model answers as it answers the input; None where no model was
    asked, empty where it answers none so. logit: of SUPPORTS over REFUTES, nats.
    """

    id: str
    input: str = Field(min_length=1)
    output: tuple[KiltOutput, ...] = Field(min_length=1)
    meta: KiltMeta = KiltMeta()
    rephrases: tuple[str, ...] = ()
    prediction: Stripped | None = None
    alternatives: tuple[Stripped, ...] = ()
    filtered_rephrases: tuple[str, ...] | None = None
    logit: float | None = None
    unrelated: tuple[Unrelated, ...] = ()

    @field_validator("output")
    @classmethod
    def _is_answered(cls, value: tuple[KiltOutput, ...]) -> tuple[KiltOutput, ...]:
        if not any(output.answer for output in value):
            raise ValueError("expected an output with an answer, found none")
        return value

    @property
    def answers(self) -> tuple[str, ...]:
        """The right answers."""
        return tuple(dict.fromkeys(output.answer for output in self.output if output.answer))

    @property
    def subject(self) -> str | None:
        """The title of a page that stands once in the input: the layout has no field for the subject."""
        titles = (p.title for output in self.output for p in output.provenance if p.title)
        return next((title for title in titles if self.input.count(title) == 1), None)

    @property
    def asked_again(self) -> tuple[str, ...]:
        """Rephrases that judge an edit: what the filter left, all where there was none; without the input itself."""
        texts = self.rephrases if self.filtered_rephrases is None else self.filtered_rephrases
        return tuple(text for text in dict.fromkeys(texts) if text.strip() and text != self.input)


def read_kilt(path: str | Path, problems: list[Problem]) -> Numbered[KiltRecord]:
    """Numbered records of a KILT file."""
    return read_records(path, KiltRecord, problems)


def question_case(record: KiltRecord, target: Target = "counterfactual", seed: int = 0) -> Case:
    """A question as a case: a counterfactual edit to an alternative, or a correction to the right answer.

    Raises NoEditError for a counterfactual edit without another answer.
    """
    others = [a for a in record.alternatives if a and a.casefold() not in {x.casefold() for x in record.answers}]
    drawn = random.Random(f"{seed}|{record.id}|{record.input}").choice(others) if others else ""
    new, old = targets_of(record.answers, drawn, record.prediction or "", target, "alternatives")
    subject = record.subject
    prompt = record.input.replace(subject, "{}") if subject else record.input
    request = EditRequest(subject=subject, prompt=prompt, target_new=new[0], target_true=old)
    other = (old,) if old else ()
    probes = [Probe("edit", record.input, new, other, tags={"form": form_of(record.input)})]
    probes += [Probe("paraphrase", text, new, other, tags={"form": form_of(text)}) for text in record.asked_again]
    probes += [Probe("locality", u.input, (u.answer,), tags={"form": form_of(u.input)}) for u in record.unrelated]
    return Case(record.id, request, tuple(probes), tags={"target": target})


def targets_of(
    answers: tuple[str, ...], alternative: str, prediction: str, target: Target, field: str
) -> tuple[tuple[str, ...], str | None]:
    """(names of the new object, the old one if it is known). Raises NoEditError if there is no other answer to write."""
    if target == "correction":
        known = prediction if prediction.casefold() not in {a.casefold() for a in answers} else ""
        return answers, known or None
    if not alternative:
        raise NoEditError(field, "there is no other answer to write; target=correction would write the right one")
    if alternative.casefold() in {a.casefold() for a in answers}:
        message = f"{alternative!r} is a right answer, so there is nothing to write; target=correction would write it"
        raise NoEditError(field, message)
    return (alternative,), answers[0]


def claim_case(record: KiltRecord) -> Case:
    """A claim as a case: the edit turns the model's verdict (`prediction`, else the right one) round.

    Raises FieldError for an answer, a prediction or an alternative that is no class.
    """
    for field, names in (
        ("output", record.answers),
        ("prediction", (record.prediction,) if record.prediction else ()),
        ("alternatives", record.alternatives),
    ):
        if wrong := [name for name in names if name not in FEVER_LABELS]:
            raise FieldError(field, f"expected {' or '.join(FEVER_LABELS)}, found {wrong[0]!r}")
    said = record.prediction or record.answers[0]
    new = other_class(said)
    if record.alternatives and new not in record.alternatives:
        raise FieldError("alternatives", f"expected {new}, the other class than the prediction, found {said}")
    probes = [Probe("edit", record.input, (new,), (said,))]
    probes += [Probe("paraphrase", text, (new,), (said,)) for text in record.asked_again]
    probes += [Probe("locality", u.input, (u.answer,), (other_class(u.answer),)) for u in record.unrelated]
    return Case(record.id, EditRequest(prompt=record.input, target_new=new, target_true=said), tuple(probes))


def other_class(label: str) -> str:
    """REFUTES for SUPPORTS and the other way round."""
    return FEVER_LABELS[label == FEVER_LABELS[0]]


def annotated(model: Any, tokenizer: Any, records: Sequence[KiltRecord]) -> list[KiltRecord]:
    """The records with what this model says: prediction, alternatives other than it, filtered rephrases, logit of a claim.

    Records that are left without an alternative are dropped, as in the published files.
    """
    from errata.model.generate import greedy_answers
    from errata.model.labels import label_logits, label_names

    texts = [text for r in records for text in (r.input, *r.rephrases)]
    answers = iter(greedy_answers(model, tokenizer, texts))
    logits: Mapping[str, float] = {}
    if any(answer in FEVER_LABELS for record in records for answer in record.answers):
        refutes, supports = (label_names(model).index(name) for name in FEVER_LABELS)
        scores = label_logits(model, tokenizer, [r.input for r in records])
        logits = dict(zip((r.id for r in records), (scores[:, supports] - scores[:, refutes]).tolist(), strict=True))
    found = []
    for record in records:
        said = next(answers)
        kept = tuple(text for text in record.rephrases if next(answers) == said)
        others = [other_class(said)] if record.id in logits else [a for a in record.alternatives if a != said]
        if others:
            update = {"prediction": said, "alternatives": tuple(others), "filtered_rephrases": kept}
            found.append(record.model_copy(update=update | {"logit": logits.get(record.id)}))
    return found
