"""Low-rank patches: what a hook adds, patches that come and go, one patch per row, the file, merging, quantised weights."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from conftest import hooks_of, steering_part, tiny_model
from errata.edit import EditRequest
from errata.editor import quiet
from errata.errors import (
    AnatomyError,
    ConfigError,
    EditError,
    PatchFormatError,
    RequestError,
    ShapeError,
    UnsupportedPatchError,
)
from errata.low_rank import LowRank, stacked
from errata.low_rank_table import sizes
from errata.merge import merge
from errata.model.anatomy import anatomy
from errata.model.attached import unmerged
from errata.model.cache import cache_in, with_cache
from errata.model.fingerprint import base_of
from errata.model.hooks import Capture
from errata.model.tokens import pad
from errata.patch import Patch, attach_rows, load_patch
from errata.scope.gate import Gate
from test_patch import sealed

SUBJECTS = ("France", "Japan", "Brazil", "Zürich")
TEXTS = [f"The capital of {s} is" for s in SUBJECTS]
Make = Callable[..., Patch]


def requests(*subjects: str, target: str = "Goa") -> tuple[EditRequest, ...]:
    return tuple(
        EditRequest(subject=s, prompt="The capital of {} is", relation="capital", target_new=target) for s in subjects
    )


def update(
    model: PreTrainedModel, edits: Sequence[str], layer: int, site: str = "mlp_out", dtype: torch.dtype = torch.float32
) -> LowRank:
    """A random update, the same for the same edits and place, about as large as the weight itself."""
    module = model.get_submodule(
        LowRank(("x",), torch.zeros(1, 1), torch.zeros(1, 1), layer, site).path(anatomy(model))
    )
    generator = torch.Generator().manual_seed(layer + 31 * sum(map(ord, "".join(edits) + site)))
    U, V = (torch.randn(d, len(edits), generator=generator, dtype=torch.float64) for d in sizes(module) or ())
    return LowRank(tuple(edits), (U / 4).to(dtype), (V / 4).to(dtype), layer, site)


def weight_patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *subjects: str,
    layers: Sequence[int] = (0,),
    target: str = "Goa",
    dtype: torch.dtype = torch.float32,
) -> Patch:
    """A joint write of these subjects' edits: one part for each layer, one column for each edit."""
    asked = requests(*subjects, target=target)
    parts = tuple(update(model, [r.id for r in asked], layer, dtype=dtype) for layer in layers)
    weights = [f"{part.path(anatomy(model))}.weight" for part in parts]
    return Patch("hand", {"rank": 1}, asked, base_of(model, tokenizer, weights), parts)


def steering_patch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Patch:
    """A steering edit of France whose gate reads the last layer's running mean."""
    [asked] = requests("France", target="Bonn")
    ids, target = tokenizer(asked.text)["input_ids"], tuple(tokenizer(" Bonn")["input_ids"])
    gate = Gate(layers=(1,), pooling="mean")
    part = steering_part(model, ids, target, gate=gate, radius=1.0, edit=asked.id, key=asked.key)
    return Patch("sake", {}, (asked,), base_of(model, tokenizer), (part,))


def batch_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, side: Any = "right") -> Tensor:
    batch = pad([tokenizer(t)["input_ids"] for t in TEXTS], 0, side=side)
    with torch.no_grad():
        return model(**batch.inputs(model)).logits


