"""GRACE's codebook: the rules against a table worked by hand and a brute-force dictionary; and as parts of patches, at run time."""

import math
import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import hooks_of, tiny_model, tiny_other
from errata.codebook import CodebookEntry, Place, Routed, remember
from errata.edit import EditRequest
from errata.editors import get_editor
from errata.editors._items import items_of, losses_of
from errata.errors import BaseMismatchError, ConfigError, EditError, PatchFormatError, ShapeError
from errata.maths.codebook import GAP, Codebook, Rules
from errata.model.anatomy import anatomy
from errata.model.cache import cache_in, with_cache
from errata.model.fingerprint import base_of
from errata.model.hooks import Capture
from errata.model.tokens import pad, start_id
from errata.output_table import OUTPUTS, routed_reply
from errata.patch import Patch, attach_rows

A, B = (1,), (2,)
EXACT = Rules(same=0.0)


def point(*xy: float) -> Tensor:
    return torch.tensor(xy, dtype=torch.float64)


def table(book: Codebook) -> list[tuple[tuple[float, ...], float, tuple[int, ...]]]:
    """(key, radius, label) of each entry, to nine digits."""
    keys = [tuple(round(float(x), 9) for x in key) for key in book.keys]
    return list(zip(keys, [round(float(r), 9) for r in book.radii], book.labels, strict=True))


def filled(rules: Rules, *inserts: tuple[Tensor, float, tuple[int, ...]]) -> tuple[Codebook, list[str]]:
    book = Codebook(rules)
    done = [
        book.insert(key, torch.full((1,), float(i)).double(), r, label, str(i))
        for i, (key, r, label) in enumerate(inserts)
    ]
    return book, [d.outcome for d in done]


# -- the rules -------------------------------------------------------------------------------------------------------------


def test_the_published_rules_by_hand() -> None:
    """Algorithm 1 step by step: D > eps + eps_n adds, another label splits at D / 2, the same label expands."""
    book, outcomes = filled(
        replace(EXACT, guard=False, expand="coverage", defer="nearest"),
        (point(0, 0), 1.0, A),
        (point(3, 0), 1.0, B),  # D = 3 > 2: add
        (point(0, 1.5), 1.0, A),  # D = 1.5 <= 2, same label, outside the ball: expand to 1.5
        (point(0, -1), 1.0, A),  # inside: nothing
        (point(1, 0), 1.0, B),  # D = 1 to (0, 0), another label: split, radii 0.5 - 1e-5 and 0.5
        (point(6, 0), 1.0, A),  # D = 3 > 2: add
        (point(6, 5), 4.5, B),  # D = 5 <= 5.5: a split, which enlarges the ball of (6, 0) from 1 to 2.5
    )
    assert outcomes == ["add", "add", "expand", "cover", "split", "add", "split"]
    assert table(book) == [
        ((0, 0), 0.5 - GAP, A),
        ((3, 0), 1.0, B),
        ((1, 0), 0.5, B),
        ((6, 0), 2.5 - GAP, A),
        ((6, 5), 2.5, B),
    ]
    adding, _ = filled(replace(EXACT, guard=False), (point(0, 0), 1.0, A), (point(0, 1.5), 1.0, A))
    assert table(adding) == [((0, 0), 2.0, A)]
    moving, _ = filled(
        replace(EXACT, guard=False, expand="moving_average"), (point(0, 0), 1.0, A), (point(0, 1.5), 1.0, A)
    )
    assert table(moving) == [((0, 0.75), 1.5, A)]


