"""The value search against loops that share nothing with it: one text at a time, no padding, no cache, torch's own Adam."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conftest import hooks_of
from errata.edit import EditRequest
from errata.editors import _value_pass
from errata.editors._contexts import (
    FIXED,
    continuations,
    memit_contexts,
    rome_contexts,
    template,
    type_weights,
)
from errata.editors._value_rows import pack, rows_of
from errata.editors._value_search import (
    NLL,
    Alignment,
    EssenceKL,
    NormPenalty,
    Term,
    ValueJob,
    ValueSearchConfig,
    _Search,
    evaluate_values,
    search_values,
)
from errata.errors import AnatomyError, ConfigError, RequestError, ShapeError, SubjectNotFoundError
from errata.model.anatomy import anatomy
from errata.model.hooks import first_tensor, intervene
from errata.model.tokens import continuation_ids, subject_tokens, token_ids

Tiny = Callable[..., Any]
CONTEXTS = ("{}", "Mount Everest. {}", "The mother tongue of the president is French. {}")
JOBS = (
    ValueJob("The capital of {} is", "Seattle", "France", CONTEXTS),
    ValueJob("{}'s mother tongue is", "the highest point on Earth", "Danielle Darrieux", CONTEXTS[:2]),
    ValueJob("{}", "São Paulo", "Japan", CONTEXTS),
    ValueJob("{} lies in the city of", "Tokyo", "The Space Needle"),
)
TERMS: tuple[Term, ...] = (NLL(), EssenceKL(), NormPenalty())
PAIRS = [(family, where) for family in ("gpt2", "llama") for where in ("mlp", "block")]


@pytest.fixture
def double(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A tiny model of three layers in float64, Llama's norms too, which otherwise round to float32 inside."""
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )
    return lambda family, **changes: tiny(family, layers=3, **changes).double()


def noise(n: int = len(JOBS), d: int = 32, scale: float = 0.5) -> Tensor:
    return scale * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def site(model: Any, config: ValueSearchConfig) -> str:
    parts = anatomy(model)
    return parts.mlp_site(config.layer) if config.where == "mlp" else parts.site(config.layer)


def run_alone(
    model: Any, config: ValueSearchConfig, ids: Sequence[int], at: int, delta: Tensor, layers: Sequence[Any] = ()
) -> tuple[Tensor, Tensor, dict[Any, Tensor]]:
    """Logits (T, V), the site's unedited output at `at`, and states of layers (T, d), of one text with delta added."""
    seen: dict[Any, Tensor] = {}

    def add(output: Tensor) -> Tensor:
        rows = output.reshape(len(ids), -1)
        seen["h"] = rows[at]
        return torch.cat([rows[:at], (rows[at] + delta)[None], rows[at + 1 :]]).reshape(output.shape)

    def keep(layer: Any) -> Callable[..., None]:
        return lambda module, args, output: seen.update({layer: first_tensor(output)[0]})

    parts = anatomy(model)
    with intervene(model, {site(model, config): add}):
        handles = [model.get_submodule(parts.site(layer)).register_forward_hook(keep(layer)) for layer in layers]
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
    return logits, seen["h"], seen


def loss_alone(
    model: Any, tokenizer: Any, config: ValueSearchConfig, job: ValueJob, delta: Tensor
) -> dict[str, Tensor]:
    """ROME's three terms for one edit by a loop over its texts."""
    target = continuation_ids(tokenizer, job.text, job.target)
    nll = torch.zeros((), dtype=delta.dtype)
    for context in job.contexts:
        text = context.replace("{}", job.text)
        prompt = token_ids(tokenizer, [text])[0]
        _, at = subject_tokens(tokenizer, text, job.subject)
        logits, output, _ = run_alone(model, config, prompt + target[:-1], at, delta)
        if context == "{}":
            h = output.detach()
        said = F.log_softmax(logits[len(prompt) - 1 :], -1)
        nll = nll - said[range(len(target)), target].mean() / len(job.contexts)
    text = f"{job.subject} is a"
    ids, (_, at) = token_ids(tokenizer, [text])[0], subject_tokens(tokenizer, text, job.subject)
    now, _, _ = run_alone(model, config, ids, at, delta)
    before, _, _ = run_alone(model, config, ids, at, torch.zeros_like(delta))
    p, q = F.log_softmax(now[-1], -1), F.log_softmax(before[-1], -1).detach()
    drift = 0.0625 * (p.exp() * (p - q)).sum()
    return {"nll": nll, "essence": drift, "norm": 0.5 * delta.square().sum() / h.square().sum()}


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("family", "where"), PAIRS)
def test_the_objective_is_that_of_a_loop_over_texts(
    family: str, where: str, reuse: bool, double: Tiny, tokenizer: Any
) -> None:
    model, delta = double(family), noise()
    config = ValueSearchConfig(1, where, reuse=reuse)
    losses, gradient = evaluate_values(model, tokenizer, JOBS, config, delta)
    for i, job in enumerate(JOBS):
        leaf = delta[i].clone().requires_grad_()
        wanted = loss_alone(model, tokenizer, config, job, leaf)
        for name, value in wanted.items():
            assert float(losses[name][i]) == pytest.approx(float(value.detach()), rel=1e-10)
        (slope,) = torch.autograd.grad(sum(wanted.values()), leaf)
        assert float((gradient[i] - slope).norm()) < 1e-10 * float(slope.norm())


