"""GRACE on tiny models: what it adds, skips, widens, parts and forgets; and a few edits on Atlas."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import errata
from conftest import hooks_of
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import load_world
from errata.edit import EditRequest
from errata.editors._items import items_of, losses_of, says
from errata.editors.grace import GRACE
from errata.errors import AnatomyError, BaseMismatchError, ConfigError
from errata.model.anatomy import anatomy
from errata.model.generate import greedy, greedy_answers
from errata.model.generate import says as begins
from errata.model.hooks import Capture
from errata.model.loading import bundled
from errata.output_table import Site
from errata.patch import Patch

Tiny = Callable[..., Any]
# Objects of one token: one value of a random model does not carry a whole word.
FRANCE = EditRequest(subject="France", prompt="The capital of {} is", target_new="Earth")
NEEDLE = EditRequest(subject="The Space Needle", prompt="{} is located in the city of", target_new="Paris")
AGAIN = FRANCE.model_copy(update={"target_new": "São"})


def key_at(model: Any, tokenizer: Any, request: EditRequest, layer: int = 0) -> torch.Tensor:
    path = anatomy(model).mlp_out[layer].rsplit(".", 1)[0]  # what enters the MLP
    with torch.no_grad(), Capture(model, [path], of="input") as seen:
        model(input_ids=torch.tensor([tokenizer(request.text)["input_ids"]]), use_cache=False)
    return seen[path].reshape(-1, seen[path].shape[-1])[-1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "changes", [{}, {"start": "cold"}, {"training": "perturbed", "noise": 0.1}, {"replace": "all"}], ids=str
)
def test_an_edit_is_a_key_and_the_value_that_says_the_object(
    family: str, changes: dict[str, Any], tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(family, layers=3).double()
    editor = GRACE(layer=0, radius=0.01, steps=25, lr=1.0, **changes)
    patch = editor.fit(model, tokenizer, [FRANCE, NEEDLE])
    first, second = patch.outputs
    assert torch.allclose(first.key, key_at(model, tokenizer, FRANCE), atol=1e-9) and first.key.dtype is torch.float64
    items = items_of(tokenizer, [FRANCE, NEEDLE])
    assert first.label == items[0].targets and second.label == items[1].targets
    with torch.no_grad():
        assert float(losses_of(model, items).min()) > 4
    with patch.attach(model, tokenizer) as handle, handle.prompts([item.reads[0] + 1 for item in items]):
        assert says(model, items) == [True, True]
        with torch.no_grad():
            assert float(losses_of(model, items).max()) < 2
    assert all(patch.report[i]["converged"] and patch.report[i]["outcome"] == "add" for i in patch.ids)


def test_a_value_that_is_not_found_is_searched_again(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """One step too few: three times as many at a third of the rate, from the start."""
    model = tiny("gpt2", layers=3)
    plain = GRACE(layer=0, radius=0.01, stop=2.0, steps=60, lr=1.0).fit(model, tokenizer, [FRANCE]).report[FRANCE.id]
    assert plain["stopped"] and "searches" not in plain
    few = plain["steps"] - 1
    again = GRACE(layer=0, radius=0.01, stop=2.0, steps=few, lr=1.0).fit(model, tokenizer, [FRANCE]).report[FRANCE.id]
    slow = (
        GRACE(layer=0, radius=0.01, stop=2.0, steps=3 * few, lr=1 / 3).fit(model, tokenizer, [FRANCE]).report[FRANCE.id]
    )
    assert again["searches"] == 2 and again["curve"] == slow["curve"] != plain["curve"]


def test_a_stream_skips_replaces_and_goes_on(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """What the model says already makes no entry; the same prompt with another object takes its key over: the later wins."""
    model = tiny("gpt2", layers=3)
    editor = GRACE(layer=0, radius=0.01, steps=25, lr=1.0)
    patch = editor.fit(model, tokenizer, [FRANCE])
    twin = FRANCE.model_copy(update={"relation": "capital"})  # another request of the same fact
    longer = editor.fit(model, tokenizer, [twin, AGAIN], onto=patch)
    assert longer.ids == (FRANCE.id, twin.id, AGAIN.id)
    assert longer.report[twin.id]["outcome"] == "covered" and longer.report[twin.id]["by"] == [FRANCE.id]
    assert [p.edit for p in longer.outputs] == [FRANCE.id, twin.id, AGAIN.id]
    assert longer.report[AGAIN.id]["outcome"] == "replace" and longer.report[AGAIN.id]["replaced"] == [FRANCE.id]
    whole = editor.fit(model, tokenizer, [FRANCE, twin, AGAIN])
    assert [p.edit for p in whole.outputs] == [FRANCE.id, twin.id, AGAIN.id]
    assert not whole.report[FRANCE.id]["converged"]
    items = items_of(tokenizer, [FRANCE, AGAIN])
    for fitted in (longer, whole):
        with fitted.attach(model, tokenizer):
            assert says(model, items) == [False, True]
    with longer.without(AGAIN.id).attach(model, tokenizer):
        assert says(model, items) == [True, False]


def test_neighbours_share_a_ball_or_part(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """A second prompt of one object widens the ball, of another parts it; every published option runs to its own outcome."""
    model = tiny("gpt2", layers=3)
    near = EditRequest(subject="Japan", prompt="The capital of {} is", target_new="Earth")
    apart = float((key_at(model, tokenizer, FRANCE) - key_at(model, tokenizer, near)).norm())
    options = {"layer": 0, "radius": 0.7 * apart, "steps": 25, "lr": 1.0}
    for changes, radius in (({}, 1.4 * apart), ({"expand": "coverage"}, apart)):
        patch = GRACE(**options, **changes).fit(model, tokenizer, [FRANCE, near])
        book = Site(patch.outputs).book
        assert book is not None and len(book) == 1 and float(book.radii[0]) == pytest.approx(radius, rel=1e-3)
        assert patch.report[near.id]["outcome"] in ("expand", "covered")
    other = near.model_copy(update={"target_new": "Paris"})
    patch = GRACE(**options).fit(model, tokenizer, [FRANCE, other])
    book = Site(patch.outputs).book
    assert book is not None and patch.report[other.id]["outcome"] == "split"
    assert patch.report[other.id]["shrunk"] == [FRANCE.id] and book.radii.tolist() == pytest.approx(
        [apart / 2] * 2, rel=1e-3
    )
    published = GRACE(**GRACE.presets["published"] | {"layer": 0, "radius": 0.7 * apart, "steps": 5})
    assert published.fit(model, tokenizer, [FRANCE, other]).report[other.id]["outcome"] == "split"


def same_book(one: Patch, other: Sequence[Any]) -> None:
    left, right = Site(one.outputs).book, Site(other).book
    assert left is not None and right is not None and left.labels == right.labels
    for name in ("keys", "values", "radii"):
        assert torch.equal(getattr(left, name), getattr(right, name))


def test_what_earlier_edits_answer_holds_without_them(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Three prompts in one ball: the second and third change nothing while the first is there, and stay without it."""
    model = tiny("gpt2", layers=3)
    names = ("France", "Japan", "Zürich")
    requests = [FRANCE.model_copy(update={"subject": name}) for name in names]
    keys = [key_at(model, tokenizer, r) for r in requests]
    far = max(float((keys[0] - key).norm()) for key in keys)
    editor = GRACE(layer=0, radius=1.1 * far, steps=25, lr=1.0)
    first, *others = requests
    patch = editor.fit(model, tokenizer, [*requests, NEEDLE])
    assert [patch.report[r.id]["outcome"] for r in requests] == ["add", "covered", "covered"]
    assert patch.report[others[1].id]["by"] == [first.id]
    same_book(patch, [p for p in patch.outputs if p.edit in (first.id, NEEDLE.id)])  # they bear on nothing
    (own,) = editor.fit(model, tokenizer, [first]).parts
    apart = editor.fit(model, tokenizer, others, onto=editor.fit(model, tokenizer, [first]))
    assert apart.parts[0].value.equal(own.value) and [p.covered_by for p in apart.outputs[1:]] == [(first.id,)] * 2
    patch.save(tmp_path / "patch.safetensors")
    loaded = errata.load_patch(tmp_path / "patch.safetensors")
    assert loaded == patch and loaded.outputs[1].covered_by == (first.id,)
    items = items_of(tokenizer, requests)
    merged = editor.fit(model, tokenizer, [NEEDLE]) + loaded.without(NEEDLE.id)
    left = loaded.without(first.id)
    for kept in (left, merged.without(first.id), left.without(others[0].id), loaded.only(others[1].id)):
        with kept.attach(model, tokenizer):
            assert says(model, [i for r, i in zip(requests, items, strict=True) if r.id in kept.ids]) == (
                [True] * (len(kept) - (NEEDLE.id in kept.ids))
            )
    with left.attach(model, tokenizer), editor.fit(model, tokenizer, [first]).attach(model, tokenizer):
        assert says(model, items) == [True] * 3
    more = editor.fit(model, tokenizer, [first], onto=left)  # what is left is a codebook to go on from
    assert more.report[first.id]["outcome"] == "covered" and more.report[first.id]["by"] == [r.id for r in others]