def test_our_rules_by_hand() -> None:
    book, outcomes = filled(
        EXACT,
        (point(0, 0), 2.5, A),
        (point(3.5, 0), 1.5, B),  # meets the first ball: split at 1.75, where neither grows
        (point(0, 2.5), 1.0, A),  # expands the first by its initial 1.0, capped before the ball of (3.5, 0)
        (point(3.5, 0), 0.5, A),  # the same key, another label: changed in place, and its ball is a new one's
        (point(10, 0), 1.0, B),
        (point(10, 1.2), 1.0, A),  # another label in reach: both give way
    )
    assert outcomes == ["add", "split", "add", "replace", "add", "split"]
    assert table(book) == [
        (
            (0, 0),
            1.75 - GAP,
            A,
        ),  # 2.5 - expansion to 2.75 would have met the ball of (3.5, 0), so (0, 2.5) is its own entry
        ((3.5, 0), 0.5, A),
        ((0, 2.5), 1.0, A),
        ((10, 0), 0.6 - GAP, B),
        ((10, 1.2), 0.6, A),
    ]
    grown, outcomes = filled(
        EXACT, (point(0, 0), 1.0, A), (point(0, 1.5), 1.0, A), (point(4, 0), 1.0, B), (point(0, 2.9), 1.0, A)
    )
    assert outcomes == ["add", "expand", "add", "expand"]
    assert [round(r, 4) for _, r, _ in table(grown)] == [3.0, 1.0]  # add_init twice, up to the other label's ball


def test_a_query_goes_to_the_nearest_ball_that_contains_it() -> None:
    """A key at 0 with radius 2.5, others at 1.9 and 3.5: the point 2.4 lies in the farther ball alone."""
    inserts = ((point(0, 0), 2.5, A), (point(1.9, 0), 0.3, A), (point(3.5, 0), 0.5, B))
    query = point(2.4, 0)[None]
    for defer, expected in (("containing", 0), ("nearest", -1)):
        book = Codebook(replace(EXACT, defer=defer))
        for key, radius, label in inserts:
            book._new("add", key, key, radius, label, "", 0.0)
        entry, distance = book.find(query)
        assert int(entry) == expected and float(distance) == pytest.approx(2.4 if expected == 0 else math.inf)


def test_labels_are_compared_as_labels() -> None:
    """(1, 5) and (2, 4) have equal means: the published comparison merges two edits that contradict each other."""
    ends = ((point(0, 0), 1.0, (1, 5)), (point(1.5, 0), 1.0, (2, 4)))
    assert filled(replace(EXACT, match="mean"), *ends)[1] == ["add", "expand"]
    assert filled(EXACT, *ends)[1] == ["add", "split"]


@dataclass
class Item:
    key: list[float]
    radius: float
    label: tuple[int, ...]
    tag: str


def brute(items: list[Item], key: list[float], radius: float, label: tuple[int, ...], tag: str, rules: Rules) -> None:
    """The guarded rules over a plain list, one entry after another."""
    if not items:
        items.append(Item(key, radius, label, tag))
        return
    slack = rules.same * math.hypot(*key)
    far = [math.dist(item.key, key) for item in items]
    near = min(range(len(items)), key=far.__getitem__)
    inside = [i for i in range(len(items)) if far[i] <= items[i].radius]

    def give_way(centre: list[float], own: tuple[int, ...]) -> float:
        limit = radius
        for item in items:
            d = math.dist(item.key, centre)
            if item.label != own and d <= item.radius + radius:
                item.radius, limit = min(item.radius, max(d / 2 - GAP, d / 4)), min(limit, d / 2)
        return limit

    if far[near] <= slack:
        if items[near].label != label:
            radius = min(radius, items[near].radius)
            items[near].label, items[near].tag = label, tag
            items[near].radius = give_way(items[near].key, label)
        return
    if inside and items[min(inside, key=far.__getitem__)].label == label:
        return
    if items[near].label == label and far[near] <= radius + items[near].radius:
        moving = rules.expand == "moving_average"
        centre = [(a + b) / 2 for a, b in zip(items[near].key, key, strict=True)] if moving else items[near].key
        wanted = items[near].radius + radius if rules.expand == "add_init" else far[near] + slack
        for item in items:
            if item.label != label:
                wanted = min(wanted, math.dist(item.key, centre) * (1 - 1e-6) - item.radius)
        if wanted >= (far[near] / 2 + slack if moving else far[near]):
            items[near].key, items[near].radius = centre, wanted
            return
    items.append(Item(key, give_way(key, label), label, tag))


