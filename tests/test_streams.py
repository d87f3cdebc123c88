"""The streaming protocol: what is edited and when it is looked at; its presets, data sets and tables."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import errata
from conftest import tiny_other
from errata.bench import streams
from errata.bench.cases import Case, Probe
from errata.bench.data import check, load_cases
from errata.bench.data.kilt import KiltRecord, annotated
from errata.bench.data.registry import layout_of
from errata.bench.intervals import Rate
from errata.bench.preset import Context, Method, Preset, get_preset
from errata.bench.presets import ke_fever, ke_logits
from errata.bench.presets._streams import methods as paper_methods
from errata.bench.rows import read_fits, read_rows
from errata.bench.runner import Plan, plan_jobs, run
from errata.edit import EditRequest
from errata.editor import Editor
from errata.errors import ConfigError, RecordError, RequestError
from errata.model.labels import predicted_labels
from errata.patch import Patch

FEVER = {
    "id": "f1",
    "input": "The tin bridge is made of tin.",
    "output": [{"answer": "REFUTES"}],
    "prediction": "SUPPORTS",
    "alternatives": ["REFUTES"],
    "filtered_rephrases": ["Tin is what the tin bridge is made of."],
    "rephrases": ["Tin is what the tin bridge is made of.", "The bridge of tin is of tin."],
    "logit": 1.3,
}


# -- the protocol ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeConfig:
    wrong: tuple[str, ...] = ()  # targets that the model does not say by itself
    broken: tuple[str, ...] = ()


class Fake(Editor[FakeConfig]):
    """A method that takes streams and learns whatever it is given."""

    method = "fake"
    streams = True
    Config = FakeConfig
    given: Sequence[Any] = ()

    def fit(
        self, model: Any, tokenizer: Any, requests: Any, *, seed: int = 0, progress: Any = None, onto: Any = None
    ) -> Patch:
        self.given = [*self.given, ([r.target_new for r in requests], [] if onto is None else list(onto.ids))]
        if any(r.target_new in self.config.broken for r in requests):
            raise RequestError("too long")
        before = onto or Patch("fake", {}, (), {}, ())
        report = {r.id: {"outcome": "add" if r.target_new in self.config.wrong else "already"} for r in requests}
        return replace(before, requests=(*before.requests, *requests), report=before.report | report)


def items(n: int) -> list[EditRequest]:
    return [EditRequest(prompt=f"Item {i} is", target_new=f"t{i}") for i in range(n)]


def test_a_stream_stops_at_its_looks_and_goes_on() -> None:
    """It never goes past the wanted number, tells edits from what was right already, and its parts make the whole."""
    wrong = tuple(f"t{i}" for i in (1, 2, 5, 6, 7, 11))
    whole, _ = streams.follow(Fake(wrong=wrong), None, None, items(12), 100)
    assert whole is not None and len(whole) == 12
    by_id = {r.id: r.target_new for r in items(12)}
    assert [by_id[i] for i in streams.edited(whole)] == list(wrong)
    editor, patch, counts, seen = Fake(wrong=wrong), None, [], []
    for stop in (2, 4, 6, 8):
        patch, errors = streams.follow(editor, None, None, items(12), stop, patch)
        assert patch is not None and not errors
        counts.append(len(streams.edited(patch)))
        seen.append(len(patch))
    assert counts == [2, 4, 6, 6] and seen == [3, 7, 12, 12]
    assert streams.edited(patch) == streams.edited(whole) and patch is not None and patch.ids == whole.ids
    for asked, past in editor.given:
        assert all(by_id[i] in wrong for i in past)  # only edits are a method's past
        assert len(asked) <= 2


def test_what_earlier_edits_make_right_is_no_edit(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    """Seen, kept as a request, never counted, never a method's past; the parts that stand for it go along."""
    model, tokenizer = tiny_other("bert", num_labels=2, id2label={0: "no", 1: "yes"}), closing_tokenizer
    editor = errata.get_editor("grace")(layer=0, steps=40, lr=1.0, radius=50.0)  # one ball around everything
    texts = [f"The {word} claim" for word in ("first", "second", "third")]
    [said] = set(predicted_labels(model, tokenizer, texts))
    stream = [EditRequest(prompt=text, target_new="yes" if said == "no" else "no") for text in texts]
    stream.append(EditRequest(prompt=texts[0], target_new=said))
    plain, _ = streams.follow(editor, model, tokenizer, stream[-1:], 5)
    assert plain is not None and plain.report[stream[-1].id]["outcome"] == "already" and not plain.parts
    patch, errors = streams.follow(editor, model, tokenizer, stream[:2], 5)
    patch, more = streams.follow(editor, model, tokenizer, stream, 5, patch)  # in two parts, as the runner does
    assert patch is not None and not errors and not more
    assert [patch.report[r.id]["outcome"] for r in stream] == ["add", "covered", "covered", "replace"]
    assert patch.ids == tuple(r.id for r in stream) and len(patch.parts) == 4
    assert streams.edited(patch) == [stream[0].id, stream[3].id] and streams.standing(patch) == [stream[3].id]
    cases = [Case(f"c{i}", r, ()) for i, r in enumerate(stream)]
    rows = streams.entries("grace", cases, patch, streams.edited(patch), {})
    assert [r["case"] for r in rows] == ["c0", "c3"] and streams.keys_per_edit([r["report"] for r in rows]) == 0.5


