"""Metrics: rates with their intervals. Every metric's name ends in its protocol.

`efficacy.generate` is ours: the whole object by greedy generation. Other endings are protocols of papers, by name, for comparison;
`errata.bench.glossary` maps the papers' letters to them. A metric is a judge of rows (`errata.bench.judges`) and a choice of
rows (`errata.bench.queries`).
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.bench import judges
from errata.bench.cases import STAY
from errata.bench.intervals import TINY, Array, Rate, Unit, bootstrap, means, wilson
from errata.bench.queries import Judge, Metric, PassRate, select
from errata.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from pandas import DataFrame

Stratum = tuple[str, str | Callable[[str], bool]]

PROTOCOL_EFFICACY = "efficacy.generate: whole new object, greedy, on the edit prompt"
PROTOCOL_GENERALIZATION = "generalization.generate: whole new object, greedy, on paraphrase prompts; mean over edits"
PROTOCOL_SPECIFICITY = "specificity.generate: unedited greedy answer kept on neighbouring prompts; mean over edits"
PROTOCOL_LOCALITY = "locality.bits: logits of unrelated texts bit-identical to the same batch without the patch"


def score(
    rows: "DataFrame", metric: str | Metric, method: str, *, edits: int | None = None, ungated: str | None = None,
    stratum: Stratum | None = None, seed: int = 0,
) -> Rate | None:  # fmt: skip
    """A metric of a method with its 95 % interval; None where nothing was asked, or no test's conditions hold.

    Bootstrap over cases; Wilson's for fewer than 20 cases, and where all cases agree at 0 or 1, of which a bootstrap would
    say that it is certain. edits, ungated: see `select`. stratum: a tag and its value, or a test
    of its value, of the tests that count.
    """
    chosen = metric_named(metric)
    selected = _asked(rows, chosen, method, edits, ungated)
    if selected is None:
        return None
    (sums,), (counts,), _ = _totals(chosen, [selected], stratum)
    parts = means(sums, counts)
    if np.isnan(parts).any():
        return None
    n, value = counts.shape[1], float(_combined(parts[:, None])[0])
    failed: tuple[str, ...] = ()
    if "failed" in selected:
        failed = tuple(sorted(set(selected.loc[selected["failed"].astype(bool) & (selected["case"] != ""), "case"])))
    settled = np.all((sums == 0) | (counts == 0), axis=1) | np.all(sums == counts, axis=1)
    if chosen.unit == "fraction" and (n < TINY or settled.all()):
        bounds = [wilson(float(p), int((c > 0).sum())) for p, c in zip(parts, counts, strict=True)]
        low, high = (float(_combined(np.array(side)[:, None])[0]) for side in zip(*bounds, strict=True))
        how = "Wilson" + (" of each term" if chosen.terms else "") + " over cases"
    else:
        low, high = bootstrap(n, lambda index: _combined(means(sums[:, index], counts[:, index])), seed)
        how = "bootstrap over cases"
    return Rate(value, low, high, n, chosen.protocol, how, failed, chosen.unit)


def difference(
    rows: "DataFrame", metric: str | Metric, a: str, b: str, *, edits: int | None = None, ungated: str | None = None,
    stratum: Stratum | None = None, seed: int = 0,
) -> Rate | None:  # fmt: skip
    """A metric of method a minus that of b, paired: the bootstrap draws the same cases for both.

    Where no case differs the bootstrap collapses, and the interval is what Wilson's leaves for the share of cases that do.
    Raises RecordError if the two were not asked the same cases (a metric that leaves out failed edits may differ in these).
    """
    chosen = metric_named(metric)
    ours, theirs = (_asked(rows, chosen, method, edits, ungated) for method in (a, b))
    if ours is None or theirs is None:
        return None
    (sums_a, sums_b), (counts_a, counts_b), cases = _totals(chosen, [ours, theirs], stratum)
    if not (counts_a.sum() and counts_b.sum()):
        return None
    odd = ((counts_a > 0) != (counts_b > 0)).any(0)
    if odd.any() and not (chosen.succeeded or chosen.terms):
        raise RecordError(
            f"{chosen.name}: {a} and {b} were not asked the same cases ({cases[int(odd.argmax())]!r} is of one alone); "
            "let the run finish."
        )

    def statistic(index: Any) -> Array:
        return _combined(means(sums_a[:, index], counts_a[:, index])) - _combined(
            means(sums_b[:, index], counts_b[:, index])
        )

    n = len(cases)
    value = float(statistic(np.arange(n)[None])[0])
    low, high = bootstrap(n, statistic, seed)
    how = "paired bootstrap over cases"
    if low == high and chosen.unit == "fraction" and abs(value) in (0.0, 1.0):
        share = wilson(abs(value), n)
        low, high = (-share[1], share[1]) if not value else (share[0], 1.0) if value > 0 else (-1.0, -share[0])
        how = "Wilson of the share of cases that differ"
    unit: Unit = "difference" if chosen.unit == "fraction" else chosen.unit
    return Rate(value, low, high, n, f"paired difference: {chosen.protocol}", how, unit=unit)


def by_tag(rows: "DataFrame", metric: str | Metric, method: str, tag: str, **options: Any) -> dict[str, Rate]:
    """The metric in each stratum: tests by the value of a tag, sorted, numbers by size. options: as of `score`."""
    chosen = metric_named(metric)
    kinds = {kind for term in _terms(chosen) for kind in term.kinds}
    values = {tags[tag] for tags in rows.loc[rows["kind"].isin(kinds), "tags"] if tag in tags}
    ordered = sorted(values, key=lambda v: (0, float(v), v) if v.replace(".", "", 1).isdigit() else (1, 0.0, v))
    found = {value: score(rows, chosen, method, stratum=(tag, value), **options) for value in ordered}
    return {value: rate for value, rate in found.items() if rate is not None}


def metric_named(metric: str | Metric) -> Metric:
    """A metric by its name. Raises ConfigError with near names."""
    if isinstance(metric, Metric):
        return metric
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, n=3, cutoff=0.4)
        raise ConfigError(f"no metric {metric!r}; did you mean {' or '.join(near) or 'one of METRICS'}?")
    return METRICS[metric]


def rate(outcomes: Iterable[float], protocol: str) -> Rate | None:
    """Mean of per-case outcomes in [0, 1] with a Wilson score interval over cases (sensible at 0 and 1); None without cases.

    Source: Wilson 1927. Cases, not probes, are the independent units, so n is the number of cases.
    """
    values = np.asarray(list(outcomes), dtype=float)
    if not len(values):
        return None
    p = float(values.mean())
    return Rate(p, *wilson(p, len(values)), len(values), protocol, "Wilson over cases")


def by_case(cases: Iterable[str], outcomes: Iterable[bool]) -> Mapping[str, float]:
    """Mean outcome of each case."""
    found: dict[str, list[bool]] = {}
    for case, outcome in zip(cases, outcomes, strict=True):
        found.setdefault(case, []).append(outcome)
    return {case: float(np.mean(o)) for case, o in found.items()}


# -- the metrics ---------------------------------------------------------------------------------------------------------

# Kinds whose expected answer is what the edit makes true (or leaves so): name, and where it is asked.
ANSWERS: dict[str, tuple[str, str]] = {
    "edit": ("efficacy", "on the edit's own prompt"),
    "paraphrase": ("generalization", "on paraphrases"),
    "compositionality_i": ("compositionality_i", "on chains that go on from the new object"),
    "compositionality_ii": ("compositionality_ii", "on chains through the edited subject"),
    "subject_aliasing": ("subject_aliasing", "on the edit's prompt under another name of the subject"),
    "relation_specificity": ("relation_specificity", "on other relations of the subject"),
    "logical_generalization": ("logical_generalization", "on facts that the edit entails"),
    "forgetfulness": ("forgetfulness", "on the other objects of a relation that has several"),
    "portability": ("portability", "on prompts whose answer follows through the new object"),
    "reverse": ("reverse", "on (inverse relation, new object), whose answer is the subject"),
    "doubt_i": ("doubt_i", "behind an objection (DI)"),
    "doubt_ii": ("doubt_ii", "behind a dialogue that takes the old object's side (DII)"),
    "context": ("context", "on the edit's prompt behind a long context"),
    "claim": ("claim", "on claims about the edit"),
    "locality": ("locality", "on unrelated questions"),
    "upstream": ("upstream", "on what the model was made for"),
}
RIPPLE = tuple(ANSWERS)[2:8]
# Kinds where the unedited answer should stay.
KEPT: dict[str, tuple[str, str]] = {
    "neighborhood": ("specificity", "on neighbouring prompts: same relation and old object, other subjects"),
    "other_relation": ("other_relations", "on other relations of the subject"),
    "attribute": ("attribute", "on subjects that have the new object already"),
    "locality": ("locality", "on unrelated questions"),
}
# What counts as right, beside ours. The last four are F.5's protocols, by the names that they have there.
PROTOCOLS: dict[str, tuple[Judge, str, str]] = {
    "first_token_prefix": (judges.first_token, "the object begins with the likeliest next token", "SAKE"),
    "f1": (judges.f1, "F1 of words, as bags, of the greedy answer (30 tokens, up to a natural stop) and the object", ""),
    "f1_set": (judges.f1_set, "F1 of distinct words of the same over lengths, an end of text included", "GRACE"),
    "teacher_forced_token": (judges.tokens, "share of the object's tokens that are likeliest, teacher-forced", "EasyEdit"),
    "teacher_forced_exact": (judges.exact, "every token of the object is likeliest, teacher-forced", "MEMIT"),
    "free_fixed_len": (judges.begins, "the greedy text begins with the object's letters, whatever follows", "EasyEdit"),
    "free_natural": (judges.natural, "the greedy answer (30 tokens, up to a natural stop) is the object, normalised", "Mirage"),
}  # fmt: skip
WHOLE_TEXT = ("f1", "f1_set", "free_natural")  # read on behind the object, as probes that should stay are not asked to
MEAN, HELD = "mean over an edit's tests, then over edits", "conditions hold on the unedited model"


def _made() -> "dict[str, Metric]":
    made: list[Metric] = []

    def add(name: str, text: str, *kinds: str, make: type[Metric] = Metric, **options: Any) -> None:
        made.append(make(name, f"{name}: {text}", kinds, **options))

    for kind, (name, where) in ANSWERS.items():
        ripple = kind in RIPPLE
        options: dict[str, Any] = {"alias": kind == "subject_aliasing"}
        if kind == "portability":
            options["conditions"] = "none"
        text = f"; {where}; {HELD}; {MEAN}" if ripple else f"; {where}; mean over edits"
        skipped = "; the unedited model knows the old object by the alias" if kind == "subject_aliasing" else ""
        if kind == "edit":
            made.append(Metric("efficacy.generate", PROTOCOL_EFFICACY, ("edit",)))
        elif kind == "paraphrase":
            made.append(Metric("generalization.generate", PROTOCOL_GENERALIZATION, ("paraphrase",)))
        elif kind != "locality":
            add(f"{name}.generate", f"whole object, greedy{text}{skipped}", kind, **options)
        for protocol, (judge, words, paper) in PROTOCOLS.items():
            if kind in STAY and protocol in WHOLE_TEXT:
                continue
            add(f"{name}.{protocol}", f"{words}{text}{skipped}", kind, judge=judge, paper=paper, **options)
        gate = judges.closed if kind in ("relation_specificity", "forgetfulness", "locality") else judges.own_open
        stays = "no gate is open" if gate is judges.closed else "the gate of the edit itself is open"
        add(f"{name}.gate", f"{stays} at the prompt's end; {where}", kind, judge=gate, conditions="none")
        if ripple or kind in ("portability", "reverse", "claim"):
            known = options | {"conditions": "all"}
            add(f"{name}_condition.generate", f"tests with conditions: {HELD}, whole object, greedy; {where}; {MEAN}",
                kind, make=PassRate, **known)  # fmt: skip
            add(f"{name}.generate_open", f"whole object, greedy; {where}; {HELD}; without tests that the unedited model "
                f"passes; {MEAN}{skipped}", kind, still_open=True, **known)  # fmt: skip
        if ripple:
            add(f"{name}.generate_succeeded", f"whole object, greedy, of edits that succeed on their own prompt{text}{skipped}",
                kind, succeeded=judges.whole, **options)  # fmt: skip
            add(f"{name}.ripple", "a name of every answer anywhere in prompt and 30 tokens of text (published: as many more as "
                f"the prompt has characters), of edits whose own prompt passes the same; {where}; {HELD}; {MEAN}", kind,
                judge=judges.contained, asks=judges.contained, succeeded=judges.contained, paper="RippleEdits")  # fmt: skip
    add("portability.generate_known", f"whole object, greedy; {HELD}; {MEAN}", "portability")

    sake: dict[str, Any] = {"paper": "SAKE", "pooled": True}
    code: dict[str, Any] = sake | {"conditions": "first", "asks": judges.token_of_first, "first": True,
                                   "succeeded": judges.preferred_first}  # fmt: skip
    won = "of edits whose new object's first token, space included (released: without it), beats the old one's"
    of_code = f"first query, first condition, first answer, prefix of one token; {won}; pooled"
    for kind in ("compositionality_i", "compositionality_ii"):
        add(f"{kind}.sake_code", of_code, kind, judge=judges.token_of_first, **code)
    add("relation_specificity.sake_code", f"the gate of the edit's own centre closed, or: {of_code}", "relation_specificity",
        judge=judges.relations_of_sake, own_gate=True, **code)  # fmt: skip
    add("subject_aliasing.sake_code", "prefix of one token, of aliases that the edit answers with its gate always open (a "
        f"circular filter: how often the gate opens); {won}; pooled", "subject_aliasing",
        judge=judges.alias_of_sake, **code | {"conditions": "none", "ungated": True})  # fmt: skip
    add("efficacy.sake_code", "prefix of one token, on the edit's own prompt", "edit", judge=judges.first_token, **sake)
    add("efficacy.sake_code_ripple", "prefix of one token, also of one of spaces alone, on RippleEdits' own prompt", "edit",
        judge=judges.first_token_or_none, **sake)  # fmt: skip
    add("generalization.sake_code", "prefix of one token, on paraphrases, pooled", "paraphrase",
        judge=judges.first_token, **sake)  # fmt: skip
    add("specificity.sake_code", "the gate of the edit's own centre closed, or the new object's first token less probable than "
        "the old one's; without neighbours where the unedited model prefers the new one; pooled", "neighborhood",
        judge=judges.specificity_of_sake, own_gate=True, **sake)  # fmt: skip

    for kind, (name, where) in KEPT.items():
        if kind == "neighborhood":
            made.append(Metric("specificity.generate", PROTOCOL_SPECIFICITY, ("neighborhood",), judges.kept))
        else:
            add(f"{name}.generate", f"unedited greedy answer kept; {where}; mean over edits", kind, judge=judges.kept)
        if kind != "locality":
            add(f"{name}.gate", f"no gate is open at the prompt's end; {where}", kind, judge=judges.closed)
    for protocol in ("first_token_prefix", "teacher_forced_token", "teacher_forced_exact"):
        judge, words, paper = PROTOCOLS[protocol]
        add(f"specificity.{protocol}", f"{words}, the old one; {KEPT['neighborhood'][1]}; mean over edits",
            "neighborhood", judge=judge, paper=paper)  # fmt: skip

    nll = "probability = geometric mean over the object's tokens, teacher-forced"
    for kind, name, which in (
        ("edit", "efficacy", "new object more probable than the old"),
        ("paraphrase", "generalization", "new object more probable than the old"),
        ("neighborhood", "specificity", "old object more probable than the new"),
        ("portability", "portability", "answer after the edit more probable than the answer before it"),
    ):
        more = "; prompts whose answer before is known" if kind == "portability" else ""
        paper = "" if kind == "portability" else "ROME"
        always: dict[str, Any] = {"conditions": "none", "paper": paper}
        add(f"{name}.prob", f"{which}, strictly; {nll}{more}; mean over an edit's prompts, then over edits", kind,
            judge=judges.preferred, **always)  # fmt: skip
        add(f"{name}_magnitude.prob", f"{which}, the difference of the two; {nll}{more}; mean over an edit's prompts, then "
            "over edits", kind, judge=judges.margin, unit="difference", **always)  # fmt: skip
    add("portability_target.prob", f"probability of the answer after the edit; {nll}; mean over an edit's prompts, then over "
        "edits", "portability", judge=judges.target, conditions="none")  # fmt: skip
    three = "efficacy, generalization and specificity"
    for protocol, paper in (("prob", "ROME"), ("generate", "")):
        add(f"score.{protocol}", f"harmonic mean of the data set's means of {three}, by {protocol}; 0 where one is 0",
            terms=tuple(f"{name}.{protocol}" for name in ("efficacy", "generalization", "specificity")),
            paper=paper)  # fmt: skip

    add("fluency.entropy", "a third of the 2-gram and two thirds of the 3-gram entropy, bits x 100; mean over an edit's "
        "texts, prompts included, then over edits", "generation", judge=judges.entropy, unit="points")  # fmt: skip
    add("consistency.tfidf", "cosine of TF-IDF vectors of all generated and all reference texts, x 100, words weighed over all "
        "of the data set's; mean over edits", "generation", judge=judges.consistency, unit="points")  # fmt: skip
    add("drawdown.nll", "nats per token by which running text becomes less probable than in the unedited model; mean over texts, of each "
        "edit where it is asked by itself",
        "unrelated", judge=judges.drawdown, unit="nats", better="lower")  # fmt: skip
    every = "over all facts that are neither edited nor entailed"
    add("collateral.generate", f"greedy answer changed; {every}", "fact", judge=judges.changed, better="lower")
    add("collateral_lost.generate", f"whole object no longer said; {every} and that the unedited model knew", "fact",
        judge=judges.lost, better="lower")  # fmt: skip
    add("collateral.gate", f"no gate is open at the prompt's end; {every}", "fact", judge=judges.closed)
    return {metric.name: metric for metric in made}


METRICS: dict[str, Metric] = _made()


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _terms(metric: Metric) -> list[Metric]:
    return [METRICS[name] for name in metric.terms] or [metric]


def _asked(
    rows: "DataFrame", metric: Metric, method: str, edits: int | None, ungated: str | None
) -> "DataFrame | None":
    """What the metric needs of a method's rows; None where the method has no such rows."""
    kinds = {kind for term in _terms(metric) for kind in (*term.kinds, *(("edit",) if term.succeeded else ()))}
    own = rows["method"] == method
    part = rows[rows["kind"].isin(kinds)] if own.any() else rows
    return (
        None
        if own.any() and not (part["method"] == method).any()
        else select(part, method, edits=edits, ungated=ungated)
    )


