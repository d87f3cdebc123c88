"""Encoder-decoders and classifiers go the way of decoders: parts, states, answers, losses, fingerprints, loading."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import ANSWERERS, CLASSIFIERS, LABELS, hooks_of, tiny_model, tiny_other
from errata.errors import AnatomyError, BaseMismatchError, ConfigError, RequestError, ShapeError
from errata.model import tokens
from errata.model.anatomy import Anatomy, anatomy
from errata.model.fingerprint import base_of, check_base
from errata.model.generate import greedy, greedy_answers
from errata.model.hooks import Capture, intervene
from errata.model.labels import label_id, label_logits
from errata.model.loading import load
from errata.model.room import room
from errata.model.states import last_states, states_at
from errata.model.targets import IGNORED, all_said, supervised

Tokenizer = PreTrainedTokenizerFast
IDS, FED = torch.arange(1, 13).reshape(2, 6), torch.arange(20, 28).reshape(2, 4)
TEXTS = ["The capital of France is", "Zürich", "The Space Needle is located in the city of", "x"]
TARGETS = ["Paris", "Switzerland", "Seattle", "French"]


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": FED} if model.config.is_encoder_decoder else {})


def stacks(parts: Anatomy) -> list[Anatomy]:
    return [parts] if parts.encoder is None else [parts, parts.encoder]


@pytest.mark.parametrize("family", (*ANSWERERS, *CLASSIFIERS))
def test_every_path_exists_and_maps_what_it_should(family: str) -> None:
    model = tiny_other(family)
    parts = anatomy(model)
    answers = family in ANSWERERS
    assert (parts.family, parts.role, parts.d_model) == (family, "encoder-decoder" if answers else "classifier", 32)
    assert [stack.n_layers for stack in stacks(parts)] == ([2, 3] if answers else [2])
    for stack in stacks(parts):
        for paths in (stack.blocks, stack.attention, stack.mlp_in, stack.mlp_out):
            assert len(paths) == stack.n_layers and all(isinstance(model.get_submodule(p), nn.Module) for p in paths)
        assert stack.module(model, stack.embed) is model.get_input_embeddings()
        for out, into in zip(stack.mlp_out, stack.mlp_in, strict=True):
            assert model.get_submodule(out).weight.shape == (32, 48) == model.get_submodule(into).weight.shape[::-1]
    assert len(parts.cross_attention) == (2 if answers else 0)
    if answers:
        assert parts.encoder is not None and parts.encoder.role == "encoder" and parts.encoder.head is None
        assert parts.module(model, parts.head or "") is model.get_output_embeddings()
    else:
        assert parts.head == "classifier" and parts.final_norm is None


def test_t5_has_its_gate_where_it_is_gated() -> None:
    gated, plain = anatomy(tiny_other("t5")), anatomy(tiny_other("t5", feed_forward_proj="relu"))
    assert [p[0][-4:] for p in (gated.mlp_gate, gated.mlp_in)] == ["wi_0", "wi_1"]
    assert plain.mlp_gate == () and plain.mlp_in[0].endswith(".wi")


@pytest.mark.parametrize("site", ["encoder.0", "encoder.-1", "decoder.0", 0])
def test_mlp_output_enters_the_residual_of_t5(site: str | int) -> None:
    model = tiny_other("t5")
    parts, shift = anatomy(model), torch.linspace(-1, 1, 32)
    with torch.no_grad(), Capture(model, [parts.site(site)]) as before:
        model(**inputs_of(model))
    shifted = intervene(model, {parts.mlp_site(site): lambda v: v + shift})
    with torch.no_grad(), shifted, Capture(model, [parts.site(site)]) as now:
        model(**inputs_of(model))
    moved = now[parts.site(site)] - before[parts.site(site)]
    torch.testing.assert_close(moved, shift.expand_as(moved), atol=1e-5, rtol=0)  # float32 rounding of one sum
    assert moved.shape[1] == (6 if "encoder" in str(site) else 4) and hooks_of(model) == []


@pytest.mark.parametrize("family", ("t5", "bert"))
def test_final_is_what_the_head_reads(family: str) -> None:
    model = tiny_other(family)
    parts = anatomy(model)
    with torch.no_grad(), Capture(model, [parts.site("final")]) as seen:
        out = model(**inputs_of(model), output_hidden_states=True)
    final = seen[parts.site("final")]
    states = out.decoder_hidden_states if family == "t5" else out.hidden_states
    assert torch.equal(final, states[-1])
    with torch.no_grad():  # T5 with a tied head scales what it reads
        logits = model.lm_head(final * 32**-0.5) if family == "t5" else model.classifier(model.bert.pooler(final))
    torch.testing.assert_close(logits, out.logits)


def test_sites_of_stacks() -> None:
    parts = anatomy(tiny_other("t5"))
    assert parts.site("encoder.2") == parts.site("encoder.-1") == "encoder.block.2"
    assert parts.site(1) == parts.site("decoder.1") == "decoder.block.1"
    assert (parts.site("final"), parts.site("encoder.final")) == (
        "decoder.final_layer_norm",
        "encoder.final_layer_norm",
    )
    assert parts.mlp_site("encoder.0") == "encoder.block.0.layer.1.DenseReluDense.wo"
    with pytest.raises(AnatomyError, match="from -3 to 2"):
        parts.site("encoder.3")
    with pytest.raises(AnatomyError, match="the stacks encoder and decoder"):
        parts.site("middle.0")
    with pytest.raises(AnatomyError, match="one stack"):
        anatomy(tiny_other("bert")).site("encoder.0")


@pytest.mark.parametrize("family", (*ANSWERERS, *CLASSIFIERS))
def test_states_equal_hidden_states_of_each_row_alone(family: str, closing_tokenizer: Tokenizer) -> None:
    model = tiny_other(family)
    rows = tokens.token_ids(closing_tokenizer, TEXTS)
    positions: list[list[int]] = [[0, -1], [-1], [], [0]]
    answers = family in ANSWERERS
    first, last = ("encoder.0", "encoder.final") if answers else (0, "final")
    got = states_at(model, rows, positions, [first, last], batch_tokens=40)
    assert hooks_of(model) == []
    for i, row in enumerate(rows):
        given = {"input_ids": torch.tensor([row])} | ({"decoder_input_ids": torch.tensor([[0]])} if answers else {})
        with torch.no_grad():
            out = model(**given, output_hidden_states=True)
        hidden = out.encoder_hidden_states if answers else out.hidden_states
        torch.testing.assert_close(got[first][i], hidden[1][0][positions[i]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[last][i], hidden[-1][0][positions[i]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ANSWERERS)
def test_states_of_the_decoder(family: str, closing_tokenizer: Tokenizer) -> None:
    model = tiny_other(family)
    rows = tokens.token_ids(closing_tokenizer, TEXTS)
    fed = [[0, 5, 6], [0, 7], [0], [0, 9, 9, 4]]
    got = states_at(model, rows, [[0, -1], [1], [0], [2]], [0, "final"], decoder_rows=fed, batch_tokens=40)
    for i, (row, answer, where) in enumerate(zip(rows, fed, [[0, -1], [1], [0], [2]], strict=True)):
        with torch.no_grad():
            out = model(torch.tensor([row]), decoder_input_ids=torch.tensor([answer]), output_hidden_states=True)
        torch.testing.assert_close(got[0][i], out.decoder_hidden_states[1][0][where], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["final"][i], out.decoder_hidden_states[-1][0][where], atol=1e-5, rtol=1e-5)
    start = states_at(model, rows, [[0]] * 4, ["final"], decoder_rows=[[0]] * 4)["final"]
    torch.testing.assert_close(last_states(model, closing_tokenizer, TEXTS), torch.cat(start))
    with pytest.raises(AnatomyError, match="sites of one stack"):
        states_at(model, rows, [[0]] * 4, ["final", "encoder.final"])
    with pytest.raises(ShapeError, match="one decoder row per row"):
        states_at(model, rows, [[0]] * 4, ["final"], decoder_rows=[[0]])


def test_greedy_answers_of_an_encoder_decoder(closing_tokenizer: Tokenizer) -> None:
    """What generation says, prompt by prompt, is what stepping by hand says."""
    model = tiny_other("t5")
    said = greedy(model, closing_tokenizer, TEXTS, max_new_tokens=5)
    for text, found in zip(TEXTS, said, strict=True):
        row, answer = torch.tensor([closing_tokenizer(text)["input_ids"]]), [0]
        for _ in range(5):
            with torch.no_grad():
                answer.append(int(model(row, decoder_input_ids=torch.tensor([answer])).logits[0, -1].argmax()))
            if answer[-1] == 0:
                break
        assert found == closing_tokenizer.decode(answer[1:], skip_special_tokens=True)
    assert len(set(said)) > 1


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_answers_with_the_name_of_its_label(family: str, closing_tokenizer: Tokenizer) -> None:
    model = tiny_other(family)
    logits = label_logits(model, closing_tokenizer, TEXTS, batch=3)
    for text, row in zip(TEXTS, logits, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(
                row, model(**closing_tokenizer(text, return_tensors="pt")).logits[0], atol=1e-5, rtol=1e-5
            )
    assert greedy_answers(model, closing_tokenizer, TEXTS) == [LABELS[i] for i in logits.argmax(-1)]
    assert label_id(model, "SUPPORTS") == 1
    with pytest.raises(RequestError, match="REFUTES, SUPPORTS, NEITHER"):
        label_id(model, "supports")
    with pytest.raises(ConfigError, match="two labels"):
        label_logits(tiny_other(family, num_labels=1), closing_tokenizer, TEXTS)


@pytest.mark.parametrize("family", ("gpt2", "llama", "t5", "bert"))
def test_losses_are_those_of_transformers(family: str, tokenizer: Tokenizer, closing_tokenizer: Tokenizer) -> None:
    """Each row of a padded batch has the loss that the model itself computes for it alone."""
    decoder = family in ("gpt2", "llama")
    model, used = (tiny_model(family), tokenizer) if decoder else (tiny_other(family), closing_tokenizer)
    targets = [LABELS[i % 3] for i in range(4)] if family == "bert" else TARGETS
    batch = supervised(model, used, TEXTS, targets)
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    nll, said = batch.nll(logits), batch.said(logits)
    assert nll.shape == said.shape == (4,)
    for i, (text, target) in enumerate(zip(TEXTS, targets, strict=True)):
        ids = used(text)["input_ids"]
        if family == "bert":
            labels, given = torch.tensor([LABELS.index(target)]), ids
        elif family == "t5":
            labels, given = torch.tensor([used(target)["input_ids"]]), ids
        else:
            end = used(f" {target}")["input_ids"]
            labels, given = torch.tensor([[IGNORED] * len(ids) + end]), ids + end
        with torch.no_grad():
            out = model(torch.tensor([given]), labels=labels)
        torch.testing.assert_close(nll[i], out.loss, atol=1e-5, rtol=1e-5)
        assert all_said(model, used, [(text, target)]) == [bool(said[i])]
    best = greedy_answers(model, used, TEXTS) if family == "bert" else []
    assert [t == b for t, b in zip(targets, best, strict=False)] == (said.tolist() if best else [])


def test_what_is_said_is_recognised(closing_tokenizer: Tokenizer) -> None:
    """A head that is made to say the target, token by token and then the end, is judged to have said it."""
    model = tiny_other("t5")
    batch = supervised(model, closing_tokenizer, TEXTS, TARGETS)
    logits = nn.functional.one_hot(batch.labels.clamp(min=0), 384).float()
    assert batch.said(logits).all()
    logits[1, 0] = 0
    logits[1, 0, 3] = 1
    assert batch.said(logits).tolist() == [True, False, True, True]
    with pytest.raises(ShapeError, match="one target per prompt"):
        supervised(model, closing_tokenizer, TEXTS, TARGETS[:2])


@pytest.mark.parametrize("family", ("t5", "bert"))
def test_bases_are_told_apart(family: str, closing_tokenizer: Tokenizer) -> None:
    model = tiny_other(family)
    base = base_of(model, closing_tokenizer)
    check_base(base, tiny_other(family), closing_tokenizer)
    edited = "encoder.block.0.layer.1.DenseReluDense.wo.weight" if family == "t5" else "classifier.weight"
    assert edited in base["weights"]
    other = tiny_other(family)
    with torch.no_grad():
        other.get_parameter(edited)[0, 0] += 1.0
    with pytest.raises(BaseMismatchError, match=edited):
        check_base(base, other, closing_tokenizer)
    changed = {"num_layers": 2} if family == "t5" else {"id2label": {0: "NO", 1: "YES", 2: "MAYBE"}}
    with pytest.raises(BaseMismatchError, match="encoder_layers 3" if family == "t5" else "labels"):
        check_base(base, tiny_other(family, **changed), closing_tokenizer)


@pytest.mark.parametrize("family", (*ANSWERERS, *CLASSIFIERS))
def test_loading_finds_the_head(family: str, closing_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny_other(family)
    model.save_pretrained(tmp_path)
    closing_tokenizer.save_pretrained(tmp_path)
    found, tokenizer = load(tmp_path)
    assert type(found) is type(model) and not found.training
    with torch.no_grad():
        assert torch.equal(found(**inputs_of(found)).logits, model(**inputs_of(model)).logits)
    assert tokenizer("x")["input_ids"][-1] == 0


def test_relative_positions_set_no_bound(closing_tokenizer: Tokenizer) -> None:
    assert room(tiny_other("t5", n_positions=8)) is None and room(tiny_other("bert")) == 128
    assert len(greedy(tiny_other("t5"), closing_tokenizer, ["x" * 200], 2)) == 1
    with pytest.raises(RequestError, match="room for 128"):
        greedy(tiny_other("bert"), closing_tokenizer, ["x" * 200], 2)
