"""What the editors that learn share: training that resumes to the same weights, artefacts, and what they refuse."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from errata.bench.methods import resolved
from errata.bench.preset import get_preset
from errata.bench.worker import editor_of
from errata.cli.fit import make_editor
from errata.editors import _learned, get_editor
from errata.editors._learned import Batches, LearnedConfig, LearnedEditor, Learner, read_artefact
from errata.errors import BaseMismatchError, ConfigError, RecordError
from errata.model.loading import bundled
from errata.patch import Patch
from errata.training import TrainingItem, read_items, write_items

Tiny = Callable[..., Any]
ITEMS = [TrainingItem(f"The number after {i} is", str(i + 1), str(i + 2), (f"After {i} comes",)) for i in range(20)]


class ToyLearner(Learner):
    def __init__(self, n: int, config: LearnedConfig, seed: int):
        self.module = nn.Linear(3, 1)
        self.optimisers = {"main": torch.optim.Adam(self.module.parameters(), config.lr)}
        self.batches, self.notes = Batches(n, config.batch, seed), {"margin": 1.0}

    def step(self, number: int) -> float:
        x = torch.tensor([[i, self.batches.draws(number).random(), 1.0] for i in self.batches.at(number)])
        loss = (self.module(x) - 1).square().mean() * self.notes["margin"]
        self.optimisers["main"].zero_grad()
        loss.backward()
        self.optimisers["main"].step()
        return float(loss.detach())

    def validate(self) -> dict[str, float]:
        self.notes["margin"] *= 0.8
        return {"margin": self.notes["margin"]}


class Toy(LearnedEditor[LearnedConfig]):
    method = "toy"
    summary = "learns nothing"
    Config = LearnedConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"toy-cf": {"name": "toy-cf"}}

    def learner(
        self, model: Any, tokenizer: Any, items: Sequence[TrainingItem], held_out: Sequence[TrainingItem], seed: int
    ) -> Learner:
        assert not torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters())
        return ToyLearner(len(items), self.config, seed)

    def fit(self, model: Any, tokenizer: Any, requests: Any, **_: Any) -> Patch:
        raise NotImplementedError


def toy(**changes: Any) -> Toy:
    return Toy(**{"steps": 30, "batch": 3, "every": 7, "held_out": 4} | changes)


def test_stopped_and_resumed_is_the_same_training(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimiser states, notes and the curve of a run that was killed between checkpoints, and one stopped by the clock."""
    model, drawn = tiny("gpt2"), torch.get_rng_state()
    weight = next(model.parameters())
    figures = list[tuple[int, dict[str, float]]]()
    whole = toy().train(model, tokenizer, ITEMS, tmp_path / "a", watch=lambda n, f: figures.append((n, f)))
    assert torch.equal(torch.get_rng_state(), drawn) and weight.requires_grad
    assert [n for n, _ in figures] == [7, 14, 21, 28, 30] and figures[-1][1]["margin"] == pytest.approx(0.8**5)
    monkeypatch.setattr(_learned, "KEEP_SECONDS", 0.0)

    def kill(done: int, total: int) -> None:
        if done == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy().train(model, tokenizer, ITEMS, tmp_path / "b", progress=kill)
    header, _ = read_artefact(tmp_path / "b" / "toy.checkpoint")
    assert header["step"] == 17 and not (tmp_path / "b" / "toy.safetensors").exists()
    partial = toy().train(model, tokenizer, ITEMS, tmp_path / "b", minutes=0)
    assert read_artefact(partial)[0]["steps"] == 17
    seen = list[tuple[int, int]]()
    again = toy().train(model, tokenizer, ITEMS, tmp_path / "b", progress=lambda *at: seen.append(at))
    assert seen[0] == (18, 30) and seen[-1] == (30, 30)
    (one, weights), (other, resumed) = read_artefact(whole), read_artefact(again)
    assert all(torch.equal(t, resumed[n]) for n, t in weights.items()) and weights.keys() == resumed.keys()
    assert one | {"seconds": 0} == other | {"seconds": 0} and one["steps"] == 30
    states = [read_artefact(tmp_path / run / "toy.checkpoint")[1] for run in "ab"]
    assert "optimiser.main.0.exp_avg" in states[0]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    different = toy().train(model, tokenizer, ITEMS, tmp_path / "c", seed=1)
    assert not torch.equal(read_artefact(different)[1]["weight"], weights["weight"])


