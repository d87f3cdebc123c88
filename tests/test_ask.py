"""Probes put to a model, batched and by row, against a plain loop over one prompt at a time."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import errata
from conftest import hooks_of, prefix_points, steering_part, tiny_model, tiny_other
from errata.bench import ask as module
from errata.bench.ask import Question, ask
from errata.bench.cases import STAY, Kind, Probe
from errata.bench.rows import SCHEMA
from errata.edit import EditRequest
from errata.editors import get_editor
from errata.errors import ConfigError, RequestError
from errata.low_rank import LowRank
from errata.model.anatomy import anatomy
from errata.model.fingerprint import base_of
from errata.model.generate import cut, greedy, says
from errata.model.tokens import continuation_ids, token_ids
from errata.patch import Patch, attach_rows
from errata.scope.gate import Gate

PROMPTS = ("The capital of France is", "Tokyo", "The highest point on Earth is", "São Paulo lies in")
NEW = ("Paris", "Seattle", "United States", "Brazil")


def patches_of(model: PreTrainedModel, tokenizer: Any) -> dict[str, Patch]:
    """A steering patch, a low-rank patch and one of both, by edit: each about one prompt."""
    generator, found = torch.Generator().manual_seed(5), {}
    site = anatomy(model).mlp_out[0]
    for i, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True)):
        request = EditRequest(prompt=prompt, target_new=new, target_true="Mars")
        [ids] = token_ids(tokenizer, [prompt])
        target = tuple(continuation_ids(tokenizer, prompt, new))
        gate, stop = Gate(layers=(0,)), tuple(token_ids(tokenizer, ["."])[0])
        told = {"gate": gate, "radius": 0.05, "edit": request.id, "key": request.key, "closing": stop}
        parts: list[Any] = []
        if i != 1:
            parts.append(steering_part(model, ids, target, **told))
        if i in (1, 2):
            d = model.config.hidden_size
            m = model.get_submodule(site).weight.numel() // d
            U, V = (0.2 * torch.randn(size, 1, generator=generator) for size in (d, m))
            parts.append(LowRank((request.id,), U, V, 0))
        if i == 2:  # the gate of a mixed patch reads states that its own update has moved
            whole = Patch("hand", {}, (request,), base_of(model, tokenizer), (parts[1],))
            with whole.attach(model, tokenizer):
                centre = prefix_points(model, ids, gate)[-1]
            parts[0] = steering_part(model, ids, target, centre=centre, **told)
        found[request.id] = Patch("hand", {}, (request,), base_of(model, tokenizer), tuple(parts))
    return found


def questions_of(patches: dict[str, Patch]) -> list[Question]:
    found = []
    for edit, patch in patches.items():
        new = patch.requests[0].target_new
        for prompt in PROMPTS:
            asked = [((new, "the"), ("Obama", new)), ((), (new,)), (("French",), ())]
            for expected, alternatives in asked if prompt == PROMPTS[1] else asked[:2]:
                kind = "edit" if len(expected) == 2 else "neighborhood"  # one that names what is right there
                probe = Probe(kind, prompt, expected, alternatives)
                found.append(Question(f"case {edit}", edit, len(found), probe, {"relation": "r"}))
    return found


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    changes = {"sliding_window": 6} if request.param == "mistral" else {}
    made = tiny_model(request.param, **changes).double()
    before = hooks_of(made), set(vars(made))
    yield made
    assert (hooks_of(made), set(vars(made))) == before


def scores(model: Any, ids: list[int], tail: list[int], lengths: int) -> Tensor:
    """(n, V) log probabilities where the tail's tokens are said, from one uncached row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + tail]), use_cache=False).logits[0]
    return logits[lengths - 1 : lengths - 1 + len(tail)].log_softmax(-1)


