"""Settings by model, the choice of layers and strengths, and joint and batched fits on the command line."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from conftest import END, tiny_model
from errata.bench.probes import METRICS, probes_of
from errata.bench.trials import ask_unedited, averaged, judge
from errata.cli import app
from errata.edit import EditRequest, write_requests
from errata.editors import get_editor
from errata.editors._models import TABLE, for_model, memit_layers, rome_layer
from errata.editors.memit import MEMIT
from errata.editors.rome import ROME
from errata.errors import ConfigError, RequestError
from errata.locate.averages import Averages, Mean
from errata.locate.choice import Judged, around, choose, layers_near, peak_of, spans_near, trials_in
from errata.model.generate import cut, greedy
from errata.patch import load_patch

QUICK = {"contexts": "bare", "statistics": None, "steps": 40, "kl": 0.0, "norm": 0.0, "clamp": 50.0}
SETS = [f"--set={name}={value}" for name, value in QUICK.items()]
REQUESTS = [  # subjects that end their prompts and objects of one token: what a random model can be taught
    EditRequest(
        subject=subject,
        prompt="Go and see {}",
        target_new=new,
        paraphrase_prompts=(f"You see {subject}", f"Where is {subject}"),
        neighborhood_prompts=("The capital of France is", "Zürich lies in"),
    )
    for subject, new in (("The Needle", "Paris"), ("The Tower", "is"), ("The Gate", "the"), ("The Dome", "in"))
]


# -- the table -----------------------------------------------------------------------------------------------------------


def test_a_model_is_known_by_its_shape_whatever_it_is_called() -> None:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 64}
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", intermediate_size=14336, **sizes))
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", intermediate_size=14336, **sizes))
        medium = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt2", n_embd=1024, n_layer=24, n_head=16, vocab_size=64)
        )
    names = [row.name if (row := for_model(model)) else None for model in (llama, other, medium)]
    assert names == ["llama-3-8b", None, "gpt2-medium"]
    assert (rome_layer(llama), memit_layers(llama)) == (5, (4, 5, 6, 7, 8))
    assert (rome_layer(other), memit_layers(other)) == (11, (9, 10, 11))


def test_the_papers_values() -> None:
    """Meng et al. 2022 and 2023, EasyEdit, AlphaEdit, as the project's notes on the methods give them."""
    papers = [row for row in TABLE if not row.name.startswith("atlas")]
    rome = {row.name: (row.rome.layers[0], row.rome.options["clamp"], row.rome.options["steps"]) for row in papers}
    assert rome["gpt2-medium"] == (8, 3.0, 20) and rome["gpt2-xl"] == (17, 4.0, 20) and rome["gpt-j-6b"] == (5, 4.0, 20)
    assert rome["llama-2-7b"] == rome["llama-3-8b"] == (5, 4.0, 25)
    memit = {row.name: (row.memit.layers, row.memit.options["lam"], row.memit.options["lr"]) for row in papers}
    assert memit["gpt2-xl"] == ((13, 14, 15, 16, 17), 20_000, 0.5)
    assert memit["gpt-j-6b"] == ((3, 4, 5, 6, 7, 8), 15_000, 0.5)
    assert memit["llama-3-8b"] == ((4, 5, 6, 7, 8), 15_000, 0.1)
    xl = {row.name: row.memit.options["lam"] / row.d_key for row in papers if row.family == "gpt2"}
    assert len(set(xl.values())) == 1  # where nothing is published, the share that lambda lets through is GPT-2 XL's


def test_every_row_is_a_preset() -> None:
    for method in ("rome", "memit", "emmet"):
        editor = get_editor(method)
        assert set(editor.presets) == {"published", *(row.name for row in TABLE)}
        for name in editor.presets:
            editor.preset(name)
    assert ROME.preset("gpt2-xl").config == ROME.preset("published", layer=17).config
    assert ROME.preset("llama-2-7b").config.statistics is None and MEMIT.preset("gpt-j-6b").config.clamp == 0.75


# -- the choice ----------------------------------------------------------------------------------------------------------


