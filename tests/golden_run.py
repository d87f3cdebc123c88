"""Makes the rows of a tiny run, `golden/run.jsonl`: `python tests/golden_run.py` asks Atlas two edits as `errata bench` does.

Two edits of `dev` facts, few probes each, unedited and with the edit in context; numbers to four places. `test_golden.py` makes the run
again and holds it to the file, and its figures to what a person read off the rows: to be read again when the file is.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.bench.cases import Case
from errata.bench.data.registry import load_cases
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets._common import only
from errata.bench.rows import SCHEMA, results
from errata.bench.runner import Plan, run
from errata.files import write_atomically

GOLDEN = Path(__file__).parent / "golden" / "run.jsonl"
METHODS = (Method("icl", "icl"),)
MOST = {
    "edit": 1,
    "paraphrase": 2,
    "neighborhood": 2,
    "attribute": 1,
    "portability": 2,
}  # of portability a test, its condition


def cases(_: Context) -> Sequence[Case]:
    """Two edits from which something follows, with the first probes of some kinds."""
    drawn = load_cases("atlas-counterfact", n=2, split="dev", portable="yes", implications="none")
    return only(drawn, *MOST, most=MOST)


def made(folder: Path) -> list[dict[str, Any]]:
    """The rows of the run, made in the folder, without what is of the run alone."""
    import errata

    preset = Preset("golden", "Golden", "ours", cases, METHODS, lambda *_: ())
    model, tokenizer = errata.load("atlas")
    run(Plan(preset, "atlas", METHODS, split="dev"), folder, model, tokenizer, cache=False)
    lines = results(folder)[SCHEMA.names[2:]].to_dict("records")
    return [{name: _plain(value) for name, value in line.items()} for line in lines]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if value is None or value != value:
        return None
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        rows = made(Path(folder) / "run")
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    write_atomically(GOLDEN, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
