"""Atlas's data sets as cases: records in the published schemas, made into cases as the published files are.

What the records lack is added: the request of each edit with its `fit` prompts and implications, so that methods can be fitted.
`bench.data` finds this module by name; benchmarks know nothing else of Atlas.
"""

import random
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Literal

from errata.atlas import render
from errata.atlas.counterfact import all_snippets, attribute_snippets, counterfact_records, counterfact_requests
from errata.atlas.docket import edit_stream
from errata.atlas.kilt import fever_records, zsre_records
from errata.atlas.requests import under_other_names, update_requests
from errata.atlas.ripple import bridge_implications, edited_fact, ripple_records, ripple_requests
from errata.atlas.world import Fact, Split, World, load_world
from errata.bench.cases import Case
from errata.bench.data.counterfact import counterfact_case
from errata.bench.data.kilt import claim_case, question_case
from errata.bench.data.ripple import ripple_case
from errata.bench.data.scotus import scotus_case
from errata.bench.data.snippets import references, snippet_tfidf
from errata.bench.fluency import TfIdf
from errata.edit import EditRequest, Implication
from errata.errors import ConfigError
from errata.locate.facts import KnownFact

Kept = Literal["all", "half", "none"]


def cases(
    name: str,
    *,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    implications: Kept = "all",
    portable: Literal["no", "yes"] = "no",
) -> list[Case]:
    """The cases of one of Atlas's sets, `n` of them or as many as there are.

    implications: which of an edit's compositions, and for atlas-ripple other names of its subject, its fit may see; "half" leaves
    out a random half of all, by seed, so that those in the fit and others can be compared. portable: only edits from which
    something follows.
    Raises ConfigError for a split that is neither dev nor test.
    """
    part = _split(split, name)
    world, most = load_world(), len(load_world().facts) if n is None else n
    if name == "atlas-counterfact":
        requests = counterfact_requests(world, most, split=part, seed=seed, portable=portable == "yes")
        kept = [_with(request, _kept(request.fit_implications, implications, request, seed)) for request in requests]
        return [_tagged(world, case) for case in _counterfact(world, kept, seed)]
    if name == "atlas-fever":
        return [_on(part, claim_case(record)) for record in fever_records(world, most, split=part, seed=seed)]
    if name == "atlas-zsre":
        return [_on(part, question_case(r, seed=seed)) for r in zsre_records(world, most, split=part, seed=seed)]
    if name == "atlas-docket":
        stream = edit_stream(1000 if n is None else n, split=part, seed=seed)
        return [replace(_on(part, scotus_case(case.record("probe"))), id=f"{i:04}") for i, case in enumerate(stream, 1)]
    if name == "atlas-ripple":
        requests = ripple_requests(world, most, split=part, seed=seed)
        return [_tagged(world, case) for case in _ripple(world, requests, implications, seed)]
    requests = [r for r in update_requests(world) if edited_fact(world, r).split == split][:n]
    return [_tagged(world, case) for case in _updates(world, requests, seed)]


def known_facts(*, n: int | None = None, seed: int = 0, split: str = "test") -> list[KnownFact]:
    """`n` facts in their relation's first phrasing, spread evenly over the relations; None: all of the split."""
    _split(split, "atlas-known")
    world, rng = load_world(), random.Random(seed)
    pools = [[f for f in world.by_relation[relation] if f.split == split] for relation in sorted(world.by_relation)]
    for pool in pools:
        rng.shuffle(pool)
    rng.shuffle(pools)
    picked: list[Fact] = []
    while any(pools) and (n is None or len(picked) < n):
        picked += [pool.pop() for pool in pools if pool]
    return [
        KnownFact(render.place("", world.phrasings[f.relation].cloze["fit"][0], f.subject), f.subject, f.object)
        for f in picked[:n]
    ]


def _split(split: str, name: str) -> Split:
    found: dict[str, Split] = {"dev": "dev", "test": "test"}
    if split in found:
        return found[split]
    raise ConfigError(f"expected the split dev or test of {name}, found {split!r}.")


def _counterfact(world: World, requests: list[EditRequest], seed: int) -> Iterable[Case]:
    records = counterfact_records(world, requests, seed=seed)
    texts = references(attribute_snippets(world, records))
    tfidf = _tfidf()
    return (counterfact_case(record, request, texts, tfidf) for record, request in zip(records, requests, strict=True))


@cache
def _tfidf() -> TfIdf:
    """What words weigh in all that Atlas's snippets say."""
    return snippet_tfidf(all_snippets(load_world()))


def _ripple(world: World, requests: list[EditRequest], implications: Kept, seed: int) -> Iterable[Case]:
    for record, request in zip(ripple_records(world, requests, seed=seed), requests, strict=True):
        fact = edited_fact(world, request)
        named = under_other_names(world, fact, request.target_new, world.aliases_of(fact.subject, "probe"))
        follows = (*request.fit_implications, *bridge_implications(world, record), *named)
        yield ripple_case(record, _with(request, _kept(follows, implications, request, seed)))


def _updates(world: World, requests: list[EditRequest], seed: int) -> Iterable[Case]:
    """Judged by CounterFact's probes, then by RippleEdits' tests; the edit's own prompt once."""
    rewritten = _counterfact(world, requests, seed)
    records = ripple_records(world, requests, seed=seed)
    for case, record, request in zip(rewritten, records, requests, strict=True):
        tests = tuple(probe for probe in ripple_case(record, request).probes if probe.kind != "edit")
        yield replace(case, probes=case.probes + tests)


def _kept(implications: tuple[Implication, ...], how: Kept, request: EditRequest, seed: int) -> tuple[Implication, ...]:
    """All, none, or each composition and each other name with all its phrasings by a coin of its own."""
    if how != "half":
        return implications if how == "all" else ()
    rng = random.Random(f"{seed}|{request.subject}|{request.relation}|{request.target_new}")
    chains = dict.fromkeys((i.subject, i.relation) for i in implications)
    heads = {composition for composition in chains if rng.random() < 0.5}
    return tuple(i for i in implications if (i.subject, i.relation) in heads)


def _with(request: EditRequest, implications: tuple[Implication, ...]) -> EditRequest:
    return request.model_copy(update={"fit_implications": implications})


def _on(split: Split, case: Case) -> Case:
    return replace(case, tags={**case.tags, "split": split})


def _tagged(world: World, case: Case) -> Case:
    return replace(case, tags={**case.tags, "split": edited_fact(world, case.request).split})
