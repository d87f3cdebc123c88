"""Loading by name, states of many texts, and what identifies a base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from errata.errors import AnatomyError, BaseMismatchError, ConfigError, ShapeError, UnknownModelError
from errata.model import loading, tokens
from errata.model.anatomy import anatomy
from errata.model.fingerprint import base_of, check_base, tensor_hash, tokenizer_hash, weights_hash
from errata.model.hooks import intervene
from errata.model.states import last_states, states_at

Tiny = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerFast
TEXTS = ["The capital of France is", "Zürich", "The Space Needle is located in the city of", "x"]


@pytest.fixture
def saved(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model directory with half-precision weights."""
    tiny("gpt2").to(torch.float16).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_local_directory_and_dtypes(saved: Path) -> None:
    model, tokenizer = loading.load(str(saved))
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer("The capital")["input_ids"]
    for name, dtype in (("bfloat16", torch.bfloat16), ("auto", torch.float16), (torch.float64, torch.float64)):
        assert loading.load(saved, dtype=name)[0].dtype == dtype


@pytest.mark.parametrize("dtype", ["float99", "int8", "nn", torch.int64])
def test_bad_dtype(saved: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="expected dtype 'float32'"):
        loading.load(saved, dtype=dtype)


def test_bundled_models_come_first(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "bundled", lambda: {"atlas": saved})
    (tmp_path / "atlas").mkdir()
    monkeypatch.chdir(tmp_path)
    assert loading.load("atlas")[0].config.model_type == "gpt2"
    with pytest.raises(UnknownModelError, match=r"'altas', which .*; did you mean 'atlas'\?"):
        loading.load("altas")


@pytest.mark.parametrize("name", ["no/such-model", "not a name!", ""])
def test_unknown_names_say_what_was_tried(name: str) -> None:
    with pytest.raises(UnknownModelError, match=r"expected a bundled model.*local directory.*, found") as caught:
        loading.load(name)
    assert "\n" not in str(caught.value)


def test_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="which the local directory does not give"):
        loading.load(str(tmp_path))


def test_states_equal_hidden_states_of_each_row_alone(tiny: Tiny, family: str, tokenizer: Tokenizer) -> None:
    model = tiny(family)
    rows = tokens.token_ids(tokenizer, TEXTS)
    positions = [[0, -1], [-1], [], [0]]
    sites: list[int | str] = [0, -1, "final"]
    got = states_at(model, rows, positions, sites, batch_tokens=40)
    for i, row in enumerate(rows):
        with torch.no_grad():
            hidden = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        assert got[-1][i].shape == (len(positions[i]), 32)
        for site, expected in ((0, hidden[1][0]), ("final", hidden[-1][0])):
            torch.testing.assert_close(got[site][i], expected[positions[i]], atol=1e-5, rtol=1e-5)
    for end in sites:  # a block that a pass ends in spares its MLP the tokens that are not read; others do not
        ended = states_at(model, rows, positions, [end], batch_tokens=40)[end]
        for states, own in zip(ended, got[end], strict=True):
            torch.testing.assert_close(states, own, atol=1e-5, rtol=1e-5)


def test_last_states(tiny: Tiny, sentencepiece: Tokenizer) -> None:
    model = tiny("llama")
    states = last_states(model, sentencepiece, TEXTS, site=-1)
    assert states.shape == (4, 32) and states.dtype == torch.float32
    alone = torch.cat([last_states(model, sentencepiece, [text], site=-1) for text in TEXTS])
    torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-5)
    assert last_states(model, sentencepiece, []).shape == (0, 32)
    half = last_states(tiny("llama").to(torch.bfloat16), sentencepiece, TEXTS)
    assert half.dtype == torch.float32


def test_states_stop_early_and_leave_no_trace(tiny: Tiny, tokenizer: Tokenizer) -> None:
    model = tiny("gpt2", resid_pdrop=0.5)
    model.train()
    model.transformer.h[1].eval()
    model.transformer.h[0].requires_grad_(False)
    modes = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    calls: list[int] = []
    handle = model.transformer.h[1].register_forward_hook(lambda *_: calls.append(1))
    rng = torch.get_rng_state()
    states = last_states(model, tokenizer, TEXTS, site=0)
    assert calls == [] and not states.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(states, last_states(model.eval(), tokenizer, TEXTS, site=0))


def test_states_see_interventions(tiny: Tiny, tokenizer: Tokenizer) -> None:
    model = tiny("opt")
    before = last_states(model, tokenizer, TEXTS, site=1)
    with intervene(model, {anatomy(model).site(1): lambda h: h + 1}):
        torch.testing.assert_close(last_states(model, tokenizer, TEXTS, site=1), before + 1)
    seen: list[int] = []  # by a hook in the MLP, which is to see every token

    def watch(h: torch.Tensor) -> torch.Tensor:
        seen.append(h[..., 0].numel())
        return h

    with intervene(model, {anatomy(model).mlp_in[1]: watch}):
        torch.testing.assert_close(last_states(model, tokenizer, TEXTS, site=1), before)
    assert sum(seen) > len(TEXTS)


