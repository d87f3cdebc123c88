"""Presets, and the probes that they make."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import tiny_model, tiny_other
from errata.bench import alignment, makers
from errata.bench.cases import Case, Probe
from errata.bench.figures import Point, Series, curves, dots, matrix, radar, styles_of
from errata.bench.methods import LIMITED, MODEL, STEAMS, resolved
from errata.bench.preset import Context, Method, available_presets, get_preset, pick_methods, unfit
from errata.bench.presets import (
    _claims,
    lifelong,
    reverse,
    rome_counterfact,
    rome_trace,
    sake_context,
    sake_ot,
    sake_threshold,
    steam_counterfact,
    steam_sweep,
)
from errata.bench.presets import _common as common
from errata.bench.published import REMARKS
from errata.bench.rows import FITS, write_rows
from errata.bench.worker import editor_of
from errata.edit import EditRequest
from errata.editors import available_editors
from errata.editors.rome import ROME
from errata.editors.sake import SAKE
from errata.editors.steam import STEAM
from errata.errors import ConfigError, RecordError, RequestError
from errata.model.tokens import token_ids

PAPERS = {"sake-counterfact", "sake-ripple", "sake-doubt", "sake-ot", "sake-spider", "sake-threshold", "sake-prompts",
          "rome-counterfact", "rome-trace", "steam-counterfact", "steam-sweep"}  # fmt: skip
OURS = {"sake-context", "sake-qa", "reverse", "flexibility", "lifelong"}


@pytest.fixture(scope="module")
def atlas() -> Any:
    import errata

    return errata.load("atlas")


@pytest.fixture
def case() -> Case:
    """An edit of Atlas's: the capital of Sweden becomes Oslo."""
    from errata.atlas.requests import request_for
    from errata.atlas.world import load_world

    world = load_world()
    request = request_for(world, world.by_key["Sweden", "capital"], "Oslo")
    probes = (Probe("paraphrase", "Politically, Sweden is run from"), Probe("neighborhood", "The capital of Spain is"))
    return Case("7", request, probes)


@pytest.fixture
def foreign() -> Case:
    """An edit that is not Atlas's."""
    request = EditRequest(prompt="The colour of {} is", subject="the tin bridge", target_new="red", target_true="green")
    return Case("f", request, (Probe("paraphrase", "The tin bridge was painted"),))


# -- presets ---------------------------------------------------------------------------------------------------------------


def test_every_preset_of_the_papers_and_ours_is_there() -> None:
    assert set(available_presets()) >= PAPERS | OURS


@pytest.mark.parametrize("name", sorted(PAPERS | OURS))
def test_methods_have_labels_of_their_own_and_editors_that_exist(name: str) -> None:
    preset = get_preset(name)
    labels = [method.label for method in preset.methods]
    assert len(set(labels)) == len(labels)
    assert {method.editor for method in preset.methods} <= set(available_editors())
    assert preset.methods or preset.extra is not None


@pytest.mark.parametrize(
    ("name", "n"),
    [("sake-counterfact", 2000), ("sake-ripple", 885), ("sake-doubt", 150), ("sake-prompts", 150), ("sake-ot", 2000)],
)
def test_sizes_are_the_papers(name: str, n: int) -> None:
    assert get_preset(name).published_n == n


