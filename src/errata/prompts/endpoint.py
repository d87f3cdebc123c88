"""A chat model behind an OpenAI-compatible HTTP interface, reached with the standard library alone.

Nothing is sent anywhere but to the address that the caller names, and no repr and no error shows the key.
"""

import http.client
import json
import math
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from errata.errors import ConfigError, EndpointError

_MAX_REPLY_BYTES = 8_000_000
_MAX_DELAY_S = 60.0  # between two attempts, whatever Retry-After asks for
_MAX_SHOWN = 300  # characters of a server's own words in an error
_CHECK = "check that the server is up and that base_url is right."
_ADVICE = {
    401: "check the API key.",
    403: "check the API key.",
    404: "check the model's name and that base_url is the interface's root, often ending in /v1.",
    429: "wait for a while, or name another server.",
}


@dataclass(eq=False)
class _Failure(Exception):
    """What went wrong and what to do about it. transient: it may pass, after `wait_s` seconds or more."""

    what: str
    advice: str = _CHECK
    status: int = 0
    transient: bool = False
    wait_s: float = 0.0


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Returns every response, whatever its status: urllib would carry the key to wherever a redirect points."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind an OpenAI-compatible HTTP interface.

    base_url: root of the interface, without `/chat/completions` (often ends in `/v1`). api_key: sent as a bearer token,
    never shown or stored; empty sends none. timeout_s: seconds for one attempt. retries: further attempts after a
    transient failure. backoff_s: seconds before the first of them, doubled each time. Raises ConfigError.
    """

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)
    timeout_s: float = 60.0
    retries: int = 3
    backoff_s: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", self.base_url.strip().rstrip("/"))
        object.__setattr__(self, "api_key", self.api_key.strip())
        _check_base_url(self.base_url)
        if not self.model.strip():
            raise ConfigError("The endpoint's model name is empty: give the name under which the server offers it.")
        if not re.fullmatch("[!-~]*", self.api_key):
            raise ConfigError("The endpoint's API key holds characters that an HTTP header cannot carry: set it again.")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ConfigError(f"timeout_s must be a positive number of seconds, found {self.timeout_s!r}.")
        if self.retries < 0 or not (math.isfinite(self.backoff_s) and self.backoff_s >= 0):
            found = f"{self.retries!r} and {self.backoff_s!r}"
            raise ConfigError(f"retries and backoff_s must be finite and not negative, found {found}.")

    @classmethod
    def from_environment(cls) -> Self:
        """The endpoint that the environment names; ERRATA_* goes before OPENAI_*.

        Reads ERRATA_BASE_URL or OPENAI_BASE_URL, ERRATA_API_KEY or OPENAI_API_KEY (set but empty: the server needs no
        key) and ERRATA_LLM, the model's name. Raises ConfigError naming each that is missing.
        """
        base_url = os.environ.get("ERRATA_BASE_URL") or os.environ.get("OPENAI_BASE_URL")
        api_key = os.environ.get("ERRATA_API_KEY", os.environ.get("OPENAI_API_KEY"))
        model = os.environ.get("ERRATA_LLM")
        if base_url and model and api_key is not None:
            return cls(base_url, model, api_key)
        needed = {
            "ERRATA_BASE_URL or OPENAI_BASE_URL (the interface's root, such as http://localhost:8000/v1)": base_url,
            "ERRATA_API_KEY or OPENAI_API_KEY (empty for a server that needs none)": api_key is not None,
            "ERRATA_LLM (the model's name)": model,
        }
        missing = "; ".join(name for name, value in needed.items() if not value)
        raise ConfigError(f"No language-model endpoint: the environment lacks {missing}.")

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        temperature: float = 1.0,
        max_tokens: int = 3500,
        seed: int | None = None,
    ) -> str:
        """The text that the model answers to `messages` (each with `role` and `content`).

        Lost connections, timeouts, 429 and 5xx are tried again, `retries` times in all. A parameter that the server
        says it does not know is dropped (`max_tokens` is renamed) and the request sent again. max_tokens: 3,500 is
        SAKE's budget for one reply. Raises EndpointError.
        """
        body: dict[str, Any] = {"model": self.model, "messages": [dict(message) for message in messages]}
        body |= {"temperature": temperature, "max_tokens": max_tokens} | ({} if seed is None else {"seed": seed})
        attempt = 1
        while True:
            try:
                return self._post(body)
            except _Failure as failure:
                if failure.transient and attempt <= self.retries:
                    time.sleep(min(max(self.backoff_s * 2 ** (attempt - 1), failure.wait_s), _MAX_DELAY_S))
                    attempt += 1
                elif not _adapt(body, failure):
                    raise self._error(failure, attempt) from None

    def _post(self, body: Mapping[str, Any]) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "errata"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = f"{self.base_url}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        deadline = time.monotonic() + self.timeout_s
        try:
            with urllib.request.build_opener(_AsItIs).open(request, timeout=self.timeout_s) as response:
                raw = _read(response, deadline)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise _Failure(f"gave no whole answer within {self.timeout_s:g} s", transient=True) from None
            lost = isinstance(reason, (OSError, http.client.IncompleteRead)) and not isinstance(reason, ssl.SSLError)
            raise _Failure(f"could not be reached ({reason})", transient=lost) from None
        if not 200 <= response.status < 300:
            raise _refusal(response.status, response.headers, raw)
        return _content(raw)

    def _error(self, failure: _Failure, attempts: int) -> EndpointError:
        # Servers echo keys. A short key is a dummy ("none"), and hiding it would blank out ordinary words. Hidden before
        # the text is cut, so that no half of a key remains.
        what = failure.what.replace(self.api_key, "***") if len(self.api_key) >= 8 else failure.what
        what = " ".join("".join(letter if letter.isprintable() else " " for letter in what).split())
        what = what if len(what) <= _MAX_SHOWN else what[: _MAX_SHOWN - 3] + "..."
        tries = f" ({attempts} attempts)" if attempts > 1 else ""
        return EndpointError(f"The endpoint {self.base_url} (model {self.model}) {what}{tries}: {failure.advice}")


def _check_base_url(base_url: str) -> None:
    if any(mark in base_url for mark in "@?#"):  # not shown: what stands there may be a secret
        raise ConfigError("base_url must hold no user name, query or fragment: give the key as api_key.")
    try:
        parts = urllib.parse.urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch("[!-~]*", base_url):
        raise ConfigError(f"base_url must be an http(s) address such as http://localhost:8000/v1, found {base_url!r}.")


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body, within one deadline (a socket's timeout starts anew with each packet) and a size."""
    content = bytearray()
    while chunk := response.read1(65_536):
        content += chunk
        if len(content) > _MAX_REPLY_BYTES:
            raise _Failure(f"sent more than {_MAX_REPLY_BYTES} bytes", "check base_url.")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:  # read1, unlike read, does not notice a body that ends early
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(content)


