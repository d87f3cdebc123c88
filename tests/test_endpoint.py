"""The client of an OpenAI-compatible endpoint, against a real HTTP server on this machine."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from errata.errors import ConfigError, EndpointError
from errata.prompts.endpoint import Endpoint
from fake_endpoint import Answer, Server, fails, says, serving

KEY = "sk-very-secret-0123456789"
VARIABLES = ("ERRATA_BASE_URL", "ERRATA_API_KEY", "ERRATA_LLM", "OPENAI_BASE_URL", "OPENAI_API_KEY")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        yield server


@pytest.fixture
def endpoint(server: Server) -> Endpoint:
    return Endpoint(server.url, "tester", KEY, timeout_s=10, retries=2, backoff_s=0.001)


def chat(endpoint: Endpoint) -> str:
    return endpoint.chat([{"role": "user", "content": "hello"}], temperature=0.5, max_tokens=10, seed=3)


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


def test_a_server_that_drips_times_out(server: Server) -> None:
    server.answers(says("word " * 50))
    server.packet, server.pause_s = 10, 0.05  # each packet is in time, the whole answer is not
    with pytest.raises(EndpointError, match=r"no whole answer within 0\.2 s"):
        chat(Endpoint(server.url, "tester", timeout_s=0.2, retries=0))


def test_an_endless_answer_is_cut_off(server: Server, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.prompts.endpoint._MAX_REPLY_BYTES", 1000)
    server.answers(says("word " * 1000))
    with pytest.raises(EndpointError, match="more than 1000 bytes"):
        chat(endpoint)


def test_no_half_of_a_key_is_left_where_an_error_is_cut(server: Server, endpoint: Endpoint) -> None:
    for filler in range(240, 300):
        server.answers(fails(400, "x" * filler + KEY))
        with pytest.raises(EndpointError) as caught:
            chat(endpoint)
        assert "sk-v" not in str(caught.value)


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


def test_the_environment_names_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(**values: str) -> Endpoint:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return Endpoint.from_environment()

    ours = {"ERRATA_BASE_URL": "http://a/v1", "ERRATA_API_KEY": "k", "ERRATA_LLM": "m"}
    theirs = {"OPENAI_BASE_URL": "http://b/v1", "OPENAI_API_KEY": "l"}
    assert found(**ours, **theirs) == Endpoint("http://a/v1", "m", "k")
    assert found(**theirs, ERRATA_LLM="m") == Endpoint("http://b/v1", "m", "l")
    assert found(**(ours | theirs | {"ERRATA_API_KEY": ""})).api_key == ""


@pytest.mark.parametrize("name", ["ERRATA_BASE_URL", "ERRATA_API_KEY", "ERRATA_LLM"])
def test_the_environment_lacks_something(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"ERRATA_BASE_URL": "http://a/v1", "ERRATA_API_KEY": "k", "ERRATA_LLM": "m"}
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable in values.keys() - {name}:
        monkeypatch.setenv(variable, values[variable])
    with pytest.raises(ConfigError, match=name) as caught:
        Endpoint.from_environment()
    assert not any(other in str(caught.value) for other in values.keys() - {name})