def averages(*effects: float, kind: Any = "mlp") -> Averages:
    mean = Mean(torch.tensor(effects, dtype=torch.float64), torch.full((len(effects),), 0.01), 30)
    one = Mean(torch.tensor(0.5), torch.tensor(0.1), 30)
    return Averages(kind, 2, (), 30, one, one, one, {"last subject": mean})


def test_the_peak_is_not_the_last_layer() -> None:
    peak = peak_of(averages(0.1, 0.3, 0.2, 0.9))
    assert (peak.layer, peak.effect, peak.window, peak.n) == (1, 0.3, 2, 30) and peak.half == pytest.approx(0.01)
    with pytest.raises(RequestError, match="trace with kind 'mlp'"):
        peak_of(averages(0.1, 0.3, kind="hidden"))


def test_layers_around_the_peak() -> None:
    assert layers_near(1, 8) == (1, 0, 2, 3) and layers_near(6, 8) == (6, 5, 4)
    assert layers_near(17, 48)[:3] == (17, 16, 18) and len(layers_near(17, 48)) == 13
    assert spans_near(3, 8) == ((2, 3), (1, 2), (3, 4), (0, 1), (4, 5), (3,), (1, 2, 3))
    assert spans_near(0, 8) == ((0,), (0, 1), (1, 2))
    assert spans_near(17, 48)[0] == (13, 14, 15, 16, 17)  # MEMIT's own layers in GPT-2 XL


def judging(scores: Mapping[Any, float]) -> Any:
    """Efficacy by layer, times what the clamp does."""
    return lambda o: Judged(scores[o["layer"]] * {4.0: 1.0, 8.0: 1.02, 2.0: 0.5}[o.get("clamp", 4.0)], None, None, 10)


def test_a_default_gives_way_only_to_more_than_the_margin() -> None:
    layers = [{"layer": 3}, {"layer": 2}, {"layer": 4}]
    done: list[int] = []
    near = choose(layers, {}, {}, judging({3: 0.895, 2: 0.9, 4: 0.8}), done=done.append)
    assert near.best.options == {"layer": 3} and done == [1, 2, 3]
    far = choose(layers, {"clamp": (2.0, 8.0)}, {"clamp": 4.0}, judging({3: 0.7, 2: 0.9, 4: 0.8}))
    assert (
        far.best.options == {"layer": 2, "clamp": 8.0}
        and trials_in(layers, {"clamp": (2.0, 8.0)}) == len(far.trials) == 5
    )
    assert "layer 2: S 0.900" in far.reasons[0] and "clamp=8: S 0.918, +0.018" in far.reasons[1]
    kept = choose(layers, {"clamp": (2.0, 8.0)}, {"clamp": 4.0}, judging({3: 0.2, 2: 0.3, 4: 0.25}))
    assert kept.best.options == {"layer": 2} and "the default stays, 8 would give +0.006" in kept.reasons[1]


def test_score_is_the_harmonic_mean_of_what_is_known() -> None:
    assert Judged(1.0, 0.5, 0.25, 9).score == pytest.approx(3 / 7)
    assert Judged(1.0, None, 0.25, 9).score == pytest.approx(0.4) and Judged(0.0, 1.0, 1.0, 9).score == 0
    assert around({"clamp": 4.0, "kl": 0.0, "lam": None}, dict.fromkeys(("clamp", "kl", "lam"), (0.5, 2.0))) == {
        "clamp": (2.0, 8.0)
    }