def _refusal(status: int, headers: Mapping[str, str], raw: bytes) -> _Failure:
    """The failure that an HTTP status other than 2xx means."""
    try:
        detail = _detail(json.loads(raw))
    except (ValueError, RecursionError):
        detail = raw.decode("utf-8", "replace")
    advice = _ADVICE.get(status, _CHECK if status >= 500 else "the request was refused.")
    if 300 <= status < 400:
        detail, advice = f"a redirect to {headers.get('Location', 'nowhere')}", "set base_url to where it points."
    wait = re.fullmatch(r"\s*(\d{1,6})\s*", headers.get("Retry-After", ""))  # in seconds; a date is not waited for
    what = f"answered HTTP {status}" + (f" ({detail})" if detail else "")
    return _Failure(what, advice, status, status == 429 or status >= 500, float(wait[1]) if wait else 0.0)


def _adapt(body: dict[str, Any], failure: _Failure) -> bool:
    """Takes a parameter that a 400 or 422 names out of `body`; False where there is nothing to adapt."""
    # Newer OpenAI models know max_completion_tokens only and one temperature; some servers refuse a seed.
    for name in ("max_tokens", "temperature", "seed"):
        if failure.status in (400, 422) and name in body and re.search(rf"\b{name}\b", failure.what):
            value = body.pop(name)
            if name == "max_tokens":
                body["max_completion_tokens"] = value
            return True
    return False


def _content(raw: bytes) -> str:
    """The text of the first choice in an answer."""
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        start = raw[:4000].decode("utf-8", "replace")
        raise _Failure(f"was expected to answer in JSON but sent '{start}'", "check base_url.") from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise _Failure(f"answered without a choice ({_detail(answer)})", "check base_url and the model's name.")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):  # in parts, some of which (a chain of thought) hold no text
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise _Failure("answered a choice without text in message.content", "use a chat model.")
    return content


def _detail(answer: object) -> str:
    """The human part of an error's JSON."""
    while isinstance(answer, dict):
        answer = next((answer[name] for name in ("error", "detail", "message") if name in answer), json.dumps(answer))
    return answer if isinstance(answer, str) else json.dumps(answer)
