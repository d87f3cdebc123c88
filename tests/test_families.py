"""A full pass of the weight editors on every family: fit, attach, detach bit for bit, save, export, reload."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import OLD_NAME, hooks_of, tiny_model
from errata.edit import EditRequest
from errata.editor import Editor
from errata.editors.memit import MEMIT
from errata.editors.rome import ROME
from errata.export import export_merged, export_peft
from errata.patch import load_patch

QUICK = {"contexts": ("{}", "It was said. {}"), "statistics": None, "steps": 25, "kl": 0.0, "norm": 0.0, "clamp": 50.0}
EDITORS: dict[str, Editor[Any]] = {"rome": ROME(layer=1, **QUICK), "memit": MEMIT(layers=(0, 1), lam=1e-3, **QUICK)}
REQUESTS = [  # subjects that end their prompts and objects of one token: what a random model can be taught
    EditRequest(subject=subject, prompt="Go and see {}", target_new=new)
    for subject, new in (("France", "Paris"), ("Mount Everest", "the"))
]


def logits(model: Any, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(2, V) behind each edit prompt."""
    with torch.no_grad():
        rows = [model(torch.tensor([tokenizer(r.text)["input_ids"]])).logits[0, -1] for r in REQUESTS]
    return torch.stack(rows)


def objects(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    ids = [tokenizer(f" {r.target_new}")["input_ids"] for r in REQUESTS]
    assert [len(i) for i in ids] == [1, 1]
    return [i for [i] in ids]


@OLD_NAME
@pytest.mark.parametrize("method", EDITORS)
def test_full_pass(method: str, family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_model(family, 3)
    weights, plain, new = [p.clone() for p in model.parameters()], logits(model, tokenizer), objects(tokenizer)
    EDITORS[method].fit(model, tokenizer, REQUESTS).save(tmp_path / "patch.safetensors")
    assert torch.equal(logits(model, tokenizer), plain) and hooks_of(model) == []

    patch = load_patch(tmp_path / "patch.safetensors")
    with patch.attach(model, tokenizer):
        edited = logits(model, tokenizer)
    gained = edited.log_softmax(-1) - plain.log_softmax(-1)
    assert all(float(gained[i, token]) > 1.0 for i, token in enumerate(new))  # nats
    assert torch.equal(logits(model, tokenizer), plain) and hooks_of(model) == []
    assert not [name for name in vars(model) if name.startswith("_errata")]

    peft = pytest.importorskip("peft")
    assert export_peft(patch, model, tmp_path / "adapter") == 2
    adapted = peft.PeftModel.from_pretrained(tiny_model(family, 3), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(adapted, tokenizer), edited, atol=1e-4, rtol=1e-4)

    export_merged(patch, model, tokenizer, tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again, tokenizer), edited, atol=1e-4, rtol=1e-4)
    assert not [name for name in vars(again) if name.startswith("_errata")] and hooks_of(again) == []
