"""Merge the two independent passes over Atlas's fact tables into the tables that ship.

    python scripts/merge_fact_passes.py [--check]

`atlas-review/first/*.csv` holds the first author's rows, `atlas-review/second/*.csv` the answers of a second author who
saw only the subjects and the columns. A cell ships when both passes give the same value (case, accents, hyphens and a
leading article aside); every other cell is dropped. `--check` fails if the shipped tables are not what the passes give.
"""

import argparse
import csv
import io
import sys
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REVIEW, TABLES = ROOT / "atlas-review", ROOT / "src" / "errata" / "atlas" / "data"

# Differences in spelling, not in substance, seen between the passes; the first pass's spelling ships.
SPELLINGS = {
    frozenset(pair)
    for pair in (
        ("actor", "actress"),
        ("football manager", "football coach"),
        ("film director", "director"),
        ("New York City", "New York"),
        ("novelist", "writer"),
        ("author", "writer"),
        ("author", "novelist"),
        ("footballer", "soccer player"),
        ("footballer", "association football player"),
        ("tennis player", "tennis"),
        ("singer", "musician"),
        ("singer", "singer-songwriter"),
        ("entrepreneur", "businessman"),
        ("entrepreneur", "business magnate"),
        ("entrepreneur", "businessperson"),
        ("automotive", "automobile"),
        ("aerospace", "aviation"),
        ("retail", "retailing"),
        ("pharmaceuticals", "pharmaceutical"),
        ("Eastern Caribbean dollar", "East Caribbean dollar"),
        ("Mount Agou", "Mont Agou"),
        ("David Granger", "David A. Granger"),
        ("Peter Christian", "Peter M. Christian"),
        ("Jabal Shams", "Jebel Shams"),
        ("Grand Duke Henri", "Henri, Grand Duke of Luxembourg"),
        ("adventure fiction", "adventure"),
    )
}


def normal(value: str) -> str:
    """A value without accents, case, hyphens, apostrophes, dots and a leading article."""
    plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode() or value
    plain = plain.casefold().replace("-", " ")
    return plain.translate(str.maketrans("", "", ".'")).removeprefix("the ").strip()


ALIKE = {frozenset(normal(v) for v in pair) for pair in SPELLINGS}


def agree(first: str, second: str) -> bool:
    """Whether the two passes say the same thing."""
    a, b = normal(first), normal(second)
    titled = b.startswith((f"{a} of ", f"{a}, "))  # "Harald V" and "Harald V of Norway"
    return a == b or titled or frozenset((a, b)) in ALIKE


def read(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {next(iter(row.values())).strip(): row for row in csv.DictReader(file)}


def merge(name: str) -> tuple[str, list[str]]:
    """The shipped table as CSV text, and a line for each dropped cell."""
    first, second = read(REVIEW / "first" / name), read(REVIEW / "second" / name)
    key, *columns = next(iter(first.values()))
    out, dropped = io.StringIO(), []
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([key, *columns])
    for subject, row in first.items():
        kept = []
        for column in columns:
            a = (row[column] or "").strip()
            b = (second.get(subject, {}).get(column) or "").strip()
            ok = bool(a) and agree(a, b)
            if a and not ok:
                dropped.append(f"{name}: {subject} / {column}: {a!r} against {b!r}")
            kept.append(a if ok else "")
        if any(kept):
            writer.writerow([subject, *kept])
    return out.getvalue(), dropped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if a shipped table differs")
    parser.add_argument("--dropped", action="store_true", help="print each dropped cell")
    args = parser.parse_args()
    stale = 0
    for path in sorted((REVIEW / "first").glob("*.csv")):
        text, dropped = merge(path.name)
        target = TABLES / path.name if path.name == "aliases.csv" else TABLES / "facts" / path.name
        if args.check:
            stale += target.read_text(encoding="utf-8") != text
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        if args.dropped:
            print("\n".join(dropped))
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