@pytest.mark.parametrize(("family", "n"), [("gpt2", 7500), ("gptj", 2000)])
def test_gpt_j_has_the_number_of_its_paper(family: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("errata.bench.data.registry.load_cases", lambda name, **options: asked.update(options) or [])
    rome_counterfact.cases(Context("some/model", tiny_model(family, 2), None))
    assert asked["n"] == n


@pytest.mark.parametrize(
    "name", ["sake-counterfact", "sake-ripple", "sake-doubt", "sake-context", "sake-qa", "reverse", "steam-sweep"]
)
def test_cases_of_atlas_have_ids_of_their_own_and_probes(name: str, atlas: Any) -> None:
    context = Context("atlas", *atlas, n=3)
    cases = get_preset(name).cases(context)
    assert len({case.id for case in cases}) == len(cases) >= 3
    assert all(case.probes for case in cases)
    assert cases == get_preset(name).cases(context)


def test_presets_of_one_paper_edit_the_same_facts_so_that_fits_are_shared(atlas: Any) -> None:
    """The radar chart's edits are the first ones of the two tables', with the very same requests; so are lifelong's."""
    context = Context("atlas", *atlas)
    ripple = get_preset("sake-ripple").cases(context)
    first = get_preset("sake-counterfact").cases(context)
    spider = get_preset("sake-spider").cases(context)
    assert {c.request.id for c in spider} <= {c.request.id for c in (*first[:40], *ripple[:40])}
    assert [c.request.id for c in lifelong.cases(context)][:150] == [c.request.id for c in first]
    tests: dict[tuple[str, str], set[Any]] = {}
    for one in ripple:
        for probe in one.probes:
            if not probe.condition and "stratum" in probe.tags:
                tests.setdefault((probe.kind, probe.tags["stratum"]), set()).add((one.id, probe.test))
    assert len(tests) == 6 and min(map(len, tests.values())) >= 100


def test_a_preset_of_two_data_sets_takes_no_other() -> None:
    """Alone it is refused; `all` leaves out what is unfit and says why."""
    model, why = tiny_model("gpt2", 2), "sake-spider takes both CounterFact and RippleEdits and has no --data"
    spider = get_preset("sake-spider")
    assert unfit(spider, model) is None and unfit(spider, model, "my.json") == why
    assert unfit(get_preset("sake-counterfact"), model, "my.json") is None
    with pytest.raises(ConfigError, match=f"{why}; leave it out"):
        spider.cases(Context("tiny", model, None, data="my.json"))


@pytest.mark.parametrize("name", ["sake-ripple", "sake-counterfact", "sake-doubt"])
def test_sakes_tables_say_how_rome_and_memit_were_run(name: str) -> None:
    assert "EasyEdit's default parameters (ROME without its covariance)" in REMARKS[name][0]


def test_unknown_preset_is_refused_with_near_names() -> None:
    with pytest.raises(ConfigError, match="sake-counterfact"):
        get_preset("sake-counterfac")


def test_an_editor_that_a_preset_does_not_name_is_set_as_its_like_are() -> None:
    def setting(preset: str, name: str) -> str:
        [method] = pick_methods(get_preset(preset), [name])
        return method.setting

    assert setting("sake-counterfact", "sake") == "all"  # its own
    assert setting("sake-counterfact", "steam") == "single"  # beside single ROME
    assert setting("sake-counterfact", "emmet") == "all"  # beside MEMIT
    assert setting("sake-context", "icl") == "single" and setting("sake-context", "memit") == "all"
    assert setting("rome-counterfact", "ft_ewc") == "single"  # as FT
    assert setting("lifelong", "memit") == setting("lifelong", "icl") == "sequential"
    assert setting("grace-zsre", "serac") == "stream"
    assert pick_methods(get_preset("rome-trace"), ["rome"]) == ()
    assert pick_methods(get_preset("flexibility"), ["rome"]) == (common.ROME,)


def test_presets_are_for_models_that_their_methods_edit(closing_tokenizer: Any) -> None:
    from errata.editors import get_editor

    for name in available_presets():
        preset = get_preset(name)
        supports = [set(get_editor(method.editor).supports) for method in preset.methods] or [{"decoder"}]
        assert all(any(role in own for own in supports) for role in preset.roles), name
    claims = tiny_other("bert", num_labels=2, id2label={0: "REFUTES", 1: "SUPPORTS"})
    fit = [name for name in available_presets() if unfit(get_preset(name), claims) is None]
    assert fit == ["ke-fever", "ke-logits"]
    areas = tiny_other("bert", num_labels=10, id2label={i: f"area {i}" for i in range(10)})
    assert [name for name in available_presets() if unfit(get_preset(name), areas) is None] == ["grace-scotus"]
    assert "other labels: expected a label of this classifier (REFUTES, SUPPORTS), found '9'" in str(
        unfit(get_preset("grace-scotus"), claims)
    )


def test_parts_made_one_by_one_are_the_whole(atlas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing by spans of facts gives the averages of all facts at once; states of edits too."""
    from errata.bench.data.registry import load_facts
    from errata.locate.averages import average
    from errata.locate.noise import noise_for
    from errata.locate.tracing import Trace, TracingConfig, trace_facts

    model, tokenizer = atlas
    context = Context("atlas", model, tokenizer, n=2)
    preset = get_preset("rome-trace")
    assert preset.extra is not None
    monkeypatch.setattr(rome_trace, "SPAN", 1)
    monkeypatch.setattr(rome_trace, "KINDS", ("mlp",))
    extra = preset.extra(context, (), ())
    assert list(extra.parts) == ["mlp-0000", "mlp-0001"]
    extra.combine(json.loads(json.dumps({name: part() for name, part in extra.parts.items()})), tmp_path)
    facts = load_facts("atlas-known", n=2, seed=0, split="test")
    noise = noise_for(model, tokenizer, "s3", subjects=[fact.subject for fact in facts])
    found = [t for t in trace_facts(model, tokenizer, facts, noise, TracingConfig(kind="mlp")) if isinstance(t, Trace)]
    about = json.loads((tmp_path / "trace.json").read_text())
    assert about["facts"] == 2 and about["dropped"] == 2 - len(found)
    assert about["averages"] == json.loads(json.dumps([average(found).json()]))
    assert (tmp_path / "figures" / "rome-trace.png").exists()

    states = get_preset("sake-ot")
    cases = states.cases(context)
    assert states.extra is not None
    monkeypatch.setattr(sake_ot, "SPAN", 1)
    monkeypatch.setattr(sake_ot, "accuracies", lambda model, tokenizer, case, seed: {"shift": float(len(case.id))})
    extra = states.extra(context, cases, ())
    assert list(extra.parts) == ["states-0000", "states-0001"]
    extra.combine({name: part() for name, part in extra.parts.items()}, tmp_path)
    own = json.loads((tmp_path / "states.json").read_text())
    assert own == {case.id: {"shift": float(len(case.id))} for case in cases}


def test_methods_take_what_was_chosen_for_the_model(atlas: Any) -> None:
    model, _ = atlas
    assert resolved(common.ROME, model, "atlas").preset == "atlas"
    assert resolved(common.SAKE, model, "atlas").preset is None
    llama = tiny_model("llama", 2)
    for method in (common.SAKE, common.SAKE_ALONE, common.UNIFORM):
        assert resolved(method, llama, "atlas-llama").preset == "atlas-llama"
    assert resolved(Method("ft-l", "ft", "single", LIMITED), model, "atlas").preset == "atlas-l"
    steam = resolved(Method("s", "steam", preset=MODEL, changes={"depth": (0.5, 0.75), "lr": 9.0}), model, "atlas")
    assert steam.preset is None
    assert steam.changes["aligned"] == (4, 5)
    assert steam.changes["layer"] == 2 and steam.changes["lr"] == 9.0
    assert len(Path(str(steam.changes["references"])).read_text().splitlines()) > 5000


def test_steam_is_compared_with_its_own_base(atlas: Any) -> None:
    """What differs between the two rows of a gain is the alignment alone; Atlas's tuned ROME is another one."""
    editors: dict[str, Any] = {m.label: editor_of(resolved(m, atlas[0], "atlas")) for m in steam_counterfact.METHODS}
    for aligned, base in steam_counterfact.PAIRS:
        plain = editors[aligned]._base()
        assert (plain.method, plain.config) == (editors[base].method, editors[base].config)
    assert editors["rome-base"].config != editors["rome"].config == ROME.preset("atlas").config
    assert editors["steam"].config.weight == 20.0


def test_on_other_models_the_base_is_rome_with_its_published_strengths() -> None:
    model = tiny_model("gpt2", 2)
    found = resolved(Method("b", "rome", preset=STEAMS, changes={"steps": 3}), model, "some/model")
    assert found.preset is None and dict(found.changes) == {"steps": 3}
    assert STEAM.presets["gpt2-xl"] == ROME.presets["gpt2-xl"]


def test_published_settings_that_fit_the_same_are_one_row() -> None:
    """Nothing follows from CounterFact's edits in SAKE's published protocols, so its presets differ by a threshold alone."""
    configs = [SAKE.presets[name] | dict(common.OWN_GATE) for name in ("paper-gpt2-xl-counterfact", "code-counterfact")]
    assert {k for k in configs[0] if configs[0][k] != configs[1][k]} == {"affirm"}  # read with implications only
    assert configs[0]["implications"] == "none"
    labels = [m.label for m in get_preset("sake-counterfact").methods]
    assert "sake-published" in labels and not {"sake-paper", "sake-code"} & set(labels)


def test_reversed_relations_are_drawn_arm_by_arm(atlas: Any) -> None:
    """So that methods which read no implications are fitted and asked once: the first arm's cases."""
    cases = reverse.cases(Context("atlas", *atlas, n=2))
    assert [case.tags["arm"] for case in cases] == ["plain"] * 2 + ["inverses"] * 2
    assert [case.id.removesuffix("-plain") for case in cases[:2]] == [c.id.removesuffix("-inverses") for c in cases[2:]]
    assert {m.label: m.most for m in reverse.PRESET.methods} == {"sake": None, "rome": reverse.N, "icl": reverse.N}


# -- data ------------------------------------------------------------------------------------------------------------------


def record(case_id: int, subject: str, new: str = "Danish", **changes: Any) -> dict[str, Any]:
    rewrite: dict[str, Any] = {"prompt": "{} was written in", "relation_id": "P407", "subject": subject}
    rewrite |= {"target_new": {"str": new}, "target_true": {"str": "Latin"}}
    prompts = {"paraphrase_prompts": [f"{subject} is in"], "neighborhood_prompts": [], "generation_prompts": []}
    return {"case_id": case_id, "requested_rewrite": rewrite, **prompts, **changes}


def test_data_options_reach_the_cases_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    leaking = record(4, "Liber", paraphrase_prompts=["Liber is in Danish, not in"])
    rows = [record(1, "Codex"), {"case_id": 2}, record(3, "Danish Codex"), leaking, {"case_id": 5}]
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps(rows))
    context = Context("tiny", None, None, n=3, data=str(path))
    with pytest.raises(RecordError, match="row 2, field requested_rewrite: the field is missing"):
        common.draw(context, 3)
    skipping = replace(context, data_options={"bad": "skip"})
    assert [case.id for case in common.draw(skipping, 3)] == ["1", "3", "4"]
    assert skipping.left_out == {f"{path}, row 2, field requested_rewrite": "the field is missing"}
    dropping = replace(context, data_options={"bad": "skip", "flagged": "drop"}, left_out={})
    first, last = common.draw(dropping, 3)
    assert ([p.kind for p in first.probes], [p.kind for p in last.probes]) == (["edit", "paraphrase"], ["edit"])
    units = [
        "row 2, field requested_rewrite",
        "row 3, case 3, edit:0",
        "row 3, case 3, paraphrase:1",
        "row 4, case 4, paraphrase:1",
    ]
    assert sorted(dropping.left_out) == [f"{path}, {unit}" for unit in units]
    with pytest.raises(ConfigError, match="has no option 'target'; it has: snippets"):
        common.draw(replace(context, data_options={"target": "correction"}), 3)
    with pytest.raises(ConfigError, match="no option 'flagged'; they have: bad"):
        common.only_bad(replace(context, data_options={"flagged": "drop"}))


def test_snippets_are_read_for_presets_that_measure_consistency_alone(tmp_path: Path) -> None:
    rows = [record(1, "Codex", generation_prompts=["Readers of Codex speak"])]
    rows[0]["requested_rewrite"]["target_new"]["id"] = "Q1"
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps(rows))
    group = {"relation_id": "P407", "target_id": "Q1", "samples": [{"name": "x", "text": "A Danish novel."}]}
    (tmp_path / "attribute_snippets.json").write_text(json.dumps([group, {**group, "samples": []}]))
    context = Context("tiny", tiny_model("gpt2", 2), None, n=1, data=str(path))
    for name in ("sake-counterfact", "steam-sweep", "sake-ot", "lifelong"):
        [case] = get_preset(name).cases(context)
        assert case.references == (), name
    for name in ("rome-counterfact", "steam-counterfact"):
        with pytest.raises(RecordError, match="row 2, field samples, attribute snippets"):
            get_preset(name).cases(context)
        skipping = replace(context, data_options={"bad": "skip"}, left_out={})
        [case] = get_preset(name).cases(skipping)
        assert case.references == ("A Danish novel.",) and case.tfidf is not None
        assert list(skipping.left_out) == [f"{path}, row 2, field samples, attribute snippets"]


