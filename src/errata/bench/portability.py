"""Portability: does what follows from an edit follow? Probes, what the model says to them, and the figures.

Source: Jeong et al. 2025 (STEAM) and Yao et al. 2023 for the idea; the protocols are ours and named in full below. A probe's
answer follows from the edit through its new object ("the country of the city of ..."). Its condition asks the *unedited* model
for that fact about the new object itself: where it does not hold, the edit cannot be blamed. Figures are given over all probes
over those whose condition holds, and over those of them that the unedited model does not already pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from typing import Any, Literal

import numpy as np

from errata.bench.data.counterfact import CounterFactRecord
from errata.bench.data.ripple import RippleRecord
from errata.bench.forced import target_nll
from errata.bench.metrics import Rate, by_case, rate
from errata.bench.verify import or_reason
from errata.errors import RecordError
from errata.model.generate import greedy, says
from errata.model.tokens import token_ids

PROTOCOLS = {
    "portability.generate": "whole answer that follows from the new object, under any of its names, by greedy generation; "
    "mean over an edit's prompts, then over edits",
    "portability.prob": "answer after the edit more probable than the answer before it, strictly; probability of an answer "
    "= geometric mean over its tokens, teacher-forced; prompts whose answer before is known; mean over an edit's prompts, "
    "then over edits",
    "portability_magnitude.prob": "probability of the answer after the edit minus that of the answer before it; probability "
    "of an answer = geometric mean over its tokens, teacher-forced; prompts whose answer before is known; mean over an "
    "edit's prompts, then over edits; normal interval",
    "portability_target.prob": "probability of the answer after the edit = geometric mean over its tokens, teacher-forced; "
    "mean over an edit's prompts, then over edits",
    "portability_condition.generate": "whole answer to the fact about the new object itself, by greedy generation on the "
    "unedited model; mean over an edit's prompts, then over edits",
}

_NONE = "no probes"


@dataclass(frozen=True)
class Condition:
    """What the unedited model must know: a prompt and the names of its answer."""

    prompt: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class PortabilityProbe:
    """One consequence of one edit. case: the edit; names: the answer after the edit, under all names, the value first.

    before: the answer before the edit, if known. first, second: the relations of the chain.
    """

    case: str
    prompt: str
    names: tuple[str, ...]
    before: str | None
    first: str
    second: str
    form: Literal["cloze", "question", "given"]
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Outcome:
    """What a model did with a probe. text: its raw greedy continuation; nll_after, nll_before: nats per token."""

    probe: PortabilityProbe
    text: str
    answered: bool
    nll_after: float
    nll_before: float | None


def counterfact_probes(
    records: Sequence[CounterFactRecord], cases: Sequence[str] | None = None
) -> list[PortabilityProbe]:
    """The portability prompts of CounterFact records. cases: names of the records, by default their case ids."""
    return [
        PortabilityProbe(
            case,
            p.prompt,
            p.answer.names,
            p.answer_true.value if p.answer_true else None,
            record.requested_rewrite.relation_id,
            p.relation,
            p.form,
            (Condition(p.condition_prompt, p.answer.names),),
        )
        for case, record in _named(records, cases, lambda r: str(r.case_id))
        for p in record.portability_prompts
    ]


def ripple_probes(records: Sequence[RippleRecord], cases: Sequence[str] | None = None) -> list[PortabilityProbe]:
    """The Compositionality_I queries of RippleEdits records, each a probe; cases: by default the records' keys.

    Queries with more than one answer, or none, are not probes of this metric and are refused with a RecordError.
    """
    probes = []
    for case, record in _named(records, cases, lambda r: r.key):
        for test in record.compositionality_i:
            conditions = tuple(Condition(q.prompt, a.names) for q in test.condition_queries for a in q.answers)
            for query in test.test_queries:
                if len(query.answers) != 1:
                    raise RecordError(
                        f"expected one answer to {query.prompt!r}, found {len(query.answers)} (record {case}); "
                        f"score it with the RippleEdits metrics."
                    )
                second = query.second_relation or ""
                names = query.answers[0].names
                probes.append(
                    PortabilityProbe(case, query.prompt, names, None, query.relation, second, "given", conditions)
                )
    return probes


def conditions_hold(model: Any, tokenizer: Any, probes: Sequence[PortabilityProbe]) -> list[bool]:
    """Whether each probe's conditions all hold on this model, which must carry no patch. Each prompt is asked once."""
    asked = list(dict.fromkeys(c for p in probes for c in p.conditions))
    length = _longest(tokenizer, (c.names for c in asked))
    texts = greedy(model, tokenizer, [c.prompt for c in asked], max_new_tokens=length)
    holds = {c: any(says(text, name) for name in c.names) for c, text in zip(asked, texts, strict=True)}
    return [all(holds[c] for c in p.conditions) for p in probes]


def measure(model: Any, tokenizer: Any, probes: Sequence[PortabilityProbe]) -> list[Outcome]:
    """Ask the model, with whatever is attached to it, every probe: by generation and by probabilities."""
    prompts = [p.prompt for p in probes]
    texts = greedy(model, tokenizer, prompts, max_new_tokens=_longest(tokenizer, (p.names for p in probes)))
    after = target_nll(model, tokenizer, [(p.prompt, p.names[0]) for p in probes])
    known = [i for i, p in enumerate(probes) if p.before is not None]
    found = target_nll(model, tokenizer, [(probes[i].prompt, probes[i].before or "") for i in known])
    before = dict(zip(known, found, strict=True))
    return [
        Outcome(p, texts[i], any(says(texts[i], name) for name in p.names), after[i], before.get(i))
        for i, p in enumerate(probes)
    ]


