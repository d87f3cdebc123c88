"""Key statistics: the accumulator and the solver against dense float64, the pass against a loop of single texts, the cache."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import SENTENCES, hooks_of, tiny_model
from errata.cli import app
from errata.cli.statistics import layers_of
from errata.errors import AnatomyError, ConfigError, ShapeError, StatisticsError
from errata.maths.covariance import CholeskySolver, SecondMoment
from errata.model import key_pass, statistics
from errata.model.anatomy import anatomy
from errata.model.corpora import Texts, dataset_texts, digest, file_texts, own_texts
from errata.model.hooks import Capture, intervene
from errata.model.states import evaluating
from errata.model.statistics import key_statistics, load_statistics
from errata.model.statistics_files import Store, cache_directory, weights_up_to
from errata.model.tokens import pad, token_ids

TEXTS = [*SENTENCES, *(f"{s} {t}" for s in SENTENCES for t in SENTENCES)]  # 42 texts of many lengths
TWO = ["gpt2", "llama"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache of each test, empty at first; groups of four texts, kept after each."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    monkeypatch.setattr(key_pass, "GROUP", 4)
    monkeypatch.setattr(statistics, "GROUP", 4)
    monkeypatch.setattr(key_pass, "_KEEP_SECONDS", 0.0)
    yield tmp_path / "statistics"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_by_one(model: PreTrainedModel, tokenizer: Any, texts: list[str], layer: int, cap: int = 1024) -> Tensor:
    """The oracle: (n, m) keys of each text alone, without padding."""
    site = anatomy(model).mlp_site(layer)
    rows = []
    for ids in token_ids(tokenizer, texts):
        with torch.no_grad(), evaluating(model), Capture(model, [site], of="input") as seen:
            model(torch.tensor([ids[:cap]]))
        rows.append(seen[site].reshape(-1, seen[site].shape[-1]))
    return torch.cat(rows).double()


# -- the accumulator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 300])
def test_the_accumulator_equals_the_dense_product(width: int) -> None:
    keys = normal(2500, width) + 3
    streamed, other = SecondMoment(width), SecondMoment(width)
    for chunk in torch.split(keys[:1500], [1, 0, 1100, 399]):
        streamed.update(chunk)
    other.update(keys[1500:])
    streamed.merge(other)
    assert streamed.count == 2500
    torch.testing.assert_close(streamed.matrix, keys.T @ keys / 2500, rtol=1e-12, atol=1e-12)
    assert torch.equal(streamed.matrix, streamed.matrix.T)
    again = SecondMoment.of(streamed.total, 2500)
    streamed.update(keys[:9])
    again.update(keys[:9])
    assert torch.equal(again.total, streamed.total)


def test_a_sum_from_elsewhere_goes_on_bit_for_bit() -> None:
    one = SecondMoment(128)
    one.update(normal(37, 128))
    room = torch.empty(128 * 128 + 1, dtype=torch.float64)
    room[1:] = one.total.view(-1)  # memory that is not aligned, as a mapped file's
    two = SecondMoment.of(room[1:].view(128, 128), 37)
    for moment in (one, two):
        moment.update(normal(37, 128, seed=1))
    assert torch.equal(one.total, two.total)
    assert one.to("cpu") is one and two.count == 74


def test_half_precision_keys_are_multiplied_in_float64() -> None:
    keys = normal(500, 20).to(torch.bfloat16)
    moment = SecondMoment(20)
    moment.update(keys)
    torch.testing.assert_close(moment.matrix, keys.double().T @ keys.double() / 500, rtol=1e-13, atol=1e-13)


def test_float32_products_err_as_stated() -> None:
    keys = (normal(20_000, 160) + 1).float()
    exact, quick = SecondMoment(160), SecondMoment(160, product="float32")
    exact.update(keys)
    quick.update(keys)
    error = (quick.matrix - exact.matrix).abs() / (keys.abs().double().T @ keys.abs().double() / 20_000)
    assert 0 < float(error.max()) < 1e-6  # the stated bound is 6.2e-5, in practice about 1e-7
    assert float(error.mean()) < 1e-7


def test_what_cannot_be_added_changes_nothing() -> None:
    moment = SecondMoment(3)
    moment.update(normal(5, 3))
    before = moment.total
    with pytest.raises(StatisticsError, match="finite"):
        moment.update(torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), 3.0]]))
    with pytest.raises(ShapeError, match=r"\(n, 3\), found \(2, 4\)"):
        moment.update(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="width 3 to merge, found 4"):
        moment.merge(SecondMoment(4))
    assert moment.count == 5 and torch.equal(moment.total, before)
    with pytest.raises(StatisticsError, match="at least one key"):
        _ = SecondMoment(3).matrix
    with pytest.raises(ConfigError, match="'float64' or 'float32'"):
        SecondMoment(3, product="bfloat16")


# -- the solver ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [None, 0.0, 0.01])
def test_the_solver_equals_a_dense_solve(jitter: float | None) -> None:
    moment = SecondMoment(40)
    moment.update(normal(200, 40) @ normal(40, 40, seed=1))
    solver = moment.solver(jitter)
    C = moment.matrix
    expected = {None: 1e-6, 0.0: 0.0, 0.01: 0.01}[jitter] * float(C.diagonal().mean())
    assert solver.jitter == pytest.approx(expected)
    shifted = C + solver.jitter * torch.eye(40, dtype=torch.float64)
    rhs = normal(40, 3, seed=2)
    torch.testing.assert_close(solver.solve(rhs), torch.linalg.solve(shifted, rhs), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        solver.solve(rhs[:, 0].float()).float(), solver.solve(rhs)[:, 0].float(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(solver.factor @ solver.factor.T, shifted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ShapeError, match=r"\(40,\)"):
        solver.solve(normal(41))


def test_the_mean_mahalanobis_square_of_keys_is_their_width() -> None:
    keys = normal(300, 30).abs()  # E[k^T C^-1 k] = trace(C^-1 C) = m
    moment = SecondMoment(30)
    moment.update(keys)
    solved = moment.solver(0.0).solve(keys.T)
    assert float((keys.T * solved).sum(0).mean()) == pytest.approx(30, rel=1e-9)


def test_a_singular_matrix_is_refused_with_its_smallest_eigenvalue() -> None:
    with pytest.raises(StatisticsError, match=r"smallest eigenvalue of -0\.5 beside a largest of 2"):
        CholeskySolver(torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)))
    keys = normal(100, 12)
    keys[:, 5] = 0  # a key that is never active
    moment = SecondMoment(12)
    moment.update(keys)
    for refused in (None, 0.0):
        with pytest.raises(StatisticsError, match=r"smallest eigenvalue .*1 of 12 keys are never active.*jitter"):
            moment.solver(refused)
    solved = moment.solver(1e-4).solve(torch.ones(12))  # asked for: taken at its word
    assert float(solved[5]) == pytest.approx(1 / moment.solver(1e-4).jitter)


def test_a_singular_matrix_that_rounding_lets_through_is_refused() -> None:
    for seed in range(20):  # Cholesky succeeds on some of these
        keys = normal(300, 29, seed=seed) @ normal(29, 30, seed=seed + 100)
        with pytest.raises(StatisticsError, match="smallest eigenvalue"):
            CholeskySolver(keys.T @ keys / 300)
    fine = torch.diag(torch.logspace(0, -10, 30, dtype=torch.float64))  # ill conditioned, and no more than that
    assert float(CholeskySolver(fine, jitter=0.0).solve(torch.ones(30))[-1]) == pytest.approx(1e10)


def test_fewer_tokens_than_the_width_are_an_error_whatever_the_jitter() -> None:
    moment = SecondMoment(50)
    moment.update(normal(49, 50))
    for jitter in (None, 0.0, 1.0):
        with pytest.raises(StatisticsError, match="at least 50 tokens .* found 49"):
            moment.solver(jitter)
    moment.update(normal(10, 50, seed=1))
    moment.solver()


# -- the pass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TWO)
def test_the_pass_equals_single_texts_whatever_batch_and_padding(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(family).double()
    keys = one_by_one(model, tokenizer, TEXTS, 1)
    expected = keys.T @ keys / len(keys)
    for batch_tokens, side in ((4096, "right"), (70, "left"), (1, "right")):
        tokenizer.padding_side = side
        made = key_statistics(model, tokenizer, TEXTS, [1], batch_tokens=batch_tokens, cache=False)[1]
        assert made.count == len(keys) == sum(map(len, token_ids(tokenizer, TEXTS)))
        torch.testing.assert_close(made.matrix, expected, rtol=1e-10, atol=1e-12)
    assert not hooks_of(model)


@pytest.mark.parametrize("family", TWO)
def test_keys_do_not_depend_on_the_side_of_the_padding(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(family).double().eval()
    rows, site = token_ids(tokenizer, TEXTS[:8]), anatomy(model).mlp_site(1)
    found: list[Tensor] = []
    for side in ("right", "left"):
        with torch.no_grad():
            key_pass.visit_keys(model, pad(rows, 0, side=side), [site], lambda _, keys: found.append(keys))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def test_every_family(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(family)
    keys = one_by_one(model, tokenizer, TEXTS, 0)
    made = key_statistics(model, tokenizer, TEXTS, [-2], cache=False)[-2]
    assert made.layer == 0 and made.count == len(keys)
    torch.testing.assert_close(made.matrix, keys.T @ keys / len(keys), rtol=1e-3, atol=1e-5)
    made.check(model, 0)


def test_special_tokens_and_position_zero_count(sentencepiece: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama").double()
    keys = one_by_one(model, sentencepiece, TEXTS[:9], 0)
    made = key_statistics(model, sentencepiece, TEXTS[:9], [0], cache=False)[0]
    assert made.count == len(keys) == 9 + sum(map(len, token_ids(sentencepiece, TEXTS[:9], special=False)))
    torch.testing.assert_close(made.matrix, keys.T @ keys / len(keys), rtol=1e-10, atol=1e-12)


def test_texts_are_cut_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("gpt2").double()
    lengths = [min(len(ids), 7) for ids in token_ids(tokenizer, TEXTS)]
    made = key_statistics(model, tokenizer, ["", *TEXTS, "  \n"], [0], n_texts=10, max_tokens_per_text=7, cache=False)[
        0
    ]
    assert made.count == sum(lengths[:10])
    keys = one_by_one(model, tokenizer, TEXTS[:10], 0, cap=7)
    torch.testing.assert_close(made.matrix, keys.T @ keys / len(keys), rtol=1e-10, atol=1e-12)
    enough = sum(lengths[:13]) - 2
    made = key_statistics(model, tokenizer, TEXTS, [0], n_tokens=enough, max_tokens_per_text=7, cache=False)[0]
    assert made.count == sum(lengths[:13])
    short = tiny_model("gpt2", n_positions=5)
    made = key_statistics(short, tokenizer, TEXTS, [0], cache=False)[0]
    assert made.count == sum(min(length, 5) for length in lengths)
    assert made.identity["max_tokens_per_text"] == 5


@pytest.mark.parametrize("family", TWO)
def test_one_pass_over_several_layers_equals_one_layer_at_a_time(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(family, layers=4)
    together = key_statistics(model, tokenizer, TEXTS, [2, 0, 1], cache=False)
    for layer in (0, 1, 2):
        alone = key_statistics(model, tokenizer, TEXTS, [layer], cache=False)[layer]
        assert torch.equal(alone.moment.total, together[layer].moment.total)
    assert not torch.allclose(together[0].matrix, together[1].matrix)


def test_the_forward_pass_ends_before_the_deepest_projection(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama", layers=3)
    called: list[str] = []
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.2", "model.norm"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    key_statistics(model, tokenizer, TEXTS[:4], [0, 1], cache=False)
    assert set(called) == {"model.layers.0.mlp.down_proj"}


def test_attached_changes_do_nothing_and_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("gpt2")
    model.train()
    state = torch.random.get_rng_state()
    plain = key_statistics(model, tokenizer, TEXTS, [1], cache=False)[1]
    block = anatomy(model).site(0)
    with intervene(model, {block: lambda x: x + 1}):
        before = hooks_of(model)
        made = key_statistics(model, tokenizer, TEXTS, [1], cache=False)[1]
        assert hooks_of(model) == before and len(before) == 1
    assert torch.equal(made.moment.total, plain.moment.total)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)


def test_bad_input_to_the_pass(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("gpt2")
    for error, sentence, changes in (
        (AnatomyError, "layer from -2 to 1", {"layers": [2]}),
        (ConfigError, "at least one layer", {"layers": []}),
        (ConfigError, "n_texts of at least 1", {"n_texts": 0}),
        (StatisticsError, "none that is not blank", {"corpus": ["", " "]}),
        (ConfigError, "the one string", {"corpus": "A text."}),
    ):
        with pytest.raises(error, match=sentence):
            key_statistics(model, tokenizer, **({"corpus": TEXTS, "layers": [0]} | changes))  # type: ignore[arg-type]
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="finite keys"):
        key_statistics(model, tokenizer, TEXTS, [0])
    assert not list(cache_directory().glob("*")) and not hooks_of(model)


# -- the cache -----------------------------------------------------------------------------------------------------------


class Interrupt:
    """A progress callback that presses Ctrl-C after so many groups, and remembers what it was told."""

    def __init__(self, after: int = 10**9):
        self.after, self.told = after, [0][:0]

    def __call__(self, done: int, total: int) -> None:
        assert total == len(TEXTS)
        self.told.append(done)
        if len(self.told) > self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("product", ["float64", "float32"])
def test_an_interrupted_pass_goes_on_and_equals_an_uninterrupted_one(
    folder: Path, tokenizer: PreTrainedTokenizerFast, product: str
) -> None:
    model = tiny_model("gpt2", layers=3)
    whole = key_statistics(model, tokenizer, TEXTS, [0, 2], product=product, cache=False)
    with pytest.raises(KeyboardInterrupt):
        key_statistics(model, tokenizer, TEXTS, [0, 2], product=product, progress=Interrupt(5))
    assert len(list(folder.glob("*.partial"))) == len(list(folder.iterdir())) == 2
    with pytest.raises(KeyboardInterrupt):  # a layer that joins in later starts from the beginning, the others wait
        key_statistics(model, tokenizer, TEXTS, [0, 1], product=product, progress=Interrupt(3))
    again = Interrupt()
    made = key_statistics(model, tokenizer, TEXTS, [0, 2], product=product, progress=again)
    assert 4 <= again.told[0] <= 20 and again.told[-1] == len(TEXTS)
    for layer in (0, 2):
        assert made[layer].count == whole[layer].count
        assert torch.equal(made[layer].moment.total, whole[layer].moment.total)
    assert len(list(folder.glob("*.partial"))) == 1  # layer 1's
    one = key_statistics(model, tokenizer, TEXTS, [1, 2], product=product)[1]
    assert torch.equal(one.matrix, key_statistics(model, tokenizer, TEXTS, [1], product=product, cache=False)[1].matrix)
    assert not list(folder.glob("*.partial"))


def test_a_damaged_partial_file_costs_a_warning_and_the_work(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(KeyboardInterrupt):
        key_statistics(model, tokenizer, TEXTS, [0], progress=Interrupt(3))
    [partial] = folder.iterdir()
    partial.write_bytes(partial.read_bytes()[:-100])
    again = Interrupt()
    with pytest.warns(UserWarning, match="truncated or damaged"):
        made = key_statistics(model, tokenizer, TEXTS, [0], progress=again)[0]
    assert again.told[0] == 0
    assert torch.equal(made.matrix, key_statistics(model, tokenizer, TEXTS, [0], cache=False)[0].matrix)


def test_what_is_cached_is_found_and_the_same(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2")
    first = key_statistics(model, tokenizer, TEXTS, [0, 1])
    monkeypatch.setattr(key_pass.Pass, "run", lambda *_: pytest.fail("gathered again"))
    for model_again in (model, tiny_model("gpt2")):
        second = key_statistics(model_again, tokenizer, iter(TEXTS), [1, 0])
        assert list(second) == [1, 0]
        for layer, found in second.items():
            assert found.identity == first[layer].identity
            assert torch.equal(found.matrix, first[layer].matrix)

    def unread() -> list[str]:
        raise AssertionError("the corpus was read")

    monkeypatch.undo()
    monkeypatch.setenv("ERRATA_CACHE", str(folder.parent))
    key_statistics(model, tokenizer, Texts("named", lambda: TEXTS, "1"), [0])
    key_statistics(model, tokenizer, Texts("named", unread, "1"), [0])
    with pytest.raises(AssertionError, match="was read"):
        key_statistics(model, tokenizer, Texts("named", unread, "2"), [0])


def changed(path: str) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        with torch.no_grad():
            model.get_parameter(path).view(-1)[3] += 0.1

    return change


def test_the_key_changes_with_everything_that_changes_the_numbers(
    tokenizer: PreTrainedTokenizerFast, sentencepiece: PreTrainedTokenizerFast
) -> None:
    paths: list[Path] = []

    def key(model: PreTrainedModel, texts: list[str] = TEXTS, layer: int = 1, tok: Any = tokenizer, **kw: Any) -> Path:
        path = Store(None).path(key_statistics(model, tok, texts, [layer], **kw)[layer].identity)
        assert path is not None and path.exists()
        return path

    base = key(tiny_model("gpt2"))
    paths = [
        key(tiny_model("gpt2"), layer=0),
        key(tiny_model("gpt2"), texts=TEXTS[:-1]),
        key(tiny_model("gpt2"), texts=[*TEXTS[:-1], TEXTS[-1] + "!"]),
        key(tiny_model("gpt2"), texts=TEXTS[::-1]),
        key(tiny_model("gpt2"), n_texts=20),
        key(tiny_model("gpt2"), n_tokens=100),
        key(tiny_model("gpt2"), max_tokens_per_text=9),
        key(tiny_model("gpt2"), product="float32"),
        key(tiny_model("gpt2").to(torch.bfloat16)),
        key(tiny_model("gpt2"), tok=sentencepiece),
        key(tiny_model("gpt2", activation_function="relu")),
        key(tiny_model("llama")),
    ]
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_proj.weight", "h.1.ln_2.bias", "h.1.mlp.c_fc.weight"):
        model = tiny_model("gpt2")
        changed(f"transformer.{name}")(model)
        paths.append(key(model))
    assert len({base, *paths}) == 1 + len(paths)
    for name in ("h.1.mlp.c_proj.weight", "h.1.mlp.c_proj.bias", "ln_f.weight"):  # what the keys do not see
        model = tiny_model("gpt2")
        changed(f"transformer.{name}")(model)
        assert key(model) == base


def test_weights_digest_survives_saving_and_sees_integers(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert weights_up_to(again, [0, 1]) == weights_up_to(model, [0, 1])
    assert len(set(weights_up_to(model, [0, 1]).values())) == 2
    digests = set()
    for value in (1, 2**20, 2**20 + 1):  # packed integers differ where bfloat16 would not
        model.model.layers[0].register_buffer("packed", torch.tensor([value], dtype=torch.int32))
        digests.add(weights_up_to(model, [0])[0])
    assert len(digests) == 3


def test_a_weight_quantised_model_has_its_own_statistics(tokenizer: PreTrainedTokenizerFast) -> None:
    quanto = pytest.importorskip("optimum.quanto")

    def quantised(change: bool) -> PreTrainedModel:
        model = tiny_model("llama")
        if change:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight += 0.5
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
        return model

    one, other = quantised(False), quantised(True)
    made = key_statistics(one, tokenizer, TEXTS, [0])[0]
    keys = one_by_one(one, tokenizer, TEXTS, 0)
    torch.testing.assert_close(made.matrix, keys.T @ keys / len(keys), rtol=1e-3, atol=1e-5)
    made.check(quantised(False), 0)
    for stranger in (other, tiny_model("llama")):
        with pytest.raises(StatisticsError, match="another one"):
            made.check(stranger, 0)


def test_statistics_of_another_model_or_layer_are_refused(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("gpt2")
    made = key_statistics(model, tokenizer, TEXTS, [1])[1]
    [path] = folder.iterdir()
    assert torch.equal(load_statistics(path, model, -1).matrix, made.matrix)
    made.check(tiny_model("gpt2").to(torch.bfloat16).float(), 1)
    with pytest.raises(StatisticsError, match="of layer 0, found those of layer 1"):
        made.check(model, 0)
    other = tiny_model("gpt2")
    changed("transformer.h.0.attn.c_attn.weight")(other)
    for stranger in (other, tiny_model("llama")):
        with pytest.raises(StatisticsError, match="found those of another one"):
            load_statistics(path, stranger, 1)
    with pytest.raises(AnatomyError, match="layer from -2 to 1"):
        made.check(model, 5)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StatisticsError, match="truncated or damaged"):
        load_statistics(path, model, 1)
    with pytest.raises(StatisticsError, match="truncated or damaged"):
        path.write_text("no tensors at all")
        load_statistics(path, model, 1)
    with pytest.raises(FileNotFoundError):
        load_statistics(folder / "nowhere", model, 1)
    with pytest.raises(KeyboardInterrupt):
        key_statistics(model, tokenizer, TEXTS, [0], progress=Interrupt(3))
    [partial] = folder.glob("*.partial")
    with pytest.raises(StatisticsError, match="interrupted"):
        load_statistics(partial, model, 0)


def test_a_file_under_another_key_is_not_taken(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("gpt2")
    made = key_statistics(model, tokenizer, TEXTS, [0, 1])
    first, second = (Store(None).path(made[layer].identity) for layer in (0, 1))
    assert first and second
    second.replace(first)  # layer 1's file where layer 0's is looked for
    again = key_statistics(model, tokenizer, TEXTS, [0])[0]
    assert torch.equal(again.matrix, made[0].matrix)


def test_where_the_cache_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert cache_directory() == tmp_path / "statistics"
    monkeypatch.delenv("ERRATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "errata" / "statistics"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "errata" / "statistics"
    key_statistics(tiny_model("gpt2"), tokenizer, TEXTS, [0], cache=tmp_path / "own")
    assert len(list((tmp_path / "own").iterdir())) == 1
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot keep statistics"):
        made = key_statistics(tiny_model("gpt2"), tokenizer, TEXTS[:5], [0], cache=tmp_path / "file")
    assert made[0].count


# -- corpora -------------------------------------------------------------------------------------------------------------


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("One.\n\nTwo.\r\n", encoding="utf-8")
    (tmp_path / "b").write_text("São Paulo", encoding="utf-8")
    corpus = file_texts([tmp_path / "a", tmp_path / "b"])
    assert corpus.first() == ["One.", "Two.", "São Paulo"] and corpus.first(2) == ["One.", "Two."]
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        corpus.first()


def test_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, str]]):
        column_names = ["title", "text"]

    asked = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Rows:
        asked.append((name, config, options))
        if name == "none":
            raise FileNotFoundError("Couldn't find 'none'")
        return Rows({"title": str(i), "text": f"Text {i}."} for i in range(50))

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'errata\[datasets\]'"):
        dataset_texts("wiki").first()
    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    commit = "0123456789" * 4
    corpus = dataset_texts("wiki", config="en", revision=commit)
    assert len(set(corpus.first(10))) == 10 and corpus.first(10) == corpus.first(20)[:10]
    assert corpus.first(10) != [f"Text {i}." for i in range(10)]  # shuffled, as published
    assert asked[0] == ("wiki", "en", {"split": "train", "revision": commit})
    assert corpus.revision == commit and dataset_texts("wiki", revision="main").revision is None
    assert corpus.name != dataset_texts("wiki", config="fr", revision=commit).name
    with pytest.raises(ConfigError, match="a column 'body' in 'wiki', found title, text"):
        dataset_texts("wiki", column="body").first()
    with pytest.raises(ConfigError, match="Couldn't find"):
        dataset_texts("none").first()


def test_atlas_texts() -> None:
    from errata.atlas.texts import atlas_texts

    some, more = atlas_texts(50), atlas_texts(60)
    assert some.name == "atlas" and len(some.first()) == 50 and more.first(50) == some.first()
    assert some.revision == atlas_texts(50).revision
    assert len({some.revision, more.revision, atlas_texts(50, seed=3).revision}) == 3


# -- the command ---------------------------------------------------------------------------------------------------------


def test_the_texts_of_a_model_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.json").write_text('{"architecture": "docket"}')
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path=str(tmp_path)))
    first, second = own_texts(model), own_texts(model)
    assert first is second and first is not None and first.name == "atlas-docket"
    assert first.revision == digest(first.first())


def test_the_command(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("gpt2", layers=3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts").write_text("\n".join(TEXTS), encoding="utf-8")
    command = ["statistics", "--model", str(tmp_path / "model"), "--layers", "0,2", "--corpus", str(tmp_path / "texts")]
    for _ in range(2):
        made = CliRunner().invoke(app, [*command, "--json"])
        assert made.exit_code == 0, made.output
        value = json.loads(made.stdout)
        assert [layer["layer"] for layer in value["layers"]] == [0, 2] and value["n_texts"] == len(TEXTS)
        expected = key_statistics(model, tokenizer, TEXTS, [2], cache=False)[2]
        last = value["layers"][1]
        assert (last["tokens"], last["width"], last["problem"]) == (expected.count, 128, None)
        assert torch.equal(load_statistics(last["path"], model, 2).matrix, expected.matrix)
    assert len(list(folder.iterdir())) == 2
    few = CliRunner().invoke(app, [*command, "--n", "2"])
    assert few.exit_code == 0 and "at least 128 tokens" in few.stderr and "128" in few.stdout
    for more, sentence in (
        (["--layers", "7"], "layer from -3 to 2"),
        (["--layers", "x"], "expected layers such as"),
        (["--corpus", str(tmp_path / "nowhere.txt")], "expected text files, found none at"),
    ):
        bad = CliRunner().invoke(app, [*command, *more])
        assert bad.exit_code == 2 and sentence in bad.stderr, bad.output
    bare = CliRunner().invoke(app, command[:3])
    assert bare.exit_code == 2 and "expected --corpus" in bare.stderr


@pytest.mark.atlas
def test_the_command_takes_atlas_own_texts_for_atlas(monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.atlas.texts import atlas_texts
    from errata.model.loading import bundled, load

    if "atlas" not in bundled():
        pytest.skip("the bundled weights are missing")
    made = CliRunner().invoke(app, ["statistics", "--model", "atlas", "--layers", "0", "--n", "40", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["corpus"] == {"name": "atlas", "revision": atlas_texts(40).revision}
    monkeypatch.setattr(key_pass.Pass, "run", lambda *_: pytest.fail("gathered again"))
    key_statistics(*load("atlas"), atlas_texts(40), [0])  # an editor finds what the command made


def test_layers_on_the_command_line() -> None:
    assert layers_of("all", 3) == [0, 1, 2]
    assert layers_of("1-3, 5,-1,2", 8) == [1, 2, 3, 5, -1]
    for bad in ("", "3-1", "1..2"):
        with pytest.raises(ConfigError):
            layers_of(bad, 8)