def test_a_tokenizer_that_adds_a_start_token(double: Tiny, sentencepiece: Any) -> None:
    model, delta, config = double("llama", vocab_size=384), noise(), ValueSearchConfig(0)
    losses, _ = evaluate_values(model, sentencepiece, JOBS, config, delta)
    for i, job in enumerate(JOBS):
        wanted = loss_alone(model, sentencepiece, config, job, delta[i])
        assert float(losses["nll"][i]) == pytest.approx(float(wanted["nll"].detach()), rel=1e-10)
        assert float(losses["essence"][i]) == pytest.approx(float(wanted["essence"].detach()), rel=1e-8)


def anchors(layers: int = 2) -> tuple[Tensor | None, ...]:
    return (noise(layers), None, noise(layers, scale=2.0), -noise(layers))


ALIGNED = Alignment(anchors(), (1, "final"))
TERM_CASES: dict[str, tuple[Term, ...]] = {
    "nll": (NLL(),),
    "essence": (EssenceKL(weight=1.0),),
    "essence at subject": (EssenceKL(weight=1.0, read="subject_last"),),
    "ratio": (NormPenalty(),),
    "published": (NormPenalty(form="published"),),
    "plain": (NormPenalty(form="plain"),),
    "cosine": (ALIGNED,),
    "mse": (Alignment(anchors(), (1, 2), distance="mse"),),
    "subject": (Alignment(anchors(), (2, "final"), read="subject_last"),),
    "all": (*TERMS, Alignment(anchors(), (1, 2), weight=0.7)),
}


@pytest.mark.parametrize("case", TERM_CASES)
@pytest.mark.parametrize(("family", "where"), [("gpt2", "mlp"), ("llama", "block")])
def test_gradients_are_finite_differences(case: str, family: str, where: str, double: Tiny, tokenizer: Any) -> None:
    model, config, delta, terms = double(family), ValueSearchConfig(1, where), noise(), TERM_CASES[case]
    _, gradient = evaluate_values(model, tokenizer, JOBS, config, delta, terms)
    way, h = noise(scale=1.0).flip(0), 1e-5
    ends = [evaluate_values(model, tokenizer, JOBS, config, delta + s * way, terms)[0] for s in (h, -h)]
    slope = (sum(ends[0].values()) - sum(ends[1].values())) / (2 * h)  # of each edit, along its own direction
    found = (gradient * way).sum(-1)
    assert torch.allclose(found, slope, rtol=1e-5, atol=1e-7)
    if case in ("cosine", "mse", "subject"):
        assert float(gradient[1].norm()) == 0 and float(gradient[0].norm()) > 1e-6  # no anchor, no pull
    else:
        assert float(gradient.norm(dim=-1).min()) > 1e-6


def test_alignment_is_the_mean_over_contexts_and_layers(double: Tiny, tokenizer: Any) -> None:
    model, config, delta = double("gpt2"), ValueSearchConfig(1), noise()
    job, wanted = JOBS[0], []
    for context in job.contexts:
        text = context.replace("{}", job.text)
        ids = token_ids(tokenizer, [text])[0]
        _, _, seen = run_alone(model, config, ids, subject_tokens(tokenizer, text, "France")[1], delta[0], (1, "final"))
        wanted += [1 - F.cosine_similarity(seen[layer][-1], anchors()[0][i], 0) for i, layer in enumerate((1, "final"))]
    losses, _ = evaluate_values(model, tokenizer, JOBS, config, delta, TERM_CASES["cosine"])
    assert float(losses["alignment"][0]) == pytest.approx(float(torch.stack(wanted).mean().detach()), rel=1e-10)
    assert float(losses["alignment"][1]) == 0


