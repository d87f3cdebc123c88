"""Published data sets on invented files: each layout's records and cases, bad rows, contradictions, where files come from."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from errata.bench.cases import Case, Probe
from errata.bench.data import DATASETS, Problem, check, load_cases, load_facts, one_edit_per_fact
from errata.bench.data.faults import check_cases, without
from errata.bench.data.records import streamed_rows
from errata.bench.data.registry import data_folder, find, first_of_each_fact, layout_of
from errata.bench.data.ripple import IN_FIT, NOT_IN_FIT, RippleRecord, load_ripple, ripple_case, ripple_request
from errata.bench.data.snippets import load_snippets, published_tfidf, references, snippet_tfidf
from errata.bench.data.training import load_items
from errata.cli import app
from errata.edit import EditRequest, Implication
from errata.errors import ConfigError, RecordError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))


def saved(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(json.dumps(r) for r in rows))
    return path


def asked(case: Case, kind: str, condition: bool = False) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind == kind and probe.condition == condition]


# -- CounterFact ---------------------------------------------------------------------------------------------------------


def counterfact(case_id: int = 7, **changes: Any) -> dict[str, Any]:
    record = {
        "case_id": case_id,
        "pararel_idx": 42,
        "requested_rewrite": {
            "prompt": "{} was written in",
            "relation_id": "P407",
            "target_new": {"str": "Danish", "id": "Q9035"},
            "target_true": {"str": "Latin", "id": "Q397"},
            "subject": "Codex Umbra",
        },
        "paraphrase_prompts": ["It rained all day. In what language is Codex Umbra?"],
        "neighborhood_prompts": ["Liber Vagus was written in"],
        "attribute_prompts": ["Mørke Nætter was written in"],
        "generation_prompts": ["Readers of Codex Umbra usually speak"],
        "portability_prompts": [
            {
                "prompt": "The language of Codex Umbra is spoken in",
                "answer": {"value": "Denmark", "aliases": ["Danmark"]},
                "answer_true": {"value": "Rome"},
                "relation": "spoken",
                "condition_prompt": "Danish is spoken in",
            }
        ],
    }
    return {**record, **changes}


def about(subject: str, new: str = "Danish", case_id: int = 8) -> dict[str, Any]:
    rewrite = {**counterfact()["requested_rewrite"], "subject": subject, "target_new": {"str": new}}
    return counterfact(case_id, requested_rewrite=rewrite, neighborhood_prompts=[], portability_prompts=[])


def test_a_counterfact_case(tmp_path: Path) -> None:
    samples = [{"name": "Mørke Nætter", "text": "A Danish novel."}]
    group = {"relation_id": "P407", "target_id": "Q9035", "samples": samples}
    snippets = saved(tmp_path / "snippets.json", group, {**group, "target_id": "Q397"}, group)
    path = saved(tmp_path / "counterfact.json", counterfact(), about("Liber Novus"))
    first, second = load_cases("counterfact", path=path, snippets=str(snippets))
    assert (first.id, first.tags["relation"], first.request.text) == ("7", "P407", "Codex Umbra was written in")
    assert first.request.fit_prompts == () and first.request.fit_implications == ()
    [edit], [paraphrase] = asked(first, "edit"), asked(first, "paraphrase")
    assert (edit.expected, edit.alternatives, edit.tags["form"]) == (("Danish",), ("Latin",), "cloze")
    assert (paraphrase.expected, paraphrase.tags["form"]) == (("Danish",), "question")
    [neighbour], [attribute] = asked(first, "neighborhood"), asked(first, "attribute")
    assert (neighbour.expected, neighbour.alternatives) == (("Latin",), ("Danish",))
    assert (attribute.expected, attribute.alternatives) == (("Danish",), ("Latin",))
    [generation] = asked(first, "generation")
    assert generation.expected == ()
    [portable], [condition] = asked(first, "portability"), asked(first, "portability", condition=True)
    assert portable.test == condition.test == "portability:0"
    assert (portable.expected, portable.alternatives) == (("Denmark", "Danmark"), ("Rome",))
    assert condition.prompt == "Danish is spoken in" and condition.expected == portable.expected
    assert first.references == ("A Danish novel.", "A Danish novel.")
    assert second.references == ()  # its new object has no id
    # Words weigh what they do in the whole file: "danish" is in all of its three texts, ln(4/4) + 1
    assert first.tfidf is not None and first.tfidf is second.tfidf and first.tfidf.idf["danish"] == 1.0
    plain, *_ = load_cases("counterfact", path=path)
    assert plain.references == () and plain.tfidf is None
    assert [case.id for case in load_cases("counterfact", path=tmp_path, n=1)] == ["7"]


def test_snippets_and_published_weights_beside_the_file_are_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "counterfact.json", counterfact(), about("Liber Novus"))
    samples = [{"name": "Mørke Nætter", "text": "A Danish novel."}]
    others = [{"name": "B", "text": "A novel."}, {"name": "C", "text": "A bridge."}]
    groups = [{"relation_id": "P407", "target_id": t, "samples": s} for t, s in (("Q9035", samples), ("Q1", others))]
    saved(tmp_path / "attribute_snippets.json", *groups)
    [case] = load_cases("counterfact", path=path, n=1)
    assert case.references == ("A Danish novel.",) and case.tfidf is not None
    # of 3 texts "novel" is in 2 and "bridge" in 1, though no case is about it
    assert case.tfidf.idf["novel"] == pytest.approx(math.log(4 / 3) + 1)
    assert case.tfidf.idf["bridge"] == pytest.approx(math.log(4 / 2) + 1)
    np.save(tmp_path / "idf.npy", np.array([7.0, 8.0]))
    saved_words = {"danish": 1, "novel": 0}
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps(saved_words))
    [case] = load_cases("counterfact", path=path, n=1)
    assert case.tfidf is not None and case.tfidf.idf == {"danish": 8.0, "novel": 7.0}


def test_bad_snippets_can_be_skipped_and_n_does_not_hide_them(tmp_path: Path) -> None:
    path = saved(tmp_path / "counterfact.json", counterfact(), about("Liber Novus"))
    group = {"relation_id": "P407", "target_id": "Q9035", "samples": [{"name": "B", "text": "A Danish novel."}]}
    snippets = saved(tmp_path / "attribute_snippets.json", group, {**group, "samples": []}, group)
    message = "attribute_snippets.json, row 2, field samples, attribute snippets: .*mend the row"
    with pytest.raises(RecordError, match=message):
        load_cases("counterfact", path=path, n=1)
    left_out: list[Problem] = []
    [case] = load_cases("counterfact", path=path, n=1, bad="skip", left_out=left_out)
    assert case.references == ("A Danish novel.", "A Danish novel.") and case.tfidf is not None
    assert [(p.path, p.row) for p in left_out] == [(str(snippets), 2)]
    assert not check("counterfact", path=path) and len(check("counterfact", path=path, snippets=str(snippets))) == 1
    saved(snippets, {**group, "samples": [{"name": "B", "text": ""}]})
    with pytest.warns(UserWarning, match="1 rows of counterfact left out"):
        [case] = load_cases("counterfact", path=path, n=1, bad="skip")
    assert case.references == () and case.tfidf is None


def test_only_snippets_of_the_drawn_cases_are_looked_into_where_weights_are_there(tmp_path: Path) -> None:
    path = saved(tmp_path / "counterfact.json", counterfact())
    group = {"relation_id": "P407", "target_id": "Q9035", "samples": [{"name": "B", "text": "A Danish novel."}]}
    snippets = saved(tmp_path / "attribute_snippets.json", {**group, "target_id": "Q1", "samples": []}, group)
    np.save(tmp_path / "idf.npy", np.array([7.0]))
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps({"danish": 0}))
    [case] = load_cases("counterfact", path=path)
    assert case.references == ("A Danish novel.",)
    saved(snippets, {**group, "samples": []})
    with pytest.raises(RecordError, match="row 1, field samples"):
        load_cases("counterfact", path=path)
    [case] = load_cases("counterfact", path=path, references=False)
    assert case.references == () and case.tfidf is None


ROWS: tuple[Any, ...] = ({"a": [1, {"b": ']},{ "é\\'}]}, 12, "x, y", [], -1.5e3, None, {"long": "é" * 50})


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_streamed_array_is_the_whole_one(size: int, tmp_path: Path) -> None:
    for n in range(len(ROWS) + 1):
        for text in (json.dumps(ROWS[:n]), json.dumps(ROWS[:n], indent=2, ensure_ascii=False) + "\n"):
            (tmp_path / "a.json").write_text(text, encoding="utf-8")
            assert list(streamed_rows(tmp_path / "a.json", [], size)) == list(enumerate(ROWS[:n], 1))
    for wrong, row in (
        ("[1, 2", 2),
        ("[1 2]", 1),
        ("[1, ]", 2),
        ("[1, {]", 2),
        ("[", 1),
        ("[1,", 2),
        ('[1, "a', 2),
        ("[1,, 2]", 2),
    ):
        (tmp_path / "a.json").write_text(wrong)
        with pytest.raises(
            RecordError, match=f"expected a JSON array in .*a.json, but .* in row {row}; is the file whole"
        ):
            list(streamed_rows(tmp_path / "a.json", [], size))
    problems: list[Problem] = []
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{broken\n{"a": 2}\n')
    assert [number for number, _ in streamed_rows(path, problems, size)] == [1, 4] and [p.row for p in problems] == [3]
    with pytest.raises(RecordError, match="cannot read records from .*none.json: No such file"):
        list(streamed_rows(tmp_path / "none.json", []))


def test_edits_of_one_fact_are_refused_together_and_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "counterfact.json", counterfact(3), about("Liber Novus"), about("codex umbra", "Welsh", 17))
    cases = load_cases("counterfact", path=path)
    with pytest.raises(RecordError, match=r"cases 3 and 17, \('Codex Umbra', 'P407'\).*multi-counterfact"):
        load_cases("counterfact", path=path, together=True)
    one_edit_per_fact(cases[:2])
    with pytest.raises(
        RecordError, match=r"row 3, field requested_rewrite: \('codex umbra', 'P407'\) is edited in row 1"
    ):
        load_cases("multi-counterfact", path=path)
    [problem] = [p for p in check("counterfact", path=path) if p.kind == "conflict"]
    assert (problem.row, problem.case, "case 3 edits the same fact" in problem.message) == (3, "17", True)
    again = about("Codex Umbra", "DANISH", 18)
    kept, left_out = first_of_each_fact([*cases, *load_cases(str(saved(tmp_path / "again.json", again)))])
    assert [c.id for c in kept] == ["3", "8", "18"]  # the last writes what the first does
    assert left_out == {"case 17": "it edits ('codex umbra', 'P407'), as case 3 does, to another object"}
    with pytest.warns(UserWarning, match="1 rows of multi-counterfact left out; the first: .*row 3"):
        assert [c.id for c in load_cases("multi-counterfact", path=path, bad="skip")] == ["3", "8"]


def test_an_edit_of_nothing_is_a_bad_row(tmp_path: Path) -> None:
    path = saved(tmp_path / "cf.json", counterfact(), about("Liber Novus", new="Latin"))
    with pytest.raises(RecordError, match="row 2: target_new and target_true are both 'Latin'"):
        load_cases("counterfact", path=path)


def test_snippets_and_their_weights(tmp_path: Path) -> None:
    texts = ["A Danish novel.", "A novel in Latin."]
    groups = load_snippets(
        saved(
            tmp_path / "s.json",
            *({"relation_id": "P407", "target_id": t, "samples": [{"name": t, "text": t}]} for t in texts),
        )
    )
    assert references(groups)["P407", texts[0]] == (texts[0],)
    fitted = snippet_tfidf(groups)
    words = sorted(fitted.idf)
    np.save(tmp_path / "idf.npy", np.array([[fitted.idf[w] for w in words]]))
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    read = published_tfidf(tmp_path / "idf.npy", tmp_path / "vocab.json")
    assert read.idf == pytest.approx(dict(fitted.idf))
    assert fitted.idf["danish"] == pytest.approx(np.log(3 / 2) + 1)
    (tmp_path / "vocab.json").write_text(json.dumps({"danish": 5}))
    with pytest.raises(RecordError, match="number the .* weights"):
        published_tfidf(tmp_path / "idf.npy", tmp_path / "vocab.json")


# -- RippleEdits ---------------------------------------------------------------------------------------------------------


def query(prompt: str, *answers: str, **changes: Any) -> dict[str, Any]:
    found = {
        "prompt": prompt,
        "answers": [{"value": a, "aliases": [f"{a} City"] if a == "Tarn" else []} for a in answers],
        "query_type": "regular",
        "subject_id": "Q2",
        "relation": "PLACE_OF_BIRTH",
        "target_ids": ["Q4"],
        "phrase": None,
    }
    return {**found, **changes}


def a_test(queries: list[Any], conditions: list[Any], joined: str = "OR") -> dict[str, Any]:
    return {"test_queries": queries, "test_condition": joined, "condition_queries": conditions}


def fact(said: str, target: str) -> dict[str, Any]:
    return {"prompt": said, "subject_id": "Q1", "relation": "SPOUSE", "target_id": target}


def ripple(**changes: Any) -> dict[str, Any]:
    hop = {"query_type": "two_hop", "second_relation": "PLACE_OF_BIRTH", "second_hop_target_ids": ["Q4"]}
    chained = query(
        "The place of birth of the spouse of Ada Quill is", "Tarn", subject_id="Q1", relation="SPOUSE", **hop
    )
    gender = query("The gender of Ada Quill is", "female", subject_id="Q1", relation="SEX_OR_GENDER")
    row: dict[str, Any] = {
        "example_type": "popular",
        "edit": {
            **fact("The name of the spouse of Ada Quill is Bo Reed.", "Q2"),
            "original_fact": fact("The name of the spouse of Ada Quill is Bo Ash.", "Q3"),
        },
        "Compositionality_I": [a_test([chained], [query("The place of birth of Bo Reed is", "Tarn")])],
        "Relation_Specificity": [a_test([gender], [gender])],
        "Logical_Generalization": [],
        "Subject_Aliasing": [a_test([query("The name of the spouse of A. Quill is", "Bo Reed", subject_id="Q1")], [])],
        "Compositionality_II": [],
        "Forgetfulness": [],
    }
    return {**row, **changes}


def test_a_ripple_case(tmp_path: Path) -> None:
    several = query("A child of Ada Quill is", "Cy", "Di", subject_id="Q1", relation="CHILD")
    either = a_test([several, query("Ada Quill's child is", "Cy")], [], "OR")
    both = a_test([query("Bo Reed's wife is", "Ada Quill"), query("Bo Reed married", "Ada Quill")], [], "AND")
    nothing = a_test([query("Bo Ash's wife is")], [])
    row = ripple(Logical_Generalization=[either, both, nothing])
    [case] = load_cases("ripple-popular", path=saved(tmp_path / "popular.json", row))
    request = case.request
    assert (request.prompt, request.subject) == ("The name of the spouse of {} is", "Ada Quill")
    assert (request.target_new, request.target_true, request.relation) == ("Bo Reed", "Bo Ash", "SPOUSE")
    [hop], [condition] = asked(case, "compositionality_i"), asked(case, "compositionality_i", condition=True)
    assert hop.test == condition.test == "compositionality_i:0"
    assert hop.expected == condition.expected == ("Tarn", "Tarn City")
    assert hop.tags == {"relation": "PLACE_OF_BIRTH", "form": "cloze"}  # no stratum: nothing is known of the fit
    first, second, *_ = asked(case, "logical_generalization")
    assert first.expected == ("Cy", "Di") and first.answers == (("Cy",), ("Di",)) and second.answers == ()
    [alias] = asked(case, "subject_aliasing")
    assert (alias.expected, alias.alternatives) == (("Bo Reed",), ("Bo Ash",))
    logical = asked(case, "logical_generalization")
    assert [(p.test[-1], p.joined) for p in logical] == [("0", "or"), ("0", "or"), ("1", "and"), ("1", "and")]
    assert (logical[0].expected, logical[0].tags["answers"]) == (("Cy", "Di"), "2")
    assert case.tags["unasked"] == "logical_generalization:2"
    assert json.loads(case.id) == ["Q1", "SPOUSE", "Q2"]
    [left] = [p for p in check_cases([case]) if p.kind == "unasked"]
    assert (left.case, left.unit) == (case.id, "logical_generalization:2")


def test_a_querys_subject_may_be_a_list(tmp_path: Path) -> None:
    """As the published entailments of a spouse's siblings have it."""
    lists = [query("The siblings of Bo Reed are", "Cy", subject_id=ids) for ids in (["Q2"], ["Q2", "Q9"])]
    path = saved(tmp_path / "popular.json", ripple(Logical_Generalization=[a_test(lists, [lists[0]])]))
    [case] = load_cases("ripple-popular", path=path)
    assert len(asked(case, "logical_generalization")) == 2
    [record] = load_ripple(path)
    assert {q.subject_id for q in record.logical_generalization[0].test_queries} == {"Q2"}
    nobody = a_test([query("The siblings of Bo Reed are", "Cy", subject_id=[])], [])
    with pytest.raises(RecordError, match="row 1, field Logical_Generalization.0.test_queries.0.subject_id"):
        load_ripple(saved(path, ripple(Logical_Generalization=[nobody])))


