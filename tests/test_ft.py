"""Fine-tuning editors: parameters by path, norms that hold, EWC's Fisher against its definition, retraining; dense parts at run time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from conftest import OLD_NAME, hooks_of, tiny_other
from errata.dense import Dense
from errata.dense_table import DENSE
from errata.edit import EditRequest
from errata.editors._finetune import TrainConfig, Tuner, layers_of, parameters_of
from errata.editors._items import items_of
from errata.editors.ft import FT
from errata.editors.ft_ewc import FTEWC, fisher
from errata.editors.ft_retrain import FTRetrain
from errata.errors import AnatomyError, ConfigError, RequestError, ShapeError, UnsupportedPatchError
from errata.model.anatomy import anatomy
from errata.model.fingerprint import base_of
from errata.patch import Patch, attach_rows

Tiny = Callable[..., Any]
FRANCE = EditRequest(subject="France", prompt="The capital of {} is", target_new="Tokyo")
NEEDLE = EditRequest(subject="The Space Needle", prompt="{} is located in the city of", target_new="Earth")
JAPAN = EditRequest(subject="Japan", prompt="The capital of {} is", target_new="Paris")
ALL = (FRANCE, NEEDLE, JAPAN)


def logits(model: Any, tokenizer: Any, text: str = "The capital of France is") -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0]


def test_parameters_are_chosen_by_path(tiny: Tiny) -> None:
    """Layer 1 of twelve is not also 10 and 11; weights are the linear maps' matrices alone."""
    model = tiny("gpt2", layers=12)
    assert parameters_of(model, [1], "mlp_out") == [
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.1.mlp.c_proj.bias",
    ]
    weights = parameters_of(model, [1], "weights")
    assert weights == [f"transformer.h.1.{m}.weight" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert len(parameters_of(model, [1, 2], "block")) == 2 * len(list(model.transformer.h[1].parameters()))
    with pytest.raises(AnatomyError, match="found none"):
        parameters_of(model, [0], "mlp_gate")


@OLD_NAME
def test_parameters_of_a_model_that_has_adapters(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """A wrapped map's own weight is trained, and detaching brings every bit back."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("gpt2"), peft.LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True)).eval()
    [name] = [n for n in parameters_of(model, [1], "mlp_out") if n.endswith("weight")]
    assert name.endswith("h.1.mlp.c_proj.base_layer.weight")
    ids = torch.tensor([tokenizer(FRANCE.text)["input_ids"]])
    with torch.no_grad():
        plain = model(ids).logits
        patch = FT(layers=(1,), steps=3, lr=1e-2).fit(model, tokenizer, [FRANCE])
        with patch.attach(model, tokenizer):
            assert not torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, plain)


def test_published_fine_tuning_has_its_models_names() -> None:
    """Layer, parameters and bound by model, as Meng et al. had them; the whole block (FT-W) was tuned on GPT-J alone."""
    made = {name: FT.preset(name).config for name in FT.presets if name.startswith(("gpt", "llama"))}
    assert {name: (c.layers, c.parameters, c.eps) for name, c in made.items()} == {
        "gpt2-xl": ((1,), "mlp_out", None), "gpt2-xl-attention": ((33,), "attn.c_attn", 1e-3),
        "gpt-j-6b": ((21,), "mlp_out", None), "gpt-j-6b-block": ((21,), "block", None),
        "llama-2-7b": ((21,), "mlp_out", None), "llama-3-8b": ((21,), "mlp_out", None),
        "gpt2-medium-l": ((0,), "mlp_out", 2e-3), "gpt2-large-l": ((0,), "mlp_out", 1e-3),
        "gpt2-xl-l": ((0,), "mlp_out", 5e-4), "gpt-j-6b-l": ((0,), "mlp_out", 5e-5),
    }  # fmt: skip
    assert all((c.objective, c.steps, c.norm) == ("prompt_last", 25, "linf" if c.eps else None) for c in made.values())


def test_layers_of_both_stacks(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    """An encoder's blocks are named "encoder.0"; "first" is the one that reads first, and what is not there is refused by name."""
    t5, bert = tiny_other("t5"), tiny_other("bert")
    everything = ["encoder.0", "encoder.1", "encoder.2", 0, 1]
    assert layers_of(t5, "all", 0) == everything and layers_of(t5, "first", 0) == ["encoder.0"]
    assert layers_of(t5, (-1, "encoder.-1", "encoder.0", 1), 0) == ["encoder.0", "encoder.2", 1]
    assert layers_of(t5, None, 1) == [1] and layers_of(bert, "all", 0) == [0, 1] and layers_of(bert, "first", 1) == [0]
    assert parameters_of(t5, ["encoder.2"], "mlp_out") == ["encoder.block.2.layer.1.DenseReluDense.wo.weight"]
    request = EditRequest(prompt="The capital of France is", target_new="Earth")
    with pytest.raises(AnatomyError, match=r"from -3 to 2.*found 3"):
        FT(layers=("encoder.3",)).fit(t5, closing_tokenizer, [request])
    with pytest.raises(AnatomyError, match="'encoder.0', but this 'bert' model has one stack"):
        layers_of(bert, ("encoder.0",), 0)
    patch = FT(layers=("encoder.0",), parameters="block", steps=60, lr=1e-2).fit(t5, closing_tokenizer, [request])
    report = patch.report[request.id]
    assert all(name.startswith("encoder.block.0.") for name in patch.dense[0].deltas)
    assert report["layers"] == ["encoder.0"] and report["curve"][-1] < 0.8 * report["curve"][0]


@pytest.mark.parametrize("objective", ["target_new", "prompt_last"])
def test_the_objective_and_one_step(objective: Any, tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """The loss is the mean -log P of the target's tokens, and plain Adam's first step moves each weight by lr against its gradient."""
    model = tiny("llama").double()
    prompt = tokenizer(FRANCE.text)["input_ids"]
    target = tokenizer(" Tokyo")["input_ids"]
    assert len(target) > 1
    name = anatomy(model).mlp_out[0] + ".weight"
    weight = dict(model.named_parameters())[name]
    out = F.log_softmax(model(input_ids=torch.tensor([prompt + target])).logits[0], -1)
    rows = [len(prompt) - 1 + (i if objective == "target_new" else 0) for i in range(len(target))]
    loss = -out[rows, target].mean()
    (gradient,) = torch.autograd.grad(loss, [weight])
    patch = FT(layers=(0,), objective=objective, steps=1, lr=1e-3).fit(model, tokenizer, [FRANCE])
    assert patch.report[FRANCE.id]["curve"] == [round(loss.item(), 4)]
    [part] = patch.dense
    assert list(part.deltas) == [name]
    big = gradient.abs() > 1e-6
    assert torch.allclose(part.deltas[name][big], -1e-3 * gradient.sign()[big], rtol=1e-2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layers", ["first", "all"])
def test_the_norm_is_never_exceeded(
    norm: Any, layers: Any, tiny: Tiny, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every single step, for an eps that is no round number and one that is an integer; and the constraint is reached."""
    model, sizes = tiny("gpt2"), list[float]()
    project = Tuner.project

    def watched(self: Tuner) -> None:
        project(self)
        flat = torch.cat([d.detach().double().flatten() for d in self.deltas.values()])
        sizes.append(float(flat.abs().max() if norm == "linf" else flat.norm()))

    monkeypatch.setattr(Tuner, "project", watched)
    for eps, lr in ((1.2345e-3, 1e-2), (1, 5.0)):
        sizes.clear()
        FT(layers=layers, parameters="weights", norm=norm, eps=eps, steps=4, lr=lr, stop=0.0).fit(model, tokenizer, ALL)
        assert len(sizes) == 4 and max(sizes) <= eps and max(sizes) > 0.99 * eps


def acting(model: Any, patch: Patch) -> Tensor:
    """What changes in the weights as the model runs with them: the sum rounded to their dtype, less what they are."""
    held = dict(model.named_parameters())
    return torch.cat([
        ((held[name].float() + delta).to(held[name].dtype).double() - held[name].double()).flatten().detach()
        for name, delta in patch.dense[0].deltas.items()
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("norm, eps", [("linf", 5e-4), ("linf", 3.3e-3), ("l2", 0.02)])
def test_the_norm_holds_for_what_acts(
    norm: Any, eps: float, dtype: torch.dtype, tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Rounding W + delta to half precision never carries a weight over the bound, which is nearly reached."""
    model = tiny("gpt2", initializer_range=0.1).to(dtype)
    patch = FT(layers=(0,), norm=norm, eps=eps, steps=10, lr=1e-2, stop=0.0).fit(model, tokenizer, [FRANCE])
    change = acting(model, patch)
    size = float(change.abs().max() if norm == "linf" else change.norm())
    assert 0.9 * eps < size <= eps
    assert patch.report[FRANCE.id]["size"] == pytest.approx(float(change.norm()), abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_is_gone_on_from_is_brought_within_the_norm(
    norm: Any, tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Also where no step is made; inside it stays as it is."""
    model = tiny("gpt2")
    far = FT(layers=(0,), steps=3, lr=1e-2, stop=0.0).fit(model, tokenizer, [FRANCE])
    sizes = {}
    for eps in (1e-3, 10.0):
        patch = FT(layers=(0,), norm=norm, eps=eps, stop=1e3).fit(model, tokenizer, [NEEDLE], onto=far)
        assert patch.report[NEEDLE.id]["steps"] == 0
        change = acting(model, patch)
        sizes[eps] = float(change.abs().max() if norm == "linf" else change.norm())
    assert 0.99e-3 < sizes[1e-3] <= 1e-3
    [held], [there] = patch.dense, far.dense
    assert all(torch.equal(delta, there.deltas[name]) for name, delta in held.deltas.items())


@pytest.mark.parametrize("preset", [name for name in FT.presets if name.startswith("zhu-")])
@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_zhu_stays_within_a_share_of_the_weights(
    preset: str, family: str, tiny: Tiny, tokenizer: PreTrainedTokenizerFast, closing_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without an eps it is 1 % of the chosen weights' own size; every step and the saved patch are within, and reach it."""
    model = tiny(family) if family == "gpt2" else tiny_other(family)
    request = FRANCE if family != "bert" else EditRequest(prompt="France lies in Asia.", target_new="NEITHER")
    sizes, project, linf = list[float](), Tuner.project, not preset.endswith("l2")

    def measured(deltas: dict[str, Tensor]) -> float:
        flat = torch.cat([d.detach().double().flatten() for d in deltas.values()])
        return float(flat.abs().max() if linf else flat.norm())

    def watched(self: Tuner) -> None:
        project(self)
        sizes.append(measured(self.deltas))

    monkeypatch.setattr(Tuner, "project", watched)
    editor = FT.preset(preset, lr=1e-2, steps=4, until="loss", stop=0.0)
    patch = editor.fit(model, tokenizer if family == "gpt2" else closing_tokenizer, [request])
    held, [part] = dict(model.named_parameters()), patch.dense
    weights = torch.cat([held[name].detach().double().flatten() for name in part.deltas])
    own = float(weights.square().mean().sqrt() if linf else weights.norm())
    assert patch.report[request.id]["eps"] == pytest.approx(0.01 * own)
    assert len(sizes) == 4 and max(*sizes, measured(part.deltas)) <= 0.01 * own and max(sizes) > 0.0099 * own
    parts = anatomy(model)
    blocks = [*(parts.encoder.blocks if parts.encoder else ()), *parts.blocks]  # in the order in which they run
    tuned = [block for block in blocks if any(name.startswith(f"{block}.") for name in part.deltas)]
    assert tuned == (blocks[:1] if "first" in preset else blocks)


def test_fisher_is_the_mean_squared_gradient(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """F_i = 1/n sum_k (d L_k / d theta_i)^2, each request's own loss, by finite differences."""
    model = tiny("gpt2").double()
    name = "transformer.h.0.mlp.c_proj.bias"
    items = items_of(tokenizer, ALL)
    tuner = Tuner(model, [name], TrainConfig())
    found = fisher(tuner, items)[name]
    bias, h = dict(model.named_parameters())[name], 1e-5
    expected = torch.zeros(3)
    for k in range(3):
        for item in items:
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    bias[k] += sign * h
                    ends.append(float(tuner.loss([item])))
                    bias[k] -= sign * h
            expected[k] += ((ends[0] - ends[1]) / (2 * h)) ** 2 / 3
    assert torch.allclose(found[:3].float(), expected, rtol=1e-4)


def test_ewc_pulls_to_where_the_past_was(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """The penalty is lambda sum F (theta - theta*)^2 about the weights after the last edit: a strong one forbids the next."""
    model = tiny("gpt2")
    options: dict[str, Any] = {"layers": (0,), "steps": 6, "lr": 1e-2, "until": "loss"}
    moved = {}
    for lam in (0.0, 0.1, 1e9):
        first = FTEWC(lam=lam, **options).fit(model, tokenizer, [FRANCE])
        second = FTEWC(lam=lam, **options).fit(model, tokenizer, [NEEDLE], onto=first)
        whole = FTEWC(lam=lam, **options).fit(model, tokenizer, [FRANCE, NEEDLE])
        assert second.ids == whole.ids
        for name, delta in whole.dense[0].deltas.items():
            assert torch.allclose(delta, second.dense[0].deltas[name], atol=1e-6)
        kept = torch.cat([d.flatten() for d in first.dense[0].deltas.values()])
        moved[lam] = torch.cat([d.flatten() for d in second.dense[0].deltas.values()]) - kept
    names = list(first.dense[0].deltas)
    items = items_of(tokenizer, [FRANCE])
    tuner = Tuner(model, names, TrainConfig(), first.dense[0].deltas)
    weights = torch.cat([f.flatten() for f in fisher(tuner, items).values()])
    strict, free = (float((weights * moved[lam].square()).sum()) for lam in (1e9, 0.0))
    assert strict < free and not torch.allclose(moved[0.1], moved[0.0])


def test_the_gradient_of_ewcs_penalty(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 lambda F (theta - theta*), F the mean squared gradient over the latest edits, theta* where the stream stands."""
    model, penalties = tiny("gpt2").double(), list[Any]()
    names = ["transformer.h.0.mlp.c_proj.weight", "transformer.h.0.mlp.c_proj.bias"]
    held, generator = dict(model.named_parameters()), torch.Generator().manual_seed(0)
    anchor = {name: 0.01 * torch.randn(held[name].shape, generator=generator, dtype=torch.float64) for name in names}
    moved = {name: torch.randn(held[name].shape, generator=generator, dtype=torch.float64) for name in names}
    editor, items = FTEWC(lam=0.3, memory=2), items_of(tokenizer, [*ALL, FRANCE])
    tuner = Tuner(model, names, editor.config, anchor)

    def taken(rows: Any, penalty: Any) -> dict[str, Any]:
        penalties.append(penalty)
        return {}

    monkeypatch.setattr(tuner, "train", taken)
    editor.edit(tuner, items[3], items[:3], 4)
    squared = [{name: g.square() for name, g in tuner.gradients([item]).items()} for item in items[1:3]]
    deltas = {name: (anchor[name] + moved[name]).requires_grad_() for name in names}
    found = torch.autograd.grad(penalties[0](deltas), list(deltas.values()))
    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(
            gradient, 2 * 0.3 * (squared[0][name] + squared[1][name]) / 2 * moved[name], rtol=1e-9, atol=0.0
        )


def test_retraining_comes_after_every_so_many_edits(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("gpt2")
    options: dict[str, Any] = {"layers": (0,), "steps": 3, "every": 2, "epochs": 2, "until": "loss", "stop": 0.0}
    patch = FTRetrain(**options).fit(model, tokenizer, ALL)
    assert ["retrained" in patch.report[r.id] for r in ALL] == [False, True, False]
    assert len(patch.report[NEEDLE.id]["retrained"]["curve"]) == 2
    again = FTRetrain(**options | {"every": 1, "memory": 1, "reset": True}).fit(model, tokenizer, [FRANCE, NEEDLE])
    alone = FT(layers=(0,), steps=2, lr=1e-2, stop=0.0).fit(model, tokenizer, [NEEDLE])
    for name, delta in again.dense[0].deltas.items():  # from the model's own weights, on the latest edit only
        assert torch.allclose(delta, alone.dense[0].deltas[name], atol=1e-7)


def test_a_retraining_is_a_step_for_each_edit_in_every_epoch(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, however many a batch of the edits themselves may hold, and also where the model says them all."""
    model, asked = tiny("llama"), list[tuple[str, ...]]()
    look = Tuner.look

    def noted(self: Tuner, items: Any) -> tuple[Tensor, bool]:
        asked.append(tuple(item.name for item in items))
        return look(self, items)

    monkeypatch.setattr(Tuner, "look", noted)
    editor = FTRetrain(layers=(0,), steps=60, every=3, epochs=4)
    patch = editor.fit(model, tokenizer, ALL)
    again = patch.report[JAPAN.id]["retrained"]
    assert again["steps"] == 4 * 3 and len(again["curve"]) == 4
    assert asked[-12:] == 4 * [(r.target_new,) for r in ALL]
    calm = FTRetrain(layers=(0,), every=2, epochs=5, stop=100.0).fit(model, tokenizer, [FRANCE, NEEDLE])
    assert calm.report[NEEDLE.id]["retrained"]["steps"] == 5 * 2  # no loss is low enough to pass an edit by


@pytest.mark.parametrize("order", ["edited", "already"])
def test_a_stream_in_parts_is_the_whole_where_it_contradicts_itself(
    order: str, tiny: Tiny, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a later request overrules is past no more, edit or not, also in a patch that is gone on from; all edits count."""
    model, seen = tiny("llama"), list[list[str]]()
    later = FRANCE.model_copy(update={"target_new": "Earth"})
    train = Tuner.train
    if (
        order == "already"
    ):  # the model says the later request by itself: it is no edit, and the earlier one is still overruled
        said = Tuner.says
        monkeypatch.setattr(Tuner, "says", lambda self, rows: [r.name == "Earth" or said(self, [r])[0] for r in rows])

    def noted(self: Tuner, items: Any, penalty: Any = None, config: Any = None) -> dict[str, Any]:
        if config is not None:
            seen.append([item.name for item in items])
        return train(self, items, penalty, config)

    monkeypatch.setattr(Tuner, "train", noted)
    count = 3 if order == "edited" else 2
    editor = FTRetrain(layers=(0,), steps=8, every=count, epochs=2)
    whole = editor.fit(model, tokenizer, [FRANCE, later, JAPAN])
    parted = editor.fit(model, tokenizer, [JAPAN], onto=editor.fit(model, tokenizer, [FRANCE, later]))
    assert seen == 2 * [["Earth", "Paris"] if order == "edited" else ["Paris"]]
    assert (whole.report[later.id].get("outcome") == "already") == (order == "already")
    for name, delta in whole.dense[0].deltas.items():
        assert torch.equal(delta, parted.dense[0].deltas[name])


def test_what_was_right_already_is_no_past_edit(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on from a patch as within one fit: `every` counts edits, and neither memory nor Fisher holds anything else."""
    model, seen = tiny("llama"), list[list[str]]()
    twin = FRANCE.model_copy(update={"relation": "capital"})
    options: dict[str, Any] = {"layers": (0,), "lr": 1e-2, "steps": 60}
    editor = FTRetrain(**options, every=2, epochs=1)
    first = editor.fit(model, tokenizer, [FRANCE, twin])
    assert first.report[twin.id]["outcome"] == "already"
    assert "retrained" in editor.fit(model, tokenizer, [NEEDLE], onto=first).report[NEEDLE.id]  # it is the second edit

    def noted(tuner: Tuner, items: Any) -> dict[str, Tensor]:
        seen.append([item.name for item in items])
        return fisher(tuner, items)

    monkeypatch.setattr("errata.editors.ft_ewc.fisher", noted)
    FTEWC(**options, memory=2).fit(
        model, tokenizer, [NEEDLE], onto=FTEWC(**options).fit(model, tokenizer, [FRANCE, twin])
    )
    assert seen == [[FRANCE.target_new]]


def test_trained_together_the_later_of_two_that_contradict_wins(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    model, later = tiny("gpt2"), EditRequest(subject="France", prompt=FRANCE.prompt, target_new="Earth")
    editor = FT(layers=(0,), steps=2, lr=1e-2, stop=0.0)
    found, alone = (editor.fit(model, tokenizer, asked) for asked in ([FRANCE, NEEDLE, later], [NEEDLE, later]))
    assert all(torch.equal(delta, alone.dense[0].deltas[name]) for name, delta in found.dense[0].deltas.items())
    assert found.report[FRANCE.id]["overruled"] == [later.id] and later.id in found.report


def test_a_stream_trains_until_the_model_says_it(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    patch = FT(order="stream", lr=1e-2, steps=60, until="says", layers=(0,)).fit(model, tokenizer, [FRANCE])
    assert patch.report[FRANCE.id]["converged"] and patch.report[FRANCE.id]["steps"] < 60
    twin = FRANCE.model_copy(update={"relation": "capital"})
    longer = FT(order="stream", layers=(0,)).fit(model, tokenizer, [twin], onto=patch)
    assert longer.report[twin.id]["outcome"] == "already" and longer.ids == (FRANCE.id, twin.id)
    with pytest.raises(ConfigError, match="expected a dense patch of .*found one of other parameters"):
        FT(order="stream", layers=(1,)).fit(model, tokenizer, [NEEDLE], onto=patch)


@pytest.mark.parametrize("batch", [1, 2])
def test_training_ends_at_the_first_step_that_says_all(
    batch: int, tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Equal to asking before every epoch but the first, also where one pass both asks and trains."""
    model, items = tiny("llama"), items_of(tokenizer, [FRANCE, NEEDLE])
    config = TrainConfig(layers=(0,), lr=1e-2, steps=60, until="says", batch=batch, stop=0.0)
    names = parameters_of(model, [0], "mlp_out")
    tuner, oracle = Tuner(model, names, config), Tuner(model, names, config)
    found = tuner.train(items)
    values, steps = list(oracle.deltas.values()), 0
    adam = torch.optim.Adam(values, config.lr)
    while steps == 0 or not all(oracle.says(items)):
        for start in range(0, 2, batch):
            for delta, gradient in zip(values, oracle.gradients(items[start : start + batch]).values(), strict=True):
                delta.grad = gradient
            adam.step()
            steps += 1
    assert 2 < steps < 60 and found["steps"] == steps and len(found["curve"]) == steps * batch // 2
    assert all(torch.equal(delta, oracle.deltas[name]) for name, delta in tuner.deltas.items())


# -- dense parts ---------------------------------------------------------------------------------------------------------------


def dense(model: Any, tokenizer: Any, request: EditRequest, *names: str, seed: int = 0) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    held = dict(model.named_parameters())
    deltas = {name: 0.1 * torch.randn(held[name].shape, generator=generator) for name in names}
    return Patch("ft", {}, (request,), base_of(model, tokenizer, names), (Dense((request.id,), deltas),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_runs_with_the_sum_and_keeps_its_weights(
    dtype: torch.dtype, tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Equal to writing W + delta into a copy, tied embedding and norms included, with two patches in either order."""
    names = ("transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.1.mlp.c_proj.bias")
    model, copy = tiny("gpt2").to(dtype), tiny("gpt2").to(dtype)
    one, two = dense(model, tokenizer, FRANCE, *names), dense(model, tokenizer, NEEDLE, *names[:1], seed=1)
    with torch.no_grad():
        for name in names:
            parts = sorted((p.dense[0] for p in (one, two)), key=lambda part: part.edits)
            total = dict(copy.named_parameters())[name].float()
            for part in parts:
                total = total + part.deltas.get(name, 0.0)
            dict(copy.named_parameters())[name].copy_(total)
    before, plain = [p.clone() for p in model.parameters()], logits(model, tokenizer)
    for pair in ((one, two), (two, one)):
        with pair[0].attach(model, tokenizer), pair[1].attach(model, tokenizer):
            assert torch.equal(logits(model, tokenizer), logits(copy, tokenizer))
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(logits(model, tokenizer), plain) and hooks_of(model) == [] and DENSE not in vars(model)


def test_an_interrupt_leaves_the_weights_as_given(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    name = anatomy(model).mlp_out[1] + ".weight"
    own, plain = dict(model.named_parameters())[name], logits(model, tokenizer)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = dense(model, tokenizer, FRANCE, name).attach(model, tokenizer)
    edited = logits(model, tokenizer)
    hook = model.get_submodule(anatomy(model).mlp_out[1]).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, tokenizer)
    hook.remove()
    assert torch.equal(logits(model, tokenizer), edited)
    handle.detach()
    assert dict(model.named_parameters())[name] is own and torch.equal(logits(model, tokenizer), plain)


def test_what_is_fitted_joins_with_what_was_saved(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """Layers are a tuple in the configuration and a list in the file."""
    model = tiny("gpt2")
    one, two = (FT(layers=(0,), steps=1).fit(model, tokenizer, [r]) for r in (FRANCE, NEEDLE))
    saved = Patch.from_bytes(two.to_bytes())
    assert one.config == Patch.from_bytes(one.to_bytes()).config and one + saved == one + two


def test_what_dense_patches_refuse(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("gpt2")
    name = "transformer.h.0.mlp.c_proj.bias"
    patch = dense(model, tokenizer, FRANCE, name)
    with patch.attach(model, tokenizer), pytest.raises(RequestError, match="attached to this model already"):
        patch.attach(model, tokenizer)
    with pytest.raises(UnsupportedPatchError, match="dense parts for row 1; its weights are"):
        attach_rows(model, tokenizer, [patch]).__enter__()
    with pytest.raises(ShapeError, match=r"delta of \(32,\) .*found \(3,\)"):
        replace(patch, parts=(Dense((FRANCE.id,), {name: torch.zeros(3)}),)).attach(model, tokenizer)
    with pytest.raises(AnatomyError, match="expected a parameter 'nowhere'"):
        replace(patch, parts=(Dense((FRANCE.id,), {"nowhere": torch.zeros(3)}),)).attach(model, tokenizer)
    joint = replace(patch, requests=(FRANCE, NEEDLE), parts=(Dense((FRANCE.id, NEEDLE.id), patch.dense[0].deltas),))
    with pytest.raises(UnsupportedPatchError, match="trained together with 1 others into one dense part"):
        joint.without(FRANCE.id)
    assert patch.without(FRANCE.id).parts == ()
    for wrong in (
        {"norm": "linf", "eps": 0.0},
        {"norm": "l1"},
        {"eps": 1.0},
        {"layers": "second"},
        {"objective": "all"},
        {"order": "both"},
        {"steps": 0},
    ):
        with pytest.raises(ConfigError):
            FT(**wrong)
    assert hooks_of(model) == []