@pytest.mark.parametrize("single", [True, False])
def test_trials_are_judged_as_generation_would(single: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama", 3)
    patch = ROME(layer=0, **QUICK).fit(model, tokenizer, REQUESTS)
    found = judge(model, tokenizer, patch, ask_unedited(model, tokenizer, REQUESTS), single=single, batch=5)
    probes = list(probes_of(REQUESTS))
    before = greedy(model, tokenizer, [q.probe.prompt for q in probes], 6)
    alone = {r.id: get_only(patch, r.id) if single else patch for r in REQUESTS}
    said: dict[str, dict[str, list[bool]]] = {}
    for question, plain in zip(probes, before, strict=True):
        probe = question.probe
        with alone[question.case].attach(model, tokenizer):
            [text] = greedy(model, tokenizer, [probe.prompt], 6)
        wanted = probe.expected[0] if probe.expected else cut(plain)
        if wanted:
            same = text.lstrip().startswith(wanted)
            said.setdefault(METRICS[probe.kind], {}).setdefault(question.case, []).append(same)
    means = {kind: sum(sum(o) / len(o) for o in by.values()) / len(by) for kind, by in said.items()}
    assert found["efficacy"] == means["efficacy"] > 0
    assert found["generalization"] == pytest.approx(means["generalization"])


def get_only(patch: Any, edit: str) -> Any:
    for other in patch.ids:
        patch = patch if other == edit else patch.without(other)
    return patch


# -- the commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, _bpe: str) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("tune")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe), bos_token=END, eos_token=END, pad_token=END
    )
    tiny_model("gpt2", 4).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_requests(folder / "requests.jsonl", REQUESTS)
    return SimpleNamespace(model=str(folder / "model"), requests=str(folder / "requests.jsonl"))


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def json_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


@pytest.mark.parametrize(("method", "layers"), [("rome", "layer"), ("memit", "layers")])
def test_tune_then_fit(method: str, layers: str, place: SimpleNamespace, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen.json"
    sets = [*SETS, *(["--set=lam=0.01"] if method == "memit" else [])]
    command = ("tune", "-m", place.model, "--method", method, "--requests", place.requests, "--out", chosen, *sets)
    value = json_of(run(*command, "--json"))
    assert json.loads(chosen.read_text()) == value and value["n_edits"] == 4
    best = max(trial["S"] for trial in value["trials"])
    assert value["judged"]["S"] >= best - 0.01 and value["judged"]["efficacy"] > 0
    assert (
        value["options"]["contexts"] == "bare" and value["options"]["statistics"] is None and layers in value["options"]
    )
    assert f"layer {value['traced']['peak']}: restoring the MLPs of 1 layers" in value["reasons"][0]
    patch = tmp_path / "p.safetensors"
    run_fit = ("fit", place.requests, "-m", place.model, "--method", method, "--config", chosen, "--out", patch)
    config = json_of(run(*run_fit, "--json"))["config"]
    assert {name: config[name] for name in value["options"]} == value["options"]
    other = run("fit", place.requests, "-m", place.model, "--config", chosen, "--out", patch)
    assert other.exit_code == 2 and f"holds options of {method}, not of sake" in other.stderr


def test_fine_tuning_within_a_norm_is_tuned_from_the_published_bound_on(place: SimpleNamespace, tmp_path: Path) -> None:
    """Each edit with weights of its own: two whose weights would get in each other's way are judged as if alone."""
    chosen = tmp_path / "chosen.json"
    sets = ("--set=norm=linf", "--set=lr=0.02", "--set=steps=20")
    value = json_of(
        run("tune", "-m", place.model, "--method", "ft", "--requests", place.requests, "--out", chosen, *sets, "--json")
    )
    bounds = [t["options"]["eps"] for t in value["trials"] if t["varied"] == "eps"]
    assert bounds == pytest.approx([0.004, 0.008, 0.016]) and {"lr", "steps"} <= set(value["options"])
    assert value["options"]["eps"] >= 0.002 and not any(t["varied"] in ("lr", "steps") for t in value["trials"])
    by_layer = [t["options"]["layers"] for t in value["trials"] if t["varied"] == "layers"]
    assert value["options"]["layers"] in by_layer and all(len(layers) == 1 for layers in by_layer)
    patch = tmp_path / "p.safetensors"
    fit = run("fit", place.requests, "-m", place.model, "--method", "ft", "--config", chosen, "--out", patch, "--json")
    assert json_of(fit)["config"]["eps"] == value["options"]["eps"]
    from errata.cli.common import load

    model, tok = load(str(place.model), None, None, None)
    editor = get_editor("ft")(**{**value["options"], "layers": tuple(value["options"]["layers"])})
    each = [
        judge(model, tok, editor.fit(model, tok, [r], seed=0), ask_unedited(model, tok, [r]), single=False)
        for r in REQUESTS
    ]
    means = averaged(each)
    assert value["judged"]["efficacy"] == pytest.approx(means["efficacy"])
    assert value["judged"]["generalization"] == pytest.approx(means["generalization"])


def test_means_over_edits_are_of_those_that_have_probes() -> None:
    each = [{"efficacy": 1.0, "generalization": 0.5}, {"efficacy": 0.0, "generalization": None}]
    assert averaged(each) == {"efficacy": 0.5, "generalization": 0.5, "specificity": None}


def test_tune_says_what_it_lacks(place: SimpleNamespace, tmp_path: Path) -> None:
    without = run("tune", "-m", place.model)
    assert without.exit_code == 2 and "for Atlas only" in without.stderr
    write_requests(tmp_path / "r.jsonl", [REQUESTS[0].model_copy(update={"target_true": "Nowhere at all"})])
    unknown = run("tune", "-m", place.model, "--requests", tmp_path / "r.jsonl", *SETS, "--out", tmp_path / "o.json")
    assert (
        unknown.exit_code == 2 and "knows none of the 1 facts" in unknown.stderr and not (tmp_path / "o.json").exists()
    )
    (tmp_path / "bad.json").write_text("[1]")
    bad = run("fit", place.requests, "-m", place.model, "--config", tmp_path / "bad.json", "--out", tmp_path / "p")
    assert bad.exit_code == 2 and 'expected {"method": ..., "options": {...}}' in bad.stderr


def test_joint_methods_are_fitted_in_one_call(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int | None]] = []
    fit = MEMIT.fit

    def counted(self: Any, model: Any, tokenizer: Any, requests: Any, **kw: Any) -> Any:
        calls.append((len(requests), self.config.batch_size))
        return fit(self, model, tokenizer, requests, **kw)

    monkeypatch.setattr(MEMIT, "fit", counted)
    out = tmp_path / "p.safetensors"
    command = ("fit", place.requests, "-m", place.model, "--method", "memit", "--out", out, *SETS, "--set=lam=0.01")
    assert json_of(run(*command, "--batch", "3", "--json"))["n_edits"] == 4 and calls == [(4, 3)]
    assert len(load_patch(out)) == 4 and list(tmp_path.iterdir()) == [out]

    def interrupted(self: Any, *args: Any, **kw: Any) -> Any:
        fit(self, *args, **kw)
        raise KeyboardInterrupt

    out.unlink()
    monkeypatch.setattr(MEMIT, "fit", interrupted)
    stopped = run(*command)
    assert stopped.exit_code == 130 and "nothing is kept" in stopped.stderr and not list(tmp_path.iterdir())