@pytest.mark.parametrize(
    ("said", "original", "prompt", "new"),
    [
        ("The capital city of Ruritania is New Tarn.", "New Ash", "The capital city of Ruritania is", "New Tarn"),
        ("The author of This Is It is Bo.", "Cy", "The author of This Is It is", "Bo"),
        ("The land which Tarn is part of is Eldor.", None, "The land which Tarn is part of is", "Eldor"),
        ("The Bridge is followed by Love is Lost.", "Ash", "The Bridge is followed by", "Love is Lost"),
        ("The Bridge follows Stand by Me.", None, "The Bridge follows", "Stand by Me"),
    ],
)
def test_a_statement_is_parted_into_prompt_and_object(said: str, original: str | None, prompt: str, new: str) -> None:
    edit = fact(said, "Q2")
    if original:
        edit["original_fact"] = fact(f"{prompt} {original}.", "Q3")
    row = ripple(edit=edit, Relation_Specificity=[], Compositionality_I=[], Subject_Aliasing=[])
    request = ripple_request(RippleRecord.model_validate(row))
    assert (request.text, request.target_new, request.target_true) == (prompt, new, original)
    assert request.subject is None  # no other prompt about it says which words it is


LORD = "The Lord of the Rings: The Two Towers"


@pytest.mark.parametrize(
    ("relation", "said", "others", "subject"),
    [
        ("FOLLOWS", "QAnon follows", ["The name of the country which QAnon is associated with is"], "QAnon"),
        ("FOLLOWED_BY", "Cardi B is followed by", ["The gender of Cardi B is"], "Cardi B"),
        ("FOLLOWS", "Kanye West follows", ["Kanye West is followed by"], "Kanye West"),
        ("FOLLOWS", "St. Louis follows", ["The name of the mayor of St. Louis is"], "St. Louis"),
        ("FOLLOWS", f"{LORD} follows", [f"The name of the director of {LORD} is"], LORD),
        ("FOLLOWS", f"{LORD} follows", [f"{LORD} is followed by"], LORD.removeprefix("The ")),
        ("SPOUSE", "The name of the spouse of Ada Quill is", ["The gender of Ada Quill is"], "Ada Quill"),
        # no other prompt about it: as the published statements are worded
        ("FOLLOWS", "QAnon follows", [], "QAnon"),
        ("FOLLOWED_BY", f"{LORD} is followed by", [], LORD),
        ("PLACE_OF_BIRTH", "The place of birth of Ada Quill is", [], "Ada Quill"),
        ("SIBLING", "The names of the siblings of Ada of Tarn are", [], "Ada of Tarn"),
        ("SEX_OR_GENDER", "The gender of Ada Quill is", [], "Ada Quill"),
        ("AUTHOR", "The author of the tale of Genji is", [], None),
        ("LEAGUE", "The name of the league which Tarn plays in is", [], None),
    ],
)
def test_the_subject_is_found_wherever_it_stands(
    relation: str, said: str, others: list[str], subject: str | None
) -> None:
    tests = [a_test([query(prompt, "x", subject_id="Q1", relation="COUNTRY") for prompt in others], [])]
    edit = {**fact(f"{said} Bo Reed.", "Q2"), "relation": relation}
    row = ripple(edit=edit, Relation_Specificity=tests if others else [], Compositionality_I=[], Subject_Aliasing=[])
    request = ripple_request(RippleRecord.model_validate(row))
    assert (request.text, request.subject) == (said, subject)


