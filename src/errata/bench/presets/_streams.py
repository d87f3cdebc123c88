"""What the two streaming presets share: GRACE's baselines by name, and where the edits' other wordings end."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from errata.bench.cases import Case, Probe
from errata.bench.preset import Method

MOST_WORDINGS = 2  # of a past edit that are asked at every look
# Our label -> the name in the paper's table.
NAMES = {
    "grace": "GRACE", "ft": "FT", "ft-ewc": "FT+EWC", "ft-retrain": "FT+Retrain", "mend": "MEND", "defer": "Defer",
    "memory": "Memory", "rome": "ROME",
}  # fmt: skip


def methods(changes: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Method, ...]:
    """The paper's methods, and GRACE as published. changes: options by label."""
    own = changes or {}
    found = (
        Method("grace", "grace", "stream", "model"),
        Method("grace-published", "grace", "stream", "published", most=300),
        Method("ft", "ft", "stream", "grace"),
        Method("ft-ewc", "ft_ewc", "stream"),
        Method("ft-retrain", "ft_retrain", "stream"),
        Method("mend", "mend", "stream"),
        Method("defer", "defer", "stream"),
        Method("memory", "memory", "stream"),
        Method("rome", "rome", "stream", "model"),
    )
    return tuple(replace(method, changes=dict(own.get(method.label, {}))) for method in found)


def few_wordings(case: Case) -> Case:
    """The case with its own prompt and the first other wordings, spread over all that it has."""
    others = [probe for probe in case.probes if probe.kind == "paraphrase"]
    step = max(1, len(others) // MOST_WORDINGS)
    kept: list[Probe] = [probe for probe in case.probes if probe.kind == "edit"]
    return replace(case, probes=(*kept, *others[::step][:MOST_WORDINGS]))


def upstream(pairs: Sequence[tuple[str, str]]) -> list[Probe]:
    """(prompt, right answer) pairs as what the model was made for."""
    return [Probe("upstream", prompt, (answer,)) for prompt, answer in pairs]
