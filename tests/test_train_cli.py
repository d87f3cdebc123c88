"""`errata train` on a tiny model, and where training items come from: Atlas's dev facts, and the published files."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from conftest import END, tiny_model
from errata.atlas.claims import LABELS
from errata.atlas.training import SETS, judging_facts, training_items
from errata.atlas.world import World, link, load_world
from errata.bench.data.training import load_items
from errata.errors import ConfigError, RecordError
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
    assert f"run `errata train mend --model {model}`" in refused(run(*fit))
    train = ["train", "mend", "--model", model, "--data", items, "--steps", "4", "--json", *SMALL]
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


@pytest.mark.parametrize("name", SETS)
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
