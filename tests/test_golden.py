"""The rows of a tiny run, checked by hand once (`golden_run.py` makes them), and figures read off them with pencil and paper."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from errata.bench.metrics import score
from golden_run import GOLDEN, made

BY_HAND = {  # (unedited, icl); margins are means over the two edits of each one's mean of p_expected - p_alternative
    "efficacy.generate": (0, 1),  # " Russia.", " Ivory Coast."
    "generalization.generate": (0, 1),  # four of four
    "specificity.generate": (1, 1),
    "portability.generate": (0, 0),  # " London." where Moscow and Yamoussoukro follow
    "portability.generate_known": (0, 0),  # both capitals are known
    "efficacy.prob": (0, 1),
    "efficacy_magnitude.prob": (-0.84860, 0.87355),  # (0.9894 - 0.0099 + 0.9450 - 0.1774) / 2
    "generalization_magnitude.prob": (-0.983, 0.84),  # ((0.9974 + 0.9973) / 2 + (0.7763 + 0.5890) / 2) / 2
    "specificity_magnitude.prob": (0.973025, 0.973025),  # ((0.9974 + 0.9973) / 2 + (0.9653 + 0.9321) / 2) / 2
}


@pytest.fixture(scope="module")
def kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]


def test_the_run_says_today_what_it_said(kept: list[dict[str, Any]], tmp_path: Path) -> None:
    again = json.loads(json.dumps(made(tmp_path / "run")))
    assert len(again) == len(kept) == 28
    for now, then in zip(again, kept, strict=True):
        assert set(now) == set(then)
        for name, value in then.items():
            assert now[name] == (pytest.approx(value, abs=2e-3) if isinstance(value, float) else value), (
                name,
                then["prompt"],
            )


@pytest.mark.parametrize("metric", BY_HAND)
def test_figures_read_off_the_rows(metric: str, kept: list[dict[str, Any]]) -> None:
    rows = pd.DataFrame(kept)
    rows["tags"] = [tuple(tags.items()) if isinstance(tags, dict) else tags for tags in rows["tags"]]
    for method, figure in zip(("unedited", "icl"), BY_HAND[metric], strict=True):
        found = score(rows, metric, method)
        assert found is not None and found.value == pytest.approx(figure, abs=1e-4)
