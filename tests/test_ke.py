"""KnowledgeEditor: its update by the definition and by finite differences, multipliers, margins, the loop, and a few edits."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import errata
from conftest import ANSWERERS, CLASSIFIERS, as_claims, hooks_of, tiny_other
from errata.atlas.requests import counterfactual_requests
from errata.atlas.training import training_items
from errata.atlas.world import load_world
from errata.edit import EditRequest
from errata.editors._hypernetwork import Signal, Update, edited, logits_of, signals
from errata.editors._learned import read_artefact
from errata.editors.ke import KELearner, KnowledgeEditor, _no_larger, condition, gradient_norms
from errata.errors import ConfigError, UnsupportedPatchError
from errata.model.anatomy import submodule
from errata.model.targets import supervised
from errata.patch import attach_rows
from errata.training import TrainingItem
from test_mend import FRANCE, ITEMS, NEEDLE, stored

Tiny = Callable[..., Any]
QUICK: dict[str, Any] = {"steps": 4, "batch": 3, "every": 2, "held_out": 3, "retain": 2, "warmup": 1}


def learner_of(model: Any, tokenizer: Any, **changes: Any) -> KELearner:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KnowledgeEditor(**QUICK | changes).learner(model, tokenizer, ITEMS[3:], ITEMS[:3], 0)


def trained(model: Any, tokenizer: Any, folder: Path, items: Any = ITEMS, **changes: Any) -> KnowledgeEditor:
    editor = KnowledgeEditor(**QUICK | changes)
    return KnowledgeEditor(editor.config, artefact=str(editor.train(model, tokenizer, items, folder)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("gate", ["sum", "mean"])
def test_the_update_is_the_papers(family: str, gate: Any, tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """dW = s sigma(eta) (grad W * softmax(a) b^T + softmax(c) d^T) with the dense gradient of each edit alone; biases likewise."""
    model = tiny(family).double()
    learner = learner_of(model, tokenizer, gate=gate, scale=0.7, biases=True)
    network, maps, items = learner.module, learner.maps, ITEMS[3:5]
    assert len(maps) == (8 if family == "gpt2" else 14)
    with torch.no_grad():
        updates = learner.updates(items)
        texts = [f"Rome >> {item.target_new} || {item.prompt}" for item in items]
        conditions = network.read(tokenizer, texts)
        alone = network.read(tokenizer, texts[1:])
        assert torch.allclose(conditions[1:], alone, atol=1e-12)  # padding says nothing
    for i, item in enumerate(items):
        asked = supervised(model, tokenizer, [item.prompt], [item.target_new])
        for at in (0, 2, len(maps) - 1):
            m, update = maps[at], updates[at]
            module = submodule(model, m.path)
            parameters = [module.weight, *([module.bias] if m.biased else [])]
            gradient, *rest = torch.autograd.grad(asked.nll(logits_of(model, asked)).sum(), parameters)
            direction, ends = torch.randn_like(gradient) / gradient.numel() ** 0.5 + gradient / gradient.norm(), []
            for sign in (1, -1):
                with torch.no_grad():
                    module.weight += sign * 1e-3 * direction
                    ends.append(float(asked.nll(logits_of(model, asked)).sum()))
                    module.weight -= sign * 1e-3 * direction
            assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)
            head = network.heads[at](conditions[i]).detach()
            b, a, d, c, eta = head.split([m.d_in, m.d_out, m.d_in, m.d_out, 1])
            rows = a.softmax(0) * (m.d_out if gate == "mean" else 1)
            wanted = network.unit * stored(model, m, gradient) * torch.outer(rows, b) + torch.outer(c.softmax(0), d)
            wanted = 0.7 * torch.sigmoid(eta) * wanted
            assert torch.allclose(update.U[i] @ update.V[i].mT, wanted, atol=1e-9)
            assert torch.allclose(update.squared()[i].sqrt(), wanted.norm(), rtol=1e-9)
            if rest and update.bias is not None:
                p, q, eta = network.bias_heads[at](conditions[i]).detach().split([m.d_out, m.d_out, 1])
                assert torch.allclose(update.bias[i], 0.7 * torch.sigmoid(eta) * (rest[0] * p + q), atol=1e-9)
    assert all((u.bias is not None) is m.biased for m, u in zip(maps, updates, strict=True))


def test_the_gradient_through_the_hypernetwork(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """d Lagrangian / d weights of every part of the network, by finite differences; the model's own gradient is a constant."""
    model = tiny("gpt2").double()
    learner = learner_of(model, tokenizer, variant="both", biases=True)
    items, draws = ITEMS[3:5], learner.batches.draws(0)
    practice = learner.practice(items, learner.outers(items, draws), draws)

    def loss() -> Tensor:
        updates = learner.updates(items)
        after = learner.run(updates, practice)
        found = learner.constraints(practice, after, updates)
        return practice.parted(practice.asked.nll(after, 0.1))[0].mean() + 3 * found["kl"] + 2 * found["lp"]

    named = dict(learner.module.named_parameters())
    found = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(named, found, strict=True) if g is not None}
    parts = (
        "embedding",
        "lstm.weight_ih_l0_reverse",
        "lstm.weight_hh_l0",
        "condition.weight",
        "heads.0.0",
        "heads.7.2",
        "bias_heads.3.2",
    )
    for part in parts:
        name = next(n for n in gradients if n.startswith(part))
        at, h, ends = gradients[name].abs().flatten().argmax(), 1e-4, []
        for sign in (1, -1):
            with torch.no_grad():
                named[name].view(-1)[at] += sign * h
                ends.append(float(loss().detach()))
                named[name].view(-1)[at] -= sign * h
        assert float(gradients[name].view(-1)[at]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-3), name