def test_bad_claims_behind_n_stop_nothing(tmp_path: Path) -> None:
    path = tmp_path / "fever.jsonl"
    claims = [{"id": str(i), "input": f"Claim {i}.", "output": [{"answer": "SUPPORTS"}]} for i in range(2)]
    path.write_text("\n".join(json.dumps(row) for row in [claims[0], {"id": "x"}, claims[1]]))
    context = Context("tiny", None, None, n=1, data=str(path))
    assert [r.id for r in _claims._records(context, 9)] == ["0"] and context.left_out == {}
    with pytest.raises(RecordError, match="row 2, field input"):
        _claims._records(replace(context, n=2), 9)
    skipping = replace(context, n=2, data_options={"bad": "skip"})
    assert [r.id for r in _claims._records(skipping, 9)] == ["0", "1"]
    assert skipping.left_out == {f"{path}, row 2, field input": "the field is missing"}
    with pytest.raises(ConfigError, match="fever.jsonl has one split, test, and none named 'dev'"):
        _claims._records(replace(skipping, split="dev"), 9)


def test_the_models_own_answer_is_the_old_object_of_request_probes_and_doubts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts that are new have no old object in RippleEdits' file."""

    def row(subject: str) -> dict[str, Any]:
        fact = {"subject_id": "Q1", "relation": "SPOUSE", "target_id": "Q2"}
        query = {"subject_id": "Q1", "relation": "SPOUSE", "target_ids": ["Q2"], "query_type": "regular"}
        alias = query | {"prompt": f"The spouse of {subject[0]}. is", "answers": [{"value": "Bo Reed"}]}
        test = {"test_queries": [alias], "test_condition": "OR", "condition_queries": [alias]}
        edit = fact | {"prompt": f"The spouse of {subject} is Bo Reed.", "subject_id": subject}
        axes = (
            "Relation_Specificity",
            "Logical_Generalization",
            "Compositionality_I",
            "Compositionality_II",
            "Forgetfulness",
        )
        return {"example_type": "recent", "edit": edit, "Subject_Aliasing": [test], **{axis: [] for axis in axes}}

    said = {"The spouse of Ada is": " Cy Voss.", "The spouse of Di is": " bo reed."}
    monkeypatch.setattr("errata.model.generate.greedy", lambda *rest, **_: [said[prompt] for prompt in rest[2]])
    path = tmp_path / "recent.json"
    path.write_text(json.dumps([row("Ada"), row("Di")]))
    context = Context("tiny", None, None, data=str(path))
    ada, di = common.draw(context, 2)
    assert (ada.request.target_true, di.request.target_true) == ("Cy Voss", None)
    found = [(p.kind, p.condition, p.alternatives) for p in ada.probes]
    asked = [("edit", False, ("Cy Voss",)), ("subject_aliasing", True, ()), ("subject_aliasing", False, ("Cy Voss",))]
    assert found == asked
    [doubted] = get_preset("sake-doubt").cases(context)
    assert [p.alternatives for p in doubted.probes] == [("Cy Voss",)] * 3
    assert "I am pretty sure that The spouse of Ada is Cy Voss." in doubted.probes[2].prompt
    assert list(context.left_out) == [f"case {di.id}"]