def test_the_last_mlp_runs_where_states_are_read(
    tiny: Tiny, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    for layer, site in enumerate((0, "final")):
        module, seen = anatomy(model).module(model, anatomy(model).mlp_in[layer]), list[int]()

        def forward(x: torch.Tensor, run: Any = module.forward, seen: list[int] = seen) -> Any:
            seen.append(x[..., 0].numel())
            return run(x)

        with monkeypatch.context() as patched:
            patched.setattr(module, "forward", forward)
            last_states(model, tokenizer, TEXTS, site=site)
        assert sum(seen) == len(TEXTS)


def test_states_at_impossible_places(tiny: Tiny) -> None:
    model = tiny("gpt2")
    with pytest.raises(ShapeError, match="within the 2 tokens of row 1, found 2"):
        states_at(model, [[1], [1, 2]], [[0], [2]], [0])
    with pytest.raises(ShapeError, match="one list of positions per row"):
        states_at(model, [[1]], [], [0])
    with pytest.raises(AnatomyError, match="from -2 to 1"):
        states_at(model, [[1]], [[0]], [2])


def test_base_is_the_same_in_every_dtype(saved: Path) -> None:
    bases = []
    for dtype in ("float16", "bfloat16", "float32"):
        bases.append(base_of(*loading.load(saved, dtype=dtype), parameters=["transformer.wpe.weight"]))
    assert bases[0] == bases[1] == bases[2]
    assert bases[0]["family"] == "gpt2" and bases[0]["vocab_size"] == 384 and not bases[0]["quantised"]
    assert set(bases[0]["weights"]) == {
        "transformer.ln_f.weight",
        "transformer.wte.weight",
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.wpe.weight",
    }


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_tensor_hash_in_every_dtype(stored: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.empty(200_000).uniform_(-9, 2, generator=generator)  # far below what float16 can hold
    weights = (torch.randn(200_000, generator=generator) * scales).to(stored)
    hashes = {tensor_hash(weights.to(dtype)) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    assert len(hashes) == 1
    assert tensor_hash(weights * 1.01) not in hashes and tensor_hash(weights.reshape(2, -1)) not in hashes


def test_the_bits_of_weights_tell_what_their_hash_forgives(tiny: Tiny) -> None:
    model, twin, other = tiny("gpt2", layers=2), tiny("gpt2", layers=2), tiny("gpt2", layers=3)
    assert weights_hash(model) == weights_hash(twin) != weights_hash(other)
    weights = [m.transformer.h[0].mlp.c_fc.weight for m in (model, twin)]
    with torch.no_grad():  # trained a little further: less than bfloat16 shows
        weights[0][0, 0], weights[1][0, 0] = 0.5, 0.5 + 2**-20
    assert tensor_hash(weights[0]) == tensor_hash(weights[1]) and weights_hash(model) != weights_hash(twin)
    with torch.no_grad():
        weights[0][0, 0], weights[1][0, 0] = 0.0, 1e-6
    assert tensor_hash(weights[0]) == tensor_hash(weights[1]) and weights_hash(model) != weights_hash(twin)
    assert weights_hash(model.double()) != weights_hash(model.float())


def test_another_base_is_refused_by_name(tiny: Tiny, tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    model = tiny("gpt2")
    base = base_of(model, tokenizer)
    check_base(base, model, tokenizer)
    with pytest.raises(BaseMismatchError, match=r"family 'gpt2'.*found 'llama'"):
        check_base(base, tiny("llama"), tokenizer)
    with pytest.raises(BaseMismatchError, match=r"n_layers 2.*found 3"):
        check_base(base, tiny("gpt2", layers=3), tokenizer)
    with pytest.raises(BaseMismatchError, match="tokenizer 'sha256"):
        check_base(base, model, sentencepiece)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] += 1
    with pytest.raises(BaseMismatchError, match=r"weight transformer.h.1.mlp.c_proj.weight"):
        check_base(base, model, tokenizer)


def test_quantised_base_is_matched_on_its_config(tiny: Tiny, tokenizer: Tokenizer) -> None:
    base = base_of(tiny("gpt2"), tokenizer)
    model = tiny("gpt2")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    torch.nn.init.ones_(model.transformer.wte.weight)
    with pytest.warns(UserWarning, match="quantised"):
        check_base(base, model, tokenizer)
    assert base_of(model, tokenizer)["weights"] == {}
    other = tiny("gpt2", layers=3)
    other.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(BaseMismatchError, match="n_layers"):
        check_base(base, other, tokenizer)


def test_tokenizer_hash_ignores_what_callers_change(tokenizer: Tokenizer, saved: Path) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=4)
    tokenizer.pad_token = None
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(loading.load(saved)[1])
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_hash(tokenizer) != before
