"""`errata bench` on the command line: a small run on Atlas, its refusals, going on, and what it prints."""

import json
from pathlib import Path
from typing import Any

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
    wrong = bench("sake-counterfact", "--model", "atlas", "--out", tmp_path / "a", "--data-option", "seed=1")
    assert wrong.exit_code == 2 and "no data set has an option 'seed'; there are flagged, bad" in wrong.stderr
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


def test_what_a_run_leaves_out_of_its_data_is_printed_and_kept(tmp_path: Path) -> None:
    rewrite: dict[str, Any] = {"prompt": "{} was written in", "relation_id": "P407", "subject": "Codex Umbra"}
    rewrite |= {"target_new": {"str": "Danish"}, "target_true": {"str": "Latin"}}
    row = {"case_id": 1, "requested_rewrite": rewrite, "paraphrase_prompts": [], "neighborhood_prompts": []}
    other = {**row, "case_id": 3, "requested_rewrite": {**rewrite, "target_new": {"str": "Welsh"}}}
    rows = [{**one, "generation_prompts": []} for one in (row, other)]
    data, run = tmp_path / "counterfact.json", tmp_path / "run"
    data.write_text(json.dumps([rows[0], {"case_id": 2}, rows[1]]))
    words = ("sake-counterfact", "--model", "atlas", "--methods", "sake", "--data", data, "--out", run, "--workers", 1)
    refused = bench(*words)
    said = " ".join(refused.stderr.split())
    assert refused.exit_code != 0 and "row 2, field requested_rewrite" in said and not run.exists()
    done = bench(*words, "--data-option", "bad=skip")
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "2 left out of the data" in said and "as case 1 does, to another object" in said
    kept = json.loads((run / "run.json").read_text())["spec"]
    assert (kept["n"], kept["data_options"]) == (1, {"bad": "skip"})
    left_out = json.loads((run / "summary.json").read_text())["left_out"]
    assert list(left_out) == [f"{data}, row 2, field requested_rewrite", "case 3"]
    (run / "summary.json").unlink()
    again = bench("resume", run, "--json", "--no-report")
    assert again.exit_code == 0 and json.loads(again.stdout)["left_out"] == left_out
    assert "left out of the data: 2 (" in (run / "report.md").read_text()


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "errata.bench.preset.available_presets", lambda: ["grace-scotus", "sake-counterfact", "sake-doubt"]
    )


def test_all_goes_on_past_what_breaks_and_says_what_is_not_for_the_model(
    tmp_path: Path, three: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.bench import runner

    folder, real = tmp_path / "all", runner.run

    def broken(plan: Any, *rest: Any, **options: Any) -> Any:
        if plan.preset.name == "sake-counterfact":
            raise ZeroDivisionError("by zero")
        return real(plan, *rest, **options)

    words = ("all", "--model", "atlas", "--methods", "icl", "--n", 2, "--out", folder, "--no-report")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", broken)
        first = bench(*words, "--json")
    told = " ".join(first.stderr.split())
    assert first.exit_code == 1 and "left out: grace-scotus is for models of the kind classifier" in told
    assert "sake-counterfact was not finished: ZeroDivisionError: by zero" in told
    assert "in broken" in (folder / "sake-counterfact.error.txt").read_text()
    found = json.loads(first.stdout)
    assert found["unfinished"] == ["sake-counterfact"] and len(found["runs"]) == 1
    before = (folder / "sake-doubt" / "run.json").read_bytes()
    again = bench("resume", folder, "--json")
    assert again.exit_code == 0, again.stderr
    assert "[sake-doubt](sake-doubt/report.md)" in (folder / "README.md").read_text()
    assert bench("report", folder, "--out", tmp_path / "docs").exit_code == 0
    assert (tmp_path / "docs" / "sake-counterfact" / "report.md").is_file()
    assert len(json.loads(again.stdout)["runs"]) == 2 and not list(folder.glob("*.error.txt"))
    assert (folder / "sake-doubt" / "run.json").read_bytes() == before  # it was finished
    spec = json.loads((folder / "sake-counterfact" / "run.json").read_text())["spec"]
    assert list(spec["methods"]) == ["icl"] and spec["asked_n"] == 2
    other = bench(*words[:-2], folder, "--seed", 3, "--no-report")
    assert other.exit_code == 2 and "holds other runs (seed is 0 there and 3 here)" in " ".join(other.stderr.split())


def test_ctrl_c_names_the_command_that_goes_on_with_all(
    tmp_path: Path, three: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("errata.bench.runner.run", stopped)
    found = bench("all", "--model", "atlas", "--n", 2, "--out", tmp_path / "all")
    assert found.exit_code == 130 and f"`errata bench resume {tmp_path / 'all'}` goes on" in " ".join(
        found.stderr.split()
    )
