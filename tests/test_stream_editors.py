"""Streaming editors on encoder-decoders and classifiers: what they write, that it comes off again, and that it is kept."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import errata
from conftest import LABELS, hooks_of, tiny_model, tiny_other
from errata.atlas.docket import edit_stream, upstream
from errata.bench.ask import Question, ask
from errata.bench.cases import Probe
from errata.bench.streams import NO_EDIT
from errata.codebook import Place
from errata.edit import EditRequest
from errata.editors import _adapter, get_editor
from errata.editors._items import items_of, logits_of, losses_of, says
from errata.editors.grace import GRACE
from errata.errors import AnatomyError, ConfigError, RequestError
from errata.model.anatomy import anatomy, submodule
from errata.model.generate import greedy
from errata.model.hooks import Capture
from errata.model.labels import label_logits, label_names, predicted_labels
from errata.model.targets import supervised
from errata.model.tokens import pad
from errata.output_table import Site
from errata.patch import attach_rows, load_patch

QUICK: dict[str, dict[str, Any]] = {
    "grace": {"radius": 0.01, "steps": 40, "lr": 1.0},
    "defer": {"steps": 40, "replace": "all"},
    "memory": {"steps": 60, "replace": "all"},
    "ft_ewc": {"steps": 20, "parameters": "block", "layers": (-1,)},
    "ft_retrain": {"steps": 20, "every": 2, "epochs": 1, "parameters": "block", "layers": (-1,)},
    "ft": {"steps": 20, "parameters": "block", "layers": (-1,), "lr": 1e-2},
}
PLACES: list[tuple[str, dict[str, Any]]] = [
    ("t5", {"layer": "encoder.1", "replace": "prompt"}),  # GRACE's published place
    ("t5", {"layer": 0}),
    ("bert", {"layer": 0}),
]
TEXTS = ["The capital of France is", "The Space Needle is located in the city of"]


def requests_for(family: str) -> list[EditRequest]:
    targets = ("SUPPORTS", "NEITHER") if family == "bert" else ("Earth", "Paris")
    return [EditRequest(prompt=p, target_new=t) for p, t in zip(TEXTS, targets, strict=True)]


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    batch = supervised(
        model, tokenizer, [*TEXTS, "Brazil"], ["SUPPORTS"] * 3 if model.config.num_labels == 3 else TEXTS[:1] * 3
    )
    with torch.no_grad():
        found: torch.Tensor = model(**batch.inputs).logits
    return found


@pytest.mark.parametrize("family, place", PLACES, ids=["t5-encoder", "t5-decoder", "bert"])
@pytest.mark.parametrize("method", ["grace", "defer", "memory", "ft", "ft_ewc", "ft_retrain"])
def test_edits_hold_come_off_and_are_kept(
    method: str, family: str, place: dict[str, Any], closing_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    kind = get_editor(method)
    model = tiny_other(family)
    if ("classifier" if family == "bert" else "encoder-decoder") not in kind.supports:
        pytest.skip(f"{method} does not claim it")
    at = place if method == "grace" else {} if method.startswith("ft") else {"layer": place["layer"]}
    requests, before = requests_for(family), logits(model, closing_tokenizer)
    items = items_of(closing_tokenizer, requests)
    with torch.no_grad():
        lost = losses_of(model, items)
    patch = kind(**QUICK[method] | at).fit(model, closing_tokenizer, requests)
    assert torch.equal(logits(model, closing_tokenizer), before) and hooks_of(model) == []
    patch.save(tmp_path / "patch.safetensors")
    with patch.attach(model, closing_tokenizer):
        edited = logits(model, closing_tokenizer)
        with torch.no_grad():
            left = losses_of(model, items)
        right = says(model, items)
        if method == "grace":  # a random T5 gives one encoder's state too little weight to say a whole word by it
            assert bool((left < lost).all()) and (family != "bert" or right == [True, True])
        assert float(left[-1]) < float(lost[-1])  # the latest of a stream is learnt
        texts = greedy(model, closing_tokenizer, TEXTS, 8)
        for text, request, ok in zip(texts, requests, right, strict=True):
            assert not ok or text.strip() == request.target_new  # generation runs the encoder apart
    assert torch.equal(logits(model, closing_tokenizer), before) and hooks_of(model) == []
    assert not torch.equal(edited, before)
    with load_patch(tmp_path / "patch.safetensors").attach(model, closing_tokenizer):
        assert torch.equal(logits(model, closing_tokenizer), edited)
    if method in ("grace", "defer"):  # padding and company change nothing
        with patch.attach(model, closing_tokenizer), torch.no_grad():
            together = logits_of(model, items)
            for i, item in enumerate(items):
                alone = logits_of(model, [item])
                torch.testing.assert_close(together[i, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


def learn(model: Any, tokenizer: Any, answers: dict[str, str]) -> None:
    """Train a model on these answers: in a random one an encoder bears too little on the decoder to choose a word."""
    items = items_of(tokenizer, [EditRequest(prompt=p, target_new=t) for p, t in answers.items()])
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        losses_of(model, items).sum().backward()
        optimiser.step()


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_the_published_codebook_reads_the_prompt(family: str, closing_tokenizer: PreTrainedTokenizerFast) -> None:
    """Without a layer or a key: the tokens before the last are replaced, in an encoder, and the model says the target."""
    model, [request, _] = tiny_other(family), requests_for(family)
    if family == "t5":
        learn(model, closing_tokenizer, {TEXTS[0]: "Paris", "Japan is on": "Earth", "It is on": "Earth"})
    patch = GRACE.preset("published", steps=50).fit(model, closing_tokenizer, [request])
    [part] = patch.outputs
    assert part.place == Place("encoder.1" if family == "t5" else 0, "mlp_out", "prompt", "last")
    assert patch.report[request.id]["converged"] and not says(model, items_of(closing_tokenizer, [request]))[0]
    with patch.attach(model, closing_tokenizer):
        assert greedy(model, closing_tokenizer, [request.text], 8)[0].strip() == request.target_new


def test_a_place_where_nothing_would_be_replaced_is_refused(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    bert, t5 = tiny_other("bert"), tiny_other("t5")
    for method in ("grace", "defer", "memory"):
        kind = get_editor(method)
        with pytest.raises(ConfigError, match="with key 'first', found 'prompt'"):
            kind(key="first", replace="prompt").fit(bert, closing_tokenizer, requests_for("bert"))
        with pytest.raises(ConfigError, match="replace='prompt'.*the decoder's 0.*'encoder.1'"):
            kind(layer=0, replace="prompt").fit(t5, closing_tokenizer, requests_for("t5"))
    subject = EditRequest(prompt="The capital of {} is", subject="France", target_new="Earth")
    with pytest.raises(ConfigError, match="key='subject'.*found the decoder's 1, which asks at its start token"):
        GRACE(key="subject", layer=1).fit(t5, closing_tokenizer, [subject])


def test_the_subject_asks_in_an_encoder(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    """The key is the map's input at the subject's last token; another prompt that begins alike is answered there too."""
    model = tiny_other("t5")
    subject = EditRequest(prompt="The capital of {} is", subject="France", target_new="Earth")
    patch = GRACE(**QUICK["grace"], key="subject").fit(model, closing_tokenizer, [subject])
    [part] = patch.outputs
    assert part.place.layer == "encoder.1" and part.place.replace == "each"
    ids = closing_tokenizer(subject.text)["input_ids"]
    at = len(closing_tokenizer("The capital of France")["input_ids"]) - 2  # the end token stands behind it
    path = part.place.path(anatomy(model))
    with torch.no_grad(), Capture(model, [path], of="input") as asked, Capture(model, [path]) as plain:
        model.encoder(torch.tensor([ids]))
    torch.testing.assert_close(part.key, asked[path][0, at], atol=1e-5, rtol=1e-5)
    with patch.attach(model, closing_tokenizer), torch.no_grad(), Capture(model, [path]) as edited:
        model.encoder(torch.tensor([ids]))
    changed = (edited[path] != plain[path])[0].any(-1)
    assert changed.nonzero()[:, 0].tolist() == [at] and torch.allclose(edited[path][0, at], part.value)
    curve = patch.report[subject.id]["curve"]
    assert min(curve) < curve[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("method", ["defer", "memory"])
def test_training_runs_the_layers_below_once(
    method: str, family: str, closing_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And comes to the very weights that whole passes come to."""
    model = tiny_other(family) if family == "bert" else tiny_model(family)
    editor: Any = get_editor(method)(**QUICK[method] | {"stop": 0.0, "skip": False, "layer": 1})
    maps, calls = anatomy(model).mlp_out, [0, 0]

    def count(i: int) -> None:
        calls[i] += 1

    kept = [submodule(model, path).register_forward_pre_hook(lambda *_, i=i: count(i)) for i, path in enumerate(maps)]
    quick = editor.fit(model, closing_tokenizer, requests_for(family))
    steps = sum(own["steps"] for own in quick.report.values())
    assert calls == [3, steps + 3]  # below: before each training, and for both at once behind them
    monkeypatch.setattr(_adapter._Run, "_above", lambda self: nullcontext())
    whole = editor.fit(model, closing_tokenizer, requests_for(family))
    for hook in kept:
        hook.remove()
    [one], [other] = quick.parts, whole.parts
    assert all(torch.equal(t, other.weights[name]) for name, t in one.weights.items())
    assert [own["curve"] for own in quick.report.values()] == [own["curve"] for own in whole.report.values()]


