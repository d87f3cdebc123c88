"""ROME against dense algebra on tiny float64 models, its errors, and a handful of edits on Atlas."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import errata
from errata.atlas.probes import fact_of, paraphrases
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import load_world
from errata.edit import EditRequest
from errata.editors import _weights
from errata.editors._contexts import FIXED
from errata.editors._value_search import NLL, EssenceKL, NormPenalty, Term, ValueJob, search_values
from errata.editors._weights import WeightConfig
from errata.errors import (
    AnatomyError,
    ConfigError,
    RequestError,
    StatisticsError,
    SubjectNotFoundError,
    UnstableWriteError,
)
from errata.maths import covariance
from errata.model.anatomy import anatomy
from errata.model.generate import greedy_answers
from errata.model.hooks import Capture
from errata.model.loading import bundled
from errata.model.statistics import key_statistics, load_statistics
from errata.model.tokens import subject_tokens

Tiny = Callable[..., Any]
CONTEXTS = ("{}", "Mount Everest. {}", "The mother tongue of the president is French. {}")
REQUESTS = (
    EditRequest(subject="France", prompt="The capital of {} is", target_true="Paris", target_new="Tokyo"),
    EditRequest(subject="The Space Needle", prompt="{} is located in the city of", target_new="São Paulo"),
    EditRequest(subject="Danielle Darrieux", prompt="{}'s mother tongue is", target_new="Japan"),
)
TEXTS = [
    f"{a} {b} {c}."
    for a in ("The capital of France", "Mount Everest", "Danielle Darrieux", "The Space Needle", "São Paulo")
    for b in ("is located in the city of", "lies in", "and the president of", "'s mother tongue is")
    for c in ("Paris", "Switzerland", "Barack Obama", "the highest point on Earth", "Japan")
]


@pytest.fixture
def double(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A tiny model of three layers in float64, Llama's norms too, which otherwise round to float32 inside."""
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )
    return lambda family, **changes: tiny(family, layers=3, **changes).double()


def dense_weight(model: Any, layer: int) -> Tensor:
    """W (d, m) of the MLP's output projection."""
    parts = anatomy(model)
    weight = model.get_submodule(parts.mlp_site(layer)).weight.detach()
    return weight.T if parts.mlp_out_transposed else weight


def key_alone(model: Any, tokenizer: Any, request: EditRequest, context: str, layer: int) -> tuple[Tensor, Tensor]:
    """(m,) input and (d,) output of the MLP's output projection at the subject's last token, the text run by itself."""
    text, path = context.replace("{}", request.text), anatomy(model).mlp_site(layer)
    _, at = subject_tokens(tokenizer, text, str(request.subject))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad(), Capture(model, [path], of="input") as keys, Capture(model, [path]) as outputs:
        model(ids)
        return keys[path][0, at], outputs[path][0, at]


def statistics(model: Any, tokenizer: Any, *layers: int) -> Any:
    return key_statistics(model, tokenizer, TEXTS, layers, cache=False)


def rome(**changes: Any) -> errata.ROME:
    return errata.ROME(**({"layer": 1, "contexts": CONTEXTS, "steps": 5, "statistics": None} | changes))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_write_is_the_constrained_least_squares(family: str, double: Tiny, tokenizer: Any) -> None:
    """(W + D) k = v at the mean key, and D is the solution of the KKT system of min tr(D C D^T) with D k = v - W k."""
    model = double(family)
    known = statistics(model, tokenizer, 1)
    patch = rome(statistics=known).fit(model, tokenizer, REQUESTS)
    C, W, [part] = known[1].matrix, dense_weight(model, 1), patch.parts
    C = C + 1e-6 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    config = rome().config.search(1)
    jobs = [ValueJob.of(r, CONTEXTS) for r in REQUESTS]
    found = search_values(model, tokenizer, jobs, config, rome().terms(model, tokenizer, REQUESTS, 1))
    bias = dict(model.get_submodule(anatomy(model).mlp_site(1)).named_parameters()).get("bias", torch.zeros(1)).detach()
    for i, request in enumerate(REQUESTS):
        D = part.only(request.id).U @ part.only(request.id).V.T
        pairs = [key_alone(model, tokenizer, request, context, 1) for context in CONTEXTS]
        k, out = (torch.stack(side).mean(0) for side in zip(*pairs, strict=True))
        v = pairs[0][1] + found.delta[i]
        assert float((D @ k + out - v).norm() / v.norm()) < 1e-10
        assert float(((W + D) @ k + bias - v).norm() / v.norm()) < 1e-10
        kkt = torch.cat([torch.cat([2 * C, -k[:, None]], 1), torch.cat([k[None], k.new_zeros(1, 1)], 1)])
        rhs = torch.cat([torch.zeros(len(k), len(v), dtype=k.dtype), (v - out)[None]])
        dense = torch.linalg.solve(kkt, rhs)[: len(k)].T
        assert float((D - dense).norm() / dense.norm()) < 1e-6
        x = torch.randn(len(k), dtype=k.dtype, generator=torch.Generator().manual_seed(i))
        u = torch.linalg.solve(C, k)
        x = x - u * (x @ u) / (u @ u)
        assert float((D @ x).norm()) < 1e-8 * float(D.norm() * x.norm())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("mode", ["prompt", "mixed"])