def _totals(
    metric: Metric, tables: "list[DataFrame]", stratum: Stratum | None
) -> tuple[list[Array], list[Array], list[str]]:
    """Of each table: sums and counts (terms, cases) whose ratio of totals is the figure; and the cases of all tables.

    A pooled metric sums and counts probes; any other sums the cases' means and counts cases.
    """
    import pandas as pd

    found: list[list[DataFrame]] = []
    for rows in tables:
        found.append([])
        for term in _terms(metric):
            outcomes = term.outcomes(rows)
            if stratum is not None:
                tag, value = stratum
                has = value if callable(value) else value.__eq__
                outcomes = outcomes[[tag in tags and has(tags[tag]) is True for tags in outcomes["tags"]]]
            grouped = outcomes.groupby("case")["value"]
            totals = grouped.agg(["sum", "count"]) if term.pooled else grouped.agg(["mean"]).assign(count=1)
            found[-1].append(totals.set_axis(["sum", "count"], axis=1))
    cases = sorted(set().union(*(set(totals.index) for table in found for totals in table)))
    index = pd.Index(cases, dtype=object)

    def column(table: "list[DataFrame]", name: str) -> Array:
        return np.stack([totals[name].reindex(index).fillna(0).to_numpy(float) for totals in table])

    return [column(t, "sum") for t in found], [column(t, "count") for t in found], cases


def _combined(parts: Array) -> Array:
    """Over the first axis: the only term, or the harmonic mean, which is 0 where a term is 0."""
    if len(parts) == 1:
        return parts[0]
    with np.errstate(divide="ignore"):
        return np.where((parts <= 0).any(0), 0.0, len(parts) / (1 / np.maximum(parts, 0)).sum(0))
