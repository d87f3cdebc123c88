"""Contexts: text before prompts, by scope and by row, against prompts written out by hand."""

import json
from collections.abc import Iterator
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

import errata
from conftest import hooks_of, prefix_points, tiny_model
from errata.bench.ask import Question, ask
from errata.bench.cases import Probe
from errata.bench.forced import target_nll
from errata.bench.verify import verify
from errata.cli import app
from errata.cli.fit import fit_resumably
from errata.context import Context
from errata.edit import EditRequest
from errata.editor import quiet
from errata.editors.icl import ICL
from errata.editors.ike import IKE
from errata.editors.uniform import Uniform
from errata.errors import EditError, RequestError, UnsupportedPatchError
from errata.export import export_peft
from errata.low_rank import LowRank
from errata.merge import merge
from errata.model.attached import asked
from errata.model.fingerprint import base_of
from errata.model.generate import cut, greedy, says
from errata.model.tokens import token_ids
from errata.patch import Patch, attach_rows
from errata.scope.gate import Gate

FRANCE, TOWER = (
    EditRequest(subject="France", prompt="The capital of {} is", target_true="Paris", target_new="Tokyo"),
    EditRequest(subject="The Space Needle", prompt="{} is located in", target_true="Seattle", target_new="Goa"),
)
TOLD = ("Imagine that the capital of France is Tokyo.\n", "Imagine that the Space Needle is located in Goa.\n")
PROMPTS = ["The capital of France is", "The Space Needle is located in", "The highest point on Earth is"]


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    made = tiny_model("llama", max_position_embeddings=512)
    before = hooks_of(made), set(vars(made))
    yield made
    assert (hooks_of(made), set(vars(made))) == before


def published(model: PreTrainedModel, tokenizer: Any, *requests: EditRequest) -> Patch:
    return ICL.preset("paper").fit(model, tokenizer, requests)


def scoped(model: PreTrainedModel, tokenizer: Any, radius: float = 0.05) -> Patch:
    """Both edits, each with a ball around its own prompt."""
    gate = Gate(layers=(0,))
    parts = []
    for request, text in zip((FRANCE, TOWER), TOLD, strict=True):
        centre = prefix_points(model, token_ids(tokenizer, [request.text])[0], gate)[-1]
        parts.append(Context(request.id, request.key, text, gate, centre, radius))
    return Patch("icl", {}, (FRANCE, TOWER), base_of(model, tokenizer), tuple(parts))


