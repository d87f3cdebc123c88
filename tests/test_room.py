"""Prompts that are longer than the model: one sentence that names them, wherever they go to the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import tiny_other
from errata.bench.forced import exact
from errata.bench.verify import logit_digests
from errata.edit import EditRequest
from errata.editors.sake import SAKE
from errata.errors import RequestError
from errata.model.generate import greedy
from errata.model.room import check_room, room
from errata.model.states import last_states, states_at

LONG = "word " * 200


def test_every_family_says_how_much_room_it_has(tiny: Callable[..., Any], family: str) -> None:
    model = tiny(family)
    assert room(model) == 128
    check_room(model, [[1] * 128])
    check_room(model, [[1] * 120], new=9)  # the ninth is never fed
    with pytest.raises(RequestError, match=r"prompt 'a b' has 120 tokens and 10 more are to follow, .* room for 128"):
        check_room(model, [[1], [1] * 120], ["a", "a b"], new=10)
    with pytest.raises(RequestError, match="in row 2 of 2 has 129 tokens, but"):
        check_room(model, [[1], [1] * 129])


def test_models_without_a_bound_take_any_length(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert room(model) is None
    check_room(model, [[1] * 1000])


def test_greedy_takes_what_just_fits(tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("gpt2")
    model.generation_config.eos_token_id = None
    prompt = "a" * 124
    n = len(tokenizer(prompt)["input_ids"])
    [text] = greedy(model, tokenizer, [prompt], max_new_tokens=128 - n + 1)
    assert text
    with pytest.raises(RequestError, match=rf"has {n} tokens and {128 - n + 2} more .* room for 128; shorten it"):
        greedy(model, tokenizer, ["Hi", prompt], max_new_tokens=128 - n + 2)


def test_every_way_to_the_model_refuses(tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("gpt2")
    ways: list[Callable[[], object]] = [
        lambda: greedy(model, tokenizer, ["Hi", LONG]),
        lambda: last_states(model, tokenizer, ["Hi", LONG]),
        lambda: exact(model, tokenizer, [("Hi", "there"), (LONG, "there")]),
        lambda: logit_digests(model, tokenizer, ["Hi", LONG]),
    ]
    for way in ways:
        with pytest.raises(RequestError, match=r"the prompt 'word .*\.\.\.' has \d+ tokens.* room for 128; shorten it"):
            way()
    with pytest.raises(RequestError, match="has 129 tokens"):
        states_at(model, [[1] * 129], [[0]], [0])
    whole, first = (states_at(model, [[1] * n], [[0]], [0])[0][0] for n in (128, 1))
    torch.testing.assert_close(whole, first)


@pytest.mark.parametrize("where", ["prompt", "fit_prompts", "fit_implications"])
def test_an_editor_refuses_before_the_first_fit(
    tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, where: str
) -> None:
    value: Any = LONG if where == "prompt" else [LONG]
    fields: dict[str, Any] = {"prompt": "Hi", "target_new": "Goa", "target_true": "Rome"} | {where: value}
    with pytest.raises(RequestError, match="the prompt 'word .* room for 128"):
        SAKE().check([EditRequest(**fields)], tiny("gpt2"), tokenizer)
    SAKE().check([EditRequest(**fields)])


def test_a_fit_without_room_for_its_contexts_says_so(
    tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The prompt itself has room, the contexts that repeat it have not."""
    request = EditRequest(prompt="a" * 100, target_new="Goa", target_true="Rome")
    with pytest.raises(RequestError, match="has room for 128"):
        SAKE(prompts=2).fit(tiny("gpt2"), tokenizer, [request])


def test_roberta_counts_from_behind_its_paddings_id() -> None:
    model = tiny_other("roberta")
    padding, length = model.config.pad_token_id, room(model)
    assert length == model.config.max_position_embeddings - padding - 1
    with torch.no_grad():
        model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, length + 1), 5), attention_mask=torch.ones(1, length + 1, dtype=torch.long))