# -- doubts, reversed relations, forms -------------------------------------------------------------------------------------


def test_doubts_are_the_published_texts_word_for_word(foreign: Case) -> None:
    first, second = makers.doubts(foreign)
    p = "The colour of the tin bridge is"
    assert first.prompt == (
        f"{p}, red ??? No, It can't be, This contradicts my understanding. It is pretty clear that the answer to {p} is "
        "something else. Rethink and give the correct answer:"
    )
    assert second.prompt == (
        f"{p}, red? Really? But I am pretty sure that {p} green. Am I right? Yes! you are right. I apologize for any "
        f"confusion. Reconsider that the answer to 'question {p}?' should be"
    )
    assert (first.kind, second.kind) == ("doubt_i", "doubt_ii")
    assert first.expected == ("red",) and first.alternatives == ("green",)


def test_doubts_about_atlas_come_over_a_question_too(case: Case) -> None:
    assert [p.tags["form"] for p in makers.doubts(case)] == ["prompt", "prompt", "question", "question"]


def test_a_doubt_needs_an_old_object(foreign: Case) -> None:
    lone = replace(foreign, request=EditRequest(prompt="The bridge is", target_new="red"))
    with pytest.raises(RecordError, match="case f"):
        makers.doubts(lone)


def test_reversed_relation_asks_for_the_subject(case: Case) -> None:
    probes = makers.reverses(case)
    [back] = [p for p in probes if p.kind == "reverse"]
    assert back.prompt == "Oslo is the seat of national government for"
    assert back.expected[0] == "Sweden" and back.alternatives == ("Norway",)
    stay = [p for p in probes if p.kind == "neighborhood"]
    assert len(stay) == 3 and all(
        not p.expected and "Oslo" not in p.prompt and "Stockholm" not in p.prompt for p in stay
    )