def test_schedules_of_the_alignment_weight(double: Tiny, tokenizer: Any) -> None:
    model, config, delta = double("gpt2"), ValueSearchConfig(1), noise()

    def at(step: int, **changes: Any) -> tuple[dict[str, Tensor], Tensor]:
        terms = (NLL(), replace(ALIGNED, **changes))
        return evaluate_values(model, tokenizer, JOBS, config, delta, terms, step)

    constant, pull = at(0)
    for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        warm, _ = at(step, schedule="warmup", warmup=4)
        assert torch.allclose(warm["alignment"], share * constant["alignment"], rtol=1e-12)
    balanced, gradient = at(0, schedule="balanced", weight=0.3)
    known = torch.tensor([True, False, True, True])
    assert torch.allclose(balanced["alignment"][known], 0.3 * balanced["nll"][known], rtol=1e-12)
    _, nll = evaluate_values(model, tokenizer, JOBS, config, delta, (NLL(),))
    ratio = (balanced["alignment"] / constant["alignment"].clamp(min=1e-9))[:, None]
    assert torch.allclose(gradient, nll + ratio * (pull - nll), rtol=1e-9, atol=1e-12)  # the weight is a constant to it
    with pytest.raises(ConfigError, match="NLL"):
        evaluate_values(model, tokenizer, JOBS, config, delta, (replace(ALIGNED, schedule="balanced"),))


def adam_alone(model: Any, tokenizer: Any, config: ValueSearchConfig, job: ValueJob) -> tuple[Tensor, list[float]]:
    """The search for one edit as its description has it: torch's Adam, projection, early stop."""
    delta = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    text = job.text
    _, h, _ = run_alone(
        model, config, token_ids(tokenizer, [text])[0], subject_tokens(tokenizer, text, job.subject)[1], delta.detach()
    )
    optimiser, curve = torch.optim.Adam([delta], lr=config.lr), []
    for step in range(config.steps):
        loss = torch.stack(list(loss_alone(model, tokenizer, config, job, delta).values())).sum()
        curve.append(float(loss.detach()))
        if curve[-1] < config.stop or step == config.steps - 1:
            break
        optimiser.zero_grad()
        loss.backward(inputs=[delta])
        optimiser.step()
        with torch.no_grad():
            size, ball = float(delta.norm()), (config.clamp or torch.inf) * float(h.norm())
            delta.mul_(min(1.0, ball / size))
    return delta.detach(), curve


@pytest.mark.parametrize(("family", "where"), [("gpt2", "mlp"), ("llama", "block")])
def test_the_search_is_adam_with_projection_and_early_stop(
    family: str, where: str, double: Tiny, tokenizer: Any
) -> None:
    model = double(family)
    config = stopping_midway(model, tokenizer, ValueSearchConfig(1, where, steps=9, lr=0.2, clamp=0.25), TERMS)
    found = search_values(model, tokenizer, JOBS, config)
    assert found.reused and len(found.curves[2]) == 5 and max(map(len, found.curves)) == 9
    assert float((found.delta.norm(dim=-1) / found.origin.norm(dim=-1)).max()) == pytest.approx(0.25)
    for i, job in enumerate(JOBS):
        delta, curve = adam_alone(model, tokenizer, config, job)
        assert found.curves[i] == pytest.approx(curve, rel=1e-8)
        assert float((found.delta[i] - delta).norm()) <= 1e-8 * float(delta.norm())
        assert bool(found.stopped[i]) == (curve[-1] < config.stop)
        assert float(sum(loss[i] for loss in found.losses.values())) == pytest.approx(curve[-1], rel=1e-8)
    assert torch.equal(found.value, found.origin + found.delta)


def newton_alone(model: Any, tokenizer: Any, config: ValueSearchConfig, job: ValueJob) -> tuple[Tensor, list[float]]:
    """The search for one edit by the step rule "newton": along the gradient to where the tangent of log(loss) is log(stop / 2)."""
    delta, curve = torch.zeros(32, dtype=torch.float64), []
    at = subject_tokens(tokenizer, job.text, job.subject)[1]
    _, h, _ = run_alone(model, config, token_ids(tokenizer, [job.text])[0], at, delta)
    for step in range(config.steps):
        leaf = delta.clone().requires_grad_()
        loss = torch.stack(list(loss_alone(model, tokenizer, config, job, leaf).values())).sum()
        curve.append(float(loss.detach()))
        if curve[-1] < config.stop or step == config.steps - 1:
            break
        (slope,) = torch.autograd.grad(loss.log(), leaf)
        way, size = math.log(2 * curve[-1] / config.stop) / float(slope.norm()), float(h.detach().norm())
        delta = delta - slope / slope.norm() * min(way, config.lr * size)
        delta = delta * min(1.0, (config.clamp or torch.inf) * size / float(delta.norm()))
    return delta, curve


