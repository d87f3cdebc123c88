"""MEMIT, EMMET and CompMEMIT against dense algebra and loops on tiny float64 models, and some edits at once on Atlas."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import errata
from conftest import hooks_of
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import load_world
from errata.edit import EditRequest
from errata.editors import _weights
from errata.editors._contexts import FIXED
from errata.editors._value_search import ValueJob, search_values
from errata.errors import AnatomyError, ConfigError, RequestError
from errata.low_rank import LowRank
from errata.model.anatomy import anatomy
from errata.model.generate import greedy_answers
from errata.model.hooks import Capture
from errata.model.loading import bundled
from errata.model.statistics import key_statistics
from errata.model.tokens import subject_tokens
from test_rome import CONTEXTS, REQUESTS, TEXTS

Tiny = Callable[..., Any]
LAYERS = (0, 1)


@pytest.fixture
def double(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A tiny model of three layers in float64, Llama's norms too, which otherwise round to float32 inside."""
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )
    return lambda family, **changes: tiny(family, layers=3, **changes).double()


def gathered(model: Any, tokenizer: Any, *layers: int) -> Any:
    return key_statistics(model, tokenizer, TEXTS, layers or LAYERS, cache=False)


def memit(cls: Any = errata.MEMIT, **changes: Any) -> Any:
    return cls(**({"layers": LAYERS, "contexts": CONTEXTS, "steps": 5, "statistics": None, "lam": 2.0} | changes))


def jittered(C: Tensor) -> Tensor:
    return C + 1e-6 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def state(model: Any, tokenizer: Any, request: EditRequest, context: str, path: str, of: Any) -> Tensor:
    """The module's input or output at the subject's last token, the text run by itself."""
    text = context.replace("{}", request.text)
    _, at = subject_tokens(tokenizer, text, str(request.subject))
    with torch.no_grad(), Capture(model, [path], of=of) as seen:
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    return seen[path][0, at]


@contextmanager
def weights_kept(model: Any) -> Iterator[None]:
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(kept[name])


def by_hand(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    Z: Tensor,
    known: Any,
    lam: float,
    layers: Sequence[int],
    weights: Tensor,
    *,
    fixed: bool = False,
) -> dict[int, Tensor]:
    """MEMIT's loop with weights changed in place, dense solves and one text at a time; leaves the weights changed."""
    parts, found = anatomy(model), {}
    top = parts.site(layers[-1])

    def missing() -> Tensor:
        return Z - torch.stack([state(model, tokenizer, r, "{}", top, "output") for r in requests], 1)

    first = missing()
    for j, layer in enumerate(layers):
        path = parts.mlp_site(layer)
        K = torch.stack(
            [
                sum(w * state(model, tokenizer, r, c, path, "input") for w, c in zip(weights, CONTEXTS, strict=True))
                for r in requests
            ],
            1,
        )
        C = torch.eye(len(K), dtype=K.dtype) if known is None else jittered(known[layer].matrix)
        R = first / len(layers) if fixed else missing() / (len(layers) - j)
        found[layer] = torch.linalg.solve(lam * C + K @ K.T, K @ R.T).T
        with torch.no_grad():
            weight = model.get_submodule(path).weight
            weight += found[layer].T if parts.mlp_out_transposed else found[layer]
    return found


def values(model: Any, tokenizer: Any, editor: Any, requests: Sequence[EditRequest]) -> Tensor:
    """(d, B) z of each request."""
    top = editor.layers(model)[-1]
    jobs = [ValueJob.of(r, CONTEXTS) for r in requests]
    terms = editor.terms(model, tokenizer, requests, top)
    return search_values(model, tokenizer, jobs, editor.config.search(top, "block"), terms).value.T


def assert_equal(parts: Sequence[LowRank], dense: dict[int, Tensor]) -> None:
    for part in parts:
        D = part.U @ part.V.T
        assert float((D - dense[part.layer]).norm() / dense[part.layer].norm()) < 1e-6


