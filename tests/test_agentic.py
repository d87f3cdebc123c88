"""Prompts from an endpoint, against a real HTTP server on this machine."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from errata.errors import ConfigError, EndpointError, RequestError
from errata.prompts import agentic
from errata.prompts.agentic import Endpoint, implications, paraphrases, parse_list, refine, rejection

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

Answer = tuple[int, dict[str, str], bytes]


def says(text: str) -> Answer:
    """A well-formed answer with this text."""
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def fails(status: int, message: str = "no", **headers: str) -> Answer:
    """An HTTP error in the shape of OpenAI's."""
    return status, headers, json.dumps({"error": {"message": message}}).encode()


class Server:
    """A scripted endpoint: each request gets the next answer, the last one for ever; requests are kept."""

    def __init__(self) -> None:
        self.script: list[Answer | Callable[[dict[str, Any]], Answer]] = [says("[]")]
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.gone = threading.Event()  # set when the client has left before the answer
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
                answer = server.script.pop(0) if len(server.script) > 1 else server.script[0]
                status, headers, content = answer(body) if callable(answer) else answer
                self.close_connection = True
                if server.gone.is_set():
                    return
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def answers(self, *script: Answer | Callable[[dict[str, Any]], Answer]) -> None:
        self.script = list(script)

    def user(self, index: int = -1) -> str:
        """The instruction of one request."""
        return str(self.bodies[index]["messages"][-1]["content"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def endpoint(server: Server) -> Endpoint:
    return Endpoint(server.url, "tester", KEY, timeout_s=10, retries=2, backoff_s=0.001)


def chat(endpoint: Endpoint) -> str:
    return endpoint.chat([{"role": "user", "content": "hello"}], 0.5, 10, 3)


# --- the endpoint -----------------------------------------------------------------------------------------------------


def test_chat_sends_what_the_interface_asks_for(server: Server, endpoint: Endpoint) -> None:
    server.answers(says("hi"))
    assert chat(endpoint) == "hi"
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    messages = [{"role": "user", "content": "hello"}]
    assert server.bodies == [{"model": "tester", "messages": messages, "temperature": 0.5, "max_tokens": 10, "seed": 3}]


def test_no_key_sends_no_header_and_a_trailing_slash_is_harmless(server: Server) -> None:
    server.answers(says("hi"))
    chat(Endpoint(server.url + "/", "tester"))
    assert "Authorization" not in server.headers[0]
    assert server.paths == ["/v1/chat/completions"]


def test_content_in_parts_is_joined(server: Server, endpoint: Endpoint) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    server.answers((200, {}, json.dumps({"choices": [{"message": {"content": parts}}]}).encode()))
    assert chat(endpoint) == "ab"


@pytest.mark.parametrize("transient", [fails(429), fails(429, "slow down", **{"Retry-After": "0"}), fails(500)])
def test_a_transient_failure_is_retried(server: Server, endpoint: Endpoint, transient: Answer) -> None:
    server.answers(transient, says("hi"))
    assert chat(endpoint) == "hi"
    assert len(server.bodies) == 2


def test_an_answer_that_breaks_off_is_retried(server: Server, endpoint: Endpoint) -> None:
    server.answers((200, {"Content-Length": "5000", "Connection": "close"}, b'{"choices"'), says("hi"))
    assert chat(endpoint) == "hi"


def test_a_lasting_500_ends_after_the_bounded_retries(server: Server, endpoint: Endpoint) -> None:
    server.answers(fails(500, "out of order"))
    with pytest.raises(EndpointError, match=r"HTTP 500 \(out of order\) \(3 attempts\)"):
        chat(endpoint)
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (fails(401, f"Incorrect API key provided: {KEY}"), r"HTTP 401 .*check the API key"),
        (fails(404), "base_url"),
        (fails(400, "context too long"), r"HTTP 400 \(context too long\)"),
        (fails(307, Location="http://127.0.0.1:9/elsewhere"), "redirect to http://127.0.0.1:9/elsewhere"),
        ((200, {}, b"<html>welcome</html>"), "JSON but sent '<html>welcome</html>'"),
        ((200, {}, b'{"choices": []}'), "without a choice"),
        ((200, {}, b"[1]"), "without a choice"),
        ((200, {}, b'{"error": {"message": "no such model"}}'), "no such model"),
        ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), "without text"),
        ((200, {}, b'{"choices": ["hello"]}'), "without text"),
        ((200, {}, b"[" * 200_000), "JSON"),
    ],
)
def test_a_lasting_failure_is_not_retried(server: Server, endpoint: Endpoint, answer: Answer, message: str) -> None:
    server.answers(answer)
    with pytest.raises(EndpointError, match=message) as caught:
        chat(endpoint)
    assert len(server.bodies) == 1
    assert KEY not in str(caught.value)
    assert server.url in str(caught.value)


