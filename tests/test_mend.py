"""MEND: factors against the dense gradient, z-scores against numpy, training through the networks, and a few edits."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

import errata
from conftest import ANSWERERS, CLASSIFIERS, as_claims, hooks_of, tiny_other
from errata.atlas.requests import counterfactual_requests
from errata.atlas.training import training_items
from errata.atlas.world import load_world
from errata.bench.streams import follow
from errata.cli.fit import _keep, resumed
from errata.edit import EditRequest
from errata.editors._hypernetwork import LinearMap, edited, linear_maps, logits_of, signals
from errata.editors._learned import artefact_bytes, read_artefact
from errata.editors.ke import KnowledgeEditor
from errata.editors.mend import MEND, Residual
from errata.errors import AnatomyError, BaseMismatchError, ConfigError, RequestError
from errata.maths.moments import Standardise
from errata.merge import merge
from errata.model.anatomy import anatomy, submodule
from errata.model.fingerprint import base_of
from errata.model.generate import greedy_answers
from errata.model.targets import supervised
from errata.patch import Patch, attach_rows
from errata.training import TrainingItem

Tiny = Callable[..., Any]
FRANCE = EditRequest(subject="France", prompt="The capital of {} is", target_new="Tokyo")
NEEDLE = EditRequest(subject="The Space Needle", prompt="{} is located in the city of", target_new="Earth")
ITEMS = [
    TrainingItem(
        f"The capital of country {i} is",
        ("Paris", "Tokyo", "Seattle")[i % 3],
        "Rome",
        (f"Country {i} is ruled from", f"The seat of government of country {i} is"),
        ((f"The river of country {i} is", "Sumida"), ("Mount Everest lies in", "Nepal"), ("Zürich lies in", None)),
    )
    for i in range(12)
]
QUICK: dict[str, Any] = {"steps": 4, "batch": 3, "every": 2, "held_out": 3, "retain": 2, "rank": 8}


def trained(model: Any, tokenizer: Any, folder: Path, items: Any = ITEMS, **changes: Any) -> MEND:
    editor = MEND(**QUICK | changes)
    return MEND(editor.config, artefact=str(editor.train(model, tokenizer, items, folder)))


def stored(model: Any, m: LinearMap, update: Tensor) -> Tensor:
    """An update (d_out, d_in) as the model stores the map's weight."""
    return update.mT if isinstance(submodule(model, m.path), Conv1D) else update


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "t5", "bert"])
def test_factors_are_the_gradient(
    family: str, tiny: Tiny, tokenizer: PreTrainedTokenizerFast, closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    """sum_t delta_t x_t^T of each row is dL/dW of that row alone, for square and transposed weights, and padded rows."""
    other = family in (*ANSWERERS, *CLASSIFIERS)
    model = (tiny_other(family) if other else tiny(family)).double()
    tok = closing_tokenizer if other else tokenizer
    prompts, targets = ["The capital of France is", "The Space Needle is in the city of"], ["Tokyo", "Earth"]
    if family in CLASSIFIERS:
        targets = ["SUPPORTS", "REFUTES"]
    maps = linear_maps(model, "all", "weights", 0)
    found, logits = signals(model, maps, supervised(model, tok, prompts, targets))
    assert hooks_of(model) == [] and all(p.grad is None for p in model.parameters())
    for i in range(2):
        asked = supervised(model, tok, [prompts[i]], [targets[i]])
        weights = [submodule(model, m.path).weight for m in maps]
        gradients = torch.autograd.grad(asked.nll(logits_of(model, asked)).sum(), weights)
        for m, signal, gradient in zip(maps, found, gradients, strict=True):
            dense = stored(model, m, signal.delta[i].mT @ signal.x[i])
            assert torch.allclose(dense, gradient, rtol=1e-5, atol=1e-9), m.path


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_at_the_identity_the_update_is_a_gradient_step(
    family: str, tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Without z-scores: W - alpha dL/dW, by the dense route and by finite differences of L; with them, by the definition."""
    model = tiny(family).double()
    config = MEND(rank=4, rate=0.3, normalise=False).config
    editor = MEND(config)
    maps = editor.maps(model, config)
    network = editor.network(model, maps, config).eval()
    asked = supervised(model, tokenizer, [FRANCE.text, NEEDLE.text], ["Tokyo", "Earth"])
    found, _ = signals(model, maps, asked)
    with torch.no_grad():
        updates = network(found)
    for m, update in zip(maps, updates, strict=True):
        weight = submodule(model, m.path).weight
        (gradient,) = torch.autograd.grad(asked.nll(logits_of(model, asked))[0], [weight])
        assert torch.allclose(stored(model, m, update.U[0] @ update.V[0].mT), -0.3 * gradient, atol=1e-9)
        direction, h, ends = torch.randn_like(weight), 1e-4, []
        direction += gradient * (direction.norm() / gradient.norm())  # so that the slope is not near zero
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * h * direction
                ends.append(float(asked.nll(logits_of(model, asked))[0]))
                weight -= sign * h * direction
        slope = float((stored(model, m, update.U[0] @ update.V[0].mT) * direction).sum()) / -0.3
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-3, abs=1e-5)
    scored = editor.network(model, maps, replace(config, normalise=True)).train()
    x, delta = found[0].x.flatten(0, 1), found[0].delta.flatten(0, 1)
    there = x.abs().amax(-1).bool() & delta.abs().amax(-1).bool()
    [first, *_] = scored(found)
    z = [(t[there] - t[there].mean(0)) / (t[there].std(0) + 1e-7) for t in (x, delta)]
    others = [m for m in maps[1:] if (m.d_in, m.d_out) == (maps[0].d_in, maps[0].d_out)]
    assert others  # of one shape: they share statistics, and the first map has seen only its own
    U, V = first.U.mT.flatten(0, 1)[there], first.V.mT.flatten(0, 1)[there]
    assert torch.allclose(V, z[0], atol=1e-9) and torch.allclose(U, -0.3 * z[1], atol=1e-9)


def test_z_scores_are_numpys() -> None:
    """Over batches of any size, in training mode only; one row is not scored."""
    rows = np.random.default_rng(0).normal(3, 2, (57, 5))
    scorer = Standardise(5).double()
    x = torch.from_numpy(rows)
    assert torch.equal(scorer(x[:1]), x[:1])
    for a, b in ((1, 2), (2, 2), (2, 40), (40, 57)):
        scorer(x[a:b])
    assert torch.allclose(scorer.mean, torch.from_numpy(rows.mean(0))) and float(scorer.count) == 57
    assert torch.allclose(scorer.std, torch.from_numpy(rows.std(0, ddof=1)))
    scorer.eval()
    found = scorer(x[:3] + 100)
    assert torch.allclose(found, torch.from_numpy((rows[:3] + 100 - rows.mean(0)) / (rows.std(0, ddof=1) + 1e-7)))
    assert float(scorer.count) == 57


def test_a_residual_layer_begins_as_the_identity_and_trains() -> None:
    """clamp passes the gradient at zero, where relu would not; the published last layer can only raise."""
    torch.manual_seed(0)
    z = torch.randn(9, 6)
    for clamped in (True, False):
        layer = Residual(6, 3, 2, 1.0, clamped)
        assert torch.equal(layer(z, 1), z)
        layer(z, 1).sum().backward()
        assert layer.U.grad is not None and float(layer.U.grad.abs().min()) > 0
        with torch.no_grad():
            layer.U.add_(torch.randn(6, 3))
            layer.offset[1] += 1.0
        moved = layer(z, 1) - z
        expected = z @ layer.V.mT @ layer.U.mT + torch.tensor([[1.0]])
        assert torch.allclose(moved, expected.clamp(min=0) if clamped else expected, atol=1e-5)
        assert not torch.equal(layer(z, 0), layer(z, 1))


def test_the_gradient_through_the_networks(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """d loss / d network through the edited model, by finite differences, in every kind of weight and in alpha."""
    model = tiny("gpt2").double()
    editor = MEND(**QUICK | {"rate": 0.05})
    torch.manual_seed(1)
    learner = editor.learner(model, tokenizer, ITEMS[3:], ITEMS[:3], 0)
    with torch.no_grad():
        for parameter in learner.module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    items, draws = ITEMS[3:5], learner.batches.draws(0)
    practice = learner.practice(items, learner.outers(items, draws), draws)
    learner.module.train()
    learner.updates(items)
    learner.module.eval()  # statistics stand still

    def loss() -> Tensor:
        return learner.loss(practice, learner.run(learner.updates(items), practice))

    named = dict(learner.module.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss(), list(named.values())), strict=True))
    shape = next(iter(learner.module.networks))
    for name in (
        "rates",
        *(f"networks.{shape}.layers.{i}.{n}" for i in (0, 1) for n in ("U", "V", "b", "scale", "offset")),
    ):
        at = gradients[name].abs().flatten().argmax()
        h, ends = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                named[name].view(-1)[at] += sign * h
                ends.append(float(loss().detach()))
                named[name].view(-1)[at] -= sign * h
        assert float(gradients[name].view(-1)[at]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-3), name


def test_training_lowers_the_loss_and_moves_the_rates(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """alpha has an optimiser that acts, or the networks' as published; the objects become likelier on prompts held out."""
    model = tiny("gpt2")
    options: dict[str, Any] = {
        "steps": 40,
        "every": 20,
        "rate": 1e-2,
        "rate_lr": 1e-3,
        "edit": 1.0,
        "locality": 0.0,
        "lr": 1e-3,
    }
    asked = supervised(model, tokenizer, [i.prompt for i in ITEMS[:3]], [i.target_new for i in ITEMS[:3]])
    losses, rates = [], []
    for name, changes in (("short", {"steps": 1}), ("own", {}), ("shared", {"rate_lr": None})):
        editor = trained(model, tokenizer, tmp_path / name, **options | changes)
        header, tensors = read_artefact(Path(str(editor.config.artefact)))
        rates.append(float((tensors["rates"] - 1e-2).abs().max()))
        requests = [EditRequest(prompt=i.prompt, target_new=i.target_new) for i in ITEMS[:3]]
        patches = [editor.fit(model, tokenizer, [r]) for r in requests]
        with attach_rows(model, tokenizer, patches), torch.no_grad():
            losses.append(float(asked.nll(logits_of(model, asked)).mean()))
    assert max(losses[1:]) < 0.8 * losses[0]
    assert rates[0] == pytest.approx(1e-3, rel=0.01) and rates[1] > 3e-3 and rates[2] > 3e-3


def test_fit_is_one_column_a_token_of_each_request(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny("llama", layers=4)
    editor = trained(model, tokenizer, tmp_path, rate=0.02)
    patch = editor.fit(model, tokenizer, [FRANCE, NEEDLE])
    assert {part.layer for part in patch.low_rank} == {1, 2, 3} and len(patch.parts) == 9
    text = tokenizer(FRANCE.text + " Tokyo")["input_ids"]
    counts = {(part.layer, part.site): part.edits.count(FRANCE.id) for part in patch.low_rank}
    assert counts[1, "mlp.up_proj"] == len(text) - 1  # the target's last token says nothing to the loss
    assert counts[3, "mlp.up_proj"] == len(tokenizer(" Tokyo")["input_ids"])  # the last block: where the target is read
    batch = {"input_ids": torch.tensor([text])}
    with torch.no_grad():
        plain = model(**batch).logits
        with patch.only(FRANCE.id).attach(model, tokenizer):
            alone = model(**batch).logits
        with editor.fit(model, tokenizer, [FRANCE]).attach(model, tokenizer):
            assert torch.allclose(model(**batch).logits, alone, atol=1e-5)
        assert torch.equal(model(**batch).logits, plain) and not torch.allclose(alone, plain, atol=1e-3)
    assert patch.report[FRANCE.id]["trained"] == read_artefact(Path(str(editor.config.artefact)))[0]["content"][:12]
    with pytest.raises(ConfigError, match="`errata train mend --model MODEL --data FILE`"):
        MEND(artefact=str(tmp_path / "none")).fit(model, tokenizer, [FRANCE])


def test_an_edit_on_top_of_others_is_fitted_with_them_merged(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As the benchmark makes a stream of it, an edit at a time; the weights are as they were."""
    model = tiny("llama", layers=4)
    editor = trained(model, tokenizer, tmp_path, rate=0.1)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    again = FRANCE.model_copy(update={"target_new": "Earth"})
    first = editor.fit(model, tokenizer, [FRANCE])
    both = editor.fit(model, tokenizer, [NEEDLE], onto=first)
    with merge(first, model, tokenizer):
        alone = editor.fit(model, tokenizer, [NEEDLE])
    n = len(first.parts)
    assert both.ids == (FRANCE.id, NEEDLE.id) and both.base == first.base and both.parts[:n] == first.parts
    stream, errors = follow(editor, model, tokenizer, [FRANCE, NEEDLE], 2)
    assert stream is not None and not errors
    for made, other, followed in zip(both.low_rank[n:], alone.low_rank, stream.low_rank[n:], strict=True):
        assert torch.equal(made.U, other.U) and torch.equal(made.V, other.V) and torch.equal(made.U, followed.U)
    from_base = editor.fit(model, tokenizer, [NEEDLE]).low_rank
    assert not all(torch.allclose(made.U, plain.U) for made, plain in zip(both.low_rank[n:], from_base, strict=True))
    whole = editor.fit(model, tokenizer, [again], onto=Patch.from_bytes(both.to_bytes()))
    assert whole.report[FRANCE.id]["overruled"] == [again.id] and whole.report[again.id]["contradicts"] == [FRANCE.id]
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters()) and hooks_of(model) == []
    with pytest.raises(RequestError, match="holds the edit .* already"):
        editor.fit(model, tokenizer, [FRANCE], onto=both)
    with pytest.raises(ConfigError, match="expected a mend patch of the same network .* found a grace patch"):
        editor.fit(model, tokenizer, [NEEDLE], onto=replace(first, method="grace"))


def test_a_patch_records_the_artefacts_configuration(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The options that made it, not those that the fit happened to be called with; where the artefact lay is left out."""
    model = tiny("gpt2", layers=4)
    path = MEND(**QUICK, layers=(0, 2), ending=".").train(model, tokenizer, ITEMS, tmp_path)
    patch = MEND(artefact=str(path)).fit(model, tokenizer, [FRANCE])
    assert {part.layer for part in patch.low_rank} == {0, 2}
    assert (patch.config["layers"], patch.config["ending"], patch.config["rank"]) == ([0, 2], ".", 8)
    assert patch.config["artefact"] is None
    _keep(patch, 0, 1, tmp_path / "partial")  # as an interrupted `errata fit` leaves it
    again = resumed(MEND(artefact=str(path)), model, tokenizer, [FRANCE, NEEDLE], 0, tmp_path / "partial")
    assert again is not None and again.ids == (FRANCE.id,)
    ke = KnowledgeEditor(steps=1, batch=2, held_out=2, hidden=8, loop=2)
    fitted = KnowledgeEditor(artefact=str(ke.train(model, tokenizer, ITEMS, tmp_path)), loop=1, gate="sum")
    config = fitted.fit(model, tokenizer, [FRANCE]).config
    assert (config["hidden"], config["gate"], config["loop"]) == (8, "mean", 1)  # the loop is the fit's


def test_an_artefact_is_of_the_maps_that_it_edits(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that differs in one of them alone is refused, in what is not edited served; an artefact of before, which names
    fewer weights, still loads, is still looked for where it was, and its training goes on."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    model, other, folder = tiny("gpt2"), tiny("gpt2"), tmp_path / "a"
    edited, left = "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.attn.c_attn.weight"
    editor = MEND(**QUICK, layers=(1,))
    path = editor.train(model, tokenizer, ITEMS, folder)
    header, tensors = read_artefact(path)
    assert set(header["base"]["weights"]) == {*base_of(model, tokenizer)["weights"], edited}
    with torch.no_grad():
        other.get_parameter(left).add_(1.0)
    assert MEND(artefact=str(path)).trained(other, tokenizer)[0].layers == (1,)
    with torch.no_grad():
        other.get_parameter(edited).add_(1.0)
    with pytest.raises(BaseMismatchError, match=f"weight {edited}"):
        MEND(artefact=str(path)).trained(other, tokenizer)
    with pytest.raises(ConfigError, match="of a training with another base"):
        editor.train(other, tokenizer, ITEMS, folder)
    before = tmp_path / "before.safetensors"
    for source, target in ((path, before), (folder / "mend.checkpoint", folder / "mend.checkpoint")):
        header, tensors = read_artefact(source)
        header["base"] = base_of(model, tokenizer)
        target.write_bytes(artefact_bytes(header, tensors))
    assert MEND(artefact=str(before)).fit(model, tokenizer, [FRANCE]).method == "mend"
    assert read_artefact(editor.train(model, tokenizer, ITEMS, folder))[0]["steps"] == 4
    text = json.dumps(base_of(model, tokenizer), sort_keys=True)
    folder = tmp_path / "cache" / "editors" / hashlib.sha256(text.encode()).hexdigest()[:12]
    assert editor.artefact_path(model, tokenizer) == folder / "mend.safetensors"


def test_edits_follow_one_another_in_the_weights(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With an earlier edit merged the artefact still serves, and the gradient is that of the merged weights."""
    model = tiny("gpt2")
    editor = trained(model, tokenizer, tmp_path, rate=0.05)
    first, alone = (editor.fit(model, tokenizer, [r]) for r in (FRANCE, NEEDLE))
    merged = merge(first, model, tokenizer)
    for fitting in (editor, MEND(editor.config)):
        after = fitting.fit(model, tokenizer, [NEEDLE])
        assert after.low_rank[0].U.shape == alone.low_rank[0].U.shape
        assert not torch.allclose(after.low_rank[0].U, alone.low_rank[0].U, atol=1e-4)
    merged.unmerge()
    assert editor.fit(model, tokenizer, [NEEDLE]) == alone


@pytest.mark.parametrize("family", [*ANSWERERS, *CLASSIFIERS])
def test_answerers_and_classifiers(family: str, closing_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The last blocks of both stacks; the published maps of T5; detaching is exact, a saved patch acts the same."""
    model, tok = tiny_other(family), closing_tokenizer
    labels = family in CLASSIFIERS
    items = as_claims(ITEMS) if labels else ITEMS
    editor = trained(model, tok, tmp_path, items, rate=0.02)
    maps = editor.maps(model, editor.config)
    if not labels:
        assert {m.layer for m in maps} == {"encoder.1", "encoder.2", 0, 1}
    if family == "t5":
        assert {m.site.rpartition(".")[2] for m in maps} == {"wi_0", "wo"}
    request = FRANCE.model_copy(update={"target_new": "SUPPORTS"}) if labels else FRANCE
    patch = editor.fit(model, tok, [request])
    patch.save(tmp_path / "patch.safetensors")
    asked = supervised(model, tok, [request.text], [request.target_new])
    with torch.no_grad():
        plain = logits_of(model, asked)
        with patch.attach(model, tok):
            acting = logits_of(model, asked)
        with errata.load_patch(tmp_path / "patch.safetensors").attach(model, tok):
            assert torch.equal(logits_of(model, asked), acting)
        assert torch.equal(logits_of(model, asked), plain) and not torch.equal(acting, plain)
    assert hooks_of(model) == []


def test_groups_of_rows_run_under_their_own_edit(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows in groups equal each edit written into a copy."""
    model = tiny("gpt2").double()
    maps = linear_maps(model, (-1,), "mlp", 0)
    assert [m.layer for m in maps] == [1, 1]
    asked = supervised(
        model, tokenizer, [FRANCE.text, NEEDLE.text, "Zürich lies in", "São Paulo lies in"], ["Tokyo"] * 4
    )
    config = MEND(rank=2, rate=0.1, normalise=False).config
    network = MEND(config).network(model, maps, config)
    pair = supervised(model, tokenizer, [FRANCE.text, NEEDLE.text], ["Tokyo", "Earth"])
    with torch.no_grad():
        updates = network(signals(model, maps, pair)[0])
        with edited(model, maps, updates):
            found = logits_of(model, asked)
        for i in (0, 1):
            copy = tiny("gpt2").double()
            for m, update in zip(maps, updates, strict=True):
                submodule(copy, m.path).weight += stored(copy, m, update.U[i] @ update.V[i].mT)
            assert torch.allclose(logits_of(copy, asked)[2 * i : 2 * i + 2], found[2 * i : 2 * i + 2], atol=1e-9)


def test_what_is_refused(tiny: Tiny) -> None:
    for wrong in (
        {"last": "relu"},
        {"sign": "up"},
        {"rank": 0},
        {"parameters": "all"},
        {"retain": 0},
        {"outer": "none"},
        {"rate": 0},
    ):
        with pytest.raises(ConfigError, match="expected"):
            MEND(**wrong)
    with pytest.raises(AnatomyError, match="expected a layer from -2 to 1"):
        linear_maps(tiny("gpt2"), (2,), "mlp", 0)
    with pytest.raises(AnatomyError, match="has one stack"):
        linear_maps(tiny("gpt2"), ("encoder.0",), "mlp", 0)
    bare = tiny("gpt2")
    for block in anatomy(bare).blocks:
        submodule(bare, block).mlp, submodule(bare, block).attn = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(AnatomyError):
        linear_maps(bare, "all", "weights", 0)


def test_a_short_training_on_atlas_edits_facts_that_it_has_not_seen(tmp_path: Path) -> None:
    """A dozen steps: most dev facts held out are rewritten, in another wording too, and other facts stay."""
    model, tokenizer = errata.load("atlas")
    items = training_items(load_world(), "atlas", 60, drawn=1, bare=False)
    options: dict[str, Any] = {"steps": 8, "batch": 3, "retain": 2, "every": 8, "held_out": 12}
    path = MEND.preset("atlas", **options).train(model, tokenizer, items, tmp_path)
    [figures] = read_artefact(path)[0]["curve"]
    assert figures["success"] >= 0.6 and figures["generalization"] >= 0.5 and figures["retain"] >= 0.8
    requests = counterfactual_requests(load_world(), 6, split="dev", seed=5)
    patch = MEND.preset("atlas", artefact=str(path)).fit(model, tokenizer, requests)
    said = []
    for request in requests:
        with patch.only(request.id).attach(model, tokenizer):
            said += greedy_answers(model, tokenizer, [request.text])
    right = [answer == request.target_new for answer, request in zip(said, requests, strict=True)]
    assert sum(right) >= 3 and right == [patch.report[r.id]["converged"] for r in requests]
    assert greedy_answers(model, tokenizer, [r.text for r in requests]) == [r.target_true for r in requests]