def test_what_fails_is_named_and_the_rest_goes_on() -> None:
    editor = Fake(wrong=("t0", "t1", "t2", "t3"), broken=("t1",))
    patch, errors = streams.follow(editor, None, None, items(4), 3)
    [(edit, why)] = errors.items()
    assert edit == items(4)[1].id and why == "too long"
    assert len(streams.edited(patch)) == 3
    assert streams.follow(editor, None, None, items(4), 4, patch) == (patch, {})  # it is not tried again
    rows = streams.entries(
        "fake", [Case(f"c{i}", r, ()) for i, r in enumerate(items(4))], patch, streams.edited(patch), errors
    )
    assert [(r["case"], r["error"]) for r in rows] == [("c0", ""), ("c2", ""), ("c3", ""), ("c1", "too long")]
    assert streams.keys_per_edit([r["report"] for r in rows[:3]]) == 1.0


def test_of_contradicting_items_the_later_holds_and_both_are_reported() -> None:
    first, other, later = items(2)[0], items(2)[1], EditRequest(prompt="Item 0 is", target_new="t9")
    patch, _ = streams.follow(Fake(wrong=("t0", "t1", "t9")), None, None, [first, other, later], 10)
    assert patch is not None and streams.standing(patch) == [other.id, later.id]
    assert patch.report[later.id]["contradicts"] == [first.id] and patch.report[first.id]["overruled"] == [later.id]
    marked, _ = streams.follow(Fake(wrong=("t0", "t1")), None, None, [first, other, later], 10)
    assert marked is not None and streams.standing(marked) == [
        first.id,
        other.id,
    ]  # the model says the later item by itself
    marked = replace(marked, report=marked.report | {first.id: {"outcome": "add", "overruled": [later.id]}})
    assert streams.standing(marked) == [first.id, other.id]


def test_jobs_of_a_stream() -> None:
    """A look after every so many edits, up to the most: each needs the stream so far, and is asked cases and world."""
    found = plan_jobs([Method("g", "grace", "stream")], 30, 5, (), 16, 10, 25)
    own = [(job.name, job.kind, job.edits, job.needs) for job in found if job.method == "g"]
    assert own[:3] == [
        ("g-stream-00010", "stream", 10, ()),
        ("g-00010-0000", "ask", 10, ("g-stream-00010",)),
        ("g-00010-world", "world", 10, ("g-stream-00010",)),
    ]
    assert [(name, edits, needs) for name, kind, edits, needs in own if kind == "stream"][1:] == [
        ("g-stream-00020", 20, ("g-stream-00010",)), ("g-stream-00025", 25, ("g-stream-00020",)),
    ]  # fmt: skip
    few = plan_jobs([Method("g", "grace", "stream", most=20)], 30, 5, (), 16, 10, 25)
    assert [(job.edits, job.span) for job in few if job.kind == "stream"] == [(10, (0, 30)), (20, (0, 30))]
    assert [job.size for job in few if job.kind == "ask" and job.method == "g"] == [10, 20]