def test_a_classifier_asks_at_the_token_that_its_head_reads(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    """Outside the balls every bit stays; only the first token is replaced, and the key is the map's input there."""
    model = tiny_other("bert")
    patch = GRACE(**QUICK["grace"], layer=0).fit(model, closing_tokenizer, requests_for("bert"))
    part = patch.outputs[0]
    assert (part.place.ask, part.place.replace) == ("first", "last")
    rows = [closing_tokenizer(t)["input_ids"] for t in (TEXTS[0], "Zürich lies in Switzerland", "Tokyo")]
    seen: list[torch.Tensor] = []
    module = model.bert.encoder.layer[0].output.dense
    with torch.no_grad():
        plain = model(**pad(rows, 0).inputs(model)).logits
        hook = module.register_forward_hook(lambda m, args, out: seen.append(args[0][0, 0]))
        model(torch.tensor([rows[0]]))
        hook.remove()
        torch.testing.assert_close(part.key, seen[0], atol=1e-5, rtol=1e-5)
        with patch.attach(model, closing_tokenizer):
            edited = model(**pad(rows, 0).inputs(model)).logits
    assert torch.equal(edited[1:], plain[1:]) and not torch.equal(edited[0], plain[0])


def test_what_cannot_be_meant_is_refused(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    bert, t5 = tiny_other("bert"), tiny_other("t5")
    wrong = EditRequest(prompt=TEXTS[0], target_new="PERHAPS")
    for method in ("grace", "defer", "memory", "ft_ewc"):
        with pytest.raises(RequestError, match="REFUTES, SUPPORTS, NEITHER.*PERHAPS"):
            get_editor(method)(**QUICK[method]).fit(bert, closing_tokenizer, [wrong])
    first, second = requests_for("t5")
    patch = GRACE(**QUICK["grace"], layer="encoder.1").fit(t5, closing_tokenizer, [first])
    with pytest.raises(ConfigError, match=r"encoder\.2.*encoder\.1"):
        GRACE(**QUICK["grace"], layer="encoder.2").fit(t5, closing_tokenizer, [second], onto=patch)
    other = tiny_other("t5", num_layers=1)
    with pytest.raises(errata.errors.BaseMismatchError):
        patch.attach(other, closing_tokenizer)
    with pytest.raises(AnatomyError, match="from -3 to 2"):
        GRACE(layer="encoder.3").fit(t5, closing_tokenizer, [first])


@pytest.mark.parametrize("method", list(QUICK))
def test_of_two_that_contradict_each_other_the_later_holds(
    method: str, closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_other("bert")
    plain = predicted_labels(model, closing_tokenizer, TEXTS[:1])[0]
    one, two = (EditRequest(prompt=TEXTS[0], target_new=name) for name in LABELS if name != plain)
    editor: Any = get_editor(method)(**QUICK[method] | ({"order": "stream"} if method == "ft" else {}))
    first = editor.fit(model, closing_tokenizer, [one])
    assert not first.report[one.id].keys() & {"contradicts", "overruled"}
    patch = editor.fit(model, closing_tokenizer, [one, two])
    for found in (patch, editor.fit(model, closing_tokenizer, [two], onto=first)):
        assert found.report[two.id]["contradicts"] == [one.id] and found.report[one.id]["overruled"] == [two.id]
        assert "layer" in found.report[one.id] or "layers" in found.report[one.id]  # what stood there stays
    with patch.attach(model, closing_tokenizer):
        assert predicted_labels(model, closing_tokenizer, TEXTS[:1]) == [two.target_new]


@pytest.mark.parametrize("method", list(QUICK))
def test_an_edit_that_is_there_is_not_fitted_again(method: str, closing_tokenizer: PreTrainedTokenizerFast) -> None:
    """And a patch that goes on has the configuration that it went on with."""
    model, [one, two] = tiny_other("bert"), requests_for("bert")
    editor: Any = get_editor(method)(**QUICK[method] | ({"order": "stream"} if method == "ft" else {}))
    first = editor.fit(model, closing_tokenizer, [one])
    with pytest.raises(RequestError, match=f"holds the edit {one.id} already"):
        editor.fit(model, closing_tokenizer, [two, one], onto=first)
    longer = type(editor)(editor.config, steps=editor.config.steps + 1)
    assert longer.fit(model, closing_tokenizer, [two], onto=first).config["steps"] == editor.config.steps + 1


def test_a_stream_of_the_docket(tmp_path: Path) -> None:
    """On the shipped classifier: what it errs on is edited, holds, and leaves the early years alone."""
    model, tokenizer = errata.load("atlas-docket")
    names = label_names(model)
    cases = edit_stream(24, split="dev", seed=5)
    early = upstream(60)
    requests = [EditRequest(prompt=c.text, target_new=str(c.label)) for c in cases]  # numbers name classes too
    plain = predicted_labels(model, tokenizer, [c.text for c in cases])
    patch = GRACE.preset("atlas-docket").fit(model, tokenizer, requests)
    edited = [r for r in requests if patch.report[r.id].get("outcome") not in NO_EDIT]
    wrong = sum(said != names[c.label] for said, c in zip(plain, cases, strict=True))
    assert 0 < len(edited) <= wrong + 2  # an edit may come in the way of a later item
    book = Site(patch.outputs).book
    assert book is not None and len(book) <= len(edited) + sum(len(r.get("again", ())) for r in patch.report.values())
    patch.save(tmp_path / "patch.safetensors")
    again = Site(load_patch(tmp_path / "patch.safetensors").outputs).book
    assert again is not None and torch.equal(again.keys, book.keys) and torch.equal(again.radii, book.radii)
    with patch.attach(model, tokenizer):
        now = predicted_labels(model, tokenizer, [r.text for r in requests])
        kept = predicted_labels(model, tokenizer, [c.text for c in early])
    said = dict(zip((r.id for r in requests), now, strict=True))
    assert all(said[r.id] == names[int(r.target_new)] for r in edited)
    assert sum(a == names[c.label] for a, c in zip(now, cases, strict=True)) >= 22
    assert sum(a == names[c.label] for a, c in zip(kept, early, strict=True)) >= 50


def test_labels_of_rows_with_patches_of_their_own_come_in_the_order_given(
    closing_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model, edits = tiny_other("bert"), requests_for("bert")[::-1]  # the longer text first
    patches = [GRACE(**QUICK["grace"], layer=0).fit(model, closing_tokenizer, [r]) for r in edits]
    alone = []
    for patch, request in zip(patches, edits, strict=True):
        with patch.attach(model, closing_tokenizer):
            alone.append(label_logits(model, closing_tokenizer, [request.text])[0])
    with attach_rows(model, closing_tokenizer, patches):
        together = label_logits(model, closing_tokenizer, [r.text for r in edits], batch=1)
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    assert together.argmax(-1).tolist() == [label_names(model).index(r.target_new) for r in edits]


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_probes_are_put_to_every_architecture(family: str, closing_tokenizer: PreTrainedTokenizerFast) -> None:
    """Answers are generation's, probabilities the loss's, whether patches act row by row or are attached edit by edit."""
    model, requests = tiny_other(family), requests_for(family)
    patches = {r.id: GRACE(**QUICK["grace"], layer=0).fit(model, closing_tokenizer, [r]) for r in requests}
    questions = [
        Question(str(i), r.id, 0, Probe("edit", r.text, (r.target_new,), (requests[1 - i].target_new,)))
        for i, r in enumerate(requests)
    ]
    questions.append(Question("0", requests[0].id, 1, Probe("neighborhood", "Zürich lies in")))
    plain = ask(model, closing_tokenizer, questions)
    together = ask(model, closing_tokenizer, questions, patches=patches)
    alone = ask(model, closing_tokenizer, questions, patches=patches, batch=1)  # each edit is attached by itself
    for i, request in enumerate(requests):
        with patches[request.id].attach(model, closing_tokenizer), torch.no_grad():
            [loss] = losses_of(model, items_of(closing_tokenizer, [request])).tolist()
            [text] = greedy(model, closing_tokenizer, [request.text], 6)
        for rows in (together, alone):
            assert rows[i]["p_expected"] == pytest.approx(math.exp(-loss), rel=1e-3) and rows[i]["p_alternative"] < 1
            assert text.strip().startswith(rows[i]["generated"].strip()[:4])
        assert plain[i]["p_expected"] < together[i]["p_expected"]
    assert together[2]["generated"] == plain[2]["generated"] == together[2]["unedited"] and together[2]["passed"]