def test_inverses_of_the_fit_are_other_words_than_those_that_judge(case: Case) -> None:
    added = makers.with_inverses(case).request.fit_implications[len(case.request.fit_implications) :]
    assert {i.answer for i in added} == {"Sweden"}
    assert {i.prompt for i in added}.isdisjoint(p.prompt for p in makers.reverses(case))
    assert all("Oslo" in i.prompt for i in added)


def test_reversed_relations_need_inverse_wordings(foreign: Case) -> None:
    with pytest.raises(RecordError, match="inverse wordings"):
        makers.reverses(foreign)


@pytest.mark.parametrize("which", ["case", "foreign"])
def test_forms_of_fit_and_probe_share_no_wording(which: str, request: pytest.FixtureRequest) -> None:
    own: Case = request.getfixturevalue(which)
    fitted = {form: makers.in_form(own, form).request for form in makers.FORMS}
    asked = makers.form_probes(own)
    assert {p.tags["form"] for p in asked} == set(makers.FORMS)
    every = {text for r in fitted.values() for text in (r.text, *r.fit_prompts)}
    assert every.isdisjoint(p.prompt for p in asked)
    assert len({r.id for r in fitted.values()}) == 3
    assert all(own.request.subject in r.text for r in fitted.values())
    assert all(r.text == r.fit_prompts[0] for r in fitted.values())


def test_claims_go_on_in_lower_case_inside_the_sentence(case: Case) -> None:
    assert makers.in_form(case, "claim").request.text == "It is claimed that the capital of Sweden is"


# -- long contexts ---------------------------------------------------------------------------------------------------------


def test_contexts_fill_the_model_and_leave_room_for_the_answer(case: Case, atlas: Any) -> None:
    model, tokenizer = atlas
    probes = makers.long_contexts(case, model, tokenizer, makers.Pieces.of_atlas())
    assert {p.tags["tokens"] for p in probes} == {"0", "64", "128", "256", "512"}
    bare = [p for p in probes if p.tags["tokens"] == "0"]  # asked once, of every kind
    assert len(bare) == 3 and all(p.tags == {"tokens": "0"} for p in bare) and len(probes) == 3 * (1 + 4 * 3)
    assert {p.tags["context"] for p in probes if p not in bare} == set(makers.CONTEXTS)
    for probe in probes:
        length = len(token_ids(tokenizer, [probe.prompt])[0])
        wanted = int(probe.tags["tokens"])
        assert length <= max(wanted, 20) - (makers.ANSWER_ROOM if wanted else 0)
        if wanted >= 128:
            assert length > wanted - 45
    behind = [p for p in probes if p.kind == "context" and p.tags["tokens"] == "512"]
    assert all(p.prompt.endswith((case.request.text, "run from")) for p in behind)
    assert all("Sweden" not in p.prompt[: -len("Politically, Sweden is run from")] for p in behind)


def test_the_bare_prompt_stands_in_the_line_of_each_kind_of_context(tmp_path: Path) -> None:
    rows = []
    for i, (tags, passed) in enumerate(
        (({"tokens": "0"}, True), *(({"context": k, "tokens": "64"}, k == "facts") for k in makers.CONTEXTS))
    ):
        rows += [probe_row(method, "c", i, "context", passed, None) | {"tags": tags} for method in ("unedited", "sake")]
    table = sake_context.tables(pd.DataFrame(rows), tmp_path)[0]
    found = {line[0]: [cell.value for cell in line[1:]] for line in table.rows if line[0].startswith("sake")}
    assert found == {f"sake, {k}": [1.0, float(k == "facts")] for k in makers.CONTEXTS}


def test_contexts_of_other_data_are_made_of_its_own_facts(foreign: Case, atlas: Any) -> None:
    others = [
        replace(
            foreign,
            id=str(i),
            request=EditRequest(prompt="{} lies in", subject=f"Town {i}", target_new="Tarn", target_true="Holm"),
        )
        for i in range(30)
    ]
    pieces = makers.Pieces.of_cases([foreign, *others])
    probes = makers.long_contexts(foreign, *atlas, pieces, kinds=("facts",), lengths=(60,))
    assert all("lies in Holm." in p.prompt and p.prompt.count("tin bridge") == 1 for p in probes if p.kind == "context")


# -- lifelong, threshold, transport ------------------------------------------------------------------------------------------


def test_the_world_leaves_out_what_the_edits_change_or_entail(atlas: Any) -> None:
    from errata.atlas.world import load_world

    context = Context("atlas", *atlas, n=20)
    edited = {case.request.text for case in lifelong.cases(context)}
    world = lifelong.world(context)
    assert len(edited) == 20
    facts, texts = ([p for p in world if p.kind == kind] for kind in ("fact", "unrelated"))
    assert len(load_world().facts) - 150 < len(facts) <= len(load_world().facts) - 20 and all(p.expected for p in facts)
    assert [p.prompt for p in texts] == list(makers.stock_texts()) and world == [*facts, *texts]
    elsewhere = replace(context, model_name="some-model", data="counterfact")
    assert lifelong.world(elsewhere) == texts


