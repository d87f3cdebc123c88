"""Atlas's data sets end to end, without a model: what a case carries, strata, seeds, and the loaders' way to the same cases."""

import json
from collections import Counter
from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata.atlas.cases import known_facts
from errata.atlas.counterfact import all_snippets, attribute_snippets, counterfact_records
from errata.atlas.probes import normal
from errata.atlas.ripple import bridge_implications, edited_fact, names_in, ripple_records, ripple_requests
from errata.atlas.world import World, link, load_world
from errata.bench.cases import Case, Probe
from errata.bench.data import check, load_cases, load_facts, one_edit_per_fact
from errata.bench.data.counterfact import counterfact_case
from errata.bench.data.records import Answer, write_records
from errata.bench.data.ripple import IN_FIT, NOT_IN_FIT
from errata.cli import app
from errata.errors import ConfigError

N = 60


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def ripple() -> list[Case]:
    return load_cases("atlas-ripple", n=N, implications="half")


@pytest.fixture(scope="module")
def counterfact() -> list[Case]:
    return load_cases("atlas-counterfact", n=N)


def compositions(cases: list[Case]) -> list[tuple[Case, Probe]]:
    kinds = ("compositionality_i", "compositionality_ii")
    return [(case, p) for case in cases for p in case.probes if p.kind in kinds and not p.condition]


def test_a_counterfact_case_is_judged_by_everything_and_fitted_by_fit_wordings(
    world: World, counterfact: list[Case]
) -> None:
    assert len(counterfact) == N
    for case in counterfact:
        counted = Counter(probe.kind for probe in case.probes)
        assert counted["edit"] == 1 and counted["paraphrase"] == 4
        assert counted["neighborhood"] == counted["generation"] == 10
        fact = edited_fact(world, case.request)
        assert case.tags == {"relation": fact.relation, "split": "test"} and fact.split == "test"
        fitted = {
            normal(text) for text in (*case.request.fit_prompts, *(i.prompt for i in case.request.fit_implications))
        }
        assert len(case.request.fit_prompts) > 5
        judged = {normal(p.prompt) for p in case.probes if p.kind not in ("edit", "attribute")}
        assert not fitted & judged
        for probe in case.probes:
            if probe.kind == "neighborhood":
                assert (probe.expected, probe.alternatives) == ((fact.object,), (case.request.target_new,))
    assert sum(bool(case.references) for case in counterfact) > N / 2
    one_edit_per_fact(counterfact)


def test_words_weigh_what_they_do_in_all_that_atlas_says(world: World, counterfact: list[Case]) -> None:
    """However many cases are drawn; each snippet counts as often as it stands under a relation and object."""
    [one] = load_cases("atlas-counterfact", n=1, seed=3)
    assert one.tfidf is not None and one.tfidf is counterfact[0].tfidf
    texts = [sample.text for group in all_snippets(world) for sample in group.samples]
    holds = sum("Reykjavík" in text for text in texts)
    assert one.tfidf.idf["reykjavík"] == pytest.approx(log((1 + len(texts)) / (1 + holds)) + 1)
    assert len(texts) > 3000 > holds > 0


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_written_records_come_back_as_the_same_cases(
    suffix: str, world: World, counterfact: list[Case], tmp_path: Path
) -> None:
    requests = [case.request for case in counterfact]
    records = counterfact_records(world, requests)
    write_records(tmp_path / f"cf{suffix}", records)
    write_records(tmp_path / "snippets.json", attribute_snippets(world, records))
    read = load_cases(
        "counterfact", path=tmp_path / f"cf{suffix}", snippets=str(tmp_path / "snippets.json"), together=True
    )
    assert [case.probes for case in read] == [case.probes for case in counterfact]
    assert [case.references for case in read] == [case.references for case in counterfact]
    assert [case.request for case in read] == [record.request() for record in records]  # nothing to fit with
    assert counterfact_case(records[0], requests[0]).request == requests[0]


def test_published_wordings_of_an_edit_lead_back_to_it(world: World, tmp_path: Path) -> None:
    """A record's sentence alone, as in the published files: the copula, and the subject from its other prompts."""
    [request] = [r for r in ripple_requests(world, 400) if r.relation == "capital"][:1]
    write_records(tmp_path / "popular.json", ripple_records(world, [request]))
    [case] = load_cases("ripple-popular", path=tmp_path / "popular.json")
    assert case.request.text == request.text
    assert (case.request.target_new, case.request.target_true) == (request.target_new, request.target_true)
    assert link(case.request.subject or "") == link(request.subject or "")


def test_half_of_the_compositions_are_in_the_fit_in_other_words(world: World, ripple: list[Case]) -> None:
    found = Counter((p.kind, p.tags["stratum"]) for _, p in compositions(ripple))
    # 300 cases have five times as many: at least 100 of each kind in each stratum.
    assert len(found) == 4 and min(found.values()) >= 20
    for case, probe in compositions(ripple):
        texts = [normal(i.prompt) for i in case.request.fit_implications]
        assert normal(probe.prompt) not in texts
        same = [i for i in case.request.fit_implications if i.answer in probe.expected]
        if probe.tags["stratum"] == IN_FIT:
            assert any((i.relation or "").startswith(f"{probe.tags['relation']} of ") for i in same)
    assert all(not probe.tags.get("stratum") for case in ripple for probe in case.probes if probe.condition)