def one_by_one(model: Any, tokenizer: Any, question: Question, patch: Patch | None) -> dict[str, Any]:
    """The same row by attaching one patch, one prompt, no batch, no cache."""
    probe = question.probe
    names = (*probe.expected, *probe.alternatives)
    longest = max((len(tokenizer(f" {n}", add_special_tokens=False)["input_ids"]) for n in names), default=10) + 2
    longest = longest if probe.expected else max(longest, 12)
    [before] = greedy(model, tokenizer, [probe.prompt], longest)
    with ExitStack() as stack:
        handle = stack.enter_context(patch.attach(model, tokenizer)) if patch else None
        [ids] = token_ids(tokenizer, [probe.prompt])
        [text] = greedy(model, tokenizer, [probe.prompt], longest)
        found: dict[str, Any] = {"text": text}
        for which, answers in (("expected", probe.expected), ("alternative", probe.alternatives)):
            if answers:
                tail = continuation_ids(tokenizer, probe.prompt, answers[0])
                logp = scores(model, ids, tail, len(ids))
                own = logp.gather(1, torch.tensor(tail)[:, None])[:, 0]
                found[f"p_{which}"], found[f"p_{which}_first"] = exp(own.mean()), exp(own[0])
                if which == "expected":
                    found["token_accuracy"] = logp.argmax(-1).eq(torch.tensor(tail)).double().mean().item()
        found["first_token"] = tokenizer.decode([int(scores(model, ids, [0], len(ids))[0].argmax())])
        if handle is not None and patch is not None and patch.steering:
            [decision] = handle.decide([probe.prompt])
            found |= {"gate": decision.edit or "", "distance": decision.distance, "own_distance": decision.distance}
    kept = cut(text) == cut(before)
    found["passed"] = kept if probe.kind == "neighborhood" else any(says(text, name) for name in probe.expected)
    return found


def check(model: Any, tokenizer: Any, questions: list[Question], rows: list[dict[str, Any]], patches: Any) -> None:
    for question, row in zip(questions, rows, strict=True):
        expected = one_by_one(model, tokenizer, question, patches and patches[question.edit])
        text = expected.pop("text")
        assert text.startswith(row["generated"]) and cut(text) == cut(row["generated"])
        assert set(row) == set(SCHEMA.names[5:])
        for name, value in expected.items():
            if isinstance(value, float):  # maps act in float32
                assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
            else:
                assert row[name] == value, name


@pytest.mark.parametrize("batch", [1, 5])
def test_rows_by_row_are_those_of_patches_attached_one_by_one(model: Any, tokenizer: Any, batch: int) -> None:
    patches = patches_of(model, tokenizer)
    questions = questions_of(patches)
    rows = ask(model, tokenizer, questions, patches=patches, batch=batch)
    if batch == 5:
        check(model, tokenizer, questions, rows, patches)
    own = [r for r in rows if r["prompt"] == patches[r["edit"]].requests[0].text and len(r["expected"]) == 2]
    assert [r["passed"] for r in own] == [True, False, True, True]  # the second is an update of noise
    assert [r["gate"] for r in own] == [r["edit"] if i != 1 else None for i, r in enumerate(own)]
    assert sum(r["gate"] == "" for r in rows) == 3 * (4 + 3)  # other prompts are in no scope
    assert all(r["passed"] for r in rows if r["gate"] == "" and not r["expected"] and r["edit"] != own[2]["edit"])
    together = ask(model, tokenizer, questions, patches=patches)
    for one, other in zip(rows, together, strict=True):
        assert {k: v for k, v in one.items() if not isinstance(v, float)} == {
            k: v for k, v in other.items() if not isinstance(v, float)
        }


def test_answers_that_are_known_are_checked_and_rows_stay_the_same(model: Any, tokenizer: Any) -> None:
    patches = patches_of(model, tokenizer)
    questions = questions_of(patches)
    plain, expected = ask(model, tokenizer, questions), ask(model, tokenizer, questions, patches=patches)
    unedited = {(q.case, q.index): row["generated"] for q, row in zip(questions, plain, strict=True)}
    for one, other in zip(ask(model, tokenizer, questions, patches=patches, unedited=unedited), expected, strict=True):
        assert one["unedited"] == unedited[one["case"], one["probe"]]  # also where it does not decide
        assert {k: v for k, v in one.items() if not isinstance(v, float) and k != "unedited"} == {
            k: v for k, v in other.items() if not isinstance(v, float) and k != "unedited"
        }
        assert [v for v in one.values() if isinstance(v, float)] == pytest.approx(
            [v for v in other.values() if isinstance(v, float)], rel=1e-5, abs=1e-5
        )


def test_an_answer_that_stays_takes_no_step_for_each_of_its_words() -> None:
    model, tokenizer = errata.load("atlas")
    request = EditRequest(subject="France", prompt="The capital of {} is", target_true="Paris", target_new="Lyon")
    patch = get_editor("uniform")().fit(model, tokenizer, [request])
    prompts = ["The currency of Japan is the", "The capital of Spain is", "The official name of Egypt is", request.text]
    probes = [Probe("neighborhood", prompt, ("Lyon",), ("Paris",)) for prompt in prompts]
    questions = [Question("case", request.id, i, probe) for i, probe in enumerate(probes)]
    unedited = {("case", i): row["generated"] for i, row in enumerate(ask(model, tokenizer, questions))}
    widths = list[int]()
    count = model.base_model.register_forward_pre_hook(
        lambda _, ids, inputs: widths.append((ids[0] if ids else inputs["input_ids"]).shape[1]), with_kwargs=True
    )
    with count:
        rows = ask(model, tokenizer, questions[:3], patches={request.id: patch}, unedited=unedited)
        kept = widths.copy()
        rows += ask(model, tokenizer, questions[3:], patches={request.id: patch}, unedited=unedited)
    assert [row["passed"] for row in rows] == [True, True, True, False] and says(rows[3]["generated"], "Lyon")
    assert len(kept) <= 4 and max(kept[1:]) >= 4  # the prompts, both names, and once the longest answer that is known
    assert widths[len(kept) :].count(1) >= 1  # an answer that changes is generated word by word