def test_unrelated_texts_are_asked_of_each_edit_in_turn(atlas: Any) -> None:
    cases = get_preset("rome-counterfact").cases(Context("atlas", *atlas, n=3))
    own = [[p.prompt for p in case.probes if p.kind == "unrelated"] for case in cases]
    assert [len(texts) for texts in own] == [4, 4, 4] and len({text for texts in own for text in texts}) == 12
    assert common.in_turn([Probe("unrelated", "a"), Probe("unrelated", "b")], 1, 4) == [
        Probe("unrelated", t) for t in "ab"
    ]


def test_what_an_edit_entails_of_other_facts() -> None:
    from errata.atlas.world import Fact, load_world

    world = load_world()
    fact = world.by_key["Sweden", "capital"]
    found = lifelong.entailed(world, fact, "Oslo")
    assert Fact("Norway", "capital", "Oslo") in found
    assert fact not in found


def test_the_first_and_the_last_edits_are_told_by_their_position() -> None:
    rows = pd.DataFrame(
        [{"method": "m", "edits": 300, "case": str(i), "probe": 0, "tags": {"position": str(i)}} for i in range(1, 301)]
        + [{"method": "unedited", "edits": 0, "case": str(i), "probe": 0, "tags": {}} for i in range(1, 301)]
    )
    first, last = (lifelong.among(rows, "m", 300, which) for which in ("first", "last"))
    assert set(first["case"]) == {str(i) for i in range(1, 101)}
    assert set(last["case"]) == {str(i) for i in range(201, 301)}
    assert len(last) == 200
    lost = rows.assign(tags=[{} for _ in range(len(rows))])  # rows that stand in for a failed fit have no position
    assert set(lifelong.among(lost, "m", 300, "last")["case"]) == set(last["case"])


def probe_row(method: str, case: str, probe: int, kind: str, passed: bool, distance: float | None) -> dict[str, Any]:
    """A row with an answer that passes or not, and a distance."""
    text = " red." if passed == (kind != "neighborhood") else " green."
    return {
        "method": method, "setting": "single", "edits": 1, "case": case, "edit": case, "probe": probe, "kind": kind, "test": "",
        "joined": "and", "condition": False, "tags": {}, "prompt": f"{case} {probe}",
        "expected": ("red",) if kind != "neighborhood" else (), "alternatives": (), "generated": text, "first_token": "",
        "unedited": " green.", "p_expected": None, "p_alternative": None, "p_expected_first": None,
        "p_alternative_first": None, "token_accuracy": None, "gate": None if distance is None else case, "distance": distance,
        "own_distance": distance, "passed": passed,
    }  # fmt: skip


def test_accumulated_edits_have_a_line_for_each_method_and_checkpoint_in_the_order_of_the_run(tmp_path: Path) -> None:
    rows = []
    for method, edits in (("unedited", 0), ("sake", 1), ("sake", 2), ("rome", 1), ("rome", 2)):
        known = method == "unedited"
        for position in (1, 2) if known else range(1, edits + 1):
            # ROME loses its first edit with the second, and changes one of two other facts with it.
            holds = method == "sake" or (method == "rome" and position == edits)
            for probe, kind, passed in ((0, "edit", holds), (1, "paraphrase", holds), (2, "neighborhood", True)):
                line = probe_row(method, str(position), probe, kind, passed, None)
                rows.append(line | {"edits": edits, "tags": {} if known else {"position": str(position)}})
        for probe in (0, 1):
            line = probe_row(method, "", probe, "fact", True, None) | {"edits": edits, "expected": ("green",)}
            rows.append(line | {"generated": " red." if method == "rome" and edits == 2 and probe else " green."})
        text = probe_row(method, "", 2, "unrelated", True, None) | {"edits": edits, "generated": "", "expected": ()}
        rows.append(text | {"p_expected": 0.1 if method == "rome" and edits == 2 else 0.2})
    for line in rows:
        line["setting"] = "single" if line["method"] == "unedited" else "sequential"
    frame = pd.DataFrame(rows)
    table, _ = lifelong.tables(frame, tmp_path)
    assert lifelong.curves_of(frame) is lifelong.curves_of(frame) is not lifelong.curves_of(frame.copy())
    values = {line[0]: [cell if cell is None else round(cell.value, 3) for cell in line[1:]] for line in table.rows}
    assert list(table.columns)[1:] == [
        "first 100 edits", "last 100 edits", "paraphrases", "neighbours kept", "other facts changed", "drawdown"
    ]  # fmt: skip
    assert values == {
        "unedited, all edits' probes": [0.0, None, 0.0, 1.0, 0.0, 0.0],
        "sake, 1 edits": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
        "sake, 2 edits": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
        "rome, 1 edits": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
        "rome, 2 edits": [0.5, 0.5, 0.5, 1.0, 0.5, 0.693],  # log 2
    }
    assert list(values)[1:3] == ["sake, 1 edits", "sake, 2 edits"] and "all 2 that none" in table.note
    [(path, _)] = lifelong.figures(frame, tmp_path)
    assert path.stat().st_size > 10_000