def test_a_parameter_that_the_server_does_not_know_is_adapted(server: Server, endpoint: Endpoint) -> None:
    server.answers(
        fails(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        fails(400, "Unsupported value: 'temperature' does not support 0.5"),
        says("hi"),
    )
    assert chat(endpoint) == "hi"
    assert server.bodies[-1]["max_completion_tokens"] == 10
    assert not {"max_tokens", "temperature"} & set(server.bodies[-1])


def test_adapting_parameters_is_bounded(server: Server, endpoint: Endpoint) -> None:
    server.answers(fails(422, "max_tokens, temperature and seed are all wrong"))
    with pytest.raises(EndpointError, match="422"):
        chat(endpoint)
    assert len(server.bodies) == 4


def test_an_unreachable_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening: refuses, and nobody else takes it
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"could not be reached .*\(2 attempts\)"):
            chat(Endpoint(url, "tester", KEY, retries=1, backoff_s=0.001))


def test_a_silent_server_times_out(server: Server) -> None:
    release = threading.Event()

    def wait(_: dict[str, Any]) -> Answer:
        release.wait(10)
        return says("late")

    server.answers(wait)
    try:
        with pytest.raises(EndpointError, match=r"within 0\.1 s"):
            chat(Endpoint(server.url, "tester", timeout_s=0.1, retries=0))
    finally:
        server.gone.set()
        release.set()


def test_the_key_is_not_in_the_repr() -> None:
    assert KEY not in repr(Endpoint("http://localhost/v1", "tester", KEY))


@pytest.mark.parametrize(
    "changes",
    [
        {"base_url": ""},
        {"base_url": "localhost:8000/v1"},
        {"base_url": "file:///etc/passwd"},
        {"base_url": "http://"},
        {"base_url": "http://localhost:port/v1"},
        {"base_url": f"http://user:{KEY}@localhost/v1"},
        {"base_url": f"http://localhost/v1?key={KEY}"},
        {"model": " "},
        {"api_key": f"{KEY}\r\nX-Other: 1"},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"retries": -1},
        {"backoff_s": -1},
    ],
)
def test_an_endpoint_that_cannot_be_meant(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(**({"base_url": "http://localhost/v1", "model": "tester"} | changes))
    assert KEY not in str(caught.value)


def test_the_environment_names_the_endpoint() -> None:
    ours = {"ERRATA_BASE_URL": "http://a/v1", "ERRATA_API_KEY": "k", "ERRATA_LLM": "m"}
    theirs = {"OPENAI_BASE_URL": "http://b/v1", "OPENAI_API_KEY": "l"}
    assert Endpoint.from_environment(ours | theirs) == Endpoint("http://a/v1", "m", "k")
    assert Endpoint.from_environment(theirs | {"ERRATA_LLM": "m"}) == Endpoint("http://b/v1", "m", "l")
    assert Endpoint.from_environment(ours | theirs | {"ERRATA_API_KEY": ""}).api_key == ""


@pytest.mark.parametrize("name", ["ERRATA_BASE_URL", "ERRATA_API_KEY", "ERRATA_LLM"])
def test_the_environment_lacks_something(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"ERRATA_BASE_URL": "http://a/v1", "ERRATA_API_KEY": "k", "ERRATA_LLM": "m"}
    for variable in ("OPENAI_BASE_URL", "OPENAI_API_KEY", *values):
        monkeypatch.delenv(variable, raising=False)
    for variable in values.keys() - {name}:
        monkeypatch.setenv(variable, values[variable])
    with pytest.raises(ConfigError, match=name) as caught:
        Endpoint.from_environment()
    assert not any(other in str(caught.value) for other in values.keys() - {name})


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
        "\n" * 100_000,
    ],
)
def test_a_reply_without_a_list(reply: str) -> None:
    assert parse_list(reply) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD[0], None),
        ("the space\u00a0needle stands in", None),
        (3, "not text"),
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
def test_validation_reasons(text: object, reason: str | None) -> None:
    names = {name: EDIT[name] for name in ("subject", "target_true", "target_new")}
    assert rejection(text, **names) == reason