def test_an_answer_that_stays_gives_its_objects_probability_as_well() -> None:
    model, tokenizer = errata.load("atlas")
    facts = [
        ("The currency of Japan is the", "Japanese yen"),
        ("The capital of Spain is", "Madrid"),
        ("The capital of Spain is", "Rome"),
    ]
    questions = [Question("", "", i, Probe("fact", prompt, (object_,))) for i, (prompt, object_) in enumerate(facts)]
    expected = ask(model, tokenizer, questions)
    unedited = {("", i): row["generated"] for i, row in enumerate(expected)}
    widths = list[int]()
    count = model.base_model.register_forward_pre_hook(
        lambda _, ids, inputs: widths.append((ids[0] if ids else inputs["input_ids"]).shape[1]), with_kwargs=True
    )
    with count:
        ask(model, tokenizer, questions[:2], unedited=unedited)
    assert len(widths) == 2  # the prompts, and the answers, which tell of the objects as well
    rows = ask(model, tokenizer, questions, unedited=unedited)
    for row, other in zip(rows, expected, strict=True):
        assert row["passed"]
        assert (row["generated"], row["token_accuracy"]) == (other["generated"], other["token_accuracy"])
        assert [row[p] for p in ("p_expected", "p_expected_first")] == pytest.approx(
            [other[p] for p in ("p_expected", "p_expected_first")], rel=1e-4
        )
    assert rows[0]["p_expected"] > 0.9 and rows[2]["p_expected"] < 0.1


def test_what_is_attached_is_asked_as_it_stands(model: Any, tokenizer: Any) -> None:
    patches = patches_of(model, tokenizer)
    questions = questions_of(patches)
    check(model, tokenizer, questions, ask(model, tokenizer, questions, batch=7), None)
    first, *_, last = patches
    unedited = {(q.case, q.index): "nothing of the kind" for q in questions[:7]}
    with patches[first].attach(model, tokenizer), patches[last].attach(model, tokenizer):
        rows = ask(model, tokenizer, questions, unedited=unedited)
        again = ask(model, tokenizer, questions[:7])
    told = [r for r in rows[:7] if not r["expected"]]
    assert {r["unedited"] for r in told} == {"nothing of the kind"} and not any(r["passed"] for r in told)
    assert [r["unedited"] for r in again if not r["expected"]] != [r["unedited"] for r in told]
    assert {r["gate"] for r in rows} == {"", first, last}
    for row, question in zip(rows, questions, strict=True):
        if row["prompt"] == PROMPTS[0]:
            assert row["gate"] == first and says(row["generated"], "Paris")
            near = row["own_distance"] if question.edit == first else None
            assert near is None or near == row["distance"] < 1e-5
            if question.edit == last:
                assert row["own_distance"] > row["distance"]


@pytest.mark.parametrize("kind", STAY)
def test_what_should_stay_passes_by_the_unedited_answer_and_not_by_the_name_beside_it(
    tokenizer: Any, kind: Kind
) -> None:
    model = tiny_model("gpt2").double()
    [text] = greedy(model, tokenizer, [PROMPTS[0]], 4)
    said = text.split()[0]
    own = [Probe(kind, PROMPTS[0], ("Mars",)), Probe(kind, PROMPTS[0], (said,)), Probe("edit", PROMPTS[0], ("Mars",))]
    rows = ask(model, tokenizer, [Question("c", "", i, probe) for i, probe in enumerate(own)])
    assert [row["passed"] for row in rows] == [True, True, False]
    unedited = {("c", i): " Something else." for i in range(2)}
    rows = ask(model, tokenizer, [Question("c", "", i, probe) for i, probe in enumerate(own)], unedited=unedited)
    assert [row["passed"] for row in rows] == [False, False, False]