UNIFORM, BY_TYPE = torch.full((3,), 1 / 3, dtype=torch.float64), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("changes", [{}, {"spread": "fixed"}, {"key_average": "by type"}], ids=str)
def test_spreading_equals_the_loop(family: str, changes: dict[str, str], double: Tiny, tokenizer: Any) -> None:
    model = double(family)
    known = gathered(model, tokenizer)
    editor = memit(statistics=known, lam=None, s0=4.0, **changes)
    patch = editor.fit(model, tokenizer, REQUESTS)
    Z, lam = values(model, tokenizer, editor, REQUESTS), known[0].width / 4.0
    weights = BY_TYPE if "key_average" in changes else UNIFORM
    with weights_kept(model):
        dense = by_hand(model, tokenizer, REQUESTS, Z, known, lam, LAYERS, weights, fixed="spread" in changes)
        left = [
            Z[:, i] - state(model, tokenizer, r, "{}", anatomy(model).site(1), "output") for i, r in enumerate(REQUESTS)
        ]
    assert_equal(patch.low_rank, dense)
    for i, request in enumerate(REQUESTS):
        first = Z[:, i] - state(model, tokenizer, request, "{}", anatomy(model).site(1), "output")
        assert patch.report[request.id]["missing"] == pytest.approx(float(left[i].norm() / first.norm()), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_write_is_the_stacked_least_squares(family: str, double: Tiny, tokenizer: Any) -> None:
    """One layer: D minimises ||D [sqrt(lam) C^(1/2), K] - [0, R]||, solved as one least-squares problem."""
    model = double(family)
    known = gathered(model, tokenizer, 1)
    editor = memit(statistics=known, layers=(1,))
    [part] = editor.fit(model, tokenizer, REQUESTS).parts
    Z, parts = values(model, tokenizer, editor, REQUESTS), anatomy(model)
    K = torch.stack(
        [sum(state(model, tokenizer, r, c, parts.mlp_site(1), "input") for c in CONTEXTS) / 3 for r in REQUESTS], 1
    )
    R = Z - torch.stack([state(model, tokenizer, r, "{}", parts.site(1), "output") for r in REQUESTS], 1)
    root = torch.linalg.cholesky(2.0 * jittered(known[1].matrix))
    left, right = torch.cat([root, K], 1), torch.cat([torch.zeros(len(R), len(root), dtype=R.dtype), R], 1)
    dense = torch.linalg.lstsq(left.T, right.T).solution.T
    assert_equal([part], {1: dense})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_pair_is_the_rank_one_write_scaled(family: str, double: Tiny, tokenizer: Any) -> None:
    """With one edit at one layer MEMIT writes s / (1 + s) of what EMMET does, s = k^T C^-1 k / lam."""
    model = double(family)
    known = gathered(model, tokenizer, 1)
    shared: dict[str, Any] = {"statistics": known, "layers": (1,)}
    [soft] = memit(**shared).fit(model, tokenizer, REQUESTS[:1]).parts
    [hard] = memit(errata.EMMET, **shared).fit(model, tokenizer, REQUESTS[:1]).parts
    path = anatomy(model).mlp_site(1)
    k = sum(state(model, tokenizer, REQUESTS[0], c, path, "input") for c in CONTEXTS) / 3
    s = float(k @ torch.linalg.solve(jittered(known[1].matrix), k)) / 2.0
    assert torch.allclose(soft.U @ soft.V.T, s / (1 + s) * hard.U @ hard.V.T, rtol=1e-6, atol=1e-12)
    residual = hard.U @ (hard.V.T @ k)
    assert float((residual - hard.U[:, 0]).norm() / residual.norm()) < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_emmet_softened_is_memit(family: str, double: Tiny, tokenizer: Any) -> None:
    model = double(family)
    known = gathered(model, tokenizer, 1)
    shared: dict[str, Any] = {"statistics": known, "layers": (1,)}
    [soft] = memit(**shared, lam=0.6).fit(model, tokenizer, REQUESTS).parts
    [same] = memit(errata.EMMET, **shared, lambda_e=0.2, lambda_c=3.0).fit(model, tokenizer, REQUESTS).parts
    assert torch.allclose(soft.U @ soft.V.T, same.U @ same.V.T, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_later_batches_see_the_earlier_ones(family: str, double: Tiny, tokenizer: Any) -> None:
    """Batches of one equal fits one after another with the weights changed in between."""
    model = double(family)
    patch = memit(batch_size=1).fit(model, tokenizer, REQUESTS)
    total: dict[int, Tensor] = {}
    with weights_kept(model):
        for request in REQUESTS:
            Z = values(model, tokenizer, memit(), [request])
            for layer, D in by_hand(model, tokenizer, [request], Z, None, 2.0, LAYERS, UNIFORM).items():
                total[layer] = total.get(layer, 0) + D
    assert_equal(patch.low_rank, total)
    assert [part.edits for part in patch.parts] == [tuple(r.id for r in REQUESTS)] * 2


def test_a_hundred_edits_outnumber_the_keys(tiny: Tiny, tokenizer: Any, tmp_path: Path) -> None:
    """More pairs than a key is wide, several batches, detached bit for bit, saved and loaded."""
    model, seen = tiny("llama"), []
    requests = [
        EditRequest(subject=f"{a} {b}", prompt=prompt, target_new="Goa")
        for a in ("France", "Japan", "Brazil", "Switzerland", "Earth")
        for b in ("Paris", "Tokyo", "city", "point", "tongue")
        for prompt in ("The capital of {} is", "{} lies in", "In {} is", "The city of {} is")
    ]
    batches = memit(contexts="bare", batch_size=60, steps=2, layers=(0, 1))
    patch = batches.fit(model, tokenizer, requests, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 100) for i in range(1, 101)] and [part.rank for part in patch.parts] == [100, 100]
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        plain = model(ids).logits
        with patch.attach(model, tokenizer):
            edited = model(ids).logits
        assert torch.equal(model(ids).logits, plain) and not torch.equal(edited, plain)
        patch.save(tmp_path / "p.safetensors")
        with errata.load_patch(tmp_path / "p.safetensors").attach(model, tokenizer):
            assert torch.equal(model(ids).logits, edited)


def test_layers_by_default_and_in_any_order(tiny: Tiny) -> None:
    model = tiny("llama", layers=9)
    assert memit(layers=None).layers(model) == [2, 3] and memit(errata.EMMET, layers=None).layers(model) == [3]
    assert memit(layers=(-1, 0)).layers(model) == [0, 8]
    assert memit(layers=None).layers(tiny("llama", layers=1)) == [0]


# -- CompMEMIT -------------------------------------------------------------------------------------------------------------


def test_implications_are_pairs_of_their_edit(double: Tiny, tokenizer: Any) -> None:
    model = double("llama")
    implications = (
        {"prompt": "The river in the capital of France is the", "answer": "Sumida"},
        {"prompt": "São Paulo is the sister city of the capital of France", "answer": "Zürich", "subject": "São Paulo"},
        {"prompt": "The highest point in the city is", "answer": None},
    )
    request = EditRequest(**REQUESTS[0].model_dump() | {"fit_implications": implications})
    editor = memit(errata.CompMEMIT)
    patch = editor.fit(model, tokenizer, [request, REQUESTS[1]])
    assert all(part.edits == (request.id, REQUESTS[1].id, *[request.id] * 3) for part in patch.parts)
    listed = patch.report[request.id]["implications"]
    assert [note["at"] for note in listed] == ["France", "São Paulo", "the prompt's last token"]
    assert listed[2]["answer_from"].startswith("the unedited model") and listed[2]["answer"]
    assert "implications" not in patch.report[REQUESTS[1].id]
    stated = request.model_copy(update={"fit_implications": ()})
    spelled = [
        ValueJob("The river in the capital of {} is the", "Sumida", "France", CONTEXTS),
        ValueJob("{} is the sister city of the capital of France", "Zürich", "São Paulo", CONTEXTS),
        ValueJob("The highest point in the city is", listed[2]["answer"], None, CONTEXTS),
    ]
    assert editor.pairs(model, tokenizer, [request], CONTEXTS).jobs[1:] == spelled
    assert len(editor.pairs(model, tokenizer, [stated], CONTEXTS).jobs) == 1
    assert len(memit(errata.CompMEMIT, implications=1).pairs(model, tokenizer, [request], CONTEXTS).jobs) == 2
    bare = memit().fit(model, tokenizer, [stated, REQUESTS[1]])
    alone = memit(errata.CompMEMIT).fit(model, tokenizer, [stated, REQUESTS[1]])
    assert all(torch.equal(a.U, b.U) and torch.equal(a.V, b.V) for a, b in zip(bare.parts, alone.parts, strict=True))


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_contradictions_in_one_batch_are_refused(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2")
    twice = [*REQUESTS, REQUESTS[0].model_copy(update={"target_new": "Goa", "target_true": None})]
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        RequestError, match="'The capital of France is' -> 'Tokyo' .* -> 'Goa' .* same subject and relation"
    ):
        memit().fit(model, tokenizer, twice)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    memit(batch_size=3).fit(model, tokenizer, twice)  # the later batch is the later word


def test_bad_settings(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2")
    with pytest.raises(AnatomyError, match="expected a layer from -2 to 1"):
        memit(layers=(1, 2)).fit(model, tokenizer, REQUESTS)
    with pytest.raises(ConfigError, match="expected lam with statistics=None"):
        memit(lam=None).fit(model, tokenizer, REQUESTS)
    for changes in (
        {"layers": ()},
        {"layers": (1, 1)},
        {"lam": 0.0},
        {"s0": -1.0},
        {"batch_size": 0},
        {"spread": "even"},
    ):
        with pytest.raises(ConfigError):
            memit(**changes)
    with pytest.raises(ConfigError, match="lambda_e"):
        memit(errata.EMMET, lambda_e=-1.0)
    with pytest.raises(ConfigError, match="implications"):
        memit(errata.CompMEMIT, implications=-1)


def test_an_error_half_way_leaves_the_model_alone(tiny: Tiny, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny("gpt2"), []

    def solve(self: Any, statistics: Any, solver: Any, K: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return R, K

    editor = memit()
    monkeypatch.setattr(type(editor), "solve", solve)
    before, hooks = [p.clone() for p in model.parameters()], hooks_of(model)
    with pytest.raises(KeyboardInterrupt):
        editor.fit(model, tokenizer, REQUESTS)
    assert len(calls) == 2 and hooks_of(model) == hooks
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_published_behaviour_is_an_option() -> None:
    config: Any = errata.MEMIT.preset("published").config
    assert (config.lam, config.clamp, config.key_average, config.kl_position) == (
        15000.0,
        0.75,
        "by type",
        "subject_last",
    )
    assert (config.norm_form, config.norm_counts) == ("published", True)
    emmet: Any = errata.EMMET.preset("published").config
    assert emmet.lambda_e == 0.1 and emmet.lam is None


# -- Atlas -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("atlas" not in bundled(), reason="the bundled weights are missing")
@pytest.mark.atlas
def test_edits_at_once_take_on_atlas(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = errata.load("atlas")
    corpus = _weights.own_texts(model)
    assert corpus is not None
    short = replace(corpus, read=lambda: list(corpus.read())[:400], revision=None)
    monkeypatch.setattr(_weights, "own_texts", lambda model: short)
    requests = counterfactual_requests(load_world(), 8, split="dev")
    patch = errata.MEMIT.preset("atlas", contexts=FIXED[:4]).fit(model, tokenizer, requests)
    with patch.attach(model, tokenizer):
        answers = greedy_answers(model, tokenizer, [r.text for r in requests])
    assert sum(a == r.target_new for a, r in zip(answers, requests, strict=True)) >= 7
