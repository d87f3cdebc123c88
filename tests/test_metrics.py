"""Metrics: each against numbers worked out by hand; the golden rows; tables in every form."""

import json
import re
from io import StringIO
from math import log, log2, sqrt
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from errata.bench import judges
from errata.bench.cases import STAY
from errata.bench.fluency import TfIdf
from errata.bench.glossary import TERMS, term
from errata.bench.intervals import Rate, wilson
from errata.bench.metrics import KEPT, METRICS, by_tag, difference, score
from errata.bench.published import PUBLISHED
from errata.bench.queries import at_threshold, own_gate, select
from errata.bench.rows import FITS, SCHEMA, read_fits, read_rows, results, write_rows
from errata.bench.tables import Table, difference_table, first_minus_others, metric_table, paper_table, speed_table
from errata.errors import ConfigError, RecordError, ShapeError

GOLDEN = Path(__file__).parent / "golden"
LISTS = {"expected", "alternatives"}


def frame(*lines: dict[str, Any]) -> pd.DataFrame:
    """Rows as `read_rows` gives them. Each line has what matters; `case` and `kind` at least."""
    usual = {
        "setting": "single",
        "edits": 1,
        "joined": "and",
        "condition": False,
        "test": "",
        "generated": "",
        "prompt": "P",
    }
    full = []
    for one in lines:
        one = usual | {"method": "m", "probe": 0, "tags": {}, "edit": f"e{one['case']}"} | one
        full.append({n: tuple(one.get(n, ())) if n in LISTS else one.get(n) for n in (*SCHEMA.names, *one)})
    made = pd.DataFrame(full)
    numbers = [f.name for f in SCHEMA if str(f.type) == "double"]
    return made.astype(dict.fromkeys(numbers, float))


def value(rows: pd.DataFrame, metric: str, method: str = "m", **options: Any) -> float:
    found = score(rows, metric, method, **options)
    assert found is not None
    assert found.low <= found.value + 1e-12 and found.value <= found.high + 1e-12
    return found.value


def base(line: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return line | {"method": "unedited", "edits": 0} | changes


# -- answers -------------------------------------------------------------------------------------------------------------


def answered(generated: str, first_token: str | None = "", **more: Any) -> dict[str, Any]:
    return {
        "case": "1",
        "kind": "edit",
        "expected": ["New York", "NYC"],
        "generated": generated,
        "first_token": first_token,
    } | more


@pytest.mark.parametrize(
    ("protocol", "line", "expected"),
    [
        ("generate", answered(" New York, of course"), 1.0),
        ("generate", answered(" NYC."), 1.0),  # under any of its names
        ("generate", answered(" New York Mets"), 0.0),  # the object goes on
        ("first_token_prefix", answered(" Nome", " N"), 1.0),  # one letter is a match: the published fault
        ("first_token_prefix", answered(" ", " "), 0.0),  # an empty token is none
        ("first_token_prefix", answered(" York", " York"), 0.0),
        ("sake_code", answered(" Nome", " N"), 1.0),
        ("sake_code", answered(" ", " "), 0.0),
        ("sake_code_ripple", answered(" ", " "), 1.0),  # on RippleEdits an empty token is a match: a fault of its own
        ("sake_code_ripple", answered(" Nome", " N"), 1.0),
        ("sake_code_ripple", answered(" York", " York"), 0.0),
        ("sake_code_ripple", answered(" ", None), 0.0),  # no token was read
        ("free_fixed_len", answered(" New York Mets"), 1.0),  # whatever follows
        ("free_fixed_len", answered(" the New York"), 0.0),
        ("free_natural", answered(" the new york. And"), 1.0),  # case and articles apart
        ("free_natural", answered(" New York Mets."), 0.0),
        # "new york mets" against "new york": 2 words in common, 2*2/(3+2)
        ("f1", answered(" New York Mets."), 0.8),
        ("f1", answered(" Boston."), 0.0),
        # GRACE's: {Boston, </s>} against {New, York, </s>}: one in common, 2*1/(2+3); a wrong word scores above 0
        ("f1_set", answered(" Boston."), 0.4),
        ("teacher_forced_token", answered("", token_accuracy=0.5), 0.5),
        ("teacher_forced_exact", answered("", token_accuracy=0.5), 0.0),
        ("teacher_forced_exact", answered("", token_accuracy=1.0), 1.0),
        ("prob", answered("", p_expected=0.3, p_alternative=0.2), 1.0),
        ("prob", answered("", p_expected=0.3, p_alternative=0.3), 0.0),  # a tie fails
    ],
)  # fmt: skip
def test_protocols_of_one_answer(protocol: str, line: dict[str, Any], expected: float) -> None:
    assert value(frame(line, base(line)), f"efficacy.{protocol}") == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["doubt_i", "doubt_ii"])
def test_doubts_by_one_token(kind: str) -> None:
    """SAKE's code: case 1 has one match of two, case 2 one of one; whole objects are said by neither but the last."""
    lines = [
        answered(" Nome.", " N", kind=kind),
        answered(" Boston.", " B", kind=kind, probe=1),
        answered(" NYC.", " NYC", kind=kind, case="2"),
    ]
    rows = frame(*lines, *map(base, lines))
    assert value(rows, f"{kind}.first_token_prefix") == pytest.approx((1 / 2 + 1) / 2)
    assert value(rows, f"{kind}.generate") == pytest.approx((0 + 1) / 2)