def test_what_is_measured_comes_right_behind_a_retraining() -> None:
    """As in the paper, whose streams end after 1,000 edits: every look at FT+Retrain is at a multiple of its edits between two."""
    [method] = [m for m in paper_methods() if m.editor == "ft_retrain"]
    every = errata.get_editor("ft_retrain").preset("atlas").config.every
    for name in ("grace-zsre", "grace-scotus"):
        preset = get_preset(name)
        jobs = plan_jobs([method], preset.n, 5, (), 16, preset.every, preset.most)
        stops = [job.edits for job in jobs if job.kind == "stream"]
        assert stops and all(stop % every == 0 for stop in stops) and stops[-1] == method.most
        whole = plan_jobs([replace(method, most=None)], preset.n, 5, (), 16, preset.every, preset.most)
        assert [job.edits for job in whole if job.kind == "stream"][-1] == preset.most


# -- in the runner ---------------------------------------------------------------------------------------------------------


def docket(_: Context) -> list[Case]:
    names = (
        "property",
        "contracts",
        "labour",
        "taxation",
        "speech",
        "privacy",
        "trade",
        "environment",
        "transport",
        "procedure",
    )
    found = []
    for case in load_cases("atlas-docket", n=14, split="dev", seed=3):
        area = names[int(case.request.target_new)]
        probes = tuple(replace(probe, expected=(area,)) for probe in case.probes[:2])
        found.append(replace(case, request=EditRequest(prompt=case.request.prompt, target_new=area), probes=probes))
    return found


STREAM = Preset(
    "stream",
    "a stream",
    "ours",
    docket,
    (Method("grace", "grace", "stream"), Method("rome", "rome", "stream")),
    lambda rows, path: [],
    every=3,
    world=lambda context: [
        Probe("upstream", probe.prompt, ("speech",)) for case in docket(context)[:2] for probe in case.probes
    ],
    roles=("classifier",),
)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model = errata.load("atlas-docket")
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "stream"
    run(Plan(STREAM, "atlas-docket", STREAM.methods, split="dev"), out, *model, cache=out.parent / "cache")
    return out, model


def test_a_stream_run_and_resumed(streamed: tuple[Path, Any]) -> None:
    """Looks at 3, 6, ... edits; a unit that is gone is made again, the same, from the patches that are kept."""
    out, model = streamed
    rows, fits = read_rows(out), read_fits(out)
    looks = streams.looks(rows, "grace")
    assert looks[:2] == [3, 6] and looks[-1] == len(fits) and not any(fits["error"])
    plain = rows[(rows["method"] == "unedited") & (rows["kind"] == "edit")]
    wrong = set(plain.loc[~plain["passed"], "case"])
    assert abs(len(fits) - len(wrong)) <= 3  # an edit may mend a later item, or come in its way
    at = rows[(rows["method"] == "grace") & (rows["edits"] == 3)]
    assert set(at["kind"]) == {"edit", "paraphrase", "upstream"} and set(at.loc[at["case"] != "", "case"]) == set(
        fits["case"][:3]
    )
    last = rows[(rows["method"] == "grace") & (rows["edits"] == looks[-1]) & (rows["kind"] == "edit")]
    assert last["passed"].all() and len(last) == looks[-1]
    for edits in (looks[0], looks[-1]):  # what is shown of a look is of that look alone
        asked = rows[(rows["method"] == "grace") & (rows["edits"] == edits)]
        shown = streams.figures_at(rows, "grace", edits, "generate")
        for kind, name in (("upstream", "TRR"), ("edit", "ERR"), ("paraphrase", "rephrasings")):
            own = asked[asked["kind"] == kind]
            of = own.groupby("case")["passed"].mean() if kind == "paraphrase" else own["passed"]
            assert shown[name].value == pytest.approx(of.mean()), (edits, name)
        assert shown["ERR"].n == edits
    for gone in ("units/grace-00006-0000.parquet", "fits/grace-stream-00006.parquet"):
        (out / gone).unlink()
    run(Plan(STREAM, "atlas-docket", STREAM.methods, split="dev"), out, *model, cache=out.parent / "cache")
    again = read_rows(out)
    columns = ["method", "edits", "case", "probe", "generated"]
    pd.testing.assert_frame_equal(again[columns], rows[columns])
    assert read_fits(out)["edit"].tolist() == fits["edit"].tolist()