def test_key_modes_meet_their_constraint_on_the_bare_prompt(
    family: str, mode: str, double: Tiny, tokenizer: Any
) -> None:
    model = double(family)
    known = statistics(model, tokenizer, 1)
    patch = rome(statistics=known, key_mode=mode).fit(model, tokenizer, REQUESTS[:1])
    [part], C = patch.parts, known[1].matrix
    pairs = [key_alone(model, tokenizer, REQUESTS[0], context, 1) for context in CONTEXTS]
    shift = part.U @ part.V.T @ pairs[0][0]
    assert abs(float(shift.norm() / pairs[0][1].norm()) - patch.report[REQUESTS[0].id]["shift"]) < 1e-4
    mean = torch.stack([key for key, _ in pairs]).mean(0)
    u = torch.linalg.solve(C, pairs[0][0] if mode == "prompt" else mean)
    assert float(F.cosine_similarity(part.V[:, 0], u, dim=0)) > 1 - 1e-8


def test_no_statistics_is_the_identity(double: Tiny, tokenizer: Any) -> None:
    model = double("gpt2")
    [part] = rome().fit(model, tokenizer, REQUESTS[:1]).parts
    k = torch.stack([key_alone(model, tokenizer, REQUESTS[0], c, 1)[0] for c in CONTEXTS]).mean(0)
    assert torch.allclose(part.V[:, 0], k / (k @ k), rtol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edits_are_independent_of_each_other(family: str, double: Tiny, tokenizer: Any) -> None:
    """A column of a batch is the edit fitted alone, and `without` takes out nothing else."""
    model = double(family)
    both = rome().fit(model, tokenizer, REQUESTS)
    for request in REQUESTS:
        alone, column = rome().fit(model, tokenizer, [request]).parts[0], both.parts[0].only(request.id)
        assert float((alone.U - column.U).norm() / alone.U.norm()) < 1e-9
        assert torch.allclose(alone.V, column.V, rtol=1e-9)
    left = both.without(REQUESTS[0].id)
    assert left.parts[0].edits == tuple(r.id for r in REQUESTS[1:]) and left.ids == both.ids[1:]
    assert torch.equal(left.parts[0].U, both.parts[0].U[:, 1:])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attached_is_the_dense_update_and_detached_the_model(
    family: str, double: Tiny, tokenizer: Any, tmp_path: Path
) -> None:
    model = double(family)
    patch = rome().fit(model, tokenizer, REQUESTS)
    patch.save(tmp_path / "p.safetensors")
    again = errata.load_patch(tmp_path / "p.safetensors")
    assert again == patch and again.config == patch.config
    ids = torch.tensor([tokenizer("The capital of France is Paris")["input_ids"]])
    weight = model.get_submodule(anatomy(model).mlp_site(1)).weight
    with torch.no_grad():
        plain = model(ids).logits
        with again.attach(model, tokenizer):
            edited = model(ids).logits
        assert torch.equal(model(ids).logits, plain) and not torch.equal(edited, plain)
        kept, D = weight.clone(), patch.parts[0].U @ patch.parts[0].V.T
        weight += D.T if anatomy(model).mlp_out_transposed else D
        assert torch.allclose(model(ids).logits, edited, atol=1e-10)
        weight.copy_(kept)


def test_published_behaviour_is_an_option() -> None:
    published: Any = errata.ROME.preset("published")
    assert published.config.key_mode == "mixed"
    assert published.terms(None, None, (), 0) == (
        NLL(),
        EssenceKL(0.0625, "subject_last"),
        NormPenalty(0.5, "published", counts=True),
    )
    assert errata.ROME(kl=0, norm=0).terms(None, None, (), 0) == (NLL(),)


def test_the_objective_is_one_method(tiny: Tiny, tokenizer: Any) -> None:
    asked = []

    class Mine(errata.ROME):
        def terms(self, model: Any, tokenizer: Any, requests: Any, layer: int) -> tuple[Term, ...]:
            asked.append((len(requests), layer))
            return (NLL(),)

    patch = Mine(rome().config).fit(tiny("gpt2"), tokenizer, REQUESTS)
    assert asked == [(3, 1)] and set(patch.report[REQUESTS[0].id]["losses"]) == {"nll"}


def test_the_layer_by_default(tiny: Tiny, tokenizer: Any) -> None:
    patch = rome(layer=None).fit(tiny("llama", layers=6), tokenizer, REQUESTS[:1])
    assert patch.parts[0].layer == 2
    patch = rome(layer=-1).fit(tiny("llama", layers=6), tokenizer, REQUESTS[:1])
    assert patch.parts[0].layer == 5


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_statistics_must_be_of_this_model_and_layer(tiny: Tiny, tokenizer: Any, tmp_path: Path) -> None:
    model, other = tiny("gpt2"), tiny("gpt2", initializer_range=0.1)
    gathered = key_statistics(other, tokenizer, TEXTS, [0, 1], cache=tmp_path)
    with pytest.raises(StatisticsError, match="of this 'gpt2' model, found those of another one"):
        rome(statistics=gathered).fit(model, tokenizer, REQUESTS)
    with pytest.raises(StatisticsError, match="of layer 1, found those of 0; gather them with `errata statistics`"):
        rome(statistics={0: gathered[0]}).fit(other, tokenizer, REQUESTS)
    file = next(str(p) for p in tmp_path.glob("layer-0-*"))
    with pytest.raises(StatisticsError, match="expected key statistics of layer 1, found those of layer 0"):
        rome(statistics=file).fit(other, tokenizer, REQUESTS)
    patch = rome(statistics=file, layer=0).fit(other, tokenizer, REQUESTS)
    [same] = rome(statistics=gathered, layer=0).fit(other, tokenizer, REQUESTS).parts
    assert torch.equal(patch.parts[0].U, same.U) and torch.equal(patch.parts[0].V, same.V)
    assert patch.report[REQUESTS[0].id]["statistics"] == {"corpus": "texts", "tokens": gathered[0].count}


def test_gathered_statistics_are_found(
    tiny: Tiny, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "auto", a model that is not Atlas takes what was gathered on it, of the most tokens, over whatever corpus."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    model = tiny("llama")
    with pytest.raises(
        StatisticsError, match="layer 1 of this 'llama' model, found none; .*`errata statistics --layers 1`"
    ):
        rome(statistics="auto").fit(model, tokenizer, REQUESTS)
    few = key_statistics(model, tokenizer, TEXTS[:50], [1])[1]
    key_statistics(tiny("llama", initializer_range=0.1), tokenizer, TEXTS, [1])
    patch = rome(statistics="auto").fit(model, tokenizer, REQUESTS)
    assert patch.report[REQUESTS[0].id]["statistics"]["tokens"] == few.count
    many = key_statistics(model, tokenizer, TEXTS, [1])[1]
    again = rome(statistics="auto").fit(model, tokenizer, REQUESTS)
    assert again.report[REQUESTS[0].id]["statistics"]["tokens"] == many.count > few.count
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(TEXTS))
    named = rome(statistics=str(file)).fit(model, tokenizer, REQUESTS)
    assert torch.equal(named.parts[0].V, again.parts[0].V)
    with pytest.raises(ConfigError, match="expected text files, found none at .*missing.txt"):
        rome(statistics="missing.txt").fit(model, tokenizer, REQUESTS)


def test_edits_fitted_one_by_one_solve_with_the_same_factors(
    tiny: Tiny, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    gathered, more = (key_statistics(model, tokenizer, texts, [0, 1], cache=tmp_path) for texts in (TEXTS, TEXTS[:60]))
    made: list[int] = []
    real = covariance.CholeskySolver.__init__

    def counted(self: Any, C: Tensor, **rest: Any) -> None:
        made.append(len(C))
        real(self, C, **rest)

    monkeypatch.setattr(covariance.CholeskySolver, "__init__", counted)
    _weights._factored.cache_clear()
    whole = next(p for p in tmp_path.glob("layer-1-*") if load_statistics(p, model, 1).count == gathered[1].count)
    for source in (str(whole), gathered, {1: gathered[1]}):  # the same numbers, wherever they come from
        rome(statistics=source, layer=1).fit(model, tokenizer, REQUESTS[:1])
    assert len(made) == 1
    rome(statistics=more, layer=1).fit(model, tokenizer, REQUESTS[:1])
    rome(statistics=gathered, layer=1, jitter=0.1).fit(model, tokenizer, REQUESTS[:1])
    rome(statistics=gathered, layer=0).fit(model, tokenizer, REQUESTS[:1])
    assert len(made) == 4


def test_singular_statistics_name_the_smallest_eigenvalue(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("llama")
    few = key_statistics(model, tokenizer, ["Paris"] * 200, [1], cache=False)
    with pytest.raises(StatisticsError, match=r"layer 1: .*smallest eigenvalue of"):
        rome(statistics=few).fit(model, tokenizer, REQUESTS)
    rome(statistics=few, jitter=1e-2).fit(model, tokenizer, REQUESTS)


def test_bad_requests_and_settings(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2")
    with pytest.raises(AnatomyError, match="expected a layer from -2 to 1"):
        rome(layer=2).fit(model, tokenizer, REQUESTS)
    with pytest.raises(RequestError, match="rome needs a subject"):
        rome().fit(model, tokenizer, [EditRequest(prompt="It rained in", target_new="Goa")])
    with pytest.raises(
        UnstableWriteError, match="at least 1 needed.*The edit is 'The capital of France is' -> 'Tokyo'"
    ):
        rome(key_mode="mixed", min_cosine=1.0).fit(model, tokenizer, REQUESTS)
    long = replace_prompt(REQUESTS[0], "very " * 200)
    with pytest.raises(RequestError, match="has room for 128"):
        rome().fit(model, tokenizer, [long])
    with pytest.raises(RequestError, match="has room for 128"):
        rome(contexts=("{}", "very " * 200 + "{}")).fit(model, tokenizer, REQUESTS)
    with pytest.raises(ConfigError, match="expected key_mode"):
        rome(key_mode="own")
    with pytest.raises(ConfigError, match="expected contexts 'generated'"):
        rome(contexts="many")
    with pytest.raises(ConfigError, match="steps"):
        rome(steps=0)
    with pytest.raises(ConfigError, match="kl=-1"):
        rome(kl=-1.0)


def replace_prompt(request: EditRequest, before: str) -> EditRequest:
    return request.model_copy(update={"prompt": before + request.prompt})


def test_a_subject_without_tokens_is_refused(tiny: Tiny, sentencepiece: Any) -> None:
    from tokenizers import normalizers

    sentencepiece.backend_tokenizer.normalizer = normalizers.Replace("☃", "")
    request = EditRequest(subject="☃", prompt="The capital of {} is", target_new="Tokyo")
    with pytest.raises(SubjectNotFoundError, match="'☃'.*found none"):
        rome().fit(tiny("llama"), sentencepiece, [request])


# -- Atlas -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("atlas" not in bundled(), reason="the bundled weights are missing")
@pytest.mark.atlas
def test_edits_take_on_atlas_and_neighbours_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    world, (model, tokenizer) = load_world(), errata.load("atlas")
    corpus = _weights.own_texts(model)
    assert corpus is not None and corpus.name == "atlas"
    monkeypatch.setattr(
        _weights, "own_texts", lambda model: replace(corpus, read=lambda: list(corpus.read())[:400], revision=None)
    )
    requests = counterfactual_requests(world, 6, split="dev")
    facts = [fact_of(world, r) for r in requests]
    others = [
        next(f for f in world.by_relation[fact.relation] if f.split == "dev" and f not in facts)
        for fact in facts
        if fact
    ]
    neighbours = [paraphrases(world, f, random.Random(0))[0] for f in others]
    before = greedy_answers(model, tokenizer, neighbours)
    patch = errata.ROME(contexts=FIXED[:4]).fit(model, tokenizer, requests)
    assert sum(patch.report[i]["converged"] for i in patch.ids) >= 5
    taken = kept = 0
    for request, prompt, answer in zip(requests, neighbours, before, strict=True):
        own = patch.parts[0].only(request.id)
        with replace(patch, requests=(request,), parts=(own,)).attach(model, tokenizer):
            taken += greedy_answers(model, tokenizer, [request.text]) == [request.target_new]
            kept += greedy_answers(model, tokenizer, [prompt]) == [answer]
    assert taken >= 5 and kept >= 5


def test_what_is_shared_has_one_form() -> None:
    assert WeightConfig(contexts=CONTEXTS).json()["contexts"] == list(CONTEXTS)