def test_independent_edits_are_fitted_in_batches_and_resumed(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    fit = ROME.fit

    def stops_at(n: int) -> Any:
        def stopping(self: Any, model: Any, tokenizer: Any, requests: Any, **kw: Any) -> Any:
            if len(sizes) == n:
                raise KeyboardInterrupt
            sizes.append(len(requests))
            return fit(self, model, tokenizer, requests, **kw)

        return stopping

    def command(name: str, batch: int) -> tuple[Any, ...]:
        out = tmp_path / name
        return ("fit", place.requests, "-m", place.model, "--method", "rome", *SETS, "--batch", batch, "--out", out)

    monkeypatch.setattr(ROME, "fit", stops_at(1))
    assert run(*command("a", 3)).exit_code == 130 and sizes == [3] and (tmp_path / "a.partial").exists()
    monkeypatch.setattr(ROME, "fit", stops_at(9))
    other = run(*command("a", 2))
    assert other.exit_code == 2 and "begun with another batch" in other.stderr
    value = json_of(run(*command("a", 3), "--json"))
    assert value["n_resumed"] == 3 and sizes == [3, 1] and not (tmp_path / "a.partial").exists()
    run(*command("b", 3))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ConfigError, match="no option 'batch'"):
        ROME(batch=3)
    assert replace(ROME(layer=1).config).layer == 1
