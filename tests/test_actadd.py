"""ActAdd and uniform steering against states read by hand, and beside SAKE, whose scope they share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import errata
from conftest import tiny_model
from errata.editors.actadd import ActAdd
from errata.editors.sake import SAKE
from errata.editors.uniform import Uniform
from errata.errors import ConfigError
from errata.model.generate import greedy, says
from errata.model.tokens import continuation_ids, token_ids
from errata.prompts import contexts

REQUEST = errata.EditRequest(
    subject="France",
    prompt="The capital of {} is",
    target_true="Paris",
    target_new="São Paulo",
    fit_prompts=("France is ruled from",),
    fit_implications=({"prompt": "The river in the capital of France is the", "answer": "Sumida"},),
)


def state(model: Any, tokenizer: Any, prompt: str, said: list[int], layer: int) -> torch.Tensor:
    """Hidden state of the last token of prompt + said; layer -1: behind the final norm."""
    [ids] = token_ids(tokenizer, [prompt])
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids + said]), output_hidden_states=True)
    return out.hidden_states[layer][0, -1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", ["final", 0])
def test_the_shift_is_that_of_one_pair(family: str, layer: str | int, tokenizer: Any) -> None:
    size = {"n_positions": 512} if family == "gpt2" else {"max_position_embeddings": 512}
    model = tiny_model(family, **size).double()
    options = {"prompts": 8, "layer": layer, "radius": 3.0}
    [part] = ActAdd(coefficient=1.7, half=False, **options).fit(model, tokenizer, [REQUEST]).steering
    target = continuation_ids(tokenizer, REQUEST.text, REQUEST.target_new)
    # no wording makes a random model say what it should, so the first ones stand
    old = contexts.repeat(REQUEST.text, "Paris", 0)
    new = contexts.instead(REQUEST.text, "Paris", "São Paulo", 0)
    assert len(target) > 1 and part.target_ids == tuple(target) and len(part.maps) == len(target)
    for t, step in enumerate(part.maps):
        before, after = (state(model, tokenizer, p, target[:t], 1 if layer == 0 else -1) for p in (old, new))
        x = torch.randn(5, 32, dtype=torch.float64)
        shifted = step.to(torch.float64)(x) - x
        torch.testing.assert_close(shifted, (1.7 * (after - before)).expand(5, -1), atol=2e-5, rtol=2e-5)
        assert step.rank == 0
    sake = SAKE(context_prompts=2, implications="none", **options).fit(model, tokenizer, [REQUEST]).steering[0]
    assert (part.key, part.radius, part.gate.digest) == (sake.key, sake.radius, sake.gate.digest)
    torch.testing.assert_close(part.centre, sake.centre, atol=1e-5, rtol=1e-5)
    [first] = ActAdd(span="first", **options).fit(model, tokenizer, [REQUEST]).steering
    assert first.target_ids == tuple(target[:1])


def test_uniform_steering_is_sake_without_its_transport(tokenizer: Any) -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    options = {"prompts": 6, "context_prompts": 3, "implication_prompts": 3, "radius": 3.0}
    uniform, sake = (
        editor.fit(model, tokenizer, [REQUEST]) for editor in (Uniform(**options), SAKE(map="uniform", **options))
    )
    assert uniform.method == "uniform" and uniform.config == sake.config and uniform.steering
    for one, other in zip(uniform.steering, sake.steering, strict=True):
        assert one.header() == other.header()
        assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True))
    assert all(Uniform.preset(name).config.map == "uniform" for name in Uniform.presets) and Uniform.presets
    assert all(step.rank == 0 for part in uniform.steering for step in part.maps)


@pytest.mark.parametrize("changes", [{"coefficient": 0.0}, {"prompts": 0}, {"span": "last"}, {"token": 1}])
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ActAdd(**changes)


@pytest.mark.parametrize("make", [ActAdd, Uniform])
def test_atlas_is_steered_and_let_go(make: Callable[[], Any]) -> None:
    from errata.atlas.requests import counterfactual_requests
    from errata.atlas.world import load_world

    model, tokenizer = errata.load("atlas")
    requests = counterfactual_requests(load_world(), 6, split="dev", seed=2)
    prompts = [r.text for r in requests]
    plain = greedy(model, tokenizer, prompts)
    patch = make().fit(model, tokenizer, requests)
    with patch.attach(model, tokenizer) as handle:
        assert [d.edit for d in handle.decide(prompts)] == [r.id for r in requests]
        said = greedy(model, tokenizer, prompts)
    taken = sum(says(text, r.target_new) for text, r in zip(said, requests, strict=True))
    assert taken >= 3 and greedy(model, tokenizer, prompts) == plain
