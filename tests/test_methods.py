"""What methods say about themselves, and that it is so: each of them on each architecture that it claims, refused on any other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import errata
import taxonomy
from conftest import CLASSIFIERS, LABELS, hooks_of, tiny_model, tiny_other
from errata.cli import app
from errata.edit import EditRequest
from errata.editor import ARCHITECTURES, Editor
from errata.editors._learned import LearnedEditor, default_folder
from errata.errors import RequestError, UnsupportedModelError
from errata.model.attached import asked
from errata.model.labels import predicted_labels
from errata.model.targets import supervised
from errata.training import TrainingItem
from test_laws import CLOSED, LEARNING, QUICK, everything, randomness, roomy, same

METHODS = sorted(errata.available_editors())
FAMILY = {"decoder": ("gpt2",), "encoder-decoder": ("t5",), "classifier": CLASSIFIERS}
CLAIMED = [
    (method, family)
    for method in METHODS
    for role in errata.get_editor(method).supports
    for family in FAMILY[role]
    if role != "decoder"  # test_laws runs those, on every family
]
OTHERS = [
    (method, families[0])
    for method in METHODS
    for role, families in FAMILY.items()
    if role not in errata.get_editor(method).supports
]
QUESTIONS = (
    EditRequest(subject="The Space Needle", prompt="{} is located in the city of", target_true="Seattle", target_new="Goa"),
    EditRequest(
        subject="France", prompt="The capital of {} is", target_true="Paris", target_new="Tokyo",
        fit_prompts=("France is ruled from",),
    ),
)  # fmt: skip
CLAIMS = (
    EditRequest(prompt="The Space Needle is in Seattle.", target_true="SUPPORTS", target_new="REFUTES"),
    EditRequest(
        prompt="The capital of France is Paris.", target_true="SUPPORTS", target_new="NEITHER",
        fit_prompts=("Paris is the capital of France.",),
    ),
)  # fmt: skip


class Bench:
    """A tiny model of an architecture, a method, and its patch for each request."""

    def __init__(self, method: str, family: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self.method, self.model, self.tokenizer = method, model, tokenizer
        self.classifies = family in CLASSIFIERS
        self.requests: tuple[EditRequest, ...] = CLAIMS if self.classifies else QUESTIONS
        if self.classifies:  # to a label that the model does not say: some methods leave the others out
            said = predicted_labels(model, tokenizer, [r.text for r in CLAIMS])
            new = [next(label for label in LABELS if label != now) for now in said]
            pairs = zip(CLAIMS, new, said, strict=True)
            self.requests = tuple(r.model_copy(update={"target_new": n, "target_true": s}) for r, n, s in pairs)
        self.ready()
        self.patches = [self.editor().fit(model, tokenizer, [request]) for request in self.requests]

    def editor(self, **changes: Any) -> Editor[Any]:
        return errata.get_editor(self.method)(**{**QUICK.get(self.method, {}), **changes})

    def ready(self) -> None:
        """An editor that learns is trained."""
        found = errata.get_editor(self.method)
        if issubclass(found, LearnedEditor):
            answers = ("REFUTES", "SUPPORTS") if self.classifies else ("Goa", "Rome")
            kept = (("Earth is round.", "SUPPORTS" if self.classifies else "so"),)
            items = [
                TrainingItem(
                    f"The capital of {name} is", answers[i % 2], answers[1 - i % 2], (f"{name} is ruled",), kept
                )
                for i, name in enumerate(("Japan", "Brazil", "Nepal"))
            ]
            learning = found(**{**QUICK.get(self.method, {}), **LEARNING})
            if not learning.artefact_path(self.model, self.tokenizer).is_file():
                learning.train(self.model, self.tokenizer, items, default_folder(self.model, self.tokenizer))

    def logits(self) -> Tensor:
        texts = [*(request.text for request in self.requests), "The highest point on Earth is"]
        answers = ["SUPPORTS" if self.classifies else "Goa"] * len(texts)
        given = supervised(self.model, self.tokenizer, asked(self.model, texts), answers)
        with torch.no_grad():
            return self.model(**given.inputs).logits


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ERRATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(("method", "family"), CLAIMED)
def test_the_laws_hold_on_every_claimed_architecture(
    method: str, family: str, closing_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A fit leaves the model as found and repeats exactly; detaching restores every bit, also among others; a patch that is
    saved and loaded acts the same; and where a method says so, what is outside its scope keeps its bits."""
    model = tiny_other(family)
    bench = Bench(method, family, model, closing_tokenizer)
    plain, before, hooks, names = bench.logits(), everything(model), hooks_of(model), set(vars(model))
    model.train()
    found, drawn = everything(model), randomness()
    assert bench.editor().fit(model, closing_tokenizer, [bench.requests[0]]) == bench.patches[0]
    assert same(found, everything(model)) and randomness() == drawn
    model.eval()
    alone = []
    for patch in bench.patches:
        patch.save(tmp_path / "patch.safetensors")
        again = errata.load_patch(tmp_path / "patch.safetensors")
        assert again.id == patch.id
        with patch.attach(model, closing_tokenizer):
            alone.append(bench.logits())
        with again.attach(model, closing_tokenizer):
            assert torch.equal(bench.logits(), alone[-1])
        assert not torch.equal(alone[-1], plain)
    assert torch.equal(bench.logits(), plain) and same(before, everything(model))
    for gone in (0, 1):
        handles = [patch.attach(model, closing_tokenizer) for patch in bench.patches]
        handles[gone].detach()
        assert torch.equal(bench.logits(), alone[1 - gone])
        handles[1 - gone].detach()
    if errata.get_editor(method).scoped:
        elsewhere = EditRequest(prompt="Mount Everest lies in Nepal.", target_new=bench.requests[0].target_new)
        closed = bench.editor(**CLOSED[method]).fit(model, closing_tokenizer, [elsewhere])
        with closed.attach(model, closing_tokenizer):
            assert torch.equal(bench.logits(), plain)
    assert hooks_of(model) == hooks and set(vars(model)) == names