def test_what_the_model_was_made_for() -> None:
    """Probes of the whole run: each is a case of its own."""
    lines = [
        answered(text, text[:2], kind="upstream", case="", probe=i, token_accuracy=share)
        for i, (text, share) in enumerate(((" New York.", 1.0), (" New York Mets.", 1.0), (" Boston.", 0.5)))
    ]
    rows = frame(*lines, *map(base, lines))
    assert value(rows, "upstream.generate") == pytest.approx(1 / 3)
    assert value(rows, "upstream.first_token_prefix") == pytest.approx(2 / 3)
    assert value(rows, "upstream.f1") == pytest.approx((1 + 0.8 + 0) / 3)
    # {New, York, </s>} on both sides, 2*3/6; against {New, York, Mets, </s>} 2*3/7; the end alone against {Boston, </s>} 2*1/5
    assert value(rows, "upstream.f1_set") == pytest.approx((1 + 6 / 7 + 2 / 5) / 3)
    assert value(rows, "upstream.free_natural") == pytest.approx(1 / 3)
    assert value(rows, "upstream.teacher_forced_token") == pytest.approx(2.5 / 3)
    assert value(rows, "upstream.teacher_forced_exact") == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["reverse", "claim"])
def test_the_share_of_conditions_that_hold(kind: str) -> None:
    def test(case: str, name: str, known: bool) -> list[dict[str, Any]]:
        line = answered(" NYC.", kind=kind, case=case, test=name, probe=int(name))
        asks = base(line, condition=True, probe=int(name) + 10, generated=" NYC." if known else " Boston.")
        return [line, base(line, generated=" Boston.", unedited=" Boston."), asks]

    free = answered(" NYC.", kind=kind, case="3", probe=3)  # a test without a condition
    rows = frame(*test("1", "1", True), *test("1", "2", False), *test("2", "1", True), free, base(free))
    assert value(rows, f"{kind}_condition.generate") == pytest.approx((1 / 2 + 1) / 2)
    assert value(rows, f"{kind}.generate") == 1.0


def test_grace_f1_scores_a_wrong_word_a_half() -> None:
    line = answered(" Bergen.", expected=["Oslo"])
    assert (
        value(frame(line, base(line)), "efficacy.f1_set") == 0.5 and value(frame(line, base(line)), "efficacy.f1") == 0
    )


@pytest.mark.parametrize("kind", ["paraphrase", "portability", "reverse", "doubt_i", "doubt_ii", "context", "claim"])
def test_kinds_of_answers_are_means_over_cases(kind: str) -> None:
    name = {"paraphrase": "generalization"}.get(kind, kind)
    lines = [
        {"case": "1", "kind": kind, "probe": p, "expected": ["A"], "generated": g}
        for p, g in enumerate((" A.", " B.", " B"))
    ]
    lines.append({"case": "2", "kind": kind, "expected": ["A"], "generated": " A"})
    # (1/3 + 1) / 2; pooled it would be 2/4
    assert value(frame(*lines, *map(base, lines)), f"{name}.generate") == pytest.approx(2 / 3)


# -- CounterFact ---------------------------------------------------------------------------------------------------------


def golden() -> pd.DataFrame:
    """Two invented edits in the form that runs have, small enough to reckon by hand; `test_golden` has a real run."""
    lines = [json.loads(text) for text in (GOLDEN / "rows.jsonl").read_text().splitlines()]
    return frame(*lines)


BY_HAND = {  # (unedited, sake), reasoned from tests/golden/rows.jsonl
    "efficacy.prob": (0.0, 0.5),  # sake: .9 > .05, .3 < .5
    "efficacy_magnitude.prob": (-0.64, 0.325),  # (-.5 - .78)/2; (.85 - .2)/2
    "generalization.prob": (0.0, 1.0),  # .5 > .2, .7 > .1
    "generalization_magnitude.prob": (-0.54, 0.45),  # (-.4 - .68)/2; (.3 + .6)/2
    "specificity.prob": (0.5, 0.5),  # the second neighbour prefers the new object before and after
    "specificity_magnitude.prob": (0.175, -0.1),  # (.55 - .2)/2; (.55 - .75)/2
    "score.prob": (0.0, 0.6),  # 3 / (2 + 1 + 2); 0 because ES is 0
    "efficacy.generate": (0.0, 0.5),  # "Varde." and "Lisbon."
    "efficacy.sake_code": (0.0, 1.0),  # " L" begins "Lund"
    "generalization.generate": (0.0, 0.5),  # "Varde Hill." is not Varde
    "generalization.sake_code": (0.0, 1.0),
    "specificity.generate": (1.0, 1.0),  # both neighbours answer as before
    "specificity.sake_code": (1.0, 1.0),  # the second is dropped: .4 > .1 in the unedited model
    "specificity.gate": (None, 0.5),  # closed for the first alone
    "specificity.teacher_forced_exact": (0.5, 0.5),
    "score.generate": (0.0, 0.6),  # 3 / (2 + 2 + 1)
    "generalization.gate": (None, 1.0),
    "compositionality_i.generate": (0.0, 1.0),
    "compositionality_i_condition.generate": (1.0, 1.0),
    "compositionality_i.sake_code": (None, 1.0),  # the unedited model's edit does not succeed: no test is counted
    "compositionality_i.ripple": (None, 1.0),
}


