"""What is wrong with cases: answers that contradict each other or stand in their own prompts, conditions that fail.

SAKE (Scialanga et al. 2025) found such tests in RippleEdits Popular. A unit is a test, or a probe that belongs to none.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from errata.bench.cases import Case, Probe
from errata.bench.data.records import Problem
from errata.edit import conflicts
from errata.locate.facts import KnownFact

# Kinds whose answer is true with and without the edit, so that no other case may say otherwise.
STABLE = frozenset({"relation_specificity", "neighborhood", "attribute", "locality", "forgetfulness"})


def unit_of(probe: Probe, index: int) -> str:
    """The probe's test, or its kind and index."""
    return probe.test or f"{probe.kind}:{index}"


def check_cases(
    cases: Sequence[Case],
    path: str = "",
    model_data: tuple[Any, Any] | None = None,
    rows: Mapping[str, int] | None = None,
) -> list[Problem]:
    """Problems of well-formed cases, case by case; `model_data` (model, tokenizer, unedited) is asked the conditions.

    rows: of the file at `path`, by case.
    """
    found = [*_unasked(cases, path), *_in_prompt(cases, path), *_contradictions(cases, path), *_conflicts(cases, path)]
    if model_data:
        found += _failing(cases, path, *model_data)
    order = {case.id: i for i, case in enumerate(cases)}
    placed = (replace(problem, row=(rows or {}).get(problem.case, 0)) for problem in found)
    return sorted(placed, key=lambda problem: order[problem.case])


def check_facts(facts: Sequence[tuple[int, KnownFact]], path: str = "") -> list[Problem]:
    """Facts to trace, with their rows, whose answer stands in the prompt, or of which an earlier one with the same prompt says
    otherwise. A fact is known by its subject.
    """
    found, said = [], dict[str, str]()
    for row, fact in facts:
        answer = fact.attribute or ""
        if _stands_in(answer, fact.prompt):
            message = f"the answer {answer!r} stands in the prompt {fact.prompt!r}"
            found.append(Problem(path, row, "", message, "in prompt", fact.subject))
        other = said.setdefault(_words(fact.prompt), answer)
        if _words(other) != _words(answer):
            message = f"{fact.prompt!r} has two answers, {other!r} and {answer!r}"
            found.append(Problem(path, row, "", message, "contradiction", fact.subject))
    return found


def without(cases: Sequence[Case], problems: Iterable[Problem]) -> list[Case]:
    """The cases without the units that have a problem; a case whose edit has one is left out whole.

    Two edits of one fact are no problem of either: whether they may stand together is the run's question. A case's tag
    "dropped" counts its units that are gone.
    """
    faulty = {(problem.case, problem.unit) for problem in problems if problem.unit}
    kept = []
    for case in cases:
        named = [(unit_of(probe, i), probe) for i, probe in enumerate(case.probes)]
        gone = {unit for unit, _ in named if (case.id, unit) in faulty}
        if any(probe.kind == "edit" and unit in gone for unit, probe in named):
            continue
        left = tuple(probe for unit, probe in named if unit not in gone)
        tags = {**case.tags, "dropped": str(len(gone))} if gone else case.tags
        kept.append(replace(case, probes=left, tags=tags))
    return kept


def _unasked(cases: Sequence[Case], path: str) -> list[Problem]:
    return [
        Problem(
            path,
            0,
            "",
            "a query has no answer, or one without a name, so the test is not asked",
            "unasked",
            case.id,
            unit,
        )
        for case in cases
        for unit in case.tags.get("unasked", "").split()
    ]


def _in_prompt(cases: Sequence[Case], path: str) -> list[Problem]:
    found: dict[tuple[str, str], Problem] = {}
    for case in cases:
        for i, probe in enumerate(case.probes):
            name = next((name for name in probe.expected if _stands_in(name, probe.prompt)), None)
            if name is not None:
                message = f"the answer {name!r} stands in the prompt {probe.prompt!r}"
                key = case.id, unit_of(probe, i)
                found.setdefault(key, Problem(path, 0, "", message, "in prompt", *key))
    return list(found.values())


@dataclass(frozen=True)
class _Said:
    case: str
    unit: str
    names: tuple[str, ...]

    @property
    def words(self) -> frozenset[str]:
        return frozenset(map(_words, self.names))