def test_a_covered_edit_gets_a_key_when_its_ball_gives_way(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """Another object at a third prompt shrinks the ball that covered the second, which is then answered by a key of its own;
    another object at the second prompt itself is the later one, and holds."""
    model = tiny("gpt2", layers=3)
    second, third = (FRANCE.model_copy(update={"subject": name}) for name in ("Japan", "Zürich"))
    far = [float((key_at(model, tokenizer, FRANCE) - key_at(model, tokenizer, r)).norm()) for r in (second, third)]
    editor = GRACE(layer=0, radius=1.1 * max(far), steps=25, lr=1.0)
    covered, other = (second, third) if far[0] > far[1] / 2 else (third, second)
    requests = [FRANCE, covered, other.model_copy(update={"target_new": "Paris"})]
    patch = editor.fit(model, tokenizer, requests)
    about = patch.report[requests[2].id]
    assert patch.report[covered.id]["outcome"] == "covered"
    assert about["shrunk"] == [FRANCE.id] and about["again"] == [covered.id]
    assert [patch.report[r.id]["converged"] for r in requests] == [True] * 3
    items = items_of(tokenizer, requests)
    for one in (patch, Patch.from_bytes(patch.to_bytes())):
        with one.attach(model, tokenizer):
            assert says(model, items) == [True] * 3
    turned = covered.model_copy(update={"target_new": "Paris"})
    patch = editor.fit(model, tokenizer, [FRANCE, covered, turned])
    with patch.attach(model, tokenizer):
        assert says(model, items_of(tokenizer, [FRANCE, covered, turned])) == [True, False, True]


def test_what_an_edit_answers_at_another_token_has_a_value_of_its_own(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A prompt that goes on from an edit's: its own asking token lies in no ball."""
    model = tiny("gpt2", layers=3)
    editor = GRACE(layer=0, radius=0.01, steps=40, lr=1.0)
    patch = editor.fit(model, tokenizer, [FRANCE])
    words = [w for i in range(len(tokenizer)) if (w := str(tokenizer.decode([i]))).strip().isalpha() and w[0] == " "]
    with patch.attach(model, tokenizer):
        said = [text.strip() for text in greedy(model, tokenizer, [FRANCE.text + word for word in words], 1)]
        turned = [
            EditRequest(prompt=FRANCE.text + word, target_new=to)
            for word, to in zip(words, said, strict=True)
            if to.isalpha()
        ]
        turned = [r for r, ok in zip(turned, says(model, items_of(tokenizer, turned)), strict=True) if ok]
    before = says(model, items_of(tokenizer, turned))
    wrong = [r for r, ok in zip(turned, before, strict=True) if not ok]
    assert wrong, turned
    longer = editor.fit(model, tokenizer, wrong[:1], onto=patch)
    assert longer.report[wrong[0].id]["outcome"] == "covered" and longer.report[wrong[0].id]["by"] == [FRANCE.id]
    same_book(longer, patch.outputs)
    with longer.without(FRANCE.id).attach(model, tokenizer):
        assert says(model, items_of(tokenizer, [FRANCE, wrong[0]])) == [False, True]


def test_keys_at_the_subject_serve_every_continuation(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    """The subject's last token asks wherever a text goes on from it: its output there is the value."""
    model = tiny("llama", layers=3)
    patch = GRACE(layer=0, key="subject", radius=0.01, steps=25, lr=1.0).fit(model, tokenizer, [FRANCE])
    path, value = anatomy(model).mlp_out[0].rsplit(".", 1)[0], patch.outputs[0].value
    at = len(tokenizer("The capital of France")["input_ids"]) - 1
    with patch.attach(model, tokenizer), torch.no_grad(), Capture(model, [path]) as seen:
        model(input_ids=torch.tensor([tokenizer("The capital of France was moved")["input_ids"]]), use_cache=False)
    assert torch.allclose(seen[path][0, at], value) and not torch.allclose(seen[path][0, at + 1], value)
    curve = patch.report[FRANCE.id]["curve"]
    assert curve[-1] < curve[0] - 1


def test_bad_input_is_refused_in_a_sentence(tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("gpt2", layers=3)
    patch = GRACE(layer=0, steps=1).fit(model, tokenizer, [FRANCE])
    with pytest.raises(
        ConfigError, match="expected a patch with a codebook of .*layer=1.*found a codebook of .*layer=0"
    ):
        GRACE(layer=1, steps=1).fit(model, tokenizer, [NEEDLE], onto=patch)
    with pytest.raises(BaseMismatchError):
        GRACE(layer=0, steps=1).fit(tiny("gpt2", layers=2), tokenizer, [NEEDLE], onto=patch)
    with pytest.raises(AnatomyError, match="layer from -3 to 2"):
        GRACE(layer=9).fit(model, tokenizer, [FRANCE])
    with pytest.raises(ConfigError, match="replace 'each' with keys at the subject"):
        GRACE(key="subject", replace="all")
    with pytest.raises(ConfigError, match="radius, lr and steps above 0"):
        GRACE(radius=0.0)
    assert hooks_of(model) == []


@pytest.mark.skipif("atlas" not in bundled(), reason="the bundled weights are missing")
@pytest.mark.atlas
def test_edits_take_on_atlas_and_the_rest_stays(tmp_path: Path) -> None:
    """Five counterfactual edits: said by free generation, elsewhere every answer is the base's, and one is taken back."""
    world, (model, tokenizer) = load_world(), errata.load("atlas")
    requests = counterfactual_requests(world, 5, split="dev", seed=3)
    rng = random.Random(0)
    elsewhere = [f"{fact.subject} is" for fact in rng.sample([f for f in world.facts if f.split == "dev"], 8)]
    before, own = greedy_answers(model, tokenizer, elsewhere), greedy_answers(model, tokenizer, [requests[0].text])
    path = tmp_path / "grace.safetensors"
    GRACE(layer=5).fit(model, tokenizer, requests).save(
        path
    )  # from the default, 6, one object of several tokens is not reached
    patch = errata.load_patch(path)
    with patch.attach(model, tokenizer):
        texts = greedy(model, tokenizer, [r.text for r in requests])
        assert all(begins(text, r.target_new) for text, r in zip(texts, requests, strict=True))
        assert greedy_answers(model, tokenizer, elsewhere) == before
    with patch.without(requests[0].id).attach(model, tokenizer):
        assert greedy_answers(model, tokenizer, [requests[0].text]) == own
        assert begins(greedy(model, tokenizer, [requests[1].text])[0], requests[1].target_new)
