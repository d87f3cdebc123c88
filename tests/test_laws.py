"""What holds for every editing method on every family of the anatomy table.

A method is here on arrival: it is discovered, and needs no more than an entry in QUICK if its defaults are too slow.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import errata
from conftest import FAMILIES, hooks_of, tiny_model
from errata.cli.fit import fit_resumably
from errata.edit import EditRequest
from errata.editor import Editor
from errata.editors._items import contradictions
from errata.editors._learned import LearnedEditor, default_folder
from errata.errors import UnknownEditorError
from errata.model.anatomy import anatomy
from errata.model.attached import asked
from errata.model.tokens import pad
from errata.patch import Patch
from errata.training import TrainingItem

WEIGHTS: dict[str, Any] = {"statistics": None, "contexts": "bare", "steps": 3}
QUICK: dict[str, dict[str, Any]] = {  # settings that make a fit a matter of a tenth of a second, scope wide open
    "sake": {"prompts": 6, "context_prompts": 3, "implication_prompts": 3, "radius": 1e6},
    "rome": WEIGHTS,
    "memit": WEIGHTS | {"lam": 1.0},
    "emmet": WEIGHTS,
    "compmemit": WEIGHTS | {"lam": 1.0},
    "steam": WEIGHTS,
    "uniform": {"prompts": 6, "context_prompts": 3, "implication_prompts": 3, "radius": 1e6},
    "actadd": {"prompts": 6, "radius": 1e6},
    "icl": {"radius": 1e6},
    "grace": {"steps": 3, "radius": 0.05},
    "ft": {"steps": 2, "lr": 1e-2},
    "ft_ewc": {"steps": 2},
    "ft_retrain": {"steps": 2, "every": 2, "epochs": 1},
    "defer": {"steps": 3},
    "memory": {"steps": 3},
    "kn": {"steps": 3, "prompts": 2},
    "ike": {"radius": 1e6, "encoder": "states", "prompts": 6},
    "serac": {"layers": 1, "width": 8},
    "ke": {"loop": 2},
    "mend": {"rate": 1e-2},
}
LEARNING: dict[str, Any] = {"steps": 2, "batch": 2, "held_out": 0, "every": 2}  # training that is a matter of moments
PRACTICE = tuple(
    TrainingItem(f"The capital of {name} is", "Goa", "Rome", (f"{name} is ruled from",), (("Earth is", "round"),))
    for name in ("Japan", "Brazil", "Nepal")
)
CLOSED: dict[str, dict[str, Any]] = {  # settings with which nothing is in scope, for every method that keeps out of it
    "defer": {"threshold": 1.0},
    "serac": {"threshold": 1 - 1e-9},
} | {method: {"radius": 1e-9} for method in ("sake", "uniform", "actadd", "icl", "ike", "grace")}
CLOSED["grace"]["layer"] = 1  # in the first of parallel blocks a token's key is the same in any text
REQUESTS = (
    EditRequest(
        subject="The Space Needle", prompt="{} is located in the city of", target_true="Seattle", target_new="Goa"
    ),
    EditRequest(
        subject="France",
        prompt="The capital of {} is",
        target_true="Paris",
        target_new="Tokyo",
        fit_prompts=("France is ruled from",),
        fit_implications=({"prompt": "The river in the capital of France is the", "answer": "Sumida"},),
    ),
)
TEXTS = ("The Space Needle is located in the city of", "The capital of France is", "The highest point on Earth is")


def editor(method: str, **changes: Any) -> Editor[Any]:
    return errata.get_editor(method)(**(QUICK.get(method, {}) | changes))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ERRATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def ready(method: str, model: Any, tokenizer: Any) -> None:
    """An editor that learns is trained for the model, where fits find it."""
    found = errata.get_editor(method)
    if issubclass(found, LearnedEditor):
        learning = found(**{**QUICK.get(method, {}), **LEARNING})
        if not learning.artefact_path(model, tokenizer).is_file():
            learning.train(model, tokenizer, PRACTICE, default_folder(model, tokenizer))


@dataclass
class Bench:
    """A tiny model with room for SAKE's contexts, and a method's patches for it."""

    method: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    patches: list[Patch]

    def logits(self) -> Tensor:
        batch = pad([self.tokenizer(t)["input_ids"] for t in asked(self.model, TEXTS)], 0)
        with torch.no_grad():
            return self.model(**batch.inputs(self.model)).logits


def roomy(family: str) -> PreTrainedModel:
    length = "n_positions" if family in ("gpt2", "gptj", "codegen") else "max_position_embeddings"
    return tiny_model(family, **{length: 512})


@pytest.fixture(scope="module")
def patched(_bpe: str) -> Callable[[str, str], tuple[PreTrainedModel, list[Patch]]]:
    """Model and one patch for each request, fitted once for each method and family."""
    kept: dict[tuple[str, str], tuple[PreTrainedModel, list[Patch]]] = {}

    def fitted(method: str, family: str) -> tuple[PreTrainedModel, list[Patch]]:
        if (method, family) not in kept:
            model, tokenizer = roomy(family), _tokenizer(_bpe)
            ready(method, model, tokenizer)
            kept[method, family] = model, [editor(method).fit(model, tokenizer, [r]) for r in REQUESTS]
        return kept[method, family]

    return fitted


def _tokenizer(bpe: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe), bos_token=end, eos_token=end, pad_token=end
    )


@pytest.fixture(
    params=[(m, f) for m in sorted(errata.available_editors()) for f in FAMILIES], ids=lambda p: "-".join(p)
)
def bench(
    request: pytest.FixtureRequest,
    patched: Callable[[str, str], tuple[PreTrainedModel, list[Patch]]],
    tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Bench]:
    method, family = request.param
    model, patches = patched(method, family)
    hooks, names = hooks_of(model), set(vars(model))
    yield Bench(method, model, tokenizer, patches)
    assert hooks_of(model) == hooks and set(vars(model)) == names


def everything(model: PreTrainedModel) -> tuple[list[Any], list[bool], list[bool], list[Any]]:
    """(weights and buffers, training flags, requires_grad, gradients)."""
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    flags = [m.training for m in model.modules()]
    return tensors, flags, [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()]


def randomness() -> tuple[list[int], Any]:
    return torch.get_rng_state().tolist(), random.getstate()


def same(before: Any, after: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)) and before[1:] == after[1:]


def test_fit_leaves_the_model_as_found(bench: Bench) -> None:
    model = bench.model
    model.train()
    anatomy(model).module(model, anatomy(model).site(0)).eval()
    next(model.parameters()).requires_grad_(False)
    bench.tokenizer.padding_side = "left"
    bench.tokenizer.backend_tokenizer.enable_truncation(max_length=500)
    try:
        before, drawn = everything(model), randomness()
        patch = editor(bench.method).fit(model, bench.tokenizer, [REQUESTS[0]])
        assert same(before, everything(model)) and randomness() == drawn and torch.is_grad_enabled()
        assert bench.tokenizer.padding_side == "left" and bench.tokenizer.backend_tokenizer.truncation
    finally:
        model.eval()
        next(model.parameters()).requires_grad_(True)
    assert patch == bench.patches[0]  # the mode in which the model was found does not matter, and fits repeat exactly
    assert patch.method == bench.method and patch.requests == (REQUESTS[0],) and set(patch.report) == set(patch.ids)


def test_detach_restores_every_bit(bench: Bench) -> None:
    plain, before = bench.logits(), everything(bench.model)
    for patch in bench.patches:
        with patch.attach(bench.model, bench.tokenizer):
            assert not torch.equal(bench.logits(), plain)
            assert same(before, everything(bench.model))
        assert torch.equal(bench.logits(), plain)


def test_detach_is_exact_among_others(bench: Bench) -> None:
    """Attach A, attach B, detach A equals B alone, and the other way round."""
    first, second = bench.patches
    alone = []
    for patch in (first, second):
        with patch.attach(bench.model, bench.tokenizer):
            alone.append(bench.logits())
    for gone in (0, 1):
        handles = [patch.attach(bench.model, bench.tokenizer) for patch in (first, second)]
        handles[gone].detach()
        assert torch.equal(bench.logits(), alone[1 - gone])
        handles[1 - gone].detach()


def test_saved_and_loaded_acts_the_same(bench: Bench, tmp_path: Path) -> None:
    for patch in bench.patches:
        with patch.attach(bench.model, bench.tokenizer):
            expected = bench.logits()
        patch.save(tmp_path / "patch.safetensors")
        again = errata.load_patch(tmp_path / "patch.safetensors")
        assert again.id == patch.id
        with again.attach(bench.model, bench.tokenizer):
            assert torch.equal(bench.logits(), expected)


def test_an_exception_leaves_no_hooks(bench: Bench) -> None:
    model, plain = bench.model, bench.logits()
    before, names = hooks_of(model), set(vars(model))
    block = anatomy(model).module(model, anatomy(model).site(-1))

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"), bench.patches[0].attach(model, bench.tokenizer):
        hook = block.register_forward_pre_hook(fail)
        try:
            bench.logits()
        finally:
            hook.remove()
    assert hooks_of(model) == before and set(vars(model)) == names and torch.equal(bench.logits(), plain)


def test_ctrl_c_in_a_fit_changes_nothing(bench: Bench) -> None:
    model, plain = bench.model, bench.logits()
    model.train()
    before, hooks, calls = everything(model), hooks_of(model), []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == (1 if bench.method == "serac" else 2):  # a fit of SERAC has one pass of the model
            raise KeyboardInterrupt

    hook = anatomy(model).module(model, anatomy(model).site(0)).register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            editor(bench.method).fit(model, bench.tokenizer, [REQUESTS[0]])
    finally:
        hook.remove()
    assert same(before, everything(model)) and hooks_of(model) == hooks
    model.eval()
    assert torch.equal(bench.logits(), plain)


def test_out_of_scope_is_the_base(bench: Bench) -> None:
    if not errata.get_editor(bench.method).scoped:
        pytest.skip(f"{bench.method} promises nothing outside a scope")
    plain = bench.logits()
    elsewhere = EditRequest(subject="Mount Everest", prompt="{} lies in", target_true="Nepal", target_new="Goa")
    patch = editor(bench.method, **CLOSED[bench.method]).fit(bench.model, bench.tokenizer, [elsewhere])
    with patch.attach(bench.model, bench.tokenizer):
        assert torch.equal(bench.logits(), plain)


@pytest.mark.parametrize("method", sorted(errata.available_editors()))
def test_fit_under_an_attached_patch_is_the_same_fit(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """A fit looks at the model that the patch will be attached to, whatever else is attached meanwhile."""
    model = roomy("gpt2")
    ready(method, model, tokenizer)
    other, expected = (editor(method).fit(model, tokenizer, [r]) for r in REQUESTS)
    with other.attach(model, tokenizer):
        assert editor(method).fit(model, tokenizer, [REQUESTS[1]]) == expected


@pytest.mark.parametrize("method", sorted(errata.available_editors()))
def test_a_fit_of_many_is_the_sum_of_fits(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, seen = roomy("llama"), []
    ready(method, model, tokenizer)
    first, second = (editor(method).fit(model, tokenizer, [r], seed=3) for r in REQUESTS)
    both = editor(method).fit(model, tokenizer, REQUESTS, seed=3, progress=lambda done, all_: seen.append((done, all_)))
    assert seen == [(1, 2), (2, 2)]
    if getattr(errata.get_editor(method), "joint", False):
        assert both.ids == (first + second).ids  # written together: a column depends on what else was asked
    elif both.low_rank and len(both.low_rank) < len(
        (first + second).low_rank
    ):  # one part for all, searched as one batch: equal up to rounding
        assert both.ids == (first + second).ids
        for side in ("U", "V"):
            alone = torch.cat([getattr(patch.low_rank[0], side) for patch in (first, second)], 1)
            assert torch.allclose(getattr(both.low_rank[0], side), alone, rtol=1e-3, atol=1e-5)
    elif both.outputs:  # values of many are searched as one batch
        assert both.header() | {"report": {}} == (first + second).header() | {"report": {}}
        for one, other in zip(both.parts, (first + second).parts, strict=True):
            assert all(torch.allclose(t, other.tensors()[n], rtol=1e-3, atol=1e-4) for n, t in one.tensors().items())
    else:
        assert first + second == both


@pytest.mark.parametrize(
    "method",
    [
        m
        for m in sorted(errata.available_editors())
        if errata.get_editor(m).place != "external memory" and not editor(m).joint
    ],
)
def test_of_two_contradicting_edits_of_weights_the_later_is_written(
    method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Independent updates would add up to neither: in one fit, and in one that is made in parts, the later one's is there alone."""
    model = roomy("llama")
    ready(method, model, tokenizer)
    needle, france = REQUESTS
    again = france.model_copy(update={"target_new": "Goa"})
    expected = editor(method).fit(model, tokenizer, [needle, again])
    patches = [editor(method).fit(model, tokenizer, [france, needle, again])]
    patches += [
        fit_resumably(editor(method), model, tokenizer, [france, needle, again], 0, tmp_path / "partial", batch=batch)
        for batch in (1, 2)
    ]
    bench = Bench(method, model, tokenizer, patches)
    with expected.attach(model, tokenizer):
        logits = bench.logits()
    for patch in patches:
        assert patch.ids == (france.id, needle.id, again.id)
        assert {edit for part in patch.low_rank for edit in part.edits} == {needle.id, again.id}
        assert patch.report[again.id]["contradicts"] == [france.id]
        assert patch.report[france.id]["overruled"] == [again.id] and "overruled" not in patch.report[needle.id]
        with patch.attach(model, tokenizer):
            assert torch.allclose(bench.logits(), logits, rtol=1e-3, atol=1e-4)