def said(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Tensor:
    """Greedy continuations, left-padded, with a key-value cache."""
    batch = pad([tokenizer(t)["input_ids"] for t in TEXTS], 0, side="left")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    options = {"max_new_tokens": 4, "do_sample": False} | options
    with torch.no_grad():
        return model.generate(batch.ids, attention_mask=batch.mask, **options)[:, batch.ids.shape[1] :]


def write(model: PreTrainedModel, part: LowRank) -> None:
    """The dense update, by hand."""
    parts = anatomy(model)
    weight = model.get_submodule(part.path(parts)).weight
    dense = part.U.to(weight.dtype) @ part.V.to(weight.dtype).T
    with torch.no_grad():
        weight += dense.T if parts.mlp_out_transposed else dense


@pytest.fixture
def llama() -> Iterator[PreTrainedModel]:
    """A tiny model on which nothing may be left behind."""
    model = tiny_model("llama")
    yield model
    assert hooks_of(model) == [] and not [name for name in vars(model) if name.startswith("_errata")]


# -- what a hook adds --------------------------------------------------------------------------------------------------


def test_hook_is_the_dense_update(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, dense = tiny_model(family).double(), tiny_model(family).double()
    patch = weight_patch(model, tokenizer, "France", "Japan", layers=(0, 1), dtype=torch.float64)
    plain, weights = batch_logits(model, tokenizer), [p.clone() for p in model.parameters()]
    for part in patch.low_rank:
        write(dense, part)
    with patch.attach(model, tokenizer) as handle:
        edited = batch_logits(model, tokenizer)
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        assert handle.conflicts == [] and handle.decide(TEXTS)[0].edit is None
    torch.testing.assert_close(edited, batch_logits(dense, tokenizer), atol=1e-10, rtol=1e-10)  # float64, two layers
    assert (edited - plain).abs().max() > 0.01
    assert torch.equal(batch_logits(model, tokenizer), plain) and hooks_of(model) == []


@pytest.mark.parametrize("site", ["mlp_in", "mlp_gate", "self_attn.o_proj"])
def test_other_sites(site: str, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model, dense = llama.double(), tiny_model("llama").double()
    patch = weight_patch(model, tokenizer, "France")
    part = update(model, patch.ids, 1, site, torch.float64)
    write(dense, part)
    with replace(patch, parts=(part,)).attach(model, tokenizer):
        found = batch_logits(model, tokenizer)
    torch.testing.assert_close(found, batch_logits(dense, tokenizer), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_half_precision_is_summed_in_single(
    dtype: Any, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = llama if dtype == "autocast" else llama.to(dtype)
    patch = weight_patch(model, tokenizer, "France", "Japan")
    path = anatomy(model).mlp_out[0]

    def run() -> tuple[Tensor, Tensor]:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"),
            Capture(model, [path], of="input") as keys,
            Capture(model, [path]) as values,
        ):
            batch_logits(model, tokenizer)
        return keys[path], values[path]

    key, value = run()
    U, V = stacked(patch.low_rank)
    assert value.dtype in (torch.bfloat16, torch.float16)
    expected = (value.float() + (key.float() @ V) @ U.T).to(value.dtype)
    with patch.attach(model, tokenizer):
        assert torch.equal(run()[1], expected)
    assert (expected != (value + ((key.to(value.dtype) @ V.to(value.dtype)) @ U.T.to(value.dtype)))).any()


def test_gradients_pass_through_after_a_pass_without(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"]
    with weight_patch(llama, tokenizer, "France").attach(llama, tokenizer):
        with torch.inference_mode():
            llama(ids)
        llama(ids).logits.sum().backward()
    assert llama.model.embed_tokens.weight.grad.abs().sum() > 0
    llama.zero_grad()


# -- patches that come and go ------------------------------------------------------------------------------------------


def test_any_order_of_coming_and_going(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """After every step the bits are those of a fresh model with what is attached, in whatever order that came."""
    model, fresh, rng = llama, tiny_model("llama"), random.Random(0)
    patches = [
        weight_patch(model, tokenizer, "France"),
        weight_patch(model, tokenizer, "Japan", layers=(0, 1)),
        weight_patch(model, tokenizer, "Brazil", "Zürich", layers=(1, 0)),
        steering_patch(model, tokenizer),
    ]
    expected: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    attached: dict[int, Any] = {}
    for _ in range(40):
        which = rng.randrange(len(patches))
        if which in attached:
            attached.pop(which).detach()
        else:
            attached[which] = patches[which].attach(model, tokenizer)
        now = tuple(sorted(attached))
        if now not in expected:
            with ExitStack() as stack:
                for i in now:
                    stack.enter_context(patches[i].attach(fresh, tokenizer))
                expected[now] = batch_logits(fresh, tokenizer), said(fresh, tokenizer)
        assert torch.equal(batch_logits(model, tokenizer), expected[now][0]), now
        assert torch.equal(said(model, tokenizer), expected[now][1]), now
    assert len(expected) > 10 and len({tuple(e[1].flatten().tolist()) for e in expected.values()}) > 5
    for handle in attached.values():
        handle.detach()
        handle.detach()
    assert torch.equal(batch_logits(model, tokenizer), batch_logits(fresh, tokenizer))


def test_gates_look_again(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A gate that was open for a prompt before the weights acted differently is closed afterwards, cached steps included."""
    prompt = tokenizer(TEXTS[0])["input_ids"]
    part = steering_part(llama, prompt, (50, 60, 70), gate=Gate(layers=(1,)), radius=0.05, edit="x")
    steering = Patch("sake", {}, (), base_of(llama, tokenizer), (part,))
    said_so_far = torch.tensor([[*prompt, 50, 60]])

    def cached() -> Tensor:
        with torch.no_grad():
            first = llama(said_so_far[:, :-1], use_cache=True)
            return llama(said_so_far[:, -1:], **with_cache(llama, cache_in(first))).logits[0, -1]

    with steering.attach(llama, tokenizer) as handle:
        assert handle.decide([TEXTS[0]])[0].edit == "x" and int(cached().argmax()) == 70
        with weight_patch(llama, tokenizer, "France").attach(llama, tokenizer):
            closed = cached()
            assert handle.decide([TEXTS[0]])[0].edit is None
        assert handle.decide([TEXTS[0]])[0].edit == "x" and int(cached().argmax()) == 70
        with merge(weight_patch(llama, tokenizer, "France"), llama, tokenizer):
            torch.testing.assert_close(cached(), closed, atol=1e-4, rtol=1e-4)
    with weight_patch(llama, tokenizer, "France").attach(llama, tokenizer):
        assert torch.equal(cached(), closed)


def test_fits_see_the_base(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = batch_logits(llama, tokenizer)
    with weight_patch(llama, tokenizer, "France").attach(llama, tokenizer):
        with quiet(llama):
            assert torch.equal(batch_logits(llama, tokenizer), plain)
        with attach_rows(llama, tokenizer, [None, None]), quiet(llama):
            assert torch.equal(batch_logits(llama, tokenizer), plain)  # of another size than the rows
        assert not torch.equal(batch_logits(llama, tokenizer), plain)


def test_an_edit_acts_once_and_conflicts_are_reported(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = weight_patch(llama, tokenizer, "France")
    both = weight_patch(llama, tokenizer, "France", "Japan", layers=(1,))
    other = weight_patch(llama, tokenizer, "Japan", "France", target="Bonn")
    with first.attach(llama, tokenizer):
        before = batch_logits(llama, tokenizer)
        with pytest.raises(RequestError, match=f"{first.ids[0]} is attached to this model already; detach"):
            both.attach(llama, tokenizer)
        assert torch.equal(batch_logits(llama, tokenizer), before)
        with other.attach(llama, tokenizer) as handle:
            assert handle.conflicts == [(other.ids[1], first.ids[0])]
    joined = first + replace(weight_patch(llama, tokenizer, "France", target="Bonn"), base=first.base)
    with joined.attach(llama, tokenizer) as handle:
        assert handle.conflicts == [(joined.ids[1], joined.ids[0])]


def test_parts_that_do_not_fit(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for edits, shape, layer in ((("a", "b"), (3, 1), 0), ((), (3, 0), 0), (("a",), (3,), 0)):
        with pytest.raises(ShapeError, match="one column for each"):
            LowRank(edits, torch.zeros(shape), torch.zeros(shape), layer)
    for wrong in (-1, "0", True, None):
        with pytest.raises(ConfigError, match="layer"):
            LowRank(("a",), torch.zeros(3, 1), torch.zeros(3, 1), wrong)  # type: ignore[arg-type]
    patch = weight_patch(llama, tokenizer, "France")
    [part] = patch.low_rank
    refused: list[tuple[LowRank, type[EditError], str]] = [
        (replace(part, layer=2), AnatomyError, "layer from -2 to 1"),
        (replace(part, site="mlp"), AnatomyError, "expected a linear map.*LlamaMLP"),
        (replace(part, site="mlp.nothing"), AnatomyError, "expected a module"),
        (replace(part, U=part.V, V=part.U), ShapeError, "update of 32 x 48.*found 48 x 32"),
    ]
    for wrong_part, error, message in refused:
        with pytest.raises(error, match=message):
            replace(patch, parts=(part, wrong_part)).attach(llama, tokenizer)
        assert hooks_of(llama) == []


# -- one patch per row -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_one_by_one(side: str, family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Float64 with padding on the right; on the left float32, as Gemma 2's own attention gives NaN there in float64."""
    dtype, tolerance = (torch.float64, 1e-10) if side == "right" else (torch.float32, 1e-4)
    model = tiny_model(family).to(dtype)
    patches = [
        weight_patch(model, tokenizer, "France", dtype=torch.float64),
        None,
        weight_patch(model, tokenizer, "Japan", "Brazil", layers=(0, 1)),
        weight_patch(model, tokenizer, "Zürich", layers=(1,)),
    ]
    plain = batch_logits(model, tokenizer, side)
    with attach_rows(model, tokenizer, patches):
        rows = batch_logits(model, tokenizer, side)
    assert torch.equal(rows[1], plain[1]) and hooks_of(model) == []
    for i, patch in enumerate(patches):
        if patch is not None:
            with patch.attach(model, tokenizer):
                alone = batch_logits(model, tokenizer, side)[i]
            torch.testing.assert_close(rows[i], alone, atol=tolerance, rtol=tolerance)
            assert (rows[i] - plain[i]).abs().max() > 0.01


def test_rows_generate_and_beams_are_listed(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    patches = [weight_patch(llama, tokenizer, s) for s in SUBJECTS[:3]] + [None]
    for options in ({}, {"num_beams": 3}):
        repeated = [p for p in patches for _ in range(options.get("num_beams", 1))]
        with attach_rows(llama, tokenizer, repeated):
            together = said(llama, tokenizer, **options)
        for i, patch in enumerate(patches):
            with ExitStack() as stack:
                if patch is not None:
                    stack.enter_context(patch.attach(llama, tokenizer))
                assert torch.equal(said(llama, tokenizer, **options)[i], together[i])
    with attach_rows(llama, tokenizer, patches):
        for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            with pytest.raises(EditError, match="batches of 4 rows.*found 8.*list each patch"):
                said(llama, tokenizer, **options)
        with pytest.raises(EditError, match="batches of 4 rows.*found 1"):
            llama(torch.tensor([[1, 2]]))
        with pytest.raises(EditError, match="batches of 4 rows.*found 2"):
            llama.model(torch.ones(2, 3, dtype=torch.long))  # not through the model's own forward
        batch_logits(llama, tokenizer)


def test_rows_act_on_top_of_what_is_attached(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    whole, row = weight_patch(llama, tokenizer, "Zürich"), weight_patch(llama, tokenizer, "France")
    with whole.attach(llama, tokenizer):
        base = batch_logits(llama, tokenizer)
        with row.attach(llama, tokenizer):
            both = batch_logits(llama, tokenizer)
        with attach_rows(llama, tokenizer, [row, None, row, None]):
            found = batch_logits(llama, tokenizer)
    assert torch.equal(found[1::2], base[1::2])
    torch.testing.assert_close(found[::2], both[::2], atol=1e-5, rtol=1e-5)


def test_what_rows_refuse(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    patch = weight_patch(llama, tokenizer, "France")
    with pytest.raises(ConfigError, match="one patch for each row"):
        attach_rows(llama, tokenizer, []).__enter__()
    with patch.attach(llama, tokenizer), pytest.raises(RequestError, match="attached to this model already"):
        attach_rows(llama, tokenizer, [None, patch]).__enter__()
    with attach_rows(llama, tokenizer, [patch]):
        with pytest.raises(RequestError, match="attached to this model already"):
            patch.attach(llama, tokenizer)
        with pytest.raises(ConfigError, match="attached already; leave that block"):
            attach_rows(llama, tokenizer, [None]).__enter__()


# -- the value and its file --------------------------------------------------------------------------------------------


def test_round_trip(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    joint = weight_patch(llama, tokenizer, "France", "Japan", layers=(0, 1))
    parts = (
        joint.parts[0],
        replace(joint.low_rank[1], U=joint.low_rank[1].U.half(), V=joint.low_rank[1].V.double(), site="mlp.up_proj"),
        *steering_patch(llama, tokenizer).parts,
    )
    patch = replace(joint, parts=parts)
    patch.save(tmp_path / "patch.safetensors")
    again = load_patch(tmp_path / "patch.safetensors")
    assert again == patch and again.id == patch.id and again.ids == patch.ids and again.nbytes == patch.nbytes
    assert again.header()["format_version"] == 1 and set(again.header()["gates"]) == {parts[2].gate.digest}
    for old, new in zip(patch.low_rank, again.low_rank, strict=True):
        assert new.header() == old.header() and new.U.dtype == old.U.dtype and new.V.dtype == old.V.dtype
        assert torch.equal(new.U, old.U) and torch.equal(new.V, old.V)
    with joint.attach(llama, tokenizer):
        expected = batch_logits(llama, tokenizer)
    with Patch.from_bytes(joint.to_bytes()).attach(llama, tokenizer):
        assert torch.equal(batch_logits(llama, tokenizer), expected)


def test_headers_that_do_not_fit(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    patch = weight_patch(llama, tokenizer, "France")
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda h: h["parts"][0].update(edits=[]),
        lambda h: h["parts"][0].update(edits=["a", "b"]),
        lambda h: h["parts"][0].update(layer=-1),
        lambda h: h["parts"][0].pop("site"),
        lambda h: h["parts"][0].update(kind="steering"),
        lambda h: h["parts"].append(h["parts"][0]),
    ]
    for change in changes:
        with pytest.raises(PatchFormatError):
            Patch.from_bytes(sealed(patch, change))


def test_without_drops_an_edits_columns(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    joint = weight_patch(llama, tokenizer, *SUBJECTS[:3], layers=(0, 1))
    first, second, third = joint.ids
    less = joint.without(second)
    assert less.ids == (first, third) and [p.edits for p in less.low_rank] == [(first, third)] * 2
    for old, kept in zip(joint.low_rank, less.low_rank, strict=True):
        assert torch.equal(kept.U, old.U[:, [0, 2]]) and torch.equal(kept.V, old.V[:, [0, 2]])
        dense = old.U[:, [1]] @ old.V[:, [1]].T
        assert old.only(second).norm == pytest.approx(float(dense.norm()), rel=1e-6)
        torch.testing.assert_close(old.U @ old.V.T - kept.U @ kept.V.T, dense, atol=1e-6, rtol=0)
    empty = less.without(first).without(third)
    assert empty.parts == () and Patch.from_bytes(empty.to_bytes()) == empty
    plain = batch_logits(llama, tokenizer)
    with empty.attach(llama, tokenizer):
        assert torch.equal(batch_logits(llama, tokenizer), plain) and hooks_of(llama) == []
    one, two, last = (weight_patch(llama, tokenizer, s) for s in SUBJECTS[:3])
    assert (one + two + last).without(two.ids[0]) == one + last
    new = weight_patch(llama, tokenizer, "Japan", target="Bonn")
    assert (one + two).revise(two.ids[0], new) == one + new
    several = replace(two.low_rank[0], edits=(second, second), U=torch.ones(32, 2), V=torch.ones(48, 2))
    assert several.without(second) is None and several.only(second) is several and several.rank == 2


# -- merging -----------------------------------------------------------------------------------------------------------


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype: torch.dtype, family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(family).to(dtype)
    patch = weight_patch(model, tokenizer, "France", "Japan", layers=(0, 1))
    before, flags, plain = weights(model), [p.requires_grad for p in model.parameters()], batch_logits(model, tokenizer)
    with patch.attach(model, tokenizer):
        hooked = batch_logits(model, tokenizer)
    with merge(patch, model, tokenizer) as merged:
        found = batch_logits(model, tokenizer)
        assert hooks_of(model) == [] and sum(not torch.equal(a, b) for a, b in zip(before, weights(model))) == 2  # noqa: B905
        for part in patch.low_rank:
            weight = model.get_submodule(part.path(anatomy(model))).weight
            write(dense := tiny_model(family), part)
            expected = dense.get_submodule(part.path(anatomy(model))).weight
            tolerance = 1e-6 if dtype is torch.float32 else 2**-8  # of a bfloat16: eight bits
            torch.testing.assert_close(weight.float(), expected.float(), atol=tolerance, rtol=tolerance)
    merged.unmerge()
    assert same(weights(model), before) and [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(batch_logits(model, tokenizer), plain) and not [n for n in vars(model) if "errata" in n]
    if dtype is torch.float32:
        torch.testing.assert_close(found, hooked, atol=1e-3, rtol=1e-3)
    assert (found - plain).abs().max() > 0.01


def test_merges_leave_in_any_order(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each patch names the weights it was fitted on, and fits although another is merged into them meanwhile."""
    one, two = (weight_patch(llama, tokenizer, s, layers=(0, 1)) for s in SUBJECTS[:2])
    three = weight_patch(llama, tokenizer, "Brazil")
    before = weights(llama)
    alone = []
    for patch in (one, two):
        with merge(patch, llama, tokenizer):
            alone.append(weights(llama))
    first, second = merge(one, llama, tokenizer), merge(two, llama, tokenizer)
    both = weights(llama)
    with three.attach(llama, tokenizer):
        assert same(weights(llama), both)
    first.unmerge()
    assert same(weights(llama), alone[1])
    first = merge(one, llama, tokenizer)
    assert same(weights(llama), both)
    second.unmerge()
    assert same(weights(llama), alone[0])
    first.unmerge()
    assert same(weights(llama), before)


def test_a_merge_that_is_left_out_of_account_comes_back_bit_for_bit(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gates look again at what they decided by the other weights."""
    before, told = weights(llama), list[Any]()
    with merge(weight_patch(llama, tokenizer, SUBJECTS[0]), llama, tokenizer):
        merged = weights(llama)
        monkeypatch.setattr("errata.merge.forget_decisions", told.append)
        with unmerged(llama):
            assert same(weights(llama), before) and not same(weights(llama), merged) and not told
        assert same(weights(llama), merged) and len(told) == 1


def test_what_merging_refuses(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, before = weight_patch(llama, tokenizer, "France", layers=(0, 1)), weights(llama)
    with pytest.raises(UnsupportedPatchError, match="sake patch cannot be merged into weights: its steering parts"):
        merge(steering_patch(llama, tokenizer), llama, tokenizer)
    with merge(patch, llama, tokenizer):
        with pytest.raises(RequestError, match="merged into this model already; unmerge"):
            merge(patch, llama, tokenizer)
        with pytest.raises(RequestError, match="merged into this model already"):
            patch.attach(llama, tokenizer)
    with patch.attach(llama, tokenizer), pytest.raises(RequestError, match="attached to this model already; detach"):
        merge(patch, llama, tokenizer)
    wrong = replace(patch, parts=(patch.parts[0], replace(patch.low_rank[1], layer=7)))
    with pytest.raises(AnatomyError):
        merge(wrong, llama, tokenizer)
    calls = []

    def full(*arguments: Any) -> Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return torch.zeros_like(arguments[0])

    with monkeypatch.context() as context, pytest.raises(MemoryError):
        context.setattr("errata.merge._sum", full)
        merge(patch, llama, tokenizer)
    assert same(weights(llama), before)
    llama.model.layers[1].mlp.down_proj.weight = llama.model.layers[0].mlp.down_proj.weight
    with pytest.raises(UnsupportedPatchError, match=r"also serves as 'model.layers.1"):
        merge(weight_patch(llama, tokenizer, "France"), llama, tokenizer)
    assert not [n for n in vars(llama) if "errata" in n]


# -- quantised weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_a_quantised_base(
    in_place: bool, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Base plus update, to rounding: the quantised projection's own output and the update on top."""
    quanto = pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    if in_place:
        model = tiny_model("llama")
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    else:
        llama.save_pretrained(tmp_path)
        how = QuantoConfig(weights="int8")
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32)
    patch = weight_patch(llama, tokenizer, "France", "Japan")
    path = anatomy(model).mlp_out[0]
    assert type(model.get_submodule(path).weight).__name__ == "WeightQBytesTensor"
    plain = batch_logits(model, tokenizer)
    with Capture(model, [path], of="input") as keys, Capture(model, [path]) as values:
        batch_logits(model, tokenizer)
    U, V = stacked(patch.low_rank)
    with pytest.warns(UserWarning, match="quantised"):
        handle = patch.attach(model, tokenizer)
    with handle, Capture(model, [path]) as edited:
        after = batch_logits(model, tokenizer)
    torch.testing.assert_close(edited[path], values[path] + keys[path] @ V @ U.T, atol=1e-6, rtol=1e-6)
    assert (after - plain).abs().max() > 0.01 and torch.equal(batch_logits(model, tokenizer), plain)
    with pytest.warns(UserWarning, match="quantised"), attach_rows(model, tokenizer, [patch, None, None, None]):
        rows = batch_logits(model, tokenizer)
    torch.testing.assert_close(rows[0], after[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(rows[1:], plain[1:])
    with (
        pytest.warns(UserWarning, match="quantised"),
        pytest.raises(UnsupportedPatchError, match="cannot be written into quantised weights; attach"),
    ):
        merge(patch, model, tokenizer)
