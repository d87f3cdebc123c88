"""Hooks do what they say and are gone afterwards, whatever happened in between."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from errata.errors import AnatomyError
from errata.model.hooks import Capture, Hooks, first_tensor, intervene, with_first_tensor

Tiny = Callable[..., PreTrainedModel]
IDS = torch.arange(1, 7).reshape(1, 6)
BLOCKS = ["transformer.h.0", "transformer.h.1"]


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        (name, hook)
        for name, module in model.named_modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for hook in table.values()
    ]


def test_first_tensor_of_every_kind_of_output() -> None:
    old, new = torch.zeros(2), torch.ones(2)
    pair = namedtuple("pair", "cache state")
    for output in (old, (old, None), [old, 1], (None, old), BaseModelOutput(last_hidden_state=old), pair({}, old)):
        assert first_tensor(output) is old
        changed = with_first_tensor(output, new)
        assert type(changed) is type(output) and first_tensor(changed) is new
        assert first_tensor(output) is old  # the original stays
    assert with_first_tensor((old, 7), new)[1] == 7
    for nothing in (None, (), (None, "x"), OrderedDict()):
        with pytest.raises(AnatomyError, match="expected a tensor"):
            first_tensor(nothing)


def test_capture_is_what_transformers_reports(tiny: Tiny) -> None:
    model = tiny("gpt2", layers=3)
    with torch.no_grad(), Capture(model, BLOCKS) as seen:
        states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(seen[BLOCKS[0]], states[1]) and torch.equal(seen[BLOCKS[1]], states[2])


def test_capture_of_inputs_and_gradients(tiny: Tiny) -> None:
    model = tiny("gpt2")
    path = "transformer.h.1.mlp.c_proj"
    with Capture(model, [path], of="input", detach=False) as keys, Capture(model, [path]) as values:
        model(IDS)
    assert keys[path].requires_grad and not values[path].requires_grad
    torch.testing.assert_close(model.get_submodule(path)(keys[path]), values[path])


def test_capture_of_a_module_that_did_not_run(tiny: Tiny) -> None:
    with Capture(tiny("gpt2"), BLOCKS) as seen, pytest.raises(AnatomyError, match=r"expected a call.*transformer.h.0"):
        seen[BLOCKS[0]]


def test_intervene_changes_only_while_inside(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        before = model(IDS).logits
        with intervene(model, {"": lambda logits: logits * 2}):
            assert torch.equal(model(IDS).logits, before * 2)
        assert torch.equal(model(IDS).logits, before)
    assert hooks_of(model) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_are_removed_after(error: type[BaseException], tiny: Tiny) -> None:
    model = tiny("gpt2")

    def fail(tensor: Tensor) -> Tensor:
        raise error

    def others(module: nn.Module, args: Any, output: Any) -> None:
        return None

    model.get_submodule(BLOCKS[0]).register_forward_hook(others)
    model.get_submodule(BLOCKS[1]).register_forward_pre_hook(lambda module, args: None)
    theirs = hooks_of(model)
    with pytest.raises(error), Capture(model, BLOCKS), intervene(model, {BLOCKS[0]: fail}):
        model(IDS)
    assert hooks_of(model) == theirs
    with pytest.raises(error), Capture(model, BLOCKS):
        raise error
    assert hooks_of(model) == theirs


def test_the_same_function_registered_by_another_stays(tiny: Tiny) -> None:
    model = tiny("gpt2")

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        return None

    model.get_submodule(BLOCKS[0]).register_forward_hook(hook, with_kwargs=True)
    with Hooks(model, forward={BLOCKS[0]: hook}):
        assert len(hooks_of(model)) == 2
    assert len(hooks_of(model)) == 1


def test_failure_while_registering_leaves_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    with pytest.raises(AnatomyError, match=r"transformer.h.7"), Capture(model, [*BLOCKS, "transformer.h.7"]):
        pass
    assert hooks_of(model) == []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.get_submodule(BLOCKS[1]), "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt), Capture(model, BLOCKS):
        pass
    assert hooks_of(model) == []


def test_interrupted_removal_is_finished(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    hooks = Hooks(model, forward={path: lambda module, args, kwargs, output: None for path in BLOCKS}).__enter__()
    remove, calls = hooks._handles[0].remove, [KeyboardInterrupt]

    def once_interrupted() -> None:
        if calls:
            raise calls.pop()
        remove()

    monkeypatch.setattr(hooks._handles[0], "remove", once_interrupted)
    with pytest.raises(KeyboardInterrupt):
        hooks.remove()
    assert hooks_of(model) == []


def test_pre_hook_sees_and_replaces_arguments(tiny: Tiny) -> None:
    model = tiny("llama")

    def reversed_ids(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "input_ids": kwargs["input_ids"].flip(1)}

    with torch.no_grad():
        expected = model(input_ids=IDS.flip(1)).logits
        with Hooks(model, pre={"": reversed_ids}):
            assert torch.equal(model(input_ids=IDS).logits, expected)
