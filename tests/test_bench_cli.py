"""`errata bench` on the command line: a small run on Atlas, its refusals, going on, and what it prints."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from errata.cli import app

pytestmark = pytest.mark.atlas


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def test_what_there_is_and_what_there_is_not(tmp_path: Path) -> None:
    found = json.loads(bench("list", "--json").stdout)["presets"]
    names = [preset["name"] for preset in found]
    assert names == sorted(names) and {"sake-counterfact", "rome-counterfact"} <= set(names)
    assert all(preset["title"] and preset["source"] for preset in found)
    wrong = bench("sake-conterfact", "--model", "atlas", "--out", tmp_path / "a")
    assert (
        wrong.exit_code == 2 and "did you mean sake-counterfact" in wrong.stderr and "rome-counterfact" in wrong.stderr
    )
    wrong = bench("sake-counterfact", "--model", "atlas", "--out", tmp_path / "a", "--methods", "sake,rone")
    assert wrong.exit_code == 2 and "no method 'rone'" in wrong.stderr and "did you mean rome" in wrong.stderr
    wrong = bench("sake-counterfact", "--model", "atlas", "--out", tmp_path / "a", "--address", "x")
    assert wrong.exit_code == 2 and "--address belongs to --engine ray" in wrong.stderr
    assert bench("resume", tmp_path).exit_code == 2 and not (tmp_path / "a").exists()


def test_a_small_run_goes_on_and_shows_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("sake-counterfact", "--model", "atlas", "--methods", "icl,rome", "--n", 2, "--out", run, "--no-report")
    first = bench(*words)
    assert first.exit_code == 0, first.stderr
    assert "unedited" in first.stdout and "tokens/s" in first.stdout
    spec = json.loads((run / "run.json").read_text())["spec"]
    assert spec["n"] == 2 and list(spec["methods"]) == ["icl", "rome"] and spec["model"] == "atlas"
    rows = json.loads(bench("rows", run, "--where", "kind = edit", "--json").stdout)
    assert rows["total"] == 6
    passed = {(r["method"], r["case"]): r["passed"] for r in rows["rows"]}
    assert [sum(p for (m, _), p in passed.items() if m == method) for method in ("unedited", "icl", "rome")] == [
        0,
        2,
        2,
    ]
    (run / "units" / "rome-0000.parquet").unlink()
    again = bench("resume", run, "--no-report", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["methods"]["rome"]["fits"] == 2
    assert json.loads(bench("rows", run, "--where", "kind = edit", "--json").stdout)["rows"] == rows["rows"]
    other = bench(*words[:-4], 5, *words[-3:])
    assert other.exit_code == 2 and "another run (asked_n is 2 there and 5 here)" in " ".join(other.stderr.split())