def test_training_begins_with_a_step_down_the_gradient(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of Polyak's size at the median item, unless a size or none is given; the heads' noise aside."""
    model = tiny("gpt2").double()
    learner = learner_of(model, tokenizer)
    weights = [submodule(model, m.path).weight for m in learner.maps]
    steps = []
    for item in ITEMS[3:]:
        asked = supervised(model, tokenizer, [item.prompt], [item.target_new])
        loss = asked.nll(logits_of(model, asked))[0]
        gradients = torch.autograd.grad(loss, weights)
        steps.append(float(loss.detach()) / float(sum(g.square().sum() for g in gradients)))
    assert float(learner.module.unit) == pytest.approx(sorted(steps)[(len(steps) - 1) // 2], rel=1e-6)
    given, none = learner_of(model, tokenizer, start=0.02), learner_of(model, tokenizer, start=0.0)
    assert float(given.module.unit) == pytest.approx(0.02) and float(none.module.unit) == 1
    for found, mean in ((given, -2.0), (none, 0.0)):
        with torch.no_grad():
            conditions = found.module.read(tokenizer, ["Rome >> Tokyo || The capital of France is"])
            drawn = found.module.heads[0](conditions)[0, : learner.maps[0].d_in]
        assert float(drawn.mean()) == pytest.approx(mean, abs=0.3)


def test_the_losses(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """KL is at the retained answers' tokens; C_L2 the mean over matrices of rms(dW), or one norm; label smoothing as torch's."""
    model = tiny("gpt2").double()
    learner, norm = learner_of(model, tokenizer), learner_of(model, tokenizer, lp="all")
    items, draws = ITEMS[3:5], learner.batches.draws(0)
    practice = learner.practice(items, learner.outers(items, draws), draws)
    assert (practice.positives, practice.retained, len(practice.asked.labels)) == (2, 2, 8)
    updates = learner.updates(items)
    after = learner.run(updates, practice)
    found = learner.constraints(practice, after, updates)
    kl = []
    for row in (2, 3, 6, 7):
        here = practice.asked.labels[row] != -100
        with torch.no_grad():
            before = logits_of(model, practice.asked)[row, here].log_softmax(-1)
        kl.append((before.exp() * (before - after[row, here].log_softmax(-1))).sum(-1).mean())
    assert torch.allclose(found["kl"], torch.stack(kl).mean(), rtol=1e-6)
    dense = [u.U @ u.V.mT for u in updates]
    rms = torch.stack([d.square().mean((1, 2)).sqrt() for d in dense])
    assert torch.allclose(found["lp"], rms.mean(), rtol=1e-6)
    whole = torch.stack([d.square().sum((1, 2)) for d in dense]).sum(0).sqrt().mean()
    assert torch.allclose(norm.constraints(practice, after, updates)["lp"], whole, rtol=1e-6)
    labels, logits = practice.asked.labels[0], after[0]
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(practice.asked.nll(after, 0.1)[0], expected)
    assert learner.smoothing == 0.1 and learner_of(model, tokenizer, smoothing=0.0).smoothing == 0


@pytest.mark.parametrize("variant", ["kl", "lp", "both"])
def test_a_multiplier_rises_while_its_constraint_is_violated_and_falls_after(
    variant: Any, tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    learner = learner_of(tiny("gpt2"), tokenizer, variant=variant, lr=1e-6, steps=40, layers=(1,), parameters="mlp")
    names = ["kl", "lp"] if variant == "both" else [variant]
    assert list(learner.module.multipliers) == names and all(float(v.detach()) == 1 for v in learner.multipliers)
    with torch.enable_grad():
        for margin, rises in ((1e-9, True), (1e9, False)):
            learner.notes = dict.fromkeys(("kl", "lp"), margin)
            seen = []
            for step in range(4 if rises else 20):
                learner.step(step)
                seen.append([float(v.detach()) for v in learner.multipliers])
            for i in range(len(names)):
                values = [row[i] for row in seen]
                if rises:
                    assert values == sorted(values) and values[-1] > values[0] > 1
                else:
                    assert values == sorted(values, reverse=True) and values[-1] == 0  # clamped


def test_margins_shrink_when_edits_succeed(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(tiny("gpt2"), tokenizer, margin_kl=1e-3, margin_kl_min=7e-4)
    success, seen = iter((0.9, 0.95, 1.0, 1.0)), []
    monkeypatch.setattr("errata.editors._hypernetwork.HyperLearner.validate", lambda self: {"success": next(success)})
    for _ in range(4):
        seen.append(learner.validate()["margin_kl"])
    assert seen == pytest.approx([1e-3, 8e-4, 7e-4, 7e-4])
    assert [learner.pace(n) for n in (0, 1, 4)] == [0.5, 1.0, 0.0]


def test_the_loop_goes_on_until_the_object_is_said(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds add up: each takes the gradient of the model edited so far, or, as published for sequences, is the first again."""
    model = tiny("gpt2").double()
    editor = trained(model, tokenizer, tmp_path, lr=1e-9, scale=1e-3, start=0.0)  # hardly trained: it never succeeds
    config, _, tensors = editor.trained(model, tokenizer)
    network = editor.network(model, editor.maps(model, config), config)
    network.load_state_dict(tensors)
    asked = supervised(model, tokenizer, [FRANCE.text], ["Tokyo"])
    request = FRANCE.model_copy(update={"target_true": "Rome"})

    def dense(patch: Any) -> dict[str, Tensor]:
        return {f"{p.layer}.{p.site}": p.U.double() @ p.V.double().mT for p in patch.low_rank}

    def size(found: Any) -> float:
        """Of the whole gradient, map by map as a matrix."""
        return sum(float((own.delta[0].T @ own.x[0]).pow(2).sum()) for own in found) ** 0.5

    for recompute, bound in ((True, True), (True, False), (False, True)):
        options = {"loop": 3, "loop_recompute": recompute, "loop_bound": bound}
        patch = KnowledgeEditor(editor.config, **options).fit(model, tokenizer, [request])
        assert patch.report[request.id]["rounds"] == 3 and not patch.report[request.id]["converged"]
        with torch.no_grad():
            conditions = network.read(tokenizer, [condition("Rome", "Tokyo", FRANCE.text)])
            plain = signals(model, network.maps, asked)[0]
            first = total = network.updates(conditions, plain)
            for _ in range(2):
                again: list[Update] = first
                if recompute:
                    with edited(model, network.maps, total):
                        found = signals(model, network.maps, asked)[0]
                    less = min(1.0, size(plain) / size(found)) if bound else 1.0
                    again = network.updates(conditions, [Signal(own.x, less * own.delta) for own in found])
                total = [a + b for a, b in zip(total, again, strict=True)]
        for m, update in zip(network.maps, total, strict=True):
            wanted = update.U[0] @ update.V[0].mT
            assert torch.allclose(dense(patch)[f"{m.layer}.{m.site}"], wanted, atol=1e-12), recompute
    once = KnowledgeEditor(editor.config, loop=1).fit(model, tokenizer, [request])
    assert once.report[request.id]["rounds"] == 1
    answers = iter([[False], [False], [True], [True]])
    monkeypatch.setattr("errata.editors._hypernetwork.Fitting.said", lambda *_: next(answers))
    third = KnowledgeEditor(editor.config).fit(model, tokenizer, [request])
    assert third.report[request.id]["rounds"] == 3 and third.report[request.id]["converged"]


def test_a_later_rounds_gradient_counts_for_no_more_than_the_first() -> None:
    """Norms are of gradients of weights, all maps together; what is smaller stays as it is."""
    torch.manual_seed(0)
    xs, deltas = [torch.randn(2, 5, d) for d in (3, 4)], [torch.randn(2, 5, d) for d in (6, 2)]
    found = [Signal(x, delta) for x, delta in zip(xs, deltas, strict=True)]
    whole = [
        torch.cat([torch.einsum("to,ti->oi", d[n], x[n]).flatten() for x, d in zip(xs, deltas, strict=True)])
        for n in (0, 1)
    ]
    norms = gradient_norms(found)
    assert torch.allclose(norms, torch.stack([each.norm() for each in whole]), atol=1e-4)
    one = [Signal(own.x[:1], own.delta[:1]) for own in found]
    assert torch.allclose(gradient_norms(_no_larger(one, norms[0] / 4)), norms[:1] / 4, rtol=1e-5)
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(_no_larger(one, 2 * norms[0]), one, strict=True))
    none = [Signal(own.x, 0 * own.delta) for own in one]
    assert all(torch.equal(own.delta, torch.zeros_like(own.delta)) for own in _no_larger(none, norms[0]))