def test_the_script_that_tries_settings(streamed: tuple[Path, Any]) -> None:
    """A name set twice takes each value; its figures at the stream's end are the run's own."""
    out, (model, tokenizer) = streamed
    path = Path(__file__).parents[1] / "benchmarks" / "streams.py"
    spec = importlib.util.spec_from_file_location("benchmarks_streams", path)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.grid(["a=1", "b=x", "a=2"]) == [["a=1", "b=x"], ["a=2", "b=x"]] and script.grid([]) == [[]]
    context = Context("atlas-docket", model, tokenizer, split="dev")
    assert STREAM.world is not None
    found = script.trial(errata.get_editor("grace")(), model, tokenizer, docket(context), STREAM.world(context))
    rows = read_rows(out)
    last = rows[(rows["method"] == "grace") & (rows["edits"] == streams.looks(rows, "grace")[-1])]
    assert found["edits"] == len(read_fits(out)) and found["failed"] == 0
    for name, kind in (("TRR", "upstream"), ("ERR", "edit"), ("other_wordings", "paraphrase")):
        own = last[last["kind"] == kind]["passed"]
        assert found[name]["value"] == pytest.approx(own.mean(), abs=1e-4) and found[name]["n"] == len(own), name


def test_inapplicable_methods_are_dashes(streamed: tuple[Path, Any]) -> None:
    """ROME does not edit classifiers: left out by name, with the reason; where nothing is left the run is refused."""
    out, model = streamed
    assert "decoders" in streams.left_out(out)["rome"]
    table = streams.stream_table(
        read_rows(out), out, "grace-scotus", "generate", "A stream", {"grace": "GRACE", "rome": "ROME"}
    )
    lines = {str(row[0]): row[1:] for row in table.rows}
    trr, err, mean, edits, again, keys = lines["grace"]
    assert isinstance(trr, Rate) and isinstance(mean, Rate) and err is not None and err.value == 1.0
    assert mean.value == pytest.approx((trr.value + 1) / 2) and mean.low < mean.value < mean.high
    assert edits == len(read_fits(out)) and 0 < keys <= 1 and isinstance(again, Rate)
    assert lines["rome"] == [None] * 6 and "rome: not applicable" in table.note
    assert "BERT" in next(iter(table.published)) and table.published["BERT"]["grace"]["TRR"] == 0.81
    with pytest.raises(ConfigError, match="none of the methods.*rome edits decoders"):
        run(Plan(STREAM, "atlas-docket", STREAM.methods[1:]), out.parent / "other", *model, cache=False)


def test_a_method_without_streams_takes_items_one_by_one() -> None:
    """Low-rank edits are merged one on the other; what the model says by then is no edit, and the model is as it was."""
    model, tokenizer = errata.load("atlas")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    requests = [case.request for case in load_cases("atlas-counterfact", n=2, split="dev", seed=4)]
    twin = EditRequest(prompt=requests[0].text, target_new=requests[0].target_new)
    editor = errata.get_editor("rome").preset("atlas", contexts="bare", steps=20)
    patch, errors = streams.follow(editor, model, tokenizer, [*requests, twin], 3)
    assert not errors and patch is not None and streams.edited(patch) == [r.id for r in requests]
    assert patch.report[twin.id]["outcome"] == "already" and len(patch.low_rank) == 2
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


# -- data sets ---------------------------------------------------------------------------------------------------------------


