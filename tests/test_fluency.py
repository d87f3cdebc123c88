"""Fluency and consistency against scikit-learn, hand counts, and sampling without a cache."""

from collections.abc import Callable
from math import log2
from typing import Any

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from conftest import hooks_of
from errata.bench.fluency import TfIdf, consistency, entropy, fluency, generation_entropy, sample
from errata.errors import ConfigError, RequestError
from errata.model.tokens import token_ids

TEXTS = ["Paris is the capital of France.", "The Seine flows through Paris; Paris is old.", "Kyoto was a capital."]


def test_tf_idf_is_that_of_scikit_learn() -> None:
    theirs, ours = TfidfVectorizer().fit(TEXTS), TfIdf.of(TEXTS)
    pair = ["Paris, the old capital, and Lyon", "The capital of France is on the Seine"]
    a, b = theirs.transform(pair).toarray()
    assert ours.cosine(*pair) == pytest.approx(float(a @ b), abs=1e-12)
    assert consistency([pair[0]], [pair[1]], ours) == pytest.approx(100 * float(a @ b), abs=1e-10)
    assert ours.cosine("nothing known", TEXTS[0]) == 0.0
    with pytest.raises(ConfigError, match="texts with words"):
        TfIdf.of(["a", "."])


def test_entropy_by_hand() -> None:
    assert entropy(["a", "b", "a", "b", "a"], 2) == pytest.approx(1.0)
    assert entropy(["a", "a", "a", "a"], 3) == 0.0 and entropy(["a"], 2) == 0.0
    # "x y x y": 2-grams xy 2, yx 1; 3-grams xyx 1, yxy 1
    h2 = -(2 / 3 * log2(2 / 3) + 1 / 3 * log2(1 / 3))
    assert generation_entropy(["x y x y", "x y x y"]) == pytest.approx(h2 / 3 + 2 / 3)
    assert fluency(["x y x y"]) == pytest.approx(100 * (h2 / 3 + 2 / 3))
    with pytest.raises(ConfigError, match="found none"):
        generation_entropy([])


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_sampling_is_seeded_and_its_cache_changes_nothing(
    family: str, tiny: Callable[..., Any], tokenizer: Any
) -> None:
    model = tiny(family).double()
    prompts, state = ["The capital of France is", "Tokyo", "Mount Everest is the highest"], torch.random.get_rng_state()
    greedy = sample(model, tokenizer, prompts, length=14, top_k=1)
    for prompt, text in zip(prompts, greedy, strict=True):
        ids = token_ids(tokenizer, [prompt])[0]
        while len(ids) < 14:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    drawn = [sample(model, tokenizer, prompts, length=14, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), state) and hooks_of(model) == []


def test_a_text_beyond_the_models_positions_is_refused(tiny: Callable[..., Any], tokenizer: Any) -> None:
    with pytest.raises(RequestError):
        sample(tiny("gpt2"), tokenizer, ["Tokyo"], length=500)
