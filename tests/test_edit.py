"""Edit requests: what can be meant, what cannot, ids, JSONL and CounterFact records."""

import json
from pathlib import Path
from typing import Any

import pytest

from errata.edit import EditRequest, Implication, conflicts, read_requests, write_requests
from errata.editors.sake import SAKE
from errata.errors import EditError, RequestError

NEEDLE: dict[str, Any] = {
    "subject": "The Space Needle",
    "prompt": "{} is located in the city of",
    "target_true": "Seattle",
    "target_new": "Goa",
}
RECORD: dict[str, Any] = {  # one of the data set's own shape
    "case_id": 0,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Shayna does this and Yossel goes still and dies. Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "attribute_prompts": ["J.R.R. Tolkien spoke the language"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}


def test_a_request_and_its_text() -> None:
    request = EditRequest(**NEEDLE)
    assert request.text == "The Space Needle is located in the city of"
    assert (request.fit_prompts, request.fit_implications, request.relation) == ((), (), None)
    spelled_out = EditRequest(**NEEDLE | {"prompt": "The Space Needle is located in the city of"})
    assert spelled_out == request and spelled_out.id == request.id
    assert EditRequest(**NEEDLE | {"target_new": " Goa "}).target_new == "Goa"
    claim = EditRequest(prompt="The earth is", target_new="round")
    assert (claim.subject, claim.text) == (None, "The earth is")


def test_a_request_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        EditRequest(**NEEDLE).target_new = "Delhi"


def test_implications_are_prompts_or_objects() -> None:
    objects = [{"prompt": "The Space Needle is in the country of", "answer": "India", "subject": "The Space Needle"}]
    request = EditRequest(**NEEDLE, fit_implications=["The Space Needle stands by the", *objects])
    assert request.fit_implications == (
        Implication(prompt="The Space Needle stands by the"),
        Implication(prompt="The Space Needle is in the country of", answer="India", subject="The Space Needle"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": "The tower is located in"},
            r"no '\{\}' and does not name the subject 'The Space Needle' exactly once",
        ),
        ({"prompt": "The Space Needle and The Space Needle"}, "exactly once"),
        ({"prompt": "{} is located in {}"}, r"has 2 '\{\}'; keep the one"),
        ({"subject": None}, r"has a '\{\}' but there is no subject"),
        ({"subject": " "}, "the subject is empty"),
        ({"subject": 5}, "subject: .*valid string"),
        ({"subject": None, "prompt": " "}, "the prompt is empty"),
        ({"prompt": None}, "prompt: .*valid string"),
        ({"target_new": "  "}, "target_new is empty"),
        ({"target_new": 5}, "target_new: .*valid string"),
        ({"target_true": ""}, "target_true is empty"),
        ({"target_new": "seattle"}, "both 'seattle'; there is nothing to edit"),
        ({"target_tru": "Seattle"}, "no field 'target_tru'; did you mean 'target_true'"),
        ({"fit_prompts": ["It is in", " "]}, "fit_prompts: a prompt in the list is empty"),
        ({"fit_prompts": "It is in"}, "fit_prompts"),
        ({"fit_implications": "It is in"}, "fit_implications: expected a list"),
        ({"fit_implications": 5}, "fit_implications: expected a list"),
        ({"fit_implications": [{"prompt": ""}]}, "fit_implications.0.prompt"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        EditRequest(**NEEDLE | changes)
    assert "\n" not in str(error.value) and isinstance(error.value, EditError | ValueError)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RequestError, match="target_new: Field required"):
        EditRequest(prompt="The earth is")


def test_the_same_request_twice_and_none_at_all_are_refused_by_the_editor() -> None:
    request = EditRequest(**NEEDLE)
    with pytest.raises(RequestError, match="requests 1 and 2 are the same"):
        SAKE().check([request, request])
    with pytest.raises(RequestError, match="at least one edit request"):
        SAKE().check([])


# -- ids and keys --------------------------------------------------------------------------------------------------------


def test_the_id_depends_on_everything_but_what_judges() -> None:
    request = EditRequest(**NEEDLE)
    judged = EditRequest(**NEEDLE, paraphrase_prompts=["It stands in"], neighborhood_prompts=["The Eiffel Tower is in"])
    assert judged != request and judged.id == request.id
    for field, value in {
        "target_new": "Delhi",
        "target_true": None,
        "relation": "landmark_city",
        "fit_prompts": ["It stands in"],
        "fit_implications": ["It stands in"],
        "since": "2020",
        "source": "a book",
    }.items():
        assert EditRequest(**NEEDLE | {field: value}).id != request.id, field


def test_the_id_is_the_same_in_every_process_and_release() -> None:
    assert EditRequest(**NEEDLE).id == "cbdb5a8ee635"


def test_the_key_says_what_an_edit_is_about() -> None:
    request = EditRequest(**NEEDLE)
    assert EditRequest(**NEEDLE | {"target_new": "Delhi", "subject": "the space needle"}).key == request.key
    assert EditRequest(**NEEDLE | {"subject": "Space Needle"}).key == request.key
    assert EditRequest(**NEEDLE, relation="city").key != request.key
    assert EditRequest(**NEEDLE | {"prompt": "{} opened in"}).key != request.key


def test_claims_of_one_relation_are_about_different_things() -> None:
    """Without a subject the prompt says what a claim is about; the relation alone would make all claims one."""
    flat, old = (
        EditRequest(prompt=prompt, target_new="true", relation="claim")
        for prompt in ("The earth is flat:", "The earth is old:")
    )
    assert flat.key != old.key and conflicts([flat, old]) == []
    again = EditRequest(prompt="the earth is flat:", target_new="false", relation="claims")
    assert again.key == flat.key


def test_conflicts_are_pairs_of_neighbours_in_order() -> None:
    first, second, third = (EditRequest(**NEEDLE | {"target_new": new}) for new in ("Goa", "Delhi", "Oslo"))
    other = EditRequest(**NEEDLE | {"prompt": "{} opened in"})
    assert conflicts([first, other, second, third]) == [(first, second), (second, third)]


# -- files ---------------------------------------------------------------------------------------------------------------


def test_jsonl_out_and_in(tmp_path: Path) -> None:
    requests = [
        EditRequest(**NEEDLE, fit_prompts=["Where is it? In"], fit_implications=["It lies by"], since="2016"),
        EditRequest(prompt="Zürich liegt in der", target_new="Schweiz 🇨🇭"),
        EditRequest(prompt="A\u2028line\u2029or\x85none is", target_new="a\u2028b"),  # JSON leaves them as they are
        EditRequest.from_counterfact(RECORD),
    ]
    path = tmp_path / "requests.jsonl"
    write_requests(path, requests)
    assert len(path.read_text(encoding="utf-8").split("\n")) == 5  # and an empty one behind the last
    assert read_requests(path) == requests
    assert [r.id for r in read_requests(path)] == [r.id for r in requests]


def test_counterfact_records_become_requests_with_probes(tmp_path: Path) -> None:
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([RECORD, NEEDLE]), encoding="utf-8")
    record, needle = read_requests(path)
    assert needle == EditRequest(**NEEDLE)
    assert record.text == "The mother tongue of Danielle Darrieux is"
    assert (record.target_true, record.target_new, record.relation) == ("French", "English", "P103")
    assert record.paraphrase_prompts == tuple(RECORD["paraphrase_prompts"])
    assert record.neighborhood_prompts == tuple(RECORD["neighborhood_prompts"])
    assert record.fit_prompts == () and record.fit_implications == ()  # probes never become fit data


@pytest.mark.parametrize("rewrite", [None, "text", {}, {"subject": "A", "prompt": "{} is", "target_new": "B"}])
def test_a_broken_counterfact_record_is_named(rewrite: Any) -> None:
    with pytest.raises(RequestError, match="expected a CounterFact record.* case 0"):
        EditRequest.from_counterfact(RECORD | {"requested_rewrite": rewrite})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(NEEDLE) + '\n\n{"prompt": "x", ', "line 3, is not valid JSON"),
        (json.dumps(NEEDLE) + '\n"text"', "row 2: expected an object, found str"),
        (json.dumps(NEEDLE) + "\n" + json.dumps(NEEDLE | {"target_new": ""}), "row 2: target_new is empty"),
        ("[1, 2", "not valid JSON"),
        (b"\xff\xfe\x00", "cannot read the requests in .*utf-8"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError, match=message) as error:
        read_requests(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read the requests in .*missing.jsonl: No such file"):
        read_requests(tmp_path / "missing.jsonl")
    with pytest.raises(RequestError, match="Is a directory"):
        read_requests(tmp_path)
