"""CompMEMIT: MEMIT fed with what follows from each edit as well, the composition baseline of SAKE (Scialanga et al. 2025).

Beside an edit's own prompt, each of its implications is a pair of its own in the same write, with the edit's id. The answer is
the implication's; where it has none, it is what the unedited model says when it is asked to suppose the edited fact. A pair is
written at the last token of the implication's subject; if that is not in its prompt, of the edit's subject; and if neither
is, at the prompt's last token, without the essence term, which is about a subject.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errata.edit import EditRequest, Implication
from errata.editors._value_search import ValueJob
from errata.editors.memit import MEMIT, MEMITConfig, Pairs
from errata.errors import ConfigError, SubjectNotFoundError
from errata.model.generate import greedy_answers
from errata.model.tokens import subject_span
from errata.prompts.contexts import supposed


@dataclass(frozen=True)
class CompMEMITConfig(MEMITConfig):
    """Settings of CompMEMIT: MEMIT's, and implications: how many of an edit's are written at most."""

    implications: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.implications < 0:
            raise ConfigError(f"expected implications of at least 0, found {self.implications}")


class CompMEMIT(MEMIT):
    """MEMIT with the implications of each edit."""

    method = "compmemit"
    summary = "MEMIT fed with each edit's prompt and its implications (baseline of Scialanga et al. 2025)"
    Config = CompMEMITConfig
    config: CompMEMITConfig

    def pairs(self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], contexts: Sequence[str]) -> Pairs:
        """A pair for each request, and one for each of its implications that has an answer."""
        pairs = super().pairs(model, tokenizer, requests, contexts)
        asked = [(r, i) for r in requests for i in r.fit_implications[: self.config.implications]]
        answers = self._answers(model, tokenizer, asked)
        for (request, implication), answer in zip(asked, answers, strict=True):
            note: dict[str, Any] = {"prompt": implication.prompt, "answer": answer or None}
            pairs.notes.setdefault(request.id, {"implications": []})["implications"].append(note)
            if implication.answer is None:
                note["answer_from"] = "the unedited model, supposing the edit"
            if not answer:
                note["skipped"] = "the model gives no answer under the new premise"
                continue
            job = _job(implication, answer, request, contexts)
            note["at"] = job.subject or "the prompt's last token"
            pairs.jobs.append(job)
            pairs.edits.append(request.id)
        return pairs

    def _answers(self, model: Any, tokenizer: Any, asked: Sequence[tuple[EditRequest, Implication]]) -> list[str]:
        """The answer to each implication; "" where there is none."""
        open_ = [(r, i) for r, i in asked if i.answer is None]
        supposing = [supposed(f"{r.text} {r.target_new}", i.prompt) for r, i in open_]
        found = iter(greedy_answers(model, tokenizer, supposing) if supposing else [])
        return [next(found) if i.answer is None else i.answer for _, i in asked]


def _job(implication: Implication, answer: str, request: EditRequest, contexts: Sequence[str]) -> ValueJob:
    prompt = implication.prompt
    for subject in (implication.subject, request.subject):
        if not subject:
            continue
        try:
            start, end = subject_span(prompt, subject)
        except SubjectNotFoundError:
            continue
        return ValueJob(f"{prompt[:start]}{{}}{prompt[end:]}", answer, prompt[start:end], tuple(contexts))
    return ValueJob(prompt, answer, None, tuple(contexts))
