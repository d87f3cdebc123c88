"""Knowledge neurons: integrated gradients against a loop and against the difference that they explain; the write against its definition."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import LABELS, tiny_other
from errata.edit import EditRequest
from errata.editor import quiet
from errata.editors._value_search import _without_gradients
from errata.editors.kn import KN, Ask, KNConfig, asks_of, attributions, label_direction
from errata.errors import AnatomyError, ConfigError, RequestError
from errata.model.anatomy import anatomy
from errata.model.tokens import token_ids

Tiny = Callable[..., Any]
FRANCE = EditRequest(subject="France", prompt="The capital of {} is", target_true="Paris", target_new="Tokyo")
CLAIM = EditRequest(prompt="The capital of France is Paris.", target_true="SUPPORTS", target_new="REFUTES")


def built(family: str, tiny: Tiny, **changes: Any) -> Any:
    made = tiny_other(family, **changes) if family in ("t5", "bert", "bart", "roberta") else tiny(family, **changes)
    return made.double()


def by_hand(model: Any, ask: Ask, layer: int, neuron: str, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(P(wanted), the neurons' activations (m,)) of a plain pass, with values put in their place if given."""
    parts = anatomy(model)
    path = parts.mlp_out[layer] if neuron == "output" else (parts.mlp_gate or parts.mlp_in)[layer]
    module, seen = model.get_submodule(path), []

    def put(x: Tensor) -> Tensor:
        seen.append(x.reshape(-1, x.shape[-1])[ask.at].detach())
        if values is None:
            return x
        flat = x.reshape(-1, x.shape[-1])
        return torch.cat([flat[: ask.at], values[None], flat[ask.at + 1 :]]).reshape(x.shape)

    if neuron == "output":
        hook = module.register_forward_pre_hook(lambda m, args: (put(args[0]),))
    else:
        hook = module.register_forward_hook(lambda m, args, output: put(output))
    try:
        if ask.encoder is not None:
            given = {"input_ids": torch.tensor([ask.encoder]), "decoder_input_ids": torch.tensor([ask.ids])}
        else:
            given = {"input_ids": torch.tensor([ask.ids])}
        logits = model(**given).logits
    finally:
        hook.remove()
    return (logits[0] if logits.dim() == 2 else logits[0, ask.at]).softmax(-1)[ask.wanted], seen[0]


CASES = [(f, n) for f in ("gpt2", "llama", "opt", "t5", "bert") for n in ("output", "input")]