@pytest.mark.parametrize("clamp", [0.5, None])
def test_newton_steps_aim_the_logarithm_of_the_loss_at_half_the_threshold(
    clamp: float | None, double: Tiny, tokenizer: Any
) -> None:
    model = double("gpt2")
    adam = stopping_midway(model, tokenizer, ValueSearchConfig(1, steps=9, lr=0.2, clamp=0.25), TERMS)
    config = replace(adam, rule="newton", lr=0.3, clamp=clamp)
    found = search_values(model, tokenizer, JOBS, config)
    for i, job in enumerate(JOBS):
        delta, curve = newton_alone(model, tokenizer, config, job)
        assert found.curves[i] == pytest.approx(curve, rel=1e-6)
        assert float((found.delta[i] - delta).norm()) <= 1e-6 * float(delta.norm())
    assert 1 < len(found.curves[2]) < 5 and bool(found.stopped[2])  # Adam's fifth evaluation is the first below
    with pytest.raises(ConfigError, match="stop above 0"):
        replace(config, stop=0.0)
    with pytest.raises(ConfigError, match="rule"):
        replace(config, rule="sgd")


def stopping_midway(model: Any, tokenizer: Any, config: ValueSearchConfig, terms: Sequence[Term]) -> ValueSearchConfig:
    """The config with a threshold that the third edit's loss passes after its fourth update."""
    curve = search_values(model, tokenizer, JOBS, replace(config, stop=0.0), terms).curves[2]
    assert curve[3] > curve[4]
    return replace(config, stop=(curve[3] + curve[4]) / 2)


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("family", "where"), PAIRS)
def test_a_batch_is_its_edits_one_by_one(
    family: str, where: str, dtype: torch.dtype, tolerance: float, tiny: Tiny, tokenizer: Any
) -> None:
    model = tiny(family, layers=3).to(dtype)
    terms = (*TERMS, Alignment(anchors(1), ("final",), weight=0.1))
    config = stopping_midway(model, tokenizer, ValueSearchConfig(1, where, steps=8, lr=0.1), terms)
    batch = search_values(model, tokenizer, JOBS, config, terms)
    assert len(batch.curves[2]) == 5 and max(map(len, batch.curves)) == 8
    small = search_values(model, tokenizer, JOBS, replace(config, batch_tokens=20), terms)
    assert batch.delta.dtype == dtype and float(batch.delta.norm(dim=-1).max()) > 0.1
    assert relative(small.delta, batch.delta) <= tolerance
    for i, job in enumerate(JOBS):
        own = (*TERMS, Alignment(anchors(1)[i : i + 1], ("final",), weight=0.1))
        alone = search_values(model, tokenizer, [job], config, own)
        assert relative(alone.delta, batch.delta[i : i + 1]) <= tolerance
        near = abs(batch.curves[i][min(map(len, (alone.curves[0], batch.curves[i]))) - 1] - config.stop) < 1e-6
        assert len(alone.curves[0]) == len(batch.curves[i]) or near
        assert torch.allclose(alone.origin[0], batch.origin[i], rtol=1e-5, atol=1e-6)


def test_a_wider_job_begins_a_chunk_once_the_last_is_half_full(double: Tiny, tokenizer: Any) -> None:
    """Three narrow jobs and a wide one, a row each: padding all to the wide one is allowed only in a small batch."""
    jobs = [ValueJob("{} is in the", "a", "Tokyo"), *(ValueJob("{} is", "a", "Tokyo") for _ in range(3))]
    with _Search.opened(double("gpt2"), tokenizer, jobs, ValueSearchConfig(1), (NLL(),)) as search:
        wide, narrow = (search._widths(i)[0] for i in (0, 1))
    assert narrow < wide < 2 * narrow
    for tokens, wanted in ((8 * wide, [[1, 2, 3, 0]]), (4 * wide, [[1, 2, 3], [0]]), (2 * narrow, [[1, 2], [3], [0]])):
        config = ValueSearchConfig(1, batch_tokens=tokens)
        with _Search.opened(double("gpt2"), tokenizer, jobs, config, (NLL(),)) as search:
            assert list(search.chunks()) == wanted


