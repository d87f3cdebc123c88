"""Single edits judged many rows at a time, against the same patches attached one after another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from errata.bench.ask import Question
from errata.bench.cases import Probe
from errata.bench.singles import alone, judge_singles
from errata.edit import EditRequest
from errata.errors import RequestError
from errata.low_rank import LowRank
from errata.model.fingerprint import base_of
from errata.model.generate import cut, greedy
from errata.patch import Patch

PROMPTS = ("The capital of France is", "Tokyo", "The highest point on Earth is", "São Paulo lies in")


def joint(model: Any, tokenizer: Any, n: int = 3) -> Patch:
    """A patch of n independent random edits in one low-rank part."""
    generator = torch.Generator().manual_seed(5)
    weight = model.get_submodule("transformer.h.0.mlp.c_proj").weight
    V, U = (0.1 * torch.randn(size, n, generator=generator) for size in weight.shape)
    asked = tuple(EditRequest(prompt=f"{{}} {i}", subject="France", target_new="Rome") for i in range(n))
    part = LowRank(tuple(r.id for r in asked), U, V, 0)
    base = base_of(model, tokenizer, ["transformer.h.0.mlp.c_proj.weight"])
    return Patch("hand", {}, asked, base, (part,), {r.id: {"i": i} for i, r in enumerate(asked)})


def question(patch: Patch, kind: Any, index: int, prompt: str, *expected: str) -> Question:
    return Question("", patch.ids[0], index, Probe(kind, prompt, expected))


def test_rows_are_judged_as_patches_attached_one_by_one(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("gpt2")
    patches = alone(joint(model, tokenizer))
    before = greedy(model, tokenizer, PROMPTS, 12)
    after = []
    for patch in patches:
        with patch.attach(model, tokenizer):
            after.append([cut(text) for text in greedy(model, tokenizer, PROMPTS, 12)])
    kept = [[cut(b) == a for a, b in zip(own, before, strict=True)] for own in after]
    assert 0 < sum(map(sum, kept)) < 12, "some answers should change and some stay"
    questions = [question(p, "neighborhood", i, prompt) for p in patches for i, prompt in enumerate(PROMPTS)]
    for i, patch in enumerate(patches):  # what an edit makes the model say, expected of all edits
        questions += [question(p, "edit", i, PROMPTS[i], after[i][i]) for p in patches if after[i][i]]
        assert patch.report == {patch.ids[0]: {"i": i}} and patch.low_rank[0].rank == 1
    for batch in (1, 5, 64):
        found = judge_singles(model, tokenizer, patches, questions[:12], batch)
        assert set(found) == {"other_subjects"} and found["other_subjects"].n == 3
        assert found["other_subjects"].value == pytest.approx(sum(map(sum, kept)) / 12)
    whole = judge_singles(model, tokenizer, patches, questions, 1)
    assert whole == judge_singles(model, tokenizer, patches, questions, 7)
    assert whole["efficacy"].protocol.endswith("each edit alone")


def test_patches_of_several_edits_and_unknown_edits_are_refused(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("gpt2")
    patch = joint(model, tokenizer)
    with pytest.raises(RequestError, match="1 patches of 0 single edits"):
        judge_singles(model, tokenizer, [patch], [])
    with pytest.raises(RequestError, match="1 questions about others"):
        judge_singles(model, tokenizer, alone(patch)[:1], [question(alone(patch)[1], "edit", 0, "Tokyo", "Rome")])
