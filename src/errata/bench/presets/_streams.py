"""What the two streaming presets share: GRACE's baselines by name, and where the edits' other wordings end."""

from collections.abc import Sequence
from dataclasses import replace

from errata.bench.cases import Case, Probe
from errata.bench.methods import MODEL
from errata.bench.preset import Method

FEW = 200  # edits of a stream of what stands beside GRACE: as the paper's 1,000, a multiple of the edits between retrainings
MOST_WORDINGS = 2  # of a past edit that are asked at every look
# Our label -> the name in the paper's table.
NAMES = {
    "grace": "GRACE", "ft": "FT", "ft-ewc": "FT+EWC", "ft-retrain": "FT+Retrain", "mend": "MEND", "defer": "Defer",
    "memory": "Memory", "rome": "ROME",
}  # fmt: skip


def methods() -> tuple[Method, ...]:
    """The paper's methods, and GRACE as published. The others, which cost two to twelve times as much, end after fewer edits on Atlas."""
    return (
        Method("grace", "grace", "stream", MODEL),
        Method("grace-published", "grace", "stream", "published", most=FEW),
        Method("ft", "ft", "stream", "grace", most=FEW),
        Method("ft-ewc", "ft_ewc", "stream", MODEL, most=FEW),
        Method("ft-retrain", "ft_retrain", "stream", MODEL, most=FEW),
        Method("mend", "mend", "stream", most=FEW),
        Method("defer", "defer", "stream", MODEL, most=FEW),
        Method("memory", "memory", "stream", MODEL, most=FEW),
        Method("rome", "rome", "stream", MODEL, most=FEW),
    )


def few_wordings(case: Case) -> Case:
    """The case with its own prompt and the first other wordings, spread over all that it has."""
    others = [probe for probe in case.probes if probe.kind == "paraphrase"]
    step = max(1, len(others) // MOST_WORDINGS)
    kept: list[Probe] = [probe for probe in case.probes if probe.kind == "edit"]
    return replace(case, probes=(*kept, *others[::step][:MOST_WORDINGS]))


def upstream(pairs: Sequence[tuple[str, str]]) -> list[Probe]:
    """(prompt, right answer) pairs as what the model was made for."""
    return [Probe("upstream", prompt, (answer,)) for prompt, answer in pairs]
