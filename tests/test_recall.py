"""Cues: what asks for an answer again is told from questions and from running text, in wordings that taught nothing."""

import json
from importlib.resources import files
from typing import Any

import pytest
import torch

import errata
from errata.atlas.probes import context_pieces, scope_examples, unrelated_texts
from errata.atlas.world import load_world
from errata.bench.makers import DOUBT_I, DOUBT_II
from errata.model.generate import greedy_answers
from errata.model.states import states_at
from errata.model.tokens import token_ids
from errata.scope.gate import Gate, gate_for, load_gate, save_gate
from errata.scope.recall import AGAIN, ASKED, dialogues, kinds, learn_cues, wordings

# Ways to ask again that stand neither in what teaches cues nor in the published doubts.
UNSEEN = (
    "I have my doubts. Could you say that word again?",
    "Are you sure? Please repeat it:",
    "I am not convinced. What should it be?",
    "That surprises me. Give it once more:",
    "Hmm. Tell me one more time:",
    "You may be wrong there. The answer, again:",
    "I would not have thought so. Which is correct?",
    "That is odd. It really is",
)


def last_kinds(model: Any, tokenizer: Any, texts: list[str], layer: Any, cues: torch.Tensor) -> list[int]:
    rows = token_ids(tokenizer, texts)
    found = states_at(model, rows, [[len(row) - 1] for row in rows], [layer])[layer]
    return [int(kinds(x[0], cues)) for x in found]


def test_cues_hold_for_other_prompts() -> None:
    """Learned on 120 dev facts, asked about others: dialogues that ask again, plain questions, ordinary sentences."""
    model, tokenizer = errata.load("atlas")
    world = load_world()
    examples = scope_examples(world, "dev", 200)
    pairs = [(e.fit[0], examples[i - 1].answer) for i, e in enumerate(examples)]
    cues, layer = learn_cues(model, tokenizer, pairs[:120], unrelated_texts(world, 40), [0, 4])
    assert cues.shape == (257, 3) and layer == 4  # the first block's states hardly know what was asked
    again = [text for text, _ in dialogues(pairs[120:], 100, wordings(1), seed=1)]
    assert sum(k == AGAIN for k in last_kinds(model, tokenizer, again, 4, cues)) >= 97
    asked = [e.held_out[0] for e in examples[120:]]
    found = last_kinds(model, tokenizer, asked, 4, cues)
    assert sum(k == ASKED for k in found) >= 78 and AGAIN not in found
    plain = unrelated_texts(world, 80, seed=5)
    assert sum(k == AGAIN for k in last_kinds(model, tokenizer, plain, 4, cues)) <= 1


def test_published_doubts_teach_nothing() -> None:
    """No sentence of the protocol's doubts stands among what teaches cues."""
    known = json.loads((files("errata.scope") / "recall.json").read_text(encoding="utf-8"))
    taught = [text.casefold() for texts in known.values() for text in texts]
    sentences = [
        s.strip().casefold() for t in (DOUBT_I, DOUBT_II) for s in t.replace("?", ".").replace(",", ".").split(".")
    ]
    for sentence in (s for s in sentences if len(s.split()) > 2 and "{" not in s):
        assert not any(sentence in text for text in taught), sentence


def test_atlas_edits_hold_under_doubt_and_behind_long_contexts() -> None:
    """What the shipped gate does for one dev edit: the objection's answer, silence about other facts, 400 tokens of others' facts."""
    from errata.atlas.requests import counterfactual_requests

    model, tokenizer = errata.load("atlas")
    world = load_world()
    [request] = counterfactual_requests(world, 1, split="dev", seed=12)
    patch = errata.SAKE().fit(model, tokenizer, [request])
    before = "".join(context_pieces(world, "probe", 40)["facts"][:24])
    old = f"{request.text} {request.target_true}"
    doubts = [
        DOUBT_I.format(p=request.text, new=request.target_new),
        DOUBT_II.format(p=request.text, new=request.target_new, old=request.target_true),
    ]
    with patch.attach(model, tokenizer) as handle:
        said = greedy_answers(model, tokenizer, [*doubts, before + request.text])
        about, other = (
            handle.decide([f"{fact}. {words}" for words in UNSEEN]) for fact in (old, "The capital of Peru is Lima")
        )
    assert all(text.startswith(request.target_new) for text in said)
    assert sum(d.edit == request.id for d in about) >= 7 and all(d.edit is None for d in other)


def test_cues_are_part_of_the_file(tmp_path: Any) -> None:
    gate = Gate(layers=(0, 1), cues=torch.randn(9, 3), cue_layer=1)
    save_gate(gate, tmp_path / "gate.safetensors")
    read = load_gate(tmp_path / "gate.safetensors")
    assert read.digest == gate.digest != Gate(layers=(0, 1)).digest
    assert read.cue_layer == 1 and torch.equal(read.cues if read.cues is not None else torch.zeros(1), gate.cues)


@pytest.mark.parametrize("name", ["atlas"])
def test_shipped_gates_have_cues(name: str) -> None:
    model, tokenizer = errata.load(name)
    gate = gate_for(model, tokenizer)
    assert gate is not None and gate.cues is not None and gate.cue_layer in gate.layers