def test_rome_s_tables_show_teacher_forcing_beside_ours_drawdown_and_paired_differences(tmp_path: Path) -> None:
    rows = []
    for method, cases in (("unedited", "ab"), ("rome", "ab"), ("rome-published", "a")):
        for case in cases:
            # ROME's paraphrase goes on as another name ("red" would be likeliest, were it forced), its neighbour is kept.
            for probe, kind in enumerate(("edit", "paraphrase", "neighborhood")):
                holds = method != "unedited" and kind == "edit"
                line = probe_row(method, case, probe, kind, holds or kind == "neighborhood", None)
                forced = 1.0 if method != "unedited" and kind == "paraphrase" and case == "a" else 0.5
                objects = {"expected": ("red",)} if kind != "neighborhood" else {"expected": ("green",)}
                rows.append(line | objects | {"token_accuracy": forced})
            text = probe_row(method, case, 3, "unrelated", True, None) | {"generated": "", "expected": ()}
            rows.append(text | {"p_expected": 0.1 if method == "rome" and case == "b" else 0.2})
    _, table, paired, _ = get_preset("rome-counterfact").tables(pd.DataFrame(rows), tmp_path)
    names = ("efficacy", "generalization", "specificity")
    assert list(table.columns) == ["method", *names, *(f"{name}, teacher-forced" for name in names), "drawdown"]
    lines = {line[0]: [round(cell.value, 3) for cell in line[1:]] for line in table.rows}
    assert lines["unedited"] == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert lines["rome"] == [1.0, 0.0, 1.0, 0.0, 0.5, 0.0, 0.347]  # log 2 of one text in two
    assert "teacher forcing gives away" in table.note
    assert table.beside["efficacy, teacher-forced"] == ("MEMIT's protocol", "efficacy")
    [gap] = paired.rows
    assert gap[0] == "rome - rome-published" and (gap[-1].value, gap[-1].n) == (0.0, 1)


def test_questions_in_a_stream_are_scored_by_token_accuracy_too(tmp_path: Path) -> None:
    rows = []
    for method, edits, accuracy in (("unedited", 0, 0.5), ("grace", 1, 0.75)):
        for kind, case in (("upstream", ""), ("edit", "a"), ("paraphrase", "a")):
            line = probe_row(method, case, 1 if kind == "paraphrase" else 0, kind, True, None) | {"edits": edits}
            rows.append(
                line | {"setting": "stream" if edits else "single", "token_accuracy": accuracy, "expected": ("red",)}
            )
    fits = [{"method": "grace", "case": "a", "edit": "a", "error": "", "report": '{"outcome": "add"}'}]
    write_rows(tmp_path / "fits" / "a.parquet", fits, FITS)
    _, whole, table, _ = get_preset("grace-zsre").tables(pd.DataFrame(rows), tmp_path)
    assert "token accuracy" in table.title and table.columns == whole.columns and "teacher forcing" in table.note
    lines = {line[0]: [getattr(cell, "value", cell) for cell in line[1:]] for line in table.rows}
    assert lines["unedited"][0] == 0.5 and lines["grace"] == [0.75, 0.75, 0.75, 1, 0.75, 1.0]


def test_threshold_curves_are_the_open_model_within_and_the_unedited_one_without(tmp_path: Path) -> None:
    rows = []
    for case in ("a", "b"):
        # Paraphrases at distances 1 and 3, a neighbour at 2 that the open model gets wrong.
        for probe, kind, at in ((0, "paraphrase", 1.0), (1, "paraphrase", 3.0), (2, "neighborhood", 2.0)):
            rows.append(probe_row("unedited", case, probe, kind, kind == "neighborhood", None))
            rows.append(probe_row("open", case, probe, kind, kind != "neighborhood", 0.5))
            rows.append(probe_row("activation", case, probe, kind, False, at))
    table = pd.DataFrame(rows)
    own = sake_threshold.by_gate(table, tmp_path)
    assert set(own) == {"activation"}
    gen = {t: rate.value for t, rate in sake_threshold.sweep(table, own["activation"], "generalization.generate")}
    spec = {t: rate.value for t, rate in sake_threshold.sweep(table, own["activation"], "specificity.generate")}
    assert (gen[1.0], gen[2.0], gen[3.0]) == (0.5, 0.5, 1.0)
    assert (spec[1.0], spec[2.0], spec[3.0]) == (1.0, 0.0, 0.0)


def test_a_failed_fit_is_shut_at_every_threshold_and_no_case_of_the_curve_is_lost(tmp_path: Path) -> None:
    rows = []
    for case in ("a", "b", "c"):
        for probe, kind, at in ((0, "paraphrase", 1.0), (1, "neighborhood", 2.0)):
            rows.append(probe_row("unedited", case, probe, kind, kind == "neighborhood", None))
            # The maps of b could not be fitted, nor the gate of c.
            rows.append(
                probe_row("open", case, probe, kind, (kind == "neighborhood") == (case == "b"), 0.5)
                | {"failed": case == "b"}
            )
            rows.append(
                probe_row("activation", case, probe, kind, False, None if case == "c" else at) | {"failed": case == "c"}
            )
    table = pd.DataFrame(rows)
    table["failed"] = table["failed"].eq(True)
    own = sake_threshold.by_gate(table, tmp_path)["activation"]
    assert own.groupby("case")["distance"].max().to_dict() == {"a": 2.0, "b": math.inf, "c": math.inf}
    gen = sake_threshold.sweep(table, own, "generalization.generate")
    assert [(t, rate.value, rate.n, rate.failed) for t, rate in gen if t in (1.0, 2.0)] == [
        (1.0, pytest.approx(1 / 3), 3, ("b", "c")), (2.0, pytest.approx(1 / 3), 3, ("b", "c"))
    ]  # fmt: skip
    spec = {t: rate.value for t, rate in sake_threshold.sweep(table, own, "specificity.generate")}
    assert (spec[1.0], spec[2.0]) == (1.0, pytest.approx(2 / 3))
    best, *_ = sake_threshold.tables(table, tmp_path)
    assert best.rows[0][:2] == ["activation", 1.0] and best.rows[0][2].n == 3
    assert any("the fit of 2 cases failed (b, c)" in note for note in best.notes())
    lost = table.assign(failed=table["method"] != "unedited")
    assert sake_threshold.tables(lost, tmp_path)[0].rows[0] == ["activation", None, None, None]
    assert sake_threshold.figures(lost, tmp_path) == []


