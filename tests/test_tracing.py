"""Causal tracing: equal to the one-cell loop, honest about edge cases, and gone without a trace."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import END, hooks_of, tiny_model
from errata.cli import app
from errata.errors import AnatomyError, ConfigError, RequestError, SubjectNotFoundError
from errata.locate import figures
from errata.locate.averages import CLASSES, average, token_classes
from errata.locate.facts import KnownFact, read_facts
from errata.locate.noise import Noise, noise_for, parse_rule
from errata.locate.resume import resumed
from errata.locate.rows import TraceRows
from errata.locate.tracing import (
    Dropped,
    Trace,
    TracingConfig,
    scaled_window,
    trace,
    trace_facts,
    window_of,
)
from errata.model import loading
from errata.model.anatomy import anatomy
from errata.model.hooks import Capture, first_tensor, with_first_tensor
from errata.model.states import evaluating
from errata.model.tokens import continuation_ids, subject_tokens, token_ids

Tiny = Callable[..., PreTrainedModel]
FACT = KnownFact("The capital of France is", "France")
NEEDLE = KnownFact("The Space Needle is located in the city of", "The Space Needle")
LOUD = Noise("1.0", "normal", 1.0)
KINDS: list[dict[str, Any]] = [
    {"kind": "hidden"},
    {"kind": "mlp", "window": 3},
    {"kind": "attention", "window": 2},
    {"sever": ("mlp",)},
    {"sever": ("attention",)},
    {"sever": ("mlp", "attention")},
]


# -- the oracle: one cell, one full pass ---------------------------------------------------------------------------------


def module_path(model: PreTrainedModel, kind: str, layer: int) -> str:
    """The whole MLP (not its output projection) where the block has one."""
    parts = anatomy(model)
    if kind == "attention":
        return parts.attention[layer]
    mlp = f"{parts.blocks[layer]}.mlp"
    return mlp if any(name == mlp for name, _ in model.named_modules()) else parts.mlp_out[layer]


def one_cell(
    model: PreTrainedModel,
    ids: list[int],
    noise: Tensor,
    first: int,
    token: int | None,
    layer: int,
    config: TracingConfig,
) -> Tensor:
    """(1 + S, V) probabilities of one full pass over the clean prompt and its corrupted copies, one cell restored."""
    parts, rows = anatomy(model), 1 + len(noise)
    handles = []

    def on(path: str, change: Callable[[Tensor], None]) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            new = first_tensor(output).clone()
            change(new.view(rows, len(ids), -1))
            return with_first_tensor(output, new)

        handles.append(model.get_submodule(path).register_forward_hook(hook))

    def corrupt(x: Tensor) -> None:
        subject = slice(first, first + noise.shape[1])
        x[1:, subject] = noise if config.replace else x[1:, subject] + noise

    def restore(x: Tensor) -> None:
        x[1:, token] = x[0, token].clone()

    def force(value: Tensor) -> Callable[[Tensor], None]:
        def change(x: Tensor) -> None:
            x[1:, token] = value

        return change

    frozen: dict[str, Tensor] = {}
    if config.sever:
        paths = [module_path(model, kind, at) for kind in config.sever for at in range(parts.n_layers)]
        on(parts.embed, corrupt)
        with Capture(model, paths) as seen, torch.no_grad():
            model(torch.tensor([ids] * rows), use_cache=False)
        frozen = {path: seen[path].view(rows, len(ids), -1)[1:, token].clone() for path in paths}
        handles.pop().remove()
    try:
        on(parts.embed, corrupt)
        for path, value in frozen.items():
            on(path, force(value))
        if token is not None and config.kind == "hidden":
            on(parts.blocks[layer], restore)
        elif token is not None:
            width, depth = config.window or 0, parts.n_layers
            for at in range(max(0, layer - width // 2), min(depth, layer + (width + 1) // 2)):
                on(module_path(model, config.kind, at), restore)
        with torch.no_grad():
            return model(torch.tensor([ids] * rows), use_cache=False).logits[:, -1].softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


def by_cells(
    model: PreTrainedModel,
    ids: list[int],
    first: int,
    last: int,
    config: TracingConfig,
    cells: Sequence[tuple[int, int]],
) -> tuple[float, float, int, Tensor]:
    """(clean, corrupted, answer, probabilities per cell) the slow way."""
    width = model.get_input_embeddings().weight.shape[1]
    draws = np.random.RandomState(config.seed).standard_normal((config.samples, last - first + 1, width))
    noise = torch.from_numpy(draws)
    full = one_cell(model, ids, noise, first, None, 0, TracingConfig(replace=config.replace))
    answer = int(full[0].argmax())
    found = [one_cell(model, ids, noise, first, i, layer, config)[1:, answer].mean() for i, layer in cells]
    return float(full[0, answer]), float(full[1:, answer].mean()), answer, torch.stack(found)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_equal_to_the_one_cell_loop(tiny: Tiny, tokenizer: Any, name: str, fields: dict[str, Any]) -> None:
    model = tiny(name, layers=4).double()
    config = TracingConfig(samples=3, batch_tokens=64, **fields)  # small: the cells of a layer take several passes
    found = trace(model, tokenizer, FACT, LOUD, config)
    [ids] = token_ids(tokenizer, [FACT.prompt])
    cells = [(i, layer) for i in range(len(ids)) for layer in range(4)]
    clean, corrupted, answer, restored = by_cells(model, ids, found.first, found.last, config, cells)
    assert found.answer_id == answer and found.tokens[0] == tokenizer.decode(ids[:1])
    assert (found.clean, found.corrupted) == pytest.approx((clean, corrupted), rel=1e-12)
    torch.testing.assert_close(found.restored, restored.view(len(ids), 4), rtol=1e-11, atol=1e-14)  # float64 rounding
    assert found.restored.std() > 1e-4  # otherwise equal would say little
    if found.kind == "hidden" and not found.sever:
        assert float(found.restored[-1, -1]) == pytest.approx(clean, rel=1e-12)  # the answer's own state


def test_every_family(tiny: Tiny, family: str, tokenizer: Any) -> None:
    """Parallel blocks, flattened MLPs, norms behind modules, tuples and tensors as outputs."""
    model = tiny(family, layers=3).double()
    [ids] = token_ids(tokenizer, [FACT.prompt])
    first, last = subject_tokens(tokenizer, FACT.prompt, FACT.subject)
    cells = [(last, 0), (last, 1), (len(ids) - 1, 1)]
    for fields in KINDS[:4]:
        config = TracingConfig(samples=2, **fields)
        found = trace(model, tokenizer, FACT, LOUD, config)
        *_, wanted = by_cells(model, ids, first, last, config, cells)
        got = torch.stack([found.restored[cell] for cell in cells])
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-14)


def test_noise_instead_of_the_embedding_holds_for_every_pass(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("llama").double()
    config = TracingConfig(samples=2, replace=True)
    found = trace(model, tokenizer, FACT, LOUD, config)
    [ids] = token_ids(tokenizer, [FACT.prompt])
    cells = [(found.last, 0), (found.last, 1)]
    clean, corrupted, _, restored = by_cells(model, ids, found.first, found.last, config, cells)
    assert (found.clean, found.corrupted) == pytest.approx((clean, corrupted), rel=1e-12)
    torch.testing.assert_close(found.restored[found.last], restored, rtol=1e-11, atol=1e-14)
    assert found.corrupted != trace(model, tokenizer, FACT, LOUD, TracingConfig(samples=2)).corrupted


def test_nothing_below_the_restored_layer_runs(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2", layers=4)
    rows = dict.fromkeys(range(4), 0)

    def count(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            rows[layer] += len(output)

        return hook

    handles = [model.get_submodule(f"transformer.h.{i}.ln_1").register_forward_hook(count(i)) for i in range(4)]
    found = trace(model, tokenizer, FACT, LOUD, TracingConfig(samples=3))
    for handle in handles:
        handle.remove()
    per_layer = 3 * (len(found.tokens) - found.first)  # tokens before the subject are not run at all
    assert rows == {layer: 1 + 3 + per_layer * layer for layer in range(4)}
    torch.testing.assert_close(found.restored[: found.first], torch.full((found.first, 4), found.corrupted).double())


# -- resuming ------------------------------------------------------------------------------------------------------------


def test_resumed_equals_the_whole_pass(tiny: Tiny, family: str) -> None:
    model = tiny(family, layers=3)
    blocks = anatomy(model).blocks
    ids, other = torch.randint(2, 300, (2, 2, 7), generator=torch.Generator().manual_seed(0))
    raw: list[Any] = []
    handle = model.get_submodule(blocks[0]).register_forward_hook(lambda module, args, output: raw.append(output))
    with torch.no_grad(), Capture(model, blocks, of="input") as read, Capture(model, blocks) as written:
        logits = model(ids, use_cache=False).logits
    handle.remove()
    states = [*(read[path] for path in blocks), written[blocks[-1]]]
    for layer in range(4):
        with torch.no_grad(), resumed(model, layer, states[layer], raw[0]):
            torch.testing.assert_close(model(other, use_cache=False).logits, logits, rtol=1e-6, atol=1e-6)
    with pytest.raises(AnatomyError, match="from 0 to 3"), resumed(model, 4, states[3], raw[0]):
        pass


def test_foreign_hooks_act_once_and_attributes_come_back(tiny: Tiny, tokenizer: Any) -> None:
    """A shift that someone else adds behind a block is in the stored states already; their `forward` is kept."""
    model = tiny("gpt2", layers=3).double()
    block = model.transformer.h[1]
    block.register_forward_hook(lambda module, args, output: with_first_tensor(output, first_tensor(output) + 0.5))
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate does
    wrapped, before = block.forward, hooks_of(model)
    config = TracingConfig(samples=2)
    found = trace(model, tokenizer, FACT, LOUD, config)
    [ids] = token_ids(tokenizer, [FACT.prompt])
    cells = [(found.last, layer) for layer in range(3)]
    *_, wanted = by_cells(model, ids, found.first, found.last, config, cells)
    torch.testing.assert_close(found.restored[found.last], wanted, rtol=1e-11, atol=1e-14)
    assert block.forward is wrapped and hooks_of(model) == before


def test_the_model_is_left_as_found(tiny: Tiny, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", layers=3).train()
    [ids] = token_ids(tokenizer, [FACT.prompt])
    with evaluating(model):
        before = model(torch.tensor([ids])).logits
    state, random = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    trace(model, tokenizer, FACT, LOUD, TracingConfig(samples=2))

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(type(model.model.layers[2]), "forward", broken)
    with pytest.raises(RuntimeError, match="in the middle"), resumed(model, 2, torch.zeros(1, len(ids), 32), before):
        model(torch.tensor([ids]))
    monkeypatch.undo()
    assert model.training and all(m.training for m in model.modules()) and hooks_of(model) == []
    assert all("forward" not in vars(m) for m in model.modules())
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(random, np.random.get_state()[1])
    with evaluating(model):
        assert torch.equal(model(torch.tensor([ids])).logits, before)


# -- the subject's place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "text"),
    [
        ("Zürich lies in", "Zürich", "Zürich"),  # many bytes; starts the prompt
        ("The highest point lies in 東京", "東京", "東京"),  # ends the prompt, in pieces of characters
        ("Paris is not Rome, and Paris is", "Paris", " Paris"),  # the last of two
        ("The capital of France", "France", " France"),  # one token, and the last
    ],
)
def test_where_the_noise_goes(tiny: Tiny, tokenizer: Any, prompt: str, subject: str, text: str) -> None:
    model = tiny("gpt2", layers=2)
    embedded: list[Tensor] = []
    # registered first, it sees the corrupted embedding as the input of the dropout behind the sum with positions
    handle = model.transformer.drop.register_forward_hook(lambda module, args, output: embedded.append(output))
    found = trace(model, tokenizer, KnownFact(prompt, subject), LOUD, TracingConfig(samples=2))
    handle.remove()
    [ids] = token_ids(tokenizer, [prompt])
    changed = (embedded[0][1:] != embedded[0][:1]).any(-1)
    assert changed.tolist() == [[found.first <= i <= found.last for i in range(len(ids))]] * 2
    assert tokenizer.decode(ids[found.first : found.last + 1]) == text
    assert len(found.tokens) == len(ids) and all(t and "\ufffd" not in t for t in found.tokens)
    assert found.restored.shape == (len(ids), 2)


def test_a_sentencepiece_tokenizer_with_bos(tiny: Tiny, sentencepiece: Any) -> None:
    model = tiny("llama", layers=2)
    found = trace(model, sentencepiece, FACT, LOUD, TracingConfig(samples=2))
    assert found.tokens[0] == "<s>" and found.first > 0
    assert "".join(found.tokens[found.first : found.last + 1]).replace("▁", "").strip() == "France"


def test_what_cannot_be_traced(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2")
    with pytest.raises(SubjectNotFoundError, match="Spain"):
        KnownFact(FACT.prompt, "Spain")
    with pytest.raises(RequestError, match="at most 128 tokens"):
        trace(model, tokenizer, KnownFact("x " * 200 + "France is", "France"), LOUD)
    with pytest.raises(AnatomyError, match="with a language-model head"):
        trace(model.transformer, tokenizer, FACT, LOUD)
    for fields, message in (
        ({"kind": "heads"}, "hidden, mlp, attention"),
        ({"window": 0}, "window"),
        ({"samples": True}, "samples"),
        ({"kind": "mlp", "sever": ("attention",)}, "trace hidden"),
    ):
        with pytest.raises(ConfigError, match=message):
            TracingConfig(**fields)  # type: ignore[arg-type]


def test_windows() -> None:
    assert [scaled_window(n) for n in (48, 36, 24, 12, 8, 2)] == [10, 8, 5, 2, 2, 1]
    assert list(window_of(20, 10, 48)) == list(range(15, 25))  # layers l - 5 to l + 4
    assert list(window_of(2, 10, 48)) == list(range(7)) and list(window_of(47, 10, 48)) == list(range(42, 48))
    assert list(window_of(3, 3, 8)) == [2, 3, 4] and list(window_of(5, 1, 8)) == [5]


# -- noise ---------------------------------------------------------------------------------------------------------------


def test_noise_rules(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2")
    subjects = ["France", "The Space Needle", "France"]
    rows = token_ids(tokenizer, subjects, special=False)
    entries = torch.cat([model.transformer.wte.weight[row].detach().double() for row in rows])
    s3 = noise_for(model, tokenizer, "s3", subjects=subjects)
    assert s3.scale == pytest.approx(3 * float(entries.std()), rel=1e-9)
    shape = (4, 3, 32)
    published = np.random.RandomState(1).randn(*shape)
    np.testing.assert_array_equal(s3.draw(shape), s3.scale * published)
    np.testing.assert_array_equal(noise_for(model, tokenizer, 1).draw(shape), published)  # an integer is a number
    assert noise_for(model, tokenizer, "0.025").scale == noise_for(model, tokenizer, 0.025).scale == 0.025
    uniform = noise_for(model, tokenizer, "u0.5").draw((100, 5, 32))
    assert -0.5 < uniform.min() < -0.49 and 0.49 < uniform.max() < 0.5 and abs(uniform.std() - 0.5 / 3**0.5) < 0.01


def test_noise_with_the_moments_of_embeddings(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2")
    texts = [f"{a} and {b}." for a in ("Paris", "Rome", "Zürich") for b in ("Seattle", "Tokyo", "São Paulo")] * 8
    states = torch.cat(
        [model.transformer.wte.weight[row] for row in token_ids(tokenizer, texts, special=False)]
    ).detach()
    mean, covariance = states.double().mean(0).numpy(), np.cov(states.double().numpy().T)
    for rule, tolerance in (("m", 0.05), ("t9", 0.12)):  # sampling error of 100,000 draws; heavier tails err more
        drawn = noise_for(model, tokenizer, rule, texts=texts).draw((1000, 100, 32)).reshape(-1, 32)
        np.testing.assert_allclose(drawn.mean(0), mean, atol=0.02)
        error = np.linalg.norm(np.cov(drawn.T) - covariance) / np.linalg.norm(covariance)
        assert error < tolerance
    gauss, student = (noise_for(model, tokenizer, rule, texts=texts).draw((2, 3, 32)) - mean for rule in ("m", "t4"))
    chi = np.random.RandomState(2).chisquare(4, (2, 3, 1))
    np.testing.assert_allclose(student, gauss * np.sqrt(2 / chi), rtol=1e-9, atol=1e-12)


def test_noise_rules_that_are_none(tiny: Tiny, tokenizer: Any) -> None:
    for rule in ("s", "s-1", "0", "nan", "x3", "", "u0", True):
        with pytest.raises(ConfigError, match="noise rule"):
            parse_rule(rule)
    with pytest.raises(ConfigError, match="more than 2"):
        parse_rule("t2")
    with pytest.raises(ConfigError, match="subjects"):
        noise_for(tiny("gpt2"), tokenizer, "s3")
    with pytest.raises(ConfigError, match="texts"):
        noise_for(tiny("gpt2"), tokenizer, "m", subjects=["France"])


def test_half_precision(tiny: Tiny, tokenizer: Any) -> None:
    found = trace(tiny("llama").to(torch.bfloat16), tokenizer, FACT, LOUD, TracingConfig(samples=2))
    assert found.restored.dtype == torch.float64 and 0 < found.corrupted < 1
    assert bool(((found.restored > 0) & (found.restored <= 1)).all())


# -- facts ---------------------------------------------------------------------------------------------------------------


def test_facts_the_model_does_not_know_are_dropped_and_named(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2").double()
    wanted = continuation_ids(tokenizer, FACT.prompt, "Seattle")[0]
    said = tokenizer.decode([wanted]).strip()  # the first piece of Seattle, and what the model is made to say
    loud = 50 * torch.nn.functional.one_hot(torch.tensor(wanted), model.config.vocab_size)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + loud)
    facts = [FACT, KnownFact(FACT.prompt, "France", said), KnownFact(FACT.prompt, "France", "Paris")]
    for correct, kept in (("first_token", [True, True, False]), ("any", [True, True, True])):
        found = list(trace_facts(model, tokenizer, facts, LOUD, correct=correct))  # type: ignore[arg-type]
        assert [isinstance(f, Trace) for f in found] == kept
    [dropped] = trace_facts(model, tokenizer, facts[2:], LOUD)
    assert isinstance(dropped, Dropped) and repr(said) in dropped.reason and "'Paris'" in dropped.reason
    whole = KnownFact(FACT.prompt, "France", "Seattle Centre")  # its first token is said, the whole is not one token
    [first] = trace_facts(model, tokenizer, [whole], LOUD)
    [lost] = trace_facts(model, tokenizer, [whole], LOUD, correct="whole")
    [same] = trace_facts(model, tokenizer, facts[1:2], LOUD, correct="whole")
    assert isinstance(first, Trace) and isinstance(lost, Dropped) and isinstance(same, Trace)
    [long] = trace_facts(model, tokenizer, [KnownFact("x " * 200 + "France is", "France")], LOUD)
    assert isinstance(long, Dropped) and "128 tokens" in long.reason  # one bad fact does not end a run of thousands
    with pytest.raises(ConfigError, match="first_token, whole, any"):
        next(trace_facts(model, tokenizer, facts, LOUD, correct="maybe"))  # type: ignore[arg-type]


def test_another_answer(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2").double()
    found = trace(model, tokenizer, FACT, LOUD, TracingConfig(samples=2), answer="Paris")
    [ids] = token_ids(tokenizer, [FACT.prompt])
    [joint] = token_ids(tokenizer, [f"{FACT.prompt} Paris"])
    assert found.answer_id == joint[len(ids)]
    with torch.no_grad():
        clean = float(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[joint[len(ids)]])
    assert found.clean == pytest.approx(clean, rel=1e-12)


def test_facts_from_files(tmp_path: Path) -> None:
    rows = [
        {"prompt": "{} lies in", "subject": "Zürich", "attribute": "Switzerland", "known_id": 3},
        {"prompt": "The capital of France is", "subject": "France"},
    ]
    lines, array = tmp_path / "facts.jsonl", tmp_path / "facts.json"
    lines.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows), encoding="utf-8")
    array.write_text(json.dumps(rows), encoding="utf-8")
    assert read_facts(lines) == read_facts(array) == [KnownFact("Zürich lies in", "Zürich", "Switzerland"), FACT]
    for text, message in (
        ('{"prompt": "x"}', "row 1: expected subject"),
        ('{"prompt": "a", "subject": "b"}', "row 1: expected the subject 'b'"),
        ("{", "line 1, is not valid JSON"),
        ("[1]", "row 1: expected an object"),
        ("", "found none"),
        ('{"prompt": "{} and {}", "subject": "b"}', "at most one"),
        ('{"prompt": "{} is not b", "subject": "b"}', "found it again"),
        ('{"prompt": "a", "subject": "a", "attribute": ""}', "expected attribute"),
    ):
        lines.write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=message):
            read_facts(lines)
    with pytest.raises(RequestError, match="cannot read"):
        read_facts(tmp_path / "nowhere")


# -- averages ------------------------------------------------------------------------------------------------------------


def test_token_classes() -> None:
    def classes(n: int, first: int, last: int, overlapping: bool = False) -> list[list[int]]:
        return list(token_classes(n, first, last, overlapping=overlapping).values())

    assert classes(9, 1, 4) == [[1], [2, 3], [4], [5], [6, 7], [8]]
    assert classes(9, 1, 4, True) == [[1], [2, 3], [4], [5], [6, 7], [8]]
    assert classes(4, 2, 2) == [[], [], [2], [], [], [3]]  # one token, one behind it
    assert classes(4, 2, 2, True) == [[2], [], [2], [3], [], [3]]  # as published: both count twice
    assert classes(4, 2, 3) == [[2], [], [3], [], [], []]  # the subject ends the prompt
    assert classes(4, 2, 3, True) == [[2], [], [3], [], [], [3]]
    assert classes(1, 0, 0) == [[], [], [0], [], [], []]


def made(restored: list[list[float]], first: int, last: int, clean: float = 0.9, corrupted: float = 0.1) -> Trace:
    values = torch.tensor(restored, dtype=torch.float64)
    tokens = tuple(f" t{i}" for i in range(len(restored)))
    return Trace(FACT, tokens, first, last, " Paris", 7, "hidden", 1, (), clean, corrupted, values)


def test_averages_by_hand() -> None:
    traces = [
        made([[0.1, 0.1], [0.2, 0.3], [0.5, 0.7], [0.1, 0.9]], 1, 2),
        made([[0.3, 0.2], [0.5, 0.6], [0.4, 0.6], [0.8, 0.4], [0.2, 0.5]], 0, 3, clean=0.8, corrupted=0.2),
    ]
    found = average(traces)
    assert (found.n, found.n_layers, list(found.effects)) == (2, 2, [CLASSES[i] for i in (0, 1, 2, 5)])
    total = found.total_effect
    assert float(total.mean) == pytest.approx(0.7) and float(total.half) == pytest.approx(1.96 * 0.1)  # 0.8 and 0.6
    last = found.effects["last subject"]  # 0.4, 0.6 and 0.6, 0.2
    torch.testing.assert_close(last.mean, torch.tensor([0.5, 0.4], dtype=torch.float64))
    torch.testing.assert_close(last.half, torch.tensor([0.196, 0.392], dtype=torch.float64))
    middle = found.effects["middle subject"]  # one fact has it: its two tokens are one observation
    assert middle.n == 1 and middle.mean.tolist() == pytest.approx([0.25, 0.4]) and bool(middle.half.isnan().all())
    assert found.peak[:2] == ("last", 1) and found.peak[2] == pytest.approx(0.55)  # 0.8 and 0.3
    assert found.json()["indirect_effects"]["last subject"]["high"] == pytest.approx([0.696, 0.792])
    assert average(traces, overlapping=True).effects["first subsequent"].n == 2
    with pytest.raises(RequestError, match="one kind"):
        average([*traces, made([[0.1]], 0, 0)])
    with pytest.raises(RequestError, match="found none"):
        average([])


def test_rows_go_on_where_they_stopped(tmp_path: Path) -> None:
    path, about, config = tmp_path / "rows.jsonl", {"noise": 1}, TracingConfig()
    rows = TraceRows(path, about)
    kept, dropped = made([[0.1, 0.2], [0.3, 0.4]], 0, 0), Dropped(NEEDLE, "unknown\u2028")
    rows.add(config, FACT, kept)
    rows.add(config, NEEDLE, dropped)
    rows.keep()
    again = TraceRows(path, about)
    found = again.get(TracingConfig(batch_tokens=1), FACT)
    assert len(again) == 2 and again.get(config, NEEDLE) == dropped and again.get(TracingConfig(seed=2), FACT) is None
    assert isinstance(found, Trace) and torch.equal(found.restored, kept.restored) and found.json() == kept.json()
    with pytest.raises(ConfigError, match="another model, noise or rule"):
        TraceRows(path, {"noise": 2})
    path.write_text("{}\nnonsense\n")
    with pytest.raises(ConfigError, match="not a file of traces"):
        TraceRows(path, about)


# -- figures -------------------------------------------------------------------------------------------------------------


def test_heat_map(tmp_path: Path) -> None:
    settings, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    one = made([[0.1, 0.1], [0.2, 0.3], [0.5, 0.05], [0.1, 0.9]], 1, 2)
    odd = Trace(**{**vars(one), "tokens": ("$x$", " a\n", "東", "_"), "kind": "mlp", "window": 2})
    figure = figures.heat_map([odd, Trace(**{**vars(odd), "kind": "hidden"})])
    mlp, hidden, *_ = figure.axes
    assert [t.get_text() for t in mlp.get_yticklabels()] == ["$x$", "a\\n*", "東*", "_"]
    image = mlp.images[0]
    np.testing.assert_array_equal(image.get_array(), one.restored.numpy())
    assert image.get_clim() == (0.1, 0.9) and image.get_cmap().name == "Greens"
    assert mlp.get_xlabel() == "centre of 2 layers" and hidden.get_xlabel() == "layer"
    for name, start in (("a.png", b"\x89PNG"), ("b.pdf", b"%PDF"), ("c.svg", b"<?xml")):
        figures.save_figure(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert dict(matplotlib.rcParams) == settings and matplotlib.get_backend() == backend
    with pytest.raises(ConfigError, match=r"\*\.png"):
        figures.save_figure(figure, tmp_path / "a.gif")
    with pytest.raises(RequestError, match="several prompts"):
        figures.heat_map([one, odd])


def test_average_figure(tmp_path: Path) -> None:
    traces = [made([[0.1, 0.05], [0.2, 0.3], [0.5, 0.05], [0.1, 0.9]], 0, 2) for _ in range(2)]
    figure = figures.average_figure([average(traces)])
    heat, lines, *_ = figure.axes
    rows = heat.images[0].get_array()
    assert rows is not None and rows[CLASSES.index("last subject"), 1] == 0.0  # -0.05, clipped
    assert (
        rows[CLASSES.index("last"), 1] == pytest.approx(0.8)
        and np.ma.getmaskarray(rows)[CLASSES.index("further")].all()
    )
    assert [t.get_text() for t in heat.get_yticklabels()] == list(CLASSES)
    last = next(line for line in lines.get_lines() if line.get_label() == "last subject")
    assert np.asarray(last.get_ydata())[1] == pytest.approx(-0.05)
    figures.save_figure(figure, tmp_path / "averages.png")


# -- the command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, _bpe: str) -> str:
    folder = tmp_path_factory.mktemp("trace") / "model"
    backend = Tokenizer.from_str(_bpe)
    tiny_model("gpt2", 3).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=END).save_pretrained(
        folder
    )
    return str(folder)


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["trace", *map(str, args)])


def refused(*args: str | Path) -> str:
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return str(line)


def test_command_for_one_prompt(saved: str, tmp_path: Path) -> None:
    out = tmp_path / "fig.png"
    one = [FACT.prompt, "--subject", "France", "--model", saved, "--samples", "2"]
    result = run(*one, "--kind", "all", "--sever", "both", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert out.read_bytes().startswith(b"\x89PNG") and value["out"] == str(out)
    assert [(t["kind"], t["window"], t["sever"]) for t in value["traces"]] == [
        ("hidden", 1, []), ("mlp", 1, []), ("attention", 1, []), ("hidden", 1, ["mlp", "attention"])
    ]  # fmt: skip
    model, tokenizer = loading.load(saved)
    noise = noise_for(model, tokenizer, "s3", subjects=["France"])
    wanted = trace(model, tokenizer, FACT, noise, TracingConfig(samples=2))
    assert value["noise"] == {"rule": "s3", "scale": noise.scale} and value["total_effect"] == wanted.total_effect
    torch.testing.assert_close(torch.tensor(value["traces"][0]["restored"]).double(), wanted.restored)
    assert value["subject_tokens"] == [wanted.first, wanted.last] and value["answer"] == wanted.answer
    text = run(*one)
    assert text.exit_code == 0 and "ce*" in text.stdout and "total effect" in text.stdout


def test_command_for_facts(saved: str, tmp_path: Path) -> None:
    file, rows, out = (tmp_path / name for name in ("facts.jsonl", "rows.jsonl", "averages.svg"))
    facts: list[dict[str, str]] = [{"prompt": f.prompt, "subject": f.subject} for f in (FACT, NEEDLE)]
    facts.append({"prompt": "Rome is in", "subject": "Rome", "attribute": "xyz"})
    file.write_text("".join(f"{json.dumps(f)}\n" for f in facts))
    args = ["--facts", file, "--model", saved, "--samples", "2", "--noise", "0.5", "--rows", rows, "--kind", "mlp"]
    first = run(*args, "--out", out, "--json")
    assert first.exit_code == 0, first.output
    value = json.loads(first.stdout)
    assert (value["n_facts"], value["n_traced"], len(value["dropped"])) == (
        3,
        2,
        1,
    ) and "1 of 3 facts dropped" in first.stderr
    [a] = value["averages"]
    assert a["n"] == 2 and len(a["indirect_effects"]["last subject"]["mean"]) == 3 and out.exists()
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[:2]) + "\n")  # as if it had been stopped after the first fact
    second = run(*args, "--json")
    assert "going on after 1 of 3" in second.stderr and json.loads(second.stdout)["averages"] == value["averages"]
    assert rows.read_text().splitlines() == lines
    assert "another model, noise or rule" in refused(*args, "--noise", "0.6")
    assert "last subject" in run(*args).stdout
    assert "none of the 1 facts" in refused("--facts", _file(tmp_path, facts[2:]), "--model", saved)


def _file(folder: Path, facts: list[dict[str, str]]) -> Path:
    path = folder / "other.jsonl"
    path.write_text("".join(f"{json.dumps(f)}\n" for f in facts))
    return path


def test_atlas_brings_its_own_facts(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "bundled", lambda: {"atlas": Path(saved)})
    result = run("--model", "atlas", "--n", "3", "--samples", "2", "--correct", "any", "--noise", "m", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["n_traced"] == 3


def test_command_refuses(saved: str, tmp_path: Path) -> None:
    prompt = [FACT.prompt, "--model", saved]
    assert "only one of them" in refused(*prompt)
    assert "'Spain'" in refused(*prompt, "--subject", "Spain")
    assert "*.png" in refused(*prompt, "--subject", "France", "--out", tmp_path / "x.gif")
    assert "noise rule" in refused(*prompt, "--subject", "France", "--noise", "x")
    assert "--texts" in refused(*prompt, "--subject", "France", "--noise", "m")
    assert "--sever" in refused(*prompt, "--subject", "France", "--kind", "mlp", "--sever", "mlp")
    assert "--facts" in refused("--model", saved)
    assert "found both" in refused(*prompt, "--subject", "France", "--facts", tmp_path / "facts")
