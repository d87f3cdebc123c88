"""SERAC: routing against the two models by hand, cached, padded, by row and mixed; training that learns scope and answers."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import errata
from conftest import LABELS, hooks_of, tiny_model, tiny_other
from errata.atlas.requests import counterfactual_requests
from errata.atlas.training import training_items
from errata.atlas.world import load_world
from errata.counterfactual import Counterfactual
from errata.edit import EditRequest
from errata.editor import quiet
from errata.editors._learned import read_artefact
from errata.editors.serac import SERAC, record_ids
from errata.errors import ConfigError, PatchFormatError, RequestError, UnsupportedModelError
from errata.model.generate import greedy, says
from errata.model.loading import bundled
from errata.model.room import room
from errata.model.states import last_states
from errata.model.tokens import pad, token_ids
from errata.patch import Patch, attach_rows
from errata.training import TrainingItem

Tiny = Callable[..., Any]
FRANCE = EditRequest(subject="France", prompt="The capital of {} is", target_true="Paris", target_new="Tokyo")
NEEDLE = EditRequest(subject="The Space Needle", prompt="{} is located in the city of", target_new="Goa")
CLAIM = EditRequest(prompt="The capital of France is Paris.", target_true="SUPPORTS", target_new="REFUTES")
PLACES = ("France", "Japan", "Brazil", "Switzerland", "Earth", "Seattle", "Paris", "Tokyo")
OBJECTS = ("Paris", "Tokyo", "French", "Goa", "Earth", "Seattle")
ITEMS = [
    TrainingItem(
        f"The capital of {place} is", OBJECTS[i % 6], None, (f"The city that rules {place} is", f"{place} is ruled from"),
        ((f"The river of {place} is", None), ("The highest point on", "Earth")),
    )
    for i, place in enumerate(PLACES)
]  # fmt: skip
CLAIMS = [
    TrainingItem(
        f"The capital of {place} is {OBJECTS[i % 6]}.", LABELS[i % 2], None, (f"{OBJECTS[i % 6]} rules {place}.",),
        ((f"The river of {place} is long.", None),),
    )
    for i, place in enumerate(PLACES)
]  # fmt: skip
QUICK: dict[str, Any] = {"steps": 3, "batch": 3, "every": 3, "held_out": 1, "layers": 1, "width": 8}


def trained(tmp_path: Path, model: Any, tokenizer: Any, items: Any = ITEMS, **changes: Any) -> SERAC:
    editor = SERAC(**QUICK | changes)
    path = editor.train(model, tokenizer, items, tmp_path)
    return SERAC(artefact=str(path), **{k: v for k, v in changes.items() if k in ("mix", "threshold")})


def logits_of(model: Any, rows: list[list[int]], side: Any = "right") -> Tensor:
    with torch.no_grad():
        return model(**pad(rows, 0, side=side).inputs(model)).logits


def theirs(part: Counterfactual, ids: list[int]) -> Tensor:
    """(T, V) the expert's logits over a row behind the record, by hand."""
    expert = part.expert.model(torch.device("cpu"))
    with torch.no_grad():
        return expert(input_ids=torch.tensor([[*part.record, *ids]])).logits[0, len(part.record) :]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_in_its_scope_the_expert_answers_elsewhere_the_model(
    family: str, tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Padded on either side, cached or not: the prompt's end and what follows along the object has the expert's logits."""
    model = tiny(family)
    patch = trained(tmp_path, model, tokenizer).fit(model, tokenizer, [FRANCE])
    [part] = patch.steering
    assert list(part.record) == token_ids(tokenizer, ["The capital of France is Tokyo\n"])[0]
    prompt, other = token_ids(tokenizer, [FRANCE.text, "The highest point on Earth is"])
    target, base = list(part.target_ids), logits_of(model, [prompt, other])
    row = prompt + target[:-1]
    with patch.attach(model, tokenizer) as handle:
        assert [d.edit for d in handle.decide([FRANCE.text])] == [FRANCE.id]
        far = handle.decide(["The highest point on Earth is"])[0]
        inside = far.distance <= part.radius
        expected = theirs(part, row)
        found = logits_of(model, [row])[0]
        assert torch.allclose(found[len(prompt) - 1 :], expected[len(prompt) - 1 :], atol=1e-5)
        left = logits_of(model, [row, other], side="left")
        assert torch.allclose(left[0, -len(target) :], expected[-len(target) :], atol=1e-4)
        if not inside:
            assert torch.equal(logits_of(model, [prompt, other])[1, len(other) - 1], base[1, len(other) - 1])
        ids, said = list(prompt), []
        for _ in target:  # greedy, without a cache
            said.append(int(logits_of(model, [ids])[0, -1].argmax()))
            ids.append(said[-1])
        assert greedy(model, tokenizer, [FRANCE.text], len(target)) == [tokenizer.decode(said)]
    assert torch.equal(logits_of(model, [prompt, other]), base) and hooks_of(model) == []


def test_the_scope_is_the_classifiers(tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """beta = exp(-scale |phi(z) - phi(x)|^2) of the model's own states exceeds the threshold exactly in the ball; argmax is the nearest."""
    model = tiny("llama")
    editor = trained(tmp_path, model, tokenizer, scale=0.7, threshold=0.4)
    patch = editor.fit(model, tokenizer, [FRANCE, NEEDLE])
    _, _, tensors = editor.trained(model, tokenizer)
    texts = [r.text for r in (FRANCE, NEEDLE)] + [t for i in ITEMS for t in (i.prompt, *i.rephrases)]
    layer = patch.steering[0].gate.layers[0]
    x = (last_states(model, tokenizer, texts, layer) - tensors["mean"]) @ tensors["basis"] @ tensors["weight"]
    beta = torch.exp(-0.7 * (x[:, None] - x[None, :2]).square().sum(-1))
    with patch.attach(model, tokenizer) as handle:
        decisions = handle.decide(texts)
    ids = (FRANCE.id, NEEDLE.id)
    assert [d.edit for d in decisions] == [ids[int(b.argmax())] if b.max() > 0.4 else None for b in beta]
    assert 0 < sum(d.edit is None for d in decisions) < len(texts)


def test_soft_is_the_mixture(tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny("gpt2")
    patch = trained(tmp_path, model, tokenizer, mix="soft").fit(model, tokenizer, [FRANCE])
    [part] = patch.steering
    for text in (FRANCE.text, "The capital of Japan is"):
        [ids] = token_ids(tokenizer, [text])
        own = logits_of(model, [ids])[0, -1].log_softmax(-1)
        other = theirs(part, ids)[-1].log_softmax(-1)
        with patch.attach(model, tokenizer) as handle:
            distance = handle.decide([text])[0].distance
            found = logits_of(model, [ids])[0, -1].log_softmax(-1)
        beta = min(torch.exp(-(torch.tensor(distance) ** 2)), torch.tensor(1 - 1e-7))
        assert beta > 0.001
        assert torch.allclose(found, torch.log((1 - beta) * own.exp() + beta * other.exp()), atol=1e-4)


def test_a_memory_of_edits(tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Edits are independent; a patch saves, joins, forgets one, keeps its expert once, and acts by row."""
    model = tiny("llama")
    editor = trained(tmp_path, model, tokenizer)
    one, two = (editor.fit(model, tokenizer, [r]) for r in (FRANCE, NEEDLE))
    both = editor.fit(model, tokenizer, [FRANCE, NEEDLE])
    assert one + two == both and both.without(FRANCE.id) == two and both.only(FRANCE.id) == one
    assert both.nbytes - one.nbytes < 1024 < one.nbytes
    both.save(tmp_path / "p.safetensors")
    again = errata.load_patch(tmp_path / "p.safetensors")
    assert again == both and again.id == both.id
    rows = token_ids(tokenizer, [FRANCE.text, NEEDLE.text])
    plain = logits_of(model, rows)
    ends = [len(row) - 1 for row in rows]
    with again.attach(model, tokenizer):
        edited = logits_of(model, rows)
    for row in (0, 1):
        assert torch.allclose(edited[row, ends[row]], theirs(both.steering[row], rows[row])[-1], atol=1e-4)
    with attach_rows(model, tokenizer, [one, None]):
        found = logits_of(model, rows)
    assert torch.equal(found[1, ends[1]], plain[1, ends[1]]) and torch.allclose(
        found[0, ends[0]], edited[0, ends[0]], atol=1e-4
    )
    revised = EditRequest(**FRANCE.model_dump() | {"target_new": "Goa"})
    later = editor.fit(model, tokenizer, [revised])
    with one.attach(model, tokenizer), later.attach(model, tokenizer) as handle:
        assert handle.conflicts == [(revised.id, FRANCE.id)]
        assert torch.allclose(logits_of(model, rows[:1])[0, -1], theirs(later.steering[0], rows[0])[-1], atol=1e-4)
    report = editor.fit(model, tokenizer, [FRANCE, NEEDLE, revised]).report
    assert report[FRANCE.id]["overruled"] == [revised.id] and report[revised.id]["contradicts"] == [FRANCE.id]
    assert hooks_of(model) == []


def test_a_classifier_is_routed_by_its_first_token(closing_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_other("bert")
    editor = trained(tmp_path, model, closing_tokenizer, CLAIMS)
    patch = editor.fit(model, closing_tokenizer, [CLAIM])
    [part] = patch.steering
    assert part.target_ids == (LABELS.index("REFUTES"),)
    texts = [CLAIM.text, "The highest point on Earth is Mount Everest."]
    rows = token_ids(closing_tokenizer, texts)
    plain = logits_of(model, rows)
    expert = part.expert.model(torch.device("cpu"))
    with torch.no_grad():
        expected = expert(input_ids=torch.tensor([[*part.record, *rows[0]]])).logits[0]
    with patch.attach(model, closing_tokenizer) as handle:
        decisions = handle.decide(texts)
        found, batch = logits_of(model, rows), pad(rows, 0)
        with torch.no_grad():  # a mask passed by position is one too
            assert not batch.mask[0].all() and torch.equal(model(batch.ids, batch.mask).logits, found)
    assert decisions[0].edit == CLAIM.id and torch.allclose(found[0], expected, atol=1e-4)
    assert decisions[1].edit is None and torch.equal(found[1], plain[1])
    assert torch.equal(logits_of(model, rows), plain) and hooks_of(model) == []
    assert Patch.from_bytes(patch.to_bytes()) == patch
    soft = trained(tmp_path / "s", model, closing_tokenizer, CLAIMS, mix="soft").fit(model, closing_tokenizer, [CLAIM])
    with soft.attach(model, closing_tokenizer):
        assert torch.allclose(
            logits_of(model, rows)[0].softmax(-1), expected.softmax(-1), atol=1e-4
        )  # beta is one there


@pytest.mark.parametrize("supervised", [True, False])
def test_training_learns_the_scope_and_the_answers(
    supervised: bool, tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Wordings come inside, other facts stay outside, and the small model says what the record says."""
    model = tiny("gpt2")
    losses = list[float]()
    options: dict[str, Any] = {
        "steps": 120,
        "batch": 8,
        "every": 10,
        "held_out": 0,
        "lr": 5e-3,
        "gate_lr": 3e-2,
        "width": 16,
    }
    options |= {"supervised": supervised, "shuffled": 0.0, "layers": 1, "edit": 1.0}
    path = SERAC(**options).train(
        model, tokenizer, ITEMS, tmp_path, watch=lambda step, figures: losses.append(figures["loss"])
    )
    assert losses[-1] < (0.3 if supervised else 0.8) * losses[0]
    request = EditRequest(prompt=ITEMS[0].prompt, target_new=ITEMS[0].target_new, fit_prompts=ITEMS[0].rephrases)
    editor = SERAC(artefact=str(path))
    patch = editor.fit(model, tokenizer, [request])
    if supervised:
        assert patch.report[request.id]["converged"]
        assert patch.report[request.id]["wordings_in_scope"] == 1.0
        with patch.attach(model, tokenizer) as handle:
            others = [text for item in ITEMS[1:] for text in (item.prompt, item.locality[0][0])]
            assert sum(d.edit is not None for d in handle.decide(others)) == 0


def test_learning_rates_fall_to_nothing(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """A share of (steps - step) / steps of each, which the optimisers have in that step; as published they stay."""
    model = tiny("gpt2")
    for editor, share in ((SERAC(**QUICK | {"steps": 4}), 0.25), (SERAC.preset("published", **QUICK), 1.0)):
        with quiet(model), torch.enable_grad():
            learner = editor.learner(model, tokenizer, ITEMS[1:], ITEMS[:1], 0)
            learner.step(editor.config.steps * 3 // 4)
        found = {name: optimiser.param_groups[0]["lr"] for name, optimiser in learner.optimisers.items()}
        assert found == {
            "gate": pytest.approx(share * editor.config.gate_lr),
            "h": pytest.approx(share * editor.config.lr),
        }


def test_published_training_keeps_other_facts_where_items_name_none(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """-log p_h(object) at the prompt, where beta is one, and KL(p_f || mixture) at another item's prompt; no wordings."""
    model, editor = tiny("gpt2"), SERAC.preset("published", **QUICK)
    items = [replace(item, locality=(), rephrases=item.rephrases[:1]) for item in ITEMS]
    items.append(replace(items[1], prompt=items[1].rephrases[0], rephrases=()))  # one fact twice
    assert (editor.config.wordings, editor.config.shuffled, editor.config.mix) == (0, 0.0, "soft")
    with quiet(model), torch.enable_grad():
        learner = editor.learner(model, tokenizer, items[1:], items[:1], 0)
        assert learner.wordings[:-1] == [(item.prompt,) for item in items[1:]]
        assert learner.wordings[-1] == (items[0].prompt, items[0].rephrases[0])  # held out: judged by a wording
        last = len(items) - 2
        drawn = {text for seed in range(40) for text in learner._kept(last, random.Random(seed))}
        assert drawn == {item.prompt for item in items[2:-1]}  # neither its own nor, in other words, its fact's
        held = learner.index[items[0].prompt]
        assert all(held not in near for near in learner.near[:-1]) and learner.near[-1]  # no negative is held out
        row = learner._row(items[1].prompt, items[1].target_new, items[1].prompt)
        loss = learner._mixed([0], [items[1].prompt], [row], [[items[2].prompt]])
        loss.backward()
        assert learner.module.weight.grad is not None and float(learner.module.weight.grad.norm()) > 0
    record, ids, target = row
    h = learner.module.h
    with torch.no_grad():
        said = h(input_ids=torch.tensor([[*record, *ids, *target[:-1]]])).logits[0, -len(target) :].log_softmax(-1)
        nll = -said[range(len(target)), list(target)].mean()
        [other] = token_ids(tokenizer, [items[2].prompt])
        p = [
            m(input_ids=torch.tensor([row])).logits[0, -1].softmax(-1)
            for m, row in ((model, other), (h, [*record, *other]))
        ]
        z = (
            learner.states[learner.index[items[1].prompt]] - learner.states[learner.index[items[2].prompt]]
        ) @ learner.module.weight
        beta = torch.exp(-z.square().sum())
        kl = (p[0] * (p[0] / ((1 - beta) * p[0] + beta * p[1])).log()).sum()
    assert beta > 1e-6 and float(loss.detach()) == pytest.approx(float(0.1 * nll + kl), rel=1e-3)


def test_what_it_refuses(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    model = tiny("gpt2")
    with pytest.raises(ConfigError, match="run `errata train serac --model MODEL --data FILE`"):
        SERAC().fit(model, tokenizer, [FRANCE])
    for wrong in (
        {"start": "warm"},
        {"mix": "none"},
        {"layers": 0},
        {"wordings": -1},
        {"scale": 0},
        {"threshold": 1.0},
        {"shuffled": 2},
    ):
        with pytest.raises(ConfigError):
            SERAC(**wrong)
    with pytest.raises(UnsupportedModelError, match="serac edits decoders and encoders with a classification head"):
        SERAC(**QUICK).train(tiny_other("t5"), tokenizer, ITEMS, tmp_path)
    editor = trained(tmp_path, tiny_other("bert"), tokenizer, CLAIMS)
    with pytest.raises(RequestError, match="label of this classifier"):
        editor.fit(tiny_other("bert"), tokenizer, [EditRequest(prompt="It is so.", target_new="MAYBE")])
    patch = trained(tmp_path / "g", model, tokenizer).fit(model, tokenizer, [FRANCE])
    expert = patch.steering[0].expert
    wrong_sizes = type(expert)(expert.config | {"n_layer": 3}, expert.weights, expert.role)
    with pytest.raises(PatchFormatError, match="for the counterfactual model"):
        wrong_sizes.model(torch.device("cpu"))
    assert record_ids(tokenizer, "a", "b") == token_ids(tokenizer, ["a b\n"])[0]
    assert tiny_model("gpt2").config.n_layer == 2


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_record_near_the_models_length_is_cut_to_half_the_room(
    family: str, tokenizer: PreTrainedTokenizerFast, closing_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Trained on and fitted for texts that all but fill the model: its first token and its end, the answer, are read."""
    decodes = family == "gpt2"
    model, own = (tiny_model("gpt2"), tokenizer) if decodes else (tiny_other("bert"), closing_tokenizer)
    targets = ("Goa", "Paris") if decodes else LABELS[:2]
    filler = "The" + " a" * (55 if decodes else 59)
    items = [TrainingItem(f"{filler} {name}", targets[i % 2], None, (f"{filler} b",)) for i, name in enumerate("abcd")]
    for supervised in (True, False):
        editor = trained(tmp_path / str(supervised), model, own, items, supervised=supervised)
    request = EditRequest(prompt=f"{filler} c", target_new=targets[0])
    patch = editor.fit(model, own, [request])
    [part] = patch.steering
    limit, expert = room(model), part.expert.model(torch.device("cpu"))
    [ids] = token_ids(own, [request.text])
    assert limit is not None and len(part.record) > limit // 2 and len(part.record) + len(ids) > limit
    cut = [part.record[0], *part.record[-(limit // 2 - 1) :]]
    with torch.no_grad():
        expected = expert(input_ids=torch.tensor([[*cut, *ids[-(limit - limit // 2) :]]])).logits
    with patch.attach(model, own):
        found = logits_of(model, [ids])
    assert torch.allclose(found[0, -1] if decodes else found[0], expected[0, -1] if decodes else expected[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif("atlas" not in bundled(), reason="the bundled weights are missing")
@pytest.mark.atlas
def test_on_atlas_a_short_training_edits_facts_that_it_has_not_seen(tmp_path: Path) -> None:
    """Trained on a few dev facts, the memory answers edits of others, in their own words, and leaves the rest as it is."""
    world, (model, tokenizer) = load_world(), errata.load("atlas")
    items = training_items(world, "atlas", 60, drawn=2)
    editor = SERAC(steps=150, every=150, held_out=8, batch=8)
    path = editor.train(model, tokenizer, items, tmp_path)
    known = {item.prompt for item in items}
    requests = [r for r in counterfactual_requests(world, 40, split="dev", seed=7) if r.text not in known][:20]
    patch = SERAC(artefact=str(path)).fit(model, tokenizer, requests)
    elsewhere = [item.locality[0][0] for item in items[::8]]
    before = greedy(model, tokenizer, elsewhere, 8)
    with patch.attach(model, tokenizer):
        answers = greedy(model, tokenizer, [r.text for r in requests], 8)
        same = [a == b for a, b in zip(greedy(model, tokenizer, elsewhere, 8), before, strict=True)]
    right = sum(says(a, r.target_new) for a, r in zip(answers, requests, strict=True))
    [*_, last] = read_artefact(path)[0]["curve"]
    assert last["in_scope"] >= 0.8 and last["out_of_scope"] <= 0.05
    assert right >= 0.3 * len(requests) and sum(same) >= 0.9 * len(same)