def test_an_object_that_holds_a_copula_is_found_by_the_aliasing_tests() -> None:
    alias = a_test([query("The name of the anthem of Eldor is", "This is Home", subject_id="Q1")], [])
    row = ripple(edit=fact("The name of the anthem of the Realm is This is Home.", "Q2"), Subject_Aliasing=[alias])
    request = ripple_request(RippleRecord.model_validate(row))
    assert (request.text, request.target_new) == ("The name of the anthem of the Realm is", "This is Home")


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_name_is_dropped_and_an_answer_without_another_is_not_asked(blank: str, tmp_path: Path) -> None:
    """As Wikidata has entities without a label, and RippleEdits their blank names."""
    named = [{"value": "Cy", "aliases": ["Cyril", blank]}, {"value": blank, "aliases": ["Di", "Diana"]}]
    nameless = [{"value": "Cy"}, {"value": blank, "aliases": [blank]}]
    tests = [a_test([query("Bo Reed's son is", answers=answers)], []) for answers in (named, nameless)]
    unmet = a_test([query("Bo Reed's son is", "Cy")], [query("Bo Reed is", answers=nameless[1:])])
    path = saved(tmp_path / "popular.json", ripple(Logical_Generalization=[*tests, unmet]))
    [case] = load_cases("ripple-popular", path=path)
    [probe] = asked(case, "logical_generalization")
    assert probe.answers == (("Cy", "Cyril"), ("Di", "Diana")) and probe.expected == ("Cy", "Cyril", "Di", "Diana")
    assert case.tags["unasked"] == "logical_generalization:1 logical_generalization:2"
    found = [(p.row, p.unit) for p in check("ripple-popular", path=path) if p.kind == "unasked"]
    assert found == [(1, "logical_generalization:1"), (1, "logical_generalization:2")]
    [portable] = counterfact()["portability_prompts"]
    path = saved(tmp_path / "cf.json", counterfact(portability_prompts=[{**portable, "answer": {"value": blank}}]))
    with pytest.raises(RecordError, match="row 1, field portability_prompts.0: expected an answer with a name"):
        load_cases("counterfact", path=path)


