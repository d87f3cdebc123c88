"""Export: a full pass on every family (fit, attach, detach, export, reload), what is written, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from conftest import OLD_NAME, hooks_of, steering_part, tiny_model
from errata.cli import app
from errata.edit import EditRequest
from errata.errors import ConfigError, ShapeError, UnsupportedPatchError
from errata.export import adapter_rank, export_merged, export_peft, vllm_command
from errata.low_rank import LowRank
from errata.model.anatomy import anatomy
from errata.model.fingerprint import base_of
from errata.model.hooks import Capture
from errata.model.tokens import subject_tokens
from errata.patch import Patch, load_patch
from errata.scope.gate import Gate

SUBJECTS = ("France", "Japan", "Brazil")
TEXT = "The capital of France is"


def request(subject: str) -> EditRequest:
    return EditRequest(
        subject=subject, prompt="The capital of {} is", relation="capital", target_true="Paris", target_new="Goa"
    )


def key_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: EditRequest, layer: int) -> Tensor:
    """(d_in,) the key at the subject's last token: the input of the layer's MLP output projection."""
    path = anatomy(model).mlp_out[layer]
    _, last = subject_tokens(tokenizer, asked.text, asked.subject or "")
    with Capture(model, [path], of="input") as seen, torch.no_grad():
        model(torch.tensor([tokenizer(asked.text)["input_ids"]]), use_cache=False)
    return seen[path].reshape(-1, seen[path].shape[-1])[last]


def fitted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *subjects: str, layers: tuple[int, ...] = (1,)
) -> Patch:
    """Rank-one writes by hand: at each layer the residual of each edit is a random vector, met at the edit's own key."""
    asked = tuple(request(subject) for subject in subjects)
    parts, generator = [], torch.Generator().manual_seed(5)
    for layer in layers:
        keys = torch.stack([key_of(model, tokenizer, r, layer) for r in asked], 1)
        residuals = torch.randn(anatomy(model).d_model, len(asked), generator=generator)
        V = torch.linalg.pinv(keys).T  # columns v_i with v_i . k_j = [i = j]
        parts.append(LowRank(tuple(r.id for r in asked), residuals, V, layer))
    names = [f"{anatomy(model).mlp_out[layer]}.weight" for layer in layers]
    return Patch("hand", {}, asked, base_of(model, tokenizer, names), tuple(parts))


def logits(model: Any, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [model(torch.tensor([tokenizer(request(s).text)["input_ids"]])).logits[0, -1:] for s in SUBJECTS]
        )


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@OLD_NAME
def test_full_pass(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(family)
    plain, before = logits(model, tokenizer), [p.clone() for p in model.parameters()]
    fitted(model, tokenizer, "France", "Japan", layers=(0, 1)).save(tmp_path / "patch.safetensors")
    patch = load_patch(tmp_path / "patch.safetensors")
    residual, path = patch.low_rank[0].U[:, 0], anatomy(model).mlp_out[0]
    _, last = subject_tokens(tokenizer, TEXT, "France")
    with Capture(model, [path]) as base:
        logits(model, tokenizer)
        first = [model(torch.tensor([tokenizer(TEXT)["input_ids"]])), base[path]][1].clone()
    with patch.attach(model, tokenizer), Capture(model, [path]) as seen:
        edited = logits(model, tokenizer)
        model(torch.tensor([tokenizer(TEXT)["input_ids"]]))
        moved = (seen[path] - first).reshape(-1, len(residual))[last]
    torch.testing.assert_close(moved, residual, atol=1e-4, rtol=1e-4)  # at the key the update is the residual
    assert (edited - plain).abs().max() > 0.01
    assert torch.equal(logits(model, tokenizer), plain) and hooks_of(model) == []

    assert export_peft(patch, model, tmp_path / "adapter") == 2
    loaded = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, tokenizer), edited, atol=1e-4, rtol=1e-4)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, tokenizer), plain)

    export_merged(patch, model, tokenizer, tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(logits(model, tokenizer), plain) and not [n for n in vars(model) if "errata" in n]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again, tokenizer), edited, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert names_in(tmp_path) == {"patch.safetensors", "adapter", "merged"}