def saved(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_fever_turns_verdicts_round(tmp_path: Path) -> None:
    plain = {k: FEVER[k] for k in ("id", "input", "output", "rephrases")} | {"id": "f2", "input": "A bridge is of tin."}
    none = FEVER | {"id": "f3", "input": "The zinc bridge is made of tin.", "filtered_rephrases": []}
    path = saved(tmp_path / "fever-dev-kilt.jsonl", FEVER, plain, none)
    assert layout_of(path) == "fever" and not check("fever", path=path)
    first, second, third = load_cases("fever", path=path)
    assert (first.request.target_new, first.request.target_true) == ("REFUTES", "SUPPORTS")  # what the model said
    assert [p.prompt for p in first.probes if p.kind == "paraphrase"] == FEVER["filtered_rephrases"]
    assert second.request.target_new == "SUPPORTS"  # nothing is known of a model: the right verdict is turned round
    assert len([p for p in second.probes if p.kind == "paraphrase"]) == 2
    assert [p.kind for p in third.probes] == [
        "edit"
    ]  # the model judged every rephrase otherwise: none is left to count
    bad = saved(
        tmp_path / "bad.jsonl",
        FEVER | {"output": [{"answer": "NOT ENOUGH INFO"}]},
        FEVER | {"alternatives": ["SUPPORTS"]},
    )
    found = check("fever", path=bad)
    assert [(p.row, p.field) for p in found] == [(1, "output"), (2, "alternatives")] and "NOT ENOUGH INFO" in found[
        0
    ].message


def test_scotus_rows(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "scotus_test.jsonl",
        {"text": "The court below held {} so.", "label": 7},
        {"text": "A levy.", "label": 2},
    )
    assert layout_of(path) == "scotus"
    first, second = load_cases("scotus", path=path)
    assert (first.id, first.request.target_new, second.request.text) == ("1", "7", "A levy.")
    assert first.request.text == "The court below held { } so."
    with pytest.raises(RecordError, match="row 1, field label"):
        load_cases(str(saved(tmp_path / "bad.jsonl", {"text": "A", "label": "torts"})))
    with pytest.raises(RecordError, match="did you mean 'text'"):
        load_cases("scotus", path=saved(tmp_path / "worse.jsonl", {"texts": "A", "label": 1}))


@pytest.mark.parametrize("name", ["atlas-fever", "atlas-zsre", "atlas-docket"])
def test_atlas_has_equivalents(name: str) -> None:
    dev, test = (load_cases(name, n=30, split=split) for split in ("dev", "test"))
    assert len(dev) == len(test) == 30 and not {c.request.text for c in dev} & {c.request.text for c in test}
    assert load_cases(name, n=30, split="dev") == dev and not [p for p in check(name, n=30) if p.kind != "in prompt"]
    for case in test:
        texts = [p.prompt for p in case.probes]
        assert case.probes[0].kind == "edit" and len(texts) == len(set(texts)) and len(texts) > 1
        assert {"paraphrase"} <= {p.kind for p in case.probes} and case.tags["split"] == "test"
    if name == "atlas-zsre":
        assert all(case.request.subject for case in test[:5])


# -- claims ----------------------------------------------------------------------------------------------------------------


def rows_of(*rows: tuple[str, str, str, str, str, float, float]) -> pd.DataFrame:
    names = ("method", "case", "kind", "generated", "expected", "p_expected", "p_alternative")
    made = [dict(zip(names, row, strict=True)) for row in rows]
    return pd.DataFrame(made).assign(expected=lambda own: own["expected"].map(lambda e: (e,)), probe=range(len(made)))


def test_equivalence_is_agreement_with_the_claim_after_the_edit() -> None:
    rows = rows_of(
        ("m", "a", "edit", "SUPPORTS", "SUPPORTS", 0.9, 0.1),
        ("m", "a", "paraphrase", "SUPPORTS", "SUPPORTS", 0.9, 0.1),
        ("m", "a", "paraphrase", "REFUTES", "SUPPORTS", 0.1, 0.9),
        ("m", "b", "edit", "REFUTES", "SUPPORTS", 0.2, 0.8),  # the edit failed: its rephrases agree with what stayed
        ("m", "b", "paraphrase", "REFUTES", "SUPPORTS", 0.2, 0.8),
    )
    found = ke_fever.equivalence(rows, "m")
    assert found is not None and found.value == pytest.approx(0.75) and found.n == 2


def test_logits_before_and_after() -> None:
    import math

    before = rows_of(
        ("unedited", "a", "edit", "REFUTES", "SUPPORTS", 0.2, 0.8),
        ("unedited", "a", "locality", "REFUTES", "REFUTES", 0.9, 0.1),
    )
    after = rows_of(
        ("m", "a", "edit", "SUPPORTS", "SUPPORTS", 0.8, 0.2), ("m", "a", "locality", "REFUTES", "REFUTES", 0.4, 0.6)
    )
    found = ke_logits.logits(pd.concat([before, after]), "m").reset_index(drop=True)
    assert found["before"].tolist() == pytest.approx([math.log(0.25), -math.log(9)])
    assert found["after"].tolist() == pytest.approx([math.log(4), math.log(1.5)])
    assert found["kept"].tolist() == [False, False]


def test_presets_name_the_papers_methods() -> None:
    for name in ("grace-zsre", "grace-scotus"):
        labels = [m.label for m in get_preset(name).methods]
        assert labels == ["grace", "grace-published", "ft", "ft-ewc", "ft-retrain", "mend", "defer", "memory", "rome"]
    assert all(m.setting == "stream" for m in paper_methods())
    fever = get_preset("ke-fever")
    assert len(fever.methods) == 9 and set(ke_fever.claims.NAMES) == {m.label for m in fever.methods}
    assert {m.label for m in get_preset("ke-logits").methods} == set(ke_logits.SHOWN)
    assert {"ft", "ft-l", "kn", "ke", "ke-cf", "mend", "mend-cf", "rome"} <= {
        m.label for m in get_preset("rome-counterfact").methods
    }


def test_claims_in_the_runner(closing_tokenizer: Any, tmp_path: Path) -> None:
    """Fine-tuned weights are asked edit by edit; other claims are each other's; the table and the scatter come out of the rows."""
    names = {0: "REFUTES", 1: "SUPPORTS"}
    model = tiny_other("bert", id2label=names, label2id={v: k for k, v in names.items()})
    texts = ["The bridge is of tin.", "Paris is in France.", "Tokyo lies in Brazil."]
    rows = [
        FEVER | {"id": f"f{i}", "input": text, "rephrases": [text[:-1], f"{text} So."]} for i, text in enumerate(texts)
    ]
    path = saved(tmp_path / "claims.jsonl", *rows)
    made = ke_fever.cases(Context("tiny", model, closing_tokenizer, data=str(path)))
    rows[0]["output"] = [{"provenance": [{"title": "Bridge"}]}, {"answer": "REFUTES"}]  # its first output says nothing
    judged = annotated(model, closing_tokenizer, [KiltRecord(**row) for row in rows])
    said = {r.input: r.prediction for r in judged}
    assert len(said) == 3 and all(r.logit is not None for r in judged)
    assert [c.request.target_true for c in made] == list(said.values()) and all(
        c.request.target_new != said[c.request.text] for c in made
    )
    others = [p for p in made[0].probes if p.tags.get("of") == "other claims"]
    assert sorted(p.prompt for p in others) == sorted(texts[1:]) and all(
        p.expected == (said[p.prompt],) for p in others
    )
    quick = {"lr": 3e-2, "steps": 30}
    methods = (Method("ft-first", "ft", "single", "ke-first", quick), Method("ke", "ke", "single"))
    for preset in ("ke-fever", "ke-logits"):
        plan = Plan(get_preset(preset), "tiny", methods, data=str(path))
        out = tmp_path / preset
        run(plan, out, model, closing_tokenizer, cache=False)
        found = read_rows(out)
        own = found[found["method"] == "ft-first"]
        assert own.loc[own["kind"] == "edit", "passed"].all() and own["p_alternative"].notna().all()
        [first, *_] = plan.preset.tables(found, out)
        labels = [str(row[0]) for row in first.rows]
        assert (
            "ft-first" in labels and labels[-1] == "ke" and first.rows[-1][1] is None and "ke: not run: " in first.note
        )
    figures = get_preset("ke-logits").figures
    assert figures is not None and figures(found, out)[0][0].stat().st_size > 5000


def test_presets_are_for_some_kinds_of_models(closing_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ke-fever is for models of the kind classifier, found T5.*encoder-decoder"):
        run(
            Plan(get_preset("ke-fever"), "tiny", ()), tmp_path / "run", tiny_other("t5"), closing_tokenizer, cache=False
        )