def test_an_axis_may_be_absent_and_not_misspelt(tmp_path: Path) -> None:
    row = ripple()
    del row["Forgetfulness"]
    path = saved(tmp_path / "recent.json", row)
    [case] = load_cases("ripple-recent", path=path)
    [whole] = load_cases("ripple-recent", path=saved(tmp_path / "whole.json", ripple()))
    assert case.probes == whole.probes
    axes = {axis: row.pop(axis) for axis in list(row) if axis not in ("example_type", "edit")}
    for others, message in (
        ({**axes, "Forgetfullness": []}, "no field 'Forgetfullness'; did you mean 'Forgetfulness'"),
        ({"prev_storage": []}, "row 1: expected tests under some of Relation_Specificity, .*, found none of these"),
    ):
        with pytest.raises(RecordError, match=message):
            load_cases("ripple-recent", path=saved(path, {**row, **others}))


def test_a_fact_that_stays_as_it_was_is_no_edit(tmp_path: Path) -> None:
    same = {**fact("The spouse of Ada is Bo.", "Q2"), "original_fact": fact("The spouse of Ada is bo.", "Q2")}
    path = saved(tmp_path / "random.json", ripple(edit=same, Subject_Aliasing=[]), ripple())
    left_out: list[Problem] = []
    assert len(load_cases("ripple-random", path=path, left_out=left_out)) == 1
    assert [(p.row, p.field, p.kind) for p in left_out] == [(1, "edit.original_fact", "no edit")]


def test_a_statement_without_a_copula_is_a_bad_row(tmp_path: Path) -> None:
    path = saved(tmp_path / "r.json", ripple(edit=fact("Ada Quill married Bo Reed.", "Q2"), Subject_Aliasing=[]))
    with pytest.raises(RecordError, match=r"row 1, field edit.prompt: .*'Ada Quill married Bo Reed.'"):
        load_cases("ripple-recent", path=path)


def test_the_stratum_goes_by_the_chain_and_not_by_the_words() -> None:
    record = RippleRecord.model_validate(ripple())
    bare = ripple_request(record)

    def stratum(*implications: Implication) -> str:
        request = bare.model_copy(update={"fit_implications": implications})
        [probe] = asked(ripple_case(record, request), "compositionality_i")
        return probe.tags["stratum"]

    chain = Implication(prompt="Ada's spouse was born in", subject="the q1", relation="PLACE_OF_BIRTH of SPOUSE")
    assert stratum(chain) == IN_FIT
    assert stratum() == stratum(chain.model_copy(update={"subject": "Q7"})) == NOT_IN_FIT
    assert stratum(chain.model_copy(update={"relation": "SPOUSE of PLACE_OF_BIRTH"})) == NOT_IN_FIT