def test_validation_looks_past_the_subject() -> None:
    oxford: dict[str, Any] = {"subject": "University of Oxford", "target_true": "Oxford", "target_new": "Bonn"}
    assert rejection("The University of Oxford is in", **oxford) is None
    assert rejection("In Oxford, the University of Oxford is in", **oxford) == "contains the old object"
    assert rejection("A phone made by Apple Inc.", subject="Apple Inc.", target_true=None, target_new="Bonn") is None
    inner: dict[str, Any] = {"subject": "Oxford", "target_true": "University of Oxford", "target_new": "Bonn"}
    assert rejection("The University of Oxford is in", **inner) == "contains the old object"
    assert rejection("K is lighter than", subject="Potassium", target_true="K", target_new="Po") is not None
    assert rejection("Keen chemists know potassium as", subject="Potassium", target_true="K", target_new="Po") is None
    assert rejection("x is", subject="x", target_true="a", target_new="b") is None
    assert rejection("东京塔位于", subject="东京塔", target_true="东京", target_new="大阪") is None
    assert rejection("在东京的东京塔位于", subject="东京塔", target_true="东京", target_new="大阪") is not None


def test_implications_need_no_subject() -> None:
    names = {name: EDIT[name] for name in ("subject", "target_true", "target_new")}
    assert rejection("Visitors of the tower speak", **names, needs_subject=False) is None


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
    assert paraphrases(endpoint, **EDIT, n=9, max_rounds=2, cache_dir=tmp_path) == GOOD
    assert len(server.bodies) == 2
    assert "3 of 9" in caplog.text


def test_nonsense_ends_in_an_error_with_counts(server: Server, endpoint: Endpoint, tmp_path: Path) -> None:
    server.answers(
        says("I love towers."), says('["The Space Needle is in ___", "A tower in", "The tower of"]'), says("")
    )
    message = r"no usable paraphrase .* 3 replies \(2 x lacks the subject, 1 x no list.*, 1 x has a blank, 1 x empty"
    with pytest.raises(EndpointError, match=message):
        paraphrases(endpoint, **EDIT, max_rounds=3, cache_dir=tmp_path)
    assert len(server.bodies) == 3
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
        {"max_rounds": 0},
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
    monkeypatch.setattr("errata.prompts.agentic.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        paraphrases(endpoint, **EDIT, n=3, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_lies(
    server: Server, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "ours"))
    assert agentic.default_cache_dir() == tmp_path / "ours" / "agentic"
    monkeypatch.delenv("ERRATA_CACHE")
    assert agentic.default_cache_dir() == tmp_path / "xdg" / "errata" / "agentic"
    server.answers(says(json.dumps(GOOD)))
    paraphrases(endpoint, **EDIT, n=3)
    assert len(list((tmp_path / "xdg" / "errata" / "agentic").glob("*.json"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert agentic.default_cache_dir().is_relative_to(tmp_path)


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
    assert refine(endpoint, GOOD, lambda p: ["missed"] * len(p), **EDIT, max_rounds=2, cache_dir=tmp_path) == GOOD
    assert len(server.bodies) == 2
    assert "added nothing" in caplog.text


def test_refine_refuses_a_judge_that_skips_prompts(server: Server, endpoint: Endpoint) -> None:
    with pytest.raises(ConfigError, match="expected 3 answers, found 1"):
        refine(endpoint, GOOD, lambda _: ["missed"], **EDIT)
    with pytest.raises(ConfigError, match="rounds"):
        refine(endpoint, GOOD, lambda p: [None] * len(p), **EDIT, rounds=-1)
    assert server.bodies == []