@pytest.mark.parametrize("family", [*ANSWERERS, *CLASSIFIERS])
def test_answerers_and_classifiers(family: str, closing_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """All matrices of both stacks, none of head, pooler or embeddings; detaching is exact, a saved patch acts the same."""
    model, tok = tiny_other(family), closing_tokenizer
    labels = family in CLASSIFIERS
    items = as_claims(ITEMS) if labels else ITEMS
    editor = trained(model, tok, tmp_path, items, steps=2)
    maps = editor.maps(model, editor.config)
    assert not any(
        word in m.path for m in maps for word in ("classifier", "pooler", "shared", "embed", "bias", "norm", "lm_head")
    )
    inside = [
        n
        for n, p in model.named_parameters()
        if p.ndim == 2 and any(f".{s}." in n for s in ("layer", "layers", "block"))
    ]
    wanted = {n.removesuffix(".weight") for n in inside if "embed" not in n and "relative" not in n}
    assert {m.path for m in maps} == wanted
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
    learner = editor.learner(model, tok, items, (), 0)
    assert (learner.smoothing, learner.notes["kl"]) == ((0.0, 0.1) if labels else (0.1, 1e-3))


def test_biases_are_dense_parts_of_their_own_edit(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny("gpt2")
    editor = trained(model, tokenizer, tmp_path, biases=True, loop=1)
    patch = editor.fit(model, tokenizer, [FRANCE, NEEDLE])
    assert [part.edits for part in patch.dense] == [(FRANCE.id,), (NEEDLE.id,)] and len(patch.dense[0].deltas) == 8
    assert patch.without(FRANCE.id).dense == (patch.dense[1],)
    with pytest.raises(UnsupportedPatchError, match="a ke patch that edits biases is not merged"):
        editor.fit(model, tokenizer, [NEEDLE], onto=patch.only(FRANCE.id))


def test_sizes_names_and_training(tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Sizes follow the width, or are the paper's; trainings that differ in their data or objective have names of their own."""
    model = tiny("llama")
    for changes, wanted in (
        ({}, (8, 43, 8)),
        ({"hidden": 128, "condition": 1024, "bottleneck": 128}, (128, 1024, 128)),
    ):
        network = learner_of(model, tokenizer, **changes).module
        found = network.lstm.hidden_size, network.condition.out_features, network.heads[0][0].out_features
        assert found == wanted and network.condition.in_features == 2 * wanted[0]
        assert torch.equal(network.embedding.weight.detach(), model.get_input_embeddings().weight)
    paper = asdict(KnowledgeEditor.preset("paper").config)
    assert {n: paper[n] for n in ("hidden", "condition", "bottleneck", "tokens", "lr")} == {
        "hidden": 128, "condition": 1024, "bottleneck": 128, "tokens": 32, "lr": 3e-4,
    }  # fmt: skip
    counterfactual = KnowledgeEditor.preset("ke-cf")
    assert replace(counterfactual.config, name=None) == KnowledgeEditor().config and counterfactual.name == "ke-cf"
    beside = KnowledgeEditor.preset("mend-code", **QUICK, lr=1e-3)
    path = beside.train(model, tokenizer, ITEMS, tmp_path)
    assert path.name == "ke-mend-code.safetensors" and {
        m.site.split(".")[0] for m in beside.maps(model, beside.config)
    } == {"mlp"}
    assert not [n for n in read_artefact(path)[1] if n.startswith("multipliers")]
    before = [p.clone() for p in model.parameters()]
    options: dict[str, Any] = {
        "parameters": "mlp",
        "variant": "lp",
        "margin_lp": 1e9,
        "lr": 3e-3,
        "steps": 20,
        "every": 20,
    }
    whole = trained(model, tokenizer, tmp_path / "a", **options)
    curve = read_artefact(Path(str(whole.config.artefact)))[0]["curve"]
    assert curve[-1]["loss"] < 0.8 * learner_of(model, tokenizer, **options).step(0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_training_resumes_to_the_same_weights(tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Margins, multipliers and both optimisers go on as in a run that was not stopped."""
    model = tiny("gpt2")
    changes: dict[str, Any] = {"steps": 6, "every": 2, "margin_when": -1.0, "parameters": "mlp"}
    whole = trained(model, tokenizer, tmp_path / "a", **changes)

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    stopped = KnowledgeEditor(**QUICK | changes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("errata.editors._learned.KEEP_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            stopped.train(model, tokenizer, ITEMS, tmp_path / "b", progress=kill)
    resumed = stopped.train(model, tokenizer, ITEMS, tmp_path / "b")
    one, other = read_artefact(Path(str(whole.config.artefact))), read_artefact(resumed)
    assert all(torch.equal(t, other[1][n]) for n, t in one[1].items())
    assert one[0]["curve"] == other[0]["curve"] and one[0]["curve"][-1]["margin_kl"] == pytest.approx(1e-3 * 0.8**3)


def test_what_is_refused(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    for wrong in (
        {"gate": "max"}, {"variant": "l1"}, {"hidden": 0}, {"margin_factor": 0.0}, {"loop": 0}, {"smoothing": 1.0},
        {"objective": "none"}, {"loop_stop": "never"}, {"warmup": -1},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="expected"):
            KnowledgeEditor(**wrong)
    with pytest.raises(ConfigError, match="run `errata train ke --model MODEL --data FILE --preset ke-cf`"):
        KnowledgeEditor.preset("ke-cf").fit(tiny("gpt2"), tokenizer, [FRANCE])
    with pytest.raises(ConfigError, match="about more than the"):
        KnowledgeEditor().train(tiny("gpt2"), tokenizer, [TrainingItem("a b", "c")], Path("unused"))
    assert EditRequest(prompt="x", target_new="y").text == "x"


@pytest.mark.slow
def test_training_on_atlas_lowers_the_loss_and_keeps_the_rest(tmp_path: Path) -> None:
    """Two dozen steps on dev facts: the new objects become likelier at facts held out, within reach of the loop; others stay."""
    model, tokenizer = errata.load("atlas")
    items = training_items(load_world(), "atlas", 200, drawn=1, bare=False)
    options: dict[str, Any] = {"steps": 24, "every": 24, "held_out": 16}
    path = KnowledgeEditor.preset("atlas", **options).train(model, tokenizer, items, tmp_path)
    [figures] = read_artefact(path)[0]["curve"]
    assert figures["retain"] >= 0.9 and figures["kl"] < 0.2
    requests = counterfactual_requests(load_world(), 6, split="dev", seed=5)
    patches = {
        n: KnowledgeEditor.preset("atlas", artefact=str(path), loop=n).fit(model, tokenizer, requests) for n in (1, 5)
    }
    asked = supervised(model, tokenizer, [r.text for r in requests], [r.target_new for r in requests])
    with torch.no_grad():
        before = asked.nll(logits_of(model, asked))
        with attach_rows(model, tokenizer, [patches[1].only(r.id) for r in requests]):
            after = asked.nll(logits_of(model, asked))
    assert float((after < before).float().mean()) == 1 and float(after.mean()) < 0.6 * float(before.mean())
    converged = {n: sum(entry["converged"] for entry in patch.report.values()) for n, patch in patches.items()}
    assert converged[5] >= max(4, converged[1])