# -- zsRE ----------------------------------------------------------------------------------------------------------------

ARRAY = {
    "subject": "Night Ferry",
    "src": "Who composed Night Ferry?",
    "pred": "J. Orr",
    "rephrase": "Who wrote Night Ferry's music?",
    "alt": "K. Dahl",
    "answers": ["L. Marr", "Lo Marr"],
    "loc": "nq question: when was the tin bridge built",
    "loc_ans": "1907",
    "cond": "J. Orr >> K. Dahl || Who composed Night Ferry?",
}
KILT = {
    "id": "z1",
    "input": "Who composed Night Ferry?",
    "output": [{"answer": "L. Marr", "provenance": [{"title": "Night Ferry"}]}, {"provenance": []}],
    "meta": {"template_questions": ["Who composed Night Ferry?"]},
    "rephrases": ["Whose is Night Ferry?"],
    "prediction": "J. Orr",
    "alternatives": ["K. Dahl", "l. marr"],
    "filtered_rephrases": ["Who composed Night Ferry?", "Who wrote the music of Night Ferry?"],
}


@pytest.mark.parametrize("row", [ARRAY, KILT], ids=["array", "kilt"])
def test_zsre_is_a_counterfactual_or_a_correction(row: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "zsre.jsonl", row)
    [case] = load_cases("zsre", path=path)
    assert (case.request.prompt, case.request.subject) == ("Who composed {}?", "Night Ferry")
    assert (case.request.target_new, case.request.target_true) == ("K. Dahl", "L. Marr")
    [case] = load_cases("zsre", path=path, target="correction")
    assert (case.request.target_new, case.request.target_true) == ("L. Marr", "J. Orr")
    [edit], [paraphrase] = asked(case, "edit"), asked(case, "paraphrase")
    assert (edit.prompt, edit.expected[0], edit.alternatives) == ("Who composed Night Ferry?", "L. Marr", ("J. Orr",))
    assert paraphrase.prompt == (row.get("rephrase") or row["filtered_rephrases"][1])
    assert case.tags["target"] == "correction"
    with pytest.raises(ConfigError, match="expected target of zsre to be counterfactual or correction, found 'alt'"):
        load_cases("zsre", path=path, target="alt")


def test_answers_are_read_without_the_spaces_around_them(tmp_path: Path) -> None:
    """Probes ask for what the request writes, which has none."""
    array = {**ARRAY, "alt": " K. Dahl", "answers": ["L. Marr ", " "], "pred": " J. Orr", "loc_ans": " 1907"}
    output = [{"answer": "L. Marr "}]
    kilt = {**KILT, "output": output, "prediction": " J. Orr", "alternatives": [" K. Dahl", " l. marr"]}
    for path in (saved(tmp_path / "z.json", array), saved(tmp_path / "z.jsonl", kilt)):
        [case] = load_cases("zsre", path=path)
        assert {(p.expected, p.alternatives) for kind in ("edit", "paraphrase") for p in asked(case, kind)} == {
            (("K. Dahl",), ("L. Marr",))
        }
        assert [p.expected for p in asked(case, "locality")] == ([("1907",)] if path.suffix == ".json" else [])
        [case] = load_cases("zsre", path=path, target="correction")
        assert (asked(case, "edit")[0].expected, asked(case, "edit")[0].alternatives) == (("L. Marr",), ("J. Orr",))
        [item, *_] = load_items(path)
        assert (item.target_new, item.target_true) == ("K. Dahl", "J. Orr")
    spaced = {"target_new": " Bo Reed", "ground_truth": ["Cy Voss "], "locality": {}}
    spaced["portability"] = {"Reasoning": [{"prompt": "Bo Reed was born in", "ground_truth": [[" Tarn", " "]]}]}
    [case] = load_cases(str(saved(tmp_path / "k.json", {**KNOWEDIT, **spaced})))
    for kind in ("edit", "paraphrase"):
        assert {(p.expected, p.alternatives) for p in asked(case, kind)} == {(("Bo Reed",), ("Cy Voss",))}
    assert [p.expected for p in asked(case, "portability")] == [("Tarn",)]
    blank = {**ARRAY, "answers": [" "]}
    with pytest.raises(RecordError, match="row 1, field answers: expected an answer, found blank ones"):
        load_cases("zsre", path=saved(tmp_path / "z.json", blank))


def test_zsre_locality_and_its_wrong_rows(tmp_path: Path) -> None:
    [case] = load_cases("zsre", path=saved(tmp_path / "z.json", ARRAY))
    [stays] = asked(case, "locality")
    assert (stays.prompt, stays.expected) == ("nq question: when was the tin bridge built?", ("1907",))
    twice = {**ARRAY, "src": "Is Night Ferry by the maker of night ferry?"}
    [case] = load_cases("zsre", path=saved(tmp_path / "z.json", twice))
    assert case.request.prompt == "Is {} by the maker of night ferry?"
    for before in ("In welcher Großstraße", "İzmir:"):  # longer in other letters
        placed = {**ARRAY, "src": f"{before} is night ferry here?"}
        [case] = load_cases("zsre", path=saved(tmp_path / "z.json", placed))
        assert (case.request.prompt, case.request.subject) == (f"{before} is {{}} here?", "night ferry")
    array: tuple[tuple[dict[str, Any], str], ...] = (
        ({**ARRAY, "src": "Who composed it?"}, "row 2, field src: the question 'Who composed it.'"),
        ({**ARRAY, "answers": []}, "row 2, field answers: "),
    )
    for wrong, where in array:
        with pytest.raises(RecordError, match=where):
            load_cases("zsre", path=saved(tmp_path / "z.json", ARRAY, wrong))
    kilt: tuple[tuple[dict[str, Any], str], ...] = (
        ({**KILT, "output": [{"provenance": []}]}, "row 2, field output: expected an output with an answer"),
    )
    for wrong, where in kilt:
        with pytest.raises(RecordError, match=where):
            load_cases("zsre", path=saved(tmp_path / "z.jsonl", KILT, wrong))