def test_the_golden_rows_pass_as_rows_are_written() -> None:
    """tests/golden/rows.jsonl is invented, so that its figures can be reckoned by hand; what passed is the writer's word."""
    lines = [json.loads(line) for line in (Path(__file__).parent / "golden/rows.jsonl").read_text().splitlines()]
    for line in lines:
        probe = Probe(line["kind"], line["prompt"], tuple(line["expected"]))
        question = Question(line["case"], line["edit"], line["probe"], probe)
        made = module._row(question, line["unedited"], {"generated": line["generated"]})
        assert made["passed"] == line["passed"], line
    assert len(lines) == 15


def test_a_window_keeps_what_stands_behind_the_object_in_any_batch(tokenizer: Any) -> None:
    model = tiny_model("gpt2").double()
    [one] = token_ids(tokenizer, [" Tokyo"], special=False)
    long = " Tokyo" * (120 // len(one))  # of 128 positions
    probes = [Probe(kind, prompt, ("Rome",)) for prompt in (*PROMPTS, long) for kind in ("edit", "neighborhood")]
    questions = [Question("c", "", i, probe) for i, probe in enumerate(probes)]
    short, read = ask(model, tokenizer, questions), ask(model, tokenizer, questions, window=30)
    assert [r["generated"] for r in ask(model, tokenizer, questions, window=30, batch=1)] == [
        r["generated"] for r in read
    ]
    assert [r["generated"] for r in read[1::2]] == [r["generated"] for r in short[1::2]]
    for before, row in zip(short[0:8:2], read[0:8:2], strict=True):
        assert [row["generated"]] == greedy(model, tokenizer, [row["prompt"]], 30)
        assert row["generated"].startswith(before["generated"]) and len(row["generated"]) > len(before["generated"])
        assert row["passed"] == before["passed"]
    [ids] = token_ids(tokenizer, [long])
    assert [read[8]["generated"]] == greedy(model, tokenizer, [long], 128 - len(ids) + 1)  # as far as there is room


def test_an_answer_of_an_encoder_decoder_does_not_depend_on_the_names_beside_it(tokenizer: Any) -> None:
    model = tiny_other("bart").double()
    own = Question("c", "", 0, Probe("edit", PROMPTS[0], ("Paris",)))
    other = Question("c", "", 1, Probe("edit", PROMPTS[1], ("United States " * 8,)))
    [alone], together = ask(model, tokenizer, [own]), ask(model, tokenizer, [own, other])
    assert together[0]["generated"] == alone["generated"]
    assert len(together[1]["generated"]) > len(alone["generated"])
    [wide] = ask(model, tokenizer, [own], window=30)
    assert [wide["generated"]] == greedy(model, tokenizer, [PROMPTS[0]], 30)


def test_sampled_and_running_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2").double()
    patches = patches_of(model, tokenizer)
    first, second, *_ = patches
    texts = ("Danielle Darrieux's mother tongue is French.", "Tokyo")
    questions = [
        Question("c", edit, i, Probe("unrelated", text)) for edit in (first, second) for i, text in enumerate(texts)
    ]
    for held in (2**26, 1):
        monkeypatch.setattr(module, "LOGITS", held)
        rows = ask(model, tokenizer, questions, patches=patches)
        assert [r["passed"] for r in rows] == [True, True, False, False]  # steering is elsewhere, weights are not
    for row, question in zip(rows, questions, strict=True):
        [ids] = token_ids(tokenizer, [question.probe.prompt])
        with patches[question.edit].attach(model, tokenizer):
            logp = scores(model, ids[:1], ids[1:], 1)
        expected = exp(logp.gather(1, torch.tensor(ids[1:])[:, None]).mean()) if len(ids) > 1 else None
        assert row["p_expected"] == pytest.approx(expected)
    asked = [Question("c", first, 0, Probe("generation", "The capital of France is"))]
    monkeypatch.setattr(module, "sample", lambda *args, seed: [f"{args[2][0]} {seed}"])
    [row] = ask(model, tokenizer, asked, patches=patches, seed=4)
    assert row["generated"] == "The capital of France is 4" and row["passed"] is None is row["p_expected"]


def test_an_edit_without_a_patch_and_long_prompts_are_refused(tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    patches = patches_of(model, tokenizer)
    with pytest.raises(RequestError, match="none for elsewhere"):
        ask(model, tokenizer, [Question("c", "elsewhere", 0, Probe("edit", "Tokyo"))], patches=patches)
    with pytest.raises(RequestError, match="room for 128"):
        ask(model, tokenizer, [Question("c", "", 0, Probe("edit", "Tokyo " * 126, ("Rome",)))])
    assert ask(model, tokenizer, []) == []
    with attach_rows(model, tokenizer, [None]), pytest.raises(ConfigError, match="pass the patches instead"):
        ask(model, tokenizer, [Question("c", "", 0, Probe("edit", "Tokyo"))])