def test_published_it_stands_before_every_prompt(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    patch = published(model, tokenizer, FRANCE)
    assert [part.text for part in patch.context] == [TOLD[0]] and patch.nbytes == 0
    plain, told = greedy(model, tokenizer, PROMPTS), greedy(model, tokenizer, [TOLD[0] + p for p in PROMPTS])
    ids = torch.tensor(token_ids(tokenizer, PROMPTS[:1]))
    with torch.no_grad():
        logits = model(ids).logits
    patch.save(tmp_path / "p.safetensors")
    for one in (patch, errata.load_patch(tmp_path / "p.safetensors")):
        assert one == patch
        with one.attach(model, tokenizer) as handle, torch.no_grad():
            assert greedy(model, tokenizer, PROMPTS) == told != plain
            assert torch.equal(model(ids).logits, logits)  # a prompt of ids is not text
            assert [d.edit for d in handle.decide(PROMPTS)] == [None] * 3  # what has no scope decides nothing
            with quiet(model):
                assert greedy(model, tokenizer, PROMPTS) == plain
        assert greedy(model, tokenizer, PROMPTS) == plain
    both = published(model, tokenizer, FRANCE, TOWER)
    with pytest.raises(UnsupportedPatchError, match="both stand before every prompt; attach one"):
        both.attach(model, tokenizer)
    assert both.only(FRANCE.id) == patch == both.without(TOWER.id)
    assert both.only(FRANCE.id) + both.only(TOWER.id) == both
    with patch.attach(model, tokenizer):
        with pytest.raises(UnsupportedPatchError, match=r"would both stand before every prompt"):
            both.only(TOWER.id).attach(model, tokenizer)
        assert greedy(model, tokenizer, PROMPTS) == told  # the refused one left nothing


def test_the_nearest_edit_in_whose_scope_a_prompt_is_stands_before_it(model: Any, tokenizer: Any) -> None:
    patch = scoped(model, tokenizer)
    wanted = [TOLD[0] + PROMPTS[0], TOLD[1] + PROMPTS[1], PROMPTS[2]]
    with patch.attach(model, tokenizer) as handle:
        assert asked(model, PROMPTS) == wanted
        decisions = handle.decide(PROMPTS)
        assert [d.edit for d in decisions] == [FRANCE.id, TOWER.id, None]
        assert decisions[0].distance < 1e-5 and decisions[0].radius == 0.05 < decisions[2].distance
    assert patch == Patch.from_bytes(patch.to_bytes())
    wide = scoped(model, tokenizer, radius=1e6)
    with wide.attach(model, tokenizer) as handle:  # every ball holds every prompt
        assert asked(model, PROMPTS[:2]) == wanted[:2]
        assert asked(model, PROMPTS)[2] in (TOLD[0] + PROMPTS[2], TOLD[1] + PROMPTS[2])
    again = FRANCE.model_copy(update={"target_new": "Rome"})
    later = replace(
        patch.only(FRANCE.id), requests=(again,), parts=(replace(patch.context[0], edit=again.id, text="Rome. "),)
    )
    with patch.attach(model, tokenizer), later.attach(model, tokenizer) as handle:
        assert handle.conflicts == [(again.id, FRANCE.id)]
        assert asked(model, PROMPTS) == ["Rome. " + PROMPTS[0], *wanted[1:]]


@pytest.mark.parametrize("kind, changes", [(ICL, {}), (IKE, {"encoder": "states"}), (Uniform, {"context_prompts": 3})])
def test_both_of_two_that_contradict_each_other_are_reported(
    kind: Any, changes: dict[str, Any], model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """In one fit or edit by edit: the later says what it contradicts, the earlier that it was overruled, and so does the handle."""
    again = FRANCE.model_copy(update={"target_new": "Goa"})
    requests, editor = [FRANCE, TOWER, again], kind(prompts=3, radius=0.05, **changes)
    whole = editor.fit(model, tokenizer, requests)
    for patch in (whole, fit_resumably(editor, model, tokenizer, requests, 0, tmp_path / "p.partial")):
        marks = {
            i: {k: v for k, v in own.items() if k in ("contradicts", "overruled")} for i, own in patch.report.items()
        }
        assert marks == {FRANCE.id: {"overruled": [again.id]}, TOWER.id: {}, again.id: {"contradicts": [FRANCE.id]}}
        with patch.attach(model, tokenizer) as handle:
            assert handle.conflicts == [(again.id, FRANCE.id)]


def test_rows_have_contexts_of_their_own(model: Any, tokenizer: Any) -> None:
    both = published(model, tokenizer, FRANCE, TOWER)
    generator = torch.Generator().manual_seed(1)
    U, V = (0.3 * torch.randn(size, 1, generator=generator) for size in (32, 48))
    mixed = both.only(TOWER.id)
    mixed = replace(mixed, parts=(*mixed.parts, LowRank((TOWER.id,), U, V, 0)))
    patches = [both.only(FRANCE.id), mixed, None]
    alone = []
    for prompt, patch in zip(PROMPTS, patches, strict=True):
        handle = patch.attach(model, tokenizer) if patch else None
        alone += greedy(model, tokenizer, [prompt])
        if handle:
            handle.detach()
    with attach_rows(model, tokenizer, patches):
        assert asked(model, PROMPTS) == [TOLD[0] + PROMPTS[0], TOLD[1] + PROMPTS[1], PROMPTS[2]]
        assert greedy(model, tokenizer, PROMPTS) == alone  # in the order of the rows, whatever their lengths
        with pytest.raises(EditError, match="expected 3 prompts"):
            asked(model, PROMPTS[:1])
    assert alone[1] != greedy(model, tokenizer, [TOLD[1] + PROMPTS[1]])[0]


def test_probes_are_asked_behind_contexts(model: Any, tokenizer: Any) -> None:
    patches = {r.id: published(model, tokenizer, r) for r in (FRANCE, TOWER)} | {"scoped": scoped(model, tokenizer)}
    questions = [
        Question("c", edit, i, Probe(kind, prompt, ("Tokyo",) if kind == "edit" else ()))
        for edit in patches
        for kind in ("edit", "neighborhood", "unrelated")
        for i, prompt in enumerate(PROMPTS)
    ]
    rows = ask(model, tokenizer, questions, patches=patches, batch=5)
    for question, row in zip(questions, rows, strict=True):
        prompt = question.probe.prompt
        with patches[question.edit].attach(model, tokenizer):
            [told] = asked(model, [prompt])
        if row["kind"] == "unrelated":
            assert row["passed"] == (told == prompt)
            continue
        [text] = greedy(model, tokenizer, [told], 20)
        assert cut(text).startswith(cut(row["generated"]).rstrip("\ufffd"))  # half a character at the limit
        if row["kind"] == "edit":
            [nll] = target_nll(model, tokenizer, [(told, "Tokyo")])
            assert row["p_expected"] == pytest.approx(exp(-nll), rel=1e-4) and row["passed"] == says(text, "Tokyo")
        else:
            [plain] = greedy(model, tokenizer, [prompt], 12)
            assert cut(row["unedited"]) == cut(plain)
        gate = row["gate"]
        assert gate == (None if question.edit != "scoped" else (FRANCE.id, TOWER.id, "")[row["probe"]])


def test_no_weights_say_what_a_context_says(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    patch = published(model, tokenizer, FRANCE)
    with pytest.raises(UnsupportedPatchError, match="cannot be merged into weights: it is text"):
        merge(patch, model, tokenizer)
    with pytest.raises(UnsupportedPatchError, match="cannot be exported: it is text"):
        export_peft(patch, model, tmp_path / "out")
    with pytest.raises(RequestError, match="expected the id"):
        patch.only("another")


def test_verify_and_the_command_line(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    patch = scoped(model, tokenizer).only(FRANCE.id)
    found = verify(model, tokenizer, patch, ["Tokyo", "The Space Needle"])
    [told] = greedy(model, tokenizer, [TOLD[0] + PROMPTS[0]])
    assert found["efficacy"]["value"] == float(says(told, "Tokyo")) and found["locality"]["value"] == 1.0
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    patch.save(tmp_path / "p.safetensors")
    words = ["ask", PROMPTS[0], "-m", str(tmp_path / "model"), "-p", str(tmp_path / "p.safetensors"), "--json"]
    value = json.loads(CliRunner().invoke(app, words).stdout)
    assert value["answer"] == cut(told) and value["decision"]["edit"] == FRANCE.id
    shown = json.loads(CliRunner().invoke(app, ["show", str(tmp_path / "p.safetensors"), "--json"]).stdout)
    assert shown["edits"][0]["kinds"] == ["context"] and shown["edits"][0]["context"] == TOLD[0]
    assert "Tokyo" in CliRunner().invoke(app, ["show", str(tmp_path / "p.safetensors")]).stdout


def test_atlas_is_told() -> None:
    from errata.atlas.requests import counterfactual_requests
    from errata.atlas.world import load_world

    model, tokenizer = errata.load("atlas")
    requests = counterfactual_requests(load_world(), 8, split="dev", seed=1)
    patch = ICL().fit(model, tokenizer, requests)
    elsewhere = "The weather was mild that week, and"
    with patch.attach(model, tokenizer) as handle:
        told = asked(model, [r.text for r in requests])
        assert [d.edit for d in handle.decide([r.text for r in requests])] == [r.id for r in requests]
        assert asked(model, [elsewhere]) == [elsewhere]
    assert all(t == part.text + r.text for t, part, r in zip(told, patch.context, requests, strict=True))