@pytest.mark.parametrize("metric", BY_HAND)
def test_the_golden_run_by_hand(metric: str) -> None:
    for method, expected in zip(("unedited", "sake"), BY_HAND[metric], strict=True):
        found = score(golden(), metric, method)
        assert (found and found.value) == (None if expected is None else pytest.approx(expected)), method


def test_the_golden_tables(tmp_path: Path) -> None:
    """tests/golden/tables.md, checked by hand once, comes again from the rows through Parquet."""
    lines = [json.loads(text) for text in (GOLDEN / "rows.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "units" / "a.parquet", lines)
    write_rows(tmp_path / "fits" / "a.parquet", [
        {"method": "sake", "case": "1", "seconds": 0.5, "nbytes": 1000, "error": ""},
        {"method": "sake", "case": "2", "seconds": 1.5, "nbytes": 3000, "error": ""},
    ], FITS)  # fmt: skip
    rows, pace = (
        results(tmp_path),
        {"tokens_per_second": 90.0, "tokens_per_second_unedited": 120.0, "edits_while_timed": 2},
    )
    tables = [
        paper_table(rows, "CounterFact as ROME measures it", "ROME", ["S", "ES", "EM", "PS", "PM", "NS", "NM"],
                    preset="rome-counterfact", others=False),
        paper_table(rows, "CounterFact as SAKE measures it", "SAKE", ["Acc", "Gen", "Spec", "CI"],
                    preset="sake-counterfact"),
        difference_table(rows, "Differences", {"ES": "efficacy.prob"}, [("sake", "unedited")]),
        speed_table(read_fits(tmp_path), {"methods": {"sake": pace}}),
    ]  # fmt: skip
    made = "\n".join(table.markdown() for table in tables)
    assert made == (GOLDEN / "tables.md").read_text(), made


# -- tests, conditions, edits that succeed -------------------------------------------------------------------------------


def ripple(case: str, probe: int, test: str, generated: str, before: str = " no.", **more: Any) -> list[dict[str, Any]]:
    line = {
        "case": case, "probe": probe, "kind": "compositionality_ii", "test": test, "expected": ["Lisk"], "generated": generated,
        "unedited": before, "first_token": generated[:3],
    } | more  # fmt: skip
    return [line, base(line, generated=before, first_token=before[:3])]


def test_and_or_conditions_and_strata() -> None:
    held = {"condition": True, "method": "unedited", "edits": 0}
    lines = [
        *ripple("1", 1, "a", " Lisk.", tags={"hops": "2"}),  # "and": one of two right
        *ripple("1", 2, "a", " Mure.", tags={"hops": "2"}),
        *ripple("1", 3, "b", " Lisk.", joined="or", tags={"hops": "3"}),  # "or": one of two right
        *ripple("1", 4, "b", " Mure.", joined="or", tags={"hops": "3"}),
        *ripple("1", 5, "c", " Lisk.", tags={"hops": "3"}),  # right, but its condition fails
        ripple("1", 6, "c", " Osk.", **held)[0],
        *ripple("2", 1, "a", " Lisk.", before=" Lisk.", tags={"hops": "2"}),  # right before as well; condition holds
        ripple("2", 2, "a", " Lisk.", **held)[0],
    ]
    rows = frame(*lines)
    # case 1: tests a 0, b 1 (c is not run): 1/2; case 2: 1
    assert value(rows, "compositionality_ii.generate") == pytest.approx(0.75)
    # conditions: c fails, case 2's holds; tests without are not counted
    assert value(rows, "compositionality_ii_condition.generate") == 0.5
    assert value(rows, "compositionality_ii.generate_open") == 0.5  # case 2 passed before
    strata = by_tag(rows, "compositionality_ii.generate", "m", "hops")
    assert {k: (r.value, r.n) for k, r in strata.items()} == {"2": (0.5, 2), "3": (1.0, 1)}
    assert value(rows, "compositionality_ii.generate", stratum=("hops", lambda v: int(v) > 2)) == 1.0
    assert select(rows, "m")["condition"].sum() == 2


def test_published_ripple_leaves_out_edits_that_fail_and_reads_the_prompt() -> None:
    edits = [
        {"case": "1", "kind": "edit", "expected": ["Varde"], "generated": " Varde.", "p_expected_first": 0.6},
        {"case": "2", "kind": "edit", "expected": ["Varde"], "generated": " Osso.", "p_expected_first": 0.1},
    ]
    lines = [line | {"p_alternative_first": 0.3} for line in edits]
    lines += [
        *ripple("1", 1, "a", " Mure.", prompt="Not the Lisk but"),  # right by the prompt alone
        *ripple("1", 2, "b", " Mure."),
        *ripple("2", 1, "a", " Lisk."),  # the edit failed
    ]
    rows = frame(*lines, *map(base, lines[:2]))
    assert value(rows, "compositionality_ii.ripple") == 0.5
    assert value(rows, "compositionality_ii.generate_succeeded") == 0.0
    assert value(rows, "compositionality_ii.generate") == 0.5  # of both cases
    assert value(rows, "compositionality_ii.sake_code") == 0.0
    with pytest.raises(RecordError, match="needs rows of kind 'edit'"):
        score(rows[rows["kind"] != "edit"], "compositionality_ii.ripple", "m")


def test_a_question_with_several_answers() -> None:
    """By ours any of them will do; the published runner wants all of them, SAKE's code looks at the first."""
    answers: dict[str, Any] = {
        "expected": ["Lisk", "River Lisk", "Mure"],
        "answers": (("Lisk", "River Lisk"), ("Mure",)),
    }
    edit = {
        "kind": "edit",
        "expected": ["Varde"],
        "generated": " Varde.",
        "p_expected_first": 0.6,
        "p_alternative_first": 0.1,
    }
    lines: list[dict[str, Any]] = []
    for case, text in (("1", " Mure and the River Lisk."), ("2", " Mure."), ("3", " Lisk.")):
        lines += [*ripple(case, 1, "a", text, **answers), edit | {"case": case}, base(edit | {"case": case})]
    rows = frame(*lines)
    assert value(rows, "compositionality_ii.generate") == pytest.approx(2 / 3)
    assert value(rows, "compositionality_ii.ripple") == pytest.approx(1 / 3)
    assert value(rows, "compositionality_ii.sake_code") == pytest.approx(1 / 3)
    asks = [base(one, condition=True, probe=5) for one in lines if one["kind"] != "edit" and "method" not in one]
    held = frame(*lines, *asks)  # "Mure." names not every answer, and " Mu" begins the second alone
    found = score(held, "compositionality_ii.ripple", "m")
    assert found and (found.value, found.n) == (1.0, 1)
    found = score(held, "compositionality_ii.sake_code", "m")
    assert found and (found.value, found.n) == (1.0, 1)


def test_aliases_are_counted_where_the_unedited_model_knows_the_old_object() -> None:
    def alias(case: str, before: str, after: str, gate: str, open_token: str) -> list[dict[str, Any]]:
        line = {
            "case": case, "kind": "subject_aliasing", "probe": 1, "test": "t", "prompt": "Alias", "expected": ["Varde"],
            "alternatives": ["Osso"], "generated": after, "unedited": before, "first_token": after[:4], "gate": gate,
        }  # fmt: skip
        edit = {"case": case, "kind": "edit", "expected": ["Varde"], "generated": " Varde", "p_expected_first": 0.6,
                "p_alternative_first": 0.1}  # fmt: skip
        asks = base(line, generated=before, condition=True, probe=2, gate=None)  # published: the test's own question
        return [line, base(line, generated=before, gate=None), asks, line | {"method": "open", "first_token": open_token},
                edit, edit | {"method": "open"}, base(edit)]  # fmt: skip

    rows = frame(
        *alias("1", " Osso.", " Varde.", "e1", " Var"),
        *alias("2", " Osso.", " Osso.", "", " Var"),
        *alias("3", " Mure.", " Varde.", "e3", " Mur"),
        *alias("4", " Osso.", " Osso.", "", " Oss"),
    )
    assert value(rows, "subject_aliasing.generate") == pytest.approx(1 / 3)  # case 3's alias was not known
    assert value(rows, "subject_aliasing_condition.generate") == 0.75
    assert score(rows, "subject_aliasing.ripple", "m") is None  # no unedited model says the new object
    # the circle: of aliases right with an open gate (1 and 2), the share for which the gate opens
    assert value(rows, "subject_aliasing.sake_code", ungated="open") == 0.5
    assert value(rows, "subject_aliasing.gate") == 0.5
    with pytest.raises(RecordError, match="gate always open"):
        score(rows, "subject_aliasing.sake_code", "m")
    assert metric_table(rows, "T", {"SA": "subject_aliasing.sake_code"}, ["m"]).rows[1][1] is None
    assert (
        metric_table(rows, "T", {"SA": "subject_aliasing.sake_code"}, ["m"], ungated={"m": "open"}).rows[1][1].value
        == 0.5
    )


def test_relation_specificity_of_the_code_takes_a_closed_gate_for_a_success() -> None:
    lines = []
    for case, gate, generated in (("1", "", " wrong."), ("2", "e2", " wrong."), ("3", "e3", " Lisk.")):
        line = {"case": case, "kind": "relation_specificity", "expected": ["Lisk"], "generated": generated, "gate": gate,
                "first_token": generated[:4], "own_distance": float(case)}  # fmt: skip
        edit = {
            "case": case,
            "kind": "edit",
            "probe": 9,
            "expected": ["V"],
            "p_expected_first": 0.6,
            "p_alternative_first": 0.1,
        }
        lines += [line, edit, base(line, generated=" Lisk."), base(edit)]
    rows = frame(*lines)
    assert value(rows, "relation_specificity.generate") == pytest.approx(1 / 3)
    assert value(rows, "relation_specificity.sake_code") == pytest.approx(2 / 3)
    assert value(rows, "relation_specificity.gate") == pytest.approx(1 / 3)
    # against the own centre with radius 1.5 alone: open for case 1 (wrong), closed for 2 and 3
    narrow = own_gate(rows, 1.5)
    assert value(narrow, "relation_specificity.sake_code") == pytest.approx(2 / 3)
    assert value(narrow, "relation_specificity.gate") == pytest.approx(2 / 3)
    assert value(own_gate(rows, {"e1": 0.5, "e2": 0.5, "e3": 9}), "relation_specificity.gate") == pytest.approx(2 / 3)


def test_the_code_s_specificities_test_each_gate_against_its_own_centre_alone() -> None:
    """Another edit's gate is open at case 1 and has changed its answer: published, that is no damage. Case 2's own is open."""
    lines = []
    for case, gate, far in (("1", "e9", 3.0), ("2", "", 1.0), ("3", "e3", None)):
        about = {
            "case": case,
            "gate": gate,
            "own_distance": far,
            "radius": 2.0,
            "first_token": " w",
            "generated": " wrong.",
        }
        near = about | {
            "kind": "neighborhood",
            "expected": ["Lisk"],
            "p_expected_first": 0.1,
            "p_alternative_first": 0.4,
        }
        other = about | {"kind": "relation_specificity", "probe": 1, "expected": ["Lisk"]}
        edit = {
            "case": case,
            "kind": "edit",
            "probe": 9,
            "p_expected_first": 0.6,
            "p_alternative_first": 0.1,
            "radius": 2.0,
        }
        knew = {"p_expected_first": 0.9, "p_alternative_first": 0.0, "generated": " Lisk.", "gate": None, "own_distance": None,
                "radius": None}  # fmt: skip
        lines += [near, other, edit, base(near, **knew), base(other, **knew), base(edit, radius=None)]
    rows = frame(*lines)
    assert value(rows, "specificity.gate") == pytest.approx(1 / 3)  # among all edits: closed for case 2 alone
    for metric in ("specificity.sake_code", "relation_specificity.sake_code"):
        # closed for case 1, open for 2, and for 3, of which no distance is known, as it was
        assert [value(rows[rows["case"] == case], metric) for case in "123"] == [1.0, 0.0, 0.0]
        assert [value(rows[rows["case"] == c].drop(columns="radius"), metric) for c in "123"] == [0.0, 1.0, 0.0]
    table = paper_table(rows, "T", "SAKE", ["Spec"], ["m"])
    assert table.rows[1][2].value == pytest.approx(1 / 3) and "edit's own centre" in table.note  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["compositionality_i", "logical_generalization", "forgetfulness"])
def test_the_other_axes_share_the_machinery(kind: str) -> None:
    right = {"case": "1", "kind": kind, "test": "t", "expected": ["Lisk"], "generated": " Lisk."}
    wrong = right | {"case": "2", "generated": " Mure."}
    assert value(frame(right, wrong, base(right), base(wrong)), f"{kind}.generate") == 0.5


# -- portability, neighbours, collateral, texts --------------------------------------------------------------------------


def test_portability() -> None:
    def probe(
        case: str, index: int, generated: str, before: str, p: tuple[float, float | None], held: bool
    ) -> list[Any]:
        line = {"case": case, "kind": "portability", "probe": index, "test": f"t{index}", "expected": ["Lisk"],
                "generated": generated, "unedited": before, "p_expected": p[0], "p_alternative": p[1]}  # fmt: skip
        asks = base(line, probe=index + 10, condition=True, generated=" Lisk" if held else " ?")
        return [line, base(line, generated=before), asks]

    rows = frame(
        *probe("1", 0, " Lisk.", " no", (0.5, 0.1), True),
        *probe("1", 1, " no", " no", (0.2, 0.3), True),
        *probe("2", 0, " Lisk", " Lisk", (0.9, None), True),
        *probe("3", 0, " no", " no", (0.4, 0.2), False),
    )
    assert value(rows, "portability.generate") == pytest.approx((0.5 + 1 + 0) / 3)
    assert value(rows, "portability.generate_known") == pytest.approx((0.5 + 1) / 2)
    assert value(rows, "portability.generate_open") == 0.5  # case 2 needs no edit
    assert value(rows, "portability_condition.generate") == pytest.approx(2 / 3)
    assert value(rows, "portability.prob") == pytest.approx((0.5 + 1) / 2)  # case 2's answer before is unknown
    assert value(rows, "portability_magnitude.prob") == pytest.approx(((0.4 - 0.1) / 2 + 0.2) / 2)
    assert value(rows, "portability_target.prob") == pytest.approx((0.35 + 0.9 + 0.4) / 3)


@pytest.mark.parametrize(
    ("kind", "name"), [("other_relation", "other_relations"), ("attribute", "attribute"), ("locality", "locality")]
)
def test_what_should_stay(kind: str, name: str) -> None:
    lines = [
        {"case": "1", "kind": kind, "generated": " Osso, a town", "unedited": " Osso, a town", "expected": ["Lund"], "gate": "",
         "token_accuracy": 0.25},
        {"case": "2", "kind": kind, "generated": " Lund.", "unedited": " Osso.", "expected": ["Lund"], "gate": "e1",
         "token_accuracy": 1.0},
    ]  # fmt: skip
    rows = frame(*lines, *(base(line, generated=line["unedited"]) for line in lines))
    assert value(rows, f"{name}.generate") == 0.5 and value(rows, f"{name}.gate") == 0.5
    if kind == "locality":  # zsRE's: against the gold answer
        assert value(rows, "locality.teacher_forced_token") == pytest.approx(0.625)


def test_kinds_that_should_stay_are_those_whose_metrics_ask_for_it() -> None:
    assert set(STAY) == {*KEPT, "fact"}
    assert all(metric.judge is judges.kept for kind in KEPT for metric in (METRICS[f"{KEPT[kind][0]}.generate"],))


def test_collateral_and_drawdown_count_facts_and_texts() -> None:
    def fact(i: int, before: str, after: str) -> list[Any]:
        line = {"case": "", "edit": "", "kind": "fact", "probe": i, "expected": ["Osso"], "generated": after, "unedited": before,
                "gate": "" if before == after else "e7"}  # fmt: skip
        return [line, base(line, generated=before)]

    texts = []
    for i, (p, q) in enumerate(((0.2, 0.1), (0.3, 0.3))):
        line = {"case": "", "kind": "unrelated", "probe": 50 + i, "p_expected": q, "expected": ["text"]}
        texts += [line, base(line, p_expected=p)]
    rows = frame(*fact(0, " Osso.", " Osso."), *fact(1, " Osso.", " Lund."), *fact(2, " Tarn.", " Lund."),
                 *fact(3, " Tarn.", " Osso."), *texts)  # fmt: skip
    found = score(rows, "collateral.generate", "m")
    assert found and (found.value, found.n) == (0.75, 4)
    found = score(rows, "collateral_lost.generate", "m")
    assert found and (found.value, found.n) == (0.5, 2)  # of the two that the model knew
    assert value(rows, "collateral.gate") == 0.25
    assert value(rows, "drawdown.nll") == pytest.approx(log(2) / 2)
    assert METRICS["collateral.generate"].better == METRICS["drawdown.nll"].better == "lower"


def test_fluency_and_consistency() -> None:
    weights = TfIdf({"varde": 1.0, "river": 2.0, "osso": 1.0, "hill": 1.0})
    texts = (
        ("1", "a b a b", "varde river"),
        ("1", "varde varde varde", "varde river"),
        ("2", "osso hill", "osso hill"),
    )
    lines = [
        {"case": case, "kind": "generation", "probe": i, "generated": text, "references": (about,), "tfidf": weights}
        for i, (case, text, about) in enumerate(texts)
    ]
    rows = frame(*lines, *map(base, lines))
    # "a b a b": 2-grams ab, ba, ab: H2 = -(2/3 log 2/3 + 1/3 log 1/3); 3-grams aba, bab: H3 = 1. One gram, repeated or not: 0.
    h2 = -(2 / 3 * log2(2 / 3) + 1 / 3 * log2(1 / 3))
    assert value(rows, "fluency.entropy") == pytest.approx(100 * ((h2 / 3 + 2 / 3 + 0) / 2 + 0) / 2)
    # "varde" alone against (varde, river), which weigh 1 and 2: 1 / sqrt 5
    assert value(rows, "consistency.tfidf") == pytest.approx(100 * (1 / sqrt(5) + 1) / 2)
    alone = rows[rows["case"] == "1"]  # words weigh the same whatever other cases there are
    assert value(alone, "consistency.tfidf") == pytest.approx(100 / sqrt(5))
    assert score(rows.assign(tfidf=None), "consistency.tfidf", "m") is None
    for column in ("references", "tfidf"):
        with pytest.raises(RecordError, match="results"):
            score(rows.drop(columns=column), "consistency.tfidf", "m")


# -- thresholds, checkpoints, intervals ----------------------------------------------------------------------------------


def test_a_threshold_is_a_query() -> None:
    lines = [
        {
            "case": str(c),
            "kind": "paraphrase",
            "probe": p,
            "expected": ["A"],
            "generated": " A.",
            "gate": f"e{c}",
            "distance": d,
        }
        for c, p, d in ((1, 0, 1.0), (1, 1, 3.0), (2, 0, 2.0))
    ]
    rows = frame(*lines, *(base(line, generated=" B.", gate=None, distance=None) for line in lines))
    opened, plain = rows[rows["method"] == "m"], rows[rows["method"] == "unedited"]
    found = {}
    for t in (0.5, 1.0, 2.0, 3.0):
        swept = pd.concat([at_threshold(opened, plain, t), plain])
        found[t] = (value(swept, "generalization.generate"), value(swept, "generalization.gate"))
    assert found == {0.5: (0, 0), 1.0: (0.25, 0.25), 2.0: (0.75, 0.75), 3.0: (1, 1)}  # open up to and at t
    assert opened["generated"].tolist() == [" A."] * 3  # the rows themselves stay
    with pytest.raises(RecordError, match="no distance"):
        at_threshold(plain, plain, 1.0)
    with pytest.raises(RecordError, match="was not asked probe 1 of case '1'"):
        at_threshold(opened, plain[plain["probe"] == 0], 0.5)


def test_checkpoints_of_a_sequence() -> None:
    early = answered(" NYC", setting="sequential", edits=1)
    late = answered(" Osso", setting="sequential", edits=100)
    rows = frame(early, late, base(early, generated=" Osso", setting="single"))
    assert value(rows, "efficacy.generate", edits=1) == 1.0 and value(rows, "efficacy.generate") == 0.0
    with pytest.raises(RecordError, match="after 10 edits; there are 1, 100"):
        score(rows, "efficacy.generate", "m", edits=10)


def series(method: str, values: list[int]) -> list[dict[str, Any]]:
    return [answered(" NYC" if v else " no", case=str(i), method=method) for i, v in enumerate(values)]


def test_intervals() -> None:
    half, none = [1, 0] * 50, [0] * 100
    rows = frame(*series("half", half), *series("none", none), *series("few", [1, 0, 1]), *series("unedited", none))
    found = score(rows, "efficacy.generate", "half")
    # a mean of 100 fair coins: sd .05, 95 % about .402 to .598
    assert found and found.interval == "bootstrap over cases" and found.n == 100
    assert found.low == pytest.approx(0.40, abs=0.02) and found.high == pytest.approx(0.60, abs=0.02)
    assert found == score(rows, "efficacy.generate", "half") != score(rows, "efficacy.generate", "half", seed=1)
    at_zero = score(rows, "efficacy.generate", "none")
    # Wilson for 0 of 100: z^2 / (n + z^2) = 3.8415 / 103.8415
    assert at_zero and at_zero.interval == "Wilson over cases" and (at_zero.low, at_zero.value) == (0, 0)
    assert at_zero.high == pytest.approx(0.036994, abs=1e-5)
    few = score(rows, "efficacy.generate", "few")
    assert few and few.interval == "Wilson over cases" and (few.low, few.high) == pytest.approx(wilson(2 / 3, 3))


def test_differences_are_paired() -> None:
    a, b = [1, 1, 0, 0] * 25, [1, 0, 0, 0] * 25
    rows = frame(
        *series("a", a), *series("b", b), *series("c", a), *series("d", [1] * 100), *series("unedited", [0] * 100)
    )
    found = difference(rows, "efficacy.generate", "a", "b")
    # 25 of 100 cases differ, all one way: sd of the mean sqrt(.25 * .75 / 100) = .0433; unpaired it were .066
    assert found and found.value == 0.25 and found.unit == "difference"
    assert found.low == pytest.approx(0.25 - 0.085, abs=0.015) and found.high == pytest.approx(0.25 + 0.085, abs=0.015)
    same = difference(rows, "efficacy.generate", "a", "c")
    assert same and same.value == 0 and (same.low, same.high) == pytest.approx((-0.036994, 0.036994), abs=1e-5)
    all_of_them = difference(rows, "efficacy.generate", "d", "unedited")
    assert all_of_them and all_of_them.value == 1 and all_of_them.low == pytest.approx(1 - 0.036994, abs=1e-5)
    with pytest.raises(RecordError, match="not asked the same cases"):
        difference(rows[(rows["method"] != "b") | (rows["case"] != "7")], "efficacy.generate", "a", "b")


def test_the_first_method_is_compared_with_each_other_over_the_cases_that_both_were_given() -> None:
    # b has the first two cases only: 1 - 1/2 over two, not 3/4 - 1/2
    rows = frame(
        *series("a", [1, 1, 1, 0]), *series("b", [1, 0]), *series("c", [1, 1, 0, 0]), *series("unedited", [0] * 4)
    )
    table = first_minus_others(rows, "T", {"ES": "efficacy.generate", "PS": "generalization.generate"})
    found = {line[0]: (line[1].value, line[1].n) for line in table.rows}  # type: ignore[union-attr]
    assert found == {"a - b": (0.5, 2), "a - c": (0.25, 4)} and [line[2] for line in table.rows] == [None, None]
    assert (
        "50.0" in table.markdown()
        and "n=4" in table.markdown()
        and "n = 2 except where a cell says" in table.markdown()
    )
    alone = first_minus_others(rows, "T", {"ES": "efficacy.generate"}, ["c"])
    assert [(line[0], line[1].value) for line in alone.rows] == [("c - unedited", 0.5)]  # type: ignore[union-attr]
    apart = rows[(rows["method"] != "b") | (rows["case"] == "0")]
    apart = apart[(apart["method"] != "a") | (apart["case"] != "0")]
    assert first_minus_others(apart, "T", {"ES": "efficacy.generate"}).rows[0] == ["a - b", None]


def test_failed_cases_are_counted_and_named() -> None:
    rows = frame(*(line | {"failed": line["case"] == "1"} for m in ("m", "unedited") for line in series(m, [1, 0])))
    found = score(rows, "efficacy.generate", "m")
    assert found and found.failed == ("1",) and found.n == 2
    table = metric_table(rows, "T", {"ES": "efficacy.generate"}, ["m"])
    assert any("m: the fit of 1 cases failed (1)" in note for note in table.notes())


def test_mistakes_are_named() -> None:
    rows = frame(*series("a", [1]), *series("unedited", [0]))
    with pytest.raises(ConfigError, match="did you mean efficacy.generate"):
        score(rows, "efficacy.generated", "a")
    with pytest.raises(RecordError, match="no rows of method 'z'; there are a, unedited"):
        score(rows, "efficacy.generate", "z")
    assert score(rows, "generalization.generate", "a") is None
    with pytest.raises(RecordError, match="of two runs"):
        score(
            pd.concat([rows[rows["method"] == "a"], rows[rows["method"] != "a"].assign(prompt="Q")]),
            "efficacy.generate",
            "a",
        )
    with pytest.raises(ConfigError, match="ask for these"):
        METRICS["score.prob"].per_case(select(rows, "a"))
    assert METRICS["efficacy.generate"].per_case(select(rows, "a")).to_dict() == {"0": 1.0}


# -- tables, glossary, published numbers ---------------------------------------------------------------------------------


def test_a_table_renders_and_escapes() -> None:
    rate = Rate(0.5, 0.25, 0.75, 8, "p: <all>", "bootstrap over cases")
    table = Table("A <b>", ["method", "x|y"], [["s&|", rate], ["t", None]], "note <i>",
                  {"GPT": {"t": {"x|y": 12.5}, "other": {"x|y": 1.0}}})  # fmt: skip
    assert table.markdown().splitlines()[2:7] == [
        r"| method | x\|y | x\|y (published, GPT) |",
        "|---|---:|---:|",
        r"| s&\| | 50.0 [25.0, 75.0] | - |",
        "| t | - | 12.5 |",
        "| other | - | 1.0 |",
    ]
    page = table.html()
    assert "A &lt;b&gt;" in page and "s&amp;|" in page and "note &lt;i&gt;" in page and "p: &lt;all&gt;" in page
    assert "<b>" not in page and "<i>" not in page
    assert table.csv().splitlines()[:2] == [
        "method,x|y,x|y low,x|y high,x|y n,\"x|y (published, GPT)\"", "s&|,0.5,0.25,0.75,8,"
    ]  # fmt: skip
    console = Console(width=120, record=True, file=StringIO())
    console.print(table.rich())
    shown = console.export_text()
    assert "50.0" in shown and "[25.0, 75.0]" in shown and "note <i>" in shown
    with pytest.raises(ShapeError, match="expected 2 cells"):
        Table("A", ["method", "x"], [["s"]])
    with pytest.raises(ShapeError, match="two rows of 'A' have the label 's'"):
        Table("A", ["method", "x"], [["s", 1], ["s", 2]])


def test_a_table_fits_the_terminal_and_puts_published_numbers_below() -> None:
    """At any width no line is longer, no word is folded letter by letter, and every number is there once."""
    letters = ("CI", "CII", "SA", "RS")

    def rate(value: float) -> Rate:
        return Rate(value, value - 0.05, value + 0.05, 150, "p", "bootstrap over cases")

    ours = [["unedited", *[rate(0.1)] * 4, *[None] * 4], ["sake", *[rate(0.875)] * 4, *[rate(0.625)] * 4]]
    theirs = {
        model: {{"SAKE": "sake"}.get(name, name): own for name, own in numbers.items()}
        for model, numbers in PUBLISHED["sake-ripple"].items()
    }
    beside = {f"{one} (SAKE's protocol)": ("SAKE's protocol", one) for one in letters}
    table = Table("RippleEdits", ["method", *letters, *beside], ours, "", theirs, beside)
    for width in (60, 80, 110, 140, 300):
        console = Console(width=width, record=True, file=StringIO())
        console.print(table.rich(width))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        assert text.count("87.5") == 4 and text.count("[57.5, 67.5]") == 4 and text.count("54.59") == 1
        assert "Uniform steering" in text and "Llama-2-7b" in text and "SAKE's protocol" in text
    assert table.notes()[-2] == "CI, CII, SA, RS, " + ", ".join(beside) + ": p"  # a protocol is told once
    assert "47.72" in table.markdown() and table.markdown().count("87.5 [82.5, 92.5]") == 4
    assert table.markdown().count("*published") == 1 and "| CI (GPT2-XL) |" in table.markdown()
    heads = re.findall(r'<th scope="colgroup" colspan="(\d)">([^<]*)</th>', table.html())
    assert heads == [
        ("4", ""),
        ("4", "SAKE&#x27;s protocol"),
        ("4", "published, GPT2-XL"),
        ("4", "published, Llama-2-7b"),
    ]
    assert table.csv().splitlines()[0].startswith("method,CI,CI low,CI high,CI n,CII")


def test_the_glossary_names_metrics_that_are_there() -> None:
    for one in TERMS:
        assert one.ours in METRICS and (one.published is None or one.published in METRICS), one
        assert (one.published in (one.ours, None)) or one.fault, one  # two protocols need a reason
    assert term("SAKE", "RS").ours == "relation_specificity.generate" and term("ROME", "RS").ours == "consistency.tfidf"
    with pytest.raises(ConfigError, match="there are S, ES"):
        term("ROME", "XX")
    assert all(metric.protocol.startswith(f"{name}: ") for name, metric in METRICS.items())


def test_published_numbers() -> None:
    assert PUBLISHED["sake-ripple"]["Llama-2-7b"]["ActAdd"] == {"CI": 9.57, "CII": 18.12, "SA": 47.69, "RS": 59.40}
    assert "Spec" not in PUBLISHED["sake-counterfact"]["GPT2-XL"]["Uniform steering"]
    assert PUBLISHED["rome-counterfact"]["GPT2-XL"]["ROME"]["RS"] == 41.9
    # Column sums of tables.md, so that no number was mistyped or lost
    sums = {
        ("rome-counterfact", "GPT2-XL", "S"): 430.4, ("rome-counterfact", "GPT-J", "NS"): 304.7,
        ("sake-ripple", "GPT2-XL", "SA"): 218.68, ("sake-counterfact", "Llama-2-7b", "Gen"): 279.74,
        ("grace-scotus", "BERT", "TRR"): 3.40, ("ke-fever", "BERT-base", "retain"): 817.93,
    }  # fmt: skip
    for (preset, model, metric), total in sums.items():
        assert sum(own[metric] for own in PUBLISHED[preset][model].values()) == pytest.approx(total), (preset, metric)


def test_rows_of_the_golden_run_are_read_from_disk_alike(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "units" / "a.parquet", [json.loads(x) for x in (GOLDEN / "rows.jsonl").read_text().splitlines()]
    )
    read, given = read_rows(tmp_path), golden()
    for metric in ("score.prob", "specificity.sake_code", "compositionality_i.sake_code", "specificity.gate"):
        assert score(read, metric, "sake") == score(given, metric, "sake")
