"""Prompts from an endpoint, against a real HTTP server on this machine."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from errata.edit import EditRequest
from errata.errors import ConfigError, EndpointError, RequestError
from errata.prompts import agentic
from errata.prompts.agentic import implications, paraphrases, parse_list, refine, rejection
from errata.prompts.endpoint import Endpoint
from fake_endpoint import Server, fails, says, serving

KEY = "sk-very-secret-0123456789"
EDIT: dict[str, Any] = {
    "prompt": "{} is located in the city of",
    "subject": "The Space Needle",
    "target_true": "Seattle",
    "target_new": "Goa",
}
GOOD = [
    "You will find The Space Needle in the city of",
    "The city that is home to The Space Needle is",
    "If you want to visit the space needle, travel to",
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        yield server


@pytest.fixture
def endpoint(server: Server) -> Endpoint:
    return Endpoint(server.url, "tester", KEY, timeout_s=10, retries=2, backoff_s=0.001)


# --- reading replies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        '["a b", "c, d"]',
        'Sure [1], here you are: ["a b", "c, d"]. Enjoy!',
        '```json\n["a b",\n "c, d"]\n```',
        '{"statements": ["a b", "c, d"]}',
        '[{"statement": "a b"}, {"statement": "c, d"}]',
        '["a b"]\n["c, d"]',
        '[["a b"], ["c, d"]]',
        '[{"statement": "a b", "answer": "x"}, {"statement": "c, d", "answer": "y"}]',
        "['a b', 'c, d',]",
        '["a b", "c, d", "cut off he',
        "1. a b\n2. c, d",
        "Sure:\n\n 1) a b\n 2) c, d\n\nEnjoy!",
        "- a b\n* c, d\n",
        "• a b\r\n• c, d\r\n",
        '<think>["no"]</think>["a b", "c, d"]',
    ],
)
def test_lists_are_read_leniently(reply: str) -> None:
    assert parse_list(reply) == ["a b", "c, d"]


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I am sorry, I cannot do that.",
        "[1, 2]",
        "{}",
        "[" * 100_000,
        "['a' + b]",
        "['" * 100_000,
        '["\\"' * 100_000,
        "\n" * 100_000,
    ],
)
def test_a_reply_without_a_list(reply: str) -> None:
    assert parse_list(reply) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD[0], None),
        ("the space\u00a0needle stands in", None),
        ("The Space \x07Needle is in", "not text"),
        ("The Space Needle \ud83d is in", "not text"),
        ("  ", "empty"),
        ("The tower is in", "lacks the subject"),
        ("Unlike others in SEATTLE, The Space Needle is in", "contains the old object"),
        ("Is The Space Needle in Goa or in", "contains the new object"),
        ("The Space Needle is in ___", "has a blank"),
        ("The Space Needle ... is in", "has a blank"),
        ("The Space Needle is in…", "has a blank"),
        ("The Space Needle is in [MASK] and so is", "has a blank"),
        ("The Space Needle is in the city.", "ends as a whole sentence"),
        ("Where is The Space Needle?", "ends as a whole sentence"),
        ("The Space Needle is " + "very " * 100 + "near", "too long"),
        ("The goal of The Space Needle's builders was a tower for", None),  # "Goa" counts as a whole word only
    ],
)
def test_validation_reasons(text: str, reason: str | None) -> None:
    assert rejection(text, EditRequest(**EDIT)) == reason


OXFORD = ("University of Oxford", "Oxford", "Bonn")
POTASSIUM = ("Potassium", "K", "Po")
TOWER = ("东京塔", "东京", "大阪")


@pytest.mark.parametrize(
    ("text", "names", "reason"),
    [
        ("The University of Oxford is in", OXFORD, None),
        ("In Oxford, the University of Oxford is in", OXFORD, "contains the old object"),
        ("The University of Oxford is in", ("Oxford", "University of Oxford", "Bonn"), "contains the old object"),
        ("A phone made by Apple Inc.", ("Apple Inc.", None, "Bonn"), None),
        ("K is lighter than potassium, or", POTASSIUM, "contains the old object"),
        ("Keen chemists know potassium as", POTASSIUM, None),
        ("x is", ("x", "a", "b"), None),
        ("东京塔位于", TOWER, None),
        ("在东京的东京塔位于", TOWER, "contains the old object"),
    ],
)
def test_validation_looks_past_the_subject(text: str, names: tuple[str, str | None, str], reason: str | None) -> None:
    subject, target_true, target_new = names
    edit = EditRequest(prompt="{} is", subject=subject, target_true=target_true, target_new=target_new)
    assert rejection(text, edit) == reason


def test_implications_need_no_subject() -> None:
    assert rejection("Visitors of the tower speak", EditRequest(**EDIT), "implication") is None


# --- paraphrases and implications -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps(GOOD),
        "Here they are:\n```json\n" + json.dumps(GOOD, indent=1) + "\n```\n",
        "\n".join(f'{number}. "{text}"  ' for number, text in enumerate(GOOD, 1)),
    ],
)
def test_paraphrases_of_a_good_reply(server: Server, endpoint: Endpoint, tmp_path: Path, reply: str) -> None:
    server.answers(says(reply))
    assert paraphrases(endpoint, **EDIT, n=3, cache_dir=tmp_path) == GOOD
    assert len(server.bodies) == 1
    for text in ("The Space Needle is located in the city of", "Seattle", "Goa", "now: 3."):
        assert text in server.user()
    assert server.bodies[0]["max_tokens"] == 3500


def test_more_is_asked_for_with_the_known_excluded(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    prompt = "The Space Needle is located in the city of"
    server.answers(
        says(json.dumps([GOOD[0], GOOD[0].upper() + " ", prompt])), says(json.dumps([*GOOD, "One too many"]))
    )
    assert paraphrases(endpoint, **EDIT, n=3, seed=7, cache_dir=tmp_path) == GOOD
    assert [body["seed"] for body in server.bodies] == [7, 8]
    assert GOOD[0] not in server.user(0)
    assert GOOD[0] in server.user(1)
    assert "now: 2." in server.user(1)


def test_fewer_than_wanted_are_returned_with_a_warning(
    server: Server, endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers(says(json.dumps(GOOD)))
    assert paraphrases(endpoint, **EDIT, n=9, cache_dir=tmp_path) == GOOD
    assert len(server.bodies) == 4
    assert "3 of 9" in caplog.text


def test_nonsense_ends_in_an_error_with_counts(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    server.answers(
        says("I love towers."), says('["The Space Needle is in ___", "A tower in", "The tower of"]'), says("")
    )
    message = r"no usable paraphrase .* 4 replies \(3 x no list in the reply, 2 x lacks the subject, 1 x has a blank\)"
    with pytest.raises(EndpointError, match=message):
        paraphrases(endpoint, **EDIT, cache_dir=tmp_path)
    assert len(server.bodies) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_failing_endpoint_ends_the_asking(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    server.answers(says(json.dumps(GOOD[:1])), fails(401))
    with pytest.raises(EndpointError, match="check the API key"):
        paraphrases(endpoint, **EDIT, n=3, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_implications(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    good = ["The Space Needle is in a country whose currency is the", "People who work in the tower mostly speak"]
    server.answers(says(json.dumps([*good, "The state called Goa has"])))
    assert implications(endpoint, **EDIT, n=2, cache_dir=tmp_path) == good
    assert "The Space Needle is located in the city of Goa" in server.user()


def test_a_claim_without_subject_or_old_object(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    server.answers(says('["Everest is topped by", "Nothing is higher than"]'))
    edit: dict[str, Any] = {"prompt": "The highest point is", "subject": None, "target_true": None, "target_new": "K2"}
    assert len(paraphrases(endpoint, **edit, n=2, cache_dir=tmp_path)) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": None},
        {"prompt": "{} and {} are in"},
        {"prompt": " "},
        {"target_new": ""},
        {"target_new": "seattle "},
        {"n": 0},
    ],
)
def test_inputs_that_cannot_be_meant(server: Server, endpoint: Endpoint, changes: dict[str, Any]) -> None:
    with pytest.raises((RequestError, ConfigError)):
        paraphrases(endpoint, **(EDIT | changes))
    assert server.bodies == []


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_second_call_makes_no_request(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    server.answers(says(json.dumps(GOOD)))
    first = paraphrases(endpoint, **EDIT, n=3, cache_dir=tmp_path)
    other_key = Endpoint(server.url, "tester", "another")
    assert paraphrases(other_key, **EDIT, n=3, cache_dir=str(tmp_path)) == first
    assert len(server.bodies) == 1
    [kept] = tmp_path.iterdir()
    assert re.fullmatch(r"[0-9a-f]{64}\.json", kept.name)
    assert KEY not in kept.read_text()


def test_whatever_matters_asks_anew(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    server.answers(says(json.dumps(GOOD)))
    base: dict[str, Any] = {"n": 3, "cache_dir": tmp_path}
    paraphrases(endpoint, **EDIT, **base)
    paraphrases(endpoint, **EDIT, **base, seed=1)
    paraphrases(endpoint, **EDIT, **(base | {"n": 2}))
    paraphrases(endpoint, **(EDIT | {"target_new": "Bonn"}), **base)
    paraphrases(Endpoint(server.url, "other", KEY), **EDIT, **base)
    implications(endpoint, **EDIT, **base)
    assert len(server.bodies) == 6 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("damage", ["", "{", '{"prompts": [3]}', '{"prompts": []}', "[]"])
def test_a_damaged_file_is_asked_for_again(server: Server, endpoint: Endpoint, tmp_path: Path, damage: str) -> None:
    server.answers(says(json.dumps(GOOD)))
    paraphrases(endpoint, **EDIT, n=3, cache_dir=tmp_path)
    [kept] = tmp_path.iterdir()
    kept.write_text(damage)
    assert paraphrases(endpoint, **EDIT, n=3, cache_dir=tmp_path) == GOOD
    assert len(server.bodies) == 2


def test_a_cache_that_cannot_be_written_loses_nothing(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    server.answers(says(json.dumps(GOOD)))
    (tmp_path / "file").write_text("in the way")
    assert paraphrases(endpoint, **EDIT, n=3, cache_dir=tmp_path / "file") == GOOD


def test_an_interrupt_while_writing_leaves_nothing(
    server: Server, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    server.answers(says(json.dumps(GOOD)))
    monkeypatch.setattr("errata.files.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        paraphrases(endpoint, **EDIT, n=3, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_lies(
    server: Server, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    server.answers(says(json.dumps(GOOD)))
    paraphrases(endpoint, **EDIT, n=3)
    assert len(list((tmp_path / "xdg" / "errata" / "agentic").glob("*.json"))) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert agentic.default_cache_dir() == tmp_path / ".cache" / "errata" / "agentic"


# --- the critic -------------------------------------------------------------------------------------------------------


def test_refine_asks_for_variants_of_what_is_missed(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    judged: list[list[str]] = []

    def judge(prompts: Sequence[str]) -> list[str | None]:
        judged.append(list(prompts))
        return ["the gate stays closed" if "visit" in text else None for text in prompts]

    new = ["Tourists who visit The Space Needle fly to", "To visit The Space Needle, take a train to"]
    server.answers(says(json.dumps([new[0], GOOD[0], "Nothing to do with it"])), says(json.dumps(new)))
    result = refine(endpoint, [*GOOD, GOOD[0]], judge, **EDIT, rounds=2, n=1, cache_dir=tmp_path)
    assert result == [*GOOD, *new]
    assert judged == [GOOD, [*GOOD, new[0]]]
    assert "the gate stays closed" in server.user(0)
    assert "The Space Needle is located in the city of" in server.user(0)
    again = refine(endpoint, GOOD, judge, **EDIT, rounds=2, n=1, cache_dir=tmp_path)
    assert again == result
    assert len(server.bodies) == 2


def test_refine_takes_implications_too(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    server.answers(says('["The tower stands in a state whose people speak"]'))
    missed: list[str | None] = ["the edited model answers 'English'"]
    result = refine(endpoint, ["It is"], lambda _: missed, **EDIT, n=1, kind="implication", cache_dir=tmp_path)
    assert result == ["It is", "The tower stands in a state whose people speak"]
    assert "follow from this fact" in server.user()
    assert "answers 'English'" in server.user()


def test_refine_stops_when_nothing_is_missed(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    def content(prompts: Sequence[str]) -> list[str | None]:
        return [None] * len(prompts)

    assert refine(endpoint, GOOD, content, **EDIT, rounds=5, cache_dir=tmp_path) == GOOD
    assert refine(endpoint, GOOD, content, **EDIT, rounds=0, cache_dir=tmp_path) == GOOD
    assert server.bodies == []


def test_refine_keeps_what_it_has_when_the_critic_is_of_no_use(
    server: Server, endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers(says("I cannot help with that."))
    assert refine(endpoint, GOOD, lambda p: ["missed"] * len(p), **EDIT, cache_dir=tmp_path) == GOOD
    assert len(server.bodies) == 4
    assert "0 of 20" in caplog.text


def test_refine_refuses_a_judge_that_skips_prompts(server: Server, endpoint: Endpoint) -> None:
    with pytest.raises(ConfigError, match="expected 3 answers, found 1"):
        refine(endpoint, GOOD, lambda _: ["missed"], **EDIT)
    with pytest.raises(ConfigError, match="rounds"):
        refine(endpoint, GOOD, lambda p: [None] * len(p), **EDIT, rounds=-1)
    assert server.bodies == []