@pytest.mark.parametrize(("family", "neuron"), CASES)
def test_attributions_are_those_of_a_loop(
    family: str, neuron: Any, tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Attr = a mean_n dP/da, one layer and one step at a time, without a cache, for both rules and any size of a batch."""
    model = built(family, tiny)
    request = CLAIM if family == "bert" else FRANCE
    ask = asks_of(model, tokenizer, request.text, request.target_true)[-1]
    for rule, alphas in (("midpoint", (torch.arange(5) + 0.5) / 5), ("linspace", torch.linspace(0, 1, 5))):
        config = KNConfig(steps=5, rule=rule, neuron=neuron, batch=3)  # type: ignore[arg-type]
        with quiet(model), _without_gradients(model):
            found = attributions(model, ask, config)
        for layer in range(anatomy(model).n_layers):
            activation = by_hand(model, ask, layer, neuron)[1]
            total = torch.zeros_like(activation)
            for alpha in alphas:
                leaf = (alpha * activation).requires_grad_()
                total += torch.autograd.grad(by_hand(model, ask, layer, neuron, leaf)[0], leaf)[0]
            loose = 1e-10 if family in ("llama", "t5") else 1e-15  # their norms work in float32
            assert torch.allclose(found[layer], activation * total / 5, rtol=1e-9, atol=loose)


def test_attributions_of_an_improbable_word_in_half_precision(tiny: Tiny) -> None:
    """P = 2e-6, whose own gradient float16 holds to some 2 per cent."""
    half = tiny("gpt2", initializer_range=0.3).half()
    whole, ids = copy.deepcopy(half).float(), (5, 17, 99, 200)
    with torch.no_grad():
        probabilities = whole(torch.tensor([ids])).logits[0, -1].softmax(-1)
    ask = Ask(ids, 3, int(probabilities.argmin()))
    with quiet(half), quiet(whole), _without_gradients(half), _without_gradients(whole):
        found, expected = (attributions(model, ask, KNConfig()) for model in (half, whole))
    assert float(probabilities.min()) < 1e-5
    assert float((found - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bert"])
def test_attributions_add_up_to_the_difference(family: str, tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """Completeness: over a layer they sum to P(with its neurons) - P(without), within 1 % at 20 midpoints; both ends err more."""
    model = built(family, tiny, initializer_range=0.05) if family != "t5" else built(family, tiny)
    request = CLAIM if family == "bert" else FRANCE
    ask = asks_of(model, tokenizer, request.text, request.target_true)[0]
    with quiet(model), _without_gradients(model):
        found, ends = (attributions(model, ask, KNConfig(rule=rule)) for rule in ("midpoint", "linspace"))
    for layer in range(anatomy(model).n_layers):
        with torch.no_grad():
            whole, activation = by_hand(model, ask, layer, "output")
            gone = by_hand(model, ask, layer, "output", torch.zeros_like(activation))[0]
        assert abs(found[layer].sum() - (whole - gone)) < 0.01 * abs(whole - gone)
        assert abs(ends[layer].sum() - (whole - gone)) > abs(found[layer].sum() - (whole - gone))


def test_each_token_is_asked_behind_the_ones_before(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("gpt2")
    [prompt], target = token_ids(tokenizer, [FRANCE.text]), tokenizer(" Tokyo")["input_ids"]
    assert len(target) > 1
    asks = asks_of(model, tokenizer, FRANCE.text, "Tokyo")
    assert [(list(a.ids), a.at, a.wanted) for a in asks] == [
        ([*prompt, *target[:t]], len(prompt) + t - 1, token) for t, token in enumerate(target)
    ]
    fault = asks_of(model, tokenizer, FRANCE.text, "Tokyo", "at_prompt")
    assert [(list(a.ids), a.wanted) for a in fault] == [(prompt, token) for token in target]
    with torch.no_grad():
        said = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    assert [a.wanted for a in asks_of(model, tokenizer, FRANCE.text, None)] == [said]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_write_is_the_papers(family: str, tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """The value slot of each kept neuron gets - lambda_1 e(old) + lambda_2 e(new), nothing else changes, and the prompt's own
    neurons are those above a share of the largest attribution."""
    model = tiny(family)
    patch = KN(refine=False, erase=1.5, update=2.5).fit(model, tokenizer, [FRANCE])
    asks = asks_of(model, tokenizer, FRANCE.text, "Paris")
    with quiet(model), _without_gradients(model):
        found = torch.stack([attributions(model, ask, KNConfig()) for ask in asks]).mean(0)
    kept = found > 0.2 * found.max()
    assert patch.report[FRANCE.id]["neurons"] == kept.nonzero().tolist() and 0 < kept.sum() < kept.numel() / 2
    head = model.get_output_embeddings().weight.detach()
    old, new = (head[tokenizer(t)["input_ids"]].mean(0) for t in (" Paris", " Tokyo"))
    delta = {part.layer: part.U @ part.V.T for part in patch.low_rank}
    for layer in range(2):
        expected = (2.5 * new - 1.5 * old)[:, None] * kept[layer].float()
        assert torch.allclose(delta.get(layer, torch.zeros(32, kept.shape[1])), expected, atol=1e-6)
    assert all(part.site == "mlp_out" and part.rank == 1 for part in patch.low_rank)


def test_the_published_presets_erase_what_the_model_says(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """w - 2 e(o_pred) + sum e(o*): o_pred is one token, whatever the old object is said to be."""
    model = tiny("gpt2")
    [prompt] = token_ids(tokenizer, [FRANCE.text])
    with torch.no_grad():
        said = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    old, new = (tokenizer(text)["input_ids"] for text in (" Paris", " Tokyo"))
    assert said not in old and len(new) > 1
    words = model.get_input_embeddings().weight.detach()
    patch = KN.preset("gpt2-xl").fit(model, tokenizer, [FRANCE])
    assert patch.low_rank and patch.config["old"] == "predicted"
    for part in patch.low_rank:
        assert torch.allclose(part.U[:, 0], words[new].sum(0) - 2 * words[said], atol=1e-6)
    assert all(KN.preset(name).config.old == "predicted" for name in KN.presets)


def test_refined_neurons_are_those_of_many_prompts(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    own = (FRANCE.text, "France is ruled from", "In France the seat of government is")
    request = EditRequest(**FRANCE.model_dump() | {"fit_prompts": own[1:]})
    patch = KN(prompts=3).fit(model, tokenizer, [request])
    times = torch.zeros(2, 48)
    with quiet(model), _without_gradients(model):
        for prompt in own:
            a = torch.stack([attributions(model, k, KNConfig()) for k in asks_of(model, tokenizer, prompt, "Paris")])
            times += a.mean(0) > 0.2 * a.mean(0).max()
    common = times > 0.4 * 3
    assert patch.report[request.id]["neurons"] == common.nonzero().tolist() and patch.report[request.id]["common"]
    strict = KN(prompts=3, share=0.99).fit(model, tokenizer, [request]).report[request.id]
    assert strict["neurons"] == (times == times.max()).nonzero().tolist()  # the commonest, where none is in all
    assert KN(prompts=7).fit(model, tokenizer, [FRANCE]).report[FRANCE.id]["prompts"] == 7  # behind lead-ins


def test_a_label_is_written_along_its_gradient(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """A step along it at the first token raises the label's logit most; its length is a word embedding's."""
    model = built("bert", tiny)
    ask = asks_of(model, tokenizer, CLAIM.text, "REFUTES")[0]
    assert (ask.at, ask.wanted) == (0, LABELS.index("REFUTES"))
    with quiet(model), _without_gradients(model):
        direction = label_direction(model, ask)
    size = model.get_input_embeddings().weight.norm(dim=1).mean()
    assert torch.allclose(direction.norm(), size)
    module, rises = model.get_submodule(anatomy(model).site(-1)), []
    for way in (direction, torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)):

        def moved(m: Any, a: Any, output: Any, way: Tensor = way) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            state = torch.cat([state[:, :1] + 1e-3 * way / way.norm(), state[:, 1:]], 1)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        with torch.no_grad():
            before = model(input_ids=torch.tensor([ask.ids])).logits[0, ask.wanted]
            hook = module.register_forward_hook(moved)
            rises.append(float(model(input_ids=torch.tensor([ask.ids])).logits[0, ask.wanted] - before))
            hook.remove()
    assert rises[0] > abs(rises[1]) and rises[0] > 0


def test_what_it_refuses(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    for wrong in (
        {"rule": "right"},
        {"steps": 0},
        {"threshold": 1.0},
        {"share": -0.1},
        {"count": "max"},
        {"old": "said"},
        {"update": -1},
    ):
        with pytest.raises(ConfigError):
            KN(**wrong)
    with pytest.raises(AnatomyError, match="gate and values as one; use neuron='output'"):
        KN(neuron="input").fit(tiny("phi3"), tokenizer, [FRANCE])
    wrong_label = EditRequest(prompt="The capital of France is Paris.", target_new="MAYBE")
    with pytest.raises(RequestError, match="label of this classifier"):
        KN().fit(tiny_other("bert"), tokenizer, [wrong_label])
