"""Reports: the page holds what the rows say, and nothing that a model says is markup."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from errata.bench.report import examples, failures, glossary, rows_of, write_report, write_reports
from errata.bench.rows import FITS, SCHEMA, write_rows
from errata.errors import ConfigError

EVIL = "<script>alert('x')</script> | **bold**"


def row(method: str, case: str, probe: int, kind: str, generated: str, passed: bool, **more: Any) -> dict[str, Any]:
    """A row of a small run."""
    kept = kind == "neighborhood"
    return {
        "run": "r", "model": "m", "method": method, "setting": "single", "edits": 0 if method == "unedited" else 1,
        "case": case, "edit": f"e{case}", "probe": probe, "kind": kind, "test": "", "joined": "and", "condition": False,
        "tags": {"form": "cloze"}, "prompt": f"Prompt {case}.{probe} is", "expected": [] if kept else ["red"],
        "alternatives": ["green"], "generated": generated, "first_token": generated[:4], "unedited": " green.",
        "p_expected": 0.9 if passed else 0.1, "p_alternative": 0.2, "p_expected_first": 0.9, "p_alternative_first": 0.2,
        "token_accuracy": float(passed), "passed": passed, **more,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of sake-counterfact: four cases, two methods; one fit of rome failed."""
    rows: list[dict[str, Any]] = []
    for i in range(4):
        case = str(i)
        for probe, kind in enumerate(("edit", "paraphrase", "neighborhood")):
            kept = kind == "neighborhood"
            rows.append(row("unedited", case, probe, kind, " green.", kept))
            rows.append(
                row(
                    "sake",
                    case,
                    probe,
                    kind,
                    " green." if kept else " red.",
                    True,
                    gate="" if kept else f"e{case}",
                    distance=1.0,
                    own_distance=1.0,
                )
            )
            if i < 3:
                said = f" {EVIL}" if (kind, i) == ("paraphrase", 0) else " red." if kind == "edit" else " green."
                rows.append(row("rome", case, probe, kind, said, kind != "paraphrase"))
    write_rows(tmp_path / "units" / "all.parquet", rows, SCHEMA)
    fits = [
        {"run": "r", "model": "m", "method": m, "case": str(i), "edit": f"e{i}", "seconds": 0.5, "nbytes": 100,
         "error": "no subject" if (m, i) == ("rome", 3) else "", "report": "{}"}
        for m in ("sake", "rome") for i in range(4)
    ]  # fmt: skip
    write_rows(tmp_path / "fits" / "all.parquet", fits, FITS)
    methods = {
        m: {"label": m, "editor": m, "setting": "single", "preset": None, "changes": {}, "config": {"a": 1}}
        for m in ("sake", "rome")
    }
    spec = {
        "preset": "sake-counterfact",
        "model": "tiny",
        "methods": methods,
        "n": 4,
        "seed": 3,
        "data": None,
        "split": "test",
    }
    about = {"spec": spec, "command": f"errata bench sake-counterfact --note \"{EVIL}\"", "versions": {"errata": "0"}, "threads": 1,
             "machine": {"cores": 2, "memory_gib": 8, "processor": "x", "device": "cpu"}, "started": "now", "resumed": []}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(about), encoding="utf-8")
    speed = {"tokens_per_second": 50.0, "tokens_per_second_unedited": 100.0, "edits_while_timed": 1}
    (tmp_path / "summary.json").write_text(json.dumps({"methods": {m: speed for m in methods}}), encoding="utf-8")
    return tmp_path


def test_page_and_markdown_hold_tables_figures_examples_and_how_it_was_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write_report(run, out) == out / "report.html"
    page, text = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for part in ("CounterFact", "85.05", "seed 3", "no subject", "Glossary", "one token that begins the answer"):
        assert part in page and part in text
    assert 'src="data:image/png;base64,' in page and 'src="http' not in page and "<script" not in page
    assert "![" in text and (out / "figures" / "sake-counterfact.png").read_bytes().startswith(b"\x89PNG")
    assert "<script" not in text.replace("\\<script", "").replace("`errata", "\n").split("command:")[0]


def test_reports_of_all_stand_side_by_side_behind_an_overview(run: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "all", tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"no run in .* is finished; `errata bench resume"):
        write_reports(folder, out)
    for name, finished in (("first", "2026-01-01T10:12:30+00:00"), ("second", None)):
        shutil.copytree(run, folder / name, ignore=shutil.ignore_patterns("all", "out"))
        about = json.loads((folder / name / "run.json").read_text())
        about |= {"started": "2026-01-01T10:00:00+00:00"} | ({"finished": finished} if finished else {})
        (folder / name / "run.json").write_text(json.dumps(about))
    assert write_reports(folder, out) == out / "README.md"
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "[sake-counterfact](first/report.md)" in text and "| 4 | 12.5 |" in text and "second" not in text
    assert (out / "first" / "report.html").is_file() and not (out / "second").exists()


def test_what_models_and_commands_say_is_escaped(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page and "<script>" not in page


def test_examples_are_wins_and_failures_side_by_side(run: Path) -> None:
    found = examples(rows_of(run))
    assert {e.sort for e in found} == {"sake right", "rome right", "rome wrong"}
    lost = next(e for e in found if e.sort == "rome wrong")
    assert lost.kind == "paraphrase"
    said = {m: answer.right for answer in lost.answers for m in answer.methods}
    assert said == {"unedited": False, "sake": True, "rome": False}
    assert len({(e.case, e.prompt) for e in found}) == len(found)
    assert found == examples(rows_of(run))


def test_methods_stand_in_the_order_of_the_run(run: Path) -> None:
    assert list(dict.fromkeys(rows_of(run)["method"])) == ["unedited", "sake", "rome"]


def test_failed_fits_are_counted_and_named(run: Path) -> None:
    assert failures(run) == {"rome": [("no subject", 1, "3")]}


def test_glossary_has_only_terms_that_the_rows_can_fill(run: Path) -> None:
    letters = {(term.paper, term.letters) for term in glossary(rows_of(run))}
    assert ("SAKE", "Acc") in letters and ("ROME", "S") in letters
    assert ("SAKE", "CI") not in letters and ("ROME", "GE") not in letters


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.json"):
        write_report(tmp_path / "nothing", tmp_path)


def test_a_run_without_cases_has_a_report_of_its_own_files(run: Path) -> None:
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    about["spec"] |= {"preset": "rome-trace", "n": 0, "methods": {}}
    (run / "run.json").write_text(json.dumps(about), encoding="utf-8")
    (run / "units" / "all.parquet").unlink()
    write_report(run, run)
    assert "ROME" in (run / "report.html").read_text(encoding="utf-8")