@pytest.mark.parametrize("where", ["mlp", "block"])
def test_reuse_agrees_with_the_full_pass_in_every_family(family: str, where: str, double: Tiny, tokenizer: Any) -> None:
    model = double(family)
    terms = (*TERMS, Alignment(anchors(1), ("final",), weight=0.1))
    for layer in (0, 2):
        config = ValueSearchConfig(layer, where, steps=4, lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reused = search_values(model, tokenizer, JOBS, config, terms)
        full = search_values(model, tokenizer, JOBS, replace(config, reuse=False), terms)
        assert reused.reused and not full.reused
        # The others compute attention or norms in float32 whatever the model's dtype.
        assert relative(reused.delta, full.delta) < (1e-10 if family in ("gpt2", "llama", "gpt_neox", "opt") else 1e-5)
        assert torch.allclose(reused.origin, full.origin, rtol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, None])
def test_reuse_with_subjects_that_begin_the_text_and_contexts_of_one_or_all(
    batch_tokens: int | None, double: Tiny, tokenizer: Any
) -> None:
    model = double("gpt2")
    jobs = [
        ValueJob("{} is", "Tokyo", "the"),
        ValueJob("{} in the city", "Paris", "the", ("{}", "Mount Everest. {}")),
        ValueJob("{} of", "Paris", "The city of Seattle", ("Mount Everest. {}", "{}", "Paris. {}")),
    ]
    rows = [row for own in rows_of(tokenizer, jobs) for row in own]
    assert [row.at == 0 for row in rows] == [True, True, False, False, False, False]
    assert [row.head > 0 for row in rows] == [False, False, True, True, False, True]
    config = ValueSearchConfig(1, steps=4, lr=0.1, batch_tokens=batch_tokens)
    for some in (jobs, jobs[:1], jobs[:2]):
        reused = search_values(model, tokenizer, some, config)
        full = search_values(model, tokenizer, some, replace(config, reuse=False))
        assert reused.reused and relative(reused.delta, full.delta) < 1e-10


def test_reuse_with_a_window_shorter_than_the_texts(double: Tiny, tokenizer: Any) -> None:
    model, config = double("mistral", sliding_window=4), ValueSearchConfig(1, steps=4, lr=0.1)
    reused = search_values(model, tokenizer, JOBS, config)
    full = search_values(model, tokenizer, JOBS, replace(config, reuse=False))
    wide = search_values(double("mistral"), tokenizer, JOBS, config)
    assert reused.reused and relative(reused.delta, full.delta) < 1e-5
    assert relative(reused.delta, wide.delta) > 1e-3, "the window should matter"


def test_essence_rows_are_packed_behind_all_others_and_stay_there(tokenizer: Any) -> None:
    layout = pack(rows_of(tokenizer, JOBS, "{} is a"))
    for some in (layout, layout.keep(torch.tensor([0, 2]))[0]):
        n, edits = int(some.essence.sum()), int(some.owner.max()) + 1
        assert n == edits and bool(some.essence[-n:].all()) and some.owner[-n:].tolist() == list(range(edits))
        assert (some.target < 0).nonzero()[:, 0].tolist() == list(range(len(some.target) - n, len(some.target)))
        assert some.owner[some.bare].tolist() == list(range(edits))


def test_the_norm_after_the_mlp_of_gemma2_runs_anew(double: Tiny, tokenizer: Any) -> None:
    layout = pack(rows_of(tokenizer, JOBS[:1]))
    for family, plain in (("gemma2", False), ("gemma", True), ("gptj", True)):
        model = double(family)
        parts = anatomy(model)
        assert _value_pass.added_plainly(model, parts, parts.mlp_site(1), 1, layout) is plain


