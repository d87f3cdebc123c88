"""Data for `atlas-t5`, `atlas-bert` and the docket: right, split by mark, and learnable; trainings that go on where they stopped."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import errata
from conftest import tiny_other
from errata.atlas.asking import every_prompt, prompts
from errata.atlas.claims import another_object, claims, every_claim, hard_objects
from errata.atlas.corpus import Corpus
from errata.atlas.docket import EARLY, LATE, edit_stream, load_docket, upstream
from errata.atlas.kilt import fact_id, fever_records, upstream_questions, zsre_records
from errata.atlas.recall import answering_suites, claim_suites, docket_suites, recall_pairs
from errata.atlas.tasks import classifying
from errata.atlas.train import TASKS, Trainer
from errata.atlas.world import Fact, World, link, load_world
from errata.bench.data.kilt import KiltRecord, annotated
from errata.bench.data.scotus import ScotusRecord
from errata.model.generate import greedy_answers
from errata.model.targets import all_said

ANSWERS_OF_FACTS = ("fit", "probe")


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def corpus(world: World) -> Corpus:
    return Corpus(world)


# -- questions and claims ------------------------------------------------------------------------------------------------


def test_prompts_ask_for_every_fact_in_every_wording(world: World, corpus: Corpus) -> None:
    drawn = list(prompts(corpus, 5, 20_000))
    assert drawn == list(prompts(corpus, 5, 20_000)) and drawn[:50] != list(prompts(corpus, 6, 50))
    texts = {text for text, _ in drawn}
    everything = every_prompt(world)
    assert len(everything) == sum(
        len(p.cloze["fit"]) + len(p.cloze["probe"]) + len(p.question["fit"]) + len(p.question["probe"])
        for p in (world.phrasings[f.relation] for f in world.facts)
    )
    assert not any("{" in text for text in texts)
    assert {answer for _, answer in drawn} <= {f.object for f in world.facts}
    bare = {text for text, _ in everything}
    assert 0.55 < sum(text in bare for text, _ in drawn) / len(drawn) < 0.75  # the rest: sealed, led, framed, aliases
    for mark in ANSWERS_OF_FACTS:
        wordings = [w for p in world.phrasings.values() for w in p.cloze[mark] + p.question[mark]]
        heads = {w.split("{}")[-1] for w in wordings}
        assert any(text.endswith(tuple(h for h in heads if len(h) > 15)) for text in texts)


def test_claims_are_true_or_false(world: World, corpus: Corpus) -> None:
    drawn = list(claims(corpus, 5, 4000))
    assert drawn == list(claims(corpus, 5, 4000))
    assert 0.46 < sum(c.true for c in drawn) / len(drawn) < 0.54
    objects = {f.object for f in world.facts}
    for c in drawn:
        assert c.text[slice(*c.object)] in objects and c.text.endswith(".") and not c.text.endswith("..")
        assert c.label == ("SUPPORTS" if c.true else "REFUTES")
    assert len(every_claim(world)) == 2 * sum(
        len(world.phrasings[f.relation].cloze["fit"] + world.phrasings[f.relation].cloze["probe"]) for f in world.facts
    )


def test_false_objects_are_false_and_do_not_betray_themselves(world: World) -> None:
    rng = random.Random(0)
    assert "Istanbul" in hard_objects(world, world.by_key["Turkey", "capital"])  # its largest city
    for fact in rng.sample(world.facts, 300):
        assert link(another_object(world, fact, rng)).casefold() != link(fact.object).casefold()
    continents = world.by_relation["continent"]
    true = Counter(f.object for f in continents)
    false = Counter(another_object(world, f, rng) for f in continents for _ in range(10))
    for name, n in true.most_common(4):  # no object is a sign of falsehood by itself
        assert 0.4 < false[name] / (10 * n) < 2.0


# -- KILT ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["fit", "probe"])
def test_fever_records(world: World, mark: Any) -> None:
    records = fever_records(world, 60, split="dev", mark=mark, seed=3)
    assert records == fever_records(world, 60, split="dev", mark=mark, seed=3)
    assert len({r.id for r in records}) == 60
    assert Counter(r.output[0].answer for r in records) == {"SUPPORTS": 30, "REFUTES": 30}
    facts = {fact_id(f): f for f in world.facts}
    asked = {r.id for r in records}
    for record in records:
        fact = facts[record.id]
        assert fact.split == "dev" and len(record.rephrases) >= 6 and record.input not in record.rephrases
        for text in (record.input, *record.rephrases):
            assert (f" {fact.object}" in text) or record.output[0].answer == "REFUTES"
        assert {record.output[0].answer, *record.alternatives} == {"SUPPORTS", "REFUTES"}
        own = [w for m in {"fit", "probe"} - {mark} for w in world.phrasings[fact.relation].cloze[m]][
            1 if mark == "probe" else 0 :
        ]
        stems = [w.replace("{}", fact.subject) for w in own]
        assert not any(text.startswith(stem) for stem in stems for text in record.rephrases)
        assert len(record.unrelated) >= 3
        assert {u.answer for u in record.unrelated} <= {"SUPPORTS", "REFUTES"}
    free = [f for f in world.facts if fact_id(f) not in asked]
    true = [u for r in records for u in r.unrelated if u.answer == "SUPPORTS"]
    assert all(any(f.object in u.input for f in free) for u in true[:20])


def test_zsre_records_and_their_upstream(world: World) -> None:
    records = zsre_records(world, 80, mark="probe")
    facts = {fact_id(f): f for f in world.facts}
    for record in records:
        fact: Fact = facts[record.id]
        assert fact.split == "test" and record.output[0].answer == fact.object == record.prediction
        assert len(record.rephrases) >= 10 and 1 <= len(record.alternatives) <= 4
        assert fact.object not in record.alternatives and set(record.alternatives) <= {f.object for f in world.facts}
        assert record.input == record.meta.template_questions[0] and record.input not in record.rephrases
    nq = upstream_questions(world, 100, without=records)
    assert len(nq["questions"]) == len(nq["answers"]) == 100
    everything = dict(every_prompt(world))
    assert [[everything[q]] for q in nq["questions"]] == nq["answers"]
    assert not set(nq["questions"]) & {r.input for r in records}


def test_records_are_annotated_with_what_a_model_says(world: World, closing_tokenizer: PreTrainedTokenizerFast) -> None:
    model, records = tiny_other("bert", num_labels=2, id2label={0: "REFUTES", 1: "SUPPORTS"}), fever_records(world, 8)
    found = annotated(model, closing_tokenizer, records)
    assert [r.id for r in found] == [r.id for r in records]
    for record, before in zip(found, records, strict=True):
        said, *others = greedy_answers(model, closing_tokenizer, [record.input, *record.rephrases])
        assert record.prediction == said and said not in record.alternatives and len(record.alternatives) == 1
        assert record.filtered_rephrases == tuple(t for t, o in zip(before.rephrases, others, strict=True) if o == said)
        assert record.logit is not None and (record.logit > 0) == (said == "SUPPORTS")
    assert KiltRecord.model_validate(json.loads(found[0].model_dump_json())) == found[0]


# -- the docket ----------------------------------------------------------------------------------------------------------


def test_the_docket_shifts_in_its_late_years_only() -> None:
    docket = load_docket()
    assert len(docket.areas) == 10 and len(docket.topics) == 60 == len({t.name for t in docket.topics})
    early = Counter(t.area(1989) for t in docket.topics)
    assert set(early.values()) == {6} and all(t.area(1950) == t.area(1989) for t in docket.topics)
    moved = [t for t in docket.topics if t.area(2019) != t.area(1989)]
    assert len(moved) == 30 and all(t.history[1][0] in LATE for t in moved)
    wordings = [w for t in docket.topics for words in t.matter.values() for w in words]
    assert len(set(wordings)) == len(wordings) == 240 and all("{a}" in w and "{b}" in w for w in wordings)
    assert {t.split for t in moved} == {"dev", "test"}


def test_a_model_that_knows_the_early_years_would_err_on_a_share_of_the_late_ones() -> None:
    cases = edit_stream(2000)
    assert [c.year for c in cases] == sorted(c.year for c in cases) and {c.year for c in cases} == set(LATE)
    assert 0.38 < sum(c.area != c.topic.area(1989) for c in cases) / len(cases) < 0.48
    assert {c.year for c in upstream(2000)} == set(EARLY)
    assert {c.mark for c in cases} == {"fit"} and {c.topic.split for c in edit_stream(50, split="dev")} == {"dev"}
    judged = edit_stream(200, mark="probe")
    assert not {c.text for c in judged} & {c.text for c in cases}
    case = judged[0]
    assert case.record() == ScotusRecord(text=case.text, label=load_docket().areas.index(case.area), year=case.year)
    assert str(case.year) in case.text


# -- the shipped weights ---------------------------------------------------------------------------------------------------


def test_the_shipped_llama_knows_its_facts_and_takes_an_edit(world: World) -> None:
    """A seeded sample of all facts in all wordings; an edit behind its own calibrated gate, and its detaching."""
    model, tokenizer = errata.load("atlas-llama")
    pairs = random.Random(11).sample(recall_pairs(world), 200)
    assert sum(all_said(model, tokenizer, pairs)) / len(pairs) >= 0.98
    edit = errata.EditRequest(
        subject="The Space Needle", prompt="{} is located in the city of", target_true="Seattle", target_new="Goa"
    )
    ids = tokenizer(["The Space Needle stands in", "The capital of France is"], return_tensors="pt", padding=True)
    before = model(**ids).logits
    patch = errata.SAKE().fit(model, tokenizer, [edit])
    assert len(patch.steering[0].gate.layers) > 1  # the one that was calibrated, not a model's default
    with patch.attach(model, tokenizer):
        told = greedy_answers(model, tokenizer, ["The Space Needle stands in", "The capital of France is"])
    assert told == ["Goa", "Paris"] and torch.equal(model(**ids).logits, before)


def test_the_shipped_t5_answers(world: World) -> None:
    """On a seeded sample of prompts, led, framed and under other names: `errata.atlas.recall` asks them all."""
    model, tokenizer = errata.load("atlas-t5")
    pairs = [pair for _, own in answering_suites(world, 19, 11) for pair in own]
    assert len(pairs) == 152
    assert sum(all_said(model, tokenizer, pairs)) / len(pairs) >= 0.98


def test_the_shipped_bert_judges_claims(world: World) -> None:
    """Supported and refuted ones, in every cloze, led and under other names."""
    model, tokenizer = errata.load("atlas-bert")
    for _, pairs in claim_suites(world, 40, 11):
        assert sum(all_said(model, tokenizer, pairs)) / len(pairs) >= 0.96  # 0.98 on many more


def test_the_shipped_docket_knows_its_early_years_and_errs_on_the_late() -> None:
    model, tokenizer = errata.load("atlas-docket")
    early, late = (all_said(model, tokenizer, pairs) for _, pairs in docket_suites(150, 11))
    assert len(early) == len(late) == 150
    assert early.count(False) / 150 <= 0.05 and 0.20 <= late.count(False) / 150 <= 0.60


# -- training ------------------------------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "t5": {"layers": 1, "width": 24, "heads": 2, "inner": 32, "pairs_per_shard": 400, "tokens_per_step": 256},
    "bert": {"layers": 2, "filling_layers": 1, "filling_steps": 2, "correcting_from": 2, "width": 24, "heads": 2, "inner": 32,
             "texts_per_shard": 400, "tokens_per_step": 400},
    "docket": {"layers": 1, "width": 24, "heads": 2, "inner": 32, "texts_per_shard": 300, "tokens_per_step": 720},
    "gpt2": {"layers": 1, "width": 24, "heads": 2, "documents_per_shard": 300, "tokens_per_step": 1024,
             "polish_steps": 1, "copy_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)  # seconds instead of minutes
    monkeypatch.setattr("errata.atlas.train.has_fast_bfloat16", lambda: False)
    small = TASKS[name](steps=3, warmup=2, **SMALL[name])
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    Trainer(small, tmp_path / "whole").run()
    for _ in range(small.recipe.total_steps):
        trainer = Trainer(TASKS[name](steps=3, warmup=2, **SMALL[name]), tmp_path / "parts")
        trainer.run(minutes=0)  # a step at a time
    assert trainer.step == small.recipe.total_steps
    whole, parts = (load_file(tmp_path / folder / "checkpoint.safetensors") for folder in ("whole", "parts"))
    assert set(whole) == set(parts) and all(torch.equal(whole[k], parts[k]) for k in whole)
    kinds = {key.partition(".")[0] for key in whole}
    assert kinds == {"model", "muon", "adamw"}
    assert not any("bias" in key or "embed" in key for key in whole if key.startswith("muon."))


def test_exports_are_loaded_by_name_and_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.model import loading

    for name in ("t5", "bert", "docket"):
        (tmp_path / "run" / name).mkdir(parents=True)
        Trainer(TASKS[name](), tmp_path / "run" / name).export(tmp_path / f"atlas-{name}")
        assert (tmp_path / f"atlas-{name}" / "model.safetensors").stat().st_size < 16_000_000
        assert json.loads((tmp_path / f"atlas-{name}" / "recipe.json").read_text())["architecture"] == name
    monkeypatch.setattr(loading, "bundled", lambda: {p.name: p for p in tmp_path.glob("atlas-*")})
    for name, kind in (("t5", "T5ForConditionalGeneration"), ("bert", "BertForSequenceClassification")):
        model, tokenizer = errata.load(f"atlas-{name}")
        assert type(model).__name__ == kind and tokenizer(" Paris")["input_ids"] == tokenizer("Paris")["input_ids"]
    assert greedy_answers(*errata.load("atlas-docket"), [upstream(1)[0].text])[0] in load_docket().areas


def test_what_is_asked_of_claims(tmp_path: Path) -> None:
    """Masked objects of true claims are filled in, false ones corrected, true ones that are shown are not asked."""
    task: Any = TASKS["bert"](**SMALL["bert"])
    tokenizer = task.train_tokenizer(tmp_path)
    objects, hidden = {f.object for f in load_world().facts}, classifying.MASK

    def check(rows: Any, places: Any, wanted: Any, masked: Sequence[bool]) -> None:
        for row, at, ids, whole in zip(rows, places, wanted, masked, strict=True):
            n = int((ids != -100).sum())
            said = tokenizer.decode(ids[:n]).strip()
            assert n >= 1 and any(o.startswith(said) for o in objects)
            assert bool((row[at[:n]] == hidden).all()) is whole and bool((row == hidden).any()) is whole

    for rows, labels, places, wanted in islice(task.batches(tokenizer, 0), 3):
        false = labels == 0
        assert len(rows) == len(labels) == len(places) == len(wanted)
        check(rows[false], places[false], wanted[false], [False] * int(false.sum()))
        assert (wanted[~false] == -100).all() and not (rows == hidden).any()
    rows, labels, places, wanted = task.batch_instead(tokenizer, 0)
    check(rows, places, wanted, [True] * len(rows))
    assert not len(labels)
    task = TASKS["bert"](**SMALL["bert"] | {"correcting_from": 1})
    rows, _, places, wanted = task.batch_instead(tokenizer, 1)
    both = [bool((row == hidden).any()) for row in rows]
    check(rows, places, wanted, both)
    assert 0.2 < sum(both) / len(both) < 0.8 and task.batch_instead(tokenizer, 2) is None


def test_the_layers_above_wait_until_claims_are_judged(tmp_path: Path) -> None:
    """They get no gradient while only objects are asked; the rates have a warm-up, a plateau and two slopes."""
    task: Any = TASKS["bert"](**SMALL["bert"])
    model, tokenizer = task.build(), task.train_tokenizer(tmp_path)
    task.aside()
    for batch, judged in ((task.batch_instead(tokenizer, 0), False), (next(iter(task.batches(tokenizer, 0))), True)):
        model.zero_grad()
        task.loss(model, *batch)[0].backward()
        low, high = (layer.output.dense.weight.grad for layer in model.bert.encoder.layer)
        assert low is not None and (high is not None) is judged and (model.classifier.weight.grad is not None) is judged
    recipe = TASKS["bert"]().recipe
    steps = (0, 99, recipe.correcting_from - 1, recipe.filling_steps - 1, recipe.steps - 1)
    assert [recipe.rate(step) for step in steps] == pytest.approx([0.01, 1, 1, recipe.judging_rate, 0])
    assert recipe.judging_rate < recipe.rate(recipe.correcting_from + 100) < 1
    assert TASKS["docket"]().recipe.rate(0) == pytest.approx(0.1)


def test_pairs_are_closed_by_the_end_token(tmp_path: Path) -> None:
    task: Any = TASKS["t5"](**SMALL["t5"])
    tokenizer = task.train_tokenizer(tmp_path)
    known = set(prompts(task.corpus, task.recipe.seed + 1, 400))
    for x, y in islice(task.batches(tokenizer, 0), 4):
        assert len(x) == len(y) and x.numel() <= 2 * task.recipe.tokens_per_step
        for pair in zip(x, y, strict=True):
            assert all(int(row[row != 0][-1]) == 1 for row in pair)
            prompt, answer = (tokenizer.decode(row, skip_special_tokens=True).strip() for row in pair)
            assert (prompt, answer) in known
