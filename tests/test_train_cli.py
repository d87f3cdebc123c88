"""`errata train` on a tiny model, and where training items come from: Atlas's dev facts, and the published files."""

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from conftest import END, tiny_model, tiny_other
from errata.atlas.claims import LABELS
from errata.atlas.docket import load_docket
from errata.atlas.training import SETS, judging_facts, training_items
from errata.atlas.world import World, link, load_world
from errata.bench.data.training import load_items, of_classifier
from errata.cli.train import default_set
from errata.editors.ke import KnowledgeEditor
from errata.editors.mend import MEND
from errata.editors.serac import SERAC
from errata.errors import ConfigError, RecordError, RequestError
from errata.model.loading import bundled, load
from errata.training import TrainingItem, write_items
from test_cli import json_of, refused, run

SMALL = ["--set", "batch=2", "--set", "held_out=2", "--set", "every=2", "--set", "retain=1"]
REQUEST = {"prompt": "{} is in", "subject": "The Needle", "target_true": "Seattle", "target_new": "Goa"}


@pytest.fixture
def folder(tmp_path: Path, _bpe: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `model`, `items.jsonl` and `requests.jsonl`; the user's cache is in it too."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe), bos_token=END, eos_token=END, pad_token=END
    )
    tokenizer.save_pretrained(tmp_path / "model")
    items = [TrainingItem(f"Tower {i} is in", "Goa", "Rome", (f"Tower {i} stands in",)) for i in range(8)]
    write_items(tmp_path / "items.jsonl", items)
    (tmp_path / "requests.jsonl").write_text(json.dumps(REQUEST), encoding="utf-8")
    return tmp_path


def test_train_then_fit(folder: Path) -> None:
    """The default place is found by the fit; a stopped training goes on; --out and artefact= go together."""
    model, items = folder / "model", folder / "items.jsonl"
    fit = [
        "fit",
        folder / "requests.jsonl",
        "--model",
        model,
        "--out",
        folder / "patch.safetensors",
        "--method",
        "mend",
    ]
    words = shlex.split(refused(run(*fit)).split("`")[1])
    assert words == ["errata", "train", "mend", "--model", str(model), "--data", "FILE"]
    train = [*(items if word == "FILE" else word for word in words[1:]), "--steps", "4", "--json", *SMALL]
    stopped = run(*train, "--minutes", "0")
    assert "0 of 4 steps are made; the same command goes on" in stopped.stderr
    made = json_of(run(*train))
    assert (made["steps"], made["of"], made["items"], made["name"]) == (4, 4, 8, "mend")
    assert set(made["figures"]) >= {"success", "generalization", "retain", "kl"}
    assert (
        Path(made["artefact"]).is_relative_to(folder / "cache")
        and made["bytes"] == Path(made["artefact"]).stat().st_size
    )
    assert run(*fit).exit_code == 0
    shown = json_of(run("show", folder / "patch.safetensors", "--json"))
    assert shown["method"] == "mend" and shown["edits"][0]["kinds"] == ["low-rank"]
    ke = [
        "train",
        "ke",
        "--model",
        model,
        "--data",
        items,
        "--steps",
        "2",
        "--preset",
        "ke-cf",
        "--out",
        folder / "out",
    ]
    text = run(*ke, *SMALL)
    assert text.exit_code == 0 and "ke-cf: 2 steps on 8 items" in text.stdout and "step 2: loss" in text.stderr
    fit[-1] = "ke"
    assert "--preset ke-cf" in refused(run(*fit, "--preset", "ke-cf"))
    assert run(*fit, "--preset", "ke-cf", "--set", f"artefact={folder / 'out' / 'ke-cf.safetensors'}").exit_code == 0


@pytest.mark.atlas
@pytest.mark.skipif("atlas-docket" not in bundled(), reason="the bundled weights are missing")
def test_on_the_docket_the_named_command_is_one_that_works(folder: Path) -> None:
    """Its words as they stand, but for fewer steps: the set is found by the labels, and the fit finds what they write."""
    case = next(load_docket().cases(11, 1))
    area = next(a for a in load_docket().areas if a != case.area)
    (folder / "docket.jsonl").write_text(json.dumps({"prompt": case.text, "target_new": area}), encoding="utf-8")
    fit = [
        "fit",
        folder / "docket.jsonl",
        "--model",
        "atlas-docket",
        "--out",
        folder / "patch.safetensors",
        "--method",
        "mend",
    ]
    words = shlex.split(refused(run(*fit)).split("`")[1])
    assert words == ["errata", "train", "mend", "--model", "atlas-docket", "--preset", "atlas-docket"]
    made = json_of(run(*words[1:], "--steps", "2", "--json", *SMALL))
    assert (made["data"], made["items"], made["steps"]) == ("atlas-docket", 1800, 2)
    assert run(*fit).exit_code == 0


