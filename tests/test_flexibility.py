"""Taking edits back: what the inverse edit leaves behind, and what detaching does."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from errata.bench.flexibility import flexibility, inverse
from errata.edit import EditRequest
from errata.editors.memit import MEMIT
from errata.editors.rome import ROME
from errata.errors import RequestError

QUICK = {"contexts": "bare", "statistics": None, "steps": 40, "kl": 0.0, "norm": 0.0, "clamp": 50.0}
PROMPT = "Go and see {}"


def requests(old: dict[str, str]) -> list[EditRequest]:
    return [
        EditRequest(
            subject=subject,
            prompt=PROMPT,
            target_new=new,
            target_true=old.get(subject, "Nowhere"),
            paraphrase_prompts=(f"You see {subject}",),
            neighborhood_prompts=("The capital of France is", "Zürich lies in"),
        )
        for subject, new in (("The Needle", "Paris"), ("The Tower", "the"), ("The Gate", "is"))
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["rome", "memit"])
def test_inverse_and_detach(family: str, method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(family, 3)
    editor = ROME(layer=1, **QUICK) if method == "rome" else MEMIT(layers=(0, 1), lam=1e-3, **QUICK)
    weights = [p.clone() for p in model.parameters()]
    texts = ("The weather was mild.", "He looked it up twice.")
    found = flexibility(model, tokenizer, editor, requests({}), texts)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not [name for name in vars(model) if name.startswith("_errata")]
    edited, undone, detached = (found[state] for state in ("edited", "inverse", "detached"))
    assert found["restored"] and detached["distance.logits"] == detached["kl.prob"] == 0.0
    assert detached["old_answers.generate"]["value"] == 1.0 and detached["facts_changed.generate"]["value"] == 0.0
    assert edited["old_answers.generate"]["value"] < 1.0 and edited["distance.logits"] > 0.01
    # the inverse edit is another edit, not an undoing: the model is not back where it was
    assert undone["distance.logits"] > 0.01 and undone["kl.prob"] > 0.0
    assert found["n_prompts"] == 3 + 2 + 2 and found["n_edits"] == 3


def test_the_inverse_of_a_request(tokenizer: PreTrainedTokenizerFast) -> None:
    [request, *_] = requests({"The Needle": "Seattle"})
    back = inverse(request)
    assert (back.target_new, back.target_true, back.key) == ("Seattle", "Paris", request.key)
    assert inverse(back).id == request.id
    with pytest.raises(RequestError, match="old object of 'Go and see The Needle'"):
        inverse(request.model_copy(update={"target_true": None}))