def _contradictions(cases: Sequence[Case], path: str) -> list[Problem]:
    """Of one prompt: answers without a common name, inside an edited case, or anywhere among what no edit may change."""
    edited: dict[tuple[str, str], list[_Said]] = defaultdict(list)
    always: dict[str, list[_Said]] = defaultdict(list)
    for case in cases:
        for i, probe in enumerate(case.probes):
            if not probe.expected:
                continue
            said = _Said(case.id, unit_of(probe, i), probe.expected)
            if not probe.condition:
                edited[case.id, _words(probe.prompt)].append(said)
            # The published condition of aliasing asks for the new object, ours for the old one: neither is a fact apart.
            if probe.kind in STABLE or (probe.condition and probe.kind != "subject_aliasing"):
                always[_words(probe.prompt)].append(said)
    found: dict[tuple[str, str], Problem] = {}
    for prompt, group in [*((key[1], group) for key, group in edited.items()), *always.items()]:
        for said in group:
            other = next((o for o in group if not said.words & o.words), None)
            if other is not None:
                where = "" if other.case == said.case else f" in case {other.case}"
                message = f"{prompt!r} has two answers, {said.names[0]!r} and {other.names[0]!r} ({other.unit}{where})"
                found.setdefault(
                    (said.case, said.unit), Problem(path, 0, "", message, "contradiction", said.case, said.unit)
                )
    return list(found.values())


def _conflicts(cases: Sequence[Case], path: str) -> list[Problem]:
    names = {id(case.request): case.id for case in cases}
    return [
        Problem(
            path,
            0,
            "",
            f"case {names[id(a)]} edits the same fact, ({a.subject!r}, {a.relation or a.prompt!r}), to {a.target_new!r}",
            "conflict",
            names[id(b)],
        )
        for a, b in conflicts([case.request for case in cases])
    ]


def _failing(cases: Sequence[Case], path: str, model: Any, tokenizer: Any) -> list[Problem]:
    """Units with a condition that the model does not meet: no whole answer under any name, by greedy decoding."""
    from errata.bench.makers import with_old_objects
    from errata.model.generate import greedy, says
    from errata.model.tokens import token_ids

    asked = [asked for case in with_old_objects(model, tokenizer, cases) for asked in _conditions(case)]
    if not asked:
        return []
    prompts = list(dict.fromkeys(prompt for _, _, prompt, _ in asked))
    names = [f" {name}" for *_, expected in asked for name in expected]
    length = max(len(row) for row in token_ids(tokenizer, names, special=False)) + 2
    texts = dict(zip(prompts, greedy(model, tokenizer, prompts, max_new_tokens=length), strict=True))
    found: dict[tuple[str, str], Problem] = {}
    for case, unit, prompt, expected in asked:
        text = texts[prompt]
        if not any(says(text, name) for name in expected):
            message = f"the unedited model answers {prompt!r} with {text.strip()!r}, not {expected[0]!r}"
            found.setdefault((case, unit), Problem(path, 0, "", message, "condition", case, unit))
    return list(found.values())


def _conditions(case: Case) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(case, unit, prompt, names of what the unedited model must say) of what a case's tests rest on.

    As tables have it (`queries.Metric`): the published condition of subject aliasing asks the test's own question, whose answer
    is new; there the old object, the first alternative, must be known by that name instead.
    """
    probes = [(unit_of(probe, i), probe) for i, probe in enumerate(case.probes)]
    before = [(u, p) for u, p in probes if p.kind == "subject_aliasing" and not p.condition and p.alternatives]
    own = {(unit, probe.prompt) for unit, probe in before}
    asked = [
        (case.id, unit, probe.prompt, probe.expected)
        for unit, probe in probes
        if probe.condition and probe.expected and not (probe.kind == "subject_aliasing" and (unit, probe.prompt) in own)
    ]
    return asked + [(case.id, unit, probe.prompt, probe.alternatives[:1]) for unit, probe in before]


def _stands_in(name: str, prompt: str) -> bool:
    """Whether the name stands in the prompt, as whole words in any case."""
    bare = _words(name)
    return bool(bare) and f" {bare} " in f" {_words(prompt)} "


def _words(text: str) -> str:
    return " ".join(re.sub(r"\W+", " ", text.casefold()).split())