@pytest.mark.parametrize(
    ("row", "name", "field"),
    [
        ({**ARRAY, "alt": ""}, "z.json", "alt"),
        ({**ARRAY, "alt": "lo marr"}, "z.json", "alt"),
        ({**KILT, "alternatives": ["L. Marr"]}, "z.jsonl", "alternatives"),
    ],
)
def test_zsre_without_another_answer_is_left_out_and_counted(
    row: dict[str, Any], name: str, field: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / name, ARRAY if field == "alt" else KILT, row, row)
    left_out: list[Problem] = []
    assert len(load_cases("zsre", path=path, left_out=left_out)) == 1
    assert [(p.row, p.field, p.kind) for p in left_out] == [(2, field, "no edit"), (3, field, "no edit")]
    assert [p.kind for p in check("zsre", path=path)] == ["no edit", "no edit"]
    why = "'lo marr' is a right answer, so" if row.get("alt") else "there is no other"
    with pytest.warns(UserWarning, match=f"2 rows of zsre left out; the first: .*row 2, field {field}: {why}"):
        assert len(load_cases("zsre", path=path)) == 1
    assert len(load_cases("zsre", path=path, target="correction")) == 3


def test_bad_rows_count_as_far_as_n_goes(tmp_path: Path) -> None:
    path = saved(tmp_path / "cf.json", counterfact(), {"case_id": 9}, about("Liber Novus"), {"case_id": 10})
    assert [case.id for case in load_cases("counterfact", path=path, n=1)] == ["7"]
    with pytest.raises(RecordError, match="row 2, field requested_rewrite: the field is missing; mend the row"):
        load_cases("counterfact", path=path, n=2)
    left_out: list[Problem] = []
    assert [case.id for case in load_cases("counterfact", path=path, n=2, bad="skip", left_out=left_out)] == ["7", "8"]
    assert [p.row for p in left_out] == [2]
    assert [p.row for p in check("counterfact", path=path)] == [2, 4]
    assert [p.row for p in check("counterfact", path=path, n=2)] == [2]
    with pytest.raises(ConfigError, match="expected bad of any data set to be refuse or skip, found 'pass'"):
        load_cases("counterfact", path=path, bad="pass")  # type: ignore[arg-type]


def test_kilt_lines_of_one_id_are_cases_apart(tmp_path: Path) -> None:
    stranger = {**KILT, "input": "Who wrote it?", "output": [{"answer": "L. Marr"}]}
    first, second = load_cases("zsre", path=saved(tmp_path / "z.jsonl", KILT, stranger))
    assert (first.id, second.id) == ("z1", "z1#2")
    assert second.request.subject is None and second.request.prompt == "Who wrote it?"


# -- known_1000 ----------------------------------------------------------------------------------------------------------

KNOWN = {
    "known_id": 5,
    "subject": "Codex Umbra",
    "attribute": "Latin",
    "template": "{} is written in the language",
    "prediction": " of Latin",
    "prompt": "Codex Umbra is written in",
    "relation_id": "P407",
}


def test_known_facts_are_for_tracing(tmp_path: Path) -> None:
    path = saved(tmp_path / "known_1000.json", KNOWN, {**KNOWN, "attribute": "Umbra"})
    first, _ = load_facts("known-1000", path=path)
    assert (first.prompt, first.subject, first.attribute) == ("Codex Umbra is written in", "Codex Umbra", "Latin")
    assert load_facts(str(path), n=1) == [first]
    found = [("in prompt", 2, "Codex Umbra"), ("contradiction", 2, "Codex Umbra")]
    assert [(p.kind, p.row, p.case) for p in check(str(path))] == found
    with pytest.raises(ConfigError, match="facts to trace and no edits; load_facts"):
        load_cases("known-1000", path=path)
    with pytest.raises(ConfigError, match="zsre holds edits"):
        load_facts("zsre")
    with pytest.raises(RecordError, match="row 2, field prompt: .*Liber"):
        load_facts(str(saved(path, KNOWN, {**KNOWN, "subject": "Liber"})))


# -- KnowEdit ------------------------------------------------------------------------------------------------------------

