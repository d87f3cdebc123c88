"""The runner: what it plans, what it writes, that it goes on after `kill -9`, and that it edits as the settings say."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import SENTENCES, tiny_model
from errata.bench import report
from errata.bench.cases import Case, Probe
from errata.bench.preset import Context, Extra, Method, Preset
from errata.bench.report import _facts
from errata.bench.rows import read_fits, read_rows, results
from errata.bench.runner import Plan, Progress, _as_here, _Pace, methods_of, plan_jobs, run
from errata.bench.store import PatchCache, RunDirectory, difference, file_names, other_sources
from errata.bench.worker import Given, Job, Outcome, Worker
from errata.edit import EditRequest
from errata.editors import _weights
from errata.editors.mend import MEND
from errata.editors.rome import ROME
from errata.editors.steam import STEAM
from errata.errors import ConfigError
from errata.merge import merge
from errata.model.corpora import Texts
from errata.model.generate import greedy
from errata.model.loading import load
from errata.model.statistics import key_statistics

QUICK = {"contexts": "bare", "statistics": None, "steps": 25, "kl": 0.0, "norm": 0.0, "clamp": 50.0, "layer": 1}
STEER = {"prompts": 4, "context_prompts": 2, "implications": "none", "lift": False}
ROME_ALONE = Method("rome", "rome", changes=QUICK)
MEMIT = Method(
    "memit", "memit", "all", changes={"lam": 0.1, **{k: v for k, v in QUICK.items() if k != "layer"}, "layers": (1,)}
)
SAKE_ALL = Method("sake, all", "sake", "all", changes=STEER)
LIFELONG = Method("rome, lifelong", "rome", "sequential", changes=QUICK)
STREAM = Method("rome, stream", "rome", "stream", changes=QUICK)
SUBJECTS = {"Needle": "Paris", "Tower": "is", "Gate": "the", "Dome": "in", "Wall": "Japan"}


def cases(_: Context) -> list[Case]:
    """Five edits that a random model can be taught, of which the fourth has no subject, as ROME needs one."""
    found = []
    for subject, new in SUBJECTS.items():
        request = EditRequest(
            prompt=f"Go and see the {subject}" if subject == "Dome" else "Go and see {}",
            subject=None if subject == "Dome" else f"The {subject}",
            target_new=new,
            target_true="French",
            fit_prompts=(f"Go and see the {subject} of", f"See the {subject}"),
        )
        probes = (
            Probe("edit", request.text, (new,), ("French",), tags={"form": "own"}),
            Probe("neighborhood", "The capital of France is"),
            Probe("compositionality_i", "Zürich lies in", ("Switzerland",), test="t", condition=True),
        )
        found.append(Case(subject, request, probes, references=("A text.",), tags={"first": subject[0]}))
    return found


def preset(*methods: Method, **fields: Any) -> Preset:
    world = [
        Probe("fact", "The president of the United States is"),
        Probe("fact", "Danielle Darrieux's mother tongue is"),
    ]
    return Preset("fake", "A fake", "nobody", cases, methods, lambda *_: (), world=lambda _: world, **fields)


def besides(context: Context, cases: Sequence[Case], methods: Sequence[Method]) -> Extra:
    """A part for each case: what the model says at once; all of them in one file."""

    def part(case: Case) -> dict[str, Any]:
        return {"said": greedy(context.model, context.tokenizer, [case.request.text], 3)[0], "of": len(methods)}

    def combine(made: Mapping[str, Any], run: Path) -> None:
        (run / "said.json").write_text(json.dumps(made))

    return Extra({f"case-{case.id}": partial(part, case) for case in cases}, combine)


@pytest.fixture
def place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A directory with a tiny random model, and one for the cache beside it."""
    tiny_model("gpt2", layers=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def start(place: Path, name: str, *methods: Method, shard: int = 2, **options: Any) -> RunDirectory:
    fields = {key: options.pop(key) for key in ("checkpoints", "extra", "every") if key in options}
    model, tokenizer = load(place / "model")
    plan = Plan(preset(*methods, **fields), str(place / "model"), methods, seed=options.pop("seed", 0))
    return run(plan, place / name, model, tokenizer, cache=place / "cache", shard=shard, **options)


# -- the plan ------------------------------------------------------------------------------------------------------------


def test_jobs_are_fixed_by_methods_cases_and_shards() -> None:
    jobs = plan_jobs([ROME_ALONE, MEMIT, LIFELONG], 5, 2, (1, 4, 900), shard=2)
    found = {job.name: (job.kind, job.span, job.edits) for job in jobs}
    assert found == {
        "unedited-0000": ("ask", (0, 2), 0),
        "unedited-0001": ("ask", (2, 4), 0),
        "unedited-0002": ("ask", (4, 5), 0),
        "unedited-world": ("world", (0, 0), 0),
        "rome-0000": ("single", (0, 2), 1),
        "rome-0001": ("single", (2, 4), 1),
        "rome-0002": ("single", (4, 5), 1),
        "rome": ("speed", (0, 5), 1),
        "memit-fit-0000": ("fit", (0, 5), 0),
        "memit-0000": ("ask", (0, 2), 5),
        "memit-0001": ("ask", (2, 4), 5),
        "memit-0002": ("ask", (4, 5), 5),
        "memit-world": ("world", (0, 0), 5),
        "memit": ("speed", (0, 5), 5),
        "rome_lifelong-fit-00001": ("chain", (0, 1), 1),
        "rome_lifelong-00001-0000": ("ask", (0, 1), 1),
        "rome_lifelong-00001-world": ("world", (0, 0), 1),
        "rome_lifelong-fit-00004": ("chain", (1, 4), 4),
        "rome_lifelong-00004-0000": ("ask", (0, 2), 4),
        "rome_lifelong-00004-0001": ("ask", (2, 4), 4),
        "rome_lifelong-00004-world": ("world", (0, 0), 4),
        "rome_lifelong-fit-00005": ("chain", (4, 5), 5),
        "rome_lifelong-00005-0000": ("ask", (0, 2), 5),
        "rome_lifelong-00005-0001": ("ask", (2, 4), 5),
        "rome_lifelong-00005-0002": ("ask", (4, 5), 5),
        "rome_lifelong-00005-world": ("world", (0, 0), 5),
        "rome_lifelong": ("speed", (0, 5), 5),
    }
    before: set[str] = set()
    for job in jobs:
        assert set(job.needs) <= before
        before.add(job.name)
    assert next(j for j in jobs if j.name == "rome_lifelong-00005-0001").needs == (
        "unedited-0001", "rome_lifelong-fit-00001", "rome_lifelong-fit-00004", "rome_lifelong-fit-00005",
    )  # fmt: skip


def test_fits_that_do_not_bear_on_each_other_are_spread_and_a_method_may_have_fewer_cases() -> None:
    apart = Method("sake", "sake", "sequential", changes=STEER, apart=True)
    jobs = plan_jobs([apart, replace(ROME_ALONE, most=3), replace(MEMIT, most=1)], 7, 0, (1, 5), shard=2)
    fits = {job.name: job.span for job in jobs if job.kind == "fit"}
    assert fits == {
        "sake-fit-00001": (0, 1),
        "sake-fit-00002": (1, 2),
        "sake-fit-00004": (2, 4),
        "sake-fit-00005": (4, 5),
        "sake-fit-00006": (5, 6),
        "sake-fit-00007": (6, 7),
        "memit-fit-0000": (0, 1),
    }
    needs = {job.name: job.needs for job in jobs}
    assert needs["sake-fit-00004"] == ()
    assert needs["sake-00005-0002"] == ("unedited-0002", *list(fits)[:4])
    assert [job.span for job in jobs if job.method == "rome"] == [(0, 2), (2, 3), (0, 3)]
    assert [(job.span, job.edits) for job in jobs if job.method == "memit"] == [((0, 1), 0), ((0, 1), 1), ((0, 1), 1)]


def test_atlas_sizes_are_for_atlas_and_its_own_number_of_cases(place: Path) -> None:
    few = replace(ROME_ALONE, most=2)
    model, _ = load(place / "model")
    plan = Plan(preset(few), "atlas", (few,))
    assert _as_here(few, plan, model).most == 2
    for other in (
        replace(plan, n=5),
        replace(plan, data="counterfact"),
        replace(plan, model_name=str(place / "model")),
    ):
        assert _as_here(few, other, model).most is None


def test_the_patches_of_all_looks_before_are_made_again_for_the_last(place: Path) -> None:
    """Of looks after 1, 2, 3 and 4 edits the last is lost: its stream goes on from the third, and that from the second."""
    found = start(place, "a", STREAM, every=1)
    rows, fits = read_rows(found.path), read_fits(found.path)
    stream = rows[rows["method"] == STREAM.label]
    assert sorted(set(stream["edits"])) == [1, 2, 3, 4] and fits["error"].ne("").sum() == 1
    about = json.loads((found.path / "summary.json").read_text())["methods"][STREAM.label]
    assert about["tokens_per_second"] and about["edits_while_timed"] == 4  # though the look after 5 added none
    assert read_rows(found.path)["edits"].max() == 4
    for file in ("units/rome_stream-00004-0000.parquet", "fits/rome_stream-stream-00004.parquet"):
        (found.path / file).unlink()
    seen: list[str] = []
    start(place, "a", STREAM, every=1, progress=lambda p: seen.append(p.job.name))
    assert seen == [*(f"rome_stream-stream-0000{i}" for i in (1, 2, 3, 4)), "rome_stream-00004-0000"]
    assert texts(read_rows(found.path)) == texts(rows) and texts(read_fits(found.path)) == texts(fits)
    # all of them from the cache: what could not be fitted is still named
    other = start(place, "b", STREAM, every=1)
    assert texts(read_fits(other.path).drop(columns="run")) == texts(fits.drop(columns="run"))
    with pytest.raises(RuntimeError, match="was given no patch of it"):
        model, tokenizer = load(place / "model")
        with Worker(model, tokenizer, cases(None), (), [STREAM]) as worker:  # type: ignore[arg-type]
            worker.do(Job("x", "stream", STREAM.label, (0, 5), 2, ("w",), 1), Given())


def test_the_time_that_is_left_goes_by_cases_and_not_by_jobs() -> None:
    pace = _Pace()
    chains = [
        Job("a", "chain", "rome", (0, 10)),
        Job("b", "chain", "rome", (10, 1000)),
        Job("c", "speed", "rome", (0, 1000)),
    ]
    asked = Job("d", "ask", "unedited", (0, 16))
    pace.note(asked, Outcome(seconds=8.0))
    assert pace.left(chains, 1) is None  # asking says nothing of fits
    pace.note(chains[0], Outcome(seconds=5.0))
    assert pace.left(chains[1:], 1) == pytest.approx(495.0)
    other = Job("e", "single", "memit", (0, 20))
    assert pace.left([chains[1], other, asked], 2) == pytest.approx((495.0 + 10.0 + 8.0) / 2)


def test_file_names_are_told_apart() -> None:
    assert file_names(["SAKE (paper)", "SAKE paper", "rome", "unedited", "../x"]) == {
        "SAKE (paper)": "SAKE_paper", "SAKE paper": "SAKE_paper_", "rome": "rome", "unedited": "unedited_", "../x": "x",
    }  # fmt: skip


def test_the_first_difference_is_named() -> None:
    one = {"seed": 0, "methods": {"rome": {"config": {"layer": 2, "steps": 20}}}}
    assert difference(one, json.loads(json.dumps(one))) is None
    assert difference(one, {**one, "seed": 1}) == "seed is 0 there and 1 here"
    other = {"seed": 0, "methods": {"rome": {"config": {"layer": 3, "steps": 20}}}}
    assert difference(one, other) == "methods.rome.config.layer is 2 there and 3 here"
    assert difference([1, 2], [1, 3], "a") == "a[1] is 2 there and 3 here"
    assert difference({}, {"x": "y" * 99}) == 'x is null there and "' + "y" * 56 + "... here"


# -- settings ------------------------------------------------------------------------------------------------------------


def test_single_edits_are_fitted_asked_and_counted(place: Path) -> None:
    seen: list[Progress] = []
    found = start(place, "a", ROME_ALONE, progress=seen.append, command="errata bench fake")
    rows, fits = read_rows(found.path), read_fits(found.path)
    assert list(fits["case"]) == list(SUBJECTS)
    assert fits["error"].tolist()[3].startswith("rome needs a subject") and (fits["error"] == "").sum() == 4
    assert set(fits["nbytes"].dropna()) == {4 * (32 + 128)}  # a column of U and one of V, float32
    # conditions of the unedited model only, nothing of the case that failed, the unedited answers beside the edited ones
    counts = rows.groupby(["method", "kind"]).size().to_dict()
    assert counts == {
        ("rome", "edit"): 4, ("rome", "neighborhood"): 4, ("unedited", "compositionality_i"): 5,
        ("unedited", "edit"): 5, ("unedited", "fact"): 2, ("unedited", "neighborhood"): 5,
    }  # fmt: skip
    own = rows[rows["method"] == "rome"]
    assert (own["p_expected_first"][own["kind"] == "edit"] > 0.2).all()
    assert (rows["p_expected_first"][(rows["method"] == "unedited") & (rows["kind"] == "edit")] < 0.1).all()
    assert set(own["edits"]) == {1} and set(own["setting"]) == {"single"}
    assert own["tags"].tolist()[0] == {"first": "N", "form": "own"} and set(rows["run"]) == {"a"}
    plain = rows[rows["method"] == "unedited"].set_index(["case", "probe"])["generated"]
    assert [plain[c, p] for c, p in zip(own["case"], own["probe"], strict=True)] == own["unedited"].tolist()
    about, summary = found.read(), json.loads((found.path / "summary.json").read_text())
    assert about["command"] == "errata bench fake" and about["finished"] and about["spec"]["n"] == 5
    assert about["spec"]["methods"]["rome"]["config"]["steps"] == 25 and about["machine"]["cores"] >= 1
    of_rome = summary["methods"]["rome"]
    assert list(of_rome["failed"]) == ["Dome"] and of_rome["fits"] == 4 and of_rome["bytes_per_edit"] == 640
    assert of_rome["seconds_per_fit"] == pytest.approx(fits["seconds"].mean()) and 0 < of_rome["speed"] < 10
    assert [(p.done, p.total) for p in seen] == [(i, 8) for i in range(1, 9)]
    assert seen[-1].left == 0 and seen[0].left is None  # nothing was fitted yet


def test_all_edits_at_once_by_a_joint_and_by_a_steering_method(place: Path) -> None:
    found = start(place, "a", MEMIT, SAKE_ALL)
    rows, fits = read_rows(found.path), read_fits(found.path)
    assert fits.groupby("method")["error"].apply(lambda e: sum(e != "")).to_dict() == {"memit": 1, "sake, all": 0}
    assert set(rows["edits"][rows["method"] != "unedited"]) == {5}
    assert (rows["kind"][rows["method"] == "memit"] == "fact").sum() == 2  # the world is asked
    model, tokenizer = load(place / "model")
    requests = [case.request for case in cases(None) if case.request.subject]  # type: ignore[arg-type]
    from errata.editors.memit import MEMIT as Editor

    patch = Editor(**MEMIT.changes).fit(model, tokenizer, requests)
    own = rows[(rows["method"] == "memit") & (rows["kind"] == "edit")]
    with patch.attach(model, tokenizer):
        texts = greedy(model, tokenizer, own["prompt"].tolist(), 6)
    assert [t[: len(g)] for t, g in zip(texts, own["generated"], strict=True)] == [
        g[: len(t)] for t, g in zip(texts, own["generated"], strict=True)
    ]


def test_of_two_edits_that_contradict_each_other_the_later_is_left_out_where_they_meet(place: Path) -> None:
    def clashing(context: Context) -> list[Case]:
        first, second, *_ = cases(context)
        other = first.request.model_copy(update={"target_new": "Rome"})
        same = replace(first, id="again")
        return [first, replace(first, id="later", request=other), second, same]

    model, tokenizer = load(place / "model")
    one = replace(preset(MEMIT, ROME_ALONE), cases=clashing)
    for methods, names in (
        ((MEMIT, ROME_ALONE), ["Needle", "Tower", "again"]),
        ((ROME_ALONE,), ["Needle", "Tower", "again", "later"]),
    ):
        plan = Plan(one, str(place / "model"), methods)
        done = run(plan, place / f"run-{len(methods)}", model, tokenizer, cache=place / "cache")
        fits = read_fits(done.path)
        assert not any(fits["error"].fillna("")) and sorted(set(fits["case"])) == names
        kept = json.loads((done.path / "summary.json").read_text())
        assert [m["failed"] for m in kept["methods"].values()] == [{}] * len(methods)
        why = "it edits ('The Needle', 'Go and see {}'), as case Needle does, to another object"
        assert kept["left_out"] == ({"case later": why} if len(methods) == 2 else {})
        shown = dict(report._left_out(done.path))
        assert shown == ({"left out of the data": f"1 (case later: {why})"} if len(methods) == 2 else {})


def test_a_sequence_fits_each_edit_on_the_model_that_the_earlier_left(place: Path) -> None:
    found = start(place, "a", LIFELONG, checkpoints=(1, 3, 4))
    rows = read_rows(found.path, "method = 'rome, lifelong'")
    asked = rows[rows["kind"] == "edit"].groupby("edits")["case"].apply(list).to_dict()
    three = ["Needle", "Tower", "Gate"]
    assert asked == {1: ["Needle"], 3: three, 4: three, 5: [*three, "Wall"]}
    assert rows[rows["kind"] == "fact"].groupby("edits").size().to_dict() == {1: 2, 3: 2, 4: 2, 5: 2}
    counted = results(found.path)  # "Dome" has failed, and counts from its place on
    own = counted[(counted["method"] == LIFELONG.label) & (counted["kind"] == "edit")]
    assert own.groupby("edits")["case"].apply(len).to_dict() == {1: 1, 3: 3, 4: 4, 5: 5}
    assert own[own["failed"]].groupby("edits")["case"].apply(list).to_dict() == {4: ["Dome"], 5: ["Dome"]}
    last = rows[(rows["edits"] == 5) & (rows["kind"] == "edit")]
    assert [tags["position"] for tags in last["tags"]] == ["1", "2", "3", "5"]
    # by hand: fit, merge, fit, merge
    model, tokenizer = load(place / "model")
    first, second = (case.request for case in cases(None)[:2])  # type: ignore[arg-type]
    alone = ROME(**QUICK).fit(model, tokenizer, [second]).low_rank[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with merge(ROME(**QUICK).fit(model, tokenizer, [first]), model, tokenizer):
        expected = ROME(**QUICK).fit(model, tokenizer, [second]).low_rank[0]
    with Worker(model, tokenizer, cases(None), (), [LIFELONG]) as worker:  # type: ignore[arg-type]
        patches = worker.do(Job("x", "chain", LIFELONG.label, (0, 2), 2), Given()).patches
        again = worker.do(Job("x", "chain", LIFELONG.label, (1, 2), 2), Given(patches=patches[:1])).patches
    torch.testing.assert_close(patches[1].low_rank[0].U, expected.U, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[0].low_rank[0].U, expected.U, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone.U, expected.U, rtol=1e-2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_steering_accumulates_and_its_fits_are_those_of_single_edits(place: Path) -> None:
    alone, lifelong = Method("alone", "sake", changes=STEER), Method("lifelong", "sake", "sequential", changes=STEER)
    found = start(place, "a", alone, lifelong, checkpoints=(2,))
    fits = read_fits(found.path)
    assert len(list((place / "cache").glob("*/*.safetensors"))) == 5
    seconds = fits.groupby("method")["seconds"].apply(list)  # what came from the cache says how long its fit took
    assert seconds["alone"] == seconds["lifelong"]
    rows = read_rows(found.path, "method = lifelong and kind = edit")
    assert rows.groupby("edits").size().to_dict() == {2: 2, 5: 5}


# -- the cache -----------------------------------------------------------------------------------------------------------


def test_patches_are_kept_by_content(place: Path) -> None:
    model, tokenizer = load(place / "model")
    cache, request = PatchCache(model, tokenizer, place / "cache"), cases(None)[0].request  # type: ignore[arg-type]
    editor, other = ROME(**QUICK), ROME(**{**QUICK, "steps": 24})
    keys = {
        cache.key(editor, [request], 0),
        cache.key(other, [request], 0),
        cache.key(editor, [request], 1),
        cache.key(editor, [request], 0, before="x"),
        cache.key(editor, [request.model_copy(update={"target_new": "Japan"})], 0),
    }
    assert len(keys) == 5
    judged = request.model_copy(update={"paraphrase_prompts": ("You see The Needle",)})
    assert cache.key(editor, [judged], 0) in keys
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] += 1
    assert PatchCache(model, tokenizer, place / "cache").key(editor, [request], 0) not in keys
    key, patch = cache.key(editor, [request], 0), editor.fit(model, tokenizer, [request])
    assert cache.find(key) is None
    cache.keep(key, patch)
    assert cache.find(key) == patch
    [file] = (place / "cache").glob("*/*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert cache.find(key) is None  # damaged
    cache.keep(key, patch)
    another = key[::-1]
    assert another != key
    cache.keep(another, patch)
    os.utime(file, (1, 1))
    cache.limit = len(whole) + 1
    assert cache.trim() == 1 and cache.find(key) is None and cache.find(another) == patch


# -- stopping and going on -----------------------------------------------------------------------------------------------


def test_another_run_is_refused_in_one_sentence(place: Path) -> None:
    start(place, "a", ROME_ALONE)
    with pytest.raises(ConfigError, match=r"another run \(seed is 0 there and 3 here\)"):
        start(place, "a", ROME_ALONE, seed=3)
    with pytest.raises(ConfigError, match=r"methods\.rome\.config\.steps is 25 there and 26 here"):
        start(place, "a", Method("rome", "rome", changes={**QUICK, "steps": 26}))
    (place / "b").mkdir()
    (place / "b" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="other files and no run"):
        start(place, "b", ROME_ALONE)
    with pytest.raises(ConfigError, match="two methods of a run have the label 'rome'"):
        start(place, "c", ROME_ALONE, ROME_ALONE)
    with RunDirectory(place / "a").locked(), pytest.raises(ConfigError, match="another process"):
        start(place, "a", ROME_ALONE)


def test_a_finished_run_is_not_done_again_and_a_lost_unit_is(place: Path) -> None:
    found = start(place, "a", ROME_ALONE, SAKE_ALL)
    before = {p: p.stat().st_mtime_ns for p in found.path.rglob("*")}
    seen: list[Progress] = []
    start(place, "a", ROME_ALONE, SAKE_ALL, progress=seen.append)
    assert not seen and before == {p: p.stat().st_mtime_ns for p in found.path.rglob("*")}  # run.json too
    whole = read_rows(found.path).drop(columns="run")
    (found.path / "units" / "rome-0001.parquet").unlink()
    (found.path / "units" / "sake_all-0002.parquet").unlink()
    start(place, "a", ROME_ALONE, SAKE_ALL, progress=seen.append)
    names = [p.job.name for p in seen]
    assert names == ["rome-0001", "sake_all-fit-0000", "sake_all-fit-0001", "sake_all-fit-0002", "sake_all-0002"]
    assert whole.equals(read_rows(found.path).drop(columns="run"))
    assert methods_of(found.read()["spec"])[1].changes == STEER and len(found.read()["resumed"]) == 1


def test_what_a_preset_makes_besides_is_made_in_parts_that_are_not_made_twice(place: Path) -> None:
    seen: list[Progress] = []
    found = start(place, "a", ROME_ALONE, extra=besides, progress=seen.append)
    names = [f"case-{subject}" for subject in SUBJECTS]
    assert [p.job.method for p in seen if p.job.kind == "part"] == names and seen[-1].done == seen[-1].total == 13
    made = json.loads((found.path / "said.json").read_text())
    model, tokenizer = load(place / "model")
    said = greedy(model, tokenizer, [case.request.text for case in cases(None)], 3)  # type: ignore[arg-type]
    assert list(made) == names and [one["said"] for one in made.values()] == said and made[names[0]]["of"] == 1
    (found.path / "parts" / "case-Gate.json").unlink()
    (found.path / "said.json").unlink()
    seen.clear()
    start(place, "a", ROME_ALONE, extra=besides, progress=seen.append)
    assert [p.job.name for p in seen] == ["part-case-Gate"]
    assert json.loads((found.path / "said.json").read_text()) == made


def test_a_run_that_goes_on_with_other_sources_says_so(place: Path) -> None:
    found = start(place, "a", ROME_ALONE, command="first")
    about = found.read()
    assert about["workers"] == 1 and len(about["sources"]) == 16
    about["versions"]["torch"] = "1.0"
    found.write_json("run.json", about | {"sources": "0123456789abcdef"})
    (found.path / "units" / "rome-0001.parquet").unlink()
    with pytest.warns(UserWarning, match="the rows of .* may be of different kinds: .* in place of 0123456789abcdef"):
        start(place, "a", ROME_ALONE, command="second")
    [words] = other_sources(found.read())
    assert f"torch {torch.__version__} in place of 1.0" in words
    again = found.read()
    assert again["command"] == "first" and again["finished"]
    assert [(one["command"], one["workers"], one["sources"]) for one in again["resumed"]] == [
        ("second", 1, RunDirectory(place / "a").read()["resumed"][0]["sources"])
    ]
    facts = dict(_facts(again, read_rows(found.path)))
    assert "by second (local, 1 at work)" in facts["resumed"]
    assert facts["take care: rows may be of different kinds"] == words


def test_what_a_kill_at_the_very_start_leaves_is_no_hindrance(place: Path) -> None:
    (place / "a").mkdir()
    (place / "a" / ".run.json.0123456789ab").write_text('{"spec": ')
    found = start(place, "a", ROME_ALONE)
    assert not list(found.path.glob("**/.*"))
    about, cases_there = found.read(), (found.path / "cases.jsonl").read_text()
    for path in [*found.path.rglob("*.parquet"), found.path / "cases.jsonl", found.path / "summary.json"]:
        path.unlink()
    about.pop("finished")
    found.write_json("run.json", about)
    start(place, "a", ROME_ALONE)
    assert (found.path / "cases.jsonl").read_text() == cases_there and len(cases_there.splitlines()) == 5
    (place / "b").mkdir()
    other = place / "b" / ".notes.0123456789ab"
    other.write_text("mine")
    with pytest.raises(ConfigError, match="other files and no run"):
        start(place, "b", ROME_ALONE)
    assert other.exists()


def test_ctrl_c_leaves_whole_units_and_the_model_as_it_was(place: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.job.name == "sake_all-0000":
            raise KeyboardInterrupt

    model, tokenizer = load(place / "model")
    plan = Plan(preset(SAKE_ALL), str(place / "model"), (SAKE_ALL,))
    prompts = [case.request.text for case in cases(None)]  # type: ignore[arg-type]
    before = greedy(model, tokenizer, prompts, 6)
    with pytest.raises(KeyboardInterrupt):
        run(plan, place / "a", model, tokenizer, cache=place / "cache", shard=2, progress=stop)
    assert greedy(model, tokenizer, prompts, 6) == before
    whole = start(place, "b", SAKE_ALL)
    again = start(place, "a", SAKE_ALL)
    assert read_rows(again.path).drop(columns="run").equals(read_rows(whole.path).drop(columns="run"))


SCRIPT = """
import sys
from pathlib import Path
from errata.bench.engines import ProcessEngine
from test_runner import LIFELONG, ROME_ALONE, STREAM, start
place, name, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tell = lambda p: print(p.job.name, flush=True)
if processes:
    with ProcessEngine(processes) as engine:
        start(place, name, ROME_ALONE, STREAM, every=2, progress=tell, engine=engine)
else:
    start(place, name, ROME_ALONE, LIFELONG, checkpoints=(2,), progress=tell)
print("finished", flush=True)
"""


def begin(place: Path, name: str, processes: int = 0) -> "subprocess.Popen[str]":
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(place), name, str(processes)],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        text=True,
    )


def killed(process: "subprocess.Popen[str]", after: int, pause: float) -> list[str]:
    """The units that a process told of; it is killed when so many are done and a moment has passed."""
    assert process.stdout is not None
    told = [process.stdout.readline().strip() for _ in range(after)]
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    with process.stdout as rest:
        told += [line.strip() for line in rest]
    assert process.wait() == -signal.SIGKILL
    return told


def same_run(one: Path, other: Path) -> None:
    for read in (read_rows, read_fits):
        a, b = (read(path).drop(columns=["run", "seconds"], errors="ignore") for path in (one, other))
        assert texts(a) == texts(b) and len(a)
    assert (one / "cases.jsonl").read_text() == (other / "cases.jsonl").read_text()


def test_kill_9_at_any_moment_neither_repeats_nor_loses_a_case(place: Path) -> None:
    told: list[str] = []
    for after, pause in ((5, 0.1), (3, 0.3)):  # in the midst of a fit and of a sequence
        told += killed(begin(place, "killed"), after, pause)
    half = RunDirectory(place / "killed")
    assert "finished" not in told and not (half.path / "summary.json").exists()
    (half.path / "units" / ".rome-0000.parquet.0a1b2c3d4e5f").write_bytes(b"half")
    (half.path / "cases.jsonl").unlink()
    process = begin(place, "killed")
    rest, _ = process.communicate()
    assert process.returncode == 0 and rest.split()[-1] == "finished"
    rows = [name for name in [*told, *rest.split()] if "-fit-" not in name]
    assert len(rows) == len(set(rows))  # no unit of rows was made twice
    whole = start(place, "whole", ROME_ALONE, LIFELONG, checkpoints=(2,))
    same_run(half.path, whole.path)
    assert not list(half.path.glob("**/.*"))


def test_a_run_of_two_processes_that_is_killed_goes_on(place: Path) -> None:
    told = killed(begin(place, "killed", processes=2), 6, 0.0)
    assert "finished" not in told and len(told) >= 6
    seen: list[str] = []
    half = start(place, "killed", ROME_ALONE, STREAM, every=2, progress=lambda p: seen.append(p.job.name))
    assert seen and all("-stream-" in name for name in told if name in seen)
    same_run(half.path, start(place, "whole", ROME_ALONE, STREAM, every=2).path)


def texts(frame: Any) -> Sequence[Any]:
    """A table without its floats, and without the fit's own report."""
    kept = [c for c in frame.columns if frame[c].dtype != float and c != "report"]
    return [tuple(map(str, row)) for row in frame[kept].itertuples(index=False)]


def test_what_an_editor_has_learned_is_in_the_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever its artefact lies: another training makes other patches."""
    model, tokenizer = load(place / "model")
    cache, request = PatchCache(model, tokenizer, place / "cache"), cases(None)[0].request  # type: ignore[arg-type]
    artefact, keys = place / "mend.safetensors", []
    monkeypatch.setattr(MEND, "artefact_path", lambda *_: artefact)
    for learned in (None, b"one training", b"another"):
        if learned:
            artefact.write_bytes(learned)
        keys.append(cache.key(MEND(), [request], 0))
    assert len(set(keys)) == 3 and cache.key(MEND(), [request], 0) == keys[2]


def test_key_statistics_that_a_fit_finds_are_in_the_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(place / "user"))
    model, tokenizer = load(place / "model")
    request = cases(None)[0].request  # type: ignore[arg-type]
    found, none = ROME(**{**QUICK, "statistics": "auto"}), ROME(**QUICK)
    aligned = STEAM(weight=0.0, **{**QUICK, "statistics": "auto"})

    def keys() -> list[str]:
        cache = PatchCache(model, tokenizer, place / "cache")
        return [cache.key(editor, [request], 0) for editor in (found, aligned, none)]

    layer = found.layers(model)[0]
    texts = [f"{a} {b}" for a in SENTENCES for b in SENTENCES]
    before = keys()
    key_statistics(model, tokenizer, texts, [layer])
    after = keys()
    assert before[:2] != after[:2] and before[2] == after[2] and len({*before, *after}) == 5
    key_statistics(model, tokenizer, texts[:-9], [layer])  # fewer: the first are taken, as before
    assert keys() == after


def test_atlas_texts_are_in_the_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's sources that write them are not."""
    model, tokenizer = load(place / "model")
    request, keys = cases(None)[0].request, []  # type: ignore[arg-type]
    for revision in ("one", "another"):
        monkeypatch.setattr(_weights, "own_texts", lambda _, revision=revision: Texts("atlas", list, revision))
        cache = PatchCache(model, tokenizer, place / "cache")
        keys.append([cache.key(ROME(**{**QUICK, "statistics": s}), [request], 0) for s in ("auto", None)])
    assert keys[0][0] != keys[1][0] and keys[0][1] == keys[1][1]


def test_a_checkpoint_that_was_trained_a_little_further_is_another_run(place: Path) -> None:
    found = start(place, "a")
    model, tokenizer = load(place / "model")
    before = PatchCache(model, tokenizer, False)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] *= 1 + 2**-20
    after = PatchCache(model, tokenizer, False)
    assert before.base == after.base and before.digest != after.digest
    assert RunDirectory(found.path).read()["spec"]["weights"] == before.digest[:16]


def test_the_unedited_model_is_asked_once_over_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.bench import ask as module

    counts: list[int] = []
    real = module.ask

    def counted(m: Any, t: Any, questions: Any, **rest: Any) -> Any:
        counts.append(len(questions))
        return real(m, t, questions, **rest)

    monkeypatch.setattr(module, "ask", counted)
    answers: dict[Any, dict[str, Any]] = {}
    first = start(place, "a", answers=answers)
    assert counts == [
        4,
        2,
        1,
        2,
    ]  # edit prompts, with the first two a neighbour and a condition that all share; the world
    second = start(place, "b", answers=answers, shard=5)
    assert sum(counts) == 9
    assert read_rows(first.path).drop(columns="run").equals(read_rows(second.path).drop(columns="run"))
    assert list(read_rows(first.path)["case"])[:6] == ["Needle"] * 3 + ["Tower"] * 3


def test_a_prompt_that_is_sampled_from_twice_gives_the_unedited_model_two_texts(place: Path) -> None:
    """CounterFact repeats generation prompts; an edited model has a text for each of them."""
    model, tokenizer = load(place / "model")
    probes = tuple(Probe("generation", "The capital of France is") for _ in range(2))
    [case, *_] = cases(None)  # type: ignore[arg-type]
    with Worker(model, tokenizer, [replace(case, probes=probes)], (), ()) as worker:
        outcome = worker.do(Job("unedited-0000", "ask", "unedited", (0, 1)), Given())
    assert outcome.rows is not None
    assert [row["probe"] for row in outcome.rows] == [0, 1]
    assert len({row["generated"] for row in outcome.rows}) == 2


def test_an_outcome_that_is_no_fit_ends_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Outcome:
        raise RuntimeError("no room")

    monkeypatch.setattr(Worker, "_ask", broken)
    with pytest.raises(RuntimeError, match="no room"):
        start(place, "a", ROME_ALONE)
    assert not list((place / "a").glob("**/*.parquet"))