def test_the_default_set_is_the_models_own() -> None:
    for name, editor, own in (
        ("atlas-bert", MEND(), "atlas-fever"), ("atlas-docket", MEND(), "atlas-docket"),
        ("atlas-t5", KnowledgeEditor.preset("ke-cf"), "atlas"), ("atlas", KnowledgeEditor(), "atlas-zsre"), ("atlas", SERAC(), "atlas"),
    ):  # fmt: skip
        if name in bundled():
            assert default_set(name, load(name)[0], editor.rewrites) == own


def test_what_train_refuses(folder: Path) -> None:
    model, items = folder / "model", folder / "items.jsonl"
    assert "rome edits without being trained; those that learn are ke, mend" in refused(
        run("train", "rome", "--model", model)
    )
    assert "expected --data for" in refused(run("train", "mend", "--model", model))
    assert "or a file, found 'nowhere'" in refused(run("train", "mend", "--model", model, "--data", "nowhere"))
    (folder / "wrong.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    assert "found text" in refused(run("train", "mend", "--model", model, "--data", folder / "wrong.jsonl"))
    made = run("train", "mend", "--model", model, "--data", items, "--steps", "1", "--out", folder / "out", *SMALL)
    assert made.exit_code == 0
    again = run("train", "mend", "--model", model, "--data", items, "--steps", "2", "--out", folder / "out", *SMALL)
    assert "of a training with another config; repeat its command" in refused(again)


# -- items -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.mark.parametrize("name", [name for name in SETS if name != "atlas-docket"])
def test_atlas_items_are_of_dev_facts_in_fit_wordings(name: str, world: World) -> None:
    items = training_items(world, name, 40, drawn=2, seed=3)
    assert items == training_items(world, name, 40, drawn=2, seed=3) != training_items(world, name, 40, drawn=2)
    assert len(items) == 80
    sealed = [f.subject for f in world.facts if f.split == "test"]
    wordings = {r: p.cloze["probe"] + p.question["probe"] for r, p in world.phrasings.items()}
    probes = {text.replace("{}", "").strip().lower() for texts in wordings.values() for text in texts}
    by_key = world.by_key
    for item in items:
        texts = [item.prompt, *item.rephrases, *(prompt for prompt, _ in item.locality)]
        assert len(item.locality) >= 3 and item.rephrases and item.prompt not in item.rephrases
        assert not any(len(probe) > 12 and probe in text.lower() for text in texts for probe in probes)
        if name == "atlas-fever":
            assert {item.target_new, item.target_true} == set(LABELS)
        else:
            facts = [f for f in by_key.values() if f.object == item.target_true and link(f.subject) in item.prompt]
            assert any(item.target_new in world.objects[f.relation] for f in facts)
            assert item.target_new != item.target_true
    judging = [f.subject for f in judging_facts(world)]
    assert 20 < len(set(judging)) < 0.2 * len({f.subject for f in world.facts if f.split == "dev"})
    unseen = {s for s in (*sealed, *judging) if len(s) > 8}
    assert not any(item.prompt.startswith(s) for item in items for s in unseen)


def test_docket_items_are_early_cases_of_dev_topics_in_fit_wordings(world: World) -> None:
    items = training_items(world, "atlas-docket", 40, drawn=2, seed=3)
    assert items == training_items(world, "atlas-docket", 40, drawn=2, seed=3)
    assert items != training_items(world, "atlas-docket", 40, drawn=2) and len(items) == 80
    assert len(training_items(world, "atlas-docket")) == 1800
    docket = load_docket()
    wordings = {
        (t.name, mark): [re.compile(re.escape(w).replace(r"\{a\}", r"\w+").replace(r"\{b\}", r"\w+")) for w in own]
        for t in docket.topics
        for mark, own in t.matter.items()
    }

    @cache
    def topics(text: str, mark: str) -> frozenset[str]:
        return frozenset(t for (t, m), own in wordings.items() if m == mark and any(w.search(text) for w in own))

    dev = {t.name for t in docket.topics if t.split == "dev"}
    for first, second in zip(items[::2], items[1::2], strict=True):
        assert first.prompt == second.prompt and first.target_new != second.target_new
        for item in (first, second):
            assert {item.target_new, item.target_true} <= set(docket.areas) and item.target_new != item.target_true
            assert len(item.rephrases) == 2 and item.prompt not in item.rephrases and len(item.locality) >= 3
            [own] = topics(item.prompt, "fit")
            assert all(topics(text, "fit") == {own} for text in item.rephrases)
            others = {topic for text, _ in item.locality for topic in topics(text, "fit")}
            assert own not in others and {own, *others} <= dev
            for text in (item.prompt, *item.rephrases, *(prompt for prompt, _ in item.locality)):
                assert not topics(text, "probe") and not re.search("(199|200|201)[0-9]", text)
    areas = {area for item in items for area in (item.target_new, item.target_true)}
    assert areas == set(docket.areas)


def test_items_as_a_classifier_takes_them(tokenizer: PreTrainedTokenizerFast) -> None:
    """Numbers become its names, texts are cut to its room; other models' items stay."""
    model = tiny_other("bert", max_position_embeddings=16)
    item = TrainingItem("word " * 40, "2", None, ("so it is", "long " * 40), (("far " * 40, "0"), ("near", None)))
    [found] = of_classifier(model, tokenizer, [item])
    assert (found.target_new, found.target_true) == ("NEITHER", None)
    assert [label for _, label in found.locality] == ["REFUTES", None]
    for text, before in zip(
        (found.prompt, *found.rephrases, *(p for p, _ in found.locality)),
        (item.prompt, *item.rephrases, *(p for p, _ in item.locality)),
        strict=True,
    ):
        assert before.startswith(text) and len(tokenizer(text)["input_ids"]) <= 16
        assert text == before or len(tokenizer(before[: len(text) + 2])["input_ids"]) > 16
    with pytest.raises(RequestError, match="expected a label of this classifier"):
        of_classifier(model, tokenizer, [TrainingItem("a", "7")])
    assert of_classifier(tiny_model("gpt2"), tokenizer, [item]) == [item]


def test_items_of_scotus(tmp_path: Path) -> None:
    """Each case with three labels of the file that are not its own; what the model says of it is asked."""
    rows = [{"text": f"Case {i}.", "label": i % 5} for i in range(9)] + [
        {"text": "Last.", "label": 0, "rephrases": ["End."]}
    ]
    (tmp_path / "scotus.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    items = load_items(tmp_path / "scotus.jsonl")
    assert len(items) == 30 and items == load_items(tmp_path / "scotus.jsonl")
    for i, row in enumerate(rows):
        own = items[3 * i : 3 * i + 3]
        assert {item.prompt for item in own} == {row["text"]} and {item.target_true for item in own} == {None}
        assert len({item.target_new for item in own} & set("01234") - {str(row["label"])}) == 3
    assert items[-1].rephrases == ("End.",) and items[0].rephrases == ()


def test_a_decoders_questions_stand_in_frames(world: World) -> None:
    items = training_items(world, "atlas-zsre", 20, bare=False)
    assert all(not item.prompt.endswith("?") for item in items)
    assert any(item.prompt.endswith("?") for item in training_items(world, "atlas-zsre", 20))
    with pytest.raises(ConfigError, match="expected one of atlas, atlas-zsre, atlas-fever"):
        training_items(world, "fever")


def test_items_of_published_files(tmp_path: Path) -> None:
    rewrite = {
        "prompt": "{} is in", "relation_id": "P1", "target_new": {"str": "Goa"}, "target_true": {"str": "Rome"}, "subject": "It",
    }  # fmt: skip
    rows: dict[str, tuple[dict[str, Any], list[TrainingItem]]] = {
        "counterfact": (
            {
                "case_id": 1, "requested_rewrite": rewrite, "paraphrase_prompts": ["It lies in"],
                "neighborhood_prompts": ["That is in"], "attribute_prompts": [], "generation_prompts": [],
            },
            [TrainingItem("It is in", "Goa", "Rome", ("It lies in",), (("That is in", "Rome"),))],
        ),
        "kilt": (
            {
                "id": "1", "input": "Where is it?", "output": [{"answer": "Rome"}], "prediction": "Rom",
                "alternatives": ["Goa", "rom", "Oslo"], "rephrases": ["a", "b"], "filtered_rephrases": ["b"],
            },
            [TrainingItem("Where is it?", new, "Rom", ("b",)) for new in ("Goa", "Oslo")],
        ),
        "zsre": (
            {
                "subject": "it", "src": "Where is it?", "pred": "", "rephrase": "It is where?", "alt": "Goa", "answers": ["Rome"],
                "loc": "who was he", "loc_ans": "Bob",
            },
            [TrainingItem("Where is it?", "Goa", "Rome", ("It is where?",), (("who was he?", "Bob"),))],
        ),
    }  # fmt: skip
    for name, (row, expected) in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row]), encoding="utf-8")
        assert load_items(tmp_path / f"{name}.json") == expected
    for filtered, asked in ([], ()), (None, ("a", "b")):
        row = rows["kilt"][0] | {"filtered_rephrases": filtered}
        (tmp_path / "kilt.json").write_text(json.dumps([row]), encoding="utf-8")
        assert [item.rephrases for item in load_items(tmp_path / "kilt.json")] == [asked, asked]
    (tmp_path / "bad.json").write_text(json.dumps([{"input": "?"}]), encoding="utf-8")
    with pytest.raises(RecordError, match="bad.json"):
        load_items(tmp_path / "bad.json")
    with pytest.raises(RecordError, match="expected rows of CounterFact"):
        (tmp_path / "none.json").write_text("[]", encoding="utf-8")
        load_items(tmp_path / "none.json")