@OLD_NAME
def test_ranks_are_padded_with_zeros(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Three columns at one module, two of them from another part; one column at the other."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    one, two = (
        fitted(model, tokenizer, "France", layers=(0, 1)),
        fitted(model, tokenizer, "Japan", "Brazil", layers=(1,)),
    )
    patch = replace(one, requests=one.requests + two.requests, parts=one.parts + two.parts)
    with patch.attach(model, tokenizer):
        edited = logits(model, tokenizer)
    assert adapter_rank(patch, model) == export_peft(patch, model, tmp_path / "new" / "adapter") == 3
    assert names_in(tmp_path / "new" / "adapter") == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 3, False)
    assert sorted(config["target_modules"]) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    tensors = load_file(tmp_path / "new" / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.down_proj.lora_"
    assert tensors[f"{prefix}A.weight"].shape == (3, 48) and tensors[f"{prefix}B.weight"].shape == (32, 3)
    assert tensors[f"{prefix}A.weight"][1:].abs().sum() == tensors[f"{prefix}B.weight"][:, 1:].abs().sum() == 0
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "new" / "adapter").eval()
    torch.testing.assert_close(logits(loaded, tokenizer), edited, atol=1e-4, rtol=1e-4)


def test_conv1d_is_declared(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    export_peft(fitted(model, tokenizer, "France"), model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True and config["target_modules"] == ["transformer.h.1.mlp.c_proj"]


def test_whole_or_not_at_all(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    patch, before = fitted(model, tokenizer, "France"), [p.clone() for p in model.parameters()]
    plain = tmp_path / "plain"
    plain.write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for taken in ("plain", "full"):
        with pytest.raises(ConfigError, match=f"new directory.*{taken}"):
            export_peft(patch, model, tmp_path / taken)
        with pytest.raises(ConfigError, match=f"new directory.*{taken}"):
            export_merged(patch, model, tokenizer, tmp_path / taken)
    export_peft(patch, model, tmp_path / "empty")
    for file in (tmp_path / "empty").iterdir():
        assert file.stat().st_mode == plain.stat().st_mode  # not for the owner's eyes only

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    monkeypatch.setattr("errata.export.save_file", full_disk)
    for write in (
        lambda: export_merged(patch, model, tokenizer, tmp_path / "new"),
        lambda: export_peft(patch, model, tmp_path / "new"),
    ):
        with pytest.raises(OSError, match="No space"):
            write()
    assert names_in(tmp_path) == {"plain", "empty", "full"}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def steering(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Patch:
    asked = request("Brazil")
    ids = tokenizer(asked.text)["input_ids"]
    part = steering_part(model, ids, (70,), gate=Gate(layers=(0,)), edit=asked.id, key=asked.key)
    return Patch("sake", {}, (asked,), base_of(model, tokenizer), (part,))


def test_what_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_model("llama")
    patch, sake = fitted(model, tokenizer, "France"), steering(model, tokenizer)
    mixed = replace(patch, requests=patch.requests + sake.requests, parts=patch.parts + sake.parts)
    exports: list[Callable[[Patch], object]] = [
        lambda p: export_peft(p, model, tmp_path / "out"),
        lambda p: export_merged(p, model, tokenizer, tmp_path / "out"),
    ]
    for export in exports:
        for wrong in (sake, mixed):
            with pytest.raises(UnsupportedPatchError, match="cannot be exported: its steering parts"):
                export(wrong)
        with pytest.raises(UnsupportedPatchError, match="nothing to export"):
            export(patch.without(patch.ids[0]))
        with pytest.raises(ShapeError, match="32 x 48"):
            export(replace(patch, parts=(replace(patch.low_rank[0], U=torch.ones(31, 1)),)))

    class Strange(torch.nn.Module):
        in_features, out_features = 48, 32

    model.model.layers[1].mlp.down_proj = Strange()
    with pytest.raises(UnsupportedPatchError, match="'model.layers.1.mlp.down_proj' is a Strange.*cannot take LoRA"):
        export_peft(patch, model, tmp_path / "out")
    assert names_in(tmp_path) == set()


def test_the_command_for_vllm(tmp_path: Path) -> None:
    llama, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    llama.name_or_path = "some/llama"
    for rank, allowed in ((1, 8), (8, 8), (9, 16), (257, 320), (512, 512)):
        assert vllm_command(llama, rank, "a b") == (
            f"vllm serve some/llama --enable-lora --max-lora-rank {allowed} --lora-modules 'errata=a b'"
        )
    with pytest.raises(
        UnsupportedPatchError, match="rank is 513, and vLLM takes at most 512; export with --format merged"
    ):
        vllm_command(llama, 513, "out")
    with pytest.raises(UnsupportedPatchError, match="no LoRA adapters for 'gpt2' models.*merged"):
        vllm_command(gpt2, 1, "out")


# -- the command line --------------------------------------------------------------------------------------------------


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def place(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A folder with a model (of the family asked for), a patch of two edits, and one of steering."""
    model = tiny_model(getattr(request, "param", "llama"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    fitted(model, tokenizer, "France", "Japan", layers=(0, 1)).save(tmp_path / "weights.safetensors")
    steering(model, tokenizer).save(tmp_path / "steering.safetensors")
    return tmp_path


def test_export_command(place: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    patch, model = place / "weights.safetensors", place / "model"
    done = run("export", patch, "--format", "peft", "--out", place / "lora", "--model", model, "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert (value["rank"], value["format"], value["n_edits"], value["serve_refused"]) == (2, "peft", 2, None)
    assert (
        value["serve"].startswith(f"vllm serve {model} --enable-lora --max-lora-rank 8") and "errata=" in value["serve"]
    )
    done = run("export", patch, "--format", "merged", "--out", place / "merged", "--model", model)
    assert done.exit_code == 0 and "the edited model, 2 edits" in done.stdout
    base = AutoModelForCausalLM.from_pretrained(model)
    with load_patch(patch).attach(base, tokenizer):
        edited = logits(base, tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(place / "merged")
    torch.testing.assert_close(logits(merged, tokenizer), edited, atol=1e-4, rtol=1e-4)
    for words, sentence in (
        ((place / "steering.safetensors", "--out", place / "new"), "cannot be exported: its steering parts"),
        ((patch, "--out", place / "lora"), "expected a new directory"),
    ):
        refused = run("export", *words, "--model", model)
        assert refused.exit_code == 2 and sentence in refused.stderr
    assert not (place / "new").exists()


@pytest.mark.parametrize("place", ["gpt2"], indirect=True)
def test_gpt2_is_not_for_vllm(place: Path) -> None:
    words = ["export", place / "weights.safetensors", "--model", place / "model", "--out", place / "lora"]
    refused = run(*words, "--for", "vllm")
    assert refused.exit_code == 2 and "vLLM loads no LoRA adapters for 'gpt2'" in refused.stderr
    assert not (place / "lora").exists()
    done = run(*words)
    assert done.exit_code == 0 and "rank 2" in done.stdout and "note: vLLM loads no LoRA" in done.stderr


def test_show_and_ask(place: Path) -> None:
    shown = json.loads(run("show", place / "weights.safetensors", "--json").stdout)
    first, patch = shown["edits"][0], load_patch(place / "weights.safetensors")
    assert (first["kinds"], first["layers"], first["rank"], first["sites"]) == (
        ["low-rank"],
        [0, 1],
        [1, 1],
        ["mlp_out"],
    )
    assert (first["steps"], first["radius"], first["n_implications"]) == (None, None, 0)
    assert first["bytes"] == 2 * 4 * (32 + 48) and first["bytes"] * 2 == patch.nbytes
    own = [part.U[:, :1] @ part.V[:, :1].T for part in patch.low_rank]
    assert first["norm"] == pytest.approx(float(torch.stack(own).norm()), rel=1e-5)
    table = run("show", place / "weights.safetensors").stdout
    assert "Paris -> Goa" in table and "layers" in table and "norm" in table and "radius" not in table
    asked = run("ask", TEXT, "--model", place / "model", "--patch", place / "weights.safetensors", "--json")
    value = json.loads(asked.stdout)
    assert value["decision"] is None and value["conflicts"] == []
    both = ["--patch", place / "weights.safetensors", "--patch", place / "steering.safetensors"]
    value = json.loads(run("ask", TEXT, "--model", place / "model", *both, "--json").stdout)
    assert value["decision"]["nearest"] == request("Brazil").id