@pytest.mark.parametrize("expand", ["add_init", "coverage", "moving_average"])
def test_a_thousand_operations_against_a_dictionary(expand: Any) -> None:
    """Insert and ask at random; after each insertion no key of one label lies in a ball of another, nor do balls overlap."""
    rng, rules = random.Random(7), Rules(expand=expand)
    book, items = Codebook(rules), list[Item]()
    asked = hits = 0
    for step in range(1000):
        place = [rng.gauss(0, 4), rng.gauss(0, 4)]
        if items and rng.random() < 0.1:
            place = list(rng.choice(items).key)
        if rng.random() < 0.6:
            label, radius = (rng.randrange(4),), rng.choice((0.2, 0.7, 1.5))
            book.insert(point(*place), point(step), radius, label, str(step))
            brute(items, place, radius, label, str(step), rules)
            assert len(book) == len(items)
            apart = torch.cdist(book.keys, book.keys, compute_mode="donot_use_mm_for_euclid_dist")
            label_of = torch.tensor(book.labels)
            unlike = label_of != label_of.T
            sums = book.radii[:, None] + book.radii
            assert not bool((unlike & (sums > apart)).any()) and not bool((unlike & (apart <= book.radii)).any())
        elif items:
            asked += 1
            inside = [(math.dist(i.key, place), n) for n, i in enumerate(items) if math.dist(i.key, place) <= i.radius]
            entry, distance = book.find(point(*place)[None])
            assert int(entry) == (min(inside)[1] if inside else -1)
            hits += bool(inside)
            assert float(distance) == pytest.approx(min(inside)[0] if inside else math.inf, abs=1e-12)
    assert [i.label for i in items] == book.labels
    assert torch.allclose(book.radii, torch.tensor([i.radius for i in items], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(book.keys, torch.tensor([i.key for i in items], dtype=torch.float64))
    assert asked > 300 and 50 < hits < asked


def test_a_copy_on_another_device_is_kept_until_the_codebook_changes() -> None:
    book, other = Codebook(), torch.device("meta")
    book.insert(torch.zeros(3), torch.zeros(2), 1.0, A)
    keys, values, radii = book.on(torch.device("cpu"))
    assert keys.data_ptr() == book.keys.data_ptr() and values.equal(book.values) and radii.equal(book.radii)
    first = book.on(other)
    assert book.on(other) is first and [tuple(t.shape) for t in first] == [(1, 3), (1, 2), (1,)]
    book.insert(torch.full((3,), 9.0), torch.ones(2), 1.0, B)
    second = book.on(other)
    assert second is not first and len(second[0]) == 2
    book.set_value(0, torch.ones(2))
    assert book.on(other) is not second


def test_many_queries_are_answered_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    book = Codebook()
    for i in range(60):
        book._new("add", 100 + torch.randn(64, generator=generator), torch.zeros(2), 8.0 + i / 20, (i,), "", 0.0)
    queries = 100 + torch.randn(500, 64, generator=generator)
    far = book.distances(queries)
    held = torch.where(far <= book.radii, far, torch.inf)
    best = held.min(-1)
    entry, distance = book.find(queries)
    assert 20 < int((entry >= 0).sum()) < 500
    assert torch.equal(entry, torch.where(best.values.isfinite(), best.indices, -1))
    assert torch.allclose(distance, best.values)


def test_what_is_refused() -> None:
    book = Codebook()
    book.insert(torch.zeros(3), torch.zeros(2), 1.0, A)
    with pytest.raises(ShapeError, match=r"key \(3,\) and a value \(2,\), found \(2,\)"):
        book.insert(torch.zeros(2), torch.zeros(2), 1.0, A)
    with pytest.raises(ConfigError, match="radius above 0"):
        book.insert(torch.zeros(3), torch.zeros(2), 0.0, A)
    with pytest.raises(ConfigError, match="found .*always"):
        Rules(expand="always")  # type: ignore[arg-type]


# -- parts on a model --------------------------------------------------------------------------------------------------------

LAYER = 1
TEXTS = ("The capital of France is Paris", "Mount Everest lies in", "The president of the United States")


def request(i: int) -> EditRequest:
    return EditRequest(prompt=f"Claim number {i} says", target_new="Goa")


def keys_of(model: Any, tokenizer: Any, text: str) -> Tensor:
    """(T, a) inputs of the MLP's output projection at LAYER."""
    with torch.no_grad(), Capture(model, [anatomy(model).mlp_out[LAYER]], of="input") as seen:
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False)
    return seen[anatomy(model).mlp_out[LAYER]].reshape(-1, seen[anatomy(model).mlp_out[LAYER]].shape[-1])


def patch_of(model: Any, tokenizer: Any, *entries: tuple[int, Tensor, float, tuple[int, ...]], **place: Any) -> Patch:
    """Codebook edits by hand: (number, key, radius, label); the value of edit i is i in its first coordinate, else 1."""
    parts = []
    for i, key, radius, label in entries:
        value = torch.ones(32)
        value[0] = float(i)
        parts.append(CodebookEntry(request(i).id, key, value, radius, label, Place(LAYER, **place), Rules()))
    about = tuple(request(i) for i, *_ in entries)
    return Patch("grace", {}, about, base_of(model, tokenizer), tuple(parts))


def outputs(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """(n, T, d) outputs of the MLP's output projection at LAYER."""
    path = anatomy(model).mlp_out[LAYER]
    with torch.no_grad(), Capture(model, [path]) as seen:
        model(input_ids=ids, use_cache=False, **inputs)
    return seen[path].reshape(*ids.shape, -1)


def test_an_adapters_weights_are_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each device and dtype that queries come in; a first pass in inference mode leaves them fit for gradients."""
    weights = {"U": torch.randn(4, 3), "b": torch.randn(4), "V": torch.randn(4, 2)}
    reply, queries = routed_reply(Routed(("e",), "memory", weights, Place(0))), torch.randn(5, 3).double()
    made, to = list[Tensor](), Tensor.to

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append(tensor)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", counted)
    with torch.inference_mode():
        first = reply(queries)[1].clone()
    leaf = queries.clone().requires_grad_()
    hit, again = reply(leaf)
    again.sum().backward()
    assert len(made) == 3 and bool(hit.all()) and torch.equal(again, first) and leaf.grad is not None
    assert torch.equal(again, remember({name: t.double() for name, t in weights.items()}, queries))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_each_token_asks_for_itself(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The one position whose key is in the ball gets the value, padded or not; a decoder says the same with and without a cache."""
    model = tiny_model(family)
    keys = keys_of(model, tokenizer, TEXTS[0])
    patch = patch_of(model, tokenizer, (7, keys[3], 1e-2, A))
    rows = [tokenizer(t)["input_ids"] for t in TEXTS]
    for side in ("right", "left"):
        batch = pad(rows, 0, side=side)  # type: ignore[arg-type]
        given = batch.inputs(model)
        ids = given.pop("input_ids")
        plain = outputs(model, ids, **given)
        with patch.attach(model, tokenizer):
            edited = outputs(model, ids, **given)
        at = 3 + (0 if side == "right" else ids.shape[1] - len(rows[0]))
        assert edited[0, at, 0] == 7.0 and bool((edited[0, at, 1:] == 1).all())
        edited[0, at] = plain[0, at]
        assert torch.equal(edited, plain)
    ids = torch.tensor([rows[0]])
    with patch.attach(model, tokenizer), torch.no_grad():
        cached = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        whole = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
        assert torch.equal(cached, whole)


def test_the_published_modes_replace_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    """The prompt's end asks: its row is replaced there, everywhere, or before it, whatever the padding."""
    model = tiny_model("gpt2")
    keys = keys_of(model, tokenizer, TEXTS[0])
    rows = [tokenizer(t)["input_ids"] for t in TEXTS]
    n, length = len(rows[0]), max(map(len, rows))
    for side in ("right", "left"):
        batch = pad(rows, 0, side=side)  # type: ignore[arg-type]
        given = batch.inputs(model)
        ids = given.pop("input_ids")
        first = 0 if side == "right" else length - n
        for mode, lengths, expected in (
            ("last", None, [first + n - 1]),
            ("all", None, list(range(length))),
            ("prompt", None, list(range(first + n - 1))),
            ("last", [4, 3, 3], [first + 3]),
            ("prompt", [4, 3, 3], list(range(first + 3))),
        ):
            patch = patch_of(model, tokenizer, (7, keys[3 if lengths else n - 1], 1e-2, A), replace=mode)
            with patch.attach(model, tokenizer) as handle:
                if lengths:
                    with handle.prompts(lengths):
                        edited = outputs(model, ids, **given)
                else:
                    edited = outputs(model, ids, **given)
            hit = (edited[..., 1:] == 1).all(-1)
            assert hit[0].nonzero()[:, 0].tolist() == expected and not bool(hit[1:].any()), (side, mode)


@pytest.mark.parametrize("mode", ["each", "last", "all"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_behind_an_encoder_the_start_token_asks_once(
    family: str, mode: Any, closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A token at a time behind a cache the logits are those of the whole answer, for all rows and row by row."""
    model = tiny_other(family)
    ids = torch.tensor([closing_tokenizer(TEXTS[0])["input_ids"]] * 2)
    decoder_ids = torch.tensor([[start_id(model), 50, 61, 72]] * 2)
    path = Place(LAYER, "mlp_out").path(anatomy(model))
    with Capture(model, [path], of="input") as seen, torch.no_grad():
        plain = model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False).logits
    keys = seen[path].reshape(2, 4, -1)[0]
    late = patch_of(model, closing_tokenizer, (7, keys[2], 1e-2, A), replace=mode)
    patch = patch_of(model, closing_tokenizer, (5, keys[0], 1e-2, B), replace=mode) + late

    def cached(first: int = 1) -> Tensor:
        encoded, pieces = model.get_encoder()(input_ids=ids), []
        cache = None
        for piece in (decoder_ids[:, :first], *decoder_ids[:, first:].split(1, 1)):
            out = model(encoder_outputs=encoded, decoder_input_ids=piece, **with_cache(model, cache))
            cache = cache_in(out)
            pieces.append(out.logits)
        return torch.cat(pieces, 1)

    for given in ([patch, patch], [late, late], [None, patch]):
        attached = (
            given[0].attach(model, closing_tokenizer) if given[0] else attach_rows(model, closing_tokenizer, given)
        )
        with attached, torch.no_grad():
            whole = model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False).logits
            assert torch.allclose(cached(), whole, atol=1e-5) and torch.allclose(cached(2), whole, atol=1e-5)
        changed = (whole - plain).abs().amax((0, 2)) > 1e-3
        assert bool(changed.any()) == (given[1] is patch or mode == "each")
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=ids)
        begun = cache_in(
            model(encoder_outputs=encoded, decoder_input_ids=decoder_ids[:, :1], **with_cache(model, None))
        )
        with patch.attach(model, closing_tokenizer):
            asked: Any = pytest.raises(EditError, match="start token") if mode == "all" else nullcontext()
            with asked:
                model(encoder_outputs=encoded, decoder_input_ids=decoder_ids[:, 1:2], **with_cache(model, begun))


def test_a_mask_counts_where_it_is_passed_by_position(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    """BERT takes it second: the last real token of a padded row asks all the same."""
    model = tiny_other("bert")
    batch = pad([closing_tokenizer(t)["input_ids"] for t in TEXTS], 0)
    path, last = anatomy(model).mlp_out[LAYER], batch.mask[1].sum() - 1
    with Capture(model, [path], of="input") as seen, torch.no_grad():
        plain = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    assert not bool(batch.mask[1].all())
    patch = patch_of(model, closing_tokenizer, (7, seen[path][1, last], 1e-2, A), replace="all")
    with patch.attach(model, closing_tokenizer), torch.no_grad():
        named = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        assert torch.equal(model(batch.ids, batch.mask).logits, named)
    assert not torch.allclose(named[1], plain[1], atol=1e-3)


def test_patches_are_one_codebook(tokenizer: PreTrainedTokenizerFast) -> None:
    """Joined or attached together the later edit of one key holds; taken out, what the others make of it is left."""
    model = tiny_model("gpt2")
    keys = keys_of(model, tokenizer, TEXTS[0])
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    first = patch_of(model, tokenizer, (3, keys[3], 1e-2, A), (4, keys[2], 1e-2, A))
    later = patch_of(model, tokenizer, (5, keys[3], 1e-2, B))
    plain = outputs(model, ids)
    with first.attach(model, tokenizer):
        alone = outputs(model, ids)
    with first.attach(model, tokenizer), later.attach(model, tokenizer):
        together = outputs(model, ids)
    with (first + later).attach(model, tokenizer):
        assert torch.equal(outputs(model, ids), together)
    assert [float(alone[0, i, 0]) for i in (2, 3)] == [4, 3] and [float(together[0, i, 0]) for i in (2, 3)] == [4, 5]
    joined = first + later
    with joined.without(request(5).id).attach(model, tokenizer):
        assert torch.equal(outputs(model, ids), alone)
    with joined.without(request(4).id).attach(model, tokenizer):
        edited = outputs(model, ids)
        assert torch.equal(edited[0, 2], plain[0, 2]) and float(edited[0, 3, 0]) == 5
    names = set(vars(model))
    assert OUTPUTS not in names and hooks_of(model) == [] and torch.equal(outputs(model, ids), plain)


def test_an_edit_that_shares_an_entry_is_taken_back_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    """Two edits of one label share a ball; without either the other's own ball is left."""
    model = tiny_model("gpt2")
    key = keys_of(model, tokenizer, TEXTS[0])[3]
    far = key.clone()
    far[0] += 3.0
    both = patch_of(model, tokenizer, (3, far, 2.0, A), (4, key, 2.0, A))
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    plain = outputs(model, ids)
    with both.attach(model, tokenizer):
        assert float(outputs(model, ids)[0, 3, 0]) == 4
    with both.without(request(4).id).attach(model, tokenizer):
        assert torch.equal(outputs(model, ids), plain)


def test_rows_have_their_own_entries(tokenizer: PreTrainedTokenizerFast) -> None:
    """Row by row, on top of what is attached to the whole model; a batch of another size is refused."""
    model = tiny_model("llama")
    keys = keys_of(model, tokenizer, TEXTS[0])
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]] * 3)
    whole, own = (patch_of(model, tokenizer, (i, keys[at], 1e-2, A)) for i, at in ((3, 2), (6, 3)))
    plain = outputs(model, ids)
    with whole.attach(model, tokenizer), attach_rows(model, tokenizer, [None, own, None]):
        edited = outputs(model, ids)
        with pytest.raises(EditError, match="batches of 3 rows"):
            outputs(model, ids[:2])
    assert edited[:, 2, 0].tolist() == [3, 3, 3] and float(edited[1, 3, 0]) == 6
    for i in (0, 2):
        assert torch.equal(edited[i, 3], plain[i, 3])
    assert torch.equal(outputs(model, ids), plain)


def test_routed_adapters_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Defer answers where its gate is open, Memory everywhere, as their equations say."""
    model = tiny_model("gpt2")
    keys = keys_of(model, tokenizer, TEXTS[0])
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    a, generator, base = keys.shape[1], torch.Generator().manual_seed(0), base_of(model, tokenizer)
    w, A_, c = (torch.randn(*s, generator=generator) for s in ((a,), (32, a), (32,)))
    cases = {
        "defer": {"w": w, "b": torch.zeros(1), "A": A_, "c": c},
        "memory": {"U": A_[:5], "b": c[:5], "V": torch.randn(5, 32, generator=generator)},
    }
    plain = outputs(model, ids)[0]
    for form, weights in cases.items():
        part = Routed((request(1).id,), form, weights, Place(LAYER))  # type: ignore[arg-type]
        patch = Patch(form, {}, (request(1),), base, (part,))
        with Patch.from_bytes(patch.to_bytes()).attach(model, tokenizer):
            edited = outputs(model, ids)[0]
        if form == "defer":
            expected = torch.where((keys @ w >= 0)[:, None], keys @ A_.T + c, plain)
            assert 0 < int((keys @ w >= 0).sum()) < len(keys)
        else:
            expected = torch.softmax(keys @ A_[:5].T + c[:5], -1) @ weights["V"]
        assert torch.allclose(edited, expected, atol=1e-5)


@pytest.mark.parametrize("form", ["defer", "memory"])
@pytest.mark.parametrize(
    "mode, key", [("each", "last"), ("all", "last"), ("all", "first"), ("prompt", "last"), ("last", "last")]
)
def test_what_adapters_are_trained_in(form: str, mode: Any, key: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """The first loss is that of a model whose map puts out g h(q) + (1 - g) f(x) (Defer), sum_j a_j v_j (Memory), at every token
    x that is replaced, f(x) at all others."""
    model = tiny_model("gpt2", initializer_range=0.2)
    edit = EditRequest(prompt=TEXTS[0], target_new="Tokyo")
    kind: Any = get_editor(form)
    editor = kind(
        layer=0, steps=1, stop=0.0, skip=False, replace=mode, key=key, **({"slots": 5} if form == "memory" else {})
    )
    [part] = (patch := editor.fit(model, tokenizer, [edit])).outputs
    weights = editor.blank(128, 32, torch.Generator().manual_seed(0))
    [item] = items_of(tokenizer, [edit])
    prompt = len(item.prompt)

    def mixed(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x, found = args[0][0], output[0].clone()
        asks = prompt - 1 if key == "last" else 0
        tokens = {"each": range(len(x)), "all": range(len(x)), "prompt": range(asks), "last": [asks]}[mode]
        for t in tokens:
            q = x[t if mode == "each" else asks]
            if form == "memory":
                found[t] = torch.softmax(weights["U"] @ q + weights["b"], 0) @ weights["V"]
            else:
                g = torch.sigmoid(weights["w"] @ q + weights["b"])
                found[t] = g * (weights["A"] @ q + weights["c"]) + (1 - g) * output[0, t]
        return found[None]

    module = model.get_submodule(part.place.path(anatomy(model)))
    with torch.no_grad():
        [plain] = losses_of(model, [item]).tolist()
        hook = module.register_forward_hook(mixed)
        [loss] = losses_of(model, [item]).tolist()
        hook.remove()
    assert patch.report[edit.id]["curve"] == [pytest.approx(loss, abs=6e-5)] and abs(loss - plain) > 1e-3


def test_a_codebook_of_another_place_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model, other = tiny_model("gpt2"), tiny_model("gpt2", n_embd=64)
    key = keys_of(model, tokenizer, TEXTS[0])[3]
    patch = patch_of(model, tokenizer, (1, key, 1.0, A))
    with pytest.raises(BaseMismatchError, match="d_model"):
        patch.attach(other, tokenizer)
    [part] = patch.outputs
    elsewhere = replace(patch, parts=(replace(part, place=Place(LAYER, "mlp_in")),))
    with pytest.raises(ShapeError, match=r"codebook part of 128 x 32 .*found 32 x 128; attach"):
        elsewhere.attach(model, tokenizer)
    with pytest.raises(LookupError, match="layer from -2 to 1"):
        replace(patch, parts=(replace(part, place=Place(5)),)).attach(model, tokenizer)
    strict = replace(
        patch, requests=(request(2),), parts=(replace(part, edit=request(2).id, rules=Rules(guard=False)),)
    )
    with patch.attach(model, tokenizer), pytest.raises(ConfigError, match="codebooks at one layer .*different rules"):
        strict.attach(model, tokenizer)
    with pytest.raises(PatchFormatError, match="not a valid patch"):
        data = replace(patch, parts=(replace(part, rules=Rules(same=0.3)),)).to_bytes()
        Patch.from_bytes(_resealed(data))
    assert hooks_of(model) == [] and OUTPUTS not in vars(model)


def _resealed(data: bytes) -> bytes:
    """The file with a rule that does not exist, and a seal that fits."""
    import hashlib
    import json

    from safetensors.torch import load, save

    size = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + size])["__metadata__"]["errata"].replace("add_init", "sometimes")
    return save(load(data), metadata={"errata": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
