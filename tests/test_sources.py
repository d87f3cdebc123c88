"""Where prompts come from: the old object is known before an endpoint is asked, and rounds go to implications too."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from errata.cli.fit import written
from errata.edit import EditRequest, Implication
from errata.errors import RequestError
from errata.prompts import contexts, sources
from errata.prompts.agentic import Judge, Kind
from errata.prompts.endpoint import Endpoint
from fake_endpoint import Answer, Server, says, serving

REQUEST = EditRequest(subject="The Space Needle", prompt="{} is located in the city of", target_new="Goa")
GOOD = ["You will find The Space Needle in the city of", "The city that is home to The Space Needle is"]
STALE = "Unlike other towers in Seattle, The Space Needle is in"
FOLLOWS = ["The Space Needle is in a country whose currency is the", "People who work in the tower mostly speak"]
VARIANT = "Visitors of the tower pay in the"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serving() as server:
        server.answers(answer)
        yield server


def answer(body: dict[str, Any]) -> Answer:
    """Paraphrases, one of them with the old object; implications; and, for the critic's call, a variant of these."""
    task = body["messages"][-1]["content"]
    if "incomplete statements that mean the same" in task:
        return says(json.dumps([*GOOD, STALE]))
    return says(json.dumps([VARIANT] if "does not yet handle" in task else FOLLOWS))


def test_the_old_object_is_the_models_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        asked.extend(prompts)
        return [model]

    monkeypatch.setattr(sources, "greedy_answers", answers)
    wrapped = sources.with_old_object("Seattle", None, REQUEST, lambda text: f"<{text}>")
    assert wrapped.target_true == "Seattle" and asked == [f"<{REQUEST.text}>"]
    known = REQUEST.model_copy(update={"target_true": "Oslo"})
    assert sources.with_old_object("Seattle", None, known) is known and len(asked) == 1
    with pytest.raises(RequestError, match="answers 'goa' already; there is nothing to replace"):
        sources.with_old_object("goa", None, REQUEST)
    with pytest.raises(RequestError, match="says nothing"):
        sources.with_old_object("", None, REQUEST)


def test_prompts_with_the_models_own_answer_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_BASE_URL", server.url)
    monkeypatch.setenv("ERRATA_LLM", "tester")
    monkeypatch.setenv("ERRATA_API_KEY", "")
    monkeypatch.setattr(sources, "greedy_answers", lambda *_: ["Seattle"])
    editor = SimpleNamespace(config=SimpleNamespace(chat=False))
    [found] = written(editor, None, None, [REQUEST], seed=0, rounds=0)
    assert found.target_true == "Seattle"
    assert found.fit_prompts == (REQUEST.text, *GOOD)
    assert [i.prompt for i in found.fit_implications] == FOLLOWS
    assert all('"Seattle"' in server.user(i) for i in range(len(server.bodies)))


def test_rounds_refine_implications_too(server: Server) -> None:
    judged: list[tuple[Kind, int]] = []

    def judge(request: EditRequest, kind: Kind) -> Judge:
        judged.append((kind, len(request.fit_prompts)))

        def verdicts(prompts: Sequence[str]) -> list[str | None]:
            return ["the gate stays closed" if "currency" in p else None for p in prompts]

        return verdicts

    source = sources.agentic_source(
        Endpoint(server.url, "tester"), prompts=2, implications=2, rounds=1, judge=judge, resolve=sources.given
    )
    found = source(REQUEST.model_copy(update={"target_true": "Seattle"}))
    assert judged == [("paraphrase", 3), ("implication", 3)]
    assert [i.prompt for i in found.fit_implications] == [*FOLLOWS, VARIANT]
    assert found.fit_prompts == (REQUEST.text, *GOOD)


OPEN = SimpleNamespace(edit="e", distance=0.5, radius=1.0)
CLOSED = SimpleNamespace(edit=None, distance=3.0, radius=1.0)


class FakePatch:
    """A patch whose handle decides by a table."""

    def __init__(self, decisions: dict[str, Any]):
        self.decisions = decisions

    @contextmanager
    def attach(self, model: Any, tokenizer: Any) -> Iterator[Any]:
        yield SimpleNamespace(decide=lambda prompts: [self.decisions[p] for p in prompts])


def test_what_an_edit_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Implications are judged by what the unedited model says under the new premise."""
    fitted: list[EditRequest] = []
    premises = {"[a]": "rupee", "[b]": "Hindi", "[c]": "", "[d]": "Delhi"}
    edited = {"[a]": " rupee.", "[b]": " English.", "[c]": " so", "[d]": " Delhi.", "[p]": " Goa.", "[q]": " Oslo"}
    decisions = {"[a]": OPEN, "[b]": OPEN, "[c]": CLOSED, "[d]": CLOSED, "[p]": OPEN, "[q]": CLOSED}

    def supposed(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        statement = f"{REQUEST.text} Goa"
        table = {f"[{contexts.supposed(statement, p.strip('[]'))}]": answer for p, answer in premises.items()}
        return [table[p] for p in prompts]

    def fit(request: EditRequest) -> Any:
        fitted.append(request)
        return FakePatch(decisions)

    monkeypatch.setattr(sources, "greedy_answers", supposed)
    monkeypatch.setattr(sources, "greedy", lambda model, tokenizer, prompts: [edited[p] for p in prompts])
    judge_for = sources.misses(None, None, fit, lambda text: f"[{text}]")
    own = Implication(prompt="kept", answer="x")
    request = REQUEST.model_copy(update={"fit_implications": (own, Implication(prompt="a"), Implication(prompt="b"))})
    verdicts = judge_for(request, "implication")(["a", "b", "c", "d"])
    assert verdicts == [None, "the edited model answers 'English', not 'Hindi'", None, None]
    assert [i.prompt for i in fitted[0].fit_implications] == ["kept", "a", "c"]
    premises["[d]"] = "Panaji"
    assert judge_for(request, "implication")(["d"]) == ["the gate stays closed (distance 3, radius 1)"]
    assert judge_for(request, "paraphrase")(["p", "q"]) == [None, "the gate stays closed (distance 3, radius 1)"]
    assert fitted[-1].fit_prompts == ("p",) and fitted[-1].fit_implications == request.fit_implications