@pytest.mark.parametrize(("method", "family"), OTHERS)
def test_another_architecture_is_refused_by_name(method: str, family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """One error, before anything is done, that says what the method edits."""
    model = tiny_other(family) if family != "gpt2" else roomy(family)
    request = CLAIMS[0] if family in CLASSIFIERS else QUESTIONS[0]
    supported = " and ".join(ARCHITECTURES[role] for role in errata.get_editor(method).supports)
    with pytest.raises(UnsupportedModelError, match=f"^{method} edits {supported}, found {type(model).__name__} "):
        errata.get_editor(method)().fit(model, tokenizer, [request])


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_with_a_classification_head_is_refused(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Its head reads the last token that is no padding, where every method that edits classifiers goes by the first."""
    for family, found in (("gpt2", "GPT2ForSequenceClassification"), ("llama", "LlamaForSequenceClassification")):
        config = tiny_model(family).config
        config.update({"num_labels": 3, "id2label": dict(enumerate(LABELS)), "pad_token_id": 5})
        model = AutoModelForSequenceClassification.from_config(config).eval()
        with pytest.raises(
            UnsupportedModelError, match=f"^{method} edits .*, found {found} .*, one of the decoders with a"
        ):
            errata.get_editor(method)().fit(model, tokenizer, [CLAIMS[0]])


@pytest.mark.parametrize("method", [m for m in METHODS if "classifier" in errata.get_editor(m).supports])
def test_a_label_outside_the_classes_is_refused(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    wrong = EditRequest(prompt="The capital of France is Paris.", target_new="MAYBE")
    with pytest.raises(RequestError, match="label of this classifier .REFUTES, SUPPORTS, NEITHER., found 'MAYBE'"):
        errata.get_editor(method)().fit(tiny_other("bert"), tokenizer, [wrong])


@pytest.mark.parametrize("method", METHODS)
def test_traits_are_said_in_known_words(method: str) -> None:
    found = errata.get_editor(method)
    assert found.place in taxonomy.PLACES and found.how in taxonomy.HOWS
    assert found.supports and set(found.supports) <= set(taxonomy.ROLES)
    assert len(set(found.supports)) == len(found.supports)
    assert found.learns is issubclass(found, LearnedEditor)
    assert not found.scoped or method in CLOSED
    assert ("onto" in found.fit.__annotations__) == (found.streams or found.method in ("ke", "mend"))


def test_the_page_is_current() -> None:
    shown = taxonomy.SECTION.shown()
    assert shown == taxonomy.tables(), "run scripts/taxonomy.py --write"
    assert all(f"`{method}`" in shown for method in METHODS)


def test_the_command_prints_the_matrix_and_one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = CliRunner().invoke(app, ["methods"]).stdout
    for method in METHODS:
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
        [cells] = [row for row in rows if row[0] == method]
        assert cells[-3:] == ["yes" if role in errata.get_editor(method).supports else "-" for role in taxonomy.ROLES]
    one = CliRunner().invoke(app, ["methods", "kn"]).stdout
    assert "integrated gradients" in one and "threshold" in one and "gpt2-xl" in one
    wrong = CliRunner().invoke(app, ["methods", "knn"])
    assert wrong.exit_code and "rome" not in wrong.stdout
