"""Atlas in the schemas of RippleEdits and CounterFact, on facts that can be checked by hand; and the schemas themselves."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from errata.atlas import render
from errata.atlas.counterfact import attribute_snippets, counterfact_records, counterfact_requests
from errata.atlas.requests import counterfactual_requests, request_for, update_requests
from errata.atlas.ripple import (
    edited_fact,
    names_in,
    new_consequences,
    object_of,
    ripple_records,
    ripple_request,
    wordings,
)
from errata.atlas.world import World, load_world
from errata.bench.data.counterfact import CounterFactRecord, load_counterfact
from errata.bench.data.records import Answer, Problem, write_records
from errata.bench.data.ripple import Axis, RippleRecord, RippleTest, load_ripple
from errata.bench.data.snippets import load_snippets
from errata.edit import EditRequest
from errata.errors import RecordError

AXES: tuple[Axis, ...] = (
    "Relation_Specificity",
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
    "Forgetfulness",
)


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def drawn(world: World) -> list[EditRequest]:
    return counterfactual_requests(world, 150, seed=3)


@pytest.fixture(scope="module")
def drawn_records(world: World, drawn: list[EditRequest]) -> list[RippleRecord]:
    return ripple_records(world, drawn, seed=3)


def edit(world: World, subject: str, relation: str, target: str) -> EditRequest:
    return request_for(world, world.by_key[subject, relation], target)


def ripple(world: World, subject: str, relation: str, target: str, **options: Any) -> RippleRecord:
    [record] = ripple_records(world, [edit(world, subject, relation, target)], **options)
    return record


def said(tests: tuple[RippleTest, ...]) -> list[tuple[str, str]]:
    """(relation asked for, expected object) of each test."""
    queries = [query for test in tests for query in test.test_queries]
    return [(q.second_relation or q.relation, q.answers[0].value) for q in queries]


# -- atlas-ripple, by hand -------------------------------------------------------------------------------------------------


def test_the_capital_of_france(world: World) -> None:
    record = ripple(world, "France", "capital", "Rome", limit=100)
    assert record.edit.prompt == "The capital of France is Rome."
    assert record.edit.original_fact is not None
    assert record.edit.original_fact.prompt == "The capital of France is Paris."
    assert sorted(said(record.relation_specificity)) == [
        ("continent", "Europe"),
        ("currency", "euro"),
        ("head_of_state", "François Hollande"),
        ("highest_point", "Mont Blanc"),
        ("largest_city", "Paris"),
        ("official_language", "French"),
        ("official_name", "French Republic"),
    ]
    [inverse] = record.logical_generalization
    assert inverse.test_queries[0].prompt.endswith("Rome is the seat of national government for")
    assert inverse.test_queries[0].answers[0].value == "France"
    assert inverse.condition_queries[0].prompt.endswith("Paris is the seat of national government for")
    other, alias = sorted(record.subject_aliasing, key=lambda t: "the French Republic" in t.test_queries[0].prompt)
    assert "l'Hexagone" in other.test_queries[0].prompt
    assert alias.test_queries[0].answers[0].value == "Rome"
    assert alias.condition_queries[0].prompt == alias.test_queries[0].prompt
    assert alias.condition_queries[0].answers[0].value == "Paris"  # the old object, not the builder's new one
    assert record.compositionality_i == ()  # Atlas has no facts about Rome
    assert record.forgetfulness == ()  # a country has one capital
    through = {q.subject_id: q for test in record.compositionality_ii for q in test.test_queries}
    assert "Brigitte Bardot" in through
    assert "the country of citizenship of Brigitte Bardot" in through["Brigitte Bardot"].prompt
    for test in record.compositionality_ii:
        [query], [condition] = test.test_queries, test.condition_queries
        assert (query.relation, query.target_ids, query.second_relation) == (condition.relation, ("France",), "capital")
        assert query.answers[0].value == "Rome"
        assert condition.answers[0].value == "France"
        assert world.by_key[condition.subject_id, condition.relation].object == "France"


def test_a_second_hop_goes_through_the_new_object(world: World) -> None:
    record = ripple(world, "Space Needle", "landmark_city", "Lyon")
    [test] = record.compositionality_i
    [query], [condition] = test.test_queries, test.condition_queries
    assert "the city of the landmark the Space Needle" in query.prompt
    assert query.answers[0].names == ("France", "l'Hexagone", "the French Republic")
    assert (query.query_type, query.relation, query.target_ids) == ("two_hop", "landmark_city", ("Lyon",))
    assert (query.second_relation, query.second_hop_target_ids) == ("city_country", ("France",))
    assert (condition.query_type, condition.subject_id, condition.relation) == ("regular", "Lyon", "city_country")
    assert "Lyon" in condition.prompt


def test_what_stays_true_is_no_consequence(world: World) -> None:
    assert ripple(world, "Space Needle", "landmark_city", "Chicago").compositionality_i == ()
    # Paris is in no table of cities; that it lies in France follows from its being the capital.
    assert object_of(world, "Paris", "city_country") == "France"
    assert new_consequences(world, world.by_key["Eiffel Tower", "landmark_city"], "Lyon") == []
    [(second, before)] = new_consequences(world, world.by_key["Eiffel Tower", "landmark_city"], "Chicago")
    assert (second.object, before) == ("United States", "France")


def test_a_spouse_is_married_back(world: World) -> None:
    record = ripple(world, "Abraham Lincoln", "spouse", "Mary Todd Lincoln's sister")
    assert [t.test_queries[0].answers[0].value for t in record.logical_generalization] == ["Abraham Lincoln"] * 2
    assert {t.test_queries[0].relation for t in record.logical_generalization} == {"inverse of spouse", "spouse"}


def test_other_objects_are_not_forgotten_where_several_may_hold(world: World) -> None:
    [test] = ripple(world, "Danielle Darrieux", "citizenship", "United States").forgetfulness
    [query] = test.test_queries
    assert query.prompt.startswith("Apart from the United States, ")
    assert query.answers[0].value == "France"
    assert test.condition_queries == (query,)


def test_relations_that_the_edit_makes_doubtful_are_left_out(world: World) -> None:
    record = ripple(world, "Albert Einstein", "occupation", "painter", limit=100)
    assert sorted(said(record.relation_specificity)) == [("birthplace", "Ulm"), ("mother_tongue", "German")]


def test_no_test_rests_on_a_fact_that_another_edit_changes(world: World) -> None:
    together = [
        edit(world, "France", "capital", "Rome"),
        edit(world, "France", "currency", "Albanian lek"),
        edit(world, "Lyon", "city_country", "Albania"),
        edit(world, "Space Needle", "landmark_city", "Lyon"),
        edit(world, "Brigitte Bardot", "citizenship", "Albania"),
    ]
    france, _, _, needle, _ = ripple_records(world, together, limit=100)
    assert "currency" not in dict(said(france.relation_specificity))
    assert "continent" in dict(said(france.relation_specificity))
    assert needle.compositionality_i == ()
    first_halves = {q.subject_id for t in france.compositionality_ii for q in t.test_queries}
    assert not first_halves & {"Brigitte Bardot", "Lyon"}
    assert "Bordeaux" in first_halves or "Catherine Deneuve" in first_halves


def test_an_alias_that_an_edit_takes_away_is_not_used(world: World) -> None:
    [alias] = [
        t.test_queries[0].prompt
        for t in ripple(world, "Abdel Fattah el-Sisi", "occupation", "painter").subject_aliasing
    ]
    assert "the head of state of Egypt" in alias
    both = [
        edit(world, "Abdel Fattah el-Sisi", "occupation", "painter"),
        edit(world, "Egypt", "head_of_state", "Barack Obama"),
    ]
    assert ripple_records(world, both)[0].subject_aliasing == ()


# -- atlas-ripple, what always holds ---------------------------------------------------------------------------------------


def test_prompts_are_worded_by_probe_phrasings_only(world: World, drawn_records: list[RippleRecord]) -> None:
    frames = world.frames["question_frames"]["probe"]

    def pattern(wording: str) -> str:
        return ".+".join(map(re.escape, wording.split("{}")))

    n = 0
    for record in drawn_records:
        for test in (t for axis in AXES for t in record.axis(axis)):
            for query in (*test.test_queries, *test.condition_queries):
                relation = (query.second_relation or query.relation).removeprefix("inverse of ")
                phrasing = world.phrasings[relation]
                inverse = query.relation.startswith("inverse of ")
                marks = (phrasing.inverse or {}) if inverse else phrasing.cloze
                asked = [f.replace("{q}", q) for f in frames for q in phrasing.question["probe"]]
                probes = marks["probe"] + ([] if inverse else asked)
                assert any(re.search(pattern(w) + "$", query.prompt, re.IGNORECASE) for w in probes), query.prompt
                assert not any(re.fullmatch(pattern(w), query.prompt, re.IGNORECASE) for w in marks["fit"])
                n += 1
        for test in record.subject_aliasing:
            subject = world.by_subject[record.edit.subject_id][0].subject
            used = [a for a in world.aliases_of(subject) if a.casefold() in test.test_queries[0].prompt.casefold()]
            assert used
    assert n > 500


def test_no_answer_stands_in_its_own_prompt(drawn_records: list[RippleRecord]) -> None:
    for record in drawn_records:
        for test in (t for axis in AXES for t in record.axis(axis)):
            for query in (*test.test_queries, *test.condition_queries):
                assert query.answers and not names_in(query.prompt, query.answers[0])


def test_the_seed_decides_and_the_order_does_not(
    world: World, drawn: list[EditRequest], drawn_records: list[RippleRecord]
) -> None:
    assert ripple_records(world, drawn[::-1], seed=3)[::-1] == drawn_records
    assert ripple_records(world, drawn, seed=4) != drawn_records
    assert all(len(record.axis(axis)) <= 1 for record in ripple_records(world, drawn, limit=1) for axis in AXES)


def test_every_axis_is_there_and_records_lead_back_to_their_requests(
    world: World, drawn: list[EditRequest], drawn_records: list[RippleRecord]
) -> None:
    assert all(any(record.axis(axis) for record in drawn_records) for axis in AXES)
    assert [ripple_request(world, record).id for record in drawn_records] == [request.id for request in drawn]
    assert len({record.key for record in drawn_records}) == len(drawn)


def test_updates_have_records(world: World) -> None:
    records = ripple_records(world, update_requests(world))
    assert len(records) == len(world.updates)
    assert all(record.edit.original_fact for record in records)


def test_an_edit_of_nothing_in_atlas_is_refused(world: World) -> None:
    stranger = EditRequest(prompt="{} was written in", subject="Codex Umbra", relation="language", target_new="Danish")
    for make in (ripple_records, counterfact_records):
        with pytest.raises(RecordError, match="'Codex Umbra'"):
            make(world, [stranger])


def test_wordings_are_as_many_as_asked_for(world: World) -> None:
    found = wordings(world, "capital", "France", random.Random(0), led=4)
    assert len({w.text for w in found}) == 10
    assert sum(w.form == "question" for w in found) == 2
    assert "Politically, France is run from" in {w.text for w in found}


# -- atlas-counterfact -----------------------------------------------------------------------------------------------------


def test_a_counterfact_record_by_hand(world: World) -> None:
    [record] = counterfact_records(world, [edit(world, "Space Needle", "landmark_city", "Paris")])
    rewrite = record.requested_rewrite
    assert (rewrite.prompt, rewrite.subject) == ("{} is located in the city of", "The Space Needle")
    assert (rewrite.target_new.str_, rewrite.target_true.str_) == ("Paris", "Seattle")
    assert len(record.paraphrase_prompts) == 4 and all("Space Needle" in p for p in record.paraphrase_prompts)
    assert len(record.attribute_prompts) == 10  # many landmarks stand in Paris
    holders = {f.subject for f in world.by_relation["landmark_city"] if f.object == "Paris"}
    assert all(any(holder in prompt for holder in holders) for prompt in record.attribute_prompts)
    assert len(record.generation_prompts) == 10
    assert record.portability_prompts == ()  # Atlas does not say of Paris, as a city, where it is


def test_neighbours_share_relation_and_old_object(world: World) -> None:
    requests = counterfact_requests(world, 60, seed=1)
    edited = {edited_fact(world, request) for request in requests}
    n = 0
    for request, record in zip(requests, counterfact_records(world, requests, seed=1), strict=True):
        fact, prompts = edited_fact(world, request), record.neighborhood_prompts
        others = {
            f.subject.casefold()
            for f in world.by_relation[fact.relation]
            if f.object == fact.object and f.split == "test" and f not in edited
        }
        assert len(set(prompts)) == (10 if others else 0)
        assert all(any(other in prompt.casefold() for other in others) for prompt in prompts)
        n += bool(others)
        assert record.request().paraphrase_prompts == record.paraphrase_prompts
    assert n > 40


def test_portability_prompts_follow_from_the_new_object_and_changed(world: World) -> None:
    [record] = counterfact_records(world, [edit(world, "Danielle Darrieux", "citizenship", "Japan")])
    found = {(p.relation, p.form): p for p in record.portability_prompts}
    assert {relation for relation, _ in found} == {
        "capital",
        "continent",
        "currency",
        "official_language",
        "head_of_state",
    }
    assert all((relation, form) in found for relation, _ in found for form in ("cloze", "question"))
    capital = found["capital", "question"]
    assert capital.answer.value == "Tokyo" and capital.answer_true == Answer(value="Paris")
    assert "the country of citizenship of Danielle Darrieux" in capital.prompt
    assert "Japan" not in capital.prompt and "Japan" in capital.condition_prompt
    [record] = counterfact_records(world, [edit(world, "Danielle Darrieux", "citizenship", "Germany")])
    same = {p.relation for p in record.portability_prompts}
    assert same == {"capital", "official_language", "head_of_state"}  # both are European, and both pay in euro


def test_draws_can_ask_for_neighbours_and_for_consequences(world: World) -> None:
    requests = counterfact_requests(world, 40, split="dev", neighbours=False, portable=True)
    assert len({r.key for r in requests}) == 40
    records = counterfact_records(world, requests)
    assert all(r.portability_prompts for r in records)
    assert counterfact_requests(world, 40, split="dev", neighbours=False, portable=True) == requests
    assert all(
        world.by_key[(r.subject or "").removeprefix("The ").removeprefix("the "), r.relation or ""].split == "dev"
        for r in requests
    )


def test_snippets_tell_of_those_who_have_the_new_object(world: World) -> None:
    records = counterfact_records(world, [edit(world, "Danielle Darrieux", "citizenship", "Iceland")])
    [group] = attribute_snippets(world, records)
    assert (group.relation_id, group.target_id) == ("citizenship", "Iceland")
    holders = {f.subject for f in world.by_relation["citizenship"] if f.object == "Iceland"}
    assert {s.name for s in group.samples} == holders | {"Iceland"}
    text = {s.name: s.text for s in group.samples}["Iceland"]
    assert "The city serving Iceland as national capital is Reykjavík." in text


# -- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_generated_records_come_back_through_the_loaders(
    name: str, world: World, drawn: list[EditRequest], drawn_records: list[RippleRecord], tmp_path: Path
) -> None:
    path = tmp_path / name
    write_records(path, drawn_records)
    assert load_ripple(path) == drawn_records
    records = counterfact_records(world, drawn)
    write_records(path, records)
    assert load_counterfact(path) == records
    snippets = attribute_snippets(world, records)
    write_records(path, snippets)
    assert load_snippets(path) == snippets
    write_records(path, [])
    assert load_snippets(path) == []


def counterfact(**changes: Any) -> dict[str, Any]:
    rewrite = {
        "prompt": "{} was written in",
        "relation_id": "P407",
        "target_new": {"str": "Danish", "id": "Q9035"},
        "target_true": {"str": "Latin", "id": "Q397"},
        "subject": "Codex Umbra",
    }
    record = {
        "case_id": 7,
        "pararel_idx": 42,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": ["It rained all day. The language of Codex Umbra is"],
        "neighborhood_prompts": ["Liber Vagus was written in"],
        "attribute_prompts": [],
        "generation_prompts": ["Readers of Codex Umbra usually speak"],
    }
    return {**record, **changes}


def query(**changes: Any) -> dict[str, Any]:
    found = {
        "prompt": "The place of birth of Bo Reed is",
        "answers": [{"value": "Tarn", "aliases": ["Tarn City"]}],
        "query_type": "regular",
        "subject_id": "Q2",
        "relation": "PLACE_OF_BIRTH",
        "target_ids": ["Q4"],
        "phrase": None,
    }
    return {**found, **changes}


def ripple_row(**changes: Any) -> dict[str, Any]:
    two_hop = {"query_type": "two_hop", "second_relation": "PLACE_OF_BIRTH", "second_hop_target_ids": ["Q4"]}
    fact = {
        "prompt": "The name of the spouse of Ada Quill is Bo Reed.",
        "subject_id": "Q1",
        "relation": "SPOUSE",
        "target_id": "Q2",
    }
    test = {"test_queries": [query(**two_hop)], "test_condition": "OR", "condition_queries": [query()]}
    row: dict[str, Any] = {"example_type": "recent", "edit": fact, **{axis: [] for axis in AXES}}
    return {**row, "Compositionality_I": [test], **changes}


def saved(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(json.dumps(r) for r in rows))
    return path


def test_records_of_the_published_shape_are_read(tmp_path: Path) -> None:
    fork = counterfact(case_id=8, extra_of_a_fork=[1])
    first, _ = load_counterfact(saved(tmp_path / "cf.json", counterfact(), fork))
    assert isinstance(first, CounterFactRecord)
    assert first.requested_rewrite.target_new.str_ == "Danish"
    assert first.request().text == "Codex Umbra was written in"
    row = ripple_row()
    row["Relation_Specifity"] = row.pop("Relation_Specificity")  # as the published example spells it
    row["edit"]["previous_fact"] = dict(row["edit"], target_id="Q3")  # as the published reader spells it
    row["Compositionality_I"][0]["condition_queries"][0]["target_ids"] = 4  # a number, not in a list
    [record] = load_ripple(saved(tmp_path / "ripple.jsonl", row))
    assert record.relation_specificity == () and record.edit.original_fact is not None
    assert record.compositionality_i[0].condition_queries[0].target_ids == (4,)
    assert record.compositionality_i[0].test_queries[0].answers[0].names == ("Tarn", "Tarn City")


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"requested_rewrite": {"prompt": "{} is"}}, "requested_rewrite.relation_id", "the field is missing"),
        (
            {"requested_rewrite": dict(counterfact()["requested_rewrite"], prompt="It is")},
            "requested_rewrite",
            "one '{}'",
        ),
        ({"case_id": "seven"}, "case_id", "integer.*found 'seven'"),
        ({"neighborhood_prompts": ["a", 3]}, "neighborhood_prompts.1", "string.*found 3"),
        ({"portability_promts": []}, "", "no field 'portability_promts'; did you mean 'portability_prompts'"),
    ],
)
def test_a_bad_counterfact_row_is_named(change: dict[str, Any], field: str, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "cf.json", counterfact(case_id=6), counterfact(**change), counterfact(case_id=9))
    with pytest.raises(RecordError, match=message) as caught:
        load_counterfact(path)
    where = f"{path}, row 2" + (f", field {field}" if field else "")
    assert str(caught.value).startswith(f"{where}: ")
    problems: list[Problem] = []
    assert [record.case_id for record in load_counterfact(path, problems)] == [6, 9]
    assert [(p.row, p.field) for p in problems] == [(2, field)]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"query_type": "two_hop"}, "Forgetfulness.0.test_queries.0"),
        ({"query_type": "three_hop"}, "Forgetfulness.0.test_queries.0.query_type"),
        ({"answers": [{"value": None}]}, "Forgetfulness.0.test_queries.0.answers.0.value"),
    ],
)
def test_a_bad_ripple_row_is_named(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    test = {"test_queries": [query(**changes)], "test_condition": "OR", "condition_queries": []}
    path = saved(tmp_path / "ripple.jsonl", ripple_row(Forgetfulness=[test]))
    with pytest.raises(RecordError, match=f"row 1, field {re.escape(field)}: "):
        load_ripple(path)


def test_a_case_twice_a_broken_line_and_a_broken_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "cf.jsonl", counterfact(), counterfact())
    with pytest.raises(RecordError, match="row 2, field case_id: case_id 7 already stands in row 1"):
        load_counterfact(path)
    path.write_text(json.dumps(counterfact()) + "\n\n{broken\n" + "[1]\n")
    with pytest.raises(RecordError, match=r"row 3: expected one JSON object a line.*\(1 more problem"):
        load_counterfact(path)
    problems: list[Problem] = []
    assert len(load_counterfact(path, problems)) == 1
    assert [p.row for p in problems] == [3, 4]
    cut = saved(tmp_path / "cut.json", counterfact())
    cut.write_text(cut.read_text()[:-20])
    for bad in (cut, tmp_path / "absent.json"):
        with pytest.raises(RecordError, match=re.escape(str(bad))):
            load_counterfact(bad, [])


def test_snippet_groups_need_samples(tmp_path: Path) -> None:
    empty = {"relation_id": "P407", "target_id": "Q9035", "samples": []}
    with pytest.raises(RecordError, match="row 1, field samples"):
        load_snippets(saved(tmp_path / "snippets.json", empty))


def test_render_is_what_the_prompts_are_made_of(world: World) -> None:
    record = ripple(world, "France", "capital", "Rome")
    cloze = world.phrasings["capital"].cloze["fit"][0]
    assert record.edit.prompt == f"{render.place('', cloze, 'France')} Rome."