def test_training_seeds_no_other_devices_generators(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.manual_seed` would: that of every device, for good. The draws on the CPU are those of the seed all the same."""
    model, seeded = tiny("gpt2"), list[int]()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    path = toy(steps=1, lr=1e-9).train(model, tokenizer, ITEMS, tmp_path, seed=5)
    assert seeded == []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        assert torch.allclose(read_artefact(path)[1]["weight"], nn.Linear(3, 1).weight, atol=1e-6)


def test_what_training_and_loading_refuse(tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny("gpt2")
    path = toy(steps=2).train(model, tokenizer, ITEMS, tmp_path)
    with pytest.raises(ConfigError, match="of a training with another seed"):
        toy(steps=2).train(model, tokenizer, ITEMS, tmp_path, seed=1)
    with pytest.raises(ConfigError, match="of a training with another items"):
        toy(steps=2).train(model, tokenizer, ITEMS[:-1], tmp_path)
    with pytest.raises(ConfigError, match="more than the 20 prompts that are held out"):
        toy(held_out=20).train(model, tokenizer, ITEMS, tmp_path)
    with pytest.raises(ConfigError, match="run `errata train toy --model MODEL --data FILE --set steps=30 .*`, or"):
        toy().trained(model, tokenizer)
    with pytest.raises(ConfigError, match="`errata train toy --model MODEL --data FILE --preset toy-cf`"):
        Toy.preset("toy-cf").trained(model, tokenizer)
    with pytest.raises(
        BaseMismatchError, match="is for another model: expected a model with .*on which this editor was trained"
    ):
        toy(artefact=str(path)).trained(tiny("gpt2", layers=3), tokenizer)
    config, header, tensors = Toy(artefact=str(path)).trained(model, tokenizer)
    assert (config.steps, config.batch, config.artefact) == (2, 3, str(path)) and header["name"] == "toy"
    assert set(tensors) == {"weight", "bias"}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    for wrong in (bytes(data), bytes(data[:-5]), b"", b"\0" * 16):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(ConfigError, match="train again"):
            toy(artefact=str(tmp_path / "wrong")).trained(model, tokenizer)
    with pytest.raises(ConfigError, match="expected steps, batch"):
        toy(steps=0)


def test_the_default_place(
    tiny: Tiny, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache by model; beside the model where it is there."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    model, other = tiny("gpt2"), tiny("llama")
    folder = _learned.default_folder(model, tokenizer)
    assert folder != _learned.default_folder(other, tokenizer)
    path = toy(steps=1).train(model, tokenizer, ITEMS, folder)
    assert toy().artefact_path(model, tokenizer) == path and toy().trained(model, tokenizer)[1]["steps"] == 1
    model.config._name_or_path = str(tmp_path)
    beside = tmp_path / "errata-toy.safetensors"
    beside.write_bytes(path.read_bytes())
    assert toy().artefact_path(model, tokenizer) == beside


def test_batches_are_epochs() -> None:
    batches = Batches(7, 3, seed=0)
    seen = [i for step in range(7) for i in batches.at(step)]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7)) and seen[:7] != seen[7:14]
    assert Batches(7, 3, seed=0).at(4) == batches.at(4) and Batches(7, 3, seed=1).at(0) != batches.at(0)


def test_items_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    item = replace(ITEMS[0], locality=(("Else\u2028where", "Goa"), ("Nowhere", None)))
    write_items(path, [item, ITEMS[1]])
    assert read_items(path) == [item, ITEMS[1]]
    for wrong in (
        '{"prompt": "a"}',
        '{"prompt": "a", "target_new": "b", "locality": ["c"]}',
        '{"prompt": "a", "target_new": "b", "locality": ["cd"]}',
        '{"prompt": "a", "target_new": "b", "locality": [["c", 1]]}',
        '{"prompt": "a", "target_new": "b", "rephrases": "cd"}',
        "[]",
        "{",
        '{"prompt": " ", "target_new": "b"}',
    ):
        path.write_text(f"\n{wrong}\n", encoding="utf-8")
        with pytest.raises(RecordError, match="line 2"):
            read_items(path)
    with pytest.raises(RecordError, match="cannot read the training items"):
        read_items(tmp_path / "none")


@pytest.mark.parametrize("name", ["rome-counterfact", "ke-fever", "ke-logits", "grace-zsre"])
@pytest.mark.parametrize("model_name", ["atlas", "gpt2-xl"])
def test_the_named_command_writes_what_the_fit_looks_for(
    model_name: str, name: str, tiny: Tiny, tokenizer: PreTrainedTokenizerFast
) -> None:
    """For every method of a benchmark that learns: the preset, or the options, of the command are those of its artefact."""
    model = tiny("gpt2")
    model.config._name_or_path = str(bundled().get(model_name, model_name))
    methods = [m for m in get_preset(name).methods if get_editor(m.editor).learns]
    assert methods
    for method in methods:
        editor: Any = editor_of(resolved(method, model, model_name))
        with pytest.raises(ConfigError, match="run `") as caught:
            editor.trained(model, tokenizer)
        words = shlex.split(str(caught.value).split("`")[1])
        assert words[:5] == ["errata", "train", method.editor, "--model", model_name]
        options = dict(zip(words[5::2], words[6::2], strict=True))
        assert options.get("--data") == (None if model_name in bundled() else "FILE")
        made = make_editor(method.editor, options.get("--preset"), [options["--set"]] if "--set" in options else [])
        assert made.name == editor.name
    changed: Any = get_editor("ke")(steps=7, name="mine", layers=(0, 1))
    assert changed._command(model).endswith(" --set name=mine --set steps=7 --set 'layers=[0, 1]'")