def figures(
    outcomes: Sequence[Outcome], conditions: Sequence[bool] | None = None, unedited: Sequence[Outcome] | None = None
) -> dict[str, Any]:
    """Every metric by its name, as JSON values, over `all` probes; `known`: those whose condition holds; `open`: those of
    them that the unedited model does not pass by itself, as it may where Atlas does not say what the answer was.

    conditions: from `conditions_hold`; unedited: from `measure` on the unedited model; one for each outcome, in order. A
    metric without cases is {value: None, reason}. Also the condition's own rate, and the generation metric by edited relation,
    second relation and form.
    """
    report: dict[str, Any] = {"all": _metrics(outcomes), "n_probes": len(outcomes)}
    if unedited is not None and [o.probe for o in unedited] != [o.probe for o in outcomes]:
        raise RecordError(
            "expected the unedited model's outcomes of the same probes in the same order; measure them again."
        )
    if conditions is not None:
        name = "portability_condition.generate"
        known = [i for i, holds in zip(range(len(outcomes)), conditions, strict=True) if holds]
        held = rate(by_case((o.probe.case for o in outcomes), conditions).values(), _named_in_full(name))
        report |= {"known": _metrics([outcomes[i] for i in known]), "n_known": len(known), name: or_reason(held, _NONE)}
        if unedited is not None:
            still_open = [i for i in known if not unedited[i].answered]
            report |= {"open": _metrics([outcomes[i] for i in still_open]), "n_open": len(still_open)}
    for field in ("first", "second", "form"):
        values = sorted({str(getattr(o.probe, field)) for o in outcomes})
        report[f"by_{field}"] = {
            v: _metrics([o for o in outcomes if getattr(o.probe, field) == v])["portability.generate"] for v in values
        }
    return report


def case_scores(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """`portability.generate` of each case: what methods are compared by, case by case."""
    return by_case((o.probe.case for o in outcomes), (o.answered for o in outcomes))


def paired_difference(
    ours: Mapping[str, float], theirs: Mapping[str, float], protocol: str, *, seed: int = 0, draws: int = 10_000
) -> Rate:
    """Mean over cases of ours minus theirs, with a 95 % percentile bootstrap interval over cases.

    Source: Efron 1979. Raises RecordError if the two do not have the same cases (a failed case is a 0, not a gap) or none.
    """
    if set(ours) != set(theirs) or not ours:
        only = sorted(set(ours) ^ set(theirs))
        raise RecordError(
            f"expected the same cases on both sides, found {len(ours)} and {len(theirs)}"
            f"{f' (only on one: {only[0]})' if only else ''}; score every case for both methods."
        )
    difference = np.array([ours[case] - theirs[case] for case in sorted(ours)])
    rng, n = np.random.default_rng(seed), len(difference)
    means = [float(difference[rng.integers(0, n, n)].mean()) for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Rate(
        float(difference.mean()), float(low), float(high), n, f"paired difference, bootstrap over cases: {protocol}"
    )


def _metrics(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    pairs = [(o, o.nll_before) for o in outcomes if o.nll_before is not None]
    cases = [o.probe.case for o, _ in pairs]
    preferred = by_case(cases, (o.nll_after < before for o, before in pairs)).values()
    margin = _means(cases, (exp(-o.nll_after) - exp(-before) for o, before in pairs))
    target = _means([o.probe.case for o in outcomes], (exp(-o.nll_after) for o in outcomes))
    figure = {
        "portability.generate": rate(case_scores(outcomes).values(), _named_in_full("portability.generate")),
        "portability.prob": rate(preferred, _named_in_full("portability.prob")),
        "portability_magnitude.prob": _mean(margin, _named_in_full("portability_magnitude.prob")),
        "portability_target.prob": rate(target, _named_in_full("portability_target.prob")),
    }
    return {name: or_reason(value, _NONE) for name, value in figure.items()}


def _named_in_full(name: str) -> str:
    return f"{name}: {PROTOCOLS[name]}"


def _means(cases: Iterable[str], values: Iterable[float]) -> list[float]:
    found: dict[str, list[float]] = {}
    for case, value in zip(cases, values, strict=True):
        found.setdefault(case, []).append(value)
    return [sum(v) / len(v) for v in found.values()]


def _mean(values: Sequence[float], protocol: str) -> Rate | None:
    """Mean with 1.96 standard errors: for values outside [0, 1], where Wilson's interval does not apply."""
    if not values:
        return None
    mean, error = float(np.mean(values)), 1.959964 * float(np.std(values)) / sqrt(len(values))
    return Rate(mean, mean - error, mean + error, len(values), protocol)


def _longest(tokenizer: Any, names: Iterable[Sequence[str]]) -> int:
    """Tokens enough for the longest of all names, and for the token behind it that closes the answer."""
    texts = [f" {name}" for group in names for name in group if name]
    return max((len(row) for row in token_ids(tokenizer, texts, special=False)), default=8) + 2


def _named(records: Sequence[Any], cases: Sequence[str] | None, name: Callable[[Any], str]) -> list[tuple[str, Any]]:
    names = [name(record) for record in records] if cases is None else list(cases)
    if len(names) != len(records):
        raise RecordError(f"expected a name for each of {len(records)} records, found {len(names)}.")
    return list(zip(names, records, strict=True))