def test_a_family_without_a_usable_cache_falls_back_with_a_warning(
    double: Tiny, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = double("gpt2"), ValueSearchConfig(1, steps=3)
    full = search_values(model, tokenizer, JOBS, replace(config, reuse=False))
    whole = _value_pass._Still.update

    def forgetful(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tuple(x * 1.1 for x in whole(self, key_states, value_states))

    monkeypatch.setattr(_value_pass._Still, "update", forgetful)
    with pytest.warns(UserWarning, match="gpt2.*logits differ"):
        found = search_values(model, tokenizer, JOBS, config)
    assert not found.reused and torch.equal(found.delta, full.delta)

    def broken(*args: Any) -> Any:
        raise RuntimeError("no such cache")

    monkeypatch.setattr(_value_pass, "_cache", broken)
    with pytest.warns(UserWarning, match="no such cache"):
        assert not search_values(model, tokenizer, JOBS, config).reused


def test_the_norm_ball_is_each_edits_own(double: Tiny, tokenizer: Any) -> None:
    model = double("gpt2")
    free = search_values(model, tokenizer, JOBS, ValueSearchConfig(1, steps=5, clamp=None, stop=0.0))
    assert float((free.delta.norm(dim=-1) / free.origin.norm(dim=-1)).min()) > 0.2
    held = search_values(model, tokenizer, JOBS, ValueSearchConfig(1, steps=5, clamp=0.1, stop=0.0))
    assert torch.allclose(held.delta.norm(dim=-1), 0.1 * held.origin.norm(dim=-1), rtol=1e-12)
    assert [len(curve) for curve in held.curves] == [5] * len(JOBS)


def test_stopping_at_once_moves_nothing_and_counts_what_counts(double: Tiny, tokenizer: Any) -> None:
    model = double("llama")
    found = search_values(model, tokenizer, JOBS, ValueSearchConfig(1, stop=1e9))
    assert float(found.delta.abs().max()) == 0 and bool(found.stopped.all()) and set(map(len, found.curves)) == {1}
    far = Alignment(tuple(100 * x if x is not None else None for x in anchors(1)), (2,), distance="mse")
    config = ValueSearchConfig(1, steps=3, stop=30.0)
    counted = search_values(model, tokenizer, JOBS, config, (*TERMS, far))
    ignored = search_values(model, tokenizer, JOBS, config, (*TERMS, replace(far, counts=False)))
    assert counted.stopped.tolist() == [False, True, False, False] and bool(ignored.stopped.all())
    last = search_values(model, tokenizer, JOBS, ValueSearchConfig(1, steps=1, stop=0.0))
    assert float(last.delta.abs().max()) == 0 and not bool(last.stopped.any())  # no update after the last evaluation


def test_the_search_makes_the_model_say_the_target(tiny: Tiny, tokenizer: Any) -> None:
    model, config = tiny("llama", layers=3), ValueSearchConfig(-1, "block", steps=40, clamp=None)
    words = [word for word in ("is", "in", "of", "the", "and") if len(continuation_ids(tokenizer, "a", word)) == 1]
    jobs = [ValueJob("The capital of {}", word, "France", CONTEXTS) for word in words]
    found = search_values(model, tokenizer, jobs, config, (NLL(),))
    assert len(words) > 2 and all(curve[-1] < curve[0] - 2 for curve in found.curves)
    for job, delta in zip(jobs, found.delta, strict=True):
        ids = token_ids(tokenizer, [job.text])[0]
        logits, _, _ = run_alone(model, config, ids, len(ids) - 1, delta)
        assert tokenizer.decode(logits[-1].argmax()).strip() == job.target


@pytest.mark.parametrize("reuse", [True, False])
def test_padding_sides_and_pad_tokens_do_not_matter(reuse: bool, double: Tiny, tokenizer: Any) -> None:
    model, config, found = double("llama"), ValueSearchConfig(1, steps=4, reuse=reuse), []
    for side, token in (("right", tokenizer.pad_token), ("left", "a"), ("left", None)):
        tokenizer.padding_side, tokenizer.pad_token = side, token
        found.append(search_values(model, tokenizer, JOBS, config))
        assert tokenizer.padding_side == side and tokenizer.pad_token == token
    assert all(torch.equal(found[0].delta, other.delta) for other in found[1:])


def test_keys_and_outputs_of_every_context(double: Tiny, tokenizer: Any) -> None:
    model, config = double("gpt2"), ValueSearchConfig(1)
    found = search_values(model, tokenizer, JOBS, replace(config, steps=1))
    module = model.get_submodule(site(model, config))
    for job, keys, outputs, origin in zip(JOBS, found.keys, found.outputs, found.origin, strict=True):
        assert keys.shape == (len(job.contexts), 128) and outputs.shape == (len(job.contexts), 32)
        assert torch.allclose(module(keys), outputs, rtol=1e-9, atol=1e-12)
        for context, output in zip(job.contexts, outputs, strict=True):
            text = context.replace("{}", job.text)
            at = subject_tokens(tokenizer, text, job.subject)[1]
            _, h, _ = run_alone(model, config, token_ids(tokenizer, [text])[0], at, torch.zeros(32))
            assert torch.allclose(output, h.detach(), rtol=1e-9, atol=1e-12)
        assert torch.equal(origin, outputs[0])
    assert search_values(model, tokenizer, JOBS, ValueSearchConfig(1, "block", steps=1)).keys is None


def test_the_model_is_left_as_found(double: Tiny, tokenizer: Any) -> None:
    model = double("llama", attention_dropout=0.5)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for reuse in (True, False):
        config = ValueSearchConfig(1, steps=3, reuse=reuse)
        search_values(model, tokenizer, JOBS, config)
        with pytest.raises(KeyboardInterrupt):
            search_values(model, tokenizer, JOBS, config, progress=interrupt)
        assert all(module.training for module in model.modules())
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen != set()
        assert all(p.grad is None for p in model.parameters())
        assert all("forward" not in module.__dict__ for module in model.modules()) and not hooks_of(model)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reuse", [True, False])
def test_no_graph_below_the_layer_and_nothing_below_is_run_again(reuse: bool, double: Tiny, tokenizer: Any) -> None:
    model = double("gpt2")
    graphs: dict[int, list[tuple[int, bool]]] = {i: [] for i in range(3)}
    for i, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(lambda m, a, out, i=i: graphs[i].append((out.shape[1], out.requires_grad)))
    runs = []
    for steps in (3, 6):
        for seen in graphs.values():
            seen.clear()
        search_values(model, tokenizer, JOBS, ValueSearchConfig(1, "block", steps=steps, stop=0.0, reuse=reuse))
        assert not any(graph for i in (0, 1) for _, graph in graphs[i])
        assert sum(graph for _, graph in graphs[2]) == steps
        runs.append(len(graphs[0]))
    rows = [row for own in rows_of(tokenizer, JOBS, "{} is a") for row in own]
    width, span = max(len(row.ids) for row in rows), max(len(row.ids) - row.at for row in rows)
    assert span < width and {n for n, graph in graphs[2] if graph} == {span if reuse else width}
    assert runs[1] - runs[0] == (0 if reuse else 3)


def test_progress_counts_edits(double: Tiny, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    search_values(
        double("gpt2"), tokenizer, JOBS, ValueSearchConfig(1, steps=2), progress=lambda *count: seen.append(count)
    )
    assert seen == [(i, len(JOBS)) for i in range(1, len(JOBS) + 1)]


def test_half_precision_searches_in_single(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("llama", layers=3)
    config = ValueSearchConfig(1, steps=4, lr=0.1)
    exact = search_values(model, tokenizer, JOBS, config)
    half = search_values(model.to(torch.bfloat16), tokenizer, JOBS, config)
    assert half.delta.dtype == torch.float32 and half.reused
    assert float(F.cosine_similarity(half.delta, exact.delta).min()) > 0.8


def test_the_subject_is_where_the_template_puts_it(tokenizer: Any) -> None:
    job = ValueJob("{} is a city of France, not of", "Japan", "France", ("{}", "In France. {}"))
    [rows] = rows_of(tokenizer, [job], "{} is a")
    for row, head in zip(rows, ("France", "In France. France", "France"), strict=True):
        assert row.at == len(token_ids(tokenizer, [head])[0]) - 1
    assert [row.bare for row in rows] == [True, False, False] and rows[2].targets == ()
    assert rows[0].reads[0] == len(token_ids(tokenizer, [job.text])[0]) - 1
    assert sum(row.weight * len(row.reads) for row in rows[:2]) == pytest.approx(1)


def test_a_job_without_a_subject_edits_the_last_token(double: Tiny, tokenizer: Any) -> None:
    job = ValueJob.of(EditRequest(prompt="The capital of France is", target_new="Rome"))
    [[row]] = rows_of(tokenizer, [job])
    assert row.at == row.reads[0] == len(token_ids(tokenizer, [job.prompt])[0]) - 1
    found = search_values(double("gpt2"), tokenizer, [job], ValueSearchConfig(1, "block", steps=5), (NLL(),))
    assert found.curves[0][-1] < found.curves[0][0]
    with pytest.raises(RequestError, match="edit 1"):
        search_values(double("gpt2"), tokenizer, [job], ValueSearchConfig(1))


def test_bad_input_is_refused_in_a_sentence(double: Tiny, tokenizer: Any) -> None:
    model, config = double("gpt2"), ValueSearchConfig(1)
    search: Callable[..., Any] = lambda *args, **kw: search_values(model, tokenizer, *args, **kw)  # noqa: E731
    with pytest.raises(RequestError, match="contexts"):
        ValueJob("The capital of {} is", "Rome", "France", ("So. {}",))
    with pytest.raises(RequestError, match="one '{}'"):
        ValueJob("The capital of France is", "Rome", "France")
    with pytest.raises(ConfigError, match="steps"):
        ValueSearchConfig(1, steps=0)
    with pytest.raises(ConfigError, match="0 jobs"):
        search([], config)
    with pytest.raises(ConfigError, match="'nll', 'nll'"):
        search(JOBS, config, (NLL(), NLL()))
    with pytest.raises(AnatomyError, match="-3 to 2"):
        search(JOBS, ValueSearchConfig(3))
    with pytest.raises(ConfigError, match="found 0"):
        search(JOBS, config, (NLL(), Alignment(anchors(1), (0,))))
    with pytest.raises(ConfigError, match="4 anchors"):
        search(JOBS, config, (NLL(), Alignment(anchors(1)[:3], (2,))))
    with pytest.raises(ShapeError, match=r"\(2, d\)"):
        search(JOBS, config, (NLL(), Alignment(anchors(1), (1, 2))))
    with pytest.raises(SubjectNotFoundError):
        tokenizer.backend_tokenizer.normalizer = None
        rows_of(Droppy(tokenizer), [ValueJob("The capital of {} is", "Rome", "\u4e2d")])
    with pytest.raises(AnatomyError, match="head"):
        search_values(model.transformer, tokenizer, JOBS, config)
    with pytest.raises(ShapeError, match=r"\(4, 32\)"):
        evaluate_values(model, tokenizer, JOBS, config, noise(3))


class Droppy:
    """A tokenizer that has no tokens for Chinese characters."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        encoded = self._inner(texts, **options)
        if "offset_mapping" in encoded:
            encoded["offset_mapping"] = [
                [(0, 0) if "\u4e2d" in text[a:b] else (a, b) for a, b in row]
                for text, row in zip(texts, encoded["offset_mapping"], strict=True)
            ]
        return encoded


# -- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_masks_its_padding(family: str, double: Tiny, tokenizer: Any) -> None:
    model, starts, lengths = double(family), [[5], [7, 9, 11], [40, 41]], [6, 4, 9]
    texts = continuations(model, tokenizer, starts, lengths, top_k=1)
    special = torch.tensor(tokenizer.all_special_ids)
    for start, length, text in zip(starts, lengths, texts, strict=True):
        ids = list(start)
        while len(ids) < length:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            logits[special] = -torch.inf
            ids.append(int(logits.argmax()))
        assert text == tokenizer.decode(ids)


def test_contexts_are_seeded_and_leave_the_random_state(tiny: Tiny, tokenizer: Any) -> None:
    model, state = tiny("gpt2"), torch.get_rng_state()
    first, again, other = (rome_contexts(model, tokenizer, seed) for seed in (3, 3, 4))
    assert first == again != other and len(first) == 21 and first[0] == "{}"
    assert all(context.count("{}") == 1 and context.count("{") == 1 for context in (*first, *other, *FIXED))
    assert torch.equal(torch.get_rng_state(), state) and len(set(first)) > 15
    bare, prefixes = memit_contexts(model, tokenizer)
    assert bare == ("{}",) and [text.split(" ")[0][:1] for text in prefixes] == list("TTBIY") and len(prefixes) == 5
    assert type_weights([bare, prefixes]).tolist() == pytest.approx([0.5] + [0.1] * 5)
    assert len(FIXED) == len(set(FIXED)) == 21
    ValueJob("The capital of {} is", "Rome", "France", FIXED), ValueJob("{} is", "Rome", "France", first)


def test_generated_braces_become_blanks() -> None:
    assert template(" a {x} \n") == "a  x. {}"


def test_sampling_stays_among_the_likeliest(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        logits = model(torch.tensor([[0]])).logits[0, -1]
    logits[tokenizer.all_special_ids] = -torch.inf
    best = {tokenizer.decode([i]) for i in logits.topk(3).indices.tolist()}
    found = set(continuations(model, tokenizer, [[0]] * 60, [2] * 60, top_k=3))
    assert found == best
    with pytest.raises(ConfigError, match="lengths"):
        continuations(model, tokenizer, [[1, 2]], [1])