def test_implications_decide_the_strata_and_nothing_else(ripple: list[Case]) -> None:
    every, none = (load_cases("atlas-ripple", n=N, implications=how) for how in ("all", "none"))
    assert {p.tags["stratum"] for _, p in compositions(every)} == {IN_FIT}
    assert {p.tags["stratum"] for _, p in compositions(none)} == {NOT_IN_FIT}
    prompts: Callable[[list[Case]], list[str]] = lambda cases: [p.prompt for case in cases for p in case.probes]  # noqa: E731
    assert prompts(every) == prompts(none) == prompts(ripple)
    share = sum(len(c.request.fit_implications) for c in ripple) / sum(len(c.request.fit_implications) for c in every)
    assert 0.4 < share < 0.6
    for half, case in zip(ripple, every, strict=True):
        assert set(half.request.fit_implications) <= set(case.request.fit_implications)
        kept = {(i.subject, i.relation) for i in half.request.fit_implications}
        assert all(
            i in half.request.fit_implications for i in case.request.fit_implications if (i.subject, i.relation) in kept
        )


def test_chains_that_lead_to_the_subject_become_implications(world: World) -> None:
    requests = [r for r in ripple_requests(world, 400) if r.subject == "France" and r.relation == "capital"]
    requests = requests or [next(r for r in ripple_requests(world, 400) if r.relation == "capital")]
    [record] = ripple_records(world, requests[:1], limit=2)
    found = bridge_implications(world, record)
    assert len(found) == 2 * len(record.compositionality_ii)
    for test, implication in zip(record.compositionality_ii, found[::2], strict=True):
        [query] = test.test_queries
        assert link(implication.subject or "") == query.subject_id
        assert implication.relation == f"capital of {query.relation}" and implication.answer == requests[0].target_new
        assert implication.prompt.startswith("The capital of ") and implication.prompt != query.prompt


def test_the_seed_draws_and_the_split_divides(world: World, ripple: list[Case]) -> None:
    assert load_cases("atlas-ripple", n=N, implications="half") == ripple
    other = load_cases("atlas-ripple", n=N, seed=1)
    assert {case.id for case in other} != {case.id for case in ripple}
    dev = load_cases("atlas-counterfact", n=20, split="dev")
    assert {edited_fact(world, case.request).split for case in dev} == {"dev"}
    assert {case.tags["split"] for case in dev} == {"dev"}
    with pytest.raises(ConfigError, match="expected the split dev or test of atlas-ripple, found 'train'"):
        load_cases("atlas-ripple", split="train")
    portable = load_cases("atlas-counterfact", n=20, portable="yes")
    assert all(any(probe.kind == "portability" for probe in case.probes) for case in portable)


def test_updates_are_judged_both_ways(world: World) -> None:
    test, dev = load_cases("atlas-updates"), load_cases("atlas-updates", split="dev")
    assert len(test) + len(dev) == len(world.updates)
    kinds = Counter(probe.kind for case in test for probe in case.probes)
    assert kinds["edit"] == len(test)
    assert {"paraphrase", "neighborhood", "relation_specificity", "compositionality_ii"} <= set(kinds)
    assert all(case.request.fit_prompts for case in test)


def test_known_facts_are_spread_over_relations(world: World) -> None:
    facts = load_facts("atlas-known", n=40, split="dev")
    assert facts == known_facts(n=40, split="dev") and len(set(facts)) == 40
    for fact in facts:
        relations = [f for f in world.by_subject[link(fact.subject)] if f.object == fact.attribute]
        assert relations and all(f.split == "dev" for f in relations)
    assert len(load_facts("atlas-known", split="dev")) == sum(f.split == "dev" for f in world.facts)


def test_atlas_has_no_faults_and_drops_nothing(ripple: list[Case]) -> None:
    assert check("atlas-ripple", n=N, implications="half") == []
    assert load_cases("atlas-ripple", n=N, implications="half", flagged="drop") == ripple
    answered = [p for case in ripple for p in case.probes if p.expected]
    assert not any(names_in(p.prompt, Answer(value=p.expected[0], aliases=p.expected[1:])) for p in answered)
    result = CliRunner().invoke(
        app, ["data", "check", "atlas-counterfact", "--n", "5", "--set", "implications=none", "--json"]
    )
    assert (result.exit_code, json.loads(result.stdout)["problems"]) == (0, [])


@pytest.mark.slow
def test_conditions_that_the_model_fails_are_listed_and_dropped() -> None:
    import errata

    loaded = errata.load("atlas")
    problems = check("atlas-ripple", n=20, model_data=loaded)
    assert {problem.kind for problem in problems} <= {"condition"}
    kept = load_cases("atlas-ripple", n=20, flagged="drop", model_data=loaded)
    every = load_cases("atlas-ripple", n=20)
    units = [{p.test for p in case.probes if p.test} for case in every]
    left = [{p.test for p in case.probes if p.test} for case in kept]
    assert sum(map(len, units)) - sum(map(len, left)) == len({(p.case, p.unit) for p in problems})
    # Atlas knows most of its facts: its recall on the shipped model is 97 % and more.
    assert len(problems) < 0.2 * sum(map(len, units))
