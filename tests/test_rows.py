"""Rows on disk: written whole, read by conditions, shown by the command; failed fits and references join them."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from errata.bench.cases import Case
from errata.bench.fluency import TfIdf
from errata.bench.metrics import difference, score
from errata.bench.rows import FITS, count, read_cases, read_fits, read_rows, results, write_cases, write_rows
from errata.bench.rows import SCHEMA as ROWS
from errata.cli import bench_rows
from errata.cli.common import CommandGroup
from errata.edit import EditRequest
from errata.errors import ConfigError, RecordError


def line(**given: Any) -> dict[str, Any]:
    return {
        "run": "r", "model": "tiny", "method": "unedited", "setting": "single", "edits": 0, "case": "1", "edit": "e1", "probe": 0,
        "kind": "edit", "test": "", "joined": "and", "condition": False, "tags": {}, "prompt": "P", "expected": ("Varde",),
        "alternatives": (), "generated": " Osso.",
    } | given  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [
        line(tags={"tokens": "64"}, p_expected=0.25),
        line(probe=1, kind="generation", generated="P is old.", expected=()),
        line(case="2", edit="e2", tags={"tokens": "256", "form": "cloze"}, expected=("Lund", "City of Lund"), p_expected=0.75,
             answers=(("Lund",), ("City of Lund", "Lund town"))),
        line(case="2", edit="e2", probe=1, condition=True, kind="portability", generated=" it's Lund"),
    ]  # fmt: skip
    edited = [line(method="sake", edits=1, generated=" Varde.", gate="e1", passed=True)]
    for k in (2, 10):
        write_rows(tmp_path / f"units/unedited-{k}.parquet", rows[:2] if k == 2 else rows[2:])
    write_rows(tmp_path / "units/sake-0.parquet", edited)
    write_rows(tmp_path / "fits/sake-0.parquet", [
        {"method": "sake", "case": "1", "edit": "e1", "seconds": 0.5, "nbytes": 100, "error": ""},
        {"method": "sake", "case": "2", "edit": "e2", "error": "no wording took"},
    ], FITS)  # fmt: skip
    request = EditRequest(prompt="The capital of {} is", subject="Norland", target_new="Varde", target_true="Osso")
    weights = TfIdf({"varde": 1.5, "città": 2.0})
    write_cases(tmp_path, [Case("1", request, (), ("Varde is a city.",), {"relation": "capital"}, weights)])
    return tmp_path


def test_rows_come_back_as_written_units_in_order(run: Path) -> None:
    found = read_rows(run)
    assert found["case"].tolist() == ["1", "1", "1", "2", "2"]  # sake-0, unedited-2, unedited-10
    assert found["tags"].tolist()[1] == {"tokens": "64"} and found["tags"].tolist()[0] == {}
    assert found["expected"].tolist()[3] == ("Lund", "City of Lund") and found["expected"].tolist()[2] == ()
    assert found["answers"].tolist()[2:4] == [(), (("Lund",), ("City of Lund", "Lund town"))]
    assert found["p_expected"].tolist()[1:4:2] == [0.25, 0.75] and found["p_expected"].isna().tolist()[0]
    assert read_rows(run, columns=["kind", "probe"]).columns.tolist() == ["kind", "probe"]
    assert len(read_rows(run, limit=2)) == 2
    assert read_fits(run)["nbytes"].tolist()[0] == 100
    assert read_cases(run)["1"]["references"] == ["Varde is a city."]
    assert read_cases(run)["1"]["request"]["target_new"] == "Varde"


@pytest.mark.parametrize(
    ("where", "n"),
    [
        ("kind = edit", 3),
        ("kind == edit and method != unedited", 1),
        ("p_expected >= 0.75", 1),
        ("p_expected < 0.75 and case in (1, 2)", 1),
        ("tags.tokens = 256", 1),
        ("expected contains Lund", 2 - 1),
        ("expected contains 'City of'", 0),  # whole entries of a list
        ("generated contains Varde", 1),
        ('generated = " it\'s Lund"', 1),
        ("gate is null", 4),
        ("gate is not null and passed = true", 1),
        ("condition = true", 1),
        ("edits > 0", 1),
    ],
)
def test_conditions(run: Path, where: str, n: int) -> None:
    assert len(read_rows(run, where)) == count(run / "units", ROWS, where) == n


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "expected a column at the end"),
        ("knd = edit", "did you mean 'kind'"),
        ("kind = edit and", "expected a column at the end"),
        ("kind = edit or case = 1", "expected 'and' or the end, found 'or'"),
        ("kind", "expected one of"),
        ("p_expected = high", "expected a value of type double"),
        ("passed = maybe", "expected a value of type bool"),
        ("tags = a", "name a tag"),
        ("expected = Lund", "use contains"),
        ("answers contains Lund", "list of lists"),
        ("edits contains 1", "contains is for texts"),
        ("case in (1, 2", "at the end"),
        ("kind = __import__('os').getcwd()", "expected 'and' or the end"),
        ("kind = 'edit", "put a text with such signs in quotes"),
    ],
)
def test_bad_conditions_say_what_was_expected(run: Path, where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        read_rows(run, where)


def test_bad_rows_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "units" / "a.parquet"
    with pytest.raises(RecordError, match="row 1 of .* has no column 'methods'; did you mean 'method'"):
        write_rows(path, [line(), line(methods="sake")])
    with pytest.raises(RecordError, match="column edits of .*expected int32"):
        write_rows(path, [line(edits="many")])
    with pytest.raises(RecordError, match="column expected"):
        write_rows(path, [line(expected="Lund")])  # else it were four answers of one letter
    assert not list(tmp_path.rglob("*"))
    with pytest.raises(RecordError, match="found none; name the directory"):
        read_rows(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(RecordError, match="cannot read the rows"):
        read_rows(tmp_path)


def test_a_failed_fit_counts_as_the_unedited_model_answers(run: Path) -> None:
    found = results(run)
    stand_in = found[found["failed"]]
    assert len(found) == 6 and len(stand_in) == 1  # its condition is not asked of the method
    one = stand_in.iloc[0]
    assert (one["method"], one["case"], one["generated"], one["setting"]) == ("sake", "2", " Osso.", "single")
    assert (one["edits"], one["gate"]) == (1, "")
    assert found["references"].tolist()[2] == ("Varde is a city.",) and found["references"].tolist()[0] == ()
    assert {tfidf.idf["città"] for tfidf in found["tfidf"]} == {2.0}
    (run / "idf.json").unlink()
    assert results(run)["tfidf"].tolist() == [None] * 6  # a run without weights
    (run / "idf.json").write_text("[1]")
    with pytest.raises(RecordError, match="idf.json, but .*run the benchmark again"):
        results(run)


def test_a_failed_case_counts_at_every_checkpoint_whose_span_contains_it(tmp_path: Path) -> None:
    """Case 2 of 4 fails in a sequence asked after 1, 3 and 4 edits, and case 3 of a stream looked at after 1, 2 and 3 edits."""
    plain = [line(case=str(c), edit=f"e{c}") for c in range(1, 5)]
    rows, fits = list(plain), []
    for method in ("rome", "sake"):
        for edits in (1, 3, 4):
            held = [c for c in range(1, edits + 1) if (method, c) != ("rome", 2)]
            rows += [one | {"method": method, "setting": "sequential", "edits": edits, "generated": " Varde."}
                     for one in plain if int(one["case"]) in held]  # fmt: skip
        fits += [{"method": method, "case": str(c), "edit": f"e{c}", "error": "no subject" if (method, c) == ("rome", 2) else ""}
                 for c in range(1, 5)]  # fmt: skip
    made = [1, 2, 4]  # a stream's edits; what failed is told behind those that were made up to the next look
    for edits in (1, 2, 3):
        rows += [
            plain[c - 1] | {"method": "grace", "setting": "stream", "edits": edits, "generated": " Varde."}
            for c in made[:edits]
        ]
    fits += [
        {"method": "grace", "case": str(c), "edit": f"e{c}", "error": "" if c != 3 else "failed"} for c in (1, 2, 3, 4)
    ]
    write_rows(tmp_path / "units/all.parquet", rows)
    write_rows(tmp_path / "fits/all.parquet", fits, FITS)
    found = results(tmp_path)

    def cases(method: str, edits: int) -> str:
        own = found[(found["method"] == method) & (found["edits"] == edits)].sort_values("case")
        return " ".join(
            f"{case}{'-' if failed else ''}" for case, failed in zip(own["case"], own["failed"], strict=True)
        )

    assert [cases("rome", edits) for edits in (1, 3, 4)] == ["1", "1 2- 3", "1 2- 3 4"]
    assert [cases("grace", edits) for edits in (1, 2, 3)] == ["1", "1 2 3-", "1 2 3- 4"]
    lost = found[found["failed"]]
    assert set(lost["generated"]) == {" Osso."} and len(found) == len(rows) + len(lost) == len(rows) + 4
    rates = [score(found, "efficacy.generate", "rome", edits=edits) for edits in (1, 3, 4)]
    assert [(rate.value, rate.n) for rate in rates if rate] == [(1.0, 1), (pytest.approx(2 / 3), 3), (0.75, 4)]
    gap = difference(found, "efficacy.generate", "sake", "rome", edits=3)
    assert gap and gap.value == pytest.approx(1 / 3) and gap.n == 3


def test_the_command_shows_rows_as_a_table_json_and_csv(run: Path) -> None:
    app = typer.Typer(cls=CommandGroup)
    app.command("rows")(bench_rows.rows)
    app.command("other")(lambda: None)

    def said(*options: str) -> Any:
        return CliRunner().invoke(app, ["rows", str(run), *options])

    table = said("--where", "case = 2 and condition = false")
    assert table.exit_code == 0 and "Lund / City of Lund" in table.stdout and "Varde" not in table.stdout
    value = json.loads(said("--json", "--limit", "2", "--columns", "case,p_expected,tags").stdout)
    assert value["total"] == 5 and value["rows"][0] == {"case": "1", "p_expected": None, "tags": {}}
    assert value["rows"][1] == {"case": "1", "p_expected": 0.25, "tags": {"tokens": "64"}}
    assert "2 of 5 rows" in said("--limit", "2").stderr
    assert "Lund / City of Lund or Lund town" in said("--columns", "answers", "--where", "case = 2").stdout
    assert said("--csv", "--columns", "case,kind", "--where", "edits = 1").stdout == "case,kind\n1,edit\n"
    assert "no wording took" in said("--of", "fits").stdout
    refused = said("--where", "knd = a")
    assert refused.exit_code == 2 and "did you mean 'kind'" in refused.stderr