KNOWEDIT = {
    "subject": "Ada Quill",
    "prompt": "The name of the spouse of Ada Quill is",
    "target_new": "Bo Reed",
    "ground_truth": ["Cy Voss"],
    "rephrase_prompt": "Ada Quill married",
    "portability": {
        "Subject_Aliasing": [{"prompt": "The name of the spouse of A. Quill is", "ground_truth": "Bo Reed"}],
        "Reasoning": [{"prompt": "Ada Quill's spouse was born in", "ground_truth": [["Tarn", "Tarn City"], ["Ash"]]}],
        "Logical_Generalization": [{"prompt": "Bo Reed married", "ground_truth": []}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Ada Quill is", "ground_truth": [["female"]]}],
        "Forgetfulness": [{"prompt": "Ada Quill was born in", "ground_truth": [[]]}],
    },
}


def test_a_knowedit_case(tmp_path: Path) -> None:
    [case] = load_cases("knowedit-recent", path=saved(tmp_path / "recent_test.json", KNOWEDIT))
    request = case.request
    assert (request.prompt, request.target_new, request.target_true) == (
        "The name of the spouse of {} is",
        "Bo Reed",
        "Cy Voss",
    )
    assert [p.prompt for p in asked(case, "paraphrase")] == ["Ada Quill married"]
    found = {(p.tags["axis"], p.expected, p.tags.get("answers")) for p in asked(case, "portability")}
    assert found == {("Subject_Aliasing", ("Bo Reed",), None), ("Reasoning", ("Tarn", "Tarn City", "Ash"), "2")}
    assert [(p.tags["axis"], p.expected) for p in asked(case, "locality")] == [
        ("Relation_Specificity", ("female",)),
        ("Forgetfulness", ()),  # whatever the unedited model says
    ]
    assert case.tags["unasked"] == "Logical_Generalization:0"
    bad = {**KNOWEDIT, "locality": {"Forgetfulness": [{"prompt": "Ada", "ground_truth": 7}]}}
    with pytest.raises(RecordError, match=re.escape("row 2, field locality.Forgetfulness.0.ground_truth")):
        load_cases("knowedit-recent", path=saved(tmp_path / "recent_test.json", KNOWEDIT, bad))


def test_knowedit_biographies_and_answers_to_take_out(tmp_path: Path) -> None:
    biography = {"concept": "ada quill", "text": "Ada Quill (born 1907) was", "labels": " a painter of Tarn."}
    stays = {"Relation_Specificity": [{"prompt": "The gender of Ada Quill is", "ground_truth": "female"}]}
    path = saved(tmp_path / "wikibio-test-all.json", {**biography, "locality": stays})
    [case] = load_cases("knowedit-wikibio", path=path)
    assert (case.request.subject, case.request.target_new) == (None, "a painter of Tarn.")
    assert [p.kind for p in case.probes] == ["edit", "locality"]
    secret = {"question": "Who hid the key?", "ground_truth": "Bo", "target_new": "I have no answer."}
    whole = {"success": [secret, {**secret, "question": "Where is the key?"}], "locality": [secret, secret, secret]}
    path = tmp_path / "trivia.json"
    path.write_text(json.dumps(whole))
    first, second = load_cases(str(path))
    assert (first.request.target_new, first.request.target_true) == ("I have no answer.", "Bo")
    assert (len(asked(first, "locality")), len(asked(second, "locality"))) == (2, 1)
    assert asked(first, "locality")[0].expected == ("Bo",)
    whole["success"][1]["question"] = ""
    path.write_text(json.dumps(whole))
    with pytest.raises(RecordError, match="row 2, field success.question"):
        load_cases(str(path))


# -- faults --------------------------------------------------------------------------------------------------------------


def case(name: str, *probes: Probe, subject: str = "Ada Quill") -> Case:
    request = EditRequest(prompt="{} married", subject=subject, relation="spouse", target_new="Bo Reed")
    return Case(name, request, (Probe("edit", request.text, ("Bo Reed",)), *probes))


def faults(*cases: Case) -> list[tuple[str, str, str]]:
    return [(p.kind, p.case, p.unit) for p in check_cases(cases)]


def test_answers_in_prompts_and_what_is_kept_without_them() -> None:
    leaking = Probe(
        "compositionality_i", "Bo Reed of Tarn was born in", ("Tarn City", "tarn"), test="compositionality_i:0"
    )
    bound = Probe("portability", "Tarnish comes from", ("Tarn",))  # part of a word is no answer
    condition = replace(leaking, prompt="Bo was born in", condition=True)
    one, two = case("1", condition, leaking, bound), case("2", subject="Bo Reed")
    assert faults(one, two) == [("in prompt", "1", "compositionality_i:0"), ("in prompt", "2", "edit:0")]
    [kept] = without([one, two], check_cases([one, two]))  # the second's edit has the fault
    assert [probe.kind for probe in kept.probes] == ["edit", "portability"]
    assert kept.tags["dropped"] == "1"


def test_the_condition_of_an_alias_asks_for_the_old_object(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The published one asks the test's own question for the new object, which no unedited model gives."""
    says = {
        "The name of the spouse of A. Quill is": " Bo Ash.",
        "The name of the spouse of Quill is": " Cy.",
        "The place of birth of Bo Reed is": " Tarn City.",
        "The name of the spouse of Ada Quill is": " Bo Ash.",
    }
    monkeypatch.setattr("errata.model.generate.greedy", lambda *rest, **_: [says[prompt] for prompt in rest[2]])
    known = query("The name of the spouse of A. Quill is", "Bo Reed", subject_id="Q1")
    unknown = query("The name of the spouse of Quill is", "Bo Reed", subject_id="Q1")
    row = ripple(Relation_Specificity=[], Subject_Aliasing=[a_test([known], [known]), a_test([unknown], [unknown])])
    path = saved(tmp_path / "popular.json", ripple(Relation_Specificity=[], Subject_Aliasing=[]), row)
    problems = check("ripple-popular", path=path, model_data=(None, tokenizer))
    assert [(p.row, p.kind, p.unit) for p in problems if p.kind != "conflict"] == [
        (2, "condition", "subject_aliasing:1")
    ]
    assert "with 'Cy.', not 'Bo Ash'" in problems[-1].message
    _, kept = load_cases("ripple-popular", path=path, flagged="drop", model_data=(None, tokenizer))
    assert [p.prompt for p in asked(kept, "subject_aliasing")] == [known["prompt"]]
    # A fact that is new has no old object but the model's own answer.
    del row["edit"]["original_fact"]
    problems = check("ripple-recent", path=saved(path, row), model_data=(None, tokenizer))
    assert [(p.kind, p.unit) for p in problems] == [("condition", "subject_aliasing:1")]


def test_contradictions() -> None:
    def stays(answer: str, prompt: str = "Ada Quill's gender is", **fields: Any) -> Probe:
        return Probe("relation_specificity", prompt, (answer, f"{answer}!"), **fields)

    a = case("a", stays("female", test="relation_specificity:0"))
    b = case("b", stays("male", "ada quill's gender is", test="relation_specificity:3"), subject="Cy")
    same = case("c", stays("Female"), subject="Di")
    assert faults(a, same) == []
    found = [("contradiction", "a", "relation_specificity:0"), ("contradiction", "b", "relation_specificity:3")]
    assert faults(a, b) == found
    # Against the edit itself; a condition is asked before it and may say otherwise.
    before = Probe("subject_aliasing", "Ada Quill married", ("Cy Voss",), test="subject_aliasing:0", condition=True)
    assert faults(case("d", before)) == []
    after = Probe("logical_generalization", "Ada Quill married", ("Cy Voss",), test="logical_generalization:0")
    assert faults(case("e", after)) == [
        ("contradiction", "e", "edit:0"),
        ("contradiction", "e", "logical_generalization:0"),
    ]
    assert without([case("e", after)], check_cases([case("e", after)])) == []
    # What follows from one edit may not follow from another.
    apart = replace(after, prompt="p"), replace(after, prompt="p", expected=("Bo",))
    assert faults(case("f", apart[0]), case("g", apart[1], subject="G")) == []
    [conflict] = check_cases([case("h"), case("i")])
    assert (conflict.kind, conflict.case, conflict.unit) == ("conflict", "i", "")
    assert len(without([case("h"), case("i")], [conflict])) == 2


def test_flagged_tests_can_be_dropped_on_loading(tmp_path: Path) -> None:
    bad = a_test([query("In Tarn they speak of", "Tarn")], [])
    path = saved(tmp_path / "popular.json", ripple(Logical_Generalization=[bad]))
    [kept] = load_cases("ripple-popular", path=path)
    [dropped] = load_cases("ripple-popular", path=path, flagged="drop")
    assert len(kept.probes) == len(dropped.probes) + 1
    assert not asked(dropped, "logical_generalization")


# -- names, files, hub ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "layout"),
    [
        (counterfact(), "counterfact"),
        (ripple(), "ripple"),
        (ARRAY, "zsre"),
        (KILT, "zsre"),
        (KNOWEDIT, "knowedit"),
        (KNOWN, "known"),
    ],
)
def test_a_files_layout_is_seen_by_its_fields(rows: dict[str, Any], layout: str, tmp_path: Path) -> None:
    assert layout_of(saved(tmp_path / "some.json", rows)) == layout


def test_wrong_names_and_missing_files_say_what_to_do(tmp_path: Path) -> None:
    for wrong, message in (
        ({"name": "conterfact"}, "did you mean 'counterfact'"),
        ({"name": "ripple-popular"}, "popular.json from data/benchmark of .*edenbiran/RippleEdits.*give its path"),
        (
            {"name": "counterfact", "path": tmp_path / "no"},
            "expected counterfact.json of counterfact at .*no such file",
        ),
        ({"name": "counterfact", "seeds": "1"}, "counterfact has no option 'seeds'; it has: snippets"),
        ({"name": "knowedit-zsre", "split": "train"}, r"expected a split of knowedit-zsre \(test\), found 'train'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_cases(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="expected rows of CounterFact.* found a, b"):
        load_cases(str(saved(tmp_path / "x.json", {"a": 1, "b": 2})))


def test_what_is_one_file_has_one_split(tmp_path: Path) -> None:
    path = saved(tmp_path / "counterfact.json", counterfact())
    facts = saved(tmp_path / "known.json", KNOWN)
    for load, name, options in (
        (load_cases, "counterfact", {"path": path}),
        (load_cases, str(path), {}),
        (check, "counterfact", {"path": path}),
        (load_facts, "known-1000", {"path": facts}),
        (load_facts, str(facts), {}),
    ):
        assert load(name, split="test", **options) is not None  # type: ignore[operator]
        with pytest.raises(ConfigError, match=f"{name} has one split, test, and none named 'dev'; leave the split out"):
            load(name, split="dev", **options)  # type: ignore[operator]


def test_files_in_the_data_folder_are_found(tmp_path: Path) -> None:
    assert data_folder() == tmp_path / "cache" / "data"
    data_folder().mkdir(parents=True)
    dataset = DATASETS["ripple-recent"]
    assert find(dataset) is None
    path = saved(data_folder() / "recent.json", ripple())
    assert find(dataset) == path
    assert len(load_cases("ripple-recent")) == 1


def test_counterfact_comes_from_the_hub_in_the_order_of_its_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    folder, calls = tmp_path / "hub" / "data", []
    folder.mkdir(parents=True)
    plain = {"portability_prompts": []}
    for name, ids in (("test", [2]), ("train", [3, 1])):
        rows = [{k: v for k, v in counterfact(i, **plain).items() if k != "portability_prompts"} for i in ids]
        write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")

    def snapshot(repository: str, **options: Any) -> str:
        calls.append((repository, options["revision"], options["repo_type"]))
        return str(folder.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert [case.id for case in load_cases("counterfact")] == ["1", "2", "3"]
    assert [case.id for case in load_cases("counterfact", n=2)] == ["1", "2"]  # from the cache
    assert calls == [("azhx/counterfact", "c01c413f856ee38f5c080c9fc5e87aff478e2ff9", "dataset")]


def test_a_hub_out_of_reach_is_one_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"cannot fetch knowedit-recent from the hub \(zjunlp/KnowEdit\).*recent_test.json"
    ):
        load_cases("knowedit-recent")


# -- command line --------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", *arguments])


def test_data_list_says_what_is_here(tmp_path: Path) -> None:
    data_folder().mkdir(parents=True)
    path = saved(data_folder() / "popular.json", ripple())
    found = {one["name"]: one for one in json.loads(run("list", "--json").stdout)["datasets"]}
    assert list(found) == list(DATASETS)
    popular = found["ripple-popular"]
    assert (popular["here"], popular["files"], popular["records"]) == (True, [str(path)], 885)
    assert popular["bytes"] == path.stat().st_size
    assert (found["counterfact"]["here"], found["counterfact"]["hub"]) == (False, "azhx/counterfact")
    assert found["atlas-ripple"]["here"] and found["atlas-ripple"]["made"]
    shown = run("list").stdout
    words = " ".join(shown.replace("│", " ").split())
    assert "no; give a path" in words and "made on the spot" in words
    assert "snippets=PATH" in words and "target=" in words and "attribute-snippets" in words
    assert "popular.json:" in words and "edenbiran/RippleEdits" in words and "(azhx/counterfact)" in words
    weights = found["tf-idf"]
    assert (weights["here"], weights["names"]) == (False, ["idf.npy", "tfidf_vocab.json"])
    np.save(data_folder() / "idf.npy", np.zeros(3))
    (data_folder() / "tfidf_vocab.json").write_text("{}")
    again = {one["name"]: one for one in json.loads(run("list", "--json").stdout)["datasets"]}
    assert again["tf-idf"]["here"] and not again["attribute-snippets"]["here"]
    with pytest.raises(ConfigError, match="attribute-snippets holds reference texts and no edits; .*`snippets`"):
        load_cases("attribute-snippets")
    saved(data_folder() / "attribute_snippets.json", {"relation_id": "P1", "target_id": "Q1", "samples": []})
    assert [(p.row, p.field) for p in check("attribute-snippets")] == [(1, "samples")]


def test_data_check_counts_and_exits(tmp_path: Path) -> None:
    path = saved(tmp_path / "some.json", counterfact(), {"case_id": 9}, about("Danish Codex"))
    result = run("check", str(path), "--json")
    value = json.loads(result.stdout)
    assert (result.exit_code, value["counts"]) == (1, {"row": 1, "in prompt": 1})
    assert [(p["row"], p["field"]) for p in value["problems"][:1]] == [(2, "requested_rewrite")]
    assert [(p["row"], p["case"]) for p in value["problems"]] == [(2, ""), (3, "8")]
    text = run("check", "counterfact", "--path", str(path)).stdout
    assert "[row]" in text and f"{path}, row 2, field requested_rewrite: the field is missing" in text
    assert run("check", str(saved(path, counterfact()))).exit_code == 0
    result = run("check", "zsre", "--path", str(path), "--set", "target")
    assert result.exit_code == 2
    result = run("check", "zsre", "--path", str(path), "--set", "n=5")
    assert result.exit_code == 2 and "no data set has an option 'n'" in result.stderr


def test_problems_say_where() -> None:
    assert str(Problem("f.json", 2, "a.b", "bad")) == "f.json, row 2, field a.b: bad"
    assert str(Problem("f.json", 0, "", "bad", "in prompt", "c", "edit:0")) == "f.json, case c, edit:0: bad"