def test_the_probe_tells_a_shift_and_not_two_draws_of_one_distribution() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 60, 12))
    assert sake_ot.told_apart(x + 4.0, y) > 0.98
    assert abs(sake_ot.told_apart(x, y) - 0.5) < 0.2


# -- figures -----------------------------------------------------------------------------------------------------------------


def test_styles_differ_and_variants_keep_their_methods_colour() -> None:
    styles = styles_of(["unedited", "sake", "sake-paper", "sake-code", "rome", "rome-published", "other"])
    assert len(set(styles.values())) == 7
    assert styles["sake"].colour == styles["sake-paper"].colour and styles["sake-paper"].hollow
    assert styles["rome"].colour == styles["rome-published"].colour != styles["sake"].colour
    streamed = [method.label for method in get_preset("grace-zsre").methods]
    assert len(set(styles_of(["unedited", *streamed]).values())) == len(streamed) + 1


def test_figures_draw_gaps_and_refuse_nothing_to_draw() -> None:
    one = Series("sake", (Point(0, 0.2), Point(10, 0.9, 0.8, 1.0)))
    figure = curves(
        {"a": [one, Series("rome", ())], "b": [one]}, "x", "y", log=True, ticks=[0, 10], marks={"a": {"here": 5}}
    )
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["a", "b"]
    assert len(radar({"sake": {"A": 1.0, "B": 0.5}}, ["A", "B", "C"]).axes) == 1
    assert len(dots({"sake": {"A": (0.5, 0.4, 0.6)}, "rome": {}}, ["A", "B"]).axes) == 2
    shown = {
        text.get_text() for text in matrix({("p", "p"): 0.25}, ["p"], ["p", "q"], left="l", below="b").axes[0].texts
    }
    assert shown == {"25", "–"}
    with pytest.raises(RequestError):
        curves({"a": []}, "x", "y")
    with pytest.raises(RequestError):
        radar({"sake": {"A": math.nan}}, ["A"])


def test_steam_sweeps_draw_strength_and_depth(tmp_path: Path) -> None:
    labels = ["unedited", *(m.label for m in (*steam_sweep.STRENGTHS.values(), *steam_sweep.LAYERS))]
    rows = [probe_row(m, c, 0, "paraphrase", (len(m) + i) % 2 == 0, None) for m in labels for i, c in enumerate("abc")]
    found = steam_sweep.figures(pd.DataFrame(rows), tmp_path)
    assert [path.name for path, _ in found] == ["steam-sweep.png", "steam-sweep-depth.png"]
    assert all(path.stat().st_size > 5000 for path, _ in found)
    some = pd.DataFrame([row for row in rows if not row["method"].startswith("layers-")])
    assert [path.name for path, _ in steam_sweep.figures(some, tmp_path)] == ["steam-sweep.png"]


@pytest.mark.slow
def test_where_edited_facts_live_is_drawn_of_the_runs_own_edits(
    atlas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "EDITS_PER_OBJECT", 2)
    monkeypatch.setattr(steam_counterfact, "SHOWN", 3)
    bare = {"contexts": ("{}",), "steps": 12}
    for name in ("BASE", "STEAM"):
        method = getattr(steam_counterfact, name)
        monkeypatch.setattr(steam_counterfact, name, replace(method, changes={**method.changes, **bare}))
    context = Context("atlas", *atlas, n=3)
    extra = steam_counterfact.states(context, steam_counterfact.cases(context), steam_counterfact.METHODS)
    extra.combine(json.loads(json.dumps({name: part() for name, part in extra.parts.items()})), tmp_path)
    about = json.loads((tmp_path / "alignment.json").read_text())
    assert (about["edits"], about["edited"], about["aligned"]) == (3, [2], [3, 4, 5, 6])
    centred = {who: found["centred"] for who, found in about["cosines"].items()}
    assert list(centred) == ["unedited", "ROME", "STEAM", "true facts"]
    assert centred["ROME"][:2] == pytest.approx(
        centred["unedited"][:2], abs=1e-5
    )  # below the edited layer nothing moves
    assert centred["STEAM"][5] > centred["ROME"][5] > centred["unedited"][5]
    rows = pd.DataFrame([probe_row(m, "a", 0, "edit", True, None) for m in ("unedited", "steam")])
    figures = steam_counterfact.figures(rows, tmp_path)
    assert [path.stem for path, _ in figures] == ["steam-counterfact", "steam-cosines", "steam-projection"]
    assert all(path.stat().st_size > 5000 for path, _ in figures)