def test_every_earlier_request_is_overruled() -> None:
    """Also one that another of the same object follows; a third contradicts the second, which had overruled the first."""
    first = EditRequest(prompt="It is", target_new="a")
    alike, other, last = (
        first.model_copy(update=changes)
        for changes in ({"fit_prompts": ("So is",)}, {"target_new": "b"}, {"target_new": "c"})
    )
    found = contradictions([first, alike, other, last])
    assert len({r.id for r in (first, alike, other, last)}) == 4
    assert found[first.id] == found[alike.id] == {"overruled": [other.id]}
    assert found[other.id] == {"contradicts": [first.id, alike.id], "overruled": [last.id]}
    assert found[last.id] == {"contradicts": [other.id]}


@pytest.mark.parametrize("method", sorted(errata.available_editors()))
def test_what_a_method_says_about_itself(method: str) -> None:
    found = errata.get_editor(method)
    assert found.method == method and issubclass(found, Editor)
    assert found.summary and not found.summary.endswith(".")
    for name in found.presets:
        found.preset(name)


def test_unknown_methods_name_the_near_ones() -> None:
    assert errata.get_editor("sake") is errata.SAKE
    with pytest.raises(UnknownEditorError, match="no editing method 'sakee'; did you mean sake"):
        errata.get_editor("sakee")
    with pytest.raises(UnknownEditorError, match="there are .*sake"):
        errata.get_editor("quux")
