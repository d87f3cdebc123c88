"""Taking edits back: what the inverse edit leaves behind, and what detaching does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import SENTENCES, tiny_model
from errata.bench.flexibility import flexibility, inverse
from errata.cli import app
from errata.edit import EditRequest, write_requests
from errata.editors._weights import statistics_of
from errata.editors.memit import MEMIT
from errata.editors.rome import ROME
from errata.errors import RequestError
from errata.merge import merge
from errata.model.statistics import key_statistics

QUICK = {"contexts": "bare", "statistics": None, "steps": 40, "kl": 0.0, "norm": 0.0, "clamp": 50.0}
PROMPT = "Go and see {}"
TEXTS = [*SENTENCES, *(f"{a} {b}" for a in SENTENCES for b in SENTENCES)]


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


def test_the_inverse_is_fitted_with_the_first_statistics(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C is not gathered anew after edits, though MEMIT's lower layers change the keys of its higher ones."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    model = tiny_model("gpt2", 3)
    gathered = key_statistics(model, tokenizer, TEXTS, [0, 1])
    editor = MEMIT(layers=(0, 1), **{**QUICK, "statistics": "auto"})
    before = model.transformer.h[0].mlp.c_proj.weight.clone()
    with merge(editor.fit(model, tokenizer, requests({})), model, tokenizer):
        there = model.transformer.h[0].mlp.c_proj.weight.clone()
        again = statistics_of(editor.config, model, tokenizer, [0, 1])
        assert torch.equal(model.transformer.h[0].mlp.c_proj.weight, there) and not torch.equal(there, before)
    assert all(torch.equal(again[layer].matrix, gathered[layer].matrix) for layer in (0, 1))
    found = flexibility(model, tokenizer, editor, requests({}))
    assert found["restored"] and len(list(tmp_path.glob("**/layer-*"))) == 2


def test_the_inverse_of_a_request(tokenizer: PreTrainedTokenizerFast) -> None:
    [request, *_] = requests({"The Needle": "Seattle"})
    back = inverse(request)
    assert (back.target_new, back.target_true, back.key) == ("Seattle", "Paris", request.key)
    assert inverse(back).id == request.id
    with pytest.raises(RequestError, match="old object of 'Go and see The Needle'"):
        inverse(request.model_copy(update={"target_true": None}))


@pytest.fixture
def place(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A folder with a model and requests."""
    tiny_model("gpt2", 3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_requests(tmp_path / "requests.jsonl", requests({}))
    return tmp_path


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(place: Path) -> None:
    sets = ["--set=layer=1", *(f"--set={name}={value}" for name, value in QUICK.items())]
    asked = ("-m", place / "model", "--method", "rome", "--requests", place / "requests.jsonl", *sets)
    done = run("flexibility", *asked, "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert value["restored"] and value["detached"]["kl.prob"] == 0.0 < value["inverse"]["kl.prob"]
    assert "detached: restored bit for bit" in run("flexibility", *asked).stdout
    without = run("flexibility", "-m", place / "model")
    assert without.exit_code == 2 and "give --requests" in without.stderr


def test_single_edits_are_verified_alone(place: Path) -> None:
    sets = [f"--set={name}={value}" for name, value in QUICK.items()]
    asked = (
        "verify",
        "-m",
        place / "model",
        "--requests",
        place / "requests.jsonl",
        "--unrelated",
        "0",
        *sets,
        "--json",
    )
    value = json.loads(run(*asked, "--method", "rome", "--single").stdout)
    assert value["single"] and value["restored"] and value["n_edits"] == value["efficacy"]["n"] == 3
    assert value["specificity"]["protocol"].startswith("specificity.generate") and value["locality"]["value"] is None
    assert value["efficacy"]["protocol"].endswith("each edit alone")
    assert not json.loads(run(*asked, "--method", "rome").stdout)["single"]
    joint = run(*asked, "--method", "memit", "--single")
    assert joint.exit_code == 2 and "memit edits are written together" in joint.stderr
